"""What rules and aggregation look at in a record: Falco's members and what enrichment found, read once. Pure.

Absent values are ``""`` or empty, never None: a missing label matches nothing and is the same in every key. Where enrichment and Falco
both tell (namespace, pod, container, image), enrichment wins, because it is what the finding shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from forwarder.alert import encode as json_encode
from forwarder.alert import present
from forwarder.alert_fields import read
from forwarder.record import Record

SURROUNDINGS_MAX, SURROUNDINGS_BYTES_MAX = 1024, 4096
"""Enrichments remembered in their decoded form; larger ones are decoded each time."""
_NO_CONTAINER = "host"


class _Workload(msgspec.Struct, frozen=True):
    kind: str = ""
    name: str = ""


class _Kubernetes(msgspec.Struct, frozen=True):
    namespace: str = ""
    pod: str = ""
    container: str = ""
    image: str = ""
    workload: _Workload = _Workload()
    labels: dict[str, str] = {}
    namespace_labels: dict[str, str] = {}
    node: str = ""
    user: str = ""


class _Node(msgspec.Struct, frozen=True):
    name: str = ""


class _Ecs(msgspec.Struct, frozen=True):
    family: str = ""
    service: str = ""
    container: str = ""
    image: str = ""


class _Surroundings(msgspec.Struct, frozen=True):
    """Root members that enrichment added."""

    cluster: str = ""
    kubernetes: _Kubernetes = _Kubernetes()
    node: _Node = _Node()
    ecs: _Ecs = _Ecs()


class Facts(NamedTuple):
    """One alert as rules and keys see it."""

    rule: str
    source: str
    """``syscall`` where Falco says nothing."""
    rank: int
    """Syslog rank of the priority: 0 Emergency ... 7 Debug."""
    priority: str
    """As sent."""
    tags: Sequence[str]
    hostname: str
    fields: Mapping[str, Any]
    """``output_fields``: integers exact, floats as the text they were sent as, absent ones None, "" or "<NA>"."""
    cluster: str
    """The discovered one; the configured one is the same for all alerts."""
    namespace: str
    pod: str
    workload: str
    """``Deployment/web``; ``Service/web`` or ``Task/web`` on ECS."""
    container: str
    """Name of the container; nothing for a host."""
    image: str
    """``repository:tag``, as far as it is known."""
    node: str
    """Name of the node, as far as it is known."""
    user: str
    """Who did it, in the audit trail of an API: k8s_audit, cloudtrail, okta, github, gcp."""
    labels: Mapping[str, str]
    """Of the pod, those that enrichment keeps."""
    namespace_labels: Mapping[str, str]

    def text(self, name: str) -> str:
        """An output field as text; nothing where it is absent."""
        value = self.fields.get(name)
        if value.__class__ is str:
            return "" if value == "<NA>" else str(value)
        return "" if value is None else json_encode(value).decode()


_surroundings = msgspec.json.Decoder(_Surroundings)
_NOTHING = _Surroundings()


def facts_of(record: Record) -> Facts:
    """Facts of a record of kind ``ALERT`` or ``TEXT``."""
    alert = read(record.body)
    enrichment = record.enrichment
    if not enrichment:
        around = _NOTHING
    elif len(enrichment) <= SURROUNDINGS_BYTES_MAX:
        around = _remembered(enrichment)
    else:
        around = _decoded(enrichment)
    fields = alert.output_fields or {}
    kubernetes, ecs = around.kubernetes, around.ecs
    rule = present(alert.rule)
    source = present(alert.source)
    return Facts(
        rule,
        source or ("internal" if rule.startswith("Falco internal: ") else "syscall"),
        record.priority,
        present(alert.priority),
        alert.tags or (),
        present(alert.hostname),
        fields,
        around.cluster,
        kubernetes.namespace or _first(fields, ("k8s.ns.name", "k8smeta.ns.name", "ka.target.namespace")),
        kubernetes.pod or _first(fields, ("k8s.pod.name", "k8smeta.pod.name")),
        _workload_of(kubernetes, ecs),
        kubernetes.container or ecs.container or _container_name(fields),
        kubernetes.image or ecs.image or _image(fields),
        around.node.name or kubernetes.node,
        kubernetes.user or _first(fields, USER_FIELDS),
        kubernetes.labels,
        kubernetes.namespace_labels,
    )


USER_FIELDS = ("ka.user.name", "ct.user", "okta.actor.name", "github.user", "gcp.user")


def _decoded(enrichment: bytes) -> _Surroundings:
    return _surroundings.decode(b"{%b}" % enrichment)


_remembered = lru_cache(maxsize=SURROUNDINGS_MAX)(_decoded)


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if name in fields:  # hardly ever: asked first, because this runs for every alert
            value = fields[name]
            if value and value.__class__ is str and value != "<NA>":
                return str(value)
    return ""


def _workload_of(kubernetes: _Kubernetes, ecs: _Ecs) -> str:
    workload = kubernetes.workload
    if workload.name:
        return f"{workload.kind}/{workload.name}"
    if ecs.service:
        return f"Service/{ecs.service}"
    return f"Task/{ecs.family}" if ecs.family else ""


def _container_name(fields: Mapping[str, Any]) -> str:
    name = _first(fields, ("container.name",))
    return "" if name == _NO_CONTAINER else name


def _image(fields: Mapping[str, Any]) -> str:
    repository = _first(fields, ("container.image.repository",))
    if not repository:
        return _first(fields, ("container.image",))
    tag = _first(fields, ("container.image.tag",))
    return f"{repository}:{tag}" if tag else repository
