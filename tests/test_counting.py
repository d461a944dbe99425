"""Aggregation from ingest to the hub, in simulated time: one finding for each issue, with the exact count."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from forwarder import delivery_findings, spool
from forwarder.contract import Permanent, Permission, Transient
from forwarder.ingest import STORED
from forwarder.issues_settings import AggregationSettings
from tests.counted import HUB, LOGS, STARTED_AT, Pipeline, about, alert, is_finding, moved
from tests.samples import REAL_ALERTS, body_of

pytestmark = pytest.mark.looptime

ROUNDS = 1000
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
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
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


async def replay(pipeline: Pipeline, rounds: range) -> None:
    """The real alerts, each round with new times, spread over a day."""
    for _ in rounds:
        bodies = [body_of(moved(body, pipeline.now(), index)) for index, body in enumerate(REAL_ALERTS)]
        assert await pipeline.ingest.take(b"\n".join(bodies)) is STORED
        await asyncio.sleep(DAY_SECS / ROUNDS)


def expected_counts(rounds: int) -> Counter[tuple[Any, ...]]:
    return Counter(
        {
            key: count * rounds
            for key, count in Counter(
                about(members) for members in REAL_ALERTS if is_finding(members)
            ).items()
        }
    )


def judge(pipeline: Pipeline, rounds: int) -> None:
    """One finding per issue with the exact count, and every alert in the logs."""
    assert pipeline.hub.broken_promises() == []
    assert sorted(pipeline.hub.counts().values()) == sorted(expected_counts(rounds).values())
    by_rule: Counter[str] = Counter()
    for finding in pipeline.hub.latest.values():
        by_rule[finding["GeneratorId"]] += int(finding["ProductFields"]["falco/count"])
    expected: Counter[str] = Counter()
    for key, count in expected_counts(rounds).items():
        expected[f"falco/{key[0]}"] += count
    assert by_rule == expected
    assert len(pipeline.logs.took) == rounds * len(REAL_ALERTS)


@pytest.mark.timeout(150)
async def test_a_thousand_replays_in_a_day(build: Build) -> None:
    """Exactly one finding for each issue, exact counts, and far fewer calls than alerts."""
    pipeline = await build()
    await replay(pipeline, range(ROUNDS))
    await pipeline.told()
    judge(pipeline, ROUNDS)
    assert set(pipeline.logs.took.values()) == {1}
    updates = sum(map(len, pipeline.hub.history.values()))
    assert updates <= len(pipeline.hub.history) * (4 + DAY_SECS // 900)


@pytest.mark.timeout(150)
async def test_counts_stay_exact_over_kills(build: Build) -> None:
    """The same, killed at random moments: between counting and telling, between a call and what it told."""
    rng = random.Random(20)
    pipeline = await build()
    rounds = 60
    for _ in range(20):
        lost = rng.random() < 0.5
        for number in range(rounds // 20):
            await replay(pipeline, range(number, number + 1))
        if lost:
            # The service accepts, the answer is lost with the process.
            pipeline.hub.after = asyncio.CancelledError
        await asyncio.sleep(rng.uniform(0, 1.5))
        await pipeline.kill()
        pipeline.hub.after = lambda: None
        await pipeline.start()
    await pipeline.told()
    judge(pipeline, rounds)


async def test_a_flood_of_one_rule_is_one_finding(build: Build) -> None:
    """100,000 alerts in a quarter of an hour: one finding, at most 10 calls, the exact count soon after."""
    pipeline = await build()
    for second in range(900):
        bodies = b"\n".join(body_of(alert(nr=second * 1000 + n)) for n in range(112 if second % 9 else 104))
        assert (await pipeline.ingest.take(bodies)) is STORED
        await asyncio.sleep(1)
    pipeline.ingest.publish()
    sent = int(pipeline.metric("stored_events_total"))
    assert sent == 100_000
    assert len(pipeline.hub.history) == 1
    assert len(pipeline.hub.calls) <= 10
    await pipeline.told()
    assert list(pipeline.hub.counts().values()) == [sent]
    assert pipeline.hub.broken_promises() == []


async def test_when_a_finding_is_told(build: Build) -> None:
    """At once, after 1, 5 and 15 minutes while the count moves, at once again on a rise in priority."""
    pipeline = await build()
    started = pipeline.now()
    for minute in range(45):
        await pipeline.post(alert(nr=minute))
        await asyncio.sleep(60)
    (versions,) = pipeline.hub.history.values()
    times = [version.at - started for version in versions]
    assert times == pytest.approx([1, 61, 361, 1261, 2161], abs=2)
    await pipeline.post(alert(priority="Critical", nr=1))
    await asyncio.sleep(2)
    assert len(versions) == 6
    assert versions[-1].finding["FindingProviderFields"]["Severity"] == {
        "Label": "CRITICAL",
        "Original": "Critical",
    }
    await pipeline.post(alert(priority="Notice", nr=2))
    await pipeline.told()
    severity = versions[-1].finding["FindingProviderFields"]["Severity"]
    assert (severity["Label"], versions[-1].count) == ("CRITICAL", 47)
    assert versions[-1].finding["ProductFields"]["falco/priority"] == "Notice"


async def test_what_a_finding_says_of_its_alerts(build: Build) -> None:
    """First and last time, count, the last five alerts, the pods."""
    pipeline = await build(aggregation=AggregationSettings(flush_secs=[1]))
    for number in range(12):
        at = moved(alert(pod=f"web-{number}", fields={"k8s.deployment": "web"}), STARTED_AT + number, number)
        await pipeline.post(
            at | {"uuid": f"id-{number}", "output_fields": at["output_fields"] | {"k8s.pod.name": None}}
        )
        await asyncio.sleep(0.5)
    await pipeline.told()
    (finding,) = pipeline.hub.latest.values()
    assert finding["ProductFields"]["falco/count"] == "12"
    assert finding["ProductFields"]["falco/alert_ids"] == "id-7,id-8,id-9,id-10,id-11"
    assert finding["FirstObservedAt"] == "2027-01-15T08:00:00.000Z"
    assert finding["LastObservedAt"] == "2027-01-15T08:00:11.000Z"
    assert finding["ProductFields"]["falco/id"] == "id-11"


async def test_the_clock_steps_back(build: Build) -> None:
    """``UpdatedAt`` grows all the same, also over a restart."""
    pipeline = await build(aggregation=AggregationSettings(flush_secs=[1]))
    for number in range(4):
        await pipeline.post(alert(nr=number))
        await pipeline.told()
        pipeline.skew_secs -= 3600
        if number == 2:
            await pipeline.kill()
            await pipeline.start()
    await pipeline.told()
    (versions,) = pipeline.hub.history.values()
    assert [version.count for version in versions] == [1, 2, 3, 4]
    assert pipeline.hub.broken_promises() == []


async def test_counting_goes_on_while_the_hub_is_away(build: Build) -> None:
    """An outage becomes a number, not a backlog; the spool is free, the logs go on, everything is told in the end."""
    pipeline = await build()
    pipeline.hub.trouble = lambda: Transient("connection refused", code="network")
    for number in range(600):
        await pipeline.post(alert(nr=number))
        await asyncio.sleep(6)
    assert pipeline.spool.pending(HUB) <= 1
    assert pipeline.spool.pending(LOGS) <= 1
    assert pipeline.worker.status().pending == 600
    pipeline.hub.trouble = lambda: None
    await pipeline.told()
    assert [version.count for version in next(iter(pipeline.hub.history.values()))] == [600]


async def test_a_drain_tells_what_waits_for_its_time(build: Build) -> None:
    """The volume may end with the pod: counts are told before their time."""
    pipeline = await build()
    await pipeline.post(*[alert(nr=number) for number in range(3)])
    await pipeline.quiet()
    await pipeline.post(*[alert(nr=10 + number) for number in range(4)])
    await asyncio.sleep(3)
    assert pipeline.worker.status().aggregating == 4
    pipeline.worker.drain()
    await asyncio.wait_for(pipeline.tasks[1], 10)
    assert list(pipeline.hub.counts().values()) == [7]


async def test_one_finding_for_each_alert_where_aggregation_is_off(build: Build) -> None:
    """By the alert's id, as without aggregation; nothing stays behind."""
    pipeline = await build(aggregation=AggregationSettings(enabled=False))
    await pipeline.post(*[alert(nr=number, uuid=f"id-{number}") for number in range(250)])
    await pipeline.told()
    assert sorted(identity.rpartition("/")[2] for identity in pipeline.hub.history) == sorted(
        f"id-{number}" for number in range(250)
    )
    assert all("falco/count" not in finding["ProductFields"] for finding in pipeline.hub.latest.values())
    assert len((await pipeline.spool.issues()).rows) == 0


