"""A spool's volume in trouble, made of SQLite's own refusals: read-only, full, slow."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from forwarder.spool import Spool


@contextlib.contextmanager
def refusing(spool: Spool) -> Iterator[None]:
    """Every write is refused, as on a volume remounted read-only."""
    database = spool._store._db
    database.execute("PRAGMA query_only=1")
    try:
        yield
    finally:
        database.execute("PRAGMA query_only=0")


@contextlib.contextmanager
def full(spool: Spool) -> Iterator[None]:
    """No page more: SQLITE_FULL for whatever does not fit into the free ones."""
    database = spool._store._db
    (before,) = database.execute("PRAGMA max_page_count").fetchone()
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count={pages}")
    try:
        yield
    finally:
        database.execute(f"PRAGMA max_page_count={before}")


class Gate:
    """Holds every commit in the writer thread, before it begins, until opened."""

    def __init__(self, spool: Spool, *, first_fails: bool = False) -> None:
        """With ``first_fails`` the first commit through the gate is refused by the volume."""
        self._spool = spool
        self._write = spool._store.write
        self._open = threading.Event()
        self._first_fails = first_fails
        spool._store.write = self._gated  # type: ignore[method-assign,assignment]

    def open(self) -> None:
        self._open.set()

    def _gated(self, *arguments: Any) -> Any:
        assert self._open.wait(20)
        if self._first_fails:
            self._first_fails = False
            with refusing(self._spool):
                return self._write(*arguments)
        return self._write(*arguments)
