"""Issues in the spool's database: what aggregation has counted, in the same transaction as the cursor it was counted under.

``issue`` has one row for each issue (``issue.Issue``, packed), ``issue_detail`` the latest alert of those whose finding still has to
be told, ``meta`` the generation (see ``issues``). SQLite has no page checksums, so each value begins with its CRC-32.

They do not count against the byte quota: their number and their bytes are bounded by ``issues.Issues``, and there is room beside the quota.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Sequence

import msgspec
import structlog

from forwarder.record import Record
from forwarder.spool_values import IssueChanges, IssueRow, StoredIssues

SCHEMA = """
CREATE TABLE issue (key BLOB PRIMARY KEY, touched INTEGER NOT NULL, state BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE issue_detail (key BLOB PRIMARY KEY, record BLOB NOT NULL);
"""
GENERATION = "issue_generation"
CRC_BYTES = 4

log = structlog.get_logger("spool")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def write(db: sqlite3.Connection, changes: IssueChanges) -> None:
    """Within the caller's transaction."""
    db.executemany(
        "INSERT OR REPLACE INTO issue VALUES (?,?,?)",
        [(row.key, row.touched_ms, _sealed(row.state)) for row in changes.rows],
    )
    db.executemany(
        "INSERT OR REPLACE INTO issue_detail VALUES (?,?)",
        [(key, _sealed(_encoder.encode(record))) for key, record in changes.details],
    )
    gone = [(key,) for key in (*changes.details_removed, *changes.removed)]
    db.executemany("DELETE FROM issue_detail WHERE key=?", gone)
    db.executemany("DELETE FROM issue WHERE key=?", [(key,) for key in changes.removed])
    if changes.generation is not None:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (GENERATION, changes.generation))


def load(db: sqlite3.Connection) -> StoredIssues:
    """All of them; broken ones are counted and left out."""
    rows: list[IssueRow] = []
    broken: list[bytes] = []
    for key, touched, value in db.execute("SELECT key, touched, state FROM issue ORDER BY touched"):
        state = _opened(value)
        if state is None:
            broken.append(key)
        else:
            rows.append(IssueRow(key, touched, state))
    found = db.execute("SELECT value FROM meta WHERE key=?", (GENERATION,)).fetchone()
    return StoredIssues(rows, found[0] if found else 0, broken)


def details(db: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Record]:
    """Latest alerts by key; a broken or missing one is left out."""
    found: dict[bytes, Record] = {}
    for key in keys:
        row = db.execute("SELECT record FROM issue_detail WHERE key=?", (key,)).fetchone()
        packed = _opened(row[0]) if row else None
        if packed is None:
            continue
        try:
            found[key] = _decoder.decode(packed)
        except msgspec.MsgspecError as error:
            log.error("an issue's latest alert cannot be read", error=str(error))
    return found


def _sealed(value: bytes) -> bytes:
    return zlib.crc32(value).to_bytes(CRC_BYTES) + value


def _opened(value: bytes) -> bytes | None:
    content = value[CRC_BYTES:]
    return content if zlib.crc32(content).to_bytes(CRC_BYTES) == value[:CRC_BYTES] else None
