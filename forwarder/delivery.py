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
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Annotated, Any, NamedTuple, Protocol

import msgspec
import structlog

from forwarder.batch import Item, Limits, pack
from forwarder.config import setting
from forwarder.metrics import Metrics
from forwarder.pace import Pace
from forwarder.record import ALERT, UNPARSED, DeadLetter, Record
from forwarder.spool import Spool

BACKOFF_BASE_SECS, BACKOFF_MAX_SECS = 0.5, 30.0
PROBE_SECS = 60.0
LIMITED_ATTEMPTS_MAX = 5
REFUSALS_IN_A_ROW_MAX = 20
"""So many call-level dead letters without one success look like a fault of ours: pause between them."""
SUSPECTS_MAX = 8
"""So many records without permission and not one accepted: it is not the records."""
ROUND_BYTES_MAX = 8 << 20
"""Memory one round may hold, filtered records included."""
DETAIL_LENGTH_MAX = 1000

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


class DeliveryError(Exception):
    """A call failed. ``code`` is one of ``metrics.ERROR_CODES``."""

    code: str = "unknown"

    def __init__(self, message: str, *, code: str | None = None, delay_secs: float = 0.0) -> None:
        super().__init__(message)
        self.code = code or self.code
        self.delay_secs = delay_secs
        """The service's own wish, a lower bound for the back-off."""


class Transient(DeliveryError):  # noqa: N818 - the taxonomy's words
    """Trying again helps."""

    code = "unavailable"


class TooLarge(DeliveryError):  # noqa: N818
    """The call was too big."""

    code = "too_large"


class Permanent(DeliveryError):  # noqa: N818
    """The service will never accept this call."""

    code = "invalid"


class Permission(DeliveryError):  # noqa: N818
    """No permission, for the call or for one of its records."""

    code = "permission"


class Blocked(DeliveryError):  # noqa: N818
    """The service is off or forbidden for us; only a person can change that."""

    code = "disabled"


class Again(Enum):
    """What to do with a record refused inside an accepted call."""

    NEVER = "never"
    LIMITED = "limited"
    ALWAYS = "always"
    BLOCKED = "blocked"


class Reject(Exception):  # noqa: N818
    """The service (or the mapping) refuses one record. ``reason`` is one of ``metrics.DEAD_LETTER_REASONS``."""

    def __init__(self, reason: str, detail: str, again: Again = Again.NEVER) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.again = again


class Sink(Protocol):
    """An AWS destination: limits as data, a pure encoding, one call. Everything else is the worker's."""

    name: str
    limits: Limits
    linger_secs: float
    minimum_rank: int
    findings_only: bool
    """True: takes decoded alerts that are not Falco's internal messages, nothing else."""
    pace: Pace

    async def open(self) -> None:
        """Get ready to encode and deliver; raises ``DeliveryError``."""

    def encode(self, record: Record, index: int) -> Item:
        """One record as part of a call; raises ``Reject``."""

    async def deliver(self, items: Sequence[Item]) -> dict[int, Reject]:
        """One call. Refused records by position in ``items``; raises ``DeliveryError``."""