async def test_a_refused_finding_is_a_dead_letter_that_names_its_alerts(build: Build) -> None:
    pipeline = await build()
    pipeline.hub.fake.injected = lambda finding: ("InvalidInput", "no") if "Bad" in finding["Title"] else None
    await pipeline.post(*[alert("Bad", nr=number) for number in range(3)], alert("Good"))
    await pipeline.told()
    assert await pipeline.dead() == [("invalid", "InvalidInput: no (3 alerts)")]
    assert pipeline.metric("dead_lettered_events_total", sink=HUB, reason="invalid") == 3
    assert pipeline.metric("sent_events_total", sink=HUB) == 1


async def test_a_call_that_is_refused_finds_its_culprit(build: Build) -> None:
    """Bisected; the others are told."""
    pipeline = await build()
    fake = pipeline.hub.fake.batch_import_findings

    def refusing(body: dict[str, Any], caller: Any, size: int) -> Any:
        if any("Bad" in finding["Title"] for finding in body["Findings"]):
            raise Permanent("no")
        return fake(body, caller, size)

    pipeline.hub.fake.batch_import_findings = refusing  # type: ignore[method-assign]
    await pipeline.post(*[alert(f"Rule {number}") for number in range(40)], alert("Bad"))
    await pipeline.told()
    assert [reason for reason, _ in await pipeline.dead()] == ["invalid"]
    assert len(pipeline.hub.history) == 40


