"""Kubernetes objects as the cache keeps them: trimmed to what enrichment says, decoded straight from the API's JSON. Pure.

A pod of the API is 12 KB of JSON and 65 KB as dictionaries; a ``Pod`` is about 1.5 KB. So nothing else is ever built: the typed
decoder skips what is not named here, strings that repeat are shared, and the records are of no interest to the garbage collector
(ten thousand of them would stop the service for most of a second).

Unknown shapes raise ``msgspec.ValidationError``; who asked logs and skips the object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from sys import intern
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from forwarder import kubernetes_wire as wire
from forwarder.timestamp import time_ns

NAME_LENGTH_MAX = 253
"""Kubernetes' own limit for names; not everything that looks like a name is held to it (owners are not)."""
TEXT_LENGTH_MAX = 512
"""Images, provider ids: whoever may create a pod chooses them, and they are kept for every alert."""
ID_LENGTH_MAX = 128
CONTAINERS_MAX = 64
ADDRESSES_MAX = 32
SENSOR_FREE = (("eks.amazonaws.com/compute-type", "fargate"), ("kubernetes.io/os", "windows"))
"""Labels of nodes where Falco cannot run."""

T = TypeVar("T")

_INSTANCE = re.compile(r"i-[0-9a-f]{8,17}\Z")


# ---- what the cache keeps -------------------------------------------------------------------------------


class Container(Struct, frozen=True, gc=False):
    """One container of a pod, init and ephemeral ones included. Unknown values are empty."""

    name: str
    id: str
    """64 hexadecimal digits (the runtime's prefix is gone)."""
    previous_id: str
    """Of the instance before the last restart: late alerts still name it."""
    image: str
    image_id: str
    """``repository@sha256:...`` or ``sha256:...``."""
    started: str
    """RFC 3339."""
    privileged: bool | None


class Owner(Struct, frozen=True, gc=False):
    """The controller of an object."""

    kind: str
    name: str
    uid: str


class Pod(Struct, frozen=True, gc=False):
    """A pod."""

    uid: str
    namespace: str
    name: str
    node: str
    """Name of its node, or nothing while it is not scheduled."""
    service_account: str
    ip: str
    ip_is_its_own: bool
    """Not the node's (host network), and not given back (the pod has ended)."""
    labels: tuple[str, ...]
    """Allowed labels: key, value, key, value ..."""
    owner: Owner | None
    containers: tuple[Container, ...]
    created: float
    """Seconds since 1970; the API server tells whole seconds."""


class Provider(NamedTuple):
    """What ``spec.providerID`` of a node says."""

    instance_id: str
    zone: str
    region: str
    cluster: str


class Node(Struct, frozen=True, gc=False):
    """A node. Unknown values are empty."""

    uid: str
    name: str
    provider_id: str
    instance_id: str
    instance_type: str
    zone: str
    region: str
    nodegroup: str
    compute_type: str
    cluster: str
    """Cluster in a hybrid node's providerID."""
    addresses: tuple[str, ...]
    """Addresses and host names other than its name."""
    cluster_label: str = ""
    """Cluster in eksctl's label."""
    wants_sensor: bool = True
    """Falco should run there: neither Fargate nor Windows, and with the labels of ``sensors.node_selector``."""


class Meta(Struct, frozen=True, gc=False):
    """A namespace, ReplicaSet or Job."""

    uid: str
    name: str
    labels: tuple[str, ...]
    owner: Owner | None
    namespace: str = ""


class Labels:
    """The allow-list for labels, and a limit for their size."""

    def __init__(self, allowed: list[str], bytes_max: int) -> None:
        """``allowed`` has whole keys, and prefixes that end in ``*``."""
        self._keys = frozenset(key for key in allowed if not key.endswith("*"))
        self._prefixes = tuple(key[:-1] for key in allowed if key.endswith("*"))
        self._bytes_max = bytes_max

    def trim(self, labels: dict[str, str] | None) -> tuple[str, ...]:
        """Allowed labels by key, until the limit is reached: the same object always keeps the same ones."""
        kept: list[str] = []
        room = self._bytes_max
        for key, value in sorted((labels or {}).items()):
            if key not in self._keys and not key.startswith(self._prefixes):
                continue
            room -= len(key.encode()) + len(value.encode())
            if room < 0:
                break
            kept += (intern(key), intern(value))
        return tuple(kept)


NO_LABELS = Labels([], 0)


# ---- from the API's JSON -------------------------------------------------------------------------------

_pod = msgspec.json.Decoder(wire.Pod)
_node = msgspec.json.Decoder(wire.Node)
_object = msgspec.json.Decoder(wire.Object)


