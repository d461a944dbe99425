"""Delivery of findings: alerts are counted into issues, and issues are told to the service, the most severe first.

Two tasks share the table (``issues``). Counting moves the cursor, whether the service is well or not, so a flood becomes a number and not a
backlog. Telling claims what is due when it is its turn to call, not before: what came a moment ago and is more severe goes first. Nothing is
tried again as it was: after a failure the choice is made anew.

Order of writing, which makes counts exact and ``UpdatedAt`` grow over kill -9: what was counted, with the cursor; the claim with its new
``UpdatedAt``; then the call; then what it told. Each is submitted to the spool in the turn of the loop that changed the table.

On drain everything counted is told without waiting for its time: the volume may not outlive the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from forwarder.contract import FindingSink
from forwarder.delivery_admission import Admission
from forwarder.delivery_arrivals import batch_waits
from forwarder.delivery_calls import Courier, DeliverySettings, Stop
from forwarder.delivery_counting import SLICE_RECORDS_MAX, Counting, Slice
from forwarder.delivery_status import Status
from forwarder.delivery_telling import WAIT_SECS_MAX, Telling
from forwarder.facts import facts_of
from forwarder.issue import LABELS, NOTICE, Issue
from forwarder.issue_key import INTERNAL, hashed, key_of
from forwarder.issues import Issues
from forwarder.issues_due import Clock
from forwarder.metrics import Metrics
from forwarder.notice import Notice
from forwarder.notice_overflow import overflow
from forwarder.record import DeadLetter, Record
from forwarder.rules import RuleBook
from forwarder.spool import Spool

ISSUE_BYTES = 768
"""Of the volume, for an issue of ten pods: roughly and seldom too little."""
ISSUES_SHARE, DETAILS_SHARE = 16, 16
"""Of the spool's quota, beside it: its volume has a quarter more."""
CHUNK_BYTES_MAX = 1 << 20
HOUSEKEEPING_SECS = 10.0

log = structlog.get_logger("delivery")


