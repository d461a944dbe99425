"""One round of delivery: the records under way, and what became of each. Pure bookkeeping, no I/O.

Invariant: a record has at most one outcome, and the cursor may move over the ``prefix`` of records that have one.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from forwarder.batch import Item
from forwarder.contract import Again, DeliveryError, Reject
from forwarder.record import UNPARSED, DeadLetter, Record

LIMITED_ATTEMPTS_MAX = 5
DETAIL_LENGTH_MAX = 1000
DELIVERED = "delivered"
"""An outcome that is no dead letter and not this is the reason why the sink does not take the record."""


class Tally(NamedTuple):
    """What a settled prefix adds to the counts."""

    delivered: int
    filtered: Counter[str]
    """By reason."""
    unparsed: int
    """Bodies nobody could read; ``forwarded`` of them were accepted."""
    forwarded: int
    dead: Counter[str]
    """By reason."""
    size_bytes: int
    truncated: int
    adjusted: int
    oldest_ns: int | None
    """When the oldest delivered record was received."""


class Round:
    """Records ``[start, start + len(records))`` of the spool, on their way to one sink."""

    def __init__(self, sink: str, start: int) -> None:
        self.sink = sink
        self.start = start
        self.records: list[Record] = []
        self.outcomes: dict[int, DeadLetter | str] = {}
        self.items: list[Item] = []
        self.accepted: dict[int, Item] = {}
        self.suspects: list[tuple[Item, DeliveryError]] = []
        """Refused alone for lack of permission: guilty only if others went through."""
        self.again: dict[int, Reject] = {}
        """Refused inside an accepted call, to be tried again."""
        self._attempts: Counter[int] = Counter()

    def prefix(self) -> int:
        """How many records from the start on are settled."""
        count = 0
        while count in self.outcomes:
            count += 1
        return count

    def letters(self, count: int) -> list[DeadLetter]:
        """Dead letters among the first ``count`` records."""
        outcomes = (self.outcomes[index] for index in range(count))
        return [outcome for outcome in outcomes if isinstance(outcome, DeadLetter)]

    def bury(self, index: int, reason: str, detail: str, at: float) -> None:
        """The record becomes a dead letter."""
        record = self.records[index]
        self.outcomes[index] = DeadLetter(
            sink=self.sink,
            id=record.id,
            reason=reason,
            # A service may send half a surrogate pair, which no database takes.
            detail=detail[:DETAIL_LENGTH_MAX].encode("utf-8", "replace").decode(),
            at=at,
            body=record.body,
        )

    def accept(self, batch: list[Item], rejects: dict[int, Reject], at: float) -> list[Item]:
        """Note what was accepted and buried; give back what is to be tried again."""
        again: list[Item] = []
        for position, item in enumerate(batch):
            reject = rejects.get(position)
            if reject is None:
                self.outcomes[item.index] = DELIVERED
                self.accepted[item.index] = item
                continue
            self._attempts[item.index] += 1
            tired = self._attempts[item.index] >= LIMITED_ATTEMPTS_MAX
            if reject.again is Again.NEVER or (reject.again is Again.LIMITED and tired):
                self.bury(item.index, reason=reject.reason, detail=reject.detail, at=at)
            else:
                self.again[item.index] = reject
                again.append(item)
        return again

    def judge(self, at: float) -> DeliveryError | None:
        """Suspects are culprits if anything else went through; otherwise the service refuses us: its error."""
        if not self.suspects:
            return None
        if not self.accepted:
            return self.suspects[0][1]
        for item, error in self.suspects:
            self.bury(item.index, "permission", str(error), at)
        return None

    def tally(self, count: int) -> Tally:
        """Counts of the first ``count`` records. An unparsable body is no alert."""
        delivered = unparsed = forwarded = 0
        filtered: Counter[str] = Counter()
        dead: Counter[str] = Counter()
        for index in range(count):
            outcome = self.outcomes[index]
            if self.records[index].kind == UNPARSED:
                unparsed += 1
                forwarded += outcome == DELIVERED
            elif isinstance(outcome, DeadLetter):
                dead[outcome.reason] += 1
            elif outcome == DELIVERED:
                delivered += 1
            else:
                filtered[outcome] += 1
        sent = [item for index, item in self.accepted.items() if index < count]
        received = [self.records[item.index].received_ns for item in sent]
        return Tally(
            delivered,
            filtered,
            unparsed,
            forwarded,
            dead,
            sum([item.size_bytes for item in sent]),
            sum([item.truncated for item in sent]),
            sum([item.adjusted for item in sent]),
            min(received) if received else None,
        )
