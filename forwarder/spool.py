"""The spool: every acknowledged alert is in here until each sink has settled it.

Job: one group commit for everything that waits, one cursor per sink, a byte quota. This is the asynchronous
half; statements and files are in ``spool_store`` and ``spool_schema``.

How a commit comes about: ``append`` collects; as soon as the writer thread is free, all that was collected
goes into one transaction (natural batching: what arrives during one sync shares the next), together with the
cursors and dead letters the delivery workers want written. Nobody is told of success before the sync.

Invariants:

- An ``append`` that returned is on disk; one that raised left nothing behind.
- Offsets follow the order of storing; ``[cursor, end)`` is what a sink still has to settle.
- Above 90 % of the quota only alerts of priority Notice and higher find room, at 100 % none. Nothing stored
  is ever evicted to make room.
- Memory is bounded: ``spool_tail`` for sinks that are up to date, blocks from disk for others. A start never
  loads the backlog.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import structlog

from forwarder.metrics import Metrics
from forwarder.record import UNPARSED, DeadLetter, Record
from forwarder.spool_queue import Settling, Waiting, take
from forwarder.spool_settings import SpoolSettings
from forwarder.spool_store import Store, is_full
from forwarder.spool_tail import Tail
from forwarder.spool_values import Batch, Chunk, IssueChanges, StoredIssues, Written
from forwarder.spool_writer import Writer

TAIL_BYTES_MAX = 4 << 20
COMMIT_BYTES_MAX = 1 << 20
HOUSEKEEPING_SECS = 1.0
CLOSE_SECS_MAX, FULL_SECS_MIN = 5.0, 3.0
EXPIRY_SECS = 60.0
FILL_COMPRESS, FILL_WARN, FILL_SHED = 0.02, 0.8, 0.9
SHED_RANK = 6
"""From 90 % on, Informational (6) and Debug (7) are refused."""

log = structlog.get_logger("spool")


class SpoolFullError(Exception):
    """No room now. Nothing was stored."""


class SpoolFailedError(Exception):
    """The volume does not take writes. Nothing was stored."""


class Spool:
    """The durable log between receiver and sinks."""

    def __init__(
        self,
        settings: SpoolSettings,
        *,
        sinks: Iterable[str],
        metrics: Metrics,
        now: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._sinks = tuple(sinks)
        self._metrics = metrics
        self._now = now
        self._store = Store(
            Path(settings.directory),
            full_sync=settings.sync == "full",
            bytes_max=settings.bytes_max,
            dead_retention_secs=settings.dead_letter_retention_days * 86400,
            unparsed_bytes_max=settings.unparsed_bytes_max,
        )
        self._writer = Writer()
        self._waiting: list[Waiting] = []
        self._settling: list[Settling] = []
        self._committing = False
        self._arrivals: list[tuple[int, asyncio.Future[None]]] = []
        self._room: list[asyncio.Future[None]] = []
        self._tail = Tail(TAIL_BYTES_MAX)
        self._average_bytes, self._waiting_bytes = 1500.0, 0
        self._commit_bytes_max = COMMIT_BYTES_MAX
        self._unsettled, self._warned, self._full_at = False, False, 0.0
        self.bytes_max = settings.bytes_max
        self.limit_bytes = settings.bytes_max
        """In force now: less than ``bytes_max`` after the volume was full."""
        self.used_bytes = 0
        self.events = 0
        self.end = 0
        self.cursors: dict[str, int] = {}
        self.oldest: dict[str, float] = {}
        self.dead: dict[str, int] = {}
        self._unparsed: dict[str, int] = {}
        self.id, self.fresh = "", frozenset[str]()
        self.failure = ""  # why the volume does not take writes

    # ---- life ---------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the directory; raises ``SpoolUnusableError`` with a message for the operator."""
        self._loop = asyncio.get_running_loop()
        self._writer.start()
        try:
            state = await self._writer.run(lambda: self._store.open(self._sinks))
        except BaseException:
            self._writer.stop()
            raise
        self.end, self.used_bytes, self.events = state.end, state.used_bytes, state.records
        self.cursors, self.dead, self._unparsed = state.cursors, dict(state.dead), state.unparsed
        self.limit_bytes = self.bytes_max = state.bytes_max
        self._commit_bytes_max = min(COMMIT_BYTES_MAX, max(1, self.bytes_max // 16))
        self.id, self.fresh = state.id, state.fresh
        self._metrics.spool_corrupt.set(state.quarantined is not None)
        self.publish()
        self._housekeeper = asyncio.create_task(self._housekeep(), name="spool housekeeping")

    async def close(self) -> None:
        """Write what waits, fold the log into the database, release the directory."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECS_MAX):
                while self._waiting or self._settling or self._committing:  # noqa: ASYNC110 - the last one out
                    await asyncio.sleep(0.005)
        self._housekeeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._housekeeper
        await self._writer.run(self._store.close)
        self._writer.stop()

    # ---- writing ------------------------------------------------------------------------------------

    def writer_silence_secs(self) -> float:
        return self._loop.time() - self._writer.beat

    @property
    def fill(self) -> float:
        """Share of the quota in use, with what waits for its commit."""
        return (self.used_bytes + self._waiting_bytes) / self.limit_bytes if self.limit_bytes > 0 else 1.0

    def admits(self, rank: int) -> bool:
        """Whether an alert of this priority may be appended now."""
        fill = self.fill
        return fill < FILL_SHED or (fill < 1.0 and rank < SHED_RANK)

    def append(self, records: Sequence[Record], dead: Sequence[DeadLetter] = ()) -> asyncio.Future[None]:
        """Store records (all or none); the future ends when they are durable.

        Raises (in the future):
            SpoolFullError, SpoolFailedError: nothing was stored.

        """
        done = self._loop.create_future()
        size = records[0].size_bytes if len(records) == 1 else sum([record.size_bytes for record in records])
        self._waiting.append(Waiting(records, dead, size, done))
        self._waiting_bytes += size
        self._schedule()
        return done

    def settle(
        self,
        sink: str,
        offset: int | None,
        dead: Sequence[DeadLetter] = (),
        *,
        unparsed: int = 0,
        issues: IssueChanges | None = None,
    ) -> asyncio.Future[None]:
        """Move a sink's cursor (over so many unparsable bodies), write its dead letters and issues, in one transaction.

        Without an offset the cursor stays. Calls are written in their order.
        """
        done = self._loop.create_future()
        self._settling.append(Settling(sink, offset, dead, unparsed, issues, done))
        self._schedule()
        return done

    async def room(self) -> None:
        """Wait until something was freed."""
        waiter = self._loop.create_future()
        self._room.append(waiter)
        try:
            await waiter
        finally:
            if not waiter.done() or waiter.cancelled():
                with contextlib.suppress(ValueError):
                    self._room.remove(waiter)

    # ---- reading ------------------------------------------------------------------------------------

    async def arrived(self, offset: int) -> None:
        """Wait until the record with this offset is stored."""
        while self.end <= offset:
            waiter = self._loop.create_future()
            entry = (offset, waiter)
            self._arrivals.append(entry)
            try:
                await waiter
            finally:
                if entry in self._arrivals:
                    self._arrivals.remove(entry)

    def typical_count(self, size_bytes: int) -> int:
        """How many records of today's average size make ``size_bytes``."""
        return max(1, int(size_bytes / self._average_bytes))

    async def read(self, offset: int, *, records_max: int, bytes_max: int) -> Chunk:
        """Records from ``offset``: at least one if ``offset < end``, until a limit is passed."""
        recent = self._tail.read(offset, records_max=records_max, bytes_max=bytes_max)
        if recent is not None:
            return Chunk(offset, offset + len(recent), recent, 0)
        chunk = await self._writer.run(
            lambda: self._store.read(offset, records_max=records_max, bytes_max=bytes_max)
        )
        if chunk.broken:
            self._metrics.spool_broken.inc()
            self.dead = dict.fromkeys(self.dead, 0) | await self._writer.run(self._store.count_dead)
        return chunk

    async def dead_letters(self, before: int, limit: int) -> list[tuple[int, DeadLetter]]:
        """Newest dead letters first, numbers below ``before``."""
        return await self._writer.run(lambda: self._store.dead_letters(before, limit))

    async def issues(self) -> StoredIssues:
        """All issues of aggregation as they were last written."""
        return await self._writer.run(self._store.issues)

    async def issue_details(self, keys: Sequence[bytes]) -> dict[bytes, Record]:
        """The latest alerts of these issues."""
        return await self._writer.run(lambda: self._store.issue_details(keys))

    def pending(self, sink: str) -> int:
        """Alerts the sink has not settled."""
        return self.end - self.cursors[sink] - self._unparsed[sink]

    def pending_unparsed(self, sink: str) -> int:
        return self._unparsed[sink]

    # ---- inside -------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._committing:
            self._committing = True
            # Not at once: whoever else is ready in this turn of the loop shares the commit.
            self._loop.call_soon(self._commit)

    def _commit(self) -> None:
        waiting, self._waiting = take(self._waiting, self._commit_bytes_max)
        settling, self._settling = self._settling, []
        records = [record for item in waiting for record in item.records]
        dead = [letter for item in waiting for letter in item.dead]
        dead += [letter for item in settling for letter in item.dead]
        cursors = {item.sink: item.offset for item in settling if item.offset is not None}
        issues = [(item.sink, item.issues) for item in settling if item.issues is not None]
        # While sinks keep up, a block lives for a second: not worth a third of its cost. A backlog is.
        batch = Batch(records, cursors, dead, compress=self.fill >= FILL_COMPRESS, issues=issues)
        now = self._now()

        def job() -> None:
            written = self._store.write(batch, now)
            self._writer.call_loop(self._committed, batch, waiting, settling, written)

        self._writer.put(job)

    def _committed(
        self, batch: Batch, waiting: list[Waiting], settling: list[Settling], written: Written
    ) -> None:
        raw_bytes = sum([item.size_bytes for item in waiting])
        self._waiting_bytes -= raw_bytes
        if written.error is None:
            self._stored(batch, written, raw_bytes)
            for item in waiting:
                if not item.done.done():
                    item.done.set_result(None)
        else:
            self._refused(waiting, written.error)
        late = [item for item in settling if item.sink in written.unsettled]
        for settled in settling:
            if settled.sink in written.unsettled:
                continue
            if settled.offset is not None:
                self.cursors[settled.sink] = settled.offset
            self._unparsed[settled.sink] -= settled.unparsed
            self._count_dead(settled.dead)
            if not settled.done.done():
                settled.done.set_result(None)
        if late and not self._unsettled:
            log.error("cursors cannot be written, what is delivered may be sent again after a crash")
        self._settling = late + self._settling  # the housekeeper tries again
        self._unsettled = bool(late)
        self._committing = False
        if self._waiting or (self._settling and not late):
            self._schedule()

    def _stored(self, batch: Batch, written: Written, raw_bytes: int) -> None:
        self.failure = ""
        self.used_bytes += written.stored_bytes
        self._metrics.sync_seconds.observe(written.sync_secs)
        self._count_dead([letter for letter in batch.dead if letter.sink == "receiver"])
        count = len(batch.records)
        if not count:
            return
        self.events += count
        self._metrics.commit_batch.observe(count)
        self._average_bytes += 0.05 * (raw_bytes / count - self._average_bytes)
        self._tail.add(written.first, batch.records, raw_bytes)
        unparsed = sum([record.kind == UNPARSED for record in batch.records])
        for sink in self._unparsed:
            self._unparsed[sink] += unparsed
        self.end = written.first + count
        if self._arrivals:
            due = [waiter for offset, waiter in self._arrivals if offset < self.end]
            for waiter in due:
                if not waiter.done():
                    waiter.set_result(None)

    def _refused(self, waiting: list[Waiting], error: Exception) -> None:
        self._metrics.spool_errors.inc()
        full = is_full(error)
        if full:
            # What fitted is all there is until the ballast can be written again.
            self.limit_bytes = min(self.limit_bytes, int(self.used_bytes * FILL_SHED))
            self._full_at = self._loop.time()
        elif not self.failure:
            log.error("spool cannot be written, nothing is acknowledged", error=str(error))
        if not full:
            self.failure = str(error)
        for item in waiting:
            if not item.done.done():
                cause = SpoolFullError if full else SpoolFailedError
                item.done.set_exception(cause(str(error)))

    def _count_dead(self, letters: Sequence[DeadLetter]) -> None:
        for letter in letters:
            self.dead[letter.sink] = self.dead.get(letter.sink, 0) + 1

    async def _housekeep(self) -> None:
        elapsed = 0.0
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECS)
            elapsed += HOUSEKEEPING_SECS
            expire = elapsed >= EXPIRY_SECS
            elapsed = 0.0 if expire else elapsed
            if self._settling and not self._committing:
                self._schedule()
            try:
                await self._round(expire=expire)
            except Exception as error:  # noqa: BLE001 - the housekeeper outlives every fault
                self._metrics.spool_errors.inc()
                if not self.failure:
                    log.error("spool cannot be written, nothing is acknowledged", error=str(error))
                self.failure = str(error)

    async def _round(self, *, expire: bool) -> None:
        if self.failure:
            await self._writer.run(self._store.probe)
            log.info("spool can be written again")
            self.failure = ""
        now = self._now()
        while True:
            done = await self._writer.run(lambda: self._store.housekeep(now, expire=expire))
            self.used_bytes -= done.freed_bytes
            self.events -= done.freed_records
            if done.dead_removed:
                self.dead = dict.fromkeys(self.dead, 0) | done.dead
                self._metrics.dead_removed.inc(done.dead_removed)
            if not done.freed_records:
                break
        self.oldest = done.oldest
        calm = self._loop.time() - self._full_at >= FULL_SECS_MIN
        if done.ballast and calm and self.limit_bytes != self.bytes_max:
            log.info("volume has room again")
            self.limit_bytes = self.bytes_max
        for waiter in self._room:
            if not waiter.done():
                waiter.set_result(None)
        self._room.clear()
        self.publish()

    def oldest_secs(self, sink: str) -> float:
        """How long the sink's oldest alert has waited, as housekeeping last saw it."""
        return max(0.0, self._now() - self.oldest[sink]) if sink in self.oldest else 0.0

    def publish(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.spool_events.set(self.events)
        self._metrics.spool_bytes.set(self.used_bytes)
        self._metrics.spool_capacity.set(max(0, self.limit_bytes))
        for sink, count in self.dead.items():
            self._metrics.dead_letters.labels(sink).set(count)
        for sink, gauge in self._metrics.spool_oldest.items():
            gauge.set(self.oldest_secs(sink))
        nearly_full = self.fill >= FILL_WARN
        if nearly_full and not self._warned:
            log.warning("spool is filling up", used_bytes=self.used_bytes, limit_bytes=self.limit_bytes)
        self._warned = nearly_full
