"""The rules of the house in earnest: every action from an alert's POST to a strict AWS, and new rules under load."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.counted import alert
from tests.fakes.aws import FakeAws
from tests.running import Running, Start, configure, replace
from tests.samples import body_of

pytestmark = pytest.mark.usefixtures("impatient")

LOGS, HUB = "cloudwatch_logs", "security_hub"
AGGREGATION: dict[str, dict[str, Any]] = {
    "one finding for each alert": {"enabled": False},
    "one finding for each issue": {"enabled": True, "flush_secs": [1]},
}
FOR_EVER, LONG_AGO = "2999-01-01", "2020-01-01"


@pytest.fixture(params=AGGREGATION)
def aggregation(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Rules mean the same with and without it."""
    return AGGREGATION[request.param]


def ruled(*rules: dict[str, Any], aggregation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings with these rules."""
    changes: dict[str, Any] = {"rules": list(rules)}
    return changes | ({"sinks.security_hub.aggregation": aggregation} if aggregation else {})


def body(rule: str, priority: str = "Error", **members: Any) -> bytes:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000000000Z")
    return body_of(alert(rule, priority, time=now, **members))


async def posted(running: Running, *bodies: bytes) -> None:
    """Acknowledged, every one, and dealt with."""
    answers = await running.post(*bodies)
    assert {(answer.status, answer.body) for answer in answers} == {(200, b"")}
    await running.told()


def logged(aws: FakeAws) -> list[str]:
    """Rules of the alerts that are in the logs."""
    return sorted(message["rule"] for message in aws.messages())


def found(aws: FakeAws) -> dict[str, dict[str, Any]]:
    """Findings by Falco's rule."""
    assert aws.validation_errors == []
    findings = {finding["GeneratorId"].removeprefix("falco/"): finding for finding in aws.findings.values()}
    assert len(findings) == len(aws.findings)
    return findings


async def filtered(running: Running) -> dict[tuple[str, str], int]:
    """Alerts by the sink that did not get them, and why; the law holds."""
    scrape = await running.scrape()
    assert scrape.broken_law() == {}
    counts = {
        (sample.labels["sink"], sample.labels["reason"]): int(sample.value)
        for family in scrape.families
        for sample in family.samples
        if sample.name == "falco_forwarder_filtered_events_total"
    }
    return {key: count for key, count in counts.items() if count}


def matched(running: Running) -> dict[str, dict[str, int]]:
    """What /status says of each rule."""
    return {rule["name"]: rule["matched"] for rule in running.app.status()["rules"]["rules"]}


# ---- actions ----------------------------------------------------------------------------------------


async def test_dropped_is_nowhere(aws: FakeAws, forwarder: Start, aggregation: dict[str, Any]) -> None:
    drop = {"name": "harmless", "match": {"rule": "Harmless*"}, "drop": True}
    running = await forwarder(ruled(drop, aggregation=aggregation))
    await posted(running, body("Harmless one"), body("Other"), body("Harmless two", "Critical"))
    assert logged(aws) == ["Other"]
    assert found(aws).keys() == {"Other"}
    assert await filtered(running) == {(LOGS, "drop"): 2, (HUB, "drop"): 2}
    assert matched(running) == {"harmless": {LOGS: 2, HUB: 2}}


async def test_silenced_is_in_the_logs_only(
    aws: FakeAws, forwarder: Start, aggregation: dict[str, Any]
) -> None:
    """Listed with who, why and until when; an ended one is listed too, and does nothing."""
    silence = {"until": FOR_EVER, "reason": "known scanner", "by": "maria"}
    running = await forwarder(
        ruled(
            {"name": "ended", "match": {"rule": "Scan"}, "silence": silence | {"until": LONG_AGO}},
            {"name": "scanner", "match": {"rule": "Scan"}, "silence": silence},
            aggregation=aggregation,
        )
    )
    await posted(running, body("Scan", nr=1), body("Scan", nr=2), body("Other"))
    assert logged(aws) == ["Other", "Scan", "Scan"]
    assert found(aws).keys() == {"Other"}
    assert await filtered(running) == {(HUB, "silence"): 2}
    shown = {"reason": "known scanner", "by": "maria"}
    assert (await running.json("/status"))["rules"]["silences"] == [
        {"name": "ended", "until": f"{LONG_AGO}T00:00:00Z", "state": "expired", "silenced": 0} | shown,
        {"name": "scanner", "until": f"{FOR_EVER}T00:00:00Z", "state": "active", "silenced": 2} | shown,
    ]
    assert (await running.scrape()).total("rules_silences_active") == 1


async def test_routed_by_sink(aws: FakeAws, forwarder: Start, aggregation: dict[str, Any]) -> None:
    running = await forwarder(
        ruled(
            {"match": {"namespace": "dev-*"}, "sinks": [LOGS]},
            {"match": {"tags": "finding_only"}, "sinks": [HUB]},
            aggregation=aggregation,
        )
    )
    await posted(
        running,
        body("To the logs", namespace="dev-1"),
        body("To the hub", tags=["finding_only"]),
        body("To both"),
    )
    assert logged(aws) == ["To both", "To the logs"]
    assert found(aws).keys() == {"To both", "To the hub"}
    assert await filtered(running) == {(HUB, "route"): 1, (LOGS, "route"): 1}
    assert matched(running)["rule 1"] == {LOGS: 1, HUB: 1}


async def test_minimum_priority_by_sink(aws: FakeAws, forwarder: Start, aggregation: dict[str, Any]) -> None:
    """Higher for one sink, lower for the other than its own; a sink that is not named keeps its own."""
    running = await forwarder(
        ruled(
            {"match": {"rule": "Loud*"}, "minimum_priority": {HUB: "critical", LOGS: "error"}},
            {"match": {"rule": "Quiet*"}, "minimum_priority": {HUB: "debug"}},
            aggregation=aggregation,
        )
    )
    priorities = ("Critical", "Error", "Warning")
    await posted(
        running,
        *[body(f"Loud {priority}", priority) for priority in priorities],
        body("Quiet", "Debug"),
        body("Usual", "Informational"),
    )
    assert logged(aws) == ["Loud Critical", "Loud Error", "Quiet", "Usual"]
    assert found(aws).keys() == {"Loud Critical", "Quiet"}
    assert await filtered(running) == {(LOGS, "minimum_priority"): 1, (HUB, "minimum_priority"): 3}


async def test_what_a_finding_says(aws: FakeAws, forwarder: Start, aggregation: dict[str, Any]) -> None:
    """Severity, types and remediation of the rule, in the place of the usual ones; the priority stays Falco's."""
    advice = {"text": "Call the payments team.", "url": "https://wiki.example.com/payments"}
    usual = {"text": "As usual."}
    running = await forwarder(
        ruled(
            {"match": {"rule": "Exempt"}},
            {
                "match": {"namespace": "pay*"},
                "severity": "CRITICAL",
                "finding_types": ["Effects/Data Exfiltration"],
                "remediation": advice,
            },
            {"match": {"rule": "Low"}, "severity": "informational", "remediation": {"text": "Ignore it."}},
            aggregation=aggregation,
        )
        | {"sinks.security_hub.remediation": dict.fromkeys(("Paid", "Exempt", "Low"), usual)}
    )
    await posted(
        running,
        body("Paid", "Notice", namespace="payments", tags=["mitre_execution"]),
        body("Exempt", "Notice", namespace="payments", tags=["mitre_execution"]),
        body("Low", "Critical"),
    )
    findings = found(aws)
    said = {
        rule: (
            finding["Severity"]["Label"],
            finding["FindingProviderFields"]["Severity"]["Original"],
            finding["Remediation"]["Recommendation"],
        )
        for rule, finding in findings.items()
    }
    assert said == {
        "Paid": ("CRITICAL", "Notice", {"Text": advice["text"], "Url": advice["url"]}),
        "Exempt": ("LOW", "Notice", {"Text": "As usual."}),
        "Low": ("INFORMATIONAL", "Critical", {"Text": "Ignore it."}),
    }
    assert findings["Paid"]["Types"] == ["Effects/Data Exfiltration"]
    assert findings["Exempt"]["Types"] == ["TTPs/Execution"]
    assert await filtered(running) == {}


async def one_more_failure(running: Running) -> None:
    """Of each sink: what is told after that was chosen later."""
    states = running.app.status()["sinks"]
    before = {name: state["retries"] for name, state in states.items()}
    await running.until(
        lambda: all(state["retries"] > before[n] for n, state in running.app.status()["sinks"].items())
    )


# ---- reload -----------------------------------------------------------------------------------------


async def reloads(running: Running, result: str) -> int:
    return int((await running.scrape()).total("rules_reloads_total", result=result))


async def noticed(running: Running, result: str, count: int) -> None:
    """Wait until so many new contents were seen with this result."""
    registry = running.app.metrics.registry
    name = "falco_forwarder_rules_reloads_total"
    await running.until(lambda: (registry.get_sample_value(name, {"result": result}) or 0) >= count)


class Sender:
    """Posts one alert after the other, four kinds in turn, and has every one acknowledged."""

    kinds = 4

    def __init__(self, running: Running) -> None:
        self._running = running
        self.number = 0
        """Of the next alert."""

    async def run(self) -> None:
        async with self._running.falco() as falco:
            while True:
                number = self.number
                self.number += 1
                raw = body(f"Kind {number % self.kinds}", uuid=f"n-{number}", nr=number)
                assert (await falco.post(raw)).status == 200
                await asyncio.sleep(0)


@asynccontextmanager
async def sending(running: Running) -> AsyncIterator[Sender]:
    sender = Sender(running)
    task = asyncio.create_task(sender.run())
    try:
        yield sender
        assert not task.done(), task
    finally:
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError), ended