class _Round:
    """Records under way: ``[start, start + len)`` of the spool, and what became of each."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.records: list[Record] = []
        self.outcomes: dict[int, DeadLetter | str] = {}
        self.items: list[Item] = []
        self.attempts: dict[int, int] = {}
        self.accepted: dict[int, Item] = {}
        self.suspects: list[tuple[Item, DeliveryError]] = []

    def prefix(self) -> int:
        """How many records from the start on are settled."""
        count = 0
        while count in self.outcomes:
            count += 1
        return count


class Status(NamedTuple):
    """A sink's part of ``/status``."""

    state: str
    pending: int
    recovered: int
    delivered: int
    filtered: int
    dead_letters: int
    retries: int
    last_success: float | None
    last_error: str | None


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
    ) -> None:
        self.sink = sink
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
        self._state = "starting"
        self._recovered = 0
        self._counts = {"delivered": 0, "filtered": 0, "dead": 0, "retries": 0}
        self._last_success: float | None = None
        self._last_error: str | None = None

    @property
    def name(self) -> str:
        return self.sink.name

    def status(self) -> Status:
        return Status(
            state=self._state,
            pending=self._spool.pending(self.name),
            recovered=self._recovered,
            delivered=self._counts["delivered"],
            filtered=self._counts["filtered"],
            dead_letters=self._counts["dead"],
            retries=self._counts["retries"],
            last_success=self._last_success,
            last_error=self._last_error,
        )

    def publish(self) -> None:
        """Bring the gauges up to date (before a scrape)."""
        self._metrics.pending[self.name].set(self._spool.pending(self.name))
        self._metrics.in_flight[self.name].set(self.sink.pace.in_flight)
        self._metrics.concurrency[self.name].set(int(self.sink.pace.limit))
        self._metrics.rate_limit[self.name].set(self.sink.pace.rate)

    def drain(self) -> None:
        """Deliver what waits without lingering; give up at the first failure or when cancelled."""
        self._draining.set()

    async def run(self) -> None:
        """Deliver until drained or cancelled; what was settled is on disk when this returns."""
        self._cursor = self._spool.cursors[self.name]
        self._recovered = self._spool.pending(self.name)
        self._metrics.recovered[self.name].set(self._recovered)
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
            self._enter("stopped")

    async def _open(self) -> None:
        delay = BACKOFF_BASE_SECS
        while True:
            try:
                async with asyncio.timeout(self._settings.call_secs_max):
                    await self.sink.open()
            except TimeoutError:
                delay = await self._back_off(Transient("no answer in time", code="timeout"), delay)
            except (Blocked, Permission, Permanent) as error:
                await self._pause(error)
            except DeliveryError as error:
                delay = await self._back_off(error, delay)
            else:
                self._enter("delivering")
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
            blocked = blocked or self._judge(current)
        finally:
            for task in tasks:
                task.cancel()
            # Also when cancelled: what the service accepted is written down.
            await asyncio.shield(self._settle(current))
        if blocked is not None:
            await self._pause(blocked)

    async def _collect(self) -> _Round:
        """Read from the cursor on until the batches of one round are full or nothing is left."""
        limits, concurrency = self.sink.limits, max(1, int(self.sink.pace.limit))
        count_max = limits.records_max * concurrency
        bytes_max = min(limits.bytes_max * concurrency, ROUND_BYTES_MAX)
        current = _Round(self._cursor)
        offset, size = self._cursor, 0
        while offset < self._spool.end and size < bytes_max and len(current.items) < count_max:
            chunk = await self._spool.read(offset, records_max=count_max, bytes_max=bytes_max - size)
            if chunk.broken or chunk.start > offset:
                if not current.records:
                    await self._skip(chunk.start + chunk.broken, lost=chunk.broken)
                break
            for record in chunk.records:
                size += self._take(current, record)
            offset = chunk.end
        return current

    def _take(self, current: _Round, record: Record) -> int:
        """Decide on one record: filtered, unmappable, settled before, or an item. Returns its memory."""
        index = len(current.records)
        current.records.append(record)
        before = self._ahead.get(current.start + index)
        if before is not None:
            current.outcomes[index] = before
        elif self._is_filtered(record):
            current.outcomes[index] = "filtered"
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

    def _encode(self, current: _Round, index: int) -> Item | None:
        record = current.records[index]
        try:
            return self.sink.encode(record, index)
        except Reject as reject:
            self._bury(current, index, reject.reason, reject.detail)
        except Exception as error:
            # A mapping must never stop its sink: the alert is kept with the reason, the rest goes on.
            log.exception("alert cannot be mapped, kept as a dead letter", sink=self.name, id=record.id)
            self._bury(current, index, "unmappable", f"{type(error).__name__}: {error}")
        return None

    def _bury(self, current: _Round, index: int, reason: str, detail: str) -> None:
        record = current.records[index]
        current.outcomes[index] = DeadLetter(
            sink=self.name,
            id=record.id,
            reason=reason,
            detail=detail[:DETAIL_LENGTH_MAX],
            at=self._now(),
            body=record.body,
        )

    # ---- one batch ----------------------------------------------------------------------------------

    async def _deliver(self, current: _Round, batch: list[Item]) -> None:
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
            batch = self._accept(current, batch, rejects)
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
        self._last_success = self._now()
        self._metrics.last_success[self.name].set(self._last_success)
        self._metrics.batch_events[self.name].observe(len(batch))
        if not rejects:
            self._enter("delivering")
        log.debug("batch accepted", sink=self.name, alerts=len(batch) - len(rejects), rejected=len(rejects))
        return rejects

    def _failed(self, error: DeliveryError) -> DeliveryError:
        self._metrics.failures[self.name, error.code].inc()
        if error.code == "throttled":
            self.sink.pace.throttled()
        text = str(error)
        if text != self._last_error:
            self._last_error = text
            log.warning("call failed", sink=self.name, code=error.code, error=text)
        return error

    def _accept(self, current: _Round, batch: list[Item], rejects: dict[int, Reject]) -> list[Item]:
        """Note what was accepted and buried; give back what is to be tried again."""
        again: list[Item] = []
        for position, item in enumerate(batch):
            reject = rejects.get(position)
            if reject is None:
                current.outcomes[item.index] = "delivered"
                current.accepted[item.index] = item
                continue
            attempts = current.attempts.get(item.index, 0) + 1
            current.attempts[item.index] = attempts
            if reject.again is Again.NEVER or (
                reject.again is Again.LIMITED and attempts >= LIMITED_ATTEMPTS_MAX
            ):
                self._bury(current, item.index, reject.reason, reject.detail)
            else:
                again.append(item)
        return again

    async def _bisect(self, current: _Round, batch: list[Item], error: DeliveryError) -> None:
        if len(batch) == 1:
            self._refuse(current, batch[0], error)
            return
        middle = len(batch) // 2
        before = self._successes
        await self._deliver(current, batch[:middle])
        rest = batch[middle:]
        if self._successes > before and not isinstance(error, TooLarge) and len(rest) > 1:
            clean = all(current.outcomes.get(item.index) == "delivered" for item in batch[:middle])
            if clean:  # the culprit is in the rest: no need to ask for all of it again
                await self._bisect(current, rest, error)
                return
        await self._deliver(current, rest)

    def _refuse(self, current: _Round, item: Item, error: DeliveryError) -> None:
        """A lone record is refused at call level."""
        if isinstance(error, Permission):
            # Its own fault, or ours altogether? Known when the round is over.
            current.suspects.append((item, error))
            if len(current.suspects) >= SUSPECTS_MAX and not current.accepted:
                raise Blocked(str(error), code="permission")
            return
        self._refusals_in_a_row += 1
        self._bury(current, item.index, error.code, str(error))
        log.error("alert refused by the service, kept as a dead letter", sink=self.name, error=str(error))
        if self._refusals_in_a_row >= REFUSALS_IN_A_ROW_MAX:
            self._refusals_in_a_row = 0
            raise Blocked(f"every alert is refused: {error}", code="invalid")

    def _judge(self, current: _Round) -> DeliveryError | None:
        """Suspects are culprits if anything else went through; otherwise the sink is blocked."""
        if not current.suspects:
            return None
        if not current.accepted:
            return current.suspects[0][1]
        for item, error in current.suspects:
            self._bury(current, item.index, "permission", str(error))
        return None

    # ---- settling and waiting -----------------------------------------------------------------------

    async def _settle(self, current: _Round) -> None:
        """Write the cursor and dead letters of the settled prefix; remember what is settled beyond it."""
        count = current.prefix()
        for index, outcome in current.outcomes.items():
            if index >= count:
                self._ahead[current.start + index] = outcome
        if not count:
            return
        offset = current.start + count
        letters = [
            outcome for index in range(count) if isinstance(outcome := current.outcomes[index], DeadLetter)
        ]
        await self._spool.settle(self.name, offset, letters)
        self._cursor = offset
        for index in range(count):
            self._ahead.pop(current.start + index, None)
        self._count(current, count)

    def _count(self, current: _Round, count: int) -> None:
        delivered = filtered = unparsed = size = truncated = adjusted = 0
        oldest: int | None = None
        for index in range(count):
            record, outcome = current.records[index], current.outcomes[index]
            if record.kind == UNPARSED:
                unparsed += outcome == "delivered"
            elif outcome == "filtered":
                filtered += 1
            elif isinstance(outcome, DeadLetter):
                self._counts["dead"] += 1
                self._metrics.dead_lettered[self.name, outcome.reason].inc()
            else:
                delivered += 1
            item = current.accepted.get(index)
            if item is not None:
                size += item.size_bytes
                truncated += item.truncated
                adjusted += item.adjusted
                if oldest is None:
                    oldest = record.received_ns
        self._counts["delivered"] += delivered
        self._counts["filtered"] += filtered
        metrics = self._metrics
        metrics.delivered[self.name].inc(delivered)
        metrics.filtered[self.name].inc(filtered)
        metrics.unparsed_forwarded[self.name].inc(unparsed)
        metrics.sent_bytes[self.name].inc(size)
        metrics.truncated[self.name].inc(truncated)
        metrics.adjusted[self.name].inc(adjusted)
        if oldest is not None:
            metrics.latency[self.name].observe(max(0.0, self._now() - oldest / 1e9))

    async def _skip(self, offset: int, *, lost: int) -> None:
        """Pass over what a broken block held; the spool has set its bytes aside."""
        if lost:
            self._counts["dead"] += lost
            self._metrics.dead_lettered[self.name, "broken_block"].inc(lost)
        await self._spool.settle(self.name, offset)
        self._cursor = offset

    async def _back_off(self, error: DeliveryError, previous: float) -> float:
        """Wait with decorrelated jitter; returns the delay for the next time. Raises ``_Stop`` on drain."""
        self._enter("retrying")
        self._counts["retries"] += 1
        self._metrics.retries[self.name].inc()
        delay = min(BACKOFF_MAX_SECS, self._rng.uniform(BACKOFF_BASE_SECS, previous * 3))
        await self._sleep(max(delay, min(error.delay_secs, BACKOFF_MAX_SECS)))
        return delay

    async def _pause(self, error: DeliveryError) -> None:
        self._last_error = str(error)
        if self._state != "blocked":
            log.error("sink is blocked, alerts wait in the spool", sink=self.name, error=str(error))
        self._enter("blocked")
        await self._sleep(PROBE_SECS)

    async def _sleep(self, secs: float) -> None:
        try:
            await asyncio.wait_for(self._draining.wait(), secs)
        except TimeoutError:
            return
        raise _Stop

    def _enter(self, state: str) -> None:
        if state == self._state:
            return
        if state == "delivering" and self._state in {"retrying", "blocked"}:
            log.info("sink delivers again", sink=self.name)
            self._last_error = None
        self._state = state
        for name in ("starting", "delivering", "retrying", "blocked", "stopped"):
            self._metrics.state[self.name, name].set(name == state)
