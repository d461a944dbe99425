"""Resources of findings made of what enrichment knows: exactly what is known, within every limit, whatever it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forwarder import asff
from forwarder.asff_context import Context
from forwarder.asff_resources import CONTAINER_NAMES, ContainerFields, cluster_of, resources
from forwarder.asff_schema import OTHER_MAX, RESOURCES_MAX, faults
from forwarder.kubernetes_members import kubernetes_member, node_member, told_member
from forwarder.kubernetes_objects import Container, Node, Owner, Pod
from tests.fakes.aws_asff import finding_faults
from tests.fakes.kubernetes_objects import hex64
from tests.samples import body_of, record_of
from tests.test_asff import BARE, CONTEXT

ID, DIGEST = hex64("c"), f"sha256:{hex64('image')}"
REGISTRY = "111122223333.dkr.ecr.eu-west-1.amazonaws.com"
NOBODY = ContainerFields(*[""] * len(CONTAINER_NAMES))
IN_CONTAINER = NOBODY._replace(short_id=ID[:12], name="k8s_app", pod="falcos-word", namespace="falcos-word")
PLACE = {"Region": "eu-west-1", "Partition": "aws"}
TARGET = {"ResourceRole": "Target"}
CLUSTER_ARN = "arn:aws:eks:eu-west-1:111122223333:cluster/prod"
CLUSTER = PLACE | {
    "Type": "AwsEksCluster", "Id": CLUSTER_ARN, "Details": {"AwsEksCluster": {"Name": "prod", "Arn": CLUSTER_ARN}},
}  # fmt: skip
GOOD = json.loads(asff.encode(record_of({"rule": "r", "output": "o"}), CONTEXT))


def judged(encoded: bytes) -> list[dict[str, Any]]:
    """Resources that both validators take, within a whole finding."""
    found: list[dict[str, Any]] = json.loads(encoded)
    whole = GOOD | {"Resources": found}
    assert faults(body_of(whole)) == ""
    assert finding_faults(whole) == []
    assert 1 <= len(found) <= RESOURCES_MAX
    assert [resource.get("ResourceRole") for resource in found] == ["Target", *[None] * (len(found) - 1)]
    return found


def found_for(
    fields: ContainerFields = NOBODY,
    *,
    context: Context = BARE,
    hostname: str = "",
    source: str = "syscall",
    raw: bytes = b"",
    **members: Any,
) -> list[dict[str, Any]]:
    """Resources of an alert with these members of enrichment: bytes as enrichers make them, or anything."""
    parts = [
        b'"%b":%b' % (key.encode(), value if isinstance(value, bytes) else body_of(value))
        for key, value in members.items()
    ]
    return judged(resources(context, hostname, source, fields, b",".join([raw, *parts] if raw else parts)))


def container(**changes: Any) -> Container:
    values: dict[str, Any] = {
        "name": "app", "id": ID, "previous_id": "", "image": "repo/shop:1.2", "image_id": f"repo/shop@{DIGEST}",
        "started": "2026-11-20T08:15:34Z", "privileged": None,
    }  # fmt: skip
    return Container(**values | changes)


POD = Pod(
    uid="u-1", namespace="shop", name="web-1-x", node="n1", service_account="seller", ip="10.0.1.42",
    ip_is_its_own=True, labels=("app", "shop", "team", "red"), owner=None, containers=(), created=0.0,
)  # fmt: skip
NODE = Node(
    "n", "n1", "aws:///eu-west-1a/i-0123456789abcdef0", "i-0123456789abcdef0", "m6i.large", "eu-west-1a", "eu-west-1",
    "workers", "ec2", "", (),
)  # fmt: skip
POD_FACTS = {
    "pod": "web-1-x", "namespace": "shop", "pod_uid": "u-1", "workload": "Deployment/web", "service_account": "seller",
    "pod_ip": "10.0.1.42", "node": "n1", "label/app": "shop", "label/team": "red",
}  # fmt: skip
INSTANCE = {
    "Type": "AwsEc2Instance",
    "Id": "arn:aws:ec2:eu-west-1:111122223333:instance/i-0123456789abcdef0",
    "Details": {
        "AwsEc2Instance": {"Type": "m6i.large"},
        "Other": {
            "node": "n1", "hostname": "host-1", "zone": "eu-west-1a", "nodegroup": "workers", "compute_type": "ec2",
        },
    },
} | PLACE  # fmt: skip


def pod_member(chosen: Container | None = None, **changes: Any) -> bytes:
    values: dict[str, Any] = {
        "workload": Owner("Deployment", "web", "u-d"), "namespace_labels": ("team", "red"), "resolved_by": "name",
        "stale": False,
    }  # fmt: skip
    return kubernetes_member(POD, chosen, **values | changes)


def node_with(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node_member(NODE)) | changes
    return found


# ---- containers and pods ----------------------------------------------------------------------------


def test_a_container_of_a_pod_on_an_instance_of_a_cluster() -> None:
    found = found_for(
        IN_CONTAINER,
        context=CONTEXT,
        hostname="host-1",
        kubernetes=pod_member(container(privileged=True)),
        node=node_member(NODE),
    )
    typed = {
        "Name": "app", "ImageName": "repo/shop:1.2", "ImageId": DIGEST, "LaunchedAt": "2026-11-20T08:15:34Z",
        "Privileged": True,
    }  # fmt: skip
    first = (
        {"Type": "Container", "Id": ID, "Details": {"Container": typed, "Other": POD_FACTS}} | PLACE | TARGET
    )
    assert found == [first, INSTANCE, CLUSTER]


def test_a_pod_whose_container_is_not_known() -> None:
    (found,) = found_for(kubernetes=pod_member())
    first = {"Type": "Other", "Id": "pod/shop/web-1-x", "Details": {"Other": POD_FACTS}}
    assert found == first | PLACE | TARGET


def test_a_container_nobody_but_falco_knows() -> None:
    fields = IN_CONTAINER._replace(
        repository="repo/shop", tag="1", digest=DIGEST, image_id="f00", privileged="false", pod_by_plugin="p"
    )
    (found,) = found_for(fields, kubernetes=told_member(namespace="shop", pod="web-9"))
    assert found["Id"] == ID[:12]
    typed = {"Name": "k8s_app", "ImageName": "repo/shop:1", "ImageId": DIGEST, "Privileged": False}
    assert found["Details"] == {"Container": typed, "Other": {"pod": "web-9", "namespace": "shop"}}
    (found,) = found_for(fields)
    assert found["Details"]["Other"] == {"pod": "falcos-word", "namespace": "falcos-word"}


@pytest.mark.parametrize("told", [True, False, None])
def test_privileged_is_the_specifications_word_before_falcos(told: bool | None) -> None:
    fields = IN_CONTAINER._replace(privileged="true")
    (found,) = found_for(fields, kubernetes=pod_member(container(privileged=told)))
    assert found["Details"]["Container"]["Privileged"] is (told is not False)
    (found,) = found_for(IN_CONTAINER, kubernetes=pod_member(container(privileged=told)))
    assert found["Details"]["Container"].get("Privileged") is told


def test_what_is_unknown_of_a_container_is_absent() -> None:
    bare = container(image="", image_id="", started="")
    (found,) = found_for(IN_CONTAINER._replace(name=""), kubernetes=pod_member(bare))
    assert found["Details"]["Container"] == {"Name": "app"}
    (found,) = found_for(NOBODY._replace(full_id=ID))
    assert found == {"Type": "Container", "Id": ID} | PLACE | TARGET
    (found,) = found_for(NOBODY._replace(short_id="host"))
    assert found == {"Type": "Other", "Id": "falco/syscall"} | PLACE | TARGET


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("r" * 126 + ":1", "r" * 126 + ":1"),
        ("r" * 130 + ":1", "r" * 127 + "\u2026"),
        (f"{REGISTRY}/team/shop:1.2@{DIGEST}", f"{REGISTRY}/team/shop:1.2"),
        (f"{REGISTRY}/team/shop@{DIGEST}", f"{REGISTRY}/team/shop"),
        (f"localhost:5000/shop@{DIGEST}", "localhost:5000/shop"),
    ],
)
def test_image_names_without_digest_within_128_characters(image: str, name: str) -> None:
    (found,) = found_for(IN_CONTAINER, kubernetes=pod_member(container(image=image)))
    assert found["Details"]["Container"]["ImageName"] == name


@pytest.mark.parametrize(
    ("image_id", "shown"),
    [
        (f"{REGISTRY}/{'long/' * 20}shop@{DIGEST}", DIGEST),
        (DIGEST, DIGEST),
        ("a" * 128, "a" * 128),
        ("a" * 129, "a" * 127 + "\u2026"),
    ],
)
def test_image_ids_are_digests_within_128_characters(image_id: str, shown: str) -> None:
    (found,) = found_for(IN_CONTAINER, kubernetes=pod_member(container(image_id=image_id)))
    assert found["Details"]["Container"]["ImageId"] == shown


@pytest.mark.parametrize(
    "started", ["soon", "2026-11-20", "2026-11-20T08:15:34", "9999-99-99T00:00:00Z", " "]
)
def test_a_time_that_is_none_does_not_cost_the_finding(started: str) -> None:
    (found,) = found_for(IN_CONTAINER, kubernetes=pod_member(container(started=started)))
    assert "LaunchedAt" not in found["Details"]["Container"]
    (found,) = found_for(node=node_with(launched_at=started))
    assert "LaunchedAt" not in found["Details"]["AwsEc2Instance"]


# ---- hosts and clusters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("m6i.large", "m6i.large"), ("x" * 16, "x" * 16), ("u7in-24tb.224xlarge", None), ("", None)],
)
def test_types_of_instances_fit_or_are_left_out(kind: str, shown: str | None) -> None:
    (found,) = found_for(node=node_with(instance_type=kind, launched_at="2026-01-01T00:00:00Z"))
    typed = {"LaunchedAt": "2026-01-01T00:00:00Z"} | ({"Type": shown} if shown else {})
    assert found["Details"]["AwsEc2Instance"] == typed


def test_an_instance_is_where_the_node_is_and_in_the_clusters_account() -> None:
    context = CONTEXT._replace(region="us-east-1", partition="aws-us-gov", cluster_account="444455556666")
    instance, cluster = found_for(context=context, node=node_with(region="us-gov-west-1"))
    assert instance["Id"] == "arn:aws-us-gov:ec2:us-gov-west-1:444455556666:instance/i-0123456789abcdef0"
    assert cluster["Id"] == "arn:aws-us-gov:eks:us-gov-west-1:444455556666:cluster/prod"
    assert {(item["Region"], item["Partition"]) for item in (instance, cluster)} == {
        ("us-gov-west-1", "aws-us-gov")
    }
    instance, cluster = found_for(context=context, node=node_with(region=""))
    assert instance["Id"].startswith("arn:aws-us-gov:ec2:us-east-1:")
    assert (instance["Region"], cluster["Region"]) == ("us-east-1", "us-east-1")


def test_a_node_that_is_no_instance() -> None:
    other = node_with(instance_id="", name="kind-1", provider_id="kind://docker/kind/kind-1")
    (found,) = found_for(hostname="kind-1", node=other)
    assert (found["Type"], found["Id"]) == ("Other", "kind-1")
    assert found["Details"]["Other"]["provider_id"] == "kind://docker/kind/kind-1"
    (found,) = found_for(node=told_member(name="n9"))
    assert found == {"Type": "Other", "Id": "n9", "Details": {"Other": {"node": "n9"}}} | PLACE | TARGET
    (found,) = found_for(hostname="h", node={"zone": "z"})
    assert (found["Id"], found["Details"]["Other"]) == ("h", {"hostname": "h", "zone": "z"})
    (found,) = found_for(node={})
    assert found == {"Type": "Other", "Id": "node"} | PLACE | TARGET


@pytest.mark.parametrize("region", ["northamerica-northeast1", "r" * 63, "r" * 300, " "])
def test_a_region_that_does_not_fit_does_not_cost_the_finding(region: str) -> None:
    """Of nodes outside AWS: the label says what the other cloud calls it."""
    for instance_id in ("", "i-0123456789abcdef0"):
        found = found_for(context=CONTEXT, node=node_with(region=region, instance_id=instance_id))
        assert len(found) == 2
        assert all(len(item.get("Region", "")) <= 16 for item in found)


def test_the_cluster_that_is_configured_and_the_one_that_was_discovered() -> None:
    assert found_for(context=CONTEXT, cluster="other")[-1] == CLUSTER | TARGET
    assert found_for(cluster="prod")[-1] == CLUSTER | TARGET
    assert cluster_of(CONTEXT, b'"cluster":"other"') == "prod"
    assert cluster_of(BARE, b'"cluster":"found","node":{}') == "found"
    assert cluster_of(BARE, b'"kubernetes":{"labels":{"cluster":"blue"}}') == cluster_of(BARE, b"") == ""
    assert found_for(kubernetes={"namespace": "a", "labels": {"cluster": "blue"}})[-1]["Type"] == "Other"


def test_the_configured_arn_of_the_cluster() -> None:
    arn = "arn:aws:eks:eu-central-1:444455556666:cluster/prod"
    context = CONTEXT._replace(cluster_arn=arn, cluster_account="777788889999")
    found = found_for(context=context, node=node_member(NODE))[-1]
    assert found["Id"] == found["Details"]["AwsEksCluster"]["Arn"] == arn
    assert (found["Region"], found["Details"]["AwsEksCluster"]["Name"]) == ("eu-central-1", "prod")


@pytest.mark.parametrize("name", ["c" * 128, "c" * 129, "c" * 600, "\U0001f600" * 100, " "])
def test_a_name_of_a_cluster_that_does_not_fit_does_not_cost_the_finding(name: str) -> None:
    """A node's providerID says anything."""
    assert found_for(IN_CONTAINER, cluster=name)[0]["Type"] == "Container"


