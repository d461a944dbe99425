"""What keeps a full volume from stopping the spool: a quota that fits it, and a file to throw overboard.

A full volume live-locks SQLite: even a cursor update needs room in the write-ahead log. So the quota is at most five
eighths of the volume, and a ballast file larger than the log is given up on a real ENOSPC, so that cursors and deletes go
on and make room. It is written again as soon as there is room for it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import structlog

BALLAST_NAME = "spool.ballast"
BALLAST_BYTES_MAX = 16 << 20
VOLUME_SHARE = 5 / 8
"""Largest part of the volume the quota may be; the rest is for index, log, ballast and page slack."""

log = structlog.get_logger("spool")


def fitting_bytes(directory: Path, bytes_max: int) -> int:
    """The quota, lowered where the volume cannot hold it."""
    volume = os.statvfs(directory)
    fitting = int(volume.f_blocks * volume.f_frsize * VOLUME_SHARE)
    if fitting >= bytes_max:
        return bytes_max
    log.warning("spool.bytes_max is too much for the volume, lowered", asked=bytes_max, now=fitting)
    return fitting


class Ballast:
    """A file of an eighth of the quota, at most 16 MiB."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self._directory = directory
        self._path = directory / BALLAST_NAME
        self._size_bytes = max(1, min(BALLAST_BYTES_MAX, bytes_max // 8))

    def give_up(self) -> None:
        """Hand its room to the database."""
        with contextlib.suppress(OSError):
            self._path.unlink()
            log.warning("volume is full, ballast given up: new alerts wait, delivery goes on")

    def secure(self) -> bool:
        """Whether it is in place, writing it where it is missing and there is room."""
        try:
            if self._path.exists() and self._path.stat().st_size == self._size_bytes:
                return True
            volume = os.statvfs(self._directory)
            if volume.f_bavail * volume.f_frsize < 2 * self._size_bytes:
                return False
            descriptor = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self._size_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                self._path.unlink()
            return False
        return True
