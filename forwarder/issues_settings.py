"""Settings of aggregation: which alerts make one finding, how often it is told again, how much is remembered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from forwarder.config import setting
from forwarder.issue_key import DEFAULT_KEY, KEY_PARTS_MAX, fault_of

FLUSHES_MAX, FLUSH_SECS_MIN, FLUSH_SECS_MAX = 16, 1.0, 86_400.0


class AggregationSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Section ``aggregation`` of a sink for findings."""

    enabled: Annotated[
        bool, setting("One finding for each issue, with a count; off: one finding for each alert.")
    ] = True
    key: Annotated[
        list[str],
        setting(
            "What alerts of one issue have in common, see docs/findings.md; `output_fields.NAME` takes any of Falco's fields."
        ),
    ] = msgspec.field(default_factory=lambda: list(DEFAULT_KEY))
    flush_secs: Annotated[
        list[float],
        setting(
            "After the first finding, the second and so on: how long further alerts are only counted before it is updated. "
            "The last one repeats.",
            unit="seconds",
        ),
    ] = msgspec.field(default_factory=lambda: [60, 300, 900])
    idle_days: Annotated[
        float,
        setting(
            "An issue without alerts is forgotten after so long; what comes then is a new finding.",
            unit="days",
            gt=0,
            le=90,
        ),
    ] = 7
    entries_max: Annotated[
        int,
        setting(
            "Most issues to remember, 300 to 700 bytes of memory each. Those longest without an alert go first.",
            unit="issues",
            ge=16,
            le=1_000_000,
        ),
    ] = 50_000
    archive_after_idle_days: Annotated[
        float,
        setting(
            "Archive the finding of an issue without alerts after so long, once; 0: never. Less than `idle_days`.",
            unit="days",
            ge=0,
            le=90,
        ),
    ] = 0

    def faults(self) -> Iterator[tuple[str, str]]:
        wrong = [fault for fault in map(fault_of, self.key) if fault]
        if wrong:
            yield "key", "; ".join(wrong)
        if not self.key or len(self.key) > KEY_PARTS_MAX:
            yield "key", f"must have 1 to {KEY_PARTS_MAX} parts"
        elif "rule" not in self.key and not wrong:
            yield "key", "must have rule: findings of different rules cannot be one"
        if not 1 <= len(self.flush_secs) <= FLUSHES_MAX:
            yield "flush_secs", f"must have 1 to {FLUSHES_MAX} times"
        elif not all(FLUSH_SECS_MIN <= secs <= FLUSH_SECS_MAX for secs in self.flush_secs):
            yield "flush_secs", f"each must be from {FLUSH_SECS_MIN:g} to {FLUSH_SECS_MAX:g} seconds"
        if self.archive_after_idle_days >= self.idle_days:
            yield "archive_after_idle_days", "must be less than idle_days, or 0"