# ---- ECS and audit ----------------------------------------------------------------------------------

TASK = "arn:aws:ecs:eu-west-2:444455556666:task/prod/0123"
ECS = {
    "cluster_arn": "arn:aws:ecs:eu-west-2:444455556666:cluster/prod", "task_arn": TASK, "family": "shop",
    "revision": "7", "service": "web", "launch_type": "EC2", "container": "app",
    "container_arn": "arn:aws:ecs:eu-west-2:444455556666:container/prod/0123/c", "image": "repo/shop:1", "image_id": DIGEST,
}  # fmt: skip
DEFINITION = "arn:aws:ecs:eu-west-2:444455556666:task-definition/shop:7"
TASK_RESOURCE = {
    "Type": "AwsEcsTask", "Id": TASK, "Region": "eu-west-2", "Partition": "aws",
    "Details": {
        "AwsEcsTask": {
            "ClusterArn": ECS["cluster_arn"], "Group": "service:web", "TaskDefinitionArn": DEFINITION,
        }
    },
}  # fmt: skip


def test_a_container_of_a_task() -> None:
    first, task, host = found_for(IN_CONTAINER, context=CONTEXT, ecs=ECS, node=node_member(NODE))
    assert first == TARGET | {
        "Type": "AwsEcsContainer", "Id": ECS["container_arn"], "Region": "eu-west-2", "Partition": "aws",
        "Details": {
            "AwsEcsContainer": {"Name": "app", "Image": "repo/shop:1"},
            "Other": {
                "image_id": DIGEST, "family": "shop", "revision": "7", "service": "web", "launch_type": "EC2",
            },
        },
    }  # fmt: skip
    assert task == TASK_RESOURCE
    assert (host["Type"], host["Region"]) == ("AwsEc2Instance", "eu-west-1")


