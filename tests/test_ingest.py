"""Ingest over a real spool: duplicates, outcomes, what is counted, what enrichment adds."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from structlog.testing import capture_logs

from forwarder import ingest as ingest_module
from forwarder import spool as spool_module
from forwarder.enricher import Enrichment, Subject
from forwarder.ingest import STORED, Answer, Ingest, Outcome
from forwarder.metrics import Metrics
from forwarder.record import ALERT, TEXT, UNPARSED, Record
from forwarder.spool import Spool
from forwarder.spool_settings import SpoolSettings
from tests.fakes.aws import FakeAws
from tests.running import Start
from tests.samples import REAL_ALERTS, REAL_BODIES, TEXT_LINES, body_of
from tests.volume import Gate, refusing

BODY = REAL_BODIES[0]
HOUR = 3600.0


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


class Setup(NamedTuple):
    """An ingest with all it stands on."""

    ingest: Ingest
    spool: Spool
    metrics: Metrics
    clock: Clock

    async def take(self, *bodies: bytes) -> list[Answer]:
        return [await self.ingest.take(body) for body in bodies]

    async def records(self) -> list[Record]:
        if not self.spool.end:
            return []
        return (await self.spool.read(0, records_max=10**6, bytes_max=1 << 30)).records

    def number(self, name: str, **labels: str) -> float:
        self.ingest.publish()
        return self.metrics.registry.get_sample_value(f"falco_forwarder_{name}", labels) or 0.0

    def balance(self) -> tuple[float, float]:
        """Both sides of the first law; and what is stored is what is counted as stored."""
        discarded = sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "falco_forwarder_discarded_events_total"
        )
        known = ("stored_events_total", "duplicate_events_total", "unparsed_events_total")
        assert self.spool.end == self.number("stored_events_total") + self.number("unparsed_events_total")
        return self.number("received_events_total"), sum(map(self.number, known)) + discarded


Make = Callable[..., Any]


@pytest.fixture
async def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Makes one ingest with a sink ``logs`` that nobody serves."""
    monkeypatch.setattr(spool_module, "HOUSEKEEPING_SECS", 0.05)
    spools: list[Spool] = []

    async def build(
        *, hold_secs_max: float = 0.0, bytes_max: int = 1 << 26, enrichers: tuple[Any, ...] = ()
    ) -> Setup:
        clock, metrics = Clock(), Metrics(["logs"])
        settings = SpoolSettings(directory=str(tmp_path), bytes_max=bytes_max)
        spool = Spool(settings, sinks=["logs"], metrics=metrics, now=time.time)
        await spool.open()
        spools.append(spool)
        ingest = Ingest(
            spool=spool,
            metrics=metrics,
            hold_secs_max=hold_secs_max,
            now_ns=time.time_ns,
            now_monotonic=clock,
            enrichment=enrichment_of(*enrichers),
        )
        return Setup(ingest, spool, metrics, clock)

    yield build
    for spool in spools:
        await spool.close()
    gc.collect()


def outcomes(answers: list[Answer]) -> list[Outcome]:
    return [answer.outcome for answer in answers]


# ---- duplicates --------------------------------------------------------------------------------------


async def test_what_was_stored_is_a_record_with_the_senders_bytes(make: Make) -> None:
    setup: Setup = await make()
    assert set(await setup.take(*REAL_BODIES)) == {STORED}
    records = await setup.records()
    assert [record.body for record in records] == REAL_BODIES
    assert {record.kind for record in records} == {ALERT}
    assert len({record.id for record in records}) == len(records)
    assert setup.balance() == (len(REAL_BODIES), len(REAL_BODIES))
    assert setup.number("received_bytes_total") == sum(map(len, REAL_BODIES))


async def test_duplicates_are_known_by_their_bytes_alone(make: Make) -> None:
    """The same alert with other bytes is another alert; the same uuid with other bytes too."""
    setup: Setup = await make()
    one = body_of({"rule": "R", "output": "a", "uuid": "same"})
    two = body_of({"rule": "R", "output": "b", "uuid": "same"})
    spaced = json.dumps(json.loads(one)).encode()
    await setup.take(one, two, spaced, one)
    assert [record.body for record in await setup.records()] == [one, two, spaced]
    assert setup.number("duplicate_events_total") == 1


