"""The main job, whole and in earnest: real alerts in by HTTP, out to a strict AWS."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections import Counter
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from forwarder.alert import RESERVED_KEYS
from forwarder.metrics import PREFIX
from forwarder.sensors_metrics import FAMILIES
from tests.fakes.aws import FakeAws
from tests.running import LOG_GROUP, STREAM, Running, Start
from tests.samples import REAL_ALERTS, REAL_BODIES, TEXT_LINES, body_of

FINDING_PRIORITIES = {"Emergency", "Alert", "Critical", "Error", "Warning", "Notice"}
NOT_JSON = b'{"rule": "cut off in the midd'


def becomes_finding(alert: dict[str, Any]) -> bool:
    internal = alert.get("source") == "internal" or alert["rule"].startswith("Falco internal: ")
    return alert["priority"] in FINDING_PRIORITIES and not internal


def same(sent: Any, stored: Any) -> bool:
    """Equal in value and type, all the way down: 1 is not 1.0 and not true."""
    if type(sent) is not type(stored):
        return False
    if isinstance(sent, dict):
        return sent.keys() == stored.keys() and all(same(sent[key], stored[key]) for key in sent)
    if isinstance(sent, list):
        return len(sent) == len(stored) and all(map(same, sent, stored))
    return bool(sent == stored)


def falcos_part(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in RESERVED_KEYS}


def logs_hold_exactly(aws: FakeAws, alerts: list[dict[str, Any]]) -> bool:
    """Each alert is there once, its own keys unchanged, and nothing else."""
    missing = list(alerts)
    for message in aws.messages():
        found = next((alert for alert in missing if same(alert, falcos_part(message))), None)
        if found is None:
            return False
        missing.remove(found)
    return not missing


async def test_every_real_alert_arrives(aws: FakeAws, forwarder: Start) -> None:
    """Acknowledged with an empty 200, one log event each with Falco's keys unchanged, one finding where it should be."""
    running = await forwarder()
    answers = await running.post(*REAL_BODIES)
    assert {(answer.status, answer.body) for answer in answers} == {(200, b"")}
    await running.at_rest()
    assert aws.validation_errors == []
    assert logs_hold_exactly(aws, REAL_ALERTS)

    expected = [alert for alert in REAL_ALERTS if becomes_finding(alert)]
    assert 0 < len(expected) < len(REAL_ALERTS), "the sample has both kinds"
    assert len(aws.findings) == aws.finding_writes == len(expected)
    assert Counter(finding["GeneratorId"] for finding in aws.findings.values()) == Counter(
        f"falco/{alert['rule']}" for alert in expected
    )
    assert Counter(
        finding["FindingProviderFields"]["Severity"]["Original"] for finding in aws.findings.values()
    ) == Counter(alert["priority"] for alert in expected)
    scrape = await running.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("sent_events_total", sink="cloudwatch_logs") == len(REAL_ALERTS)
    assert scrape.total("sent_events_total", sink="security_hub") == len(expected)
    assert scrape.total("dead_lettered_events_total") == 0
    assert scrape.total("retries_total") == 0


async def test_events_carry_our_own_keys(aws: FakeAws, forwarder: Start) -> None:
    """id, cluster, account, region in every event, in the configured group and the replica's stream."""
    running = await forwarder()
    await running.post(*REAL_BODIES)
    await running.at_rest()
    events = [json.loads(event.message) for event in aws.events(LOG_GROUP, STREAM)]
    assert len(events) == len(REAL_BODIES)
    for event in events:
        assert (event["cluster"], event["account"], event["region"]) == (
            "test-cluster",
            aws.account,
            aws.region,
        )
        assert event["forwarder"]["version"]
        assert event["forwarder"]["received"].endswith("Z")
    assert len({event["id"] for event in events}) == len(events)
    finding = next(iter(aws.findings.values()))
    assert (finding["AwsAccountId"], finding["Region"]) == (aws.account, aws.region)
    text = json.dumps(list(aws.findings.values()))
    assert "test-cluster" in text
    ids = {event["id"] for event in events if becomes_finding(event)}
    assert all(any(identity in json.dumps(found) for identity in ids) for found in aws.findings.values())


