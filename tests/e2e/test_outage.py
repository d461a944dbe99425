"""AWS in trouble: nothing that was acknowledged is lost, and one sink's trouble is not the other's."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.fakes.aws import FakeAws, Fault
from tests.running import Running, Start
from tests.samples import REAL_ALERTS, REAL_BODIES, body_of

pytestmark = pytest.mark.usefixtures("impatient")

CLOUDWATCH, HUB = "cloudwatch_logs", "security_hub"
OPERATIONS = {CLOUDWATCH: "PutLogEvents", HUB: "BatchImportFindings"}


def alerts(count: int, name: str = "Rule", **members: Any) -> list[bytes]:
    """Bodies that become a log event and a finding each."""
    return [
        body_of({"rule": f"{name} {n}", "priority": "Error", "output": "o", **members}) for n in range(count)
    ]


def rules_in_logs(aws: FakeAws) -> Counter[str]:
    return Counter(message["rule"] for message in aws.messages())


def rules_in_findings(aws: FakeAws) -> Counter[str]:
    return Counter(finding["GeneratorId"].removeprefix("falco/") for finding in aws.findings.values())


def names(bodies: list[bytes]) -> Counter[str]:
    return Counter(json.loads(body)["rule"] for body in bodies)


async def acknowledged(running: Running, bodies: list[bytes]) -> None:
    assert {(answer.status, answer.body) for answer in await running.post(*bodies)} == {(200, b"")}


async def failing(running: Running, sink: str) -> None:
    """Wait until a sink has met its trouble."""
    await running.until(lambda: running.app.status()["sinks"][sink]["last_error"])


def assert_nothing_lost(aws: FakeAws, bodies: list[bytes]) -> None:
    """Everything is in both places; an event may be there twice, but then under one id."""
    wanted = names(bodies)
    assert rules_in_logs(aws).keys() == wanted.keys()
    assert rules_in_findings(aws) == wanted
    ids: dict[str, set[str]] = {}
    for message in aws.messages():
        ids.setdefault(message["rule"], set()).add(message["id"])
    assert {rule for rule, found in ids.items() if len(found) > 1} == set()
    assert aws.validation_errors == []


async def assert_well(aws: FakeAws, running: Running) -> None:
    """At the end: nothing lost in the numbers, no dead letter, no trouble shown, and a fresh alert passes."""
    fresh = alerts(1, "Fresh")
    await acknowledged(running, fresh)
    await running.at_rest()
    assert "Fresh 0" in rules_in_logs(aws)
    assert "Fresh 0" in rules_in_findings(aws)
    scrape = await running.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("dead_lettered_events_total") == 0
    assert scrape.total("discarded_events_total") == 0
    for state in running.app.status()["sinks"].values():
        assert (state["state"], state["last_error"]) == ("delivering", None)


async def test_aws_is_down_and_comes_back(aws: FakeAws, forwarder: Start) -> None:
    """Connections refused to both sinks: acknowledged and ready all the same, and all of it arrives afterwards."""
    running = await forwarder()
    await acknowledged(running, REAL_BODIES[:5])
    await running.at_rest()
    port = int(aws.url.rpartition(":")[2])
    await aws.stop()
    await acknowledged(running, REAL_BODIES[5:])
    await failing(running, CLOUDWATCH)
    await failing(running, HUB)
    assert (await running.get("/readyz")).status == 200
    assert (await running.get("/livez")).status == 200
    status = await running.json("/status")
    assert status["sinks"][CLOUDWATCH]["pending"] == len(REAL_BODIES) - 5
    assert status["sinks"][CLOUDWATCH]["retries"] > 0
    await aws.start(port)
    await running.at_rest()
    assert rules_in_logs(aws) == Counter(alert["rule"] for alert in REAL_ALERTS)
    assert aws.validation_errors == []
    await assert_well(aws, running)


async def test_aws_is_down_at_the_start(aws: FakeAws, forwarder: Start) -> None:
    """A start needs no AWS: alerts are taken at once, and nothing is missing in them later."""
    port = int(aws.url.rpartition(":")[2])
    await aws.stop()
    running = await forwarder()
    bodies = alerts(5)
    await acknowledged(running, bodies)
    assert (await running.get("/readyz")).status == 200
    await running.until(lambda: running.app.status()["sinks"][HUB]["retries"])
    await aws.start(port)
    await running.at_rest()
    assert_nothing_lost(aws, bodies)
    assert {message["account"] for message in aws.messages()} == {aws.account}


async def test_trouble_at_the_start_is_shown(aws: FakeAws, forwarder: Start) -> None:
    """A sink that cannot get ready says why, in /status and by a failed call's code."""
    await aws.stop()
    running = await forwarder()
    await running.until(lambda: all(s["retries"] for s in running.app.status()["sinks"].values()))
    states = running.app.status()["sinks"]
    assert {name: bool(state["last_error"]) for name, state in states.items()} == {
        CLOUDWATCH: True,
        HUB: True,
    }
    scrape = await running.scrape()
    assert scrape.total("send_failed_total", sink=CLOUDWATCH, error_code="network") > 0
    assert scrape.total("send_failed_total", sink=HUB, error_code="network") > 0