async def test_a_finding_nobody_may_send_is_given_up_the_others_are_told(build: Build) -> None:
    """AccessDenied for a call with it: found, tried again some times, then a dead letter."""
    pipeline = await build()
    fake = pipeline.hub.fake.batch_import_findings

    def refusing(asked: Any, caller: Any, size: int) -> Any:
        if any("Bad" in finding["Title"] for finding in asked["Findings"]):
            raise Permission("not yours")
        return fake(asked, caller, size)

    pipeline.hub.fake.batch_import_findings = refusing  # type: ignore[method-assign, assignment]
    await pipeline.post(*[alert(f"Rule {number}") for number in range(6)], alert("Bad"))
    for number in range(60):
        await pipeline.post(alert(f"Later {number}"))
        await asyncio.sleep(1)
    await pipeline.told()
    assert await pipeline.dead() == [("permission", "not yours (1 alerts)")]
    assert len(pipeline.hub.history) == 66


async def test_a_permission_that_comes_in_the_midst_of_a_round_buries_nothing(build: Build) -> None:
    """Some were refused alone a moment before others went through: they are not the culprits."""
    pipeline = await build()
    calls = iter(range(1_000))
    fake = pipeline.hub.fake.batch_import_findings

    def refusing(asked: Any, caller: Any, size: int) -> Any:
        if next(calls) < 7:
            raise Permission("not authorized")
        return fake(asked, caller, size)

    pipeline.hub.fake.batch_import_findings = refusing  # type: ignore[method-assign, assignment]
    await pipeline.post(*[alert(f"Rule {number}") for number in range(16)])
    await pipeline.told()
    assert next(calls) > 8, "some were refused alone"
    assert await pipeline.dead() == []
    assert len(pipeline.hub.history) == 16


