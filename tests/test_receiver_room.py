"""Answers and the spool: nothing before the commit, held while there is no room, once for the same bytes."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter

import pytest

from tests.fakes.aws import FakeAws, Fault
from tests.falco import Answer, is_one_line_error
from tests.running import Running, Start
from tests.samples import REAL_BODIES, body_of
from tests.volume import Gate, full, refusing

pytestmark = pytest.mark.usefixtures("impatient")

ALERT = REAL_BODIES[0]
SMALL_SPOOL = {"spool.bytes_max": 1 << 20}


def noise(priority: str = "Critical") -> bytes:
    """About one per cent of the small spool; does not compress further."""
    return body_of({"rule": "Noise", "priority": priority, "output": os.urandom(9000).hex()})


@pytest.fixture
def nothing_leaves(aws: FakeAws) -> list[Fault]:
    """Both sinks down, so that the spool fills."""
    return [aws.fail(name, times=None, status=500) for name in ("PutLogEvents", "BatchImportFindings")]


async def fill(running: Running, share: float) -> None:
    async with running.falco() as falco:
        while running.app.spool.fill < share:
            assert (await falco.post(noise())).status == 200


async def fill_up(running: Running) -> None:
    """Until the first refusal, with patience switched off for the time."""
    patience, running.app.ingest._hold_secs_max = running.app.ingest._hold_secs_max, 0.0
    async with running.falco() as falco:
        while (await falco.post(noise())).status == 200:
            pass
    running.app.ingest._hold_secs_max = patience


async def at_once(running: Running, *bodies: bytes) -> list[asyncio.Task[list[Answer]]]:
    """One sender for each body, all under way."""
    tasks = [asyncio.create_task(running.post(body)) for body in bodies]
    before = 0.0
    while running.app.ingest._received_bytes + running.app.metrics.received_bytes._value.get() != before:
        before = running.app.ingest._received_bytes + running.app.metrics.received_bytes._value.get()
        await asyncio.sleep(0.1)
    return tasks


async def stored_rules(running: Running, aws: FakeAws) -> Counter[str]:
    await running.at_rest()
    return Counter(message["rule"] for message in aws.messages())


async def test_the_same_bytes_twice_are_stored_once(aws: FakeAws, forwarder: Start) -> None:
    """What libcurl does when a kept-alive connection breaks after the request was read."""
    running = await forwarder()
    answers = await running.post(ALERT, ALERT, ALERT)
    assert {(answer.status, answer.body) for answer in answers} == {(200, b"")}
    await running.at_rest()
    assert (len(aws.events()), aws.finding_writes) == (1, 1)


async def test_no_answer_before_the_commit(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    gate = Gate(running.app.spool)
    tasks = await at_once(running, *REAL_BODIES[:5])
    await asyncio.sleep(0.2)
    assert [task.done() for task in tasks] == [False] * 5
    gate.open()
    assert [(await task)[0].status for task in tasks] == [200] * 5


async def test_the_same_bytes_at_once_are_stored_once(aws: FakeAws, forwarder: Start) -> None:
    """The duplicate of an alert under way is answered with it: not earlier, not differently."""
    running = await forwarder()
    gate = Gate(running.app.spool)
    tasks = await at_once(running, *[ALERT] * 4)
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in tasks)
    gate.open()
    assert [(await task)[0].status for task in tasks] == [200] * 4
    await running.at_rest()
    assert len(aws.events()) == 1
    scrape = await running.scrape()
    assert (scrape.total("stored_events_total"), scrape.total("duplicate_events_total")) == (1, 3)
    assert scrape.broken_law() == {}


async def test_the_same_bytes_held_at_once_are_stored_once(
    aws: FakeAws, forwarder: Start, nothing_leaves: list[Fault]
) -> None:
    """Held for want of room, sent again on a new connection, then there is room: one alert, two answers."""
    running = await forwarder(SMALL_SPOOL | {"receiver.hold_secs_max": 10})
    await fill_up(running)
    body = body_of({"rule": "Once", "priority": "Critical"})
    tasks = await at_once(running, body, body)
    assert not any(task.done() for task in tasks)
    for fault in nothing_leaves:
        fault.clear()
    assert [(await task)[0].status for task in tasks] == [200, 200]
    assert (await stored_rules(running, aws))["Once"] == 1
    assert (await running.scrape()).broken_law() == {}


async def test_held_then_refused(aws: FakeAws, forwarder: Start, nothing_leaves: list[Fault]) -> None:
    """503 with Retry-After after the hold, not before, and counted as lost."""
    running = await forwarder(SMALL_SPOOL | {"receiver.hold_secs_max": 0.5})
    await fill_up(running)
    before = (await running.scrape()).total("discarded_events_total")
    started = time.monotonic()
    (task,) = await at_once(running, body_of({"rule": "Late", "priority": "Error"}))
    assert (await running.scrape()).total("held_requests") == 1
    answer = (await task)[0]
    assert 0.45 < time.monotonic() - started < 5
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    assert is_one_line_error(answer)
    scrape = await running.scrape()
    assert scrape.total("held_requests") == 0
    assert scrape.total("discarded_events_total") - before == 1
    assert scrape.total("discarded_events_total", reason="spool_full", priority="error") == 1
    assert (await running.get("/readyz")).status == 503
    for fault in nothing_leaves:
        fault.clear()
    assert "Late" not in await stored_rules(running, aws)
    assert (await running.scrape()).broken_law() == {}


async def test_held_then_stored(aws: FakeAws, forwarder: Start, nothing_leaves: list[Fault]) -> None:
    """Room within the hold: an ordinary 200, nothing discarded."""
    running = await forwarder(SMALL_SPOOL | {"receiver.hold_secs_max": 10})
    await fill_up(running)
    (task,) = await at_once(running, body_of({"rule": "Held", "priority": "Error"}))
    assert not task.done()
    for fault in nothing_leaves:
        fault.clear()
    assert (await task)[0].status == 200
    assert (await stored_rules(running, aws))["Held"] == 1
    scrape = await running.scrape()
    assert scrape.total("discarded_events_total", priority="error") == 0


async def test_low_priorities_are_refused_first(
    aws: FakeAws, forwarder: Start, nothing_leaves: list[Fault]
) -> None:
    """From 90 % on no Debug and no Informational; the others until it is full."""
    running = await forwarder(SMALL_SPOOL | {"receiver.hold_secs_max": 0})
    debug, info, notice = (
        [body_of({"rule": f"{priority} {n}", "priority": priority}) for n in range(2)]
        for priority in ("Debug", "Informational", "Notice")
    )
    await fill(running, 0.80)
    assert {answer.status for answer in await running.post(debug[0], info[0], notice[0])} == {200}
    await fill(running, 0.91)
    answers = await running.post(debug[1], info[1], notice[1])
    assert [answer.status for answer in answers] == [503, 503, 200]
    assert (await running.get("/readyz")).status == 200, "there is room for what matters"
    scrape = await running.scrape()
    assert scrape.total("discarded_events_total", priority="debug") == 1
    assert scrape.total("discarded_events_total", priority="informational") == 1
    assert scrape.total("discarded_events_total") == 2


async def test_a_body_that_is_not_alone_in_the_spool_never_passes_the_quota(
    aws: FakeAws, forwarder: Start, nothing_leaves: list[Fault]
) -> None:
    """A large body at 99 % is no way around the quota by more than itself."""
    running = await forwarder(SMALL_SPOOL | {"receiver.hold_secs_max": 0})
    await fill(running, 0.95)
    body = body_of({"rule": "Huge", "priority": "Critical", "output": os.urandom(300_000).hex()})
    tasks = await at_once(running, *[body[:-2] + b'%d"}' % n for n in range(8)])
    statuses = Counter([(await task)[0].status for task in tasks])
    assert statuses[200] <= 1
    assert running.app.spool.fill < 1.5


@pytest.mark.parametrize("trouble", [refusing, full])
async def test_a_volume_that_takes_nothing(aws: FakeAws, forwarder: Start, trouble: object) -> None:
    """Nothing is acknowledged while it lasts, readiness says so, and it passes by itself."""
    running = await forwarder({"receiver.hold_secs_max": 0.05})
    await running.post(REAL_BODIES[0])
    await running.at_rest()
    context = refusing(running.app.spool) if trouble is refusing else full(running.app.spool)
    bodies = [noise() for _ in range(20)]
    with context:
        answers = [answer for body in bodies for answer in await running.post(body)]
        assert answers[-1].status == 503
        assert (await running.get("/readyz")).status == 503
        assert (await running.get("/livez")).status == 200
    await running.until(lambda: not running.app.ready())
    assert (await running.get("/readyz")).status == 200
    again = await running.post(*bodies)
    assert {answer.status for answer in again} == {200}
    rules = await stored_rules(running, aws)
    assert rules["Noise"] == len(bodies), "refused ones were no duplicates, stored ones were"
    scrape = await running.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("discarded_events_total") == sum(answer.status == 503 for answer in answers)
    assert json.loads((await running.get("/status")).body)["state"] == "running"
