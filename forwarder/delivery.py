"""Delivery: one worker per sink takes records from its cursor to the service, and settles every one of them.

A record is settled when the service accepted it, the configuration filters it, or it is a dead letter with a
reason. The cursor moves over settled records only, in the same transaction as their dead letters.

What a failure means is decided by the closed taxonomy below, never by a sink:

=============  ==========================================================================================
Transient      throttle, 5xx, network, timeout, credentials: the same batch again, for ever, with back-off
TooLarge       the call was too big: split in two
Permanent      the service refuses the call: bisect until the culprit is alone, which becomes a dead letter
Permission     refused for lack of permission, perhaps because of one record: bisect; a lone record is a
               dead letter only if another one went through, else the sink is blocked
Blocked        the service is off or forbidden: nothing is given up; pause, probe, go on
Reject         one record of an accepted call was refused, by index
=============  ==========================================================================================

On a crash, what was accepted but not yet settled is sent again: at-least-once, at most one round of batches.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import structlog

from forwarder.batch import Item, pack
from forwarder.contract import DeliveryError, Reject, Sink
from forwarder.delivery_admission import Admission
from forwarder.delivery_arrivals import batch_waits
from forwarder.delivery_calls import Courier, DeliverySettings, Stop
from forwarder.delivery_round import Round
from forwarder.delivery_status import Status
from forwarder.metrics import Metrics
from forwarder.record import DeadLetter, Record
from forwarder.rules import RuleBook
from forwarder.spool import Spool

SLICE_RECORDS_MAX = 128
ROUND_BYTES_MAX = 8 << 20
"""Memory one round may hold, filtered records included."""

log = structlog.get_logger("delivery")


class Worker:
    """Moves one sink's cursor."""

    def __init__(
        self,
        sink: Sink,
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
        self._complete = complete
        self._admission = Admission(sink, rules)
        self._spool = spool
        self._metrics = metrics
        self._now = now
        self._courier = Courier(sink, settings=settings, metrics=metrics, now=now, rng=rng)
        self._draining = self._courier.draining
        self._progress = self._courier.progress
        self._cursor = 0
        self._ahead: dict[int, DeadLetter | str] = {}

    @property
    def name(self) -> str:
        return self.sink.name

    def status(self) -> Status:
        left = self._spool.pending(self.name) + self._spool.pending_unparsed(self.name)
        return self._progress.status(pending=left, oldest_secs=self._spool.oldest_secs(self.name))

    def publish(self) -> None:
        """Bring the gauges up to date (before a scrape)."""
        self._metrics.pending[self.name].set(self._spool.pending(self.name))
        self._metrics.pending_unparsed[self.name].set(self._spool.pending_unparsed(self.name))
        self._metrics.in_flight[self.name].set(self.sink.pace.in_flight)
        self._metrics.concurrency[self.name].set(int(self.sink.pace.limit))
        self._metrics.rate_limit[self.name].set(self.sink.pace.rate)

    def drain(self) -> None:
        """Deliver what waits without lingering; give up at the first failure or when cancelled."""
        self._draining.set()

    async def run(self) -> None:
        """Deliver until drained or cancelled; what was settled is on disk when this returns."""
        self._cursor = self._spool.cursors[self.name]
        self._progress.recover(self._spool.pending(self.name))
        try:
            await self._courier.open()
            while True:
                await self._wait_for_batch()
                if self._draining.is_set() and self._cursor >= self._spool.end:
                    return
                await self._round()
        except Stop:
            return
        finally:
            self._progress.enter("stopped")

    async def _wait_for_batch(self) -> None:
        limits = self.sink.limits
        await batch_waits(
            self._spool,
            self._cursor,
            wanted=min(limits.records_max, self._spool.typical_count(limits.bytes_max)),
            linger_secs=self.sink.linger_secs,
            draining=self._draining,
        )

    # ---- one round ----------------------------------------------------------------------------------

    async def _round(self) -> None:
        """Read, encode, deliver and settle up to ``concurrency`` batches."""
        current = await self._collect()
        batches = pack(current.items, self.sink.limits)
        tasks = [
            asyncio.ensure_future(self._courier.deliver(current, batch, self._encode)) for batch in batches
        ]
        blocked: DeliveryError | None = None
        try:
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, DeliveryError):
                    blocked = result
                elif isinstance(result, BaseException):
                    raise result
            blocked = blocked or current.judge(self._now())
        finally:
            for task in tasks:
                task.cancel()
            # Also when cancelled: what the service accepted is written down.
            await asyncio.shield(self._settle(current))
        if blocked is not None:
            await self._courier.pause(blocked)

    async def _collect(self) -> Round:
        """Read from the cursor on until the batches of one round are full or nothing is left."""
        limits, concurrency = self.sink.limits, max(1, int(self.sink.pace.limit))
        # Whole batches only, where there is one: what is left over fills the next one.
        whole = min(concurrency, (self._spool.end - self._cursor) // limits.records_max)
        count_max = limits.records_max * max(1, whole)
        bytes_max = min(limits.bytes_max * concurrency, ROUND_BYTES_MAX)
        current = Round(self.name, self._cursor)
        offset, size = self._cursor, 0
        while offset < self._spool.end and size < bytes_max and len(current.items) < count_max:
            chunk = await self._spool.read(
                offset, records_max=min(count_max, SLICE_RECORDS_MAX), bytes_max=bytes_max - size
            )
            if chunk.broken or chunk.start > offset:
                if not current.records:
                    lost = chunk.start + chunk.broken - offset
                    await self._skip(offset + lost, lost=lost, unparsed=chunk.unparsed)
                break
            for record in chunk.records:
                if len(current.items) >= count_max:
                    return current
                size += self._take(current, record)
            offset = chunk.end
            await asyncio.sleep(0)  # encoding a round at once would hold up the receiver
        return current

    def _take(self, current: Round, record: Record) -> int:
        """Decide on one record: filtered, unmappable, settled before, or an item. Returns its memory."""
        if record.unresolved:
            record = self._complete(record)
        index = len(current.records)
        current.records.append(record)
        before = self._ahead.get(current.start + index)
        if before is not None:
            current.outcomes[index] = before
        elif reason := self._admission.refusal(record):
            current.outcomes[index] = reason
        else:
            item = self._encode(current, index)
            if item is not None:
                current.items.append(item)
                return max(item.size_bytes, record.size_bytes)
        return record.size_bytes

    def _encode(self, current: Round, index: int) -> Item | None:
        record = current.records[index]
        try:
            return self.sink.encode(record, index)
        except Reject as reject:
            current.bury(index, reject.reason, reject.detail, self._now())
        except Exception as error:
            # A mapping must never stop its sink: the alert is kept with the reason, the rest goes on.
            log.exception("alert cannot be mapped, kept as a dead letter", sink=self.name, id=record.id)
            current.bury(index, "unmappable", f"{type(error).__name__}: {error}", self._now())
        return None

    # ---- settling and waiting -----------------------------------------------------------------------

    async def _settle(self, current: Round) -> None:
        """Write the cursor and dead letters of the settled prefix; remember what is settled beyond it."""
        count = current.prefix()
        for index, outcome in current.outcomes.items():
            if index >= count:
                self._ahead[current.start + index] = outcome
        if not count:
            return
        offset = current.start + count
        tally = current.tally(count)
        await self._spool.settle(self.name, offset, current.letters(count), unparsed=tally.unparsed)
        self._cursor = offset
        for index in range(count):
            self._ahead.pop(current.start + index, None)
        self._progress.count(tally, self._now())

    async def _skip(self, offset: int, *, lost: int, unparsed: int) -> None:
        """Pass over what a broken block held; the spool has set its bytes aside."""
        if lost:
            self._progress.bury("broken_block", lost - unparsed)
        await self._spool.settle(self.name, offset, unparsed=unparsed)
        self._cursor = offset