@pytest.mark.parametrize("sink", OPERATIONS)
async def test_one_sink_down_is_not_the_others_trouble(aws: FakeAws, forwarder: Start, sink: str) -> None:
    fault = aws.fail(OPERATIONS[sink], times=None, status=503, code="ServiceUnavailableException")
    running = await forwarder()
    healthy = HUB if sink == CLOUDWATCH else CLOUDWATCH
    first, second = alerts(30, "First"), alerts(30, "Second")
    await acknowledged(running, first)
    await failing(running, sink)
    await acknowledged(running, second)
    await running.at_rest(healthy, secs=5)
    delivered = rules_in_findings(aws) if healthy == HUB else rules_in_logs(aws)
    assert delivered == names(first + second)
    states = running.app.status()["sinks"]
    assert (states[sink]["pending"], states[sink]["state"]) == (60, "retrying")
    assert (states[healthy]["retries"], states[healthy]["last_error"]) == (0, None)
    assert (await running.get("/readyz")).status == 200
    assert (await running.scrape()).total("sink_state", sink=sink, state="retrying") == 1
    fault.clear()
    await running.at_rest()
    assert_nothing_lost(aws, first + second)
    await assert_well(aws, running)


Plan = Callable[[FakeAws, str], Fault]
TROUBLES: dict[str, Plan] = {
    "500": lambda aws, name: aws.fail(name, times=4, status=500, code="InternalFailure"),
    "503 unavailable": lambda aws, name: aws.fail(name, times=4, status=503, code="ServiceUnavailableException"),
    "throttled": lambda aws, name: aws.fail(name, times=4, status=400, code="ThrottlingException"),
    "too many requests": lambda aws, name: aws.fail(name, times=4, status=429, code="TooManyRequestsException"),
    "expired token": lambda aws, name: aws.fail(name, times=4, status=400, code="ExpiredTokenException"),
    "unknown token": lambda aws, name: aws.fail(name, times=4, status=403, code="UnrecognizedClientException"),
    "reset": lambda aws, name: aws.reset(name, times=4),
    "answer lost": lambda aws, name: aws.reset(name, times=3, after_processing=True),
    "answer cut": lambda aws, name: aws.truncate(name, times=3),
    "hangs": lambda aws, name: aws.hang(name, times=2, secs=5),
}  # fmt: skip


