"""On-disk format of the spool: one SQLite database, its tables, its block layout, its repair.

Layout (``PRAGMA user_version`` = ``SCHEMA_VERSION``):

``block``       one row per group commit. ``first`` is the offset of its first record; offsets count records
                since the spool was made and never repeat. ``payload`` is the msgpack list of its records
                (``record.Record``), zlib level 1 when ``codec`` is 1, as is when 0, set aside as broken when
                -1; ``crc`` is the CRC-32 of ``payload`` as stored, because SQLite has no page checksums;
                ``cost`` is what the block counts against the byte quota; ``unparsed`` how many of its records are
                bodies nobody could read.
``cursor``      per sink the offset of the first record it has not settled.
``dead``        dead letters with their reason.
``issue``, ``issue_detail``  what aggregation has counted, see ``spool_issues``; since version 2.
``meta``        ``end``: the offset after the last record ever stored, so that an empty spool goes on counting;
                ``spool_id``: random, part of the Ids of findings whose counts are kept here.

Invariants: a block is removed only after every cursor has passed it. Cursors move and dead letters appear in
one transaction. All access is by one connection in one thread (which also keeps clear of the WAL-reset bug
of SQLite before 3.51.3), guarded by a lock file against a second process.

After a crash: WAL brings back exactly the committed transactions. With ``synchronous=FULL`` every commit was
synced; with ``NORMAL`` a killed process loses nothing, a lost node may lose the last seconds.

A database that fails ``quick_check`` is renamed aside, never deleted; what can still be read of it moves into
the new one, in one transaction. A start that is killed meanwhile is gone on with by the next one: until its
blocks are in the new database, the old one is called ``spool.db.salvage-...``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import structlog

from forwarder import spool_issues
from forwarder.record import Record

SCHEMA_VERSION = 2
ISSUES_SINCE = 2
"""The first version with issues and a spool id."""
DATABASE_NAME = "spool.db"
LOCK_NAME = "spool.lock"
PAGE_BYTES = 4096
BLOCK_OVERHEAD_BYTES = 96
PACKED_BYTES_MAX = 1024
UPGRADE_PAGES = 16
BROKEN = -1
COMPRESS_BYTES_MIN = 512
DECOMPRESSED_BYTES_MAX = 256 << 20
BUSY_SECS = 1.0

log = structlog.get_logger("spool")

_SCHEMA = """
CREATE TABLE block (
    first INTEGER PRIMARY KEY, n INTEGER NOT NULL, created REAL NOT NULL,
    codec INTEGER NOT NULL, crc INTEGER NOT NULL, cost INTEGER NOT NULL,
    unparsed INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE TABLE cursor (sink TEXT PRIMARY KEY, next INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE dead (
    number INTEGER PRIMARY KEY AUTOINCREMENT, sink TEXT NOT NULL, id TEXT NOT NULL, reason TEXT NOT NULL,
    detail TEXT NOT NULL, at REAL NOT NULL, body BLOB NOT NULL);
CREATE INDEX dead_by_sink ON dead (sink, number);
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('end', 0);
"""

ENDINGS = ("", "-wal", "-shm", "-journal")
SALVAGE, BROKEN_NAME = ".salvage-", ".broken-"
"""A database set aside is called the first until what it still gives is in the new one, then the second."""

SPOOL_ID, SPOOL_ID_BITS = "spool_id", 48

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Record])


class SpoolUnusableError(Exception):
    """The directory cannot serve as a spool now; the message says why and what to do."""


class BrokenBlockError(Exception):
    """A block's bytes are not what was written."""


class Opened(NamedTuple):
    """A ready database, and whether a broken one had to be set aside."""

    connection: sqlite3.Connection
    quarantined: Path | None


def block_cost(payload_bytes: int) -> int:
    """Bytes of the quota a block takes: small rows share a page, larger ones fill whole pages."""
    size = payload_bytes + BLOCK_OVERHEAD_BYTES
    return size if size <= PACKED_BYTES_MAX else -(-size // PAGE_BYTES) * PAGE_BYTES


def encode_block(records: list[Record], *, compress: bool = True) -> tuple[int, int, bytes]:
    """Codec, CRC and payload of a block."""
    payload = _encoder.encode(records)
    codec = 0
    if compress and len(payload) >= COMPRESS_BYTES_MIN:
        payload, codec = zlib.compress(payload, 1), 1
    return codec, zlib.crc32(payload), payload


def decode_block(codec: int, crc: int, payload: bytes) -> list[Record]:
    """Records of a block.

    Raises:
        BrokenBlockError: CRC, compression or layout is wrong.

    """
    if zlib.crc32(payload) != crc:
        raise BrokenBlockError("CRC mismatch")
    try:
        if codec:
            payload = zlib.decompressobj().decompress(payload, DECOMPRESSED_BYTES_MAX)
        return _decoder.decode(payload)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise BrokenBlockError(str(error)) from error


def lock(directory: Path) -> IO[bytes]:
    """Take the directory for this process; the lock goes with the file handle, also on SIGKILL."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / LOCK_NAME).open("ab")
    except OSError as error:
        raise SpoolUnusableError(
            f"spool directory {directory} cannot be written: {error.strerror or error}"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        raise SpoolUnusableError(
            f"spool directory {directory} is in use by another process; every replica needs a directory of its own"
        ) from error
    return handle


def open_database(directory: Path, *, full_sync: bool, bytes_max: int, suffix: str) -> Opened:
    """Open, check and if needed make the database; set a broken one aside as ``spool.db.broken-<suffix>``.

    Raises:
        SpoolUnusableError: made by a newer version, or the volume does not let us.

    """
    path = directory / DATABASE_NAME
    quarantined = None
    aside = _unfinished(path)
    try:
        try:
            connection = _connect(path, full_sync=full_sync, bytes_max=bytes_max)
            _check(connection)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and not _is_corruption(error):
                raise
            aside.append(_set_aside(path, suffix))
            log.error("spool database is broken, set aside", path=str(aside[-1]), error=str(error))
            connection = _connect(path, full_sync=full_sync, bytes_max=bytes_max)
            _check(connection)
        for broken in aside:
            _salvage(broken, connection)
            quarantined = _rename(broken, broken.with_name(broken.name.replace(SALVAGE, BROKEN_NAME)))
    except sqlite3.Error as error:
        raise SpoolUnusableError(f"spool database {path} cannot be opened: {error}") from error
    return Opened(connection, quarantined)


def _is_corruption(error: sqlite3.OperationalError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def _connect(path: Path, *, full_sync: bool, bytes_max: int) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECS, isolation_level=None, check_same_thread=False)
    wal_pages = max(64, min(4096, bytes_max // PAGE_BYTES // 64))
    try:
        for pragma in (
            f"page_size={PAGE_BYTES}",
            "locking_mode=EXCLUSIVE",
            "journal_mode=WAL",
            f"synchronous={'FULL' if full_sync else 'NORMAL'}",
            f"wal_autocheckpoint={wal_pages}",
            f"journal_size_limit={wal_pages * PAGE_BYTES * 2}",
            f"max_page_count={(bytes_max + bytes_max // 4) // PAGE_BYTES + 256}",
            "temp_store=MEMORY",
            "mmap_size=0",
            "cache_size=-4096",
            # Some builds wipe freed pages by default, which writes every removed block to the WAL once more.
            "secure_delete=OFF",
        ):
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    """Make a new database, accept a current one, refuse a newer one, raise on a broken one."""
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise SpoolUnusableError(
                f"the spool was written by a newer version (schema {version}, this one knows {SCHEMA_VERSION}); "
                "nothing was touched: run that version, or give this one an empty directory"
            )
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables == 0:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            _add_issues(connection)
        elif version < ISSUES_SINCE and tables:
            _upgrade(connection)
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"quick_check: {verdict}")
        connection.execute("SELECT value FROM meta WHERE key='end'").fetchone()[0]
        spool_id(connection)
    except TypeError as error:
        connection.close()
        raise sqlite3.DatabaseError("meta is empty") from error
    except (sqlite3.Error, SpoolUnusableError):
        connection.close()
        raise


def _add_issues(connection: sqlite3.Connection) -> None:
    """What version 2 has more than version 1; ends the transaction."""
    for statement in spool_issues.SCHEMA.split(";"):
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES (?,?)", (SPOOL_ID, secrets.randbits(SPOOL_ID_BITS)))
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _upgrade(connection: sqlite3.Connection) -> None:
    """From version 1, also where every page that was allowed is in use."""
    ((pages,), (limit,)) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "max_page_count")
    )
    connection.execute(f"PRAGMA max_page_count={max(limit, pages + UPGRADE_PAGES)}")
    connection.execute("BEGIN IMMEDIATE")
    _add_issues(connection)
    connection.execute(f"PRAGMA max_page_count={limit}")


def spool_id(connection: sqlite3.Connection) -> str:
    """Twelve hex digits, the same as long as the database lives."""
    (value,) = connection.execute("SELECT value FROM meta WHERE key=?", (SPOOL_ID,)).fetchone()
    return f"{value:0{SPOOL_ID_BITS // 4}x}"


def _unfinished(path: Path) -> list[Path]:
    """Databases set aside by a start that was killed before all of them was read: still under their first name.

    The new database is made when all files are moved: where it is missing, some may be left behind.
    """
    found = sorted(
        item for item in path.parent.glob(f"{path.name}{SALVAGE}*") if not item.name.endswith(ENDINGS[1:])
    )
    if found and not path.exists():
        _rename(path, found[-1])
    return found


def _set_aside(path: Path, suffix: str) -> Path:
    """Moved away, to be salvaged; it gets its final name when that is done."""
    return _rename(path, path.with_name(f"{path.name}{SALVAGE}{suffix}"))


def _rename(path: Path, aside: Path) -> Path:
    """A database with what belongs to it, durably."""
    for ending in ENDINGS:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{ending}").rename(f"{aside}{ending}")
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return aside


def _salvage(broken: Path, connection: sqlite3.Connection) -> None:
    """Copy what a broken database still gives: whole blocks with a right CRC, cursors, dead letters."""
    try:
        source = sqlite3.connect(f"{broken.as_uri()}?mode=ro", uri=True, isolation_level=None)
    except sqlite3.Error:
        return
    connection.execute("BEGIN IMMEDIATE")
    with contextlib.closing(source):
        (fresh_id,) = connection.execute("SELECT value FROM meta WHERE key=?", (SPOOL_ID,)).fetchone()
        whole = {table: _copy(table, source, connection) for table in _SALVAGED}
        if not whole["issue"]:
            # Counts may be lost: no finding may go on under an Id whose count would fall.
            connection.execute("UPDATE meta SET value=? WHERE key=?", (fresh_id, SPOOL_ID))
        blocks = 0
        for row in _readable(source):
            blocks += 1
            connection.execute(
                "INSERT OR REPLACE INTO block VALUES (?,?,?,?,?,?,?,?)", _verified(row, connection)
            )
    connection.execute(
        "UPDATE meta SET value = max(value, (SELECT coalesce(max(first + n), 0) FROM block),"
        " (SELECT coalesce(max(next), 0) FROM cursor)) WHERE key = 'end'"
    )
    connection.execute("COMMIT")
    log.warning("read what could be read of the broken spool", blocks=blocks, path=str(broken))


_SALVAGED = ("cursor", "dead", "meta", "issue", "issue_detail")


def _copy(table: str, source: sqlite3.Connection, connection: sqlite3.Connection) -> bool:
    """What can be read of a table; whether that was all of it."""
    try:
        for row in source.execute(f"SELECT * FROM {table}"):  # noqa: S608 - fixed names
            marks = ",".join("?" * len(row))
            connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", row)  # noqa: S608
    except sqlite3.Error:
        return False
    return True


def _readable(source: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """Blocks until the database gives no more."""
    with contextlib.suppress(sqlite3.Error):
        yield from source.execute("SELECT * FROM block ORDER BY first")


def _verified(row: tuple[Any, ...], connection: sqlite3.Connection) -> tuple[Any, ...]:
    """A block as it is, or emptied and marked, with its bytes as a dead letter, so that every sink counts the gap."""
    first, n, created, codec, crc, cost, unparsed, payload = row
    try:
        if codec != BROKEN:
            decode_block(codec, crc, payload)
    except BrokenBlockError as error:
        connection.execute(
            "INSERT INTO dead (sink, id, reason, detail, at, body) SELECT 'spool',?1,'broken_block',?2,?3,?4"
            " WHERE NOT EXISTS (SELECT 1 FROM dead WHERE sink = 'spool' AND id = ?1)",
            (f"block-{first}", f"{n} alerts: {error}", created, payload),
        )
        return (first, n, created, BROKEN, crc, cost, unparsed, b"")
    return row
