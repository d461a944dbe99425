"""The enricher over a filled cache: which pod, which container, which node, and what is said of them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from forwarder.alert import decode
from forwarder.enricher import Enrichment, subject_of
from forwarder.enrichment.kubernetes import Kubernetes, KubernetesSettings
from forwarder.kubernetes_access import Access, Source
from forwarder.kubernetes_api import Api
from forwarder.kubernetes_mirror import RESOURCES
from forwarder.kubernetes_missing import FRESH_SECS, MISSING_SECS, Missing
from forwarder.kubernetes_objects import NO_LABELS, Labels, decode_meta, decode_node, decode_pod
from forwarder.metrics import Metrics
from forwarder.timestamp import time_ns
from tests.enriched import alert, kubernetes_of, node_of
from tests.fakes import kubernetes_objects as objects

NODE = "ip-10-0-1-17.eu-west-1.compute.internal"
CREATED = "2026-11-21T02:00:00Z"
ALERT_AT = "2026-11-21T03:00:00.000000000Z"
LABELS = Labels(["app.kubernetes.io/*", "app", "team"], 2048)


def seconds(text: str) -> float:
    nanoseconds = time_ns(text)
    assert nanoseconds is not None
    return nanoseconds / 1e9


class Cluster:
    """An enricher whose cache a test fills by hand, at a time the test sets."""

    def __init__(self, **settings: Any) -> None:
        self.wall = seconds(ALERT_AT)
        self.monotonic = 1000.0
        self.metrics = Metrics(["cloudwatch_logs"])
        self.enricher = Kubernetes(
            KubernetesSettings(**settings),
            metrics=self.metrics,
            now=lambda: self.wall,
            monotonic=lambda: self.monotonic,
            rng=random.Random(1),
            environment={},
        )
        self.enricher.api = Api(Access(Source(server="http://127.0.0.1:1"), monotonic=lambda: self.monotonic))
        self.enricher._missing = Missing(
            self.enricher.api, self.enricher._offer, monotonic=lambda: self.monotonic
        )
        self.enricher._stale = self.enricher._unsynced = False
        self.enricher._nodes_settled = True
        self.mirror = self.enricher.mirror
        self.mirror.stale = dict.fromkeys(RESOURCES, False).get  # type: ignore[assignment]
        self.mirror.synced = dict.fromkeys(RESOURCES, True).get  # type: ignore[assignment]

    def pod(self, name: str = "web-0", namespace: str = "shop", **keys: Any) -> dict[str, Any]:
        item = objects.pod(name, namespace, **({"node": NODE, "created": CREATED} | keys))
        self.mirror.pods.put(decode_pod(json.dumps(item).encode(), LABELS)[0])
        return item

    def node(self, name: str = NODE, **keys: Any) -> dict[str, Any]:
        item = objects.node(name, **keys)
        self.mirror.nodes.put(decode_node(json.dumps(item).encode())[0])
        return item

    def namespace(self, name: str = "shop", **labels: str) -> None:
        item = objects.namespace(name, labels=labels)
        self.mirror.namespaces.put(decode_meta(json.dumps(item).encode(), LABELS)[0])

    def owner(
        self, kind: str, name: str, above: objects.Owner | None = None, namespace: str = "shop"
    ) -> objects.Owner:
        make = {"ReplicaSet": objects.replicaset, "Job": objects.job}[kind]
        item = make(name, namespace, owner=above)
        self.mirror.owners[kind].put(decode_meta(json.dumps(item).encode(), NO_LABELS)[0])
        return objects.Owner(kind, name, item["metadata"]["uid"])

    def gone(self, pod: dict[str, Any], at: str) -> None:
        """Deleted at this wall-clock time."""
        self.wall = seconds(at)
        self.mirror.pods.delete(pod["metadata"]["uid"])

    def ask(self, fields: dict[str, Any], peer: str = "", **members: Any) -> tuple[dict[str, Any], bool]:
        """What is said of an alert, and whether that is all."""
        body = alert(fields, **({"time": ALERT_AT} | members))
        (decoded,) = decode(body).alerts
        enrichment = Enrichment([self.enricher], now=lambda: self.monotonic)
        found, complete = enrichment.of(decoded, decoded.time_ns or 0, peer)
        return json.loads(b"{%b}" % found), complete

    def counted(self) -> dict[str, float]:
        self.enricher.publish()
        return {
            result: counter._value.get()
            for result, counter in self.metrics.enrichment.items()
            if counter._value.get()
        }


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    made.namespace(team="payments")
    made.node()
    return made


def container_id(pod: dict[str, Any]) -> str:
    return str(pod["status"]["containerStatuses"][0]["containerID"].split("://")[1])


# ---- steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "fields"),
    [
        ("pod_uid", lambda pod: {"k8s.pod.uid": pod["metadata"]["uid"], "k8s.pod.name": "other"}),
        ("pod_uid", lambda pod: {"k8smeta.pod.uid": pod["metadata"]["uid"]}),
        ("name", lambda _: {"k8s.ns.name": "shop", "k8s.pod.name": "web-0"}),
        ("name", lambda _: {"k8smeta.ns.name": "shop", "k8smeta.pod.name": "web-0"}),
        ("container_id", lambda pod: {"container.id": container_id(pod)[:12]}),
        ("container_id", lambda pod: {"container.id": container_id(pod)}),
        ("container_id", lambda pod: {"container.full_id": container_id(pod), "container.id": "x"}),
        ("container_id", lambda pod: {"container.id": container_id(pod)[:12], "k8s.pod.name": None}),
        ("pod_ip", lambda _: {"k8s.pod.ip": "10.0.1.42"}),
        ("pod_ip", lambda _: {"k8smeta.pod.ip": "10.0.1.42", "container.id": "0123456789ab"}),
    ],
)
def test_each_step_finds_the_pod_and_says_so(cluster: Cluster, step: str, fields: Any) -> None:
    pod = cluster.pod()
    found, complete = cluster.ask(fields(pod))
    container = None if step == "pod_ip" and "container.id" in fields(pod) else "app"
    assert found["kubernetes"] == kubernetes_of(
        pod,
        container=container,
        workload=("Pod", "web-0"),
        resolved_by=step,
        namespace_labels={"team": "payments"},
    )
    assert found["node"] == node_of(objects.node(NODE))
    assert complete is (container is not None)
    assert cluster.counted() == {step: 1}


def test_dockers_container_names_tell_the_pod(cluster: Cluster) -> None:
    pod = cluster.pod("web-0")
    uid = pod["metadata"]["uid"]
    found, _ = cluster.ask({"container.id": "0123456789ab", "container.name": f"k8s_app_web-0_shop_{uid}_3"})
    assert found["kubernetes"]["resolved_by"] == "pod_uid"
    assert found["kubernetes"]["container"] == "app"


@pytest.mark.parametrize(
    ("at", "uid"),
    [
        ("2026-11-21T01:30:00.000000000Z", "old"),
        ("2026-11-21T02:29:59.000000000Z", "old"),
        ("2026-11-21T02:31:00.500000000Z", "new"),
        ("2026-11-21T03:00:00.000000000Z", "new"),
        ("2026-11-21T00:30:00.000000000Z", None),
        ("2026-11-21T02:30:30.000000000Z", None),
    ],
)
def test_a_recreated_pod_is_not_taken_for_its_predecessor(cluster: Cluster, at: str, uid: str | None) -> None:
    old = cluster.pod(uid="old", created="2026-11-21T01:00:00Z")
    cluster.gone(old, "2026-11-21T02:30:00Z")
    cluster.pod(uid="new", created="2026-11-21T02:31:00Z", ip="10.0.1.43")
    found, _ = cluster.ask({"k8s.ns.name": "shop", "k8s.pod.name": "web-0"}, time=at)
    assert found["kubernetes"].get("pod_uid") == uid
    if uid is None:
        assert found["kubernetes"] == {"namespace": "shop", "pod": "web-0"}


def test_a_deleted_pod_is_known_for_ten_minutes(cluster: Cluster) -> None:
    pod = cluster.pod()
    expected, _ = cluster.ask({"container.id": container_id(pod)})
    cluster.gone(pod, ALERT_AT)
    cluster.monotonic += 599
    cluster.enricher.publish()
    assert cluster.ask({"container.id": container_id(pod)})[0] == expected
    cluster.monotonic += 2
    cluster.enricher.publish()
    found, _ = cluster.ask({"container.id": container_id(pod)})
    assert "kubernetes" not in found


def test_a_restarted_container_is_known_by_its_former_id(cluster: Cluster) -> None:
    pod = objects.pod("web-0", "shop", node=NODE, created=CREATED)
    status = pod["status"]["containerStatuses"][0]
    former = "f" * 64
    status["lastState"] = {"terminated": {"containerID": f"containerd://{former}", "exitCode": 1}}
    cluster.mirror.pods.put(decode_pod(json.dumps(pod).encode(), LABELS)[0])
    found, complete = cluster.ask({"container.id": former[:12]})
    assert complete
    assert found["kubernetes"]["container"] == "app"
    assert "container_started" not in found["kubernetes"], "it is that of the instance after it"


# ---- workloads -------------------------------------------------------------------------------------------


def test_the_workload_is_the_top_owner(cluster: Cluster) -> None:
    deployment = objects.Owner("Deployment", "web", "d")
    cron = objects.Owner("CronJob", "backup", "c")
    chains = {
        "a": (cluster.owner("ReplicaSet", "web-5d4", deployment), ("Deployment", "web")),
        "b": (cluster.owner("Job", "backup-28", cron), ("CronJob", "backup")),
        "c": (cluster.owner("Job", "once"), ("Job", "once")),
        "d": (cluster.owner("ReplicaSet", "bare"), ("ReplicaSet", "bare")),
        "e": (objects.Owner("StatefulSet", "db", "s"), ("StatefulSet", "db")),
        "f": (objects.Owner("DaemonSet", "agent", "x"), ("DaemonSet", "agent")),
        "g": (objects.Owner("Rollout", "canary", "r"), ("Rollout", "canary")),
        "h": (None, ("Pod", "h")),
    }
    for number, (name, (owner, (kind, top))) in enumerate(chains.items()):
        cluster.pod(name, owner=owner, ip=f"10.0.2.{number}")
        found, complete = cluster.ask({"k8s.ns.name": "shop", "k8s.pod.name": name})
        assert found["kubernetes"]["workload"] == {"kind": kind, "name": top}
        assert complete


def test_an_owner_that_is_not_there_yet_is_looked_for_again(cluster: Cluster) -> None:
    cluster.pod(owner=objects.Owner("ReplicaSet", "web-5d4", objects.uid_of("shop/web-5d4")))
    ask = {"k8s.ns.name": "shop", "k8s.pod.name": "web-0"}
    found, complete = cluster.ask(ask)
    assert (found["kubernetes"]["workload"]["kind"], complete) == ("ReplicaSet", False)
    cluster.owner("ReplicaSet", "web-5d4", objects.Owner("Deployment", "web", "d"))
    found, complete = cluster.ask(ask)
    assert (found["kubernetes"]["workload"], complete) == ({"kind": "Deployment", "name": "web"}, True)


def test_what_was_remembered_is_forgotten_with_its_reasons(cluster: Cluster) -> None:
    pod = cluster.pod()
    ask = {"container.id": container_id(pod)}
    assert cluster.ask(ask)[0]["kubernetes"]["namespace_labels"] == {"team": "payments"}
    cluster.namespace(team="checkout")
    assert cluster.ask(ask)[0]["kubernetes"]["namespace_labels"] == {"team": "checkout"}
    cluster.pod(labels={"app": "changed"})
    assert cluster.ask(ask)[0]["kubernetes"]["labels"] == {"app": "changed"}
    cluster.enricher._stale = True
    assert cluster.ask(ask)[0]["kubernetes"]["stale"] is True


# ---- nodes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hostname", "peer"),
    [
        (NODE, ""),
        ("10.0.1.17", ""),
        ("falco-x7k2p", ""),
        ("f" * 12, ""),
        (None, "10.0.3.3"),
        (None, "10.0.1.17"),
        ("unknown-host", "10.0.3.3"),
    ],
    ids=["node", "address", "falco pod", "falco container", "falco address", "node address", "fallback"],
)
def test_a_hosts_alert_gets_its_node_and_nothing_else(
    cluster: Cluster, hostname: str | None, peer: str
) -> None:
    containers = [objects.Container("falco", container_id="f" * 64)]
    cluster.pod("falco-x7k2p", "falco", ip="10.0.3.3", containers=containers)
    found, complete = cluster.ask({"container.id": "host"}, peer, hostname=hostname)
    assert found == {"node": node_of(objects.node(NODE))}
    assert complete
    assert cluster.counted() == {"node": 1}


def test_the_pods_node_wins_over_the_hostname(cluster: Cluster) -> None:
    cluster.node("other", internal_ip="10.0.1.99")
    pod = cluster.pod()
    found, _ = cluster.ask({"container.id": container_id(pod)}, hostname="other")
    assert found["node"]["name"] == NODE


def test_a_node_without_its_object_has_a_name_only(cluster: Cluster) -> None:
    pod = cluster.pod(node="unseen")
    found, _ = cluster.ask({"container.id": container_id(pod)})
    assert found["node"] == {"name": "unseen"}


@pytest.mark.parametrize(
    ("provider_id", "expected"),
    [
        ("aws:///eu-west-1a/i-0123456789abcdef0", {"instance_id": "i-0123456789abcdef0"}),
        ("aws:///eu-west-1b/5f3a-0123456789abcdef0123456789abcdef/fargate-ip-10-0-1-9.ec2.internal", {}),
        ("eks-hybrid:///us-east-2/prod/mi-0aa", {}),
        ("gce://project/zone/instance", {}),
        ("kind://docker/kind/kind-worker", {}),
    ],
)
def test_the_instance_comes_from_the_provider_id(
    cluster: Cluster, provider_id: str, expected: dict[str, str]
) -> None:
    cluster.node(provider_id=provider_id)
    found, _ = cluster.ask({"container.id": "host"})
    assert found["node"]["provider_id"] == provider_id
    assert {key: value for key, value in found["node"].items() if key == "instance_id"} == expected


def test_a_cluster_is_named_where_its_nodes_agree(cluster: Cluster) -> None:
    label = {"alpha.eksctl.io/cluster-name": "shop"}
    assert cluster.enricher.cluster() == ""
    cluster.node("a", labels=label, internal_ip="10.0.9.1")
    assert cluster.enricher.cluster() == "", "one of two: a kubelet labels itself"
    cluster.node("b", labels=label, internal_ip="10.0.9.2")
    assert cluster.enricher.cluster() == "shop"
    cluster.node("c", provider_id="eks-hybrid:///us-east-2/prod/mi-0aa", internal_ip="10.0.9.3")
    assert cluster.enricher.cluster() == "prod"
    cluster.node("d", provider_id="eks-hybrid:///us-east-2/test/mi-0ab", internal_ip="10.0.9.4")
    assert cluster.enricher.cluster() == ""


def test_one_may_only_be_taken_for_falco_that_is_falco(cluster: Cluster) -> None:
    """Any pod may be called like somebody's machine, and anything may hand alerts on."""
    cluster.pod("db01", "shop", ip="10.0.3.9")
    host = {"container.id": "host"}
    assert cluster.ask(host, hostname="db01")[0] == {}
    assert cluster.ask(host, "10.0.3.9", hostname="bastion7")[0] == {}
    cluster.pod("agent-1", "falco", ip="10.0.3.8", owner=objects.Owner("DaemonSet", "agent", "x"))
    assert cluster.ask(host, hostname="agent-1")[0]["node"]["name"] == NODE
    assert cluster.counted() == {"node": 1, "node_unknown": 2}


