"""``Resources`` of a finding: what was attacked, where it runs, which cluster. Pure.

Made of what Falco says and of what enrichment found (``kubernetes``, ``node``, ``ecs`` of the event, see docs/enrichment.md). Nothing
is invented: an unknown is absent, and what does not fit a typed member is left out of it. Image names are ``repository:tag`` because a
digest would not fit the 128 characters of ImageName; it goes to ImageId.

The first resource is the target: the container, else the pod, else the host; of k8s_audit alerts the namespace.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from forwarder.alert import encode as json_encode
from forwarder.asff_context import Context, check, cut
from forwarder.asff_schema import INSTANCE_TYPE_MAX, OTHER_KEY_MAX, OTHER_MAX, Timestamp, resources_faults

_PARTITIONS = frozenset({"aws", "aws-cn", "aws-us-gov", "aws-us-iso", "aws-us-iso-b"})
"""What ``Resources[].Partition`` knows; elsewhere the member is left out."""
ARN_PARTS = 6
_REGION = re.compile(r"(?=.{1,16}\Z)[a-z]{2,8}(?:-[a-z]+)+-\d{1,2}\Z")
_CLUSTER = re.compile(r"[0-9A-Za-z][A-Za-z0-9_-]{0,99}\Z")
"""EKS' own rule for names."""


class ContainerFields(NamedTuple):
    """What Falco says of a container, absent values empty, in the order of ``CONTAINER_NAMES``."""

    full_id: str
    short_id: str
    repository: str
    image: str
    tag: str
    digest: str
    image_id: str
    name: str
    privileged: str
    pod: str
    pod_by_plugin: str
    namespace: str
    namespace_by_plugin: str

    @property
    def identity(self) -> str:
        identity = self.full_id or self.short_id
        return "" if identity == "host" else identity


CONTAINER_NAMES = (
    "container.full_id",
    "container.id",
    "container.image.repository",
    "container.image",
    "container.image.tag",
    "container.image.digest",
    "container.image.id",
    "container.name",
    "container.privileged",
    "k8s.pod.name",
    "k8smeta.pod.name",
    "k8s.ns.name",
    "k8smeta.ns.name",
)


class _Workload(msgspec.Struct, frozen=True):
    kind: str = ""
    name: str = ""


class _Kubernetes(msgspec.Struct, frozen=True):
    namespace: str = ""
    pod: str = ""
    pod_uid: str = ""
    container: str = ""
    container_id: str = ""
    container_started: str = ""
    image: str = ""
    image_id: str = ""
    privileged: bool | None = None
    workload: _Workload = _Workload()
    service_account: str = ""
    pod_ip: str = ""
    labels: dict[str, str] = {}
    node: str = ""
    user: str = ""


class _Node(msgspec.Struct, frozen=True):
    name: str = ""
    instance_id: str = ""
    instance_type: str = ""
    zone: str = ""
    region: str = ""
    provider_id: str = ""
    nodegroup: str = ""
    compute_type: str = ""
    launched_at: str = ""


class _Ecs(msgspec.Struct, frozen=True):
    cluster_arn: str = ""
    task_arn: str = ""
    family: str = ""
    revision: str = ""
    service: str = ""
    launch_type: str = ""
    container: str = ""
    container_arn: str = ""
    image: str = ""
    image_id: str = ""


class _Enrichment(msgspec.Struct, frozen=True):
    cluster: str = ""
    kubernetes: _Kubernetes | None = None
    node: _Node | None = None
    ecs: _Ecs | None = None


_enrichment = msgspec.json.Decoder(_Enrichment)


def cluster_of(context: Context, enrichment: bytes) -> str:
    """The configured cluster, or the one that was discovered when the alert came."""
    if context.cluster or b'"cluster":"' not in enrichment:
        return context.cluster
    return _enrichment.decode(b"{%b}" % enrichment).cluster


