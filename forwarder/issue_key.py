"""Which alerts are about the same thing: the key of an issue, made of the parts the configuration names. Pure.

A part has a value only where it tells issues apart, so one list serves all alerts:

===========  =============================================================================================
rule         Falco's rule
source       ``syscall``, ``k8s_audit`` ...
cluster      the discovered cluster (a configured one is the same for all)
namespace    of the pod; of the target of a k8s_audit alert
workload     ``Deployment/web``; the bare pod, or a pod whose workload is unknown, as ``Pod/web``; ECS service or task
container    name of the container
node         only of alerts that happened on a machine and belong to no workload
user         only of audit trails: who did it
target       only of k8s_audit: resource and name of what it was done to
pod          the pod, for one finding each
image        the container's image, for one finding each version
hostname     Falco's hostname, whatever the alert
priority     Falco's priority
===========  =============================================================================================

and ``output_fields.NAME`` is any of Falco's fields. What is absent is the same for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from operator import attrgetter

from forwarder.alert import encode as json_encode
from forwarder.facts import Facts

KEY_BYTES = 16
INTERNAL = "\0"
FIELD_PREFIX = "output_fields."
FIELD_LENGTH_MAX, KEY_PARTS_MAX = 256, 32
DEFAULT_KEY = ["rule", "source", "cluster", "namespace", "workload", "container", "node", "user", "target"]
ON_A_NODE = frozenset({"syscall", "internal"})

Part = Callable[[Facts], str]


def _workload(facts: Facts) -> str:
    return facts.workload or (f"Pod/{facts.pod}" if facts.pod else "")


def _node(facts: Facts) -> str:
    if facts.workload or facts.pod or facts.source not in ON_A_NODE:
        return ""
    return facts.node or facts.hostname


def _user(facts: Facts) -> str:
    return "" if facts.source in ON_A_NODE else facts.user


def _target(facts: Facts) -> str:
    if facts.source in ON_A_NODE:
        return ""
    resource, name = facts.text("ka.target.resource"), facts.text("ka.target.name")
    return json_encode([resource, name]).decode() if resource or name else ""


PARTS: dict[str, Part] = {
    "rule": lambda facts: facts.rule,
    "source": lambda facts: facts.source,
    "cluster": lambda facts: facts.cluster,
    "namespace": lambda facts: facts.namespace,
    "workload": _workload,
    "container": lambda facts: facts.container,
    "node": _node,
    "user": _user,
    "target": _target,
    "pod": lambda facts: facts.pod,
    "image": lambda facts: facts.image,
    "hostname": lambda facts: facts.hostname,
    "priority": lambda facts: facts.priority,
}


_PLAIN = frozenset(PARTS.keys() - {"workload", "node", "user", "target"})
"""Parts that are facts as they stand."""


def fault_of(part: str) -> str:
    """What is wrong with the name of a part, or nothing."""
    if part in PARTS:
        return ""
    if part.startswith(FIELD_PREFIX):
        usable = 0 < len(part) - len(FIELD_PREFIX) <= FIELD_LENGTH_MAX
        return "" if usable else f"{part!r} names no field"
    return f"{part!r} is not one of {', '.join(PARTS)}, {FIELD_PREFIX}NAME"


def key_of(parts: Sequence[str]) -> Callable[[Facts], bytes]:
    """The function that makes an alert's key of these parts: 16 bytes, SHA-256 of their values."""
    plain = [part for part in parts if part in _PLAIN]
    # One call for all that are read as they are; the empty ones keep it returning a tuple.
    read = attrgetter("rule", "rule", *plain)
    readers = [
        PARTS.get(part) or _field(part.removeprefix(FIELD_PREFIX)) for part in parts if part not in _PLAIN
    ]

    def key(facts: Facts) -> bytes:
        return hashed([*read(facts)[2:], *[reader(facts) for reader in readers]])

    return key


def hashed(values: Sequence[str | int]) -> bytes:
    """Of a list, so that no two lists of values are the same text. Ours begin with ``INTERNAL``, which no alert's value does."""
    return hashlib.sha256(json_encode(values)).digest()[:KEY_BYTES]


def _field(name: str) -> Part:
    return lambda facts: facts.text(name)