def test_the_peer_counts_only_where_falco_posts_itself() -> None:
    behind = Cluster(trust_peer=False)
    behind.node()
    assert behind.ask({"container.id": "host"}, "10.0.1.17", hostname=None) == ({}, True)


def test_a_container_started_a_moment_ago_is_not_taken_for_the_one_before(cluster: Cluster) -> None:
    pod = cluster.pod()
    found, complete = cluster.ask(
        {"container.id": "b" * 12, "container.name": "app", "k8s.ns.name": "shop", "k8s.pod.name": "web-0"}
    )
    assert found["kubernetes"]["container_id"] == "b" * 12
    assert found["kubernetes"]["image"] == pod["spec"]["containers"][0]["image"]
    assert not {"container_started", "image_id"} & found["kubernetes"].keys()
    assert not complete


def test_an_answer_made_without_owner_or_labels_is_not_remembered(cluster: Cluster) -> None:
    """The pods were listed, the ReplicaSets and namespaces not yet."""
    owner = objects.Owner("ReplicaSet", "web-5d4", objects.uid_of("late/web-5d4"))
    pod = cluster.pod("web-0", "late", owner=owner)
    ask = {"container.id": container_id(pod)}
    assert cluster.ask(ask)[1] is False
    cluster.namespace("late", team="search")
    cluster.owner("ReplicaSet", "web-5d4", objects.Owner("Deployment", "web", "d"), namespace="late")
    found, complete = cluster.ask(ask)
    assert complete
    assert found["kubernetes"]["workload"]["kind"] == "Deployment"
    assert found["kubernetes"]["namespace_labels"] == {"team": "search"}