def resources(
    context: Context, hostname: str, source: str, container: ContainerFields, enrichment: bytes = b""
) -> bytes:
    """``Resources``, encoded and checked. ``enrichment`` as in ``Record``."""
    known = _enrichment.decode(b"{%b}" % enrichment)
    found = _workloads(known, container)
    if known.ecs is not None and _is_said(known.ecs.task_arn):
        found.append(_ecs_task(known.ecs))
    if known.node is not None:
        found.append(_host(context, known.node, hostname))
    elif _is_said(hostname):
        found.append(_other(hostname, hostname=hostname))
    cluster = context.cluster or known.cluster
    if _CLUSTER.match(cluster) and known.ecs is None:
        found.append(_eks_cluster(context, cluster, known.node))
    if not found:
        found.append({"Type": "Other", "Id": cut(f"falco/{source}", 512)})
    for resource in found:
        resource.setdefault("Region", context.region)
        if context.partition in _PARTITIONS:
            resource["Partition"] = context.partition
    found[0]["ResourceRole"] = "Target"
    encoded = json_encode(found)
    check(resources_faults(encoded))
    return encoded


def _workloads(known: _Enrichment, container: ContainerFields) -> list[dict[str, Any]]:
    """What ran there: the container, else its pod, else (audit) the namespace it is about. Or nothing: a host."""
    kubernetes, ecs = known.kubernetes or _Kubernetes(), known.ecs or _Ecs()
    if _is_said(ecs.container_arn):
        return [_ecs_container(ecs)]
    if _is_said(container.identity) or _is_said(kubernetes.container_id):
        return [_container(container, kubernetes, ecs)]
    return _pod_or_namespace(kubernetes)


def _container(fields: ContainerFields, kubernetes: _Kubernetes, ecs: _Ecs) -> dict[str, Any]:
    repository = fields.repository or fields.image
    image = f"{repository}:{fields.tag}" if fields.repository and fields.tag else repository
    typed: dict[str, Any] = {
        member: cut(value, 128)
        for member, value in (
            ("Name", kubernetes.container or ecs.container or fields.name),
            ("ImageName", (kubernetes.image or ecs.image or image).partition("@")[0]),
            (
                "ImageId",
                _digest(kubernetes.image_id) or _digest(ecs.image_id) or fields.digest or fields.image_id,
            ),
        )
        if _is_said(value)
    }
    if _is_time(kubernetes.container_started):
        typed["LaunchedAt"] = kubernetes.container_started
    if kubernetes.privileged is not None:
        typed["Privileged"] = kubernetes.privileged
    elif fields.privileged:
        typed["Privileged"] = fields.privileged == "true"
    other = _pod_facts(kubernetes, fields)
    details = {name: part for name, part in (("Container", typed), ("Other", other)) if part}
    resource: dict[str, Any] = {
        "Type": "Container",
        "Id": cut(next(filter(_is_said, (kubernetes.container_id, fields.identity))), 512),
    }
    if details:
        resource["Details"] = details
    return resource


def _digest(image_id: str) -> str:
    """``sha256:...`` of ``repository@sha256:...``; other forms as they are."""
    return image_id.rpartition("@")[2]


def _pod_facts(kubernetes: _Kubernetes, fields: ContainerFields | None = None) -> dict[str, str]:
    """Pod and workload, for ``Details.Other``."""
    workload = kubernetes.workload
    pod, namespace = kubernetes.pod, kubernetes.namespace
    if fields is not None:
        pod = pod or fields.pod or fields.pod_by_plugin
        namespace = namespace or fields.namespace or fields.namespace_by_plugin
    facts = {
        "pod": pod,
        "namespace": namespace,
        "pod_uid": kubernetes.pod_uid,
        "workload": f"{workload.kind}/{workload.name}" if workload.name else "",
        "service_account": kubernetes.service_account,
        "pod_ip": kubernetes.pod_ip,
        "node": kubernetes.node,
        "user": kubernetes.user,
    } | {f"label/{key}": value for key, value in kubernetes.labels.items()}
    return _other_values(facts)


def _other_values(facts: dict[str, str]) -> dict[str, str]:
    """Within the limits of ``Details.Other``."""
    kept = {
        key: cut(value, 1023)
        for key, value in facts.items()
        if _is_said(value) and _is_said(key.removeprefix("label/")) and len(key) <= OTHER_KEY_MAX
    }
    return dict(list(kept.items())[:OTHER_MAX])


def _other(identity: str, **facts: str) -> dict[str, Any]:
    resource: dict[str, Any] = {"Type": "Other", "Id": cut(identity, 512)}
    values = _other_values(facts)
    if values:
        resource["Details"] = {"Other": values}
    return resource


