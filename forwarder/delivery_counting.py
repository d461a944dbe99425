"""Counting: alerts of the spool into issues, each exactly once.

A slice of records is counted without letting anything else run, and what that changed goes into one transaction with the cursor. A crash
before it leaves both as they were, a crash after it has both: the count is exact although delivery is at-least-once.

Where there is no room for another issue, counting waits until something is told; the alerts stay in the spool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import structlog
from msgspec.structs import replace

from forwarder.delivery_admission import Admission, Admitted
from forwarder.delivery_round import DETAIL_LENGTH_MAX
from forwarder.facts import Facts
from forwarder.issue import LEVELS, Sighting
from forwarder.issue_key import INTERNAL, hashed
from forwarder.issues import Issues
from forwarder.record import UNPARSED, DeadLetter, Record
from forwarder.shorten import shortened

SLICE_RECORDS_MAX = 128
DETAIL_BYTES_MAX = 64 << 10
"""Of a latest alert's body; a longer one is shortened, since a finding shows less of it."""

log = structlog.get_logger("delivery")


class Slice(NamedTuple):
    """What became of the first records of a slice."""

    taken: int
    counted: int
    filtered: Counter[str]
    unparsed: int
    letters: list[DeadLetter]


class Counting:
    """Takes records into issues."""

    def __init__(
        self,
        sink: str,
        issues: Issues,
        *,
        admission: Admission,
        severities: tuple[str, ...],
        key: Callable[[Facts], bytes] | None,
        complete: Callable[[Record], Record],
        now: Callable[[], float],
    ) -> None:
        """``key`` is None where every alert has a finding of its own."""
        self._sink = sink
        self._issues = issues
        self._admission = admission
        self._severities = severities
        self._key = key
        self._complete = complete
        self._now = now
        self._refused: tuple[Record, Record, Admitted] | None = None
        """The record that found no room, as stored and as completed, and what was seen of it."""

    def take(self, records: list[Record]) -> Slice:
        """Count records until there is no room. Synchronous: whoever calls this submits the changes before anything else runs."""
        filtered: Counter[str] = Counter()
        letters: list[DeadLetter] = []
        taken = counted = unparsed = 0
        for record in records:
            if not self._issues.admits():
                break
            try:
                reason = self._take_one(record)
            except Exception as error:
                # Reading an alert must never stop its sink: it is kept with the reason, the rest goes on.
                log.exception("alert cannot be counted, kept as a dead letter", sink=self._sink, id=record.id)
                letters.append(self._letter(record, error))
                taken += 1
                continue
            if reason is None:
                break
            taken += 1
            unparsed += record.kind == UNPARSED
            if not reason:
                counted += 1
            elif record.kind != UNPARSED:
                filtered[reason] += 1
        return Slice(taken, counted, filtered, unparsed, letters)

    def _take_one(self, record: Record) -> str | None:
        """Nothing where it was counted, the reason where the sink does not take it, None where there is no room."""
        if self._refused is not None and self._refused[0] is record:
            _, record, looked = self._refused  # found no room the last time: rules count an alert once
        else:
            first = record
            if record.unresolved:
                record = self._complete(record)
            admitted = self._admission.look(record)
            if admitted is None:
                return "not_a_finding"
            looked = admitted
            self._refused = (first, record, looked)
        done = bool(looked.reason) or self._count(record, looked)
        if done:
            self._refused = None
        return looked.reason if done else None

    def _count(self, record: Record, looked: Admitted) -> bool:
        facts = looked.facts
        sighting = Sighting(
            _detail(record),
            LEVELS[looked.verdict.severity or self._severities[record.priority]],
            facts.priority,
            f"{facts.namespace}/{facts.pod}" if facts.pod else "",
            facts.cluster,
        )
        if self._key is None:
            return self._issues.count(hashed([f"{INTERNAL}alert", record.id]), sighting, single=record.id)
        return self._issues.count(self._key(facts), sighting)

    def _letter(self, record: Record, error: Exception) -> DeadLetter:
        return DeadLetter(
            sink=self._sink,
            id=record.id,
            reason="unmappable",
            detail=f"{type(error).__name__}: {error}"[:DETAIL_LENGTH_MAX].encode("utf-8", "replace").decode(),
            at=self._now(),
            body=record.body,
        )


def _detail(record: Record) -> Record:
    if len(record.body) <= DETAIL_BYTES_MAX:
        return record
    return replace(record, body=shortened(record, DETAIL_BYTES_MAX, lambda body, _: body))