def test_a_node_that_is_not_listed_yet_is_looked_for_again(cluster: Cluster) -> None:
    pod = cluster.pod(node="late")
    cluster.enricher._nodes_settled = False
    assert cluster.ask({"container.id": container_id(pod)})[1] is False
    cluster.node("late")
    assert cluster.ask({"container.id": container_id(pod)})[1] is True


@pytest.mark.parametrize(
    "key",
    ["container.id", "container.full_id", "container.name", "k8s.pod.name", "k8s.pod.uid", "k8s.pod.ip"],
)
def test_what_is_too_long_to_be_one_is_not_kept(cluster: Cluster, key: str) -> None:
    for number in range(5):
        found, _ = cluster.ask({key: f"{number}" * 1_000_000, "k8s.ns.name": "n" * 1000})
        assert len(json.dumps(found)) < 2000
    memory = [*cluster.enricher._remembered, *cluster.enricher._missing._since]  # type: ignore[union-attr]
    assert sum(len(str(item)) for item in memory) < 2000


def test_texts_of_a_pod_are_bounded(cluster: Cluster) -> None:
    """Whoever may create a pod chooses its owner's name and its image: they go with every alert."""
    pod = objects.pod(
        "web-0",
        "shop",
        node=NODE,
        created=CREATED,
        owner=objects.Owner("K" * 10**6, "n" * 10**6, "u" * 10**6),
        containers=[objects.Container("app", image="i" * 10**6, image_id="d" * 10**6)],
    )
    cluster.mirror.pods.put(decode_pod(json.dumps(pod).encode(), LABELS)[0])
    found, _ = cluster.ask({"k8s.ns.name": "shop", "k8s.pod.name": "web-0"})
    assert found["kubernetes"]["pod"] == "web-0"
    assert len(json.dumps(found)) < 4000


