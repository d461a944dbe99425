"""Attacks on aggregation: each test holds a promise that a reviewer found broken."""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from forwarder import delivery_findings, spool
from forwarder.contract import Blocked, Transient
from forwarder.delivery_findings import ISSUE_BYTES
from forwarder.ingest import STORED
from forwarder.issue import LABELS, Issue, Sighting, begun, pack
from forwarder.issues import Issues
from forwarder.issues_due import Clock
from forwarder.issues_settings import AggregationSettings
from forwarder.metrics import Metrics
from forwarder.notice import Notice
from forwarder.record import Record
from forwarder.rules_settings import MatchSettings, RuleSettings, SilenceSettings
from forwarder.spool import Spool
from forwarder.spool_settings import SpoolSettings
from forwarder.spool_values import IssueRow, StoredIssues
from tests.counted import HUB, LOGS, Pipeline, alert
from tests.samples import body_of, record_of
from tests.scripted import inline
from tests.volume import refusing

pytestmark = pytest.mark.looptime

DAY_SECS = 86_400
Build = Callable[..., Awaitable[Pipeline]]


@pytest.fixture(autouse=True)
def nothing_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the check for blocking calls: in simulated time the spool writes on the loop, and cleans up less often."""
    monkeypatch.setattr(spool, "HOUSEKEEPING_SECS", 60.0)
    monkeypatch.setattr(delivery_findings, "HOUSEKEEPING_SECS", 300.0)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A day has many debug lines."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture
async def build(tmp_path: Path) -> AsyncIterator[Build]:
    made: list[Pipeline] = []

    async def start(**settings: Any) -> Pipeline:
        pipeline = Pipeline(tmp_path, **settings)
        made.append(pipeline)
        await pipeline.start()
        return pipeline

    yield start
    for pipeline in made:
        await pipeline.kill()


def notice(
    pipeline: Pipeline, node: str = "node-1", *, active: bool = True, enrichment: bytes = b""
) -> Notice:
    """What the watch over sensors says of a node."""
    body = {"rule": "Falco sensor silent", "output": "silent", "priority": "Notice", "source": "forwarder"}
    record = replace(record_of(body), time_ns=int(pipeline.now() * 1e9), enrichment=enrichment)
    return Notice(
        f"sensor/{node}", f"Falco sensor silent on node {node}", "LOW", active=active, record=record
    )


class Table:
    """Issues without anything around them; time stands still unless it is moved."""

    def __init__(self, *, aging_secs: float = 300, entries_max: int = 50_000, **settings: Any) -> None:
        self.secs = 1_000_000.0
        self.issues = Issues(
            AggregationSettings(**settings),
            Clock(lambda: int(self.secs * 1000), lambda: self.secs),
            aging_secs=aging_secs,
            entries_max=entries_max,
            details_bytes_max=1 << 30,
        )

    def count(self, key: str, *, level: int = 1) -> bool:
        record = record_of(alert(key))
        return self.issues.count(key.encode().ljust(16), Sighting(record, level, "Notice", ""))

    def tell(self) -> list[bytes]:
        claims = self.issues.claim(100)
        for claim in claims:
            self.issues.settle(claim)
        return [claim.key.strip() for claim in claims]


# ---- notices ----------------------------------------------------------------------------------------


async def test_a_notice_that_comes_back_keeps_its_creation_and_its_count(build: Build) -> None:
    """For one Id ``CreatedAt`` never changes and ``falco/count`` never falls, also after the archive."""
    pipeline = await build()
    for _ in range(2):
        for active in (True, False):
            await pipeline.worker.tell(notice(pipeline, active=active))
            await asyncio.sleep(100)
    (versions,) = pipeline.hub.history.values()
    assert len(versions) == 4
    assert pipeline.hub.broken_promises() == []


async def test_a_notice_that_comes_back_is_newer_although_the_clock_stepped_back(build: Build) -> None:
    """``UpdatedAt`` grows over an archive too; else the service ignores that the sensor is silent again."""
    pipeline = await build()
    for active in (True, False):
        await pipeline.worker.tell(notice(pipeline, active=active))
        await asyncio.sleep(100)
    pipeline.skew_secs -= 3600
    await pipeline.worker.tell(notice(pipeline))
    await asyncio.sleep(100)
    (finding,) = pipeline.hub.latest.values()
    assert finding["RecordState"] == "ACTIVE"


async def test_a_notice_does_not_keep_idle_issues_from_being_archived(build: Build) -> None:
    """A notice that is told again and again stays where it is in the table: what is behind it is looked at all the same."""
    pipeline = await build(aggregation=AggregationSettings(archive_after_idle_days=1))
    await pipeline.worker.tell(notice(pipeline))
    await pipeline.post(alert())
    for _ in range(12):
        await asyncio.sleep(DAY_SECS / 4)
        await pipeline.worker.tell(notice(pipeline))
    (finding,) = [f for f in pipeline.hub.latest.values() if "sensor" not in f["Id"]]
    assert finding["RecordState"] == "ARCHIVED"


async def test_notices_leave_room_for_issues(build: Build) -> None:
    """As many silent nodes as the table has entries: alerts are counted and told all the same."""
    pipeline = await build(aggregation=AggregationSettings(entries_max=16))
    for number in range(16):
        await pipeline.worker.tell(notice(pipeline, f"node-{number}"))
    await asyncio.sleep(10)
    await pipeline.post(alert())
    await asyncio.sleep(600)
    assert len([f for f in pipeline.hub.latest.values() if "sensor" not in f["Id"]]) == 1


# ---- forgetting and archiving -----------------------------------------------------------------------


def test_every_idle_issue_is_archived() -> None:
    """Also those behind the first 2,000: what was archived stays at the head of the table until it is forgotten."""
    table = Table(archive_after_idle_days=1, idle_days=7)
    for number in range(2_100):
        assert table.count(f"rule-{number}")
    while table.tell():
        pass
    archived: set[bytes] = set()
    for _ in range(6 * 24):
        table.secs += 3600
        table.issues.housekeep()
        while told := table.tell():
            archived.update(told)
    assert len(archived) == 2_100


def test_a_smaller_table_is_filled_no_further_than_it_is_large() -> None:
    """``entries_max`` was lowered between two starts: after the next issues it holds."""
    rows = []
    for number in range(500):
        sighting = Sighting(record_of(alert(f"rule-{number}")), 1, "Notice", "")
        told = replace(begun(sighting, kind=0, generation=0, now_ms=number), told=1, urgent=False, step=1)
        rows.append(IssueRow(f"rule-{number}".encode().ljust(16), number, pack(told)))
    table = Table(entries_max=16)
    table.issues.load(StoredIssues(rows, 0))
    for number in range(16):
        assert table.count(f"new-{number}")
        table.tell()
    assert len(table.issues) <= 16


def test_an_alert_of_the_future_keeps_no_other_issue() -> None:
    """The clock was a year ahead for one alert: what came after it is forgotten in its time all the same."""
    table = Table(idle_days=1)
    wall = {"ahead": 0}
    table.issues._clock = Clock(lambda: int(table.secs * 1000) + wall["ahead"], lambda: table.secs)
    wall["ahead"] = 365 * DAY_SECS * 1000
    assert table.count("early")
    wall["ahead"] = 0
    for number in range(10):
        assert table.count(f"rule-{number}")
    table.tell()
    table.secs += 3 * DAY_SECS
    table.issues.housekeep()
    assert len(table.issues) == 1


async def test_a_silence_does_not_swallow_the_archiving(build: Build) -> None:
    """What is silenced while it is idle is archived all the same: nobody will ever try again."""
    pipeline = await build(aggregation=AggregationSettings(archive_after_idle_days=1))
    await pipeline.post(alert())
    await pipeline.quiet()
    silence = SilenceSettings(until="2027-01-17T20:00:00Z", reason="maintenance", by="me")
    pipeline.book.replace([RuleSettings(match=MatchSettings(), silence=silence)])
    await asyncio.sleep(5 * DAY_SECS)
    (finding,) = pipeline.hub.latest.values()
    assert finding["RecordState"] == "ARCHIVED"


# ---- drain and stop ---------------------------------------------------------------------------------


async def test_a_drain_tells_what_was_counted_while_a_call_was_under_way(build: Build) -> None:
    """Everything counted is told without waiting for its time, also what an answer still on its way sends back to waiting."""
    pipeline = await build(linger_secs=0)
    await pipeline.post(alert(nr=0))
    await asyncio.sleep(0.02)
    await pipeline.post(*[alert(nr=number) for number in range(1, 5)])
    await asyncio.sleep(0.01)
    pipeline.worker.drain()
    await asyncio.wait_for(pipeline.tasks[1], 20)
    assert pipeline.worker.status().aggregating == 0
    assert list(pipeline.hub.counts().values()) == [5]


async def test_a_worker_is_cancelled_although_nothing_can_be_written(build: Build) -> None:
    """A volume that takes no writes does not keep the process from ending: ``drain_secs_max`` is the limit."""
    pipeline = await build()
    await pipeline.post(alert())
    task = pipeline.tasks[1]
    with refusing(pipeline.spool):
        await asyncio.sleep(5)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=300)
    await asyncio.wait([task], timeout=300)
    assert done


# ---- failures and patience --------------------------------------------------------------------------


async def test_failures_of_one_moment_cost_one_pause(build: Build) -> None:
    """Four calls under way meet a hub that is off: the next probe comes after one pause, and its success ends it."""
    pipeline = await build()
    calls = iter(range(1_000_000))
    off = {"yes": True}
    fake = pipeline.hub.call

    async def slower(client: None, operation: str, body: bytes) -> dict[str, Any]:
        await asyncio.sleep(next(calls) % 4 * 0.5)
        if off["yes"]:
            raise Blocked("not subscribed")
        return await fake(client, operation, body)

    pipeline.hub.call = slower  # type: ignore[method-assign,assignment]
    await pipeline.ingest.take(b"\n".join(body_of(alert(f"Rule {n}")) for n in range(400)))
    await asyncio.sleep(10)
    off["yes"] = False
    await asyncio.sleep(60 + 5)
    assert len(pipeline.hub.history) == 400


async def test_a_hub_that_was_off_does_not_use_up_the_attempts_of_a_finding(build: Build) -> None:
    """Only refusals of that kind count towards giving up: the first unknown error after an outage is no dead letter."""
    pipeline = await build()
    pipeline.hub.fake.enabled = False
    pipeline.hub.fake.disabled_shape = "finding"
    await pipeline.post(alert())
    await asyncio.sleep(600)
    pipeline.hub.fake.enabled = True
    errors = [("SomethingNew", "try again")]
    pipeline.hub.fake.injected = lambda _: errors.pop() if errors else None
    await pipeline.told()
    assert await pipeline.dead() == []
    assert len(pipeline.hub.history) == 1


async def test_a_finding_that_is_refused_for_a_while_is_not_hammered(build: Build) -> None:
    """Its back-off holds also where counting waits for room."""
    pipeline = await build(aggregation=AggregationSettings(entries_max=16))
    refused: list[float] = []

    def refuse(_: dict[str, Any]) -> tuple[str, str]:
        refused.append(pipeline.now())
        return "InternalFailure", "later"

    pipeline.hub.fake.injected = refuse
    await pipeline.post(*[alert(f"Rule {number}") for number in range(17)])
    await asyncio.sleep(120)
    assert len(refused) <= 16 * 12


async def test_a_finding_that_is_refused_for_a_while_is_not_given_up_early(build: Build) -> None:
    """Five attempts take half a minute also where counting waits for room."""
    pipeline = await build(aggregation=AggregationSettings(entries_max=16))
    until = pipeline.now() + 10
    pipeline.hub.fake.injected = lambda _: ("SomethingNew", "later") if pipeline.now() < until else None
    await pipeline.post(*[alert(f"Rule {number}") for number in range(17)])
    await pipeline.told()
    assert await pipeline.dead() == []


async def test_a_rise_in_priority_does_not_wait_for_a_back_off(build: Build) -> None:
    """CRITICAL is told at once, although a less severe version of the finding was put back for half a minute."""
    pipeline = await build()
    failing = {"yes": True}
    pipeline.hub.fake.injected = lambda _: ("InternalFailure", "later") if failing["yes"] else None
    await pipeline.post(alert(priority="Notice"))
    await asyncio.sleep(65)
    failing["yes"] = False
    await asyncio.sleep(2)
    at = pipeline.now()
    assert not pipeline.hub.history, "still put back"
    await pipeline.post(alert(priority="Critical", nr=1))
    await pipeline.told()
    (versions,) = pipeline.hub.history.values()
    assert versions[0].at - at < 3


# ---- order ------------------------------------------------------------------------------------------


def test_what_goes_back_keeps_its_order() -> None:
    """After a failed call the one that has waited longest is still the first of its severity."""
    table = Table()
    for number in range(10):
        table.count(f"rule-{number}")
        table.secs += 1
    first = table.issues.claim(10)
    for claim in first:
        table.issues.put_back(claim)
    assert [claim.key for claim in table.issues.claim(10)] == [claim.key for claim in first]


def test_what_hangs_in_a_call_waits_no_less() -> None:
    """An endpoint that takes calls and never answers: the age of what it was given goes on, also while it is put off."""
    table = Table()
    table.count("old")
    table.secs += 1000
    (claim,) = table.issues.claim(10)
    table.secs += 100
    assert table.issues.oldest_secs() == 1100
    table.issues.put_back(claim, delay_secs=30)
    table.secs += 20
    assert table.issues.oldest_secs() == 1120
    table.secs += 20
    (claim,) = table.issues.claim(10)
    assert table.issues.oldest_secs() == 1140
    table.issues.settle(claim)
    assert table.issues.oldest_secs() == 0


def test_the_oldest_is_seen_after_a_failed_call() -> None:
    """``oldest_secs``, which is a metric, and what is kept for those that have waited, do not forget who waits longest."""
    table = Table()
    table.count("old")
    table.secs += 1000
    table.count("new")
    for claim in table.issues.claim(10):
        table.issues.put_back(claim)
    assert table.issues.oldest_secs() == 1000


async def test_nothing_starves_under_more_than_fits(build: Build) -> None:
    """HIGH comes at 1.6 times what the service takes; a few LOW need far less than a quarter of it, and wait ``aging_secs`` at most."""
    pipeline = await build(rate_per_sec=0.25, burst=1, aging_secs=60)
    waits: dict[str, float] = {}
    for second in range(300):
        rules = [(f"High {second}-{n}", "Error") for n in range(36)]
        if second % 60 == 0:
            rules.append((f"Low {second}", "Notice"))
            waits[f"Low {second}"] = pipeline.now()
        bodies = [body_of(alert(rule, priority)) for rule, priority in rules]
        assert await pipeline.ingest.take(b"\n".join(bodies)) is STORED
        await asyncio.sleep(0.9)
    await pipeline.told()
    told = {v[0].finding["Title"]: v[0].at for v in pipeline.hub.history.values()}
    assert max(told[rule] - at for rule, at in waits.items()) <= 60


# ---- bounds -----------------------------------------------------------------------------------------


def test_an_issue_is_small_whatever_the_alert_says() -> None:
    """A priority of a megabyte is shown with 64 characters, and must not be remembered for each of 50,000 issues."""
    record = record_of(alert(priority="x" * 1_000_000))
    issue = begun(Sighting(record, 1, "x" * 1_000_000, ""), kind=0, generation=0, now_ms=0)
    assert len(pack(issue)) < 1000


def test_an_issue_takes_no_more_of_the_volume_than_is_planned_for() -> None:
    """A Deployment of ten pods, ids as ingest makes them: ``ISSUE_BYTES`` is "roughly and never too little"."""
    issue = begun(Sighting(record_of(alert()), 1, "Notice", ""), kind=0, generation=0, now_ms=1)
    pods = tuple(f"shop/checkout-api-7d9c6b5f4-{pod:05}" for pod in range(10))
    usual = replace(issue, pods=pods, ids=tuple(f"{number:032x}" for number in range(5)))
    assert len(pack(usual)) <= ISSUE_BYTES


async def test_large_issues_do_not_stop_everything(build: Build) -> None:
    """What the table writes is bounded in bytes: a database it has filled takes no cursor, and no alert, any more."""
    pipeline = await build(bytes_max=8 << 20)
    for number in range(60):
        assert await pipeline.ingest.take(body_of(alert(f"Rule {number}", priority="x" * 500_000))) is STORED
        await asyncio.sleep(0.01)
    await asyncio.sleep(600)
    try:
        assert pipeline.spool.pending(HUB) == 0
        assert pipeline.spool.fill < 1
    finally:
        pipeline.spool._store._db.execute("PRAGMA max_page_count=100000")
        await asyncio.sleep(200)


# ---- upgrade and restart ----------------------------------------------------------------------------


def spool_of(directory: Path, bytes_max: int) -> Spool:
    settings = SpoolSettings(directory=str(directory), sync="normal", bytes_max=bytes_max)
    return inline(Spool(settings, sinks=[LOGS, HUB], metrics=Metrics([LOGS, HUB]), now=lambda: 0.0))


async def test_a_full_spool_of_version_1_is_upgraded(tmp_path: Path) -> None:
    """No page is free: the start makes the tables with the ballast's room, or later; it does not refuse the backlog."""
    first = spool_of(tmp_path, 64 << 20)
    await first.open()
    for number in range(40):
        await first.append([record_of(alert(output=random.Random(number).randbytes(400_000).hex()))])
    await first.close()
    with sqlite3.connect(tmp_path / "spool.db", isolation_level=None) as database:
        database.execute("DROP TABLE issue")
        database.execute("DROP TABLE issue_detail")
        database.execute("DELETE FROM meta WHERE key='spool_id'")
        database.execute("PRAGMA user_version=1")
        database.execute("VACUUM")
    database.close()
    second = spool_of(tmp_path, 8 << 20)
    await second.open()
    assert second.pending(LOGS) == 40
    await second.close()