@pytest.mark.parametrize("plan", TROUBLES.values(), ids=TROUBLES.keys())
async def test_passing_trouble_loses_nothing(aws: FakeAws, forwarder: Start, plan: Plan) -> None:
    """Whatever the trouble: repeated until it is over; what arrives twice has the same id."""
    faults = [plan(aws, name) for name in OPERATIONS.values()]
    running = await forwarder({"delivery.call_secs_max": 0.6})
    bodies = alerts(20)
    await acknowledged(running, bodies)
    await running.at_rest()
    assert all(fault.hits > 1 for fault in faults), "the trouble was met"
    assert_nothing_lost(aws, bodies)
    await assert_well(aws, running)
    scrape = await running.scrape()
    assert all(scrape.total("retries_total", sink=sink) > 0 for sink in OPERATIONS)


async def test_wrong_credentials_put_right(aws: FakeAws, forwarder: Start) -> None:
    """A wrong secret key is a state of ours, not the alerts' fault: they wait."""
    right = aws.credentials[aws.access_key]
    running = await forwarder()
    await acknowledged(running, alerts(3, "Before"))
    await running.at_rest()
    aws.credentials[aws.access_key] = dataclasses.replace(right, secret="changed" * 6)
    await acknowledged(running, alerts(5))
    await failing(running, CLOUDWATCH)
    await failing(running, HUB)
    scrape = await running.scrape()
    assert scrape.total("send_failed_total", sink=CLOUDWATCH, error_code="credentials") > 0
    assert scrape.total("send_failed_total", sink=HUB, error_code="credentials") > 0
    assert (await running.get("/readyz")).status == 200
    aws.credentials[aws.access_key] = right
    await running.at_rest()
    assert_nothing_lost(aws, alerts(5) + alerts(3, "Before"))
    await assert_well(aws, running)


@pytest.mark.parametrize("sink", OPERATIONS)
async def test_a_missing_permission_blocks_and_recovers(aws: FakeAws, forwarder: Start, sink: str) -> None:
    """AccessDenied for everything is not the records' fault: the sink is blocked, probes, and goes on."""
    text = "User is not authorized to perform this"
    fault = aws.fail(OPERATIONS[sink], times=None, status=403, code="AccessDeniedException", message=text)
    running = await forwarder()
    bodies = alerts(30)
    await acknowledged(running, bodies)
    await running.until(lambda: running.app.status()["sinks"][sink]["state"] == "blocked")
    assert text in running.app.status()["sinks"][sink]["last_error"]
    fault.clear()
    await running.at_rest()
    assert_nothing_lost(aws, bodies)
    await assert_well(aws, running)


@pytest.mark.parametrize("shape", ["call", "finding"])
async def test_a_disabled_hub_is_waited_for(aws: FakeAws, forwarder: Start, shape: Any) -> None:
    aws.hub_enabled = False
    aws.hub_disabled_shape = shape
    running = await forwarder()
    bodies = alerts(150)
    await acknowledged(running, bodies)
    await running.until(lambda: running.app.status()["sinks"][HUB]["state"] == "blocked")
    await running.at_rest(CLOUDWATCH)
    assert rules_in_logs(aws) == names(bodies)
    status = running.app.status()["sinks"][HUB]
    assert (status["pending"], status["dead_letters"]) == (150, 0)
    assert "not subscribed" in status["last_error"]
    assert (await running.scrape()).total("sink_state", sink=HUB, state="blocked") == 1
    assert (await running.get("/readyz")).status == 200
    calls = sum(call.operation == "BatchImportFindings" for call in aws.calls)
    await asyncio.sleep(0.5)
    probes = sum(call.operation == "BatchImportFindings" for call in aws.calls) - calls
    assert 0 < probes <= 24, "it probes, with pauses between"
    aws.hub_enabled = True
    await running.at_rest()
    assert_nothing_lost(aws, bodies)
    await assert_well(aws, running)