# ---- misses ----------------------------------------------------------------------------------------------


def test_of_an_unknown_pod_only_what_falco_said_stands_there(cluster: Cluster) -> None:
    found, complete = cluster.ask({"k8s.ns.name": "shop", "k8s.pod.name": "ghost", "container.id": "0" * 12})
    assert found["kubernetes"] == {"namespace": "shop", "pod": "ghost"}
    assert not complete
    found, complete = cluster.ask({"container.id": "123456789abc"})
    assert "kubernetes" not in found
    assert not complete
    assert cluster.counted() == {"miss": 2}


def test_a_second_look_is_worth_while_only_at_first(cluster: Cluster) -> None:
    ask = {"container.id": "123456789abc"}
    assert cluster.ask(ask)[1] is False
    cluster.monotonic += FRESH_SECS - 0.1
    assert cluster.ask(ask)[1] is False
    cluster.monotonic += 0.2
    assert cluster.ask(ask)[1] is True
    cluster.monotonic += MISSING_SECS
    assert cluster.ask(ask)[1] is False


def test_the_second_look_is_not_counted(cluster: Cluster) -> None:
    (decoded,) = decode(alert({"container.id": "123456789abc"})).alerts
    cluster.enricher.enrich(subject_of(decoded, 0, "", again=True), {})
    assert cluster.counted() == {}


