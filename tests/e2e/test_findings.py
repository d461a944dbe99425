"""Aggregation in earnest: alerts in by HTTP, one finding for each issue out to a strict AWS, with an exact count."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.counted import about, alert, is_finding, moved
from tests.fakes.aws import FakeAws
from tests.running import Running, Start
from tests.samples import REAL_ALERTS, body_of

pytestmark = pytest.mark.usefixtures("impatient")

HUB = "security_hub"
SOON = {"sinks.security_hub.aggregation": {"enabled": True, "flush_secs": [1]}}
LATER = {"sinks.security_hub.aggregation": {"enabled": True, "flush_secs": [3600]}}


def kind(first: int, end: int) -> list[bytes]:
    """Alerts of one issue, numbered."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return [
        body_of(alert(nr=number, uuid=f"id-{number}", time=f"{now}.{number:03d}000000Z"))
        for number in range(first, end)
    ]


def the_finding(aws: FakeAws) -> dict[str, Any]:
    (finding,) = aws.findings.values()
    return finding


def count_of(finding: dict[str, Any]) -> int:
    return int(finding["ProductFields"]["falco/count"])


async def counted(running: Running, bodies: list[bytes]) -> None:
    """Post, all acknowledged, and wait until counted; the counts may wait for their time."""
    assert {answer.status for answer in await running.post(*bodies)} == {200}
    await running.at_rest()


def aggregating(running: Running) -> int:
    return int(running.app.status()["sinks"][HUB]["aggregating"])


async def test_fifty_of_a_kind_are_one_finding(aws: FakeAws, forwarder: Start) -> None:
    """Told at once, then with the count; each alert is an event, and no version is told twice or ignored."""
    running = await forwarder(SOON)
    await counted(running, kind(0, 1))
    assert count_of(the_finding(aws)) == 1
    await counted(running, kind(1, 50))
    await running.told()
    assert [message["id"] for message in aws.messages()] == [f"id-{number}" for number in range(50)]
    product = the_finding(aws)["ProductFields"]
    assert (product["falco/count"], product["falco/id"]) == ("50", "id-49")
    assert product["falco/alert_ids"] == ",".join(f"id-{number}" for number in range(45, 50))
    assert 2 <= aws.finding_writes <= 4
    assert aws.finding_ignored == 0
    assert aws.validation_errors == []
    scrape = await running.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("sent_events_total", sink=HUB) == 50
    assert scrape.total("sink_aggregating", sink=HUB) == 0
    assert scrape.total("finding_updates_total") == aws.finding_writes
    assert scrape.total("finding_updates_total", reason="first") == 1


async def test_the_real_alerts_with_exact_counts(aws: FakeAws, forwarder: Start) -> None:
    """Three rounds with new times: one finding for each issue, which names only alerts of its own."""
    running = await forwarder(SOON)
    rounds = [
        [
            moved(body, time.time() - 60 + number, index) | {"uuid": f"{number}-{index}"}
            for index, body in enumerate(REAL_ALERTS)
        ]
        for number in range(3)
    ]
    for bodies in rounds:
        await counted(running, [body_of(body) for body in bodies])
    await running.told()
    keys = {body["uuid"]: about(body) for bodies in rounds for body in bodies if is_finding(body)}
    told: Counter[Any] = Counter()
    for finding in aws.findings.values():
        (key,) = {keys[identity] for identity in finding["ProductFields"]["falco/alert_ids"].split(",")}
        assert key not in told
        told[key] = count_of(finding)
    assert told == Counter(keys.values())
    assert len(told) < len(keys) / 3, "hardly anything was aggregated"
    assert len(aws.events()) == 3 * len(REAL_ALERTS)
    assert aws.validation_errors == []
    assert (await running.scrape()).broken_law() == {}