@pytest.mark.parametrize("age", [1.0, 300.0, 599.0])
@pytest.mark.parametrize("before", [0.0, 1.0, 599.0])
async def test_a_duplicate_is_known_for_ten_minutes(make: Make, before: float, age: float) -> None:
    """At least, whenever it came within the window; publish is what the application calls all the time."""
    setup: Setup = await make()
    for _ in range(20):
        setup.clock.ahead += before / 20
        setup.ingest.publish()
    await setup.take(BODY)
    for _ in range(20):
        setup.clock.ahead += age / 20
        setup.ingest.publish()
    assert await setup.take(BODY) == [STORED]
    assert (setup.spool.end, setup.number("duplicate_events_total")) == (1, 1)


async def test_a_duplicate_is_forgotten_in_the_end(make: Make) -> None:
    """After twice the window at the latest the same bytes are news again."""
    setup: Setup = await make()
    await setup.take(BODY)
    for _ in range(25):
        setup.clock.ahead += 60
        setup.ingest.publish()
    assert await setup.take(BODY) == [STORED]
    assert setup.spool.end == 2


async def test_the_memory_for_duplicates_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest half at least is known, the whole never exceeded."""
    monkeypatch.setattr(ingest_module, "DUPLICATES_MAX", 20)
    setup: Setup = await make()
    bodies = [body_of({"rule": f"R{n}"}) for n in range(100)]
    for body in bodies:
        await setup.take(body)
        assert len(setup.ingest._seen._young) + len(setup.ingest._seen._old) <= 20
    await setup.take(*bodies[-10:])
    assert setup.number("duplicate_events_total") == 10


async def test_duplicates_inside_one_body(make: Make) -> None:
    setup: Setup = await make()
    assert await setup.take(b"[" + BODY + b"," + BODY + b"," + REAL_BODIES[1] + b"]") == [STORED]
    assert await setup.take(BODY + b"\n" + REAL_BODIES[2]) == [STORED]
    assert [record.body for record in await setup.records()] == REAL_BODIES[:3]
    assert setup.number("duplicate_events_total") == 2
    assert setup.balance() == (5, 5)


async def test_the_duplicate_of_a_failed_alert_is_not_acknowledged(make: Make) -> None:
    """Both wait for one commit; it fails; both are refused, and neither is remembered as stored."""
    setup: Setup = await make()
    gate = Gate(setup.spool, first_fails=True)
    tasks = [asyncio.create_task(setup.ingest.take(BODY)) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in tasks)
    gate.open()
    assert outcomes([await task for task in tasks]) == [Outcome.FAILED] * 3
    assert setup.number("discarded_events_total", reason="spool_failed", priority="warning") == 3
    assert setup.balance() == (3, 3)
    assert await setup.take(BODY) == [STORED]
    assert setup.number("duplicate_events_total") == 0


async def test_a_duplicate_of_a_failed_alert_has_the_same_patience(make: Make) -> None:
    """The first one is held and stored by its second try; so its duplicate is not lost meanwhile."""
    setup: Setup = await make(hold_secs_max=5)
    gate = Gate(setup.spool, first_fails=True)
    tasks = [asyncio.create_task(setup.ingest.take(BODY)) for _ in range(2)]
    await asyncio.sleep(0.1)
    gate.open()
    assert [await task for task in tasks] == [STORED, STORED]
    assert setup.spool.end == 1
    assert setup.balance() == (2, 2)


async def test_a_batch_with_a_failed_duplicate_is_counted_as_what_it_became(make: Make) -> None:
    """Its own alerts were stored, its duplicate's commit failed: nothing stored may count as discarded."""
    setup: Setup = await make()
    gate = Gate(setup.spool, first_fails=True)
    first = asyncio.create_task(setup.ingest.take(BODY))
    await asyncio.sleep(0.1)
    batch = asyncio.create_task(setup.ingest.take(BODY + b"\n" + REAL_BODIES[1]))
    await asyncio.sleep(0.1)
    gate.open()
    assert (await first).outcome is Outcome.FAILED
    answer = await batch
    rules = [record.body for record in await setup.records()]
    if answer is STORED:
        assert BODY in rules
    received, accounted = setup.balance()
    assert received == accounted == 3