async def test_a_finding_that_fails_for_a_while_holds_up_no_other(build: Build) -> None:
    pipeline = await build()
    failing = {"yes": True}
    pipeline.hub.fake.injected = lambda finding: (
        ("InternalFailure", "later") if failing["yes"] and "Slow" in finding["Title"] else None
    )
    await pipeline.post(alert("Slow"))
    for number in range(20):
        await pipeline.post(alert(f"Rule {number}"))
        await asyncio.sleep(1)
    await asyncio.sleep(2)
    assert len(pipeline.hub.history) == 20
    failing["yes"] = False
    await pipeline.told()
    assert len(pipeline.hub.history) == 21
    assert await pipeline.dead() == []


async def test_a_hub_that_is_off_blocks_and_is_probed(build: Build) -> None:
    pipeline = await build()
    pipeline.hub.fake.enabled = False
    pipeline.hub.fake.disabled_shape = "finding"
    await pipeline.post(*[alert(f"Rule {number}") for number in range(5)])
    await asyncio.sleep(5)
    assert pipeline.worker.status().state == "blocked"
    assert pipeline.worker.status().pending == 5
    pipeline.hub.fake.enabled = True
    await pipeline.told()
    assert len(pipeline.hub.history) == 5


# ---- fairness ---------------------------------------------------------------------------------------


async def test_the_most_severe_goes_first(build: Build) -> None:
    """A CRITICAL in the midst of a backlog of 3,000 LOW is in the next call."""
    pipeline = await build(rate_per_sec=1, burst=1)
    for number in range(30):
        bodies = [body_of(alert(f"Low {number}-{n}", "Notice")) for n in range(100)]
        assert await pipeline.ingest.take(b"\n".join(bodies)) is STORED
    await asyncio.sleep(10)
    assert pipeline.worker.status().pending > 1000
    at = pipeline.now()
    await pipeline.post(alert("Critical one", "Critical"))
    await pipeline.told()
    (version,) = [v[0] for v in pipeline.hub.history.values() if v[0].finding["Title"] == "Critical one"]
    assert version.at - at < 1 + 1 + 2, "linger, one call's token, the call"


async def test_nothing_starves(build: Build) -> None:
    """Under a load of HIGH that takes every call, the oldest LOW waits no longer than ``aging_secs``."""
    pipeline = await build(rate_per_sec=0.25, burst=1, aging_secs=120)
    waits: dict[str, float] = {}
    for second in range(600):
        rules = [(f"High {second}-{n}", "Error") for n in range(24)]
        if second % 10 == 0:
            rules.append((f"Low {second}", "Notice"))
            waits[f"Low {second}"] = pipeline.now()
        bodies = [body_of(alert(rule, priority)) for rule, priority in rules]
        assert await pipeline.ingest.take(b"\n".join(bodies)) is STORED
        await asyncio.sleep(0.9)
    await pipeline.told()
    told = {v[0].finding["Title"]: v[0].at for v in pipeline.hub.history.values()}
    longest = max(told[rule] - at for rule, at in waits.items())
    assert 60 <= longest <= 120, "they did wait, and not too long"
    high = [
        v[0]
        for title, v in ((v[0].finding["Title"], v) for v in pipeline.hub.history.values())
        if title.startswith("High")
    ]
    assert len(high) == 600 * 24


# ---- limits -----------------------------------------------------------------------------------------


