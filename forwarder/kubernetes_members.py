"""What a CloudWatch event says of pod, workload and node: cache records to JSON members. Pure.

Nothing is invented: what is unknown is absent. The shapes are public (docs/enrichment.md), and ``asff_resources`` reads them.
"""

from __future__ import annotations

from typing import Any

from forwarder.alert import encode as json_encode
from forwarder.kubernetes_cache import Metas, Nodes, top_owner
from forwarder.kubernetes_objects import Container, Node, Owner, Pod


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
    member: dict[str, Any] = {"namespace": pod.namespace, "pod": pod.name, "pod_uid": pod.uid}
    if container is not None:
        member["container"] = container.name
        member["container_id"] = container.id
        member["image"] = container.image
        member["image_id"] = container.image_id
        member["container_started"] = container.started
        member["privileged"] = container.privileged
    member["workload"] = {"kind": workload.kind, "name": workload.name}
    member["service_account"] = pod.service_account
    member["pod_ip"] = pod.ip
    member["labels"] = _mapping(pod.labels)
    member["namespace_labels"] = _mapping(namespace_labels)
    member["node"] = pod.node
    member["resolved_by"] = resolved_by
    known = {key: value for key, value in member.items() if value not in ("", None, {})}
    return json_encode(known | {"stale": stale})


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
    return top_owner(pod.owner, owners)


def cluster_of(nodes: Nodes) -> str:
    """The cluster's name, where nodes agree on one (hybrid providerID, eksctl's label)."""
    names = {node.cluster for node in nodes.live() if node.cluster}
    return names.pop() if len(names) == 1 else ""


def _mapping(flat: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