# ---- outcomes ----------------------------------------------------------------------------------------


async def test_unreadable_bodies_are_kept_raw_with_their_reason(make: Make) -> None:
    setup: Setup = await make()
    (answer,) = await setup.take(b"\xff{not an alert")
    assert answer.outcome is Outcome.UNPARSED
    assert "\n" not in answer.fault
    (record,) = await setup.records()
    assert (record.kind, record.body) == (UNPARSED, b"\xff{not an alert")
    ((_, letter),) = await setup.spool.dead_letters(2**62, 10)
    assert (letter.sink, letter.reason, letter.id) == ("receiver", "unparsed", record.id)
    assert (letter.detail, letter.body) == (answer.fault, record.body)
    assert setup.balance() == (1, 1)


async def test_one_bad_element_makes_the_whole_body_unparsable(make: Make) -> None:
    setup: Setup = await make()
    for body in (BODY + b"\n{}\n" + REAL_BODIES[1], b"[" + BODY + b",1]"):
        assert outcomes(await setup.take(body)) == [Outcome.UNPARSED]
    assert {record.kind for record in await setup.records()} == {UNPARSED}
    assert await setup.take(BODY) == [STORED], "it is no duplicate of what was not stored"
    assert setup.balance() == (3, 3)


async def test_a_full_spool_refuses_by_reason_and_priority(make: Make) -> None:
    setup: Setup = await make(bytes_max=1 << 20)
    answers = [STORED]
    sent = 0
    while answers == [STORED]:
        answers = await setup.take(
            body_of({"rule": "R", "priority": "Emergency", "output": os.urandom(9000).hex()})
        )
        sent += 1
    assert outcomes(answers) == [Outcome.FULL]
    assert outcomes(await setup.take(body_of({"rule": "R", "priority": "Bogus"}), b"{")) == [Outcome.FULL] * 2
    batch = b"\n".join(body_of({"rule": f"R{n}", "priority": "Debug"}) for n in range(3))
    assert outcomes(await setup.take(batch)) == [Outcome.FULL]
    for priority, count in {"emergency": 1, "warning": 2, "debug": 3, "alert": 0}.items():
        assert setup.number("discarded_events_total", reason="spool_full", priority=priority) == count
    assert setup.balance() == (sent + 5, sent + 5)
    assert await setup.spool.dead_letters(2**62, 10) == [], "what was refused left nothing behind"


async def test_a_failing_volume_refuses_and_recovers(make: Make) -> None:
    setup: Setup = await make(hold_secs_max=0.3)
    with refusing(setup.spool):
        started = time.monotonic()
        answers = await setup.take(BODY)
        assert 0.25 < time.monotonic() - started < 5
        assert outcomes(answers) == [Outcome.FAILED]
        assert outcomes(await setup.take(b"{")) == [Outcome.FAILED]
    assert setup.number("discarded_events_total", reason="spool_failed", priority="warning") == 2
    assert await setup.take(BODY) == [STORED]
    assert outcomes(await setup.take(b"{")) == [Outcome.UNPARSED]
    assert setup.balance() == (4, 4)


async def test_a_short_trouble_is_only_a_late_answer(make: Make) -> None:
    setup: Setup = await make(hold_secs_max=5)
    with refusing(setup.spool):
        task = asyncio.create_task(setup.ingest.take(BODY))
        await asyncio.sleep(0.1)
        assert not task.done()
        assert setup.number("held_requests") == 1
    assert await task == STORED
    assert setup.number("held_requests") == 0
    assert setup.balance() == (1, 1)


# ---- notes and hints ---------------------------------------------------------------------------------