async def test_a_full_table_forgets_the_oldest_and_says_so(build: Build) -> None:
    """Nothing is lost, nothing told twice under one Id, and one finding tells of it."""
    pipeline = await build(aggregation=AggregationSettings(entries_max=64, flush_secs=[1]))
    for number in range(400):
        await pipeline.post(alert(f"Rule {number}"))
        await asyncio.sleep(0.3)
    await pipeline.post(alert("Rule 0", nr=1))
    await pipeline.told()
    await asyncio.sleep(5)
    assert pipeline.hub.broken_promises() == []
    ours = [f for f in pipeline.hub.latest.values() if f["Title"].startswith("Rule")]
    assert len(ours) == 401, "a forgotten issue comes back as a new finding"
    assert {finding["ProductFields"]["falco/count"] for finding in ours} == {"1"}
    (overflow,) = [f for f in pipeline.hub.latest.values() if "overflowed" in f["Title"]]
    assert overflow["Id"].endswith(f"{pipeline.spool.id}/overflow")
    assert int(overflow["ProductFields"]["falco/count"]) == pipeline.metric("issues_evicted_total") > 300
    pipeline.worker.publish()
    assert pipeline.metric("issues") <= 65


async def test_a_full_table_that_cannot_be_told_waits(build: Build) -> None:
    """With the hub away nothing can be forgotten: alerts wait in the spool, the logs go on."""
    pipeline = await build(aggregation=AggregationSettings(entries_max=32))
    pipeline.hub.trouble = lambda: Transient("connection refused", code="network")
    await pipeline.post(*[alert(f"Rule {number}") for number in range(300)])
    await asyncio.sleep(30)
    assert pipeline.spool.pending(LOGS) == 0
    assert pipeline.spool.pending(HUB) == 300 - 32
    pipeline.hub.trouble = lambda: None
    await pipeline.told()
    assert len([f for f in pipeline.hub.latest.values() if f["Title"].startswith("Rule")]) == 300
    assert pipeline.hub.broken_promises() == []


async def test_latest_alerts_take_no_more_room_than_there_is(build: Build) -> None:
    """Large alerts of many issues with the hub away: the spool keeps what does not fit beside it."""
    pipeline = await build(bytes_max=16 << 20)
    pipeline.hub.trouble = lambda: Transient("connection refused", code="network")
    for number in range(200):
        await pipeline.post(alert(f"Rule {number}", output="x" * 20_000))
    await asyncio.sleep(30)
    assert 0 < pipeline.spool.pending(HUB) < 200
    pipeline.hub.trouble = lambda: None
    await pipeline.told()
    assert len(pipeline.hub.history) == 200


async def test_an_idle_issue_is_archived_once_and_later_forgotten(build: Build) -> None:
    """ARCHIVED once; an alert brings it back under the same Id, unless it was forgotten meanwhile."""
    pipeline = await build(aggregation=AggregationSettings(archive_after_idle_days=1, idle_days=3))
    await pipeline.post(alert(nr=1))
    await asyncio.sleep(2 * DAY_SECS)
    (versions,) = pipeline.hub.history.values()
    assert [version.finding["RecordState"] for version in versions] == ["ACTIVE", "ARCHIVED"]
    await pipeline.post(alert(nr=2))
    await asyncio.sleep(5)
    assert (versions[-1].finding["RecordState"], versions[-1].count) == ("ACTIVE", 2)
    await asyncio.sleep(4 * DAY_SECS)
    assert versions[-1].finding["RecordState"] == "ARCHIVED"
    await pipeline.post(alert(nr=3))
    await pipeline.told()
    assert len(pipeline.hub.history) == 2
    assert pipeline.hub.broken_promises() == []


async def test_an_issue_comes_back_after_its_idle_time_as_a_new_finding(build: Build) -> None:
    pipeline = await build(aggregation=AggregationSettings(idle_days=1))
    await pipeline.post(alert(nr=1))
    await asyncio.sleep(1.1 * DAY_SECS)
    await pipeline.post(alert(nr=2))
    await pipeline.told()
    assert list(pipeline.hub.counts().values()) == [1, 1]
    assert json.dumps(pipeline.hub.broken_promises()) == "[]"