def _pod_or_namespace(kubernetes: _Kubernetes) -> list[dict[str, Any]]:
    """The pod, where the container is not known; of an audit alert the namespace it is about."""
    namespace = kubernetes.namespace
    if _is_said(kubernetes.pod):
        identity = f"pod/{namespace}/{kubernetes.pod}" if _is_said(namespace) else f"pod/{kubernetes.pod}"
    elif _is_said(namespace):
        identity = f"namespace/{namespace}"
    else:
        return []
    return [_other(identity, **_pod_facts(kubernetes))]


def _host(context: Context, node: _Node, hostname: str) -> dict[str, Any]:
    """The machine: an EC2 instance with its ARN, or what is known of it."""
    facts = {
        "node": node.name,
        "hostname": hostname,
        "zone": node.zone,
        "nodegroup": node.nodegroup,
        "compute_type": node.compute_type,
    }
    region = node.region if _REGION.match(node.region) else context.region
    if not node.instance_id:
        name = next(filter(_is_said, (node.name, hostname)), "node")
        resource = _other(name, **facts, provider_id=node.provider_id)
    else:
        account = context.cluster_account or context.account
        arn = f"arn:{context.partition}:ec2:{region}:{account}:instance/{node.instance_id}"
        typed: dict[str, Any] = {}
        if _is_said(node.instance_type) and len(node.instance_type) <= INSTANCE_TYPE_MAX:
            typed["Type"] = node.instance_type
        if _is_time(node.launched_at):
            typed["LaunchedAt"] = node.launched_at
        details = {"AwsEc2Instance": typed, "Other": _other_values(facts)}
        resource = {
            "Type": "AwsEc2Instance",
            "Id": arn,
            "Details": {name: part for name, part in details.items() if part},
        }
    return resource | {"Region": region}


def _eks_cluster(context: Context, cluster: str, node: _Node | None) -> dict[str, Any]:
    region = node.region if node is not None and _REGION.match(node.region) else context.region
    account = context.cluster_account or context.account
    arn = context.cluster_arn or f"arn:{context.partition}:eks:{region}:{account}:cluster/{cluster}"
    resource = {
        "Type": "AwsEksCluster",
        "Id": arn,
        "Details": {"AwsEksCluster": {"Name": cluster, "Arn": arn}},
    }
    return resource | {"Region": arn.split(":")[3]}


def _ecs_container(ecs: _Ecs) -> dict[str, Any]:
    typed = {
        name: cut(value, 512)
        for name, value in (("Name", ecs.container), ("Image", ecs.image))
        if _is_said(value)
    }
    other = _other_values(
        {
            "image_id": ecs.image_id,
            "family": ecs.family,
            "revision": ecs.revision,
            "service": ecs.service,
            "launch_type": ecs.launch_type,
        }
    )
    details = {name: part for name, part in (("AwsEcsContainer", typed), ("Other", other)) if part}
    resource: dict[str, Any] = {"Type": "AwsEcsContainer", "Id": cut(ecs.container_arn, 512)}
    return resource | ({"Details": details} if details else {}) | _region_of(ecs.container_arn)


def _ecs_task(ecs: _Ecs) -> dict[str, Any]:
    """The task; the ARN of its definition follows from its own, the family and the revision."""
    typed = {
        "ClusterArn": ecs.cluster_arn,
        "Group": f"service:{ecs.service}" if _is_said(ecs.service) else "",
    }
    place = ecs.task_arn.split(":")
    if ecs.family and ecs.revision and len(place) == ARN_PARTS:
        typed["TaskDefinitionArn"] = f"{':'.join(place[:5])}:task-definition/{ecs.family}:{ecs.revision}"
    typed = {name: cut(value, 512) for name, value in typed.items() if _is_said(value)}
    resource: dict[str, Any] = {"Type": "AwsEcsTask", "Id": cut(ecs.task_arn, 512)}
    return resource | ({"Details": {"AwsEcsTask": typed}} if typed else {}) | _region_of(ecs.task_arn)


def _is_said(text: str) -> bool:
    return bool(text) and not text.isspace()


def _is_time(text: str) -> bool:
    try:
        msgspec.convert(text, Timestamp)
    except msgspec.ValidationError:
        return False
    return True


def _region_of(arn: str) -> dict[str, str]:
    """The region an ARN names, as a member."""
    parts = arn.split(":")
    return {"Region": parts[3]} if len(parts) == ARN_PARTS and _REGION.match(parts[3]) else {}
