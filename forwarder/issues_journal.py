"""What changed in the table of issues since it was last handed to the spool. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from forwarder.record import Record
from forwarder.spool_values import IssueChanges, IssueRow


class Journal:
    """Collects changes until ``take``. The last word on a key wins."""

    def __init__(self) -> None:
        self._changed: dict[bytes, int] = {}
        self._details: dict[bytes, Record] = {}
        self._details_removed: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}
        self._generation: int | None = None

    def __bool__(self) -> bool:
        return bool(self._changed or self._removed or self._details_removed or self._generation is not None)

    def changed(self, key: bytes, touched_ms: int) -> None:
        """The issue is another one now."""
        self._changed[key] = touched_ms
        self._removed.pop(key, None)

    def detail(self, key: bytes, record: Record) -> None:
        """Its latest alert."""
        self._details[key] = record
        self._details_removed.pop(key, None)

    def detail_removed(self, key: bytes) -> None:
        """Its latest alert is not needed any more."""
        self._details.pop(key, None)
        self._details_removed[key] = None

    def removed(self, key: bytes) -> None:
        """It is forgotten."""
        self._changed.pop(key, None)
        self._details.pop(key, None)
        self._details_removed.pop(key, None)
        self._removed[key] = None

    def forgot(self, generation: int) -> None:
        """The table's generation is another one now."""
        self._generation = generation

    def take(self, table: Mapping[bytes, bytes]) -> IssueChanges | None:
        """All of it, with the packed issues of ``table``; None where there is nothing."""
        if not self:
            return None
        changes = IssueChanges(
            [IssueRow(key, touched_ms, table[key]) for key, touched_ms in self._changed.items()],
            list(self._details.items()),
            list(self._details_removed),
            list(self._removed),
            self._generation,
        )
        self._changed, self._details, self._details_removed, self._removed = {}, {}, {}, {}
        self._generation = None
        return changes
