"""The whole application with a fake API server beside it: what lands in CloudWatch Logs and in the finding."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from forwarder import kubernetes_reflector
from forwarder.enrichment import kubernetes
from tests.enriched import alert, kubernetes_of, node_of, resource
from tests.fakes import kubernetes_objects as objects
from tests.fakes.aws import FakeAws
from tests.fakes.kubernetes import FakeKubernetes
from tests.running import Running, Start
from tests.samples import REAL_ALERTS, REAL_BODIES

NODE = "ip-10-0-1-17.eu-west-1.compute.internal"


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeKubernetes]:
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_BASE_SECS", 0.05)
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_MAX_SECS", 0.1)
    async with FakeKubernetes() as fake:
        fake.create("nodes", objects.node(NODE))
        fake.create("namespaces", objects.namespace("shop", labels={"team": "payments", "secret": "no"}))
        set_ = fake.create(
            "replicasets",
            objects.replicaset("web-5d4", "shop", owner=objects.Owner("Deployment", "web", "d-1")),
        )
        owner = objects.Owner("ReplicaSet", "web-5d4", set_["metadata"]["uid"])
        fake.create(
            "pods", objects.pod("web-5d4-abcde", "shop", node=NODE, owner=owner, service_account="web")
        )
        yield fake


def changes(api: FakeKubernetes, directory: Path) -> dict[str, Any]:
    """Settings that lead the forwarder to the fake."""
    file = directory / "kubeconfig"
    file.write_text(
        json.dumps(
            {
                "current-context": "test",
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                "clusters": [{"name": "test", "cluster": {"server": api.url}}],
                "users": [{"name": "test", "user": {"token": "t0ken"}}],
            }
        )
    )
    return {"enrichment.kubernetes": {"enabled": True, "kubeconfig": str(file)}}


async def synced(running: Running) -> None:
    def ready() -> bool:
        running.app.publish()
        kinds = running.app.status()["enrichment"]["kubernetes"].get("kinds", {})
        return bool(kinds) and not any(kind["stale"] for kind in kinds.values())

    await running.until(ready)


def web(api: FakeKubernetes) -> Any:
    (pod,) = api.objects("pods").values()
    return pod


def container_id(pod: Any) -> str:
    return str(pod["status"]["containerStatuses"][0]["containerID"].split("://")[1])


async def test_an_alert_knows_its_surroundings_in_the_log_and_in_the_finding(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path
) -> None:
    running = await forwarder(changes(api, tmp_path))
    await synced(running)
    pod = web(api)
    await running.post(alert({"container.id": container_id(pod)[:12]}))
    await running.at_rest()
    (event,) = aws.messages()
    assert event["kubernetes"] == kubernetes_of(
        pod, workload=("Deployment", "web"), resolved_by="container_id", namespace_labels={"team": "payments"}
    )
    (node,) = api.objects("nodes").values()
    assert event["node"] == node_of(node)
    (finding,) = aws.findings.values()
    assert finding["Resources"][0]["ResourceRole"] == "Target"
    container = resource(finding, "Container")
    assert container["Id"] == container_id(pod)
    assert container["Details"]["Container"]["Name"] == "app"
    assert container["Details"]["Container"]["ImageId"].startswith("sha256:")
    assert container["Details"]["Other"]["workload"] == "Deployment/web"
    assert container["Details"]["Other"]["pod"] == "web-5d4-abcde"
    instance = resource(finding, "AwsEc2Instance")
    assert instance["Id"] == f"arn:aws:ec2:eu-west-1:{finding['AwsAccountId']}:instance/i-0123456789abcdef0"
    assert instance["Details"]["AwsEc2Instance"] == {"Type": "m6i.large"}
    assert resource(finding, "AwsEksCluster")["Details"]["AwsEksCluster"]["Name"] == "test-cluster"
    assert aws.validation_errors == []
    scrape = await running.scrape()
    assert scrape.total("enrichment_total", result="container_id") == 1
    assert scrape.total("kubernetes_objects", kind="pods") == 1


async def test_a_pod_the_watch_has_not_brought_is_found_at_delivery(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path
) -> None:
    """Unknown when the alert came, fetched by name in the background, there when it is delivered."""
    slow = {"sinks.cloudwatch_logs": {"linger_secs": 1.0}, "sinks.security_hub": {"linger_secs": 1.0}}
    running = await forwarder(changes(api, tmp_path) | slow)
    await synced(running)
    api.silence("pods")
    late = api.create("pods", objects.pod("late", "shop", node=NODE))
    await running.post(
        alert({"container.id": container_id(late)[:12], "k8s.ns.name": "shop", "k8s.pod.name": "late"})
    )
    await running.at_rest()
    (event,) = aws.messages()
    assert event["kubernetes"] == kubernetes_of(
        late, workload=("Pod", "late"), resolved_by="name", namespace_labels={"team": "payments"}
    )
    (finding,) = aws.findings.values()
    assert resource(finding, "Container")["Details"]["Other"]["pod_uid"] == late["metadata"]["uid"]
    assert len(api.seen("get", "pods")) == 1
    scrape = await running.scrape()
    assert scrape.total("enrichment_total", result="miss") == 1
    assert scrape.total("enrichment_completed_total") == 2, "once for each sink"


async def test_without_the_api_server_alerts_go_on_and_the_cache_is_stale(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path
) -> None:
    running = await forwarder(changes(api, tmp_path))
    await synced(running)
    pod = web(api)
    await api.stop()
    await running.until(
        lambda: running.app.status()["enrichment"]["kubernetes"]["kinds"]["pods"]["trouble"] is not None
    )
    running.app.publish()
    answers = await running.post(
        alert({"container.id": container_id(pod)[:12]}), alert({"container.id": "0123456789ab"})
    )
    assert [answer.status for answer in answers] == [200, 200]
    await running.at_rest()
    known, unknown = aws.messages()
    assert known["kubernetes"]["stale"] is True
    assert known["kubernetes"]["pod"] == "web-5d4-abcde"
    assert "kubernetes" not in unknown
    scrape = await running.scrape()
    assert scrape.total("kubernetes_stale", kind="pods") == 1
    assert scrape.total("kubernetes_watch_restarts_total", reason="network") >= 1
    assert (await running.get("/readyz")).status == 200


async def test_nothing_allowed_is_said_and_hurts_nobody(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path
) -> None:
    api.allow = set()
    running = await forwarder(changes(api, tmp_path))
    await running.until(
        lambda: "forbidden" in str(running.app.status()["enrichment"]["kubernetes"].get("kinds", {}))
    )
    answers = await running.post(*REAL_BODIES)
    assert {answer.status for answer in answers} == {200}
    await running.at_rest()
    assert len(aws.messages()) == len(REAL_BODIES)
    assert aws.validation_errors == []
    scrape = await running.scrape()
    assert scrape.total("kubernetes_watch_restarts_total", kind="pods", reason="permission") >= 1
    assert scrape.total("enrichment_total", result="unsynced") > 0


async def test_an_api_server_that_hangs_delays_no_answer(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path
) -> None:
    api.fail.hang("*", times=None)
    running = await forwarder(changes(api, tmp_path))
    async with asyncio.timeout(5):
        answers = await running.post(*REAL_BODIES[:40])
    assert {answer.status for answer in answers} == {200}
    await running.at_rest()
    assert len(aws.messages()) == 40


async def test_every_real_alert_gets_what_is_known_of_it_and_nothing_else(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path
) -> None:
    """No pod of the samples exists here: only what Falco said, and the target of audit alerts."""
    running = await forwarder(changes(api, tmp_path))
    await synced(running)
    await running.post(*REAL_BODIES)
    await running.at_rest()
    events = {(event["rule"], event["output"], event["time"]): event for event in aws.messages()}
    for told in REAL_ALERTS:
        event = events[told["rule"], told["output"], told["time"]]
        fields = told.get("output_fields") or {}
        expected: dict[str, Any] = {}
        if told.get("source") == "k8s_audit":
            expected = {"namespace": fields.get("ka.target.namespace"), "user": fields.get("ka.user.name")}
        elif told.get("source") in {None, "syscall", "internal"}:
            expected = {"namespace": fields.get("k8s.ns.name"), "pod": fields.get("k8s.pod.name")}
            name = str(fields.get("container.name"))
            if name.startswith("k8s_"):
                _, _, pod, namespace, uid, _ = name.split("_")
                expected = {"namespace": namespace, "pod": pod, "pod_uid": uid}
        expected = {key: value for key, value in expected.items() if value}
        assert event.get("kubernetes", {}) == expected, told
        assert "node" not in event


async def test_a_permission_taken_away_leaves_a_cache_that_is_stale(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path
) -> None:
    running = await forwarder(changes(api, tmp_path))
    await synced(running)
    api.allow = set()
    for kind in ("pods", "nodes", "namespaces", "replicasets", "jobs"):
        await api.cut(kind)
    await running.until(
        lambda: "forbidden" in str(running.app.status()["enrichment"]["kubernetes"]["kinds"]["pods"])
    )
    running.app.publish()
    await running.post(alert({"container.id": container_id(web(api))[:12]}))
    await running.at_rest()
    (event,) = aws.messages()
    assert (event["kubernetes"]["pod"], event["kubernetes"]["stale"]) == ("web-5d4-abcde", True)


async def test_an_api_that_has_to_be_there_is_waited_for(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubeconfig comes later than the forwarder: said in the status, counted, and taken when it is there."""
    monkeypatch.setattr(kubernetes, "START_AGAIN_SECS", 0.05)
    settings = changes(api, tmp_path)
    file = tmp_path / "kubeconfig"
    text = file.read_text()
    file.unlink()
    running = await forwarder(settings)
    await running.until(lambda: running.app.status()["enrichment"]["kubernetes"]["state"] == "broken")
    assert "cannot be read" in running.app.status()["enrichment"]["kubernetes"]["trouble"]
    await running.post(alert({"container.id": container_id(web(api))[:12]}))
    file.write_text(text)
    await synced(running)
    await running.post(alert({"container.id": container_id(web(api))}))
    await running.at_rest()
    before, after = aws.messages()
    assert "kubernetes" not in before
    assert after["kubernetes"]["pod"] == "web-5d4-abcde"
    scrape = await running.scrape()
    assert scrape.total("enrichment_total", result="no_api") == 1


async def test_where_there_is_no_api_that_is_all_there_is_to_say(
    aws: FakeAws, forwarder: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    running = await forwarder({"enrichment.kubernetes": {"enabled": "auto"}})
    await running.until(lambda: running.app.status()["enrichment"]["kubernetes"]["state"] == "none here")
    answers = await running.post(*REAL_BODIES[:5])
    assert {answer.status for answer in answers} == {200}
    await running.at_rest()
    assert len(aws.messages()) == 5
