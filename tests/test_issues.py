"""The table of issues and its order against models so simple that they can be believed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from forwarder.issue import Claim, Issue, Sighting, identity, pack, unpack
from forwarder.issues import Issues
from forwarder.issues_due import AGED_SHARE, Clock, Due
from forwarder.issues_settings import AggregationSettings
from forwarder.record import Record
from forwarder.spool_values import IssueRow, StoredIssues
from tests.counted import alert
from tests.samples import record_of

RECORD = record_of(alert())
ENTRIES_MAX = 16
KEYS = [bytes([number]) * 16 for number in range(24)]
HOUR_SECS = 3600


class Disk:
    """What the spool would have: every change is applied at once, as delivery submits it in the turn that made it."""

    def __init__(self) -> None:
        self.rows: dict[bytes, IssueRow] = {}
        self.details: dict[bytes, Record] = {}
        self.generation = 0

    def write(self, issues: Issues) -> None:
        changes = issues.changes()
        assert not issues.has_changes()
        if changes is None:
            return
        self.rows |= {row.key: row for row in changes.rows}
        self.details |= dict(changes.details)
        for key in (*changes.details_removed, *changes.removed):
            self.details.pop(key, None)
        for key in changes.removed:
            del self.rows[key]
        if changes.generation is not None:
            assert changes.generation > self.generation
            self.generation = changes.generation

    def stored(self) -> StoredIssues:
        return StoredIssues(sorted(self.rows.values(), key=lambda row: row.touched_ms), self.generation, ())


class World:
    """The table, its disk, and what was promised about every Id so far."""

    def __init__(self, **options: Any) -> None:
        self.monotonic, self.skew = 1_000_000.0, 0.0
        self.settings = AggregationSettings(idle_days=1, flush_secs=[60, 300], **options)
        self.disk = Disk()
        self.flying: list[Claim] = []
        self.counted = self.told = self.attempts = 0
        self.waiting: dict[bytes, int] = {}
        """By key: alerts counted and not told."""
        self.history: dict[str, Issue] = {}
        self.start()

    def start(self) -> None:
        """As after SIGKILL: all there is comes from the disk."""
        self.flying = []
        self.issues = Issues(
            self.settings,
            Clock(lambda: int((self.monotonic + self.skew) * 1000), lambda: self.monotonic),
            aging_secs=300,
            entries_max=ENTRIES_MAX,
            details_bytes_max=1 << 20,
        )
        assert self.issues.load(self.disk.stored()) == 0

    def count(self, key: bytes, level: int) -> None:
        self.monotonic += 0.001
        if self.issues.count(key, Sighting(RECORD, level, "Notice", "")):
            self.counted += 1
            self.waiting[key] = self.waiting.get(key, 0) + 1
        else:
            assert key not in self.disk.rows, "a known issue always has room"
            assert len(self.issues) >= ENTRIES_MAX
        self.disk.write(self.issues)

    def claim(self, count_max: int) -> None:
        claims = self.issues.claim(count_max)
        self.disk.write(self.issues)
        for claim in claims:
            assert claim.key not in {other.key for other in self.flying}, "one call at a time for one issue"
            assert claim.key in self.disk.details, "the latest alert is there"
            assert unpack(self.disk.rows[claim.key].state).updated_ms == claim.issue.updated_ms
            self._promised(identity(claim.key, claim.issue), claim.issue)
        self.flying += claims

    def _promised(self, name: str, issue: Issue) -> None:
        before = self.history.get(name)
        assert issue.count > issue.told or issue.urgent, "nothing is told for nothing"
        if before is not None:
            assert issue.updated_ms > before.updated_ms
            assert issue.created_ms == before.created_ms
            assert issue.count >= before.count
            assert issue.level >= before.level
        assert 0 < issue.created_ms <= issue.updated_ms
        self.history[name] = issue

    def settle(self, place: int) -> None:
        if not self.flying:
            return
        claim = self.flying.pop(place % len(self.flying))
        told = self.issues.settle(claim)
        self.told += told
        self.waiting[claim.key] -= told
        self.disk.write(self.issues)

    def put_back(self, place: int, delay_secs: float) -> None:
        if self.flying:
            self.issues.put_back(self.flying.pop(place % len(self.flying)), delay_secs)

    def check(self) -> None:
        rows = {key: unpack(row.state) for key, row in self.disk.rows.items()}
        assert len(self.issues) == len(rows) <= ENTRIES_MAX
        for key, count in self.waiting.items():
            untold = rows[key].untold if key in rows else 0
            assert untold == count, "what waits is never forgotten, and is exact"
        assert self.issues.untold == sum(self.waiting.values()) == self.counted - self.told
        assert 0 <= self.issues.due_alerts <= self.issues.untold
        assert self.issues.details_bytes == sum(row.detail_bytes for row in rows.values())
        assert self.disk.details.keys() == {key for key, row in rows.items() if row.detail_bytes}
        assert {key for key, count in self.waiting.items() if count} <= self.disk.details.keys()


_operation = st.one_of(
    st.tuples(st.just("count"), st.sampled_from(KEYS), st.integers(0, 4)),
    st.tuples(st.just("count"), st.sampled_from(KEYS[:4]), st.just(1)),
    st.tuples(st.just("claim"), st.integers(1, 8)),
    st.tuples(st.just("settle"), st.integers(0, 7)),
    st.tuples(st.just("put_back"), st.integers(0, 7), st.sampled_from((0.0, 5.0))),
    st.tuples(st.just("pass"), st.sampled_from((1.0, 60.0, 301.0, 13 * HOUR_SECS))),
    st.tuples(st.just("skew"), st.sampled_from((-HOUR_SECS, -0.5, 0.5, HOUR_SECS))),
    st.tuples(st.just("housekeep")),
    st.tuples(st.just("hurry")),
    st.tuples(st.just("start")),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_operation, max_size=80), st.sampled_from((0.0, 0.5)))
def test_the_table_keeps_its_promises(operations: Sequence[tuple[Any, ...]], archive_days: float) -> None:
    """Whatever is counted, told, refused, forgotten, and whenever it is killed: exact, bounded, and no Id goes back."""
    world = World(archive_after_idle_days=archive_days)
    for name, *values in operations:
        match name:
            case "pass":
                world.monotonic += values[0]
            case "skew":
                world.skew += values[0]
            case "housekeep" | "hurry":
                getattr(world.issues, name)()
                world.disk.write(world.issues)
            case _:
                getattr(world, name)(*values)
        world.check()
    while world.flying:
        world.settle(0)
    for _ in range(3):  # a claim that was overtaken waits for its time once more
        world.monotonic += 600
        while world.issues.due:
            world.claim(100)
            while world.flying:
                world.settle(0)
    assert world.issues.untold == world.issues.due_alerts == 0
    world.check()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(KEYS), max_size=120))
def test_the_one_longest_without_an_alert_is_forgotten(keys: Sequence[bytes]) -> None:
    """The order is that of the last alert, whenever it was told, and a start in between changes nothing."""
    world = World()
    order: list[bytes] = []
    for place, key in enumerate(keys):
        if key in order:
            order.remove(key)
        elif len(order) == ENTRIES_MAX:
            order.pop(0)
        order.append(key)
        world.count(key, 1)
        if place % 7 == 6:
            world.start()
        world.claim(100)
        while world.flying:
            world.settle(0)
        world.issues.hurry()
        world.claim(100)
        while world.flying:
            world.settle(0)
        assert set(world.disk.rows) == set(order)


def test_a_forgotten_issue_never_gets_its_old_id_again() -> None:
    """The generation goes up whenever something is forgotten, also over a start."""
    world = World()
    for _ in range(5):
        for key in KEYS:
            world.count(key, 1)
            world.claim(100)
            world.settle(0)
        world.start()
    assert len(world.history) == 5 * len(KEYS), "each of them had to be begun anew"
    assert all(issue.count == 1 for issue in world.history.values())


def test_a_packed_issue_is_what_it_was() -> None:
    world = World()
    world.count(KEYS[0], 3)
    state = world.disk.rows[KEYS[0]].state
    assert pack(unpack(state)) == state


# ---- order ------------------------------------------------------------------------------------------

_turn = st.one_of(
    st.tuples(st.just("push"), st.integers(0, 15), st.integers(0, 4)),
    st.tuples(st.just("later"), st.integers(16, 20), st.sampled_from((5.0, 50.0))),
    st.tuples(st.just("pass"), st.sampled_from((1, 40, 200)), st.none()),
    st.tuples(st.just("take"), st.integers(1, 9), st.none()),
    st.tuples(st.just("settle"), st.integers(0, 15), st.none()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_turn, max_size=60))
def test_the_order_is_severity_but_for_a_quarter(turns: Sequence[tuple[Any, Any, Any]]) -> None:
    """A quarter of each take is for those that have waited half of ``aging_secs``, all levels in turn; the rest by level and age."""
    now = [0.0]
    due = Due(5, aging_secs=100, monotonic=lambda: now[0])
    ticket = itertools.count()
    model: dict[bytes, tuple[int, float, int]] = {}
    later: dict[bytes, float] = {}
    out: dict[bytes, float] = {}
    for name, value, other in turns:
        key = b"%d" % value
        match name:
            case "push":
                if due.level(key) != other:
                    due.push(key, other)
                    model[key] = (other, now[0], next(ticket))
            case "later":
                if not due.is_later(key):
                    due.later(key, other)
                    later[key] = now[0] + other
            case "pass":
                now[0] += value
                assert set(due.ripe()) == {key for key, at in later.items() if at <= now[0]}
                later = {key: at for key, at in later.items() if at > now[0]}
            case "settle":
                due.settled(key)
                out.pop(key, None)
            case _:
                old = sorted((k for k in model if model[k][1] <= now[0] - 50), key=lambda k: model[k][2])
                places = {
                    k: sum(model[o][0] == model[k][0] for o in old[:place]) for place, k in enumerate(old)
                }
                aged = sorted(old, key=lambda k: (places[k], model[k][0]))
                chosen = aged[: value // AGED_SHARE]
                rest = sorted(model.keys() - set(chosen), key=lambda k: (-model[k][0], model[k][2]))
                expected = chosen + rest[: value - len(chosen)]
                taken = due.take(value)
                assert {w.key for w in taken[: len(chosen)]} == set(chosen)
                assert [w.key for w in taken[len(chosen) :]] == expected[len(chosen) :]
                assert all(w.since == model[w.key][1] for w in taken)
                for key in expected:
                    out[key] = min(model.pop(key)[1], out.get(key, now[0]))
        assert len(due) == len(model)
        oldest = max(
            (now[0] - since for since in (*(it[1] for it in model.values()), *out.values())), default=0.0
        )
        assert due.oldest_secs() == oldest