async def test_a_restart_of_the_worker_keeps_what_the_first_load_decided(build: Build) -> None:
    """A sink that begins at the present does not tell the past because its worker fell over before anything was written."""
    pipeline = await build()
    pipeline.hub.trouble = lambda: Transient("away", code="network")
    await pipeline.post(alert())
    await asyncio.sleep(5)
    await pipeline.kill()
    # Switched off for a while, then on again.
    off = inline(
        Spool(
            SpoolSettings(directory=str(pipeline.directory), sync="normal", bytes_max=pipeline.bytes_max),
            sinks=[LOGS],
            metrics=Metrics([LOGS]),
            now=pipeline.now,
        )
    )
    await off.open()
    await off.close()
    pipeline.hub.trouble = lambda: None
    opened, fell = pipeline.hub.sink.open, {"over": False}

    async def fall_over() -> None:
        if not fell["over"]:
            fell["over"] = True
            raise RuntimeError("not a DeliveryError")
        await opened()

    pipeline.hub.sink.open = fall_over  # type: ignore[method-assign]
    await pipeline.start()
    await asyncio.sleep(0.1)
    with pytest.raises(RuntimeError):
        await pipeline.tasks[1]
    pipeline.tasks[1] = asyncio.create_task(pipeline.worker.run())
    await asyncio.sleep(60)
    assert pipeline.metric("sent_events_total", sink=HUB) == 0
    assert not pipeline.hub.history


