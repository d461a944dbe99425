"""An issue: all alerts that are about the same thing, as aggregation remembers them. Pure.

One issue has one finding. What changes with every alert (count, first and last time, highest severity) is here; what the finding shows of
the latest alert is that alert's record, kept beside it until the finding has been told.

Invariants: ``count`` never falls, ``told`` never passes it, ``created_ms`` is set once, ``updated_ms`` only grows, also when the clock steps
back. Packed, an issue takes about 200 bytes, which is what 50,000 of them cost in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from forwarder.issue_key import hashed
from forwarder.record import Record

LABELS = ("INFORMATIONAL", "LOW", "MEDIUM", "HIGH", "CRITICAL")
"""Severity labels of ASFF, by level."""
LEVELS = {label: level for level, label in enumerate(LABELS)}
GROUP, SINGLE, NOTICE = 0, 1, 2
"""Many alerts; one alert, where aggregation is off; something the forwarder itself has to tell."""
IDS_MAX, PODS_MAX = 5, 10
POD_LENGTH_MAX, PODS_LENGTH_MAX = 317, 1024
"""namespace/pod at most, and all of them together."""
PRIORITY_LENGTH_MAX = 64
"""What a finding shows of it."""
NANOSECONDS = 1_000_000


class Issue(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """State of one issue. Positional in the spool: append fields with defaults, never reorder."""

    kind: int
    generation: int
    """Of the table when it began (see ``issues``): keeps the Id of a forgotten issue from being used again."""
    count: int
    """Alerts seen."""
    told: int
    """Of them, those the service has accepted (or refused for good)."""
    first_ns: int
    last_ns: int
    """When it happened first and last, by Falco's time."""
    level: int
    """Highest severity seen, index into ``LABELS``."""
    rank: int
    priority: str
    """Falco's highest priority seen, and its name as sent."""
    ids: tuple[str, ...]
    """Of the latest alerts, the newest last."""
    pods: tuple[str, ...]
    """Distinct ones, the first ``PODS_MAX``, as ``namespace/pod``."""
    touched_ms: int
    """When the last alert was counted, wall clock."""
    urgent: bool = True
    """To be told at once."""
    archived: bool = False
    """What the finding's RecordState is, or shall become."""
    step: int = 0
    """How often it was told."""
    told_ms: int = 0
    """When it was last told, wall clock."""
    created_ms: int = 0
    updated_ms: int = 0
    """``CreatedAt`` and ``UpdatedAt`` of the finding; 0: not told yet."""
    detail_bytes: int = 0
    """Room of the latest alert in the spool; 0: not kept."""
    name: str = ""
    """The alert's id (``SINGLE``), the notice's key (``NOTICE``)."""
    title: str = ""
    """Of a notice."""
    cluster: str = ""
    """The discovered cluster when it began: part of the Id, so it stays."""

    @property
    def untold(self) -> int:
        """Alerts the service does not know of. A notice is no alert."""
        return 0 if self.kind == NOTICE else self.count - self.told

    @property
    def waits(self) -> bool:
        """Whether there is something to tell."""
        return self.urgent or self.count > self.told


class Sighting(NamedTuple):
    """One alert, as far as its issue needs it."""

    record: Record
    level: int
    priority: str
    pod: str
    """``namespace/pod``, or nothing."""
    cluster: str = ""


class Claim(NamedTuple):
    """An issue on its way to the service: what is told is this state, whatever is counted meanwhile."""

    key: bytes
    issue: Issue
    since: float
    """When it began to wait, monotonic seconds."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Issue)
pack = _encoder.encode
unpack = _decoder.decode


def begun(sighting: Sighting, *, kind: int, generation: int, now_ms: int, name: str = "") -> Issue:
    """The issue of a first alert."""
    record = sighting.record
    return Issue(
        kind,
        generation,
        1,
        0,
        record.time_ns,
        record.time_ns,
        sighting.level,
        record.priority,
        sighting.priority[:PRIORITY_LENGTH_MAX],
        (record.id,),
        (sighting.pod[:POD_LENGTH_MAX],) if sighting.pod else (),
        now_ms,
        detail_bytes=record.size_bytes,
        name=name,
        cluster=sighting.cluster,
    )


def counted(issue: Issue, sighting: Sighting, now_ms: int) -> Issue:
    """The issue with one more alert. A rise in severity or priority is to be told at once, and so is a return from the archive."""
    record = sighting.record
    pods, pod = issue.pods, sighting.pod[:POD_LENGTH_MAX]
    if pod and pod not in pods and len(pods) < PODS_MAX and sum(map(len, pods)) + len(pod) <= PODS_LENGTH_MAX:
        pods = (*pods, pod)
    higher = record.priority < issue.rank
    time_ns, first_ns, last_ns = record.time_ns, issue.first_ns, issue.last_ns
    level, before = sighting.level, issue.level
    return Issue(
        issue.kind,
        issue.generation,
        issue.count + 1,
        issue.told,
        min(first_ns, time_ns),
        max(last_ns, time_ns),
        max(before, level),
        record.priority if higher else issue.rank,
        sighting.priority[:PRIORITY_LENGTH_MAX] if higher else issue.priority,
        (*issue.ids[1 - IDS_MAX :], record.id),
        pods,
        max(issue.touched_ms, now_ms),
        issue.urgent or higher or level > before or issue.archived,
        False,
        issue.step,
        issue.told_ms,
        issue.created_ms,
        issue.updated_ms,
        record.size_bytes,
        issue.name,
        issue.title,
        issue.cluster,
    )


def identity(key: bytes, issue: Issue) -> str:
    """Last part of the finding's Id: the hash of the key, and of the generation where issues were forgotten before it began."""
    return (hashed([key.hex(), issue.generation]) if issue.generation else key).hex()