def numbers_in_logs(aws: FakeAws) -> set[int]:
    return {int(message["id"].removeprefix("n-")) for message in aws.messages()}


def numbers_in_hub(aws: FakeAws) -> set[int]:
    return {int(finding["Id"].rpartition("/n-")[2]) for finding in aws.findings.values()}


WINDOW = 40
BOTH, LOGS_ONLY, NEITHER = (True, True), (True, False), (False, False)


async def window(aws: FakeAws, running: Running, sender: Sender) -> dict[int, set[tuple[bool, bool]]]:
    """Of alerts sent from now on, by kind: whether they came to the logs, and to the hub. The last kind goes to both."""
    first = sender.number
    last = first + WINDOW - (first + WINDOW) % Sender.kinds + Sender.kinds - 1
    await running.until(lambda: last in numbers_in_logs(aws) and last in numbers_in_hub(aws))
    logs, hub = numbers_in_logs(aws), numbers_in_hub(aws)
    seen: dict[int, set[tuple[bool, bool]]] = {}
    for number in range(first, last + 1):
        seen.setdefault(number % Sender.kinds, set()).add((number in logs, number in hub))
    return seen


async def test_new_rules_under_load(aws: FakeAws, forwarder: Start, tmp_path: Path) -> None:
    """The file changes six times, twice into something broken, while alerts come: each is decided by rules in force, none is lost."""
    running = await forwarder(reloads=True)
    drop = {"name": "drop", "match": {"rule": "Kind 0"}, "drop": True}
    silence = {
        "name": "silence",
        "match": {"rule": "Kind 1"},
        "silence": {"until": FOR_EVER, "reason": "test", "by": "me"},
    }
    route = {"name": "route", "match": {"rule": "Kind 2"}, "sinks": [LOGS]}
    faulty = {"name": "faulty", "drop": True, "severity": "loud"}
    as_usual = {kind: {BOTH} for kind in range(Sender.kinds)}
    async with sending(running) as sender:
        assert await window(aws, running, sender) == as_usual

        configure(tmp_path, ruled(drop))
        await noticed(running, "ok", 1)
        assert await window(aws, running, sender) == as_usual | {0: {NEITHER}}

        configure(tmp_path, ruled(drop, silence))
        await noticed(running, "ok", 2)
        in_force = as_usual | {0: {NEITHER}, 1: {LOGS_ONLY}}
        assert await window(aws, running, sender) == in_force

        configure(tmp_path, ruled(faulty, route))
        await noticed(running, "failed", 1)
        assert (await running.scrape()).total("rules_reload_ok") == 0
        assert await window(aws, running, sender) == in_force
        assert list(matched(running)) == ["drop", "silence"]

        replace(tmp_path / "forwarder.yaml", "rules: [{name: cut off")
        await noticed(running, "failed", 2)
        assert (await running.scrape()).total("rules_reload_ok") == 0
        assert await window(aws, running, sender) == in_force

        configure(tmp_path, ruled(route))
        await noticed(running, "ok", 3)
        assert (await running.scrape()).total("rules_reload_ok") == 1
        assert await window(aws, running, sender) == as_usual | {2: {LOGS_ONLY}}

        configure(tmp_path, {})
        await noticed(running, "ok", 4)
        assert await window(aws, running, sender) == as_usual
    await running.told()
    sent = sender.number
    counts = await filtered(running)
    scrape = await running.scrape()
    assert sent - 1 <= scrape.total("stored_events_total") <= sent, "the last one's connection was cut"
    stored = int(scrape.total("stored_events_total"))
    assert len(aws.events()) == len(numbers_in_logs(aws)) == stored - counts[LOGS, "drop"]
    assert counts.keys() == {(LOGS, "drop"), (HUB, "drop"), (HUB, "silence"), (HUB, "route")}
    assert len(aws.findings) == stored - sum(count for (sink, _), count in counts.items() if sink == HUB)
    lost = [number % Sender.kinds for number in set(range(stored)) - numbers_in_logs(aws)]
    assert set(lost) == {0}, "only what was dropped"
    assert (await reloads(running, "ok"), await reloads(running, "failed")) == (4, 2)
    assert scrape.total("dead_lettered_events_total") == 0
    assert aws.validation_errors == []