@pytest.mark.parametrize("form", ["again", "ndjson", "array"])
async def test_the_same_alerts_again_change_nothing(aws: FakeAws, forwarder: Start, form: str) -> None:
    """The file posted twice, in whatever form: no event more, no finding written again, all of it acknowledged."""
    running = await forwarder()
    await running.post(*REAL_BODIES)
    await running.at_rest()
    events, writes = aws.events(), aws.finding_writes
    bodies = {
        "again": REAL_BODIES,
        "ndjson": [b"\n".join(REAL_BODIES) + b"\n"],
        "array": [b"[" + b", ".join(REAL_BODIES) + b"]"],
    }[form]
    answers = await running.post(*bodies)
    assert {(answer.status, answer.body) for answer in answers} == {(200, b"")}
    await running.at_rest()
    assert aws.events() == events
    assert (aws.finding_writes, aws.finding_ignored) == (writes, 0)
    scrape = await running.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("duplicate_events_total") == len(REAL_BODIES)
    assert scrape.total("stored_events_total") == len(REAL_BODIES)


@pytest.mark.parametrize("form", [b"\n".join, lambda bodies: b"[" + b",".join(bodies) + b"]"])
async def test_many_alerts_in_one_body(aws: FakeAws, forwarder: Start, form: Any) -> None:
    """NDJSON and an array deliver what single posts deliver."""
    running = await forwarder()
    (answer,) = await running.post(form(REAL_BODIES))
    assert (answer.status, answer.body) == (200, b"")
    await running.at_rest()
    assert logs_hold_exactly(aws, REAL_ALERTS)
    assert len(aws.findings) == sum(map(becomes_finding, REAL_ALERTS))
    assert aws.validation_errors == []


async def test_numbers_arrive_as_they_were_sent(aws: FakeAws, forwarder: Start) -> None:
    """Beyond 2^53, beyond 64 bits, exponents and trailing zeros: digit by digit."""
    fields = (
        b'{"ns":1739178940698757001,"big":123456789012345678901234567890,"f":1.0,"e":1E5,"neg":-0.0,"t":1.50}'
    )
    body = (
        b'{"output_fields":'
        + fields
        + b',"priority":"Notice","rule":"Numbers","time":"2026-01-01T00:00:00Z"}'
    )
    running = await forwarder()
    assert (await running.post(body))[0].status == 200
    await running.at_rest()
    (event,) = aws.events()
    assert fields.decode() in event.message
    assert len(aws.findings) == 1
    assert "1739178940698757001" in json.dumps(list(aws.findings.values()))
    assert aws.validation_errors == []


async def post_a_mix(running: Running) -> int:
    """Stored, duplicate, unparsed, text-mode and filtered alerts; returns how many alerts that were."""
    debug = body_of({"rule": "Quiet", "priority": "Debug", "output": "psst"})
    internal = body_of(
        {"rule": "Falco internal: syscall event drop", "priority": "Critical", "source": "internal"}
    )
    batch = b"\n".join([*REAL_BODIES[3:6], body_of({"rule": "In a batch", "priority": "Error"})])
    bodies = [
        *REAL_BODIES[:4],
        REAL_BODIES[0],
        NOT_JSON,
        b"",
        TEXT_LINES[0],
        debug,
        internal,
        batch,
        NOT_JSON,
    ]
    await running.post(*bodies)
    return len(bodies) + 3


async def test_nothing_is_lost_in_the_numbers(aws: FakeAws, forwarder: Start, impatient: None) -> None:
    """The conservation law at rest, over every way an alert can take."""
    running = await forwarder({"sinks.cloudwatch_logs": {"minimum_priority": "informational"}})
    count = await post_a_mix(running)
    await running.at_rest()
    await asyncio.sleep(0.15)  # the spool's own gauges follow with its housekeeping
    scrape = await running.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("received_events_total") == count
    assert scrape.total("duplicate_events_total") == 2
    assert scrape.total("unparsed_events_total") == 3
    assert scrape.total("text_mode_events_total") == 1
    assert scrape.total("unparsed_forwarded_events_total", sink="cloudwatch_logs") == 3
    assert scrape.total("filtered_events_total", sink="cloudwatch_logs") == 1
    assert scrape.total("filtered_events_total", sink="security_hub") >= 3
    assert scrape.total("dead_letter_events", sink="receiver") == 3
    assert len(aws.events()) == scrape.total("stored_events_total") + 3 - 1