async def test_one_poison_event(aws: FakeAws, forwarder: Start) -> None:
    """Refused as a whole because of one event: that one becomes a dead letter, all others arrive, in few calls."""

    def poisoned(body: dict[str, Any]) -> bool:
        return any("poison" in event["message"] for event in body["logEvents"])

    text = "Log event is not valid"
    fault = aws.fail("PutLogEvents", times=None, status=400, code="InvalidParameterException", message=text, when=poisoned)  # fmt: skip
    running = await forwarder({"sinks.cloudwatch_logs": {"linger_secs": 0.5}})
    good = alerts(500)
    poison = body_of({"rule": "poison", "priority": "Error", "output": "o"})
    started = time.time()
    await acknowledged(running, [b"\n".join([*good[:333], poison, *good[333:]])])
    await running.at_rest()
    assert rules_in_logs(aws) == names(good)
    assert rules_in_findings(aws) == names([*good, poison])
    assert fault.hits <= 2 * 9 + 1
    (letter,) = await running.json("/dead-letters")
    assert (letter["sink"], letter["reason"], letter["body"]) == (CLOUDWATCH, "invalid", poison.decode())
    assert text in letter["detail"]
    assert letter["body_bytes"] == len(poison)
    assert abs(datetime.fromisoformat(letter["time"]).timestamp() - started) < 60
    finding = next(found for found in aws.findings.values() if found["GeneratorId"] == "falco/poison")
    assert letter["id"] in json.dumps(finding)
    scrape = await running.scrape()
    assert scrape.total("dead_lettered_events_total") == 1
    assert scrape.broken_law() == {}


async def test_single_findings_refused(aws: FakeAws, forwarder: Start) -> None:
    """Inside an HTTP 200: InvalidInput is a dead letter, InternalError is tried again, the others are not."""
    aws.fail_findings(
        lambda found: found["GeneratorId"] == "falco/Rule 7", code="InvalidInput", message="no good"
    )
    aws.fail_findings(lambda found: found["GeneratorId"] == "falco/Rule 8", code="InternalError", times=3)
    running = await forwarder()
    bodies = alerts(40)
    await acknowledged(running, [b"\n".join(bodies)])
    await running.at_rest()
    assert rules_in_findings(aws) == names(bodies) - Counter(["Rule 7"])
    assert aws.finding_writes == 39, "what was accepted is not sent again"
    assert rules_in_logs(aws) == names(bodies)
    (letter,) = await running.json("/dead-letters")
    assert (letter["sink"], letter["reason"]) == (HUB, "invalid")
    assert "no good" in letter["detail"]
    assert json.loads(letter["body"])["rule"] == "Rule 7"
    scrape = await running.scrape()
    assert scrape.total("dead_lettered_events_total", sink=HUB, reason="invalid") == 1
    assert scrape.broken_law() == {}


async def test_times_no_service_accepts(aws: FakeAws, forwarder: Start) -> None:
    """From 2017, hours ahead, days apart: moved into the window where needed, Falco's own time untouched."""
    now = datetime.now(UTC)
    moments = {
        "2017": datetime(2017, 10, 1, tzinfo=UTC),
        "1970": datetime(1970, 1, 1, tzinfo=UTC),
        "15 days old": now - timedelta(days=15),
        "13 days old": now - timedelta(days=13),
        "2 days old": now - timedelta(days=2),
        "now": now,
        "1 h ahead": now + timedelta(hours=1),
        "3 h ahead": now + timedelta(hours=3),
        "2200": datetime(2200, 1, 1, tzinfo=UTC),
    }
    bodies = [
        body_of({"rule": name, "priority": "Error", "time": moment.isoformat().replace("+00:00", "Z")})
        for name, moment in moments.items()
    ]
    running = await forwarder()
    await acknowledged(running, [b"\n".join(bodies)])
    await running.at_rest()
    assert_nothing_lost(aws, bodies)
    adjusted = {m["rule"] for m in aws.messages() if m["forwarder"].get("timestamp_adjusted")}
    assert adjusted == {"2017", "1970", "15 days old", "3 h ahead", "2200"}
    for event in aws.events():
        message = json.loads(event.message)
        moment = moments[message["rule"]]
        assert message["time"] == moment.isoformat().replace("+00:00", "Z")
        if message["rule"] not in adjusted:
            assert event.timestamp == int(moment.timestamp() * 1000)
    scrape = await running.scrape()
    assert scrape.total("timestamp_adjusted_events_total", sink=CLOUDWATCH) == len(adjusted)
    await assert_well(aws, running)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59Z", "2554-07-21T23:34:34Z", "0001-01-01T00:00:00Z"])
