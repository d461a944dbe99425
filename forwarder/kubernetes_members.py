"""What a CloudWatch event says of pod, workload and node: cache records to JSON members. Pure.

Nothing is invented: what is unknown is absent. The shapes are public (docs/enrichment.md), and ``asff_resources`` reads them.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from forwarder.alert import encode as json_encode
from forwarder.kubernetes_cache import Metas, Nodes, top_owner
from forwarder.kubernetes_objects import Container, Node, Owner, Pod


class _Workload(msgspec.Struct, gc=False):
    kind: str
    name: str


class _Kubernetes(msgspec.Struct, gc=False, omit_defaults=True):
    """In the order of the event's keys; what is empty is left out."""

    namespace: str = ""
    pod: str = ""
    pod_uid: str = ""
    container: str = ""
    container_id: str = ""
    image: str = ""
    image_id: str = ""
    container_started: str = ""
    privileged: bool | None = None
    workload: _Workload | None = None
    service_account: str = ""
    pod_ip: str = ""
    labels: dict[str, str] | None = None
    namespace_labels: dict[str, str] | None = None
    node: str = ""
    resolved_by: str = ""
    stale: bool | None = None


_UNKNOWN = Container("", "", "", "", "", "", None)


def kubernetes_member(
    pod: Pod,
    container: Container | None,
    *,
    workload: Owner,
    namespace_labels: tuple[str, ...],
    resolved_by: str,
    stale: bool,
) -> bytes:
    """``kubernetes`` of an alert whose pod is known."""
    named = container or _UNKNOWN
    return json_encode(
        _Kubernetes(
            pod.namespace,
            pod.name,
            pod.uid,
            named.name,
            named.id,
            named.image,
            named.image_id,
            named.started,
            named.privileged,
            _Workload(workload.kind, workload.name),
            pod.service_account,
            pod.ip,
            _mapping(pod.labels),
            _mapping(namespace_labels),
            pod.node,
            resolved_by,
            stale,
        )
    )


def told_member(**told: str) -> bytes:
    """``kubernetes`` of an alert whose pod is unknown: what Falco said, and nothing else. Or nothing at all."""
    known = {key: value for key, value in told.items() if value}
    return json_encode(known) if known else b""


def node_member(node: Node) -> bytes:
    """``node`` of an alert whose node is known."""
    member = {
        "name": node.name,
        "instance_id": node.instance_id,
        "instance_type": node.instance_type,
        "zone": node.zone,
        "region": node.region,
        "provider_id": node.provider_id,
        "nodegroup": node.nodegroup,
        "compute_type": node.compute_type,
    }
    return json_encode({key: value for key, value in member.items() if value})


def workload_of(pod: Pod, owners: dict[str, Metas]) -> tuple[Owner, bool]:
    """The top owner, or the bare pod itself; and whether that is known for sure."""
    if pod.owner is None:
        return Owner("Pod", pod.name, pod.uid), True
    return top_owner(pod.owner, pod.namespace, owners)


def cluster_of(nodes: Nodes) -> str:
    """The cluster's name: that of hybrid nodes' providerIDs, if they agree, else the label most of the nodes carry.

    One node alone may not name the cluster: a kubelet sets labels on itself.
    """
    told = {node.cluster for node in nodes.live() if node.cluster}
    if told:
        return told.pop() if len(told) == 1 else ""
    labels = Counter(node.cluster_label for node in nodes.live() if node.cluster_label)
    name, count = next(iter(labels.most_common(1)), ("", 0))
    return name if 2 * count > len(nodes) else ""


def _mapping(flat: tuple[str, ...]) -> dict[str, str] | None:
    return dict(zip(flat[::2], flat[1::2], strict=True)) if flat else None