async def test_a_broken_issue_is_reported_once(build: Build) -> None:
    """It ends; the next start finds a sound table."""
    pipeline = await build()
    await pipeline.post(alert())
    await pipeline.told()
    await pipeline.kill()
    with sqlite3.connect(pipeline.directory / "spool.db") as database:
        database.execute("UPDATE issue SET state = x'0000000000'")
    database.close()
    broken = 1.0
    for _ in range(2):
        await pipeline.start()
        await asyncio.sleep(400)
        broken = pipeline.metric("spool_broken_blocks_total")
        await pipeline.kill()
    await pipeline.start()
    assert broken == 0


# ---- rules ------------------------------------------------------------------------------------------


async def test_a_rule_counts_an_alert_once_also_where_it_waits_for_room(build: Build) -> None:
    """``/status`` says how many alerts a rule matched, not how often counting tried."""
    pipeline = await build(aggregation=AggregationSettings(entries_max=16))
    pipeline.book.replace([RuleSettings(name="all", match=MatchSettings(), severity="high")])
    pipeline.hub.trouble = lambda: Transient("away", code="network")
    await pipeline.post(*[alert(f"Rule {number}") for number in range(20)])
    await asyncio.sleep(600)
    pipeline.hub.trouble = lambda: None
    await pipeline.told()
    (rule,) = pipeline.book.status()["rules"]
    assert rule["matched"][HUB] == 20


