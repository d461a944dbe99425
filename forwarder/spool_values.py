"""What the spool's halves hand each other: between the event loop (``spool``) and the writer's thread (``spool_store``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from forwarder.record import DeadLetter, Record


class IssueRow(NamedTuple):
    """One issue as it is written: see ``issue``."""

    key: bytes
    touched_ms: int
    """When an alert was last counted: the order in which issues are forgotten."""
    state: bytes


class IssueChanges(NamedTuple):
    """Issues that changed, to be written in one transaction, with the cursor where alerts were counted."""

    rows: Sequence[IssueRow] = ()
    details: Sequence[tuple[bytes, Record]] = ()
    """The latest alert of an issue whose finding still has to be told."""
    details_removed: Sequence[bytes] = ()
    removed: Sequence[bytes] = ()
    generation: int | None = None


class StoredIssues(NamedTuple):
    """All issues, the one longest untouched first."""

    rows: Sequence[IssueRow]
    generation: int
    broken: Sequence[bytes] = ()
    """Keys of those that could not be read."""


class Batch(NamedTuple):
    """What one transaction carries."""

    records: list[Record]
    cursors: dict[str, int]
    dead: list[DeadLetter]
    compress: bool = True
    issues: Sequence[tuple[str, IssueChanges]] = ()
    """By sink."""


class Written(NamedTuple):
    """What a transaction did. ``error`` is set where the records (not the cursors) did not make it."""

    first: int
    stored_bytes: int
    sync_secs: float
    error: Exception | None
    unsettled: frozenset[str] = frozenset()
    """Sinks whose cursor, dead letters and issues are not on disk."""


class Chunk(NamedTuple):
    """Records ``[start, end)`` as read back. ``broken`` of them, alone in their chunk, are unreadable."""

    start: int
    end: int
    records: list[Record]
    broken: int
    unparsed: int = 0
    """Of the broken ones, bodies nobody could read."""


class Housekeeping(NamedTuple):
    """What a round of removal found and freed."""

    freed_bytes: int
    freed_records: int
    oldest: dict[str, float]
    """Creation time of the first unsettled block, per sink; absent when nothing waits."""
    ballast: bool
    dead_removed: int
    dead: dict[str, int]
    """Dead letters by sink, where some were removed."""


class State(NamedTuple):
    """What is on disk at start, and the quota that fits the volume."""

    bytes_max: int
    end: int
    used_bytes: int
    records: int
    cursors: dict[str, int]
    dead: dict[str, int]
    unparsed: dict[str, int]
    """Unparsable bodies among what waits, per sink."""
    quarantined: Path | None
    fresh: frozenset[str]
    """Sinks that begin at the present: what was counted for them before is not waited for any more."""
    id: str
    """Random, made with the database: what is counted here is counted nowhere else."""