def _decoded(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except UnicodeDecodeError as error:
        raise msgspec.ValidationError(str(error)) from error


def decode_pod(data: bytes, labels: Labels) -> tuple[Pod, str]:
    """A pod from its JSON, and its resource version."""
    sent = _decoded(_pod, data)
    meta, spec, status = sent.metadata, sent.spec, sent.status
    pod = Pod(
        uid=meta.uid[:ID_LENGTH_MAX],
        namespace=_name(meta.namespace),
        name=meta.name[:NAME_LENGTH_MAX],
        node=_name(spec.node_name),
        service_account=_name(spec.service_account_name),
        ip=status.pod_ip[:ID_LENGTH_MAX],
        ip_is_its_own=not spec.host_network and status.phase not in {"Succeeded", "Failed"},
        labels=labels.trim(meta.labels),
        owner=_controller(meta),
        containers=_containers(spec, status),
        created=_seconds(meta.creation_timestamp),
    )
    return pod, meta.resource_version


def decode_node(data: bytes, sensor_labels: Mapping[str, str] = MappingProxyType({})) -> tuple[Node, str]:
    """A node from its JSON, and its resource version. ``sensor_labels`` are those of nodes Falco should run on."""
    sent = _decoded(_node, data)
    meta = sent.metadata
    labels = {key: value[:NAME_LENGTH_MAX] for key, value in (meta.labels or {}).items()}
    provider_id = sent.spec.provider_id[:TEXT_LENGTH_MAX]
    provider = parse_provider(provider_id)
    addresses = [
        item.address[:NAME_LENGTH_MAX]
        for item in (sent.status.addresses or ())[:ADDRESSES_MAX]
        if item.address
    ]
    host = labels.get("kubernetes.io/hostname", "")
    node = Node(
        uid=meta.uid[:ID_LENGTH_MAX],
        name=meta.name[:NAME_LENGTH_MAX],
        provider_id=provider_id,
        instance_id=provider.instance_id,
        instance_type=labels.get("node.kubernetes.io/instance-type", ""),
        zone=labels.get("topology.kubernetes.io/zone", "") or provider.zone,
        region=labels.get("topology.kubernetes.io/region", "") or provider.region,
        nodegroup=labels.get("eks.amazonaws.com/nodegroup", "")
        or labels.get("alpha.eksctl.io/nodegroup-name", ""),
        compute_type=labels.get("eks.amazonaws.com/compute-type", ""),
        cluster=provider.cluster,
        cluster_label=labels.get("alpha.eksctl.io/cluster-name", ""),
        addresses=tuple(
            {address: None for address in (*addresses, host) if address and address != meta.name}
        ),
        wants_sensor=not any(labels.get(key) == value for key, value in SENSOR_FREE)
        and all(labels.get(key) == value for key, value in sensor_labels.items()),
    )
    return node, meta.resource_version


def decode_meta(data: bytes, labels: Labels = NO_LABELS) -> tuple[Meta, str]:
    """A namespace, ReplicaSet or Job from its metadata, and its resource version."""
    meta = _decoded(_object, data).metadata
    found = Meta(
        uid=meta.uid[:ID_LENGTH_MAX],
        name=meta.name[:NAME_LENGTH_MAX],
        labels=labels.trim(meta.labels),
        owner=_controller(meta),
        namespace=_name(meta.namespace),
    )
    return found, meta.resource_version


def parse_provider(provider_id: str) -> Provider:
    """``spec.providerID`` by its scheme; what is not known of the form stays empty.

    EC2 ``aws:///<zone>/i-...``; Fargate ``aws:///<zone>/<id>/fargate-ip-...`` (no instance); hybrid
    ``eks-hybrid:///<region>/<cluster>/<node>`` and, older, ``eks:///<region>/<cluster>/<instance>``.
    """
    scheme, separator, rest = provider_id.partition(":///")
    parts = rest.split("/")
    if not separator:
        return Provider("", "", "", "")
    if scheme == "aws":
        zone = parts[0] if len(parts) > 1 else ""
        instance = parts[-1] if _INSTANCE.match(parts[-1]) and len(parts) <= 2 else ""  # noqa: PLR2004 - zone, instance
        return Provider(instance, zone, "", "")
    if scheme in {"eks-hybrid", "eks"} and len(parts) == 3:  # noqa: PLR2004 - region, cluster, node
        instance = parts[2] if scheme == "eks" and _INSTANCE.match(parts[2]) else ""
        return Provider(instance, "", parts[0], parts[1])
    return Provider("", "", "", "")


def _controller(meta: wire.Metadata) -> Owner | None:
    for owner in meta.owner_references or ():
        if owner.controller:
            return Owner(_name(owner.kind), _name(owner.name), intern(owner.uid[:ID_LENGTH_MAX]))
    return None


def _containers(spec: wire.PodSpec, status: wire.PodStatus) -> tuple[Container, ...]:
    """Containers by name: what the specification says and what the runtime says."""
    statuses = {
        item.name: item
        for group in (
            status.container_statuses,
            status.init_container_statuses,
            status.ephemeral_container_statuses,
        )
        for item in group or ()
    }
    found = [
        _container(item, statuses.get(item.name))
        for group in (spec.containers, spec.init_containers, spec.ephemeral_containers)
        for item in group or ()
    ]
    return tuple(found[:CONTAINERS_MAX])


def _container(spec: wire.ContainerSpec, status: wire.ContainerStatus | None) -> Container:
    context = spec.security_context
    started = previous = ""
    if status is not None:
        state, last = status.state, status.last_state
        now = (state.running or state.terminated) if state else None
        started = (now.started_at or "") if now else ""
        before = last.terminated if last else None
        previous = (before.container_id or "") if before else ""
    return Container(
        name=_name(spec.name),
        id=_bare(status.container_id)[:ID_LENGTH_MAX] if status else "",
        previous_id=_bare(previous)[:ID_LENGTH_MAX],
        image=intern(spec.image[:TEXT_LENGTH_MAX]),
        image_id=intern(_bare(status.image_id[-TEXT_LENGTH_MAX:])) if status else "",
        started=started[:ID_LENGTH_MAX],
        privileged=context.privileged if context else None,
    )


def _bare(identity: str) -> str:
    """``containerd://<64 hex>`` without its runtime, ``docker-pullable://repository@sha256:...`` without its scheme."""
    return identity.rpartition("://")[2]


def _name(text: str) -> str:
    return intern(text[:NAME_LENGTH_MAX])


def _seconds(timestamp: str | None) -> float:
    nanoseconds = time_ns(timestamp) if timestamp else None
    return 0.0 if nanoseconds is None else nanoseconds / 1e9
