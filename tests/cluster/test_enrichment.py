"""The whole application against a real API server, both ways to configure it: what lands in CloudWatch and in the finding."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from forwarder import __version__, kubernetes_reflector
from forwarder.app import Application
from forwarder.enrichment import kubernetes
from forwarder.kubernetes_access import find_source
from tests.cluster.account import ServiceAccount
from tests.cluster.forwarding import (
    Case,
    Clock,
    check,
    fresh,
    resources_of,
    short,
    stamp,
    told_container,
)
from tests.cluster.harness import Cluster
from tests.cluster.mirrored import assert_reads_only
from tests.cluster.objects import digits, running
from tests.cluster.real_alerts import REAL_PODS, expected_of, populate
from tests.cluster.scene import (
    CLUSTER,
    EC2,
    FARGATE,
    HYBRID,
    LOCAL,
    NAMESPACE_LABELS,
    Object,
    Scene,
)
from tests.enriched import kubernetes_of
from tests.fakes.aws import FakeAws
from tests.running import Running, settings_of
from tests.samples import REAL_ALERTS, REAL_BODIES

pytestmark = pytest.mark.cluster

TOMBSTONE_SECS = 600


class Start(Protocol):
    """Starts the application."""

    async def __call__(self, clock: Clock | None = None) -> Running: ...


@pytest.fixture
async def scene(cluster: Cluster, namespace: str) -> AsyncIterator[Scene]:
    made = Scene(cluster, namespace)
    try:
        await asyncio.to_thread(made.build)
        yield made
    finally:
        await asyncio.to_thread(made.clear)


@pytest.fixture(params=["kubeconfig", "in-cluster"])
async def start(
    request: pytest.FixtureRequest,
    aws: FakeAws,
    account: ServiceAccount,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Start]:
    """Both sinks, and a way to the API server: a kubeconfig, or what a pod finds (``enabled`` is ``auto`` then)."""
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_BASE_SECS", 0.05)
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_MAX_SECS", 0.2)
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"):
        monkeypatch.delenv(name, raising=False)
    files = account.write_in_cluster(tmp_path / "serviceaccount", account.token())
    changes: dict[str, Any] = {
        "cluster.name": CLUSTER,
        "enrichment.kubernetes": {"enabled": True, "kubeconfig": str(files.kubeconfig)},
    }
    if request.param == "in-cluster":
        changes["enrichment.kubernetes"] = {"enabled": "auto"}
        for name, value in files.environment.items():
            monkeypatch.setenv(name, value)
        # The default of ``account`` is bound already: only the place a pod has it at is another one.
        found = functools.partial(find_source, account=files.directory)
        monkeypatch.setattr(kubernetes, "find_source", found)
    started: list[Running] = []

    async def starter(clock: Clock | None = None) -> Running:
        clock = clock or Clock()
        app = Application(
            settings_of(tmp_path, changes),
            now=clock.now,
            now_ns=clock.now_ns,
            monotonic=clock.monotonic,
            validate=True,
        )
        await app.start()
        started.append(Running(app))
        await fresh(started[-1])
        return started[-1]

    yield starter
    for running_app in started:
        await running_app.stop()


def known(scene: Scene, name: str, resolved_by: str, container: str | None = "app") -> dict[str, Any]:
    """``kubernetes`` of a pod of the scene."""
    return kubernetes_of(
        scene.pods[name],
        container=container,
        workload=scene.workloads[name],
        resolved_by=resolved_by,
        namespace_labels=NAMESPACE_LABELS,
    )


async def test_alerts_of_every_workload_and_every_node(
    cluster: Cluster, account: ServiceAccount, aws: FakeAws, start: Start, scene: Scene
) -> None:
    place = scene.namespace
    running_app = await start()
    web, own = digits("web"), {name: digits(f"{place}/{name}") for name in scene.pods}
    uid = scene.pods["web-5d4-abcde"]["metadata"]["uid"]

    def named(pod: str, **fields: Any) -> dict[str, Any]:
        return {"k8s.ns.name": place, "k8s.pod.name": pod} | fields

    cases = {
        "a live pod": Case(
            named("web-5d4-abcde", **{"container.id": short(web)}),
            known(scene, "web-5d4-abcde", "name"),
            EC2,
        ),
        "its uid": Case(
            {"k8s.pod.uid": uid, "container.id": short(web)}, known(scene, "web-5d4-abcde", "pod_uid"), EC2
        ),
        "Docker's name": Case(
            {"container.name": f"k8s_app_web-5d4-abcde_{place}_{uid}_0"},
            known(scene, "web-5d4-abcde", "pod_uid"),
            EC2,
        ),
        "twelve digits": Case(
            {"container.id": short(web)}, known(scene, "web-5d4-abcde", "container_id"), EC2
        ),
        "all digits": Case({"container.id": web}, known(scene, "web-5d4-abcde", "container_id"), EC2),
        "all digits beside twelve": Case(
            {"container.id": short(web), "container.full_id": web},
            known(scene, "web-5d4-abcde", "container_id"),
            EC2,
        ),
        "another container": Case(
            {"container.id": short(digits("web side-car"))},
            known(scene, "web-5d4-abcde", "container_id", "side-car"),
            EC2,
        ),
        "no container": Case(named("web-5d4-abcde"), known(scene, "web-5d4-abcde", "name", None), EC2),
        "a CronJob's on Fargate": Case(
            {"container.id": short(own["nightly-1-xyz"])},
            known(scene, "nightly-1-xyz", "container_id"),
            FARGATE,
        ),
        "a Job's": Case(
            {"container.id": short(own["once-xyz"])}, known(scene, "once-xyz", "container_id"), EC2
        ),
        "a StatefulSet's on a hybrid node": Case(
            {"container.id": short(own["db-0"])}, known(scene, "db-0", "container_id"), HYBRID
        ),
        "its address": Case({"k8s.pod.ip": "192.168.8.1"}, known(scene, "db-0", "pod_ip"), HYBRID),
        "a DaemonSet's": Case(
            named("falco-xczjd", **{"container.id": short(own["falco-xczjd"])}),
            known(scene, "falco-xczjd", "name"),
            EC2,
        ),
        "a bare pod": Case(named("debug"), known(scene, "debug", "name"), LOCAL),
        "a pod on a node nobody knows": Case(
            named("lost"), known(scene, "lost", "name"), "not-a-node", {"hostname": "not-a-node"}
        ),
        "a pod nobody knows": Case(
            named("nobody", **{"container.id": "0123456789ab"}),
            {"namespace": place, "pod": "nobody"},
            LOCAL,
            {"hostname": "unknown"},
            told_container("0123456789ab", pod="nobody", namespace=place),
        ),
        "a host by its name": Case({"container.id": "host"}, None, EC2, {"hostname": EC2}),
        "a host by its address": Case({}, None, FARGATE, {"hostname": "10.0.3.7"}),
        "a host by its Falco pod": Case({"container.id": "host"}, None, EC2, {"hostname": "falco-xczjd"}),
        "a host by its Falco container": Case(
            {"container.id": "host"}, None, EC2, {"hostname": short(own["falco-xczjd"])}
        ),
        "a host by its peer": Case({"container.id": "host"}, None, LOCAL, {"hostname": "vm"}),
        "a host without a name": Case({"container.id": "host"}, None, LOCAL, {"hostname": None}),
        "Falco itself": Case({"m": "1"}, None, EC2, {"source": "internal", "hostname": EC2}),
        "an audit event": Case(
            {"ka.target.namespace": place, "ka.target.name": "web-5d4-abcde", "ka.user.name": "alice"},
            {"namespace": place, "user": "alice"},
            "",
            {"source": "k8s_audit", "hostname": EC2},
        ),
        "a plugin": Case(named("debug"), None, "", {"source": "aws_cloudtrail", "hostname": EC2}),
    }
    await check(running_app, aws, scene, cases)
    scrape = await running_app.scrape()
    assert scrape.total("enrichment_total", result="failed") == 0
    assert scrape.total("enrichment_total", result="unsynced") == 0
    made = [call for call in cluster.calls(account.user) if "falco-aws-forwarder" in call.user_agent]
    assert {call.user_agent for call in made} == {f"falco-aws-forwarder/{__version__}"}
    assert_reads_only(made)
    assert {call.code for call in made} <= {200, 404}
    assert [call.uri for call in made if call.verb == "get"] == [f"/api/v1/namespaces/{place}/pods/nobody"]


async def test_a_pod_that_was_deleted_five_minutes_ago(
    cluster: Cluster, aws: FakeAws, start: Start, scene: Scene
) -> None:
    """It is found for ten minutes; then there is only what Falco said."""
    clock = Clock()
    running_app = await start(clock)
    place, lived_at = scene.namespace, time.time()
    pod = scene.pods["web-5d4-abcde"]
    await asyncio.to_thread(cluster.admin.delete, "pods", "web-5d4-abcde", place)
    expected = known(scene, "web-5d4-abcde", "name")
    fields = {"k8s.ns.name": place, "k8s.pod.name": "web-5d4-abcde", "container.id": short(digits("web"))}
    mirror = running_app.app.enrichers[0].mirror  # type: ignore[attr-defined]
    await running_app.until(lambda: mirror.pods.tombstones == 1)

    clock.ahead_secs = 300.0
    await hear(cluster, scene, running_app)
    late = {"time": stamp(lived_at)}
    by_id = {key: value for key, value in fields.items() if key == "container.id"}
    cases = {
        "late, by name": Case(fields, expected, EC2, late),
        "late, by container": Case(by_id, expected | {"resolved_by": "container_id"}, EC2, late),
        "late, by uid": Case(
            by_id | {"k8s.pod.uid": pod["metadata"]["uid"]}, expected | {"resolved_by": "pod_uid"}, EC2, late
        ),
    }
    await check(running_app, aws, scene, cases)

    clock.ahead_secs = TOMBSTONE_SECS + 1
    await hear(cluster, scene, running_app)
    gone = told_container(short(digits("web")), pod="web-5d4-abcde", namespace=place)
    said = {"namespace": place, "pod": "web-5d4-abcde"}
    await check(
        running_app, aws, scene, {"too late": Case(fields, said, LOCAL, late | {"hostname": "vm"}, gone)}
    )


async def hear(cluster: Cluster, scene: Scene, running_app: Running) -> None:
    """Change something of every kind: after the clock was put forward, nothing was heard for minutes."""
    for kind, name in (
        ("pods", "once-xyz"),
        ("nodes", EC2),
        ("namespaces", scene.namespace),
        ("replicasets", "web-5d4"),
        ("jobs", "once"),
    ):
        label = {"metadata": {"labels": {"heard": stamp(time.time())[-10:-1]}}}
        place = "" if kind in {"nodes", "namespaces"} else scene.namespace
        await asyncio.to_thread(cluster.admin.patch, kind, name, label, place)
    await fresh(running_app)


async def test_a_recreated_pod_is_not_taken_for_its_predecessor(
    cluster: Cluster, aws: FakeAws, start: Start, scene: Scene
) -> None:
    running_app = await start()
    place = scene.namespace
    old: Object = {"ids": {"app": digits("old")}, "ip": "10.0.5.5"}
    await asyncio.to_thread(scene.pod, "twin", EC2, **old)
    first = known(scene, "twin", "name")
    old_at = time.time() + 0.5
    await asyncio.sleep(2.1)  # the API server tells whole seconds
    await asyncio.to_thread(cluster.admin.delete, "pods", "twin", place)
    new: Object = {"ids": {"app": digits("new")}, "ip": "10.0.5.5"}
    await asyncio.to_thread(scene.pod, "twin", LOCAL, **new)
    second = known(scene, "twin", "name")
    assert first["pod_uid"] != second["pod_uid"]
    mirror = running_app.app.enrichers[0].mirror  # type: ignore[attr-defined]
    await running_app.until(lambda: mirror.pods.by_container(digits("new")))
    fields = {"k8s.ns.name": place, "k8s.pod.name": "twin"}
    before, now = {"time": stamp(old_at)}, {"time": stamp(time.time())}
    cases = {
        "then": Case(fields, first, EC2, before),
        "now": Case(fields, second, LOCAL, now),
        "then, by address": Case({"k8s.pod.ip": "10.0.5.5"}, first | {"resolved_by": "pod_ip"}, EC2, before),
        "now, by address": Case({"k8s.pod.ip": "10.0.5.5"}, second | {"resolved_by": "pod_ip"}, LOCAL, now),
        "then, by container": Case(
            {"container.id": short(digits("old"))}, first | {"resolved_by": "container_id"}, EC2, now
        ),
    }
    await check(running_app, aws, scene, cases)


async def test_a_restarted_container_is_found_by_its_old_id_too(
    cluster: Cluster, aws: FakeAws, start: Start, scene: Scene
) -> None:
    running_app = await start()
    ids, previous = {"app": digits("again")}, {"app": digits(f"{scene.namespace}/debug")}
    status = {"status": running("10.0.2.99", ids, previous=previous)}
    scene.pods["debug"] = await asyncio.to_thread(
        cluster.admin.patch, "pods", "debug", status, scene.namespace, "status"
    )
    mirror = running_app.app.enrichers[0].mirror  # type: ignore[attr-defined]
    await running_app.until(lambda: mirror.pods.by_container(ids["app"]))
    now = known(scene, "debug", "container_id")
    then = {key: value for key, value in now.items() if key != "container_started"}
    then["container_id"] = previous["app"]
    cases = {
        "now": Case({"container.id": short(ids["app"])}, now, LOCAL),
        "then": Case({"container.id": short(previous["app"])}, then, LOCAL),
        "then, all digits": Case({"container.id": previous["app"]}, then, LOCAL),
    }
    await check(running_app, aws, scene, cases)


async def test_every_real_alert(aws: FakeAws, start: Start, scene: Scene) -> None:
    """Their times are years old: a pod of the same name, made now, is not theirs; one with their container is."""
    await asyncio.to_thread(populate, scene)
    running_app = await start()
    await running_app.post(*REAL_BODIES)
    await running_app.at_rest()
    events = {(event["rule"], event["output"], event["time"]): event for event in aws.messages()}
    findings = {
        (finding["ProductFields"]["falco/time"], finding["Description"][:900]): finding["Resources"]
        for finding in aws.findings.values()
    }
    assert len(events) == len(REAL_ALERTS)
    compared: Counter[str] = Counter()
    for told in REAL_ALERTS:
        event, case = events[told["rule"], told["output"], told["time"]], expected_of(scene, told)
        assert event.get("kubernetes") == case.kubernetes, told
        assert event.get("node") == (scene.node_of(case.node) if case.node else None), told
        resources = findings.get((told["time"], told["output"][:900]))
        if resources is None:
            continue  # below the priority of findings, or Falco's own
        compared[str(told.get("source"))] += 1
        if "container_id" in (case.kubernetes or {}):
            compared["found"] += 1
        elif resources[0]["Type"] == "Container":
            # Falco's own word for a container that was not found; its details are tested elsewhere.
            assert resources[0]["Id"] == case.fields["container.id"]
            case = case._replace(container=resources[0])
        assert resources == resources_of(scene, case, told.get("hostname") or ""), told
    assert compared.keys() == {
        "syscall",
        "None",
        "k8s_audit",
        "gcp_auditlog",
        "auditlogs",
        "aws_cloudtrail",
        "found",
    }
    assert compared["found"] >= len(REAL_PODS)
    assert aws.validation_errors == []


async def test_without_permission_or_server_what_is_known_stays_and_is_stale(
    cluster: Cluster, account: ServiceAccount, aws: FakeAws, start: Start, scene: Scene
) -> None:
    """Taken away, then given back; then the server goes: a cache that nobody keeps up to date says so."""
    running_app = await start()
    expected = known(scene, "web-5d4-abcde", "container_id")
    fields = {"container.id": short(digits("web"))}
    await asyncio.to_thread(account.revoke)
    await asyncio.to_thread(cluster.restart)
    await running_app.until(lambda: troubles(running_app, "forbidden"))
    await check(running_app, aws, scene, {"forbidden": Case(fields, expected | {"stale": True}, EC2)})
    await asyncio.to_thread(account.grant)
    await fresh(running_app)
    await check(running_app, aws, scene, {"allowed again": Case(fields, expected, EC2)})
    await asyncio.to_thread(cluster.stop, kill=True)
    await running_app.until(lambda: troubles(running_app, "127.0.0.1"))
    await check(running_app, aws, scene, {"away": Case(fields, expected | {"stale": True}, EC2)})
    await asyncio.to_thread(cluster.start)
    await fresh(running_app)
    await check(running_app, aws, scene, {"back": Case(fields, expected, EC2)})


def troubles(running_app: Running, text: str) -> bool:
    """Whether all kinds say that this is wrong."""
    running_app.app.publish()
    kinds = running_app.app.status()["enrichment"]["kubernetes"]["kinds"].values()
    return all(text in (kind["trouble"] or "") for kind in kinds)
