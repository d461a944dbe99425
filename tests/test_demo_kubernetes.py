"""The demo's made-up cluster, asked by the real enricher: what the real alerts are said to be about."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from forwarder.alert import decode
from forwarder.demo_kubernetes import CREATED, KINDS, TOKEN, application, cluster, kubeconfig
from forwarder.enricher import Enrichment
from forwarder.enrichment.kubernetes import Kubernetes, KubernetesSettings
from forwarder.metrics import Metrics
from tests.samples import REAL_ALERTS, REAL_BODIES

ABSENT_BUT_ITS_HOST, ABSENT = "de5850adb200", "16514a12c7ad"


class Server:
    """The API server on a free port."""

    def __init__(self, app: web.Application) -> None:
        self.runner = web.AppRunner(app, handler_cancellation=True)
        self.url = ""

    async def start(self) -> None:
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def ask(self, path: str, **parameters: str) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(self.url + path, params=parameters) as answer,
        ):
            return answer.status, json.loads(await answer.read() or b"null")


@pytest.fixture
def app() -> web.Application:
    """Made before there is a loop, as in its process: it reads the samples."""
    return application()


@pytest.fixture
async def server(app: web.Application) -> AsyncIterator[Server]:
    made = Server(app)
    await made.start()
    yield made
    async with asyncio.timeout(5):
        await made.runner.cleanup()


@pytest.fixture
async def enricher(server: Server, tmp_path: Path) -> AsyncIterator[Kubernetes]:
    """The real one, its reflectors synced."""
    file = tmp_path / "kubeconfig"
    file.write_text(kubeconfig(server.url))
    loop = asyncio.get_running_loop()
    made = Kubernetes(
        KubernetesSettings(enabled=True, kubeconfig=str(file)),
        metrics=Metrics(["cloudwatch_logs"]),
        now=lambda: 1_800_000_000.0,
        monotonic=loop.time,
        rng=random.Random(1),
        environment={},
    )
    await made.start()
    async with asyncio.timeout(10):
        while not made.mirror.reflectors or any(made.mirror.stale(kind) for kind in KINDS):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    made.publish()
    yield made
    await made.stop()


def said(enricher: Kubernetes, container_id: str) -> dict[str, Any]:
    """What is said of the newest real alert about this container."""
    body = next(body for body in reversed(REAL_BODIES) if f'"container.id":"{container_id}'.encode() in body)
    (alert,) = decode(body).alerts
    found, _ = Enrichment([enricher], now=lambda: 0.0).of(alert, alert.time_ns or 0, "127.0.0.1")
    return dict(json.loads(b"{%b}" % found))


@pytest.mark.parametrize(
    ("container_id", "workload", "step", "node"),
    [
        ("3ad7b26ded6d", "Deployment/payments-api", "container_id", "vm"),
        ("4a2771303b70", "StatefulSet/orders-db", "container_id", "vm"),
        ("ec6c622b2afa", "CronJob/nightly-report", "container_id", "vm"),
        ("ee90b4bfa6d7", "Pod/storage-provisioner", "container_id", "minikube"),
        ("45dd76eff80f", "Pod/nginx", "name", "k8-worker-1"),
        ("97c9868ea832", "Pod/alpine", "name", "ip-10-0-2-33.eu-west-1.compute.internal"),
        ("6c9b72f1c563", "DaemonSet/falco", "name", "k8-worker-1"),
        ("281c99ea33c2", "Deployment/poolmgr-go-default-516098", "name", "vm"),
    ],
)
async def test_a_real_alert_gets_the_made_up_workload(
    enricher: Kubernetes, container_id: str, workload: str, step: str, node: str
) -> None:
    found = said(enricher, container_id)
    kubernetes = found["kubernetes"]
    assert "{kind}/{name}".format(**kubernetes["workload"]) == workload
    assert kubernetes["resolved_by"] == step
    assert kubernetes["stale"] is False
    assert kubernetes["namespace_labels"]["team"] == kubernetes["labels"]["team"]
    assert found["node"]["name"] == kubernetes["node"] == node
    assert found["node"]["instance_id"].startswith("i-")
    assert found["node"]["zone"] in found["node"]["provider_id"]


async def test_an_unknown_pod_stays_unknown(enricher: Kubernetes) -> None:
    assert said(enricher, ABSENT) == {}
    only_host = said(enricher, ABSENT_BUT_ITS_HOST)
    assert only_host.keys() == {"node"}, "by the Falco pod whose container id is the alert's hostname"
    assert only_host["node"]["instance_id"].startswith("i-")


async def test_what_the_alerts_say_is_kept(enricher: Kubernetes) -> None:
    payments = said(enricher, "3ad7b26ded6d")["kubernetes"]
    (told,) = {
        (fields["container.id"], fields["container.name"])
        for alert in REAL_ALERTS
        if (fields := alert.get("output_fields") or {}).get("container.name") == "payments-api"
    }
    assert (payments["container_id"], payments["container"]) == told
    assert payments["image"].endswith("/shop/payments-api:1.4.2")
    storage = said(enricher, "ee90b4bfa6d7")["kubernetes"]
    assert storage["pod_uid"] == "75cf460d-dd27-41e7-9d29-19b517dc730f"
    assert storage["container"] == "storage-provisioner"


def test_every_container_and_host_is_one_of_the_samples_or_nameless() -> None:
    samples = b"\n".join(REAL_BODIES).decode()
    made = cluster()
    for pod in made["pods"].values():
        (status,) = pod["status"]["containerStatuses"]
        short = status["containerID"].removeprefix("containerd://")[:12]
        assert f'"{short}' in samples or f'"hostname":"{pod["metadata"]["name"]}"' in samples
        assert pod["spec"]["nodeName"] in made["nodes"]
        assert pod["metadata"]["creationTimestamp"] == CREATED
    for name in made["nodes"]:
        assert name.startswith("ip-10-0-") or f'"hostname":"{name}"' in samples
    assert min(alert["time"] for alert in REAL_ALERTS) > CREATED


async def test_strangers_are_refused_and_a_pod_is_found_by_its_name(server: Server) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{server.url}/api/v1/pods") as refused,
        session.get(f"{server.url}/readyz") as ready,
    ):
        assert (refused.status, (await refused.json())["kind"], ready.status) == (401, "Status", 200)
    code, pod = await server.ask("/api/v1/namespaces/default/pods/nginx")
    assert (code, pod["kind"], pod["metadata"]["name"]) == (200, "Pod", "nginx")
    code, status = await server.ask("/api/v1/namespaces/default/pods/nobody")
    assert (code, status["reason"]) == (404, "NotFound")


async def test_a_watch_is_quiet_but_for_a_bookmark_and_ends_with_its_time(server: Server) -> None:
    began = asyncio.get_running_loop().time()
    code, event = await server.ask("/apis/batch/v1/jobs", watch="1", timeoutSeconds="1")
    assert (code, event["type"], event["object"]["metadata"]) == (200, "BOOKMARK", {"resourceVersion": "1"})
    assert asyncio.get_running_loop().time() - began >= 1


async def test_the_server_stops_at_once_with_watches_open(server: Server) -> None:
    watch = asyncio.create_task(server.ask("/api/v1/pods", watch="1", timeoutSeconds="600"))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(2):
        await server.runner.cleanup()
        assert await watch == (200, None)