# ---- other sources ---------------------------------------------------------------------------------------


def test_audit_alerts_name_their_targets_namespace_and_the_user(cluster: Cluster) -> None:
    cluster.pod()
    fields = {"ka.target.namespace": "shop", "ka.user.name": "alice@example.com", "ka.target.name": "web-0"}
    found, complete = cluster.ask(fields, source="k8s_audit")
    assert found == {"kubernetes": {"namespace": "shop", "user": "alice@example.com"}}
    assert complete
    assert cluster.ask({"ka.verb": "list"}, source="k8s_audit") == ({}, True)
    assert cluster.counted() == {"audit": 1, "not_applicable": 1}


@pytest.mark.parametrize("source", ["aws_cloudtrail", "okta", "gcp_auditlog"])
def test_plugins_tell_of_other_places(cluster: Cluster, source: str) -> None:
    pod = cluster.pod()
    assert cluster.ask({"container.id": container_id(pod)}, source=source) == ({}, True)


@pytest.mark.parametrize(
    "fields",
    [
        {"container.id": 5, "k8s.ns.name": "shop", "k8s.pod.name": "web-0"},
        {"container.id": None, "k8s.ns.name": "shop", "k8s.pod.name": "web-0", "x": 10**400},
        {"container.id": ["a"], "k8s.ns.name": "shop", "k8s.pod.name": "web-0", "k8s.pod.uid": {}},
        {"container.id": "<NA>", "k8s.ns.name": "shop", "k8s.pod.name": "web-0", "k8s.pod.uid": "<NA>"},
    ],
)
def test_odd_values_are_no_obstacle(cluster: Cluster, fields: dict[str, Any]) -> None:
    pod = cluster.pod()
    found, _ = cluster.ask(fields)
    assert found["kubernetes"]["pod_uid"] == pod["metadata"]["uid"]
