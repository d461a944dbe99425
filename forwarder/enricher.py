"""The contract between enrichers and those who ask them, and the one place that puts their answers together.

An enricher knows something of an alert's surroundings (pod, node, ECS task) and answers from memory, in microseconds:
``ingest`` asks before the alert is stored, and nothing on that way may wait for a network. What an enricher learns, it
learns in tasks of its own, which ``start`` begins and ``stop`` ends; neither waits for a peer.

The answer is spooled with the alert. Where an enricher may know more in a moment (a pod the watch has not brought yet), the
record says so (``Record.unresolved``), and delivery asks once more, again from memory.

An enricher that fails does not fail the alert: the fault is counted and logged, the alert goes without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import structlog
from msgspec import Raw

from forwarder.alert import Alert, Unparsable, decode
from forwarder.alert import encode as json_encode
from forwarder.alert_fields import fields as tolerant_fields
from forwarder.record import ALERT, Record

FAULT_LINE_SECS = 60.0
PLUGIN_FREE_SOURCES = frozenset({"syscall", "internal"})
"""Sources whose alerts happened on the machine that Falco's hostname names; plugins tell of other places."""

log = structlog.get_logger("enrichment")


class Fields(msgspec.Struct, frozen=True, gc=False):
    """What enrichers read of ``output_fields``. Absent values are None, ``""`` or ``"<NA>"``: see ``present``."""

    container_id: str | None = msgspec.field(name="container.id", default=None)
    container_full_id: str | None = msgspec.field(name="container.full_id", default=None)
    container_name: str | None = msgspec.field(name="container.name", default=None)
    pod_uid: str | None = msgspec.field(name="k8s.pod.uid", default=None)
    pod_name: str | None = msgspec.field(name="k8s.pod.name", default=None)
    namespace: str | None = msgspec.field(name="k8s.ns.name", default=None)
    pod_ip: str | None = msgspec.field(name="k8s.pod.ip", default=None)
    plugin_pod_uid: str | None = msgspec.field(name="k8smeta.pod.uid", default=None)
    plugin_pod_name: str | None = msgspec.field(name="k8smeta.pod.name", default=None)
    plugin_namespace: str | None = msgspec.field(name="k8smeta.ns.name", default=None)
    plugin_pod_ip: str | None = msgspec.field(name="k8smeta.pod.ip", default=None)
    audit_namespace: str | None = msgspec.field(name="ka.target.namespace", default=None)
    audit_user: str | None = msgspec.field(name="ka.user.name", default=None)


_fields = msgspec.json.Decoder(Fields | None)
_NOTHING = Fields()
_PREFIXES = {key: f'"{key}":'.encode() for key in ("cluster", "kubernetes", "node", "ecs")}
"""The root keys that are an enricher's to use (``alert.RESERVED_KEYS``)."""
_FOUND = b'"resolved_by":'
_members = msgspec.json.Decoder(dict[str, Raw])
_NAMES = {field.encode_name: field.name for field in msgspec.structs.fields(Fields)}


class Subject(NamedTuple):
    """What an enricher may know of an alert."""

    source: str
    """Falco's source: ``syscall``, ``k8s_audit`` ..."""
    hostname: str
    """Falco's hostname: a node, a Falco pod, or a container id. Or nothing."""
    time_ns: int
    """When it happened, UTC, nanoseconds since 1970."""
    fields: Fields
    peer: str
    """Address the alert came from, without its port, or nothing."""
    again: bool = False
    """Asked before, at ingest: not to be counted once more."""

    @property
    def on_a_node(self) -> bool:
        """Whether it happened on the machine Falco runs on, and not in a service a plugin listens to."""
        return self.source in PLUGIN_FREE_SOURCES