def test_a_task_whose_container_is_not_certain() -> None:
    known = {key: ECS[key] for key in ("task_arn", "container", "image", "image_id")}
    first, task = found_for(IN_CONTAINER, ecs=known)
    assert (first["Type"], first["Id"]) == ("Container", ID[:12])
    assert first["Details"]["Container"] == {"Name": "app", "ImageName": "repo/shop:1", "ImageId": DIGEST}
    assert task == {"Type": "AwsEcsTask", "Id": TASK, "Region": "eu-west-2", "Partition": "aws"}


def test_an_audit_alert_is_about_its_namespace() -> None:
    member = told_member(namespace="shop", user="system:serviceaccount:shop:seller")
    first, host, cluster = found_for(
        context=CONTEXT, source="k8s_audit", hostname="falco-0", kubernetes=member
    )
    facts = {"namespace": "shop", "user": "system:serviceaccount:shop:seller"}
    assert first == {"Type": "Other", "Id": "namespace/shop", "Details": {"Other": facts}} | PLACE | TARGET
    assert (host["Id"], cluster["Id"]) == ("falco-0", CLUSTER_ARN)
    (found,) = found_for(source="k8s_audit", kubernetes=told_member(user="admin"))
    assert found == {"Type": "Other", "Id": "falco/k8s_audit"} | PLACE | TARGET