class FindingsWorker:
    """Moves the cursor of a sink for findings, and tells what it counted."""

    def __init__(
        self,
        sink: FindingSink,
        *,
        spool: Spool,
        settings: DeliverySettings,
        metrics: Metrics,
        now: Callable[[], float],
        rng: random.Random,
        complete: Callable[[Record], Record] = lambda record: record,
        rules: RuleBook | None = None,
    ) -> None:
        """``complete`` looks once more for what enrichment had not found at ingest, from memory."""
        self.sink = sink
        self._spool = spool
        self._metrics = metrics
        self._now = now
        self._complete = complete
        self._rules = rules
        self._admission = Admission(sink, rules)
        self._courier = Courier(sink, settings=settings, metrics=metrics, now=now, rng=rng)
        self._progress = self._courier.progress
        self._issues: Issues | None = None
        self._cursor = 0
        self._unparsed_ahead: deque[tuple[int, int]] = deque()
        """Unparsable bodies passed, by the cursor behind them, until that is on disk."""
        self._loaded = False

    @property
    def name(self) -> str:
        return self.sink.name

    def drain(self) -> None:
        """Count and tell what waits without lingering; give up at the first failure or when cancelled."""
        self._courier.draining.set()

    def status(self) -> Status:
        left, unparsed = self._left()
        left += unparsed
        issues = self._issues
        if issues is None:
            return self._progress.status(pending=left, oldest_secs=self._oldest_secs())
        return self._progress.status(
            pending=left + issues.due_alerts,
            oldest_secs=self._oldest_secs(),
            aggregating=issues.untold - issues.due_alerts,
        )

    def publish(self) -> None:
        """Bring the gauges up to date (before a scrape)."""
        metrics, name, issues = self._metrics, self.name, self._issues
        pending, unparsed = self._left()
        metrics.pending_unparsed[name].set(unparsed)
        metrics.in_flight[name].set(self.sink.pace.in_flight)
        metrics.concurrency[name].set(int(self.sink.pace.limit))
        metrics.rate_limit[name].set(self.sink.pace.rate)
        if issues is not None:
            pending += issues.due_alerts
            metrics.aggregating[name].set(issues.untold - issues.due_alerts)
            metrics.issues.set(len(issues))
            metrics.issues_max.set(issues.entries_max)
            metrics.spool_oldest[name].set(self._oldest_secs())
        metrics.pending[name].set(pending)

    def _oldest_secs(self) -> float:
        """Of what is not counted yet, or of what is counted and due."""
        waited = self._spool.oldest_secs(self.name)
        return waited if self._issues is None else max(waited, self._issues.oldest_secs())

    def _left(self) -> tuple[int, int]:
        """Alerts and unparsable bodies not counted yet. What is counted and not yet on disk is in the numbers of issues already."""
        pending, unparsed = self._spool.pending(self.name), self._spool.pending_unparsed(self.name)
        if self._issues is None:
            return pending, unparsed
        written = self._spool.cursors[self.name]
        while self._unparsed_ahead and self._unparsed_ahead[0][0] <= written:
            self._unparsed_ahead.popleft()
        ahead = sum(count for _, count in self._unparsed_ahead)
        return pending - (self._cursor - written - ahead), unparsed - ahead

    def told(self) -> set[str]:
        """Keys of the notices whose finding is active."""
        return set(self._issues.notices()) if self._issues is not None else set()

    async def tell(self, notice: Notice) -> None:
        """Take a notice: when this returns it is on disk, and will be told."""
        issues = self._issues
        if issues is None or (not notice.active and notice.key not in self.told()):
            return
        self._tell_notice(issues, notice, urgent=True)
        await self._submit()

    async def load(self) -> None:
        """Take over what the spool has, so that everything it owes is known before anything runs."""
        again = self._issues is not None
        if again:
            await self._spool.settle(self.name, None)  # whatever the run before this one had submitted
        self._cursor = self._spool.cursors[self.name]
        self._unparsed_ahead.clear()
        issues = self._table()
        fresh = not again and self.name in self._spool.fresh
        broken = issues.load(await self._spool.issues(), fresh=fresh)
        if broken:
            self._metrics.spool_broken.inc(broken)
            log.error("issues cannot be read, their findings end here", sink=self.name, issues=broken)
        self._issues = issues
        self._overflowed = 0
        if issues.has_changes():
            # Not waited for: a volume that takes nothing now must not keep the process from starting.
            self._loading = self._submit()
        self._loaded = True
        self._progress.recover(self._spool.pending(self.name) + issues.untold)

    async def run(self) -> None:
        """Deliver until drained or cancelled; what was counted and told is on disk when this returns."""
        if not self._loaded:
            await self.load()
        tasks = [
            asyncio.create_task(work(), name=f"{work.__qualname__} {self.name}")
            for work in (self._count_all, self._telling.run, self._housekeep)
        ]
        try:
            await self._until_told(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._loaded = False  # whoever runs this again begins with what is on disk
            self._progress.enter("stopped")

    @staticmethod
    async def _until_told(tasks: list[asyncio.Task[None]]) -> None:
        """Until telling is over, or one of them fails."""
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                try:
                    task.result()
                except Stop:
                    return
            if tasks[1] in done:
                return

    def _table(self) -> Issues:
        loop = asyncio.get_running_loop()
        quota = self._spool.bytes_max
        issues = Issues(
            self.sink.aggregation,
            Clock(lambda: int(self._now() * 1000), loop.time),
            aging_secs=self.sink.aging_secs,
            entries_max=max(16, quota // ISSUES_SHARE // ISSUE_BYTES),
            table_bytes_max=quota // ISSUES_SHARE,
            details_bytes_max=quota // DETAILS_SHARE,
        )
        if issues.entries_max < self.sink.aggregation.entries_max:
            log.warning("the spool's quota has no room for more issues", issues_max=issues.entries_max)
        self._counting = Counting(
            self.name,
            issues,
            admission=self._admission,
            severities=self.sink.severities,
            key=key_of(self.sink.aggregation.key) if self.sink.aggregation.enabled else None,
            complete=self._complete,
            now=self._now,
        )
        self._telling = Telling(
            self.sink,
            issues,
            spool=self._spool,
            courier=self._courier,
            submit=self._submit,
            rules=self._rules,
            metrics=self._metrics,
            now=self._now,
        )
        return issues

    def _submit(
        self, offset: int | None = None, dead: Sequence[DeadLetter] = (), unparsed: int = 0
    ) -> asyncio.Future[None]:
        """Hand what changed to the spool, in the turn of the loop that changed it."""
        if offset is not None and unparsed:
            self._unparsed_ahead.append((offset, unparsed))
        changes = self._counted().changes()
        return self._spool.settle(self.name, offset, dead, unparsed=unparsed, issues=changes)

    def _counted(self) -> Issues:
        if self._issues is None:
            raise RuntimeError("not running")
        return self._issues

    # ---- counting -----------------------------------------------------------------------------------

    async def _count_all(self) -> None:
        issues = self._counted()
        draining = self._courier.draining
        while True:
            await batch_waits(
                self._spool,
                self._cursor,
                wanted=SLICE_RECORDS_MAX,
                linger_secs=self.sink.linger_secs,
                draining=draining,
            )
            if draining.is_set() and self._cursor >= self._spool.end:
                break
            await self._count_some(issues)
        self._telling.counted_all = True
        issues.finish()
        self._telling.wake.set()

    async def _count_some(self, issues: Issues) -> None:
        """One chunk of the spool, slice by slice."""
        chunk = await self._spool.read(self._cursor, records_max=SLICE_RECORDS_MAX, bytes_max=CHUNK_BYTES_MAX)
        if chunk.broken or chunk.start > self._cursor:
            lost = chunk.start + chunk.broken - self._cursor
            self._progress.bury("broken_block", lost - chunk.unparsed)
            self._cursor += lost
            await self._submit(self._cursor, unparsed=chunk.unparsed)
            return
        written: asyncio.Future[None] | None = None
        rest = chunk.records
        while rest:
            self._telling.room.clear()
            done = self._counting.take(rest[:SLICE_RECORDS_MAX])
            self._report_overflow(issues)
            rest = rest[done.taken :]
            if done.taken:
                self._cursor += done.taken
                written = self._submit(self._cursor, done.letters, done.unparsed)
                self._telling.wake.set()
                self._note(done)
                await asyncio.sleep(0)  # the receiver's turn
            if rest and done.taken < SLICE_RECORDS_MAX:
                self._telling.wake.set()
                await self._some_room()
        if written is not None:
            await written

    async def _some_room(self) -> None:
        """Until something was told; on drain that goes on, or the run ends."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._telling.room.wait(), WAIT_SECS_MAX)

    def _note(self, done: Slice) -> None:
        for reason, count in done.filtered.items():
            self._progress.filter(reason, count)
        if done.letters:
            self._progress.bury("unmappable", len(done.letters))
        self._metrics.aggregated.inc(done.counted)

    def _report_overflow(self, issues: Issues) -> None:
        """Say that the table is too small for what comes, in metrics and in a finding."""
        more = issues.evicted - self._overflowed
        if more:
            self._overflowed = issues.evicted
            self._metrics.issues_evicted.inc(more)
            self._tell_notice(issues, overflow(self._spool.id, issues.entries_max, self._now()), more=more)

    def _tell_notice(self, issues: Issues, notice: Notice, *, urgent: bool = False, more: int = 1) -> None:
        key = hashed([f"{INTERNAL}notice", notice.key])
        known = issues.notice(key)
        record = notice.record
        issue = Issue(
            NOTICE,
            known.generation if known else issues.generation,
            (known.count if known else 0) + more,
            0,
            record.time_ns,
            record.time_ns,
            LABELS.index(notice.severity),
            record.priority,
            "",
            (),
            (),
            int(self._now() * 1000),
            urgent=urgent or known is None,
            archived=not notice.active,
            name=notice.key,
            title=notice.title,
            cluster=facts_of(record).cluster,
        )
        issues.tell(key, issue, record)
        self._telling.wake.set()

    async def _housekeep(self) -> None:
        issues = self._counted()
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECS)
            issues.housekeep()
            if issues.has_changes():
                self._telling.wake.set()
                await self._submit()