async def test_new_rules_while_counting(aws: FakeAws, forwarder: Start, tmp_path: Path) -> None:
    """With aggregation, rules that come and go every moment: every alert is told, or filtered with its reason."""
    rng = random.Random(4)
    aggregation = AGGREGATION["one finding for each issue"]
    running = await forwarder(ruled(aggregation=aggregation), reloads=True)
    versions: list[dict[str, Any]] = [
        {"match": {"rule": "Kind 0"}, "silence": {"until": FOR_EVER, "reason": "test", "by": "me"}},
        {"match": {"rule": "Kind 1"}, "severity": "CRITICAL"},
        {"match": {"rule": "Kind 2"}, "sinks": [LOGS]},
        {"match": {"rule": "Kind 2"}, "minimum_priority": {HUB: "critical"}},
    ]
    async with sending(running) as sender:
        for number in range(1, 25):
            rules = rng.sample(versions, rng.randint(0, len(versions)))
            configure(
                tmp_path,
                ruled(
                    {"name": f"version {number}", "match": {"rule": "None"}}, *rules, aggregation=aggregation
                ),
            )
            await noticed(running, "ok", number)
            sent = sender.number
            await running.until(lambda wanted=sent + 2 * Sender.kinds: sender.number >= wanted)  # type: ignore[misc]
        configure(tmp_path, ruled(aggregation=aggregation))
        await noticed(running, "ok", 25)
        sent = sender.number
        await running.until(lambda: sender.number >= sent + 20)
    await running.told()
    counts = await filtered(running)
    scrape = await running.scrape()
    stored = int(scrape.total("stored_events_total"))
    assert counts.keys() <= {(HUB, "silence"), (HUB, "route"), (HUB, "minimum_priority")}
    assert len(counts) > 1, "hardly a rule was in force"
    assert scrape.total("sent_events_total", sink=HUB) == stored - sum(counts.values())
    assert numbers_in_logs(aws) == set(range(stored))
    told = {rule: int(finding["ProductFields"]["falco/count"]) for rule, finding in found(aws).items()}
    kinds = Counter(f"Kind {number % Sender.kinds}" for number in range(stored))
    assert told["Kind 3"] == kinds["Kind 3"]
    assert told["Kind 1"] == kinds["Kind 1"]
    kept_out = counts.get((HUB, "route"), 0) + counts.get((HUB, "minimum_priority"), 0)
    # What was counted before a rule and kept back by it when it was to be told is in the count, should the finding be told later.
    assert kinds["Kind 2"] - kept_out <= told["Kind 2"] <= kinds["Kind 2"]
    assert found(aws)["Kind 1"]["Severity"]["Label"] == "CRITICAL"


async def test_what_waited_meets_the_rules_of_now(
    aws: FakeAws, forwarder: Start, tmp_path: Path, aggregation: dict[str, Any]
) -> None:
    """An outage of both sinks, and new rules during it: decided when it is delivered, but for the call under way."""
    faults = [
        aws.fail(operation, times=None, status=503, code="ServiceUnavailableException")
        for operation in ("PutLogEvents", "BatchImportFindings")
    ]
    running = await forwarder(ruled(aggregation=aggregation), reloads=True)
    for answer in await running.post(body("Drop"), body("Silence"), body("Usual")):
        assert answer.status == 200
    await one_more_failure(running)
    silence = {"until": FOR_EVER, "reason": "test", "by": "me"}
    configure(
        tmp_path,
        ruled(
            {"match": {"rule": "Drop"}, "drop": True},
            {"match": {"rule": "Silence"}, "silence": silence},
            aggregation=aggregation,
        ),
    )
    await noticed(running, "ok", 1)
    await one_more_failure(running)
    for fault in faults:
        fault.clear()
    await running.told()
    assert found(aws).keys() == {"Usual"}
    counts = await filtered(running)
    assert (counts[HUB, "silence"], counts[HUB, "drop"]) == (1, 1)