async def test_times_beyond_64_bits_of_nanoseconds(aws: FakeAws, forwarder: Start, moment: str) -> None:
    """An absurd date is one odd alert, no end of the spool."""
    running = await forwarder()
    bodies = [body_of({"rule": "Odd", "priority": "Error", "time": moment}), *alerts(2)]
    async with asyncio.timeout(5):
        await acknowledged(running, bodies)
    await running.at_rest()
    assert_nothing_lost(aws, bodies)
    assert {message["rule"]: message.get("time") for message in aws.messages()}["Odd"] == moment
    await assert_well(aws, running)


async def test_what_waits_survives_a_restart(aws: FakeAws, forwarder: Start) -> None:
    """Stopped while AWS is down, within its grace; the next start delivers the rest and nothing twice."""
    first = await forwarder()
    await acknowledged(first, alerts(10, "Early"))
    await first.at_rest()
    faults = [aws.fail(name, times=None, status=500) for name in OPERATIONS.values()]
    await acknowledged(first, alerts(10, "Late"))
    await failing(first, CLOUDWATCH)
    started = time.monotonic()
    await first.stop()
    assert time.monotonic() - started < 6
    for fault in faults:
        fault.clear()
    second = await forwarder()
    await second.at_rest()
    assert rules_in_logs(aws) == names(alerts(10, "Early") + alerts(10, "Late"))
    assert rules_in_findings(aws) == rules_in_logs(aws)
    scrape = await second.scrape()
    assert scrape.total("sink_recovered", sink=CLOUDWATCH) == 10
    assert scrape.broken_law() == {}
    await assert_well(aws, second)


async def test_a_sink_enabled_later_starts_at_the_present(aws: FakeAws, forwarder: Start) -> None:
    """No flood of old findings on the day Security Hub is switched on."""
    aws_is_down = aws.fail("PutLogEvents", times=None, status=500)
    first = await forwarder({"sinks.security_hub": {"enabled": False}})
    await acknowledged(first, alerts(5, "Old"))
    await first.stop()
    aws_is_down.clear()
    second = await forwarder()
    await acknowledged(second, alerts(5, "New"))
    await second.at_rest()
    assert rules_in_findings(aws) == names(alerts(5, "New"))
    assert rules_in_logs(aws) == names(alerts(5, "Old") + alerts(5, "New"))


async def test_a_disabled_sinks_backlog_is_freed(aws: FakeAws, forwarder: Start) -> None:
    """What only a sink of yesterday waited for holds no room, and does not come back with it."""
    aws_is_down = aws.fail("BatchImportFindings", times=None, status=500)
    first = await forwarder()
    await acknowledged(first, alerts(50, "Old"))
    await first.at_rest(CLOUDWATCH)
    await first.until(lambda: first.app.status()["sinks"]["security_hub"]["pending"] == 50)
    await first.stop()
    second = await forwarder({"sinks.security_hub": {"enabled": False}})
    await second.until(lambda: second.app.status()["spool"]["alerts"] == 0)
    assert second.app.status()["spool"]["bytes"] == 0
    assert list(second.app.status()["sinks"]) == [CLOUDWATCH]
    await second.stop()
    aws_is_down.clear()
    third = await forwarder()
    await acknowledged(third, alerts(2, "New"))
    await third.at_rest()
    assert rules_in_findings(aws) == names(alerts(2, "New"))
