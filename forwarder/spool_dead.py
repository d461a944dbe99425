"""Dead letters in the spool's database: what no sink will take, with the reason, kept for a person.

They count against the quota. Those of the sinks stay for their retention: they were acknowledged. Bodies nobody could read
(of ``receiver``) were not, and have a share of their own; the oldest go first.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import structlog

from forwarder.record import DeadLetter

RECEIVER = "receiver"
PAGE_MAX = 1000

log = structlog.get_logger("spool")


def add(db: sqlite3.Connection, letters: Sequence[DeadLetter]) -> int:
    """Insert within the caller's transaction; returns their bytes."""
    for letter in letters:
        db.execute(
            "INSERT INTO dead (sink, id, reason, detail, at, body) VALUES (?,?,?,?,?,?)",
            (letter.sink, letter.id, letter.reason, letter.detail, letter.at, letter.body),
        )
    return sum(len(letter.body) for letter in letters)


def page(db: sqlite3.Connection, before: int, limit: int) -> list[tuple[int, DeadLetter]]:
    """Newest first, numbers below ``before``."""
    rows = db.execute(
        "SELECT number, sink, id, reason, detail, at, body FROM dead WHERE number < ? ORDER BY number DESC LIMIT ?",
        (before, min(limit, PAGE_MAX)),
    )
    return [
        (number, DeadLetter(sink=sink, id=identity, reason=reason, detail=detail, at=at, body=body))
        for number, sink, identity, reason, detail, at, body in rows
    ]


def count(db: sqlite3.Connection) -> dict[str, int]:
    """How many there are, by sink."""
    return dict(db.execute("SELECT sink, count(*) FROM dead GROUP BY sink"))


def expire(db: sqlite3.Connection, oldest: float, *, unparsed_bytes_max: int) -> tuple[int, int]:
    """Remove those set aside before ``oldest``, and unparsed bodies beyond their share: how many, and their bytes."""
    removed, freed = db.execute(
        "SELECT count(*), coalesce(sum(length(body)),0) FROM dead WHERE at < ?", (oldest,)
    ).fetchone()
    if removed:
        db.execute("DELETE FROM dead WHERE at < ?", (oldest,))
    (unparsed,) = db.execute(
        "SELECT coalesce(sum(length(body)),0) FROM dead WHERE sink=?", (RECEIVER,)
    ).fetchone()
    while unparsed > unparsed_bytes_max:
        number, size = db.execute(
            "SELECT number, length(body) FROM dead WHERE sink=? ORDER BY number LIMIT 1", (RECEIVER,)
        ).fetchone()
        db.execute("DELETE FROM dead WHERE number=?", (number,))
        unparsed -= size
        freed += size
        removed += 1
    if removed:
        log.warning("dead letters past their retention removed", count=removed)
    return removed, freed