# ---- identity ---------------------------------------------------------------------------------------


async def test_an_issue_has_one_finding_also_where_its_key_has_no_cluster(build: Build) -> None:
    """The cluster's name is discovered after the first alert: the finding keeps its Id."""
    pipeline = await build(aggregation=AggregationSettings(key=["rule"], flush_secs=[1]))
    pipeline.hub.sink._cluster = ("", "", "")
    await asyncio.sleep(0.1)
    assert pipeline.hub.sink._context is not None
    pipeline.hub.sink._context = pipeline.hub.sink._context._replace(cluster="")
    names = iter((b"", b'"cluster":"prod"'))

    def complete(record: Record) -> Record:
        return replace(record, enrichment=next(names))

    pipeline.worker._counting._complete = complete
    pipeline.ingest._enrichment = None
    take = pipeline.worker._counting._take_one
    pipeline.worker._counting._take_one = lambda record: take(replace(record, unresolved=True))  # type: ignore[method-assign]
    for number in range(2):
        await pipeline.post(alert(nr=number))
        await pipeline.told()
    assert len(pipeline.hub.history) == 1


async def test_a_sender_cannot_speak_under_the_id_of_a_notice(build: Build) -> None:
    """A uuid is the sender's choice: with aggregation off it must not end up as the Id of another finding."""
    pipeline = await build(aggregation=AggregationSettings(enabled=False))
    await pipeline.worker.tell(notice(pipeline))
    await pipeline.told()
    await pipeline.post(alert(uuid="sensor/node-1"))
    await pipeline.told()
    await asyncio.sleep(100)
    assert len(pipeline.hub.history) == 2


async def test_a_second_alert_of_one_uuid_does_not_wait_where_aggregation_is_off(build: Build) -> None:
    """Every alert is told at once, also while another one with the sender's uuid is under way."""
    pipeline = await build(aggregation=AggregationSettings(enabled=False), linger_secs=0)
    await pipeline.post(alert(uuid="one"))
    await asyncio.sleep(0.02)
    await pipeline.post(alert(uuid="one", nr=1))
    await asyncio.sleep(10)
    assert pipeline.worker.status().aggregating == 0


def test_levels_are_those_of_the_service() -> None:
    """A guard for this file: ``Table.count`` speaks of levels."""
    assert LABELS[1] == "LOW"
    assert Issue.__struct_fields__[6] == "level"