# ---- whatever enrichment says -----------------------------------------------------------------------


@pytest.mark.parametrize(("length", "kept"), [(121, True), (122, False), (300, False)])
def test_labels_whose_keys_do_not_fit_are_left_out(length: int, kept: bool) -> None:
    (found,) = found_for(kubernetes={"pod": "p", "labels": {"k" * length: "v", "app": "x" * 2000}})
    other = found["Details"]["Other"]
    assert other["label/app"] == "x" * 1022 + "\u2026"
    assert (f"label/{'k' * length}" in other) is kept


def test_pods_with_more_labels_than_a_resource_takes() -> None:
    (found,) = found_for(kubernetes={"pod": "p", "labels": dict.fromkeys(map(str, range(200)), "v")})
    assert len(found["Details"]["Other"]) == OTHER_MAX
    assert found["Details"]["Other"]["pod"] == "p"


@pytest.mark.parametrize(
    "member", ["pod", "namespace", "pod_ip", "service_account", "user", "node", "container"]
)
@pytest.mark.parametrize("blank", [" ", "\u2003", "\n\t"])
def test_blank_values_are_no_values(member: str, blank: str) -> None:
    """The service refuses them, and a sender may say them."""
    found_for(IN_CONTAINER, kubernetes={"namespace": "a", member: blank})
    found_for(NOBODY, kubernetes={"namespace": "a", member: blank})