async def test_the_law_holds_after_a_restart(aws: FakeAws, forwarder: Start, impatient: None) -> None:
    """What waited on disk, unparsed bodies included, is accounted for by the next process."""
    aws.fail("PutLogEvents", times=None, status=503, code="ServiceUnavailableException")
    aws.fail("BatchImportFindings", times=None, status=503, code="ServiceUnavailableException")
    first = await forwarder()
    await post_a_mix(first)
    waiting = (await first.scrape()).broken_law()
    await first.stop()
    for fault in aws._faults:
        fault.clear()
    second = await forwarder()
    await second.at_rest()
    assert (waiting, (await second.scrape()).broken_law()) == ({}, {})


async def test_discarded_is_what_was_really_refused(aws: FakeAws, forwarder: Start, impatient: None) -> None:
    """With a full spool and no patience every 503 is one discarded alert, by priority; the law still holds."""
    fault = aws.fail("PutLogEvents", times=None, status=503, code="ServiceUnavailableException")
    running = await forwarder({"spool.bytes_max": 1 << 20, "receiver.hold_secs_max": 0})
    bodies = [
        body_of({"rule": f"Rule {n}", "priority": "Critical", "output": os.urandom(60_000).hex()})
        for n in range(30)
    ]
    answers = await running.post(*bodies)
    statuses = Counter(answer.status for answer in answers)
    assert statuses.keys() == {200, 503}
    scrape = await running.scrape()
    assert scrape.total("discarded_events_total", reason="spool_full", priority="critical") == statuses[503]
    assert scrape.total("discarded_events_total") == statuses[503]
    fault.clear()
    await running.at_rest()
    assert (await running.scrape()).broken_law() == {}
    stored = {message["rule"] for message in aws.messages()}
    acknowledged = {f"Rule {n}" for n, answer in enumerate(answers) if answer.status == 200}
    assert stored == acknowledged
    await running.until(lambda: running.app.spool.fill < 0.9)
    assert (await running.post(bodies[-1]))[0].status == 200, "a refused alert is no duplicate"


async def test_every_declared_metric_is_in_the_first_scrape(aws: FakeAws, forwarder: Start) -> None:
    """With every label value, at 0: alert rules and dashboards never meet a gap."""
    running = await forwarder()
    scrape = await running.scrape()
    registry: CollectorRegistry = running.app.metrics.registry
    declared = {family.name for family in registry.collect()}
    seen = {family.name for family in scrape.families if not family.name.endswith("_created")}
    assert seen == declared
    assert all(name.startswith(PREFIX) for name in declared)
    empty = {family.name for family in scrape.families if not family.samples}
    assert empty == {family.name.removesuffix("_total") for family in FAMILIES if family.labels}, (
        "of nodes, and there is no node list"
    )
    assert not any(math.isnan(sample.value) for family in scrape.families for sample in family.samples)
    before = {(sample.name, *sorted(sample.labels.items())) for f in scrape.families for sample in f.samples}
    await post_a_mix(running)
    await running.at_rest()
    after = await running.scrape()
    assert {(s.name, *sorted(s.labels.items())) for f in after.families for s in f.samples} == before


async def test_stop_delivers_what_waits(aws: FakeAws, forwarder: Start) -> None:
    """A stop does not wait for the linger time, and leaves nothing behind where AWS is well."""
    running = await forwarder(
        {"sinks.cloudwatch_logs": {"linger_secs": 60}, "sinks.security_hub": {"linger_secs": 60}}
    )
    await running.post(*REAL_BODIES)
    assert aws.events() == []
    await running.stop()
    assert logs_hold_exactly(aws, REAL_ALERTS)
    assert len(aws.findings) == sum(map(becomes_finding, REAL_ALERTS))
