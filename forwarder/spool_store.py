"""The spool's synchronous half: every statement that touches the database, run in the writer thread.

Job: make one transaction of everything that waits (records, cursors, dead letters), read blocks back, remove
what every sink has passed, and survive a full volume. Nothing here knows of asyncio.

A full volume live-locks SQLite: even a cursor update needs room in the WAL. So the byte quota is at most five
eighths of the volume, ``max_page_count`` lies between the two, the WAL is kept small against the quota, and a
ballast file larger than the WAL is given up on a real ENOSPC so that cursors and deletes go on and make room.
Until the ballast can be written again, new records are refused.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import structlog

from forwarder import spool_dead, spool_issues
from forwarder.record import UNPARSED, DeadLetter, Record
from forwarder.spool_ballast import Ballast, fitting_bytes
from forwarder.spool_schema import (
    BROKEN,
    BrokenBlockError,
    Opened,
    SpoolUnusableError,
    block_cost,
    decode_block,
    encode_block,
    lock,
    open_database,
    spool_id,
)
from forwarder.spool_values import Batch, Chunk, Housekeeping, State, StoredIssues, Written

BLOCKS_PER_DELETE_MAX = 4096

log = structlog.get_logger("spool")


class Store:
    """One open spool database. All methods belong to one thread."""

    def __init__(
        self,
        directory: Path,
        *,
        full_sync: bool,
        bytes_max: int,
        dead_retention_secs: float,
        unparsed_bytes_max: int,
    ) -> None:
        self._directory = directory
        self._full_sync = full_sync
        self._bytes_max = bytes_max
        self._dead_retention_secs = dead_retention_secs
        self._unparsed_bytes_max = unparsed_bytes_max
        self._end = 0
        self._fresh: frozenset[str] = frozenset()

    def open(self, sinks: Iterable[str]) -> State:
        """Open the database and bring the cursors in line with the enabled sinks.

        A sink without a cursor starts at the present; the cursor of a sink that is not enabled any more goes.
        """
        self._lock = lock(self._directory)
        try:
            return self._open(set(sinks))
        except sqlite3.Error as error:
            self._db.close()
            self._lock.close()
            raise SpoolUnusableError(f"the spool in {self._directory} cannot be written: {error}") from error
        except BaseException:
            self._lock.close()
            raise

    def _open(self, sinks: set[str]) -> State:
        self._bytes_max = fitting_bytes(self._directory, self._bytes_max)
        self._ballast = Ballast(self._directory, self._bytes_max)
        suffix = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        opened = self._opened(suffix)
        self._db = opened.connection
        try:
            self._adopt(sinks, salvaged=opened.quarantined is not None)
        except sqlite3.OperationalError as error:
            self._rollback()
            if not is_full(error):
                raise
            self._ballast.give_up()
            self._adopt(sinks, salvaged=opened.quarantined is not None)
        execute = self._db.execute
        records, cost = execute("SELECT coalesce(sum(n),0), coalesce(sum(cost),0) FROM block").fetchone()
        (dead_bytes,) = execute("SELECT coalesce(sum(length(body)),0) FROM dead").fetchone()
        self._ballast.secure()
        cursors = dict(execute("SELECT sink, next FROM cursor"))
        return State(
            bytes_max=self._bytes_max,
            end=self._end,
            used_bytes=cost + dead_bytes,
            records=records,
            cursors=cursors,
            dead=self.count_dead(),
            unparsed={sink: self._unparsed_from(offset) for sink, offset in cursors.items()},
            quarantined=opened.quarantined,
            fresh=self._fresh,
            id=spool_id(self._db),
        )

    def _opened(self, suffix: str) -> Opened:
        """The database; an upgrade may need the ballast's room."""
        for attempt in (1, 2):
            try:
                return open_database(
                    self._directory, full_sync=self._full_sync, bytes_max=self._bytes_max, suffix=suffix
                )
            except SpoolUnusableError as error:
                if attempt == 2 or not isinstance(error.__cause__, Exception) or not is_full(error.__cause__):  # noqa: PLR2004
                    raise
                self._ballast.give_up()
        raise AssertionError

    def _adopt(self, wanted: set[str], *, salvaged: bool) -> None:
        """Find the end of the log and bring the cursors in line with the enabled sinks."""
        execute = self._db.execute
        (blocks_end,) = execute("SELECT coalesce(max(first + n), 0) FROM block").fetchone()
        (meta_end,) = execute("SELECT value FROM meta WHERE key='end'").fetchone()
        (cursor_end,) = execute("SELECT coalesce(max(next), 0) FROM cursor").fetchone()
        self._end = max(blocks_end, meta_end, cursor_end)
        existing = dict(execute("SELECT sink, next FROM cursor"))
        self._fresh = frozenset() if salvaged else frozenset(wanted - existing.keys())
        execute("BEGIN IMMEDIATE")
        for name in existing.keys() - wanted:
            execute("DELETE FROM cursor WHERE sink=?", (name,))
        for name in wanted - existing.keys():
            # A new sink starts at the present; one whose cursor was lost with a broken database, at the beginning.
            oldest = execute("SELECT min(first) FROM block").fetchone()[0] if salvaged else None
            execute("INSERT INTO cursor VALUES (?,?)", (name, self._end if oldest is None else oldest))
        execute("UPDATE meta SET value=? WHERE key='end'", (self._end,))
        execute("COMMIT")

    def _unparsed_from(self, offset: int) -> int:
        (count,) = self._db.execute(
            "SELECT coalesce(sum(unparsed),0) FROM block WHERE first + n > ?", (offset,)
        ).fetchone()
        inside = self._db.execute(
            "SELECT first, n, codec, crc, payload FROM block WHERE unparsed > 0 AND first < ? AND first + n > ?",
            (offset, offset),
        ).fetchone()
        if inside is not None:  # the cursor stands in the middle of this block
            records = self._block(*inside) or []
            count -= sum(record.kind == UNPARSED for record in records[: offset - inside[0]])
        return int(count)

    def close(self) -> None:
        """Fold the WAL into the database and let go of the directory."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        self._lock.close()

    def write(self, batch: Batch, now: float) -> Written:
        """One transaction for all of ``batch``; on failure one more for the cursors alone."""
        first = self._end
        try:
            size, sync_secs = self._transaction(batch, now)
        except Exception as error:
            self._rollback()
            if not isinstance(error, sqlite3.Error):
                log.exception("records cannot be written")
            if is_full(error):
                self._ballast.give_up()
            return Written(first, 0, 0.0, error, self._settle_alone(batch, now))
        self._end = first + len(batch.records)
        return Written(first, size, sync_secs, None)

    def read(self, offset: int, *, records_max: int, bytes_max: int) -> Chunk:
        """Records from ``offset`` on, whole blocks, at least one, until a limit is passed."""
        rows = self._db.execute(
            "SELECT first, n, codec, crc, unparsed, payload FROM block WHERE first + n > ? AND"
            " first >= (SELECT coalesce(max(first), 0) FROM block WHERE first <= ?) ORDER BY first",
            (offset, offset),
        )
        records: list[Record] = []
        start = end = offset
        size = 0
        for first, n, codec, crc, unparsed, payload in rows:
            if records and first != end:
                break  # a gap, left by salvage: the next chunk begins behind it
            block = self._block(first, n, codec, crc, payload)
            if block is None:
                if records:
                    break
                start = max(first, offset)
                lost = first + n - start
                return Chunk(start, first + n, [], lost, min(unparsed, lost))
            if not records:
                start = max(first, offset)
                block = block[start - first :]
            records += block
            end = first + n
            size += sum(record.size_bytes for record in block)
            if size >= bytes_max or len(records) >= records_max:
                break
        if not records:  # a gap up to the end
            return Chunk(self._end, self._end, [], 0)
        return Chunk(start, end, records, 0)

    def _block(self, first: int, n: int, codec: int, crc: int, payload: bytes) -> list[Record] | None:
        """Records of a block, or None for a broken one, which is set aside when first met."""
        if codec == BROKEN:
            return None
        try:
            block = decode_block(codec, crc, payload)
            if len(block) != n:
                raise BrokenBlockError("wrong count")
        except BrokenBlockError as error:
            self._quarantine(first, n, payload, error)
            return None
        return block

    def housekeep(self, now: float, *, expire: bool) -> Housekeeping:
        """Remove passed blocks and expired dead letters, look for the oldest alert, win the ballast back."""
        execute = self._db.execute
        freed_bytes = freed_records = dead_removed = 0
        try:
            lowest = execute("SELECT coalesce(min(next), ?) FROM cursor", (self._end,)).fetchone()[0]
            freed_bytes, freed_records = self._delete_blocks(lowest)
            if expire:
                dead_removed, dead_bytes = spool_dead.expire(
                    self._db, now - self._dead_retention_secs, unparsed_bytes_max=self._unparsed_bytes_max
                )
                freed_bytes += dead_bytes
        except sqlite3.Error as error:
            self._rollback()
            if is_full(error):
                self._ballast.give_up()
        ballast = self._ballast.secure()
        if not ballast:
            # A log that cannot start over keeps the room the ballast needs.
            with contextlib.suppress(sqlite3.Error):
                execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            ballast = self._ballast.secure()
        ages = execute(
            "SELECT sink, (SELECT created FROM block WHERE first + n > next AND first >="
            " (SELECT coalesce(max(first),0) FROM block WHERE first <= next) ORDER BY first LIMIT 1) FROM cursor"
        )
        oldest = {sink: created for sink, created in ages if created is not None}
        dead = self.count_dead() if dead_removed else {}
        return Housekeeping(freed_bytes, freed_records, oldest, ballast, dead_removed, dead)

    def dead_letters(self, before: int, limit: int) -> list[tuple[int, DeadLetter]]:
        """Newest first, numbers below ``before``."""
        return spool_dead.page(self._db, before, limit)

    def count_dead(self) -> dict[str, int]:
        """Dead letters by sink."""
        return spool_dead.count(self._db)

    def issues(self) -> StoredIssues:
        """All there are."""
        return spool_issues.load(self._db)

    def issue_details(self, keys: Sequence[bytes]) -> dict[bytes, Record]:
        """The latest alerts of these issues, as far as they can be read."""
        return spool_issues.details(self._db, keys)

    def probe(self) -> None:
        """Write something small and durable, to learn whether the volume is well again."""
        self._db.execute("UPDATE meta SET value=? WHERE key='end'", (self._end,))

    def _transaction(self, batch: Batch, now: float) -> tuple[int, float]:
        execute = self._db.execute
        size = 0
        block = encode_block(batch.records, compress=batch.compress) if batch.records else None
        if self._db.in_transaction:  # left by a fault: nothing may be acknowledged inside it
            execute("ROLLBACK")
        alone = block is not None and not batch.cursors and not batch.dead and not batch.issues
        if not alone:  # a single statement is a transaction by itself
            execute("BEGIN IMMEDIATE")
        started = time.perf_counter()
        if block is not None:
            codec, crc, payload = block
            execute(
                "INSERT INTO block VALUES (?,?,?,?,?,?,?,?)",
                (
                    self._end,
                    len(batch.records),
                    now,
                    codec,
                    crc,
                    block_cost(len(payload)),
                    sum([record.kind == UNPARSED for record in batch.records]),
                    payload,
                ),
            )
            size = block_cost(len(payload))
        for sink, offset in batch.cursors.items():
            execute("UPDATE cursor SET next=? WHERE sink=?", (offset, sink))
        size += spool_dead.add(self._db, batch.dead)
        for _, changes in batch.issues:
            spool_issues.write(self._db, changes)
        if not alone:
            started = time.perf_counter()
            execute("COMMIT")
        return size, time.perf_counter() - started

    def _settle_alone(self, batch: Batch, now: float) -> frozenset[str]:
        """Cursors go on where records found no room, each sink's by itself: one that cannot write holds up no other.

        Bodies of the receiver's dead letters were not acked. Returns the sinks that could not write.
        """
        failed: set[str] = set()
        letters = [letter for letter in batch.dead if letter.sink != spool_dead.RECEIVER]
        for sink in {
            *batch.cursors,
            *(letter.sink for letter in letters),
            *(name for name, _ in batch.issues),
        }:
            own = Batch(
                [],
                {name: offset for name, offset in batch.cursors.items() if name == sink},
                [letter for letter in letters if letter.sink == sink],
                issues=[(name, changes) for name, changes in batch.issues if name == sink],
            )
            try:
                self._transaction(own, now)
            except Exception:  # noqa: BLE001 - whatever it is, the writer goes on and tries again
                self._rollback()
                failed.add(sink)
        return frozenset(failed)

    def _rollback(self) -> None:
        if self._db.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")

    def _quarantine(self, first: int, n: int, payload: bytes, error: BrokenBlockError) -> None:
        """Set a broken block aside as one dead letter that holds its bytes."""
        log.error("broken block set aside", first=first, alerts=n, error=str(error))
        execute = self._db.execute
        try:
            execute("BEGIN IMMEDIATE")
            letter = DeadLetter(
                sink="spool",
                id=f"block-{first}",
                reason="broken_block",
                detail=f"{n} alerts: {error}",
                at=time.time(),
                body=payload,
            )
            spool_dead.add(self._db, [letter])
            # Emptied, not removed: the other sinks must meet the same gap and count it.
            execute("UPDATE block SET payload=x'', codec=? WHERE first=?", (BROKEN, first))
            execute("COMMIT")
        except sqlite3.Error:
            self._rollback()
            raise

    def _delete_blocks(self, lowest: int) -> tuple[int, int]:
        execute = self._db.execute
        limit = execute(
            "SELECT max(stop) FROM (SELECT first + n AS stop FROM block WHERE first < ? AND first + n <= ?"
            " ORDER BY first LIMIT ?)",
            (lowest, lowest, BLOCKS_PER_DELETE_MAX),
        ).fetchone()[0]
        if limit is None:
            return 0, 0
        execute("BEGIN IMMEDIATE")
        cost, records = execute("SELECT sum(cost), sum(n) FROM block WHERE first < ?", (limit,)).fetchone()
        execute("DELETE FROM block WHERE first < ?", (limit,))
        execute("UPDATE meta SET value=? WHERE key='end'", (self._end,))
        execute("COMMIT")
        return cost, records


def is_full(error: Exception) -> bool:
    """Whether the volume or the database has no room, as against any other fault."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