async def test_what_waits_for_its_time_is_neither_lost_nor_pending(aws: FakeAws, forwarder: Start) -> None:
    """Counted, not told yet: in ``aggregating``, which the law and ``/status`` know."""
    running = await forwarder(LATER)
    await counted(running, kind(0, 1))
    await counted(running, kind(1, 50))
    scrape = await running.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("sink_aggregating", sink=HUB) == 49
    assert scrape.total("sink_pending", sink=HUB) == 0
    assert scrape.total("sent_events_total", sink=HUB) == 1
    state = (await running.json("/status"))["sinks"][HUB]
    assert (state["pending"], state["aggregating"], state["delivered"]) == (0, 49, 1)
    assert count_of(the_finding(aws)) == 1


async def test_a_stop_tells_what_waits(aws: FakeAws, forwarder: Start, log_lines: io.StringIO) -> None:
    """An hour before its time, because the volume may go with the process."""
    running = await forwarder(LATER)
    await counted(running, kind(0, 1))
    await counted(running, kind(1, 50))
    assert (count_of(the_finding(aws)), aggregating(running)) == (1, 49)
    await running.stop()
    assert count_of(the_finding(aws)) == 50
    assert aws.finding_writes == 2
    assert stopped(log_lines) == [0]


async def test_a_restart_goes_on_counting(aws: FakeAws, forwarder: Start) -> None:
    """Under the same Id, with the same beginning, and with what is new."""
    first = await forwarder(SOON)
    await counted(first, kind(0, 20))
    await first.told()
    before = the_finding(aws)
    assert count_of(before) == 20
    await first.stop()
    second = await forwarder(SOON)
    assert second.app.status()["sinks"][HUB]["recovered"] == 0
    await counted(second, kind(20, 50))
    await second.told()
    after = the_finding(aws)
    assert (after["Id"], count_of(after)) == (before["Id"], 50)
    for same in ("CreatedAt", "FirstObservedAt"):
        assert after[same] == before[same]
    for later in ("UpdatedAt", "LastObservedAt"):
        assert after[later] > before[later]
    assert aws.finding_ignored == 0
    scrape = await second.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("sent_events_total", sink=HUB) == 30


async def test_a_stop_that_cannot_tell_leaves_it_to_the_next_start(
    aws: FakeAws, forwarder: Start, log_lines: io.StringIO
) -> None:
    """The service is away at the stop: how much waits is said, found again, and told, under the same Id."""
    first = await forwarder(LATER)
    await counted(first, kind(0, 1))
    fault = aws.fail("BatchImportFindings", times=None, status=503, code="ServiceUnavailableException")
    await counted(first, kind(1, 50))
    before = the_finding(aws)
    await first.stop()
    assert (count_of(before), stopped(log_lines)) == (1, [49])
    fault.clear()
    second = await forwarder(SOON)
    assert second.app.status()["sinks"][HUB]["recovered"] == 49
    await second.told()
    after = the_finding(aws)
    assert (after["Id"], after["CreatedAt"], count_of(after)) == (before["Id"], before["CreatedAt"], 50)
    scrape = await second.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("sent_events_total", sink=HUB) == scrape.total("sink_recovered", sink=HUB) == 49


async def test_an_outage_becomes_a_number(aws: FakeAws, forwarder: Start) -> None:
    """The service is away while alerts come: counted, the logs go on, and told in few calls when it is back."""
    fault = aws.fail("BatchImportFindings", times=None, status=503, code="ServiceUnavailableException")
    running = await forwarder(SOON)
    assert {answer.status for answer in await running.post(*kind(0, 50))} == {200}
    await running.at_rest("cloudwatch_logs")
    await running.until(lambda: running.app.spool.pending(HUB) == 0)
    await running.until(lambda: running.app.status()["sinks"][HUB]["retries"] > 1)
    scrape = await running.scrape()
    assert (scrape.broken_law(), aws.findings) == ({}, {})
    assert scrape.total("sink_pending", sink=HUB) == 50
    fault.clear()
    await running.told()
    assert count_of(the_finding(aws)) == 50
    assert aws.finding_writes <= 2, "what was under way when it came back, and the rest"
    assert (await running.scrape()).broken_law() == {}


def stopped(log_lines: io.StringIO) -> list[int]:
    """What each stop said is left."""
    entries = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    return [entry["pending"] for entry in entries if entry["event"] == "stopped"]
