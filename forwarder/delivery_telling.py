"""Telling: issues that are due become findings of a call, the most severe first.

What is told is chosen when it is this call's turn, not before. After a failure nothing is tried again as it was: what was claimed goes back
to its place, and the choice is made anew.

A claim's ``UpdatedAt`` is on disk before the call, what the call told is written after it. A crash in between tells the same again, later.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import structlog
from msgspec.structs import replace

from forwarder.asff_context import Occurrences
from forwarder.batch import Item, pack
from forwarder.contract import (
    Again,
    Blocked,
    DeliveryError,
    FindingSink,
    Permanent,
    Permission,
    Reject,
    TooLarge,
)
from forwarder.delivery_calls import BACKOFF_BASE_SECS, BACKOFF_MAX_SECS, Courier
from forwarder.delivery_round import DELIVERED, LIMITED_ATTEMPTS_MAX, Round, Tally
from forwarder.facts import facts_of
from forwarder.issue import GROUP, LABELS, NOTICE, SINGLE, Claim, Issue, identity
from forwarder.issues import Issues
from forwarder.metrics import Metrics
from forwarder.record import ALERT, DeadLetter, Record
from forwarder.rules import NO_RULE, RuleBook, Verdict
from forwarder.spool import Spool

WAIT_SECS_MIN, WAIT_SECS_MAX = 0.001, 60.0
SUSPICIONS_MAX = 2

log = structlog.get_logger("delivery")


class Submit(Protocol):
    """Writes down what changed in the table."""

    def __call__(
        self, offset: int | None = None, dead: Sequence[DeadLetter] = (), unparsed: int = 0
    ) -> asyncio.Future[None]: ...


class Telling:
    """Makes the calls of a sink for findings."""

    def __init__(
        self,
        sink: FindingSink,
        issues: Issues,
        *,
        spool: Spool,
        courier: Courier,
        submit: Submit,
        rules: RuleBook | None,
        metrics: Metrics,
        now: Callable[[], float],
    ) -> None:
        self._sink = sink
        self._issues = issues
        self._spool = spool
        self._courier = courier
        self._submit = submit
        self._rules = rules
        self._metrics = metrics
        self._now = now
        self._refusals: Counter[bytes] = Counter()
        """Of the kind that is given up in the end."""
        self._put_back: Counter[bytes] = Counter()
        self._unclaimed = 0
        self.wake = asyncio.Event()
        """Set by whoever changes the table."""
        self.room = asyncio.Event()
        """Set when something was told."""
        self.counted_all = False
        """Draining, and nothing more will be counted: end when all is told."""

    async def run(self) -> None:
        """Until all is told on drain. Raises ``Stop`` where that fails."""
        issues = self._issues
        await self._courier.open()
        loop = asyncio.get_running_loop()
        delay = BACKOFF_BASE_SECS
        waited_at = -1.0
        """When the last wait began: failures of calls from before it are failures of the same moment."""
        under_way: dict[asyncio.Task[DeliveryError | None], float] = {}
        try:
            while not (self.counted_all and not issues.due and not under_way):
                while self._has_turn(len(under_way)):
                    self._unclaimed += 1
                    under_way[asyncio.create_task(self._tell_some())] = loop.time()
                done = await self._something(under_way)
                ended = [(under_way.pop(task), task.result()) for task in done]
                errors = [error for began, error in ended if error is not None and began > waited_at]
                if not errors:
                    delay = BACKOFF_BASE_SECS if any(error is None for _, error in ended) else delay
                    continue
                waited_at = loop.time()
                blocked = next((error for error in errors if isinstance(error, Blocked | Permission)), None)
                if blocked is not None:
                    await self._courier.pause(blocked)
                else:
                    delay = await self._courier.back_off(errors[0], delay)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def _has_turn(self, under_way: int) -> bool:
        """Whether one more call is wanted and allowed."""
        wanted = self._issues.due > self._unclaimed * self._sink.limits.records_max
        return wanted and under_way < max(1, int(self._sink.pace.limit))

    async def _something(
        self, under_way: Collection[asyncio.Task[DeliveryError | None]]
    ) -> set[asyncio.Task[DeliveryError | None]]:
        """Wait until a call ends, an issue is due, or counting has news."""
        issues, loop = self._issues, asyncio.get_running_loop()
        at = issues.next_at()
        secs = WAIT_SECS_MAX if at is None or issues.due else max(WAIT_SECS_MIN, at - loop.time())
        woken = asyncio.ensure_future(self.wake.wait())
        try:
            done, _ = await asyncio.wait(
                {woken, *under_way}, timeout=min(secs, WAIT_SECS_MAX), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            woken.cancel()
        self.wake.clear()
        return {task for task in done if task in under_way}  # type: ignore[misc]

    async def _tell_some(self) -> DeliveryError | None:
        """Claim what is due, make one call, write down what it told. Returns a failure that asks for patience."""
        claims: list[Claim] = []
        current = Round(self._sink.name, 0)
        waiting = True
        try:
            async with self._sink.pace.slot():
                claims = self._issues.claim(self._sink.limits.records_max)
                self._unclaimed -= 1
                waiting = False
                batch = await self._prepare(claims, current) if claims else []
                refused = await self._attempt(current, batch) if batch else None
            if refused is not None:
                await self._courier.bisect(current, batch, refused, None)
            return self._suspected(current)
        except DeliveryError as failure:
            return failure
        finally:
            self._unclaimed -= waiting
            # Also when cancelled what the service accepted is handed to the spool, which waits for it when it is closed.
            written = self._conclude(claims, current)
            if written is not None and not _is_cancelled():
                await written

    @staticmethod
    def _suspected(current: Round) -> DeliveryError | None:
        """Findings refused alone for lack of permission: our own lack where nothing went through, else theirs, perhaps.

        The permission may have come in the midst of the round, so they are given up the second time only.
        """
        if current.suspects and not current.accepted:
            return current.suspects[0][1]
        for item, error in current.suspects:
            current.again[item.index] = Reject("permission", str(error), Again.LIMITED)
        return None

    async def _attempt(self, current: Round, batch: list[Item]) -> DeliveryError | None:
        """One call; a refusal of the call as a whole, or nothing. Raises what asks for patience."""
        try:
            rejects = await self._courier.attempt(batch)
        except (TooLarge, Permanent, Permission) as refusal:
            return refusal
        self._courier.accept(current, batch, rejects)
        return None

    async def _prepare(self, claims: list[Claim], current: Round) -> list[Item]:
        """Make the claims durable, and one call's findings of them."""
        await self._submit()
        details = await self._spool.issue_details([claim.key for claim in claims])
        for index, claim in enumerate(claims):
            record = details.get(claim.key)
            current.records.append(record or _lost(claim.issue))
            if record is None:
                current.bury(index, "broken_block", "the issue's latest alert cannot be read", self._now())
                continue
            verdict = self._verdict(claim.issue, record)
            reason = verdict.keeps_out(
                self._sink.name, claim.issue.rank, self._sink.minimum_rank, findings=True
            )
            if reason and claim.issue.kind != NOTICE and not claim.issue.archived:
                # A rule of this moment: nothing more is told of what was counted before it.
                current.outcomes[index] = reason
                continue
            item = self._encode(current, index, self._occurrences(claim, record, verdict))
            if item is not None:
                current.items.append(item)
        batches = pack(current.items, self._sink.limits)
        return batches[0] if batches else []

    def _verdict(self, issue: Issue, record: Record) -> Verdict:
        if self._rules is None or not self._rules.rules or issue.kind == NOTICE:
            return NO_RULE
        return self._rules.rules.decide(facts_of(record), self._now())

    def _occurrences(self, claim: Claim, record: Record, verdict: Verdict) -> Occurrences:
        key, issue, _ = claim
        single = issue.kind == SINGLE
        received_ms = record.received_ns // 1_000_000
        return Occurrences(
            identity=self._identity(key, issue),
            first_ns=issue.first_ns,
            last_ns=issue.last_ns,
            created_ms=received_ms if single else issue.created_ms,
            updated_ms=received_ms if single else issue.updated_ms,
            severity=LABELS[issue.level],
            priority=issue.priority,
            alerts=0 if single else issue.count,
            alert_ids=issue.ids,
            pods=issue.pods,
            archived=issue.archived,
            title=issue.title,
            types=verdict.finding_types,
            remediation=verdict.remediation,
            cluster=None if single else issue.cluster,
        )

    def _identity(self, key: bytes, issue: Issue) -> str:
        """End of the finding's Id. A sender's uuid with a slash could be the Id of another finding."""
        if issue.kind == GROUP:
            return f"{self._spool.id}/{identity(key, issue)}"
        return key.hex() if issue.kind == SINGLE and "/" in issue.name else issue.name

    def _encode(self, current: Round, index: int, seen: Occurrences) -> Item | None:
        record = current.records[index]
        try:
            return self._sink.encode(record, index, seen)
        except Reject as reject:
            current.bury(index, reject.reason, reject.detail, self._now())
        except Exception as error:
            # A mapping must never stop its sink: the alert is kept with the reason, the rest goes on.
            log.exception("alert cannot be mapped, kept as a dead letter", sink=self._sink.name, id=record.id)
            current.bury(index, "unmappable", f"{type(error).__name__}: {error}", self._now())
        return None

    # ---- what became of it --------------------------------------------------------------------------

    def _conclude(self, claims: list[Claim], current: Round) -> asyncio.Future[None] | None:
        """Write down what was told and what is buried; the rest goes back."""
        if not claims:
            return None
        letters: list[DeadLetter] = []
        dead: Counter[str] = Counter()
        filtered: Counter[str] = Counter()
        delivered = 0
        for index, claim in enumerate(claims):
            outcome = current.outcomes.get(index) or self._tired(claim, index, current)
            if outcome is None:
                continue
            self._refusals.pop(claim.key, None)
            self._put_back.pop(claim.key, None)
            sent = outcome == DELIVERED or isinstance(outcome, DeadLetter)
            alerts = self._issues.settle(claim, sent=sent)
            if outcome == DELIVERED:
                delivered += alerts
                self._metrics.finding_updates[_reason(claim.issue)].inc()
            elif isinstance(outcome, DeadLetter):
                dead[outcome.reason] += alerts
                letters.append(replace(outcome, detail=f"{outcome.detail} ({alerts} alerts)"))
            else:
                filtered[outcome] += alerts
        self.room.set()
        self.wake.set()
        accepted = current.accepted.values()
        loop_now, now_ns = asyncio.get_running_loop().time(), int(self._now() * 1e9)
        received = [
            min(current.records[item.index].received_ns, now_ns - int((loop_now - claim.since) * 1e9))
            for item in accepted
            if not (claim := claims[item.index]).issue.step
        ]
        size_bytes = sum([item.size_bytes for item in accepted])
        tally = Tally(delivered, filtered, 0, 0, dead, size_bytes, 0, 0, min(received) if received else None)
        self._courier.progress.count(tally, self._now())
        return self._submit(None, letters)

    def _tired(self, claim: Claim, index: int, current: Round) -> DeadLetter | str | None:
        """An undecided claim goes back, unless the service refused it in this way too often."""
        key, reject = claim.key, current.again.get(index)
        if reject is None or reject.again is Again.BLOCKED:
            self._issues.put_back(claim)
            return None
        self._put_back[key] += 1
        self._refusals[key] += reject.again is Again.LIMITED
        attempts_max = SUSPICIONS_MAX if reject.reason == "permission" else LIMITED_ATTEMPTS_MAX
        if reject.again is Again.LIMITED and self._refusals[key] >= attempts_max:
            current.bury(index, reject.reason, reject.detail, self._now())
            return current.outcomes[index]
        self._issues.put_back(
            claim, min(BACKOFF_MAX_SECS, BACKOFF_BASE_SECS * 2 ** min(self._put_back[key], 10))
        )
        return None


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _reason(issue: Issue) -> str:
    """Why it was told, one of ``metrics.FINDING_UPDATES``."""
    if issue.kind == NOTICE:
        return "notice"
    if not issue.step:
        return "first"
    if issue.archived:
        return "archive"
    return "priority" if issue.urgent else "count"


def _lost(issue: Issue) -> Record:
    """Stands for an alert that cannot be read, in its dead letter."""
    identity = issue.ids[-1] if issue.ids else issue.name
    return Record(ALERT, identity, issue.rank, issue.last_ns, issue.last_ns, internal=False, body=b"{}")