LONG = st.builds(
    lambda unit, count: unit * count,
    st.sampled_from(["x", "\u00e4", "\U0001f600", "\x00", '"', "\\", "\u2028", "a.", "@", ":", "/"]),
    st.sampled_from([0, 1, 15, 16, 17, 127, 128, 129, 255, 256, 512, 513, 1023, 1024, 1025]),
)
TEXTS = (
    LONG
    | st.text(max_size=8)
    | st.sampled_from([ID, DIGEST, "arn:aws:ecs:r:1:task/x", "::::::", "eu-west-1", " "])
)


def members_of(*names: str, **more: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, TEXTS) | more)


LABELS = st.dictionaries(TEXTS, TEXTS, max_size=4) | st.integers(0, 80).map(
    lambda count: dict.fromkeys(map(str, range(count)), "v")
)
KUBERNETES = members_of(
    "namespace", "pod", "pod_uid", "container", "container_id", "image", "image_id", "service_account", "pod_ip",
    "node", "user", "resolved_by", privileged=st.booleans() | st.none(), labels=LABELS,
    workload=members_of("kind", "name"), stale=st.booleans(), namespace_labels=LABELS,
)  # fmt: skip
NODES = members_of(
    "name", "instance_type", "zone", "region", "provider_id", "nodegroup", "compute_type", "other",
    instance_id=st.sampled_from(["", "i-0123456789abcdef0"]),
)  # fmt: skip
TASKS = members_of(*ECS)
ENRICHMENT = st.fixed_dictionaries(
    {}, optional={"cluster": TEXTS, "kubernetes": KUBERNETES, "node": NODES, "ecs": TASKS, "more": TEXTS}
)


@given(ENRICHMENT, st.sampled_from([NOBODY, IN_CONTAINER]), TEXTS.filter(lambda text: not text.isspace()))
@example({"kubernetes": {"pod": "p", "labels": {" ": " "}}}, NOBODY, "")
@example({"node": {"region": "r" * 17}}, NOBODY, "")
@settings(max_examples=300, deadline=None)
def test_whatever_enrichment_says_the_service_takes_it(
    members: dict[str, Any], fields: ContainerFields, hostname: str
) -> None:
    found_for(fields, hostname=hostname, **members)
