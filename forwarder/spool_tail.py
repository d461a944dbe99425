"""The spool's tail: the records stored last, still decoded, for sinks that are up to date.

Job: spare a read and a decompression per sink and alert in the usual case. Bounded in bytes; what falls out is on disk.
Blocks are in the order of their offsets and without gaps.
"""

from __future__ import annotations

from bisect import bisect_right

from forwarder.record import Record


class Tail:
    """The newest blocks, up to ``bytes_max`` (the newest one always)."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._starts: list[int] = []
        self._blocks: dict[int, tuple[list[Record], int]] = {}
        self.size_bytes = 0

    def add(self, first: int, records: list[Record], size_bytes: int) -> None:
        """The block that begins at offset ``first``; forgets the oldest ones beyond the limit."""
        self._blocks[first] = (records, size_bytes)
        self._starts.append(first)
        self.size_bytes += size_bytes
        while self.size_bytes > self._bytes_max and len(self._starts) > 1:
            _, gone = self._blocks.pop(self._starts.pop(0))
            self.size_bytes -= gone

    def read(self, offset: int, *, records_max: int, bytes_max: int) -> list[Record] | None:
        """Records from ``offset`` on, whole blocks, until a limit is passed; None where they are not here."""
        if not self._starts or offset < self._starts[0]:
            return None
        records: list[Record] = []
        size = 0
        for first in self._starts[bisect_right(self._starts, offset) - 1 :]:
            block, block_bytes = self._blocks[first]
            records += block[offset - first :] if first < offset else block
            size += block_bytes
            if size >= bytes_max or len(records) >= records_max:
                break
        return records
