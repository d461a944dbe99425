"""The enricher as the sensors' list of nodes: who should run Falco, and which node a message came from."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from forwarder import kubernetes_reflector
from forwarder.enrichment.kubernetes import Kubernetes, KubernetesSettings
from forwarder.kubernetes_objects import decode_node
from forwarder.metrics import Metrics
from forwarder.sensors import Sensors, SensorsSettings
from tests.enriched import node_of
from tests.enrichment.test_kubernetes import NODE, Cluster, cluster
from tests.fakes import kubernetes_objects as objects
from tests.fakes.kubernetes import FakeKubernetes
from tests.sensing import message

__all__ = ["cluster"]


def wants_sensor(labels: Mapping[str, str], **selector: str) -> bool:
    item = objects.node("n", labels=dict(labels))
    return decode_node(json.dumps(item).encode(), selector)[0].wants_sensor


def test_falco_should_run_everywhere_but_on_fargate_and_windows() -> None:
    assert wants_sensor({})
    assert wants_sensor({"eks.amazonaws.com/compute-type": "ec2", "kubernetes.io/os": "linux"})
    assert not wants_sensor({"eks.amazonaws.com/compute-type": "fargate"})
    assert not wants_sensor({"kubernetes.io/os": "windows"}, pool="a")
    assert not wants_sensor({"kubernetes.io/os": "windows", "pool": "a"}, pool="a")


def test_the_selector_restricts_it() -> None:
    assert wants_sensor({"pool": "a", "falco": "yes", "x": "y"}, pool="a", falco="yes")
    assert not wants_sensor({"pool": "a"}, pool="a", falco="yes")
    assert not wants_sensor({"pool": "b"}, pool="a")
    assert not wants_sensor({}, pool="")


@pytest.mark.parametrize(
    ("hostname", "peer"),
    [
        (NODE, ""),
        ("10.0.1.17", ""),
        ("falco-x7k2p", ""),
        ("f" * 12, ""),
        ("", "10.0.3.3"),
        ("", "10.0.1.17"),
        ("unknown-host", "10.0.3.3"),
        (NODE, "10.0.9.9"),
    ],
    ids=["node", "address", "pod", "container", "pod address", "node address", "fallback", "hostname first"],
)
def test_the_node_of_a_message(cluster: Cluster, hostname: str, peer: str) -> None:
    cluster.node("other", internal_ip="10.0.9.9")
    containers = [objects.Container("falco", container_id="f" * 64)]
    cluster.pod("falco-x7k2p", "falco", ip="10.0.3.3", containers=containers)
    assert cluster.enricher.node_of(hostname, peer) == NODE


def test_messages_of_nobody(cluster: Cluster) -> None:
    """A pod that is no Falco may be called like anything."""
    cluster.pod("db01", "shop", ip="10.0.3.9")
    for hostname, peer in (("", ""), ("db01", ""), ("bastion7", "10.0.3.9"), ("x" * 300, "not an address")):
        assert cluster.enricher.node_of(hostname, peer) == ""


def test_the_peer_counts_only_where_it_is_trusted() -> None:
    behind = Cluster(trust_peer=False)
    behind.node()
    assert behind.enricher.node_of("", "10.0.1.17") == ""
    assert behind.enricher.node_of(NODE, "10.0.1.17") == NODE


def test_the_resource_of_a_notice_is_the_instance(cluster: Cluster) -> None:
    found = json.loads(b"{%b}" % cluster.enricher.node_enrichment(NODE))
    assert found == {"node": node_of(objects.node(NODE))}
    assert cluster.enricher.node_enrichment("gone") == b'"node":{"name":"gone"}'


def test_without_a_list_nothing_is_known() -> None:
    enricher = Kubernetes(
        KubernetesSettings(),
        metrics=Metrics([]),
        now=time.time,
        monotonic=time.monotonic,
        rng=random.Random(1),
        environment={},
    )
    assert enricher.sensor_nodes() is None
    assert not enricher.nodes_are_current()
    assert enricher.node_of(NODE, "10.0.1.17") == ""


# ---- over the API ----------------------------------------------------------------------------------------


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeKubernetes]:
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_BASE_SECS", 0.05)
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_MAX_SECS", 0.1)
    async with FakeKubernetes() as fake:
        for number, labels in enumerate(
            ({"pool": "a"}, {"pool": "a", "eks.amazonaws.com/compute-type": "fargate"}, {"pool": "b"})
        ):
            fake.create("nodes", objects.node(f"n{number}", labels=labels, internal_ip=f"10.0.1.{number}"))
        fake.create(
            "pods",
            objects.pod(
                "falco-n0",
                "falco",
                node="n0",
                ip="10.0.3.3",
                containers=[objects.Container("falco", image="falcosecurity/falco:0.44.1")],
            ),
        )
        yield fake


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110 - another task's work, as the API tells it
            await asyncio.sleep(0.01)


def kubeconfig(api: FakeKubernetes, file: Path) -> str:
    data: dict[str, Any] = {
        "current-context": "t",
        "contexts": [{"name": "t", "context": {"cluster": "t", "user": "t"}}],
        "clusters": [{"name": "t", "cluster": {"server": api.url}}],
        "users": [{"name": "t", "user": {"token": "t0ken"}}],
    }
    file.write_text(json.dumps(data))
    return str(file)


async def test_nodes_come_and_go_over_the_api(api: FakeKubernetes, tmp_path: Path) -> None:
    enricher = Kubernetes(
        KubernetesSettings(enabled=True, kubeconfig=kubeconfig(api, tmp_path / "kubeconfig")),
        metrics=Metrics([]),
        now=time.time,
        monotonic=time.monotonic,
        rng=random.Random(1),
        environment={},
        sensor_labels={"pool": "a"},
    )
    clock = 0.0

    def monotonic() -> float:
        nonlocal clock
        clock += 1.0  # each publish resolves
        return clock

    sensors = Sensors(SensorsSettings(), nodes=enricher, now=lambda: 1e9, monotonic=monotonic)

    def nodes() -> list[str]:
        sensors.publish()
        return [sensor.node for sensor in sensors.all()]

    await enricher.start()
    try:
        await until(lambda: nodes() == ["n0"])
        await until(lambda: enricher.mirror.synced("pods"))
        for hostname, peer in (("n0", ""), ("falco-n0", ""), ("", "10.0.3.3"), ("n2", "")):
            sensors.saw(message(hostname), peer)
        sensors.publish()
        assert list(sensors.heard()["nodes"]) == ["n0"]
        await until(sensors.list_is_current)
        api.create("nodes", objects.node("n9", labels={"pool": "a"}, internal_ip="10.0.1.9"))
        await until(lambda: nodes() == ["n0", "n9"])
        api.delete("nodes", "", "n0")
        await until(lambda: nodes() == ["n9"])
    finally:
        await enricher.stop()