async def test_text_mode_is_kept_with_one_hint_an_hour(make: Make) -> None:
    setup: Setup = await make()
    with capture_logs() as lines:
        await setup.take(*TEXT_LINES[:3])
        setup.clock.ahead += HOUR / 2
        await setup.take(TEXT_LINES[3])
        hints = [line for line in lines if "json_output" in str(line)]
        assert [(hint["log_level"], "json_output: true" in hint["event"]) for hint in hints] == [
            ("error", True)
        ]
        setup.clock.ahead += HOUR / 2 + 1
        await setup.take(TEXT_LINES[4])
    assert sum("json_output" in str(line) for line in lines) == 2
    assert setup.number("text_mode_events_total") == 5
    records = await setup.records()
    assert {record.kind for record in records} == {TEXT}
    assert [json.loads(record.body)["output"] for record in records] == [
        line.decode().strip() for line in TEXT_LINES[:5]
    ]


async def test_unknown_priorities_are_counted_and_noted(make: Make) -> None:
    setup: Setup = await make()
    await setup.take(*(body_of({"rule": "R", "priority": name}) for name in ("Bogus", "ERROR", "info", "")))
    records = await setup.records()
    assert [record.priority for record in records] == [4, 3, 6, 4]
    assert [b"priority_unknown" in record.notes for record in records] == [True, False, False, True]
    assert setup.number("unknown_priority_events_total") == 2


async def test_refused_alerts_leave_no_other_traces_in_the_numbers(make: Make) -> None:
    """A refused alert is discarded and nothing else."""
    setup: Setup = await make()
    with refusing(setup.spool):
        await setup.take(body_of({"rule": "R", "priority": "Bogus"}), TEXT_LINES[0])
    assert setup.number("stored_events_total") == setup.number("duplicate_events_total") == 0
    assert setup.number("ack_seconds_count") == 0


# ---- enrichment --------------------------------------------------------------------------------------


def enrichment_of(*enrichers: Any) -> Enrichment | None:
    return Enrichment(enrichers, now=time.monotonic) if enrichers else None


class Node:
    """Knows the node of an alert's host."""

    def enrich(self, subject: Subject, members: dict[str, bytes]) -> bool:
        if subject.hostname:
            members["node"] = json.dumps({"name": subject.hostname, "zone": "eu-west-1a"}).encode()
        return True


class Pod:
    """Knows a pod, whatever the alert."""

    def enrich(self, subject: Subject, members: dict[str, bytes]) -> bool:
        members["kubernetes"] = json.dumps({"pod": {"name": 'quo"te\n', "labels": {"app": "x"}}}).encode()
        return True


async def test_enrichers_keys_are_in_the_record(make: Make) -> None:
    """Members without braces, from all enrichers; nothing where they know nothing."""
    setup: Setup = await make(enrichers=(Node(), Pod()))
    await setup.take(BODY)
    (record,) = await setup.records()
    found = json.loads(b"{" + record.enrichment + b"}")
    assert found["node"] == {"name": REAL_ALERTS[0]["hostname"], "zone": "eu-west-1a"}
    assert found["kubernetes"]["pod"]["name"] == 'quo"te\n'
    assert record.body == BODY
    nothing: Setup = await make_second(make, (Node(),), setup)
    await nothing.take(body_of({"rule": "no host"}))
    assert (await nothing.records())[-1].enrichment == b""


async def make_second(make: Make, enrichers: tuple[Any, ...], first: Setup) -> Setup:
    """Another ingest over the same spool."""
    ingest = Ingest(
        spool=first.spool,
        metrics=first.metrics,
        hold_secs_max=0,
        now_ns=time.time_ns,
        now_monotonic=first.clock,
        enrichment=enrichment_of(*enrichers),
    )
    return Setup(ingest, first.spool, first.metrics, first.clock)


async def test_enrichers_keys_land_in_the_event(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    running.app.ingest._enrichment = enrichment_of(Node(), Pod())
    await running.post(*REAL_BODIES[:3])
    await running.at_rest()
    for event, alert in zip(aws.messages(), REAL_ALERTS, strict=False):
        assert event["node"] == {"name": alert["hostname"], "zone": "eu-west-1a"}
        assert event["kubernetes"]["pod"]["labels"] == {"app": "x"}
    assert aws.validation_errors == []