class Enricher(Protocol):
    """Knows something of an alert's surroundings."""

    name: str

    def wanted_services(self) -> Sequence[tuple[str, Any]]:
        """SDK clients it will use, as ``aws.Aws.open_clients`` takes them."""

    async def start(self) -> None:
        """Begin to learn, in tasks of its own. Returns at once; never raises for what a peer says."""

    async def stop(self) -> None:
        """End those tasks."""

    def enrich(self, subject: Subject, members: dict[str, bytes]) -> bool:
        """Put in what is known, root key -> JSON object, leaving keys that are there alone unless it knows more.

        From memory, in microseconds. False where looking again in a moment may find more.
        """

    def publish(self) -> None:
        """Bring metrics up to date (several times a second)."""

    def status(self) -> dict[str, Any]:
        """For ``/status``: whether it works, and why not."""


def subject_of(alert: Alert, time_ns: int, peer: str, *, again: bool = False) -> Subject:
    """What enrichers look at. ``time_ns`` stands in where the alert has no time."""
    return Subject(alert.source, alert.hostname, time_ns, _read(alert.fields), peer, again)


def _read(raw: Raw) -> Fields:
    try:
        return _fields.decode(raw) or _NOTHING
    except (msgspec.MsgspecError, RecursionError):
        values = tolerant_fields(raw)  # a number where a text should be, say
    known = {_NAMES[key]: value for key, value in values.items() if key in _NAMES and isinstance(value, str)}
    return Fields(**known)


class Enrichment:
    """All enrichers as one."""

    def __init__(
        self,
        enrichers: Sequence[Enricher] = (),
        *,
        cluster: Callable[[], str] | None = None,
        now: Callable[[], float],
        failed: Callable[[], None] = lambda: None,
        completed: Callable[[], None] = lambda: None,
    ) -> None:
        """``cluster`` gives the discovered cluster's name, ``now`` is monotonic.

        ``failed`` counts faults of enrichers, ``completed`` second looks that found more.
        """
        self._enrichers = tuple(enrichers)
        self._cluster = cluster
        self._now = now
        self._failed = failed
        self._completed = completed
        self._said_at = float("-inf")

    def of(self, alert: Alert, time_ns: int, peer: str, *, again: bool = False) -> tuple[bytes, bool]:
        """Members for the root of the CloudWatch event, without braces, and whether that is all there is to know."""
        members: dict[str, bytes] = {}
        complete = True
        if self._cluster is not None and not again:
            name = self._cluster()
            if name:
                members["cluster"] = json_encode(name)
        subject = subject_of(alert, time_ns, peer, again=again)
        for enricher in self._enrichers:
            try:
                complete &= enricher.enrich(subject, members)
            except Exception as error:  # noqa: BLE001 - an enricher's fault is not the alert's
                self._fail(enricher.name, error)
        return joined(members), complete

    def again(self, record: Record) -> Record:
        """The record with what is known now, where something was missing when it was stored.

        What was known then stays, unless more is known now: the pod may be gone, the cache empty after a restart. So does the cluster's
        name, which is part of the finding's Id.
        """
        if not record.unresolved or record.kind != ALERT:
            return record
        try:
            (alert,) = decode(record.body).alerts
            before = _members.decode(b"{%b}" % record.enrichment)
        except (Unparsable, ValueError):
            return record
        enrichment, _ = self.of(alert, record.time_ns, record.peer, again=True)
        found = {key: bytes(value) for key, value in before.items()}
        more = {
            key: bytes(value)
            for key, value in _members.decode(b"{%b}" % enrichment).items()
            if _says_more(bytes(value), found.get(key, b""))
        }
        if not more:
            return record
        self._completed()
        return msgspec.structs.replace(record, enrichment=joined(found | more))

    def _fail(self, name: str, error: Exception) -> None:
        self._failed()
        if self._now() - self._said_at >= FAULT_LINE_SECS:
            self._said_at = self._now()
            log.error("enrichment failed, the alert goes without", enricher=name, exc_info=error)


def _says_more(now: bytes, before: bytes) -> bool:
    """A pod that was found outweighs one that was not; otherwise whoever says more."""
    found, was_found = _FOUND in now, _FOUND in before
    return (
        found and (not was_found or len(now) > len(before)) if found or was_found else len(now) > len(before)
    )


def joined(members: Mapping[str, bytes]) -> bytes:
    """``"node":{...},"kubernetes":{...}``."""
    return b",".join([_PREFIXES[key] + value for key, value in members.items()])
