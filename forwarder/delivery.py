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
from typing import Annotated, Any

import msgspec
import structlog

from forwarder.batch import Item, pack
from forwarder.config import setting
from forwarder.contract import (
    Again,
    Blocked,
    DeliveryError,
    Permanent,
    Permission,
    Reject,
    Sink,
    TooLarge,
    Transient,
)
from forwarder.delivery_round import DELIVERED, FILTERED, Round
from forwarder.delivery_status import Progress, Status
from forwarder.metrics import Metrics
from forwarder.record import ALERT, UNPARSED, DeadLetter, Record
from forwarder.spool import Spool

BACKOFF_BASE_SECS, BACKOFF_MAX_SECS = 0.5, 30.0
PROBE_SECS = 60.0
REFUSALS_IN_A_ROW_MAX = 20
"""So many call-level dead letters without one success look like a fault of ours: pause between them."""
SUSPECTS_MAX = 8
"""So many records of one round without permission: it is not the records."""
SLICE_RECORDS_MAX = 128
ROUND_BYTES_MAX = 8 << 20
"""Memory one round may hold, filtered records included."""

log = structlog.get_logger("delivery")


class DeliverySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings every sink shares."""

    call_secs_max: Annotated[float, setting("Longest wait for one call.", unit="seconds", gt=0, le=300)] = (
        30.0
    )
    drain_secs_max: Annotated[
        float,
        setting(
            "After SIGTERM, longest time to deliver what waits. The rest stays in the spool.",
            unit="seconds",
            ge=0,
            le=3600,
        ),
    ] = 25.0


class _Stop(Exception):  # noqa: N818
    """Draining: no new waits."""


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
    ) -> None:
        """``complete`` looks once more for what enrichment had not found at ingest, from memory."""
        self.sink = sink
        self._complete = complete
        self._spool = spool
        self._settings = settings
        self._metrics = metrics
        self._now = now
        self._rng = rng
        self._draining = asyncio.Event()
        self._cursor = 0
        self._ahead: dict[int, DeadLetter | str] = {}
        self._refusals_in_a_row = 0
        self._successes = 0
        self._progress = Progress(sink.name, metrics)

    @property
    def name(self) -> str:
        return self.sink.name

    def status(self) -> Status:
        left = self._spool.pending(self.name) + self._spool.pending_unparsed(self.name)
        return self._progress.status(pending=left)

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
            await self._open()
            while True:
                await self._wait_for_batch()
                if self._draining.is_set() and self._cursor >= self._spool.end:
                    return
                await self._round()
        except _Stop:
            return
        finally:
            self._progress.enter("stopped")

    async def _open(self) -> None:
        delay = BACKOFF_BASE_SECS
        while True:
            try:
                async with asyncio.timeout(self._settings.call_secs_max):
                    await self.sink.open()
            except TimeoutError:
                late = self._failed(Transient("no answer in time", code="timeout"))
                delay = await self._back_off(late, delay)
            except (Blocked, Permission, Permanent) as refusal:
                await self._pause(self._failed(refusal))
            except DeliveryError as trouble:
                delay = await self._back_off(self._failed(trouble), delay)
            else:
                self._progress.enter("delivering")
                return

    async def _wait_for_batch(self) -> None:
        """Return when a full batch waits, or something waits and the linger time is over, or on drain."""
        drain = asyncio.ensure_future(self._draining.wait())
        try:
            await self._first_of(self._spool.arrived(self._cursor), drain, None)
            limits = self.sink.limits
            wanted = min(limits.records_max, self._spool.typical_count(limits.bytes_max))
            if self._spool.end - self._cursor < wanted:
                await self._first_of(
                    self._spool.arrived(self._cursor + wanted - 1), drain, self.sink.linger_secs
                )
        finally:
            drain.cancel()

    @staticmethod
    async def _first_of(arrival: Any, drain: asyncio.Future[Any], secs: float | None) -> None:
        task = asyncio.ensure_future(arrival)
        try:
            await asyncio.wait((task, drain), timeout=secs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()

    # ---- one round ----------------------------------------------------------------------------------

    async def _round(self) -> None:
        """Read, encode, deliver and settle up to ``concurrency`` batches."""
        current = await self._collect()
        batches = pack(current.items, self.sink.limits)
        tasks = [asyncio.ensure_future(self._deliver(current, batch)) for batch in batches]
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
            await self._pause(blocked)

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
        elif self._is_filtered(record):
            current.outcomes[index] = FILTERED
        else:
            item = self._encode(current, index)
            if item is not None:
                current.items.append(item)
                return max(item.size_bytes, record.size_bytes)
        return record.size_bytes

    def _is_filtered(self, record: Record) -> bool:
        if self.sink.findings_only and (record.kind != ALERT or record.internal):
            return True
        return record.kind != UNPARSED and record.priority > self.sink.minimum_rank

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

    # ---- one batch ----------------------------------------------------------------------------------

    async def _deliver(self, current: Round, batch: list[Item]) -> None:
        """Settle every record of a batch; raises ``Blocked`` where only a person can help."""
        delay = BACKOFF_BASE_SECS
        while batch:
            try:
                rejects = await self._call(batch)
            except (TooLarge, Permanent, Permission) as error:
                await self._bisect(current, batch, error)
                return
            except Blocked:
                raise
            except DeliveryError as error:
                delay = await self._back_off(error, delay)
                continue
            batch = current.accept(batch, rejects, self._now())
            if batch:
                first = next(iter(rejects.values()))
                if any(reject.again is Again.BLOCKED for reject in rejects.values()):
                    raise Blocked(first.detail)
                delay = await self._back_off(Transient(first.detail, code="unknown"), delay)
                batch = [item for item in (self._encode(current, item.index) for item in batch) if item]

    async def _call(self, batch: list[Item]) -> dict[int, Reject]:
        loop = asyncio.get_running_loop()
        async with self.sink.pace.slot():
            started = loop.time()
            try:
                async with asyncio.timeout(self._settings.call_secs_max):
                    rejects = await self.sink.deliver(batch)
            except TimeoutError:
                raise self._failed(Transient("no answer in time", code="timeout")) from None
            except DeliveryError as error:
                raise self._failed(error) from None
            finally:
                self._metrics.call_seconds[self.name].observe(loop.time() - started)
        self.sink.pace.succeeded()
        self._refusals_in_a_row = 0
        self._successes += 1
        self._progress.succeeded(self._now(), len(batch), clean=not rejects)
        log.debug("batch accepted", sink=self.name, alerts=len(batch) - len(rejects), rejected=len(rejects))
        return rejects

    def _failed(self, error: DeliveryError) -> DeliveryError:
        self._progress.failed(error)
        if error.code == "throttled":
            self.sink.pace.throttled()
        return error

    async def _bisect(self, current: Round, batch: list[Item], error: DeliveryError) -> None:
        if len(batch) == 1:
            self._refuse(current, batch[0], error)
            return
        middle = len(batch) // 2
        before = self._successes
        await self._deliver(current, batch[:middle])
        rest = batch[middle:]
        if self._successes > before and not isinstance(error, TooLarge) and len(rest) > 1:
            clean = all(current.outcomes.get(item.index) == DELIVERED for item in batch[:middle])
            if clean:  # the culprit is in the rest: no need to ask for all of it again
                await self._bisect(current, rest, error)
                return
        await self._deliver(current, rest)

    def _refuse(self, current: Round, item: Item, error: DeliveryError) -> None:
        """A lone record is refused at call level."""
        if isinstance(error, Permission):
            # Its own fault, or ours altogether? Known when the round is over.
            current.suspects.append((item, error))
            if len(current.suspects) >= SUSPECTS_MAX:
                raise Blocked(str(error), code="permission")
            return
        self._refusals_in_a_row += 1
        current.bury(item.index, error.code, str(error), self._now())
        log.error("alert refused by the service, kept as a dead letter", sink=self.name, error=str(error))
        if self._refusals_in_a_row >= REFUSALS_IN_A_ROW_MAX:
            self._refusals_in_a_row = 0
            raise Blocked(f"every alert is refused: {error}", code="invalid")

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

    async def _back_off(self, error: DeliveryError, previous: float) -> float:
        """Wait with decorrelated jitter; returns the delay for the next time. Raises ``_Stop`` on drain."""
        self._progress.enter("retrying")
        self._progress.retried()
        delay = min(BACKOFF_MAX_SECS, self._rng.uniform(BACKOFF_BASE_SECS, previous * 3))
        await self._sleep(max(delay, min(error.delay_secs, BACKOFF_MAX_SECS)))
        return delay

    async def _pause(self, error: DeliveryError) -> None:
        self._progress.block(error)
        await self._sleep(PROBE_SECS)

    async def _sleep(self, secs: float) -> None:
        try:
            await asyncio.wait_for(self._draining.wait(), secs)
        except TimeoutError:
            return
        raise _Stop
