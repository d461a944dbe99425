"""Objects of the Kubernetes API as the cache keeps them: what is kept, what is refused, and how little it weighs."""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwarder.kubernetes_objects import (
    ADDRESSES_MAX,
    CONTAINERS_MAX,
    NO_LABELS,
    Labels,
    Node,
    Owner,
    Pod,
    Provider,
    decode_meta,
    decode_node,
    decode_pod,
    parse_provider,
)
from tests.fakes import kubernetes_objects as made
from tests.fakes.kubernetes_parts import container_spec, container_status

ALL = Labels(["*"], 65_536)
CREATED = 1_795_162_530.0
"""2026-11-20T08:15:30Z, when the builders' objects were created."""
NOTHING = Provider("", "", "", "")


def encoded(thing: Any) -> bytes:
    return json.dumps(thing, separators=(",", ":"), ensure_ascii=False).encode()


def pod_of(thing: Any, labels: Labels = ALL) -> Pod:
    return decode_pod(encoded(thing), labels)[0]


def node_of(thing: Any) -> Node:
    return decode_node(encoded(thing))[0]


# ---- pods -------------------------------------------------------------------------------------------


def test_a_realistic_pod_is_trimmed_to_what_enrichment_says() -> None:
    owner = made.Owner("ReplicaSet", "shop-7d9f8b6c5", made.uid_of("rs"))
    thing = made.pod(
        "shop-7d9f8b6c5-x2x4z",
        "shop",
        node="n1",
        ip="10.1.2.3",
        owner=owner,
        labels={"app": "shop", "tier": "web"},
        service_account="seller",
        uid="u-1",
        containers=[made.Container("app", image="repo/app:1", privileged=True), made.Container("side")],
    )
    thing["metadata"]["resourceVersion"] = "4711"
    pod, version = decode_pod(encoded(thing), Labels(["app"], 100))
    assert version == "4711"
    assert (pod.uid, pod.namespace, pod.name, pod.node) == ("u-1", "shop", "shop-7d9f8b6c5-x2x4z", "n1")
    assert (pod.service_account, pod.ip, pod.ip_is_its_own) == ("seller", "10.1.2.3", True)
    assert pod.labels == ("app", "shop")
    assert pod.owner == Owner("ReplicaSet", "shop-7d9f8b6c5", made.uid_of("rs"))
    assert pod.created == CREATED
    app, side = pod.containers
    assert (app.name, app.image, app.started) == ("app", "repo/app:1", "2026-11-20T08:15:34Z")
    assert app.id == made.hex64("u-1/app")
    assert app.image_id == f"repo/app@sha256:{made.hex64('repo/app:1')}"
    assert (app.privileged, app.previous_id) == (True, "")
    assert (side.name, side.id, side.privileged) == ("side", made.hex64("u-1/side"), None)


def test_a_pod_that_is_not_scheduled_yet() -> None:
    pod = pod_of(made.pod("new", node=""))
    assert (pod.node, pod.ip) == ("", "")
    (container,) = pod.containers
    assert (container.id, container.image_id, container.started, container.previous_id) == ("", "", "", "")
    assert container.image.endswith("/new/app:1.4.2")


def test_a_container_that_waits_has_no_ids() -> None:
    (container,) = pod_of(made.pod("new", containers=[made.Container(waiting=True)])).containers
    assert (container.id, container.image_id, container.started) == ("", "", "")


def test_init_and_ephemeral_containers_count_too() -> None:
    thing = made.pod("a", uid="u", containers=[made.Container("app")])
    for spec, status, name in (
        ("initContainers", "initContainerStatuses", "setup"),
        ("ephemeralContainers", "ephemeralContainerStatuses", "debugger-1"),
    ):
        extra = made.Container(name)
        thing["spec"][spec] = [container_spec(extra, f"repo/{name}:1", [])]
        thing["status"][status] = [container_status(extra, f"repo/{name}:1", "u")]
    pod = pod_of(thing)
    assert {item.name: item.id for item in pod.containers} == {
        name: made.hex64(f"u/{name}") for name in ("app", "setup", "debugger-1")
    }
    assert {item.image for item in pod.containers} >= {"repo/setup:1", "repo/debugger-1:1"}


def test_a_restarted_container_keeps_the_id_it_had_before() -> None:
    thing = made.pod("a", uid="u")
    before = made.hex64("before")
    thing["status"]["containerStatuses"][0]["lastState"] = {
        "terminated": {
            "exitCode": 137,
            "reason": "OOMKilled",
            "startedAt": "2026-11-20T08:00:00Z",
            "finishedAt": "2026-11-20T08:10:00Z",
            "containerID": f"containerd://{before}",
        }
    }
    (container,) = pod_of(thing).containers
    assert (container.id, container.previous_id) == (made.hex64("u/app"), before)
    assert container.started == "2026-11-20T08:15:34Z"


