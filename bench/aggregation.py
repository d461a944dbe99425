"""What aggregation costs: microseconds for each alert, and memory under a flood of distinct keys: ``python bench/aggregation.py``.

The cost is that of ``Counting.take`` as delivery calls it (reading the alert, its key, its issue), over the real alerts and over alerts
that are all of different issues, each with and without 100 rules. The memory is what the process grows by while 100,000 different issues
are counted and told, with ``entries_max`` at its default.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.rules import rules as a_hundred_rules
from forwarder.asff import SEVERITIES
from forwarder.delivery_admission import Admission
from forwarder.delivery_counting import Counting
from forwarder.facts import facts_of
from forwarder.issue_key import key_of
from forwarder.issues import Issues
from forwarder.issues_due import Clock
from forwarder.issues_settings import AggregationSettings
from forwarder.record import Record
from forwarder.rules import RuleBook
from tests.samples import REAL_BODIES, body_of, record_of

ROUNDS, REPEATS = 5, 60
KEYS = 100_000
SLICE = 128
AROUND = (
    b'"kubernetes":{"namespace":"shop","pod":"web-7d4b9-x2x1z","workload":{"kind":"Deployment","name":"web"},'
    b'"labels":{"app":"web","team":"shop"},"node":"ip-10-0-1-17"}'
)


def counting(rules: bool) -> tuple[Issues, Counting]:
    """The sink's side of delivery, without a sink."""
    settings = AggregationSettings()
    issues = Issues(
        settings,
        Clock(lambda: int(time.time() * 1000), time.monotonic),
        aging_secs=300,
        entries_max=settings.entries_max,
        details_bytes_max=1 << 40,
    )
    sink: Any = SimpleNamespace(name="security_hub", minimum_rank=5, findings_only=True)
    book = RuleBook(a_hundred_rules() if rules else (), now=time.time)
    return issues, Counting(
        "security_hub",
        issues,
        admission=Admission(sink, book),
        severities=SEVERITIES["default"],
        key=key_of(settings.key),
        complete=lambda record: record,
        now=time.time,
    )


def different(count: int, start: int = 0) -> list[Record]:
    """Alerts of different issues, of the usual size."""
    body = json.loads(REAL_BODIES[0])
    fields = body["output_fields"] | {"k8s.ns.name": "shop"}
    return [
        record_of(
            body_of(
                body
                | {
                    "priority": "Warning",
                    "rule": f"Rule {number % 50}",
                    "output_fields": fields | {"k8s.pod.name": f"web-{number}-{random.getrandbits(40):x}"},
                }
            )
        )
        for number in range(start, start + count)
    ]


def cost(records: Sequence[Record], repeats: int, *, rules: bool) -> float:
    """Microseconds for each alert, the best of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        issues, taker = counting(rules)
        slices = [list(records[at : at + SLICE]) for at in range(0, len(records), SLICE)]
        started = time.perf_counter()
        for _ in range(repeats):
            for part in slices:
                assert taker.take(part).taken == len(part)
                issues.changes()
        best = min(best, (time.perf_counter() - started) / repeats / len(records))
    return best * 1e6


def reading(records: Sequence[Record]) -> float:
    """Microseconds for reading an alert, which rules and aggregation share."""
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(REPEATS):
            for record in records:
                facts_of(record)
        best = min(best, (time.perf_counter() - started) / REPEATS / len(records))
    return best * 1e6


def flood() -> tuple[float, int]:
    """MiB grown while 100,000 different issues are counted and told; how many were forgotten."""
    issues, taker = counting(rules=False)
    taker.take(different(SLICE))
    before = _resident_mib()
    largest = 0.0
    for start in range(0, KEYS, SLICE):
        taker.take(different(SLICE, SLICE + start))
        issues.changes()
        if start >= KEYS // 4:  # before that the hub was slow
            for _ in range(2):
                for claim in issues.claim(100):
                    issues.settle(claim)
            issues.changes()
        largest = max(largest, _resident_mib())
    return largest - before, issues.evicted


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def main() -> None:
    grown, evicted = flood()
    real = [record_of(body, enrichment=AROUND) for body in REAL_BODIES]
    distinct = different(20_000)
    figures = {
        "read_us": reading(real),
        "count_us": cost(real, REPEATS, rules=False),
        "count_with_100_rules_us": cost(real, REPEATS, rules=True),
        "count_distinct_us": cost(distinct, 1, rules=False),
        "flood_mib": grown,
    }
    for name, value in figures.items():
        print(f"{name:<26} {value:8.2f}")
    print(f"({KEYS} issues counted, {evicted} forgotten)")
    build = Path(__file__).parent.parent / "build"
    build.mkdir(exist_ok=True)
    (build / "bench-aggregation.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