def test_a_container_that_ended_tells_when_it_began() -> None:
    thing = made.pod("a", phase="Succeeded")
    thing["status"]["containerStatuses"][0]["state"] = {
        "terminated": {"exitCode": 0, "startedAt": "2026-11-20T08:00:00Z", "containerID": "containerd://x"}
    }
    assert pod_of(thing).containers[0].started == "2026-11-20T08:00:00Z"
    thing["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 0, "startedAt": None}}
    assert pod_of(thing).containers[0].started == ""


@pytest.mark.parametrize("scheme", ["containerd://", "cri-o://", "docker://", ""])
def test_ids_lose_their_runtime(scheme: str) -> None:
    digest = f"repo@sha256:{made.hex64('i')}"
    image = {"docker://": f"docker-pullable://{digest}"}.get(scheme, digest)
    container = made.Container(container_id=scheme + made.hex64("c"), image_id=image)
    (found,) = pod_of(made.pod("a", containers=[container])).containers
    assert (found.id, found.image_id) == (made.hex64("c"), digest)


@pytest.mark.parametrize(
    ("phase", "host_network", "own"),
    [
        ("Running", False, True),
        ("Pending", False, True),
        ("Unknown", False, True),
        ("Running", True, False),
        ("Succeeded", False, False),
        ("Failed", False, False),
        ("Failed", True, False),
    ],
)
def test_whose_the_address_is(phase: str, host_network: bool, own: bool) -> None:
    pod = pod_of(made.pod("a", phase=phase, host_network=host_network, ip="10.0.1.17"))
    assert (pod.ip, pod.ip_is_its_own) == ("10.0.1.17", own)


def test_only_the_controller_is_the_owner() -> None:
    thing = made.pod("a", owner=made.Owner("ReplicaSet", "rs", "u-rs"))
    other = {"apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "u-c"}
    thing["metadata"]["ownerReferences"].insert(0, other)
    thing["metadata"]["ownerReferences"].insert(0, other | {"controller": False})
    assert pod_of(thing).owner == Owner("ReplicaSet", "rs", "u-rs")
    thing["metadata"]["ownerReferences"] = [other]
    assert pod_of(thing).owner is None


def test_containers_are_bounded() -> None:
    many = [made.Container(f"c{number}") for number in range(CONTAINERS_MAX + 10)]
    containers = pod_of(made.pod("a", containers=many)).containers
    assert [item.name for item in containers] == [f"c{number}" for number in range(CONTAINERS_MAX)]


@pytest.mark.parametrize(("text", "created"), [(None, 0.0), ("soon", 0.0), ("2026-11-20T08:15:30Z", CREATED)])
def test_time_of_creation(text: str | None, created: float) -> None:
    assert pod_of({"metadata": {"uid": "u", "creationTimestamp": text}}).created == created


# ---- labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "kept"),
    [
        (["app"], ["app"]),
        (["app.kubernetes.io/*"], ["app.kubernetes.io/name", "app.kubernetes.io/part-of"]),
        (["app*"], ["app", "app.kubernetes.io/name", "app.kubernetes.io/part-of", "apple"]),
        (["team", "app"], ["app", "team"]),
        (["APP", "app.kubernetes.io/", "te?m", ""], []),
        (["*"], ["app", "app.kubernetes.io/name", "app.kubernetes.io/part-of", "apple", "team"]),
        ([], []),
    ],
)
def test_labels_by_whole_key_or_prefix(allowed: list[str], kept: list[str]) -> None:
    labels = dict.fromkeys(
        ["team", "apple", "app.kubernetes.io/part-of", "app.kubernetes.io/name", "app"], "v"
    )
    assert Labels(allowed, 2048).trim(labels)[::2] == tuple(kept)


def test_no_labels_at_all() -> None:
    assert Labels(["*"], 100).trim(None) == Labels(["*"], 100).trim({}) == NO_LABELS.trim({"a": "b"}) == ()


def test_the_limit_of_labels_counts_keys_and_values_in_bytes() -> None:
    assert Labels(["*"], 4).trim({"aa": "bb"}) == ("aa", "bb")
    assert Labels(["*"], 3).trim({"aa": "bb"}) == ()
    assert Labels(["*"], 4).trim({"a": "\u00e4\u00e4"}) == ()
    assert Labels(["*"], 0).trim({"a": ""}) == ()


@given(
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=12),
    st.integers(0, 120),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_the_same_labels_always_give_the_same_choice(labels: dict[str, str], room: int, rng: Any) -> None:
    """In whatever order the API server names them; never over the limit, and labels never torn apart."""
    shuffled = list(labels.items())
    rng.shuffle(shuffled)
    kept = Labels(["*"], room).trim(dict(shuffled))
    assert kept == Labels(["*"], room).trim(labels)
    assert sum(len(text.encode()) for text in kept) <= room
    chosen = dict(zip(kept[::2], kept[1::2], strict=True))
    assert list(chosen) == sorted(labels)[: len(chosen)]
    assert chosen.items() <= labels.items()


# ---- nodes and others -------------------------------------------------------------------------------


def test_a_realistic_node() -> None:
    thing = made.node("ip-10-0-1-17.ec2.internal", uid="n")
    thing["metadata"]["resourceVersion"] = "9"
    thing["metadata"]["labels"]["eks.amazonaws.com/compute-type"] = "ec2"
    node, version = decode_node(encoded(thing))
    assert version == "9"
    assert node == Node(
        uid="n",
        name="ip-10-0-1-17.ec2.internal",
        provider_id="aws:///eu-west-1a/i-0123456789abcdef0",
        instance_id="i-0123456789abcdef0",
        instance_type="m6i.large",
        zone="eu-west-1a",
        region="eu-west-1",
        nodegroup="workers",
        compute_type="ec2",
        cluster="",
        addresses=("10.0.1.17",),
    )


def test_a_node_without_labels_is_known_by_its_provider_id() -> None:
    node = node_of(made.node("n", labels={}, addresses=[]))
    assert (node.zone, node.region, node.instance_id) == ("eu-west-1a", "", "i-0123456789abcdef0")
    assert (node.nodegroup, node.instance_type, node.compute_type, node.addresses) == ("", "", "", ())
    bare = node_of(made.node("n", provider_id="", labels={}))
    assert (bare.provider_id, bare.instance_id, bare.zone) == ("", "", "")


def test_labels_of_a_node_outweigh_its_provider_id() -> None:
    labels = {
        "topology.kubernetes.io/zone": "z",
        "topology.kubernetes.io/region": "r",
        "alpha.eksctl.io/cluster-name": "told",
        "alpha.eksctl.io/nodegroup-name": "group",
    }
    node = node_of(made.node("n", provider_id="eks-hybrid:///eu-west-1/prod/mi-1", labels=labels))
    assert (node.zone, node.region, node.nodegroup, node.cluster) == ("z", "r", "group", "prod")
    told = node_of(made.node("n", labels=labels))
    assert (told.cluster, told.cluster_label) == ("", "told")


def test_addresses_of_a_node_once_each_without_its_name_and_bounded() -> None:
    listed = [
        {"type": "InternalIP", "address": item} for item in ("10.0.0.1", "", "n", "10.0.0.1", "fd00::1")
    ]
    node = node_of(made.node("n", addresses=listed, labels={"kubernetes.io/hostname": "host"}))
    assert node.addresses == ("10.0.0.1", "fd00::1", "host")
    many = [{"type": "InternalIP", "address": f"10.0.0.{number}"} for number in range(200)]
    assert len(node_of(made.node("n", addresses=many)).addresses) <= ADDRESSES_MAX + 1


@pytest.mark.parametrize(
    ("provider_id", "expected"),
    [
        ("aws:///eu-west-1a/i-0123456789abcdef0", Provider("i-0123456789abcdef0", "eu-west-1a", "", "")),
        ("aws:///eu-west-1a/i-12345678", Provider("i-12345678", "eu-west-1a", "", "")),
        ("aws:///i-0123456789abcdef0", Provider("i-0123456789abcdef0", "", "", "")),
        (
            "aws:///eu-west-1b/4c1bd8ab3f-6e0c4f5ad0f94b4ab4/fargate-ip-10-0-1-2.eu-west-1.compute.internal",
            Provider("", "eu-west-1b", "", ""),
        ),
        ("eks-hybrid:///eu-west-1/prod/mi-0123456789abcdef0", Provider("", "", "eu-west-1", "prod")),
        (
            "eks:///eu-west-1/prod/i-0123456789abcdef0",
            Provider("i-0123456789abcdef0", "", "eu-west-1", "prod"),
        ),
        ("eks:///eu-west-1/prod/mi-0123456789abcdef0", Provider("", "", "eu-west-1", "prod")),
        ("eks-hybrid:///eu-west-1/prod/i-0123456789abcdef0", Provider("", "", "eu-west-1", "prod")),
        ("gce://project/europe-west1-b/gke-node-1", NOTHING),
        ("kind://docker/kind/kind-control-plane", NOTHING),
        ("k3s://server-1", NOTHING),
        ("azure:///subscriptions/s/virtualMachines/0", NOTHING),
        ("", NOTHING),
        ("i-0123456789abcdef0", NOTHING),
        ("aws://eu-west-1a/i-0123456789abcdef0", NOTHING),
        ("AWS:///eu-west-1a/i-0123456789abcdef0", NOTHING),
        ("aws:///", NOTHING),
        ("aws:///eu-west-1a/", Provider("", "eu-west-1a", "", "")),
        ("aws:///eu-west-1a/i-0123456789abcdef0\n", Provider("", "eu-west-1a", "", "")),
        ("aws:///eu-west-1a/i-0123456789ABCDEF0", Provider("", "eu-west-1a", "", "")),
        ("aws:///eu-west-1a/i-0123456789abcdef01234", Provider("", "eu-west-1a", "", "")),
        ("aws:///eu-west-1a/xi-0123456789abcdef0", Provider("", "eu-west-1a", "", "")),
        ("aws:///a/b/i-0123456789abcdef0", Provider("", "a", "", "")),
        ("eks:///only/two", NOTHING),
        ("eks-hybrid:///a/b/c/d", NOTHING),
    ],
)
def test_provider_ids(provider_id: str, expected: Provider) -> None:
    assert parse_provider(provider_id) == expected


@given(st.text(max_size=60) | st.text("aeiksw-:/0123456789", max_size=60).map("aws:///".__add__))
@settings(max_examples=200, deadline=None)
def test_any_provider_id_gives_an_instance_id_or_nothing(provider_id: str) -> None:
    instance = parse_provider(provider_id).instance_id
    assert not instance or (instance.startswith("i-") and instance[2:].isalnum() and len(instance) <= 19)


def test_metadata_of_namespaces_and_owners() -> None:
    thing = made.namespace("shop", labels={"team": "red"}, uid="u")
    thing["metadata"]["resourceVersion"] = "3"
    meta, version = decode_meta(encoded(thing), Labels(["team"], 100))
    assert (meta.uid, meta.name, meta.labels, meta.owner, version) == (
        "u",
        "shop",
        ("team", "red"),
        None,
        "3",
    )
    replicas = made.replicaset("shop-7d9", "shop", owner=made.Owner("Deployment", "shop", "u-d"), uid="r")
    meta, _ = decode_meta(encoded(replicas))
    assert (meta.uid, meta.labels, meta.owner) == ("r", (), Owner("Deployment", "shop", "u-d"))


# ---- memory -----------------------------------------------------------------------------------------


def parts(thing: Any) -> dict[int, Any]:
    """Everything a record holds, by identity."""
    found = {id(thing): thing}
    inner: tuple[Any, ...] = ()
    if isinstance(thing, tuple):
        inner = thing
    elif isinstance(thing, msgspec.Struct):
        inner = msgspec.structs.astuple(thing)
    for item in inner:
        found |= parts(item)
    return found


def test_a_pod_is_small_and_no_business_of_the_garbage_collector() -> None:
    containers = [made.Container("app"), made.Container("side"), made.Container("proxy", restarts=3)]
    owner = made.Owner("ReplicaSet", "shop-7d9f8b6c5", made.uid_of("rs"))
    labels = {f"app.kubernetes.io/label-{number}": f"value-{number}" for number in range(8)}
    data = encoded(
        made.pod("shop-7d9f8b6c5-x2x4z", "shop", containers=containers, owner=owner, labels=labels)
    )
    assert len(data) > 12_000
    pod, _ = decode_pod(data, ALL)
    gc.collect()  # tuples are let go at their first collection
    held = parts(pod).values()
    assert sum(map(sys.getsizeof, held)) < 4096
    assert [item for item in held if gc.is_tracked(item)] == []


def test_strings_that_repeat_are_shared() -> None:
    owner = made.Owner("ReplicaSet", "shop-7d9f8b6c5", made.uid_of("rs"))
    one, other = (
        pod_of(made.pod(f"shop-{number}", "namespace-of-shop", owner=owner, labels={"app": "shop"}))
        for number in range(2)
    )
    assert one.namespace is other.namespace
    assert one.node is other.node
    assert one.labels[1] is other.labels[1]
    assert one.containers[0].image is other.containers[0].image
    assert one.owner is not None
    assert other.owner is not None
    assert one.owner.uid is other.owner.uid
