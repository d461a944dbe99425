"""docs/validate.md, as far as it can be gone through here: its two real alerts, a forwarder with its default times, a strict AWS.

What was measured is written to build/validate.json; the page says what it was.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.session import get_session
from aiohttp import web

from forwarder import demo_kubernetes
from forwarder.issues_settings import AggregationSettings
from forwarder.sinks.cloudwatch_logs import CloudWatchLogsSettings
from forwarder.sinks.security_hub import SecurityHubSettings
from tests.fakes.aws import FakeAws
from tests.running import Running, Start
from tests.samples import REAL_ALERTS, REAL_BODIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "validate.md").read_text()
SHADOW, ETC = "Read sensitive file untrusted", "Write below etc"
POD = "payments-api-7d4b9c6f58-x2x9k"
SHADOW_COMMAND, ETC_COMMAND = "cat /etc/shadow", "touch /etc/falco-act-test"
LINGER_SECS = CloudWatchLogsSettings().linger_secs
FIRST_FLUSH_SECS = AggregationSettings().flush_secs[0]
SLACK_SECS = 2.0
"""For two busy cores; what was measured is in build/validate.json."""

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def nothing_blocks() -> None:
    """Replaces the check for blocking calls: the demo's API server, which is in the same process, reads the sample."""


def real(rule: str, command: str) -> list[bytes]:
    """The sample's alerts of the rule that this command raised in the pod `payments-api`."""
    return [
        body
        for body, alert in zip(REAL_BODIES, REAL_ALERTS, strict=True)
        if alert["rule"] == rule
        and alert["output_fields"].get("proc.cmdline") == command
        and alert["output_fields"].get("container.name") == "payments-api"
    ]


async def until(condition: Callable[[], bool], secs: float, began: float) -> float:
    """Seconds since `began` when it came true."""
    async with asyncio.timeout(secs):
        while not condition():  # noqa: ASYNC110 - the fake announces itself to nobody
            await asyncio.sleep(0.005)
    return round(time.monotonic() - began, 3)


def finding_of(aws: FakeAws, rule: str) -> dict[str, Any]:
    found = [finding for finding in aws.findings.values() if finding["Title"] == rule]
    return found[0] if found else {}


def counted(aws: FakeAws, rule: str, alerts: int) -> Callable[[], bool]:
    return lambda: finding_of(aws, rule).get("ProductFields", {}).get("falco/count") == str(alerts)


def written(aws: FakeAws, rule: str) -> Callable[[], bool]:
    return lambda: any(event["rule"] == rule for event in aws.messages())


async def started(forwarder: Start, directory: Path, api: str) -> Running:
    """With the default times, beside the demo's cluster."""
    file = directory / "kubeconfig"
    file.write_text(demo_kubernetes.kubeconfig(api))
    hub = SecurityHubSettings()
    running = await forwarder(
        {
            "enrichment.kubernetes": {"enabled": True, "kubeconfig": str(file)},
            "sinks.cloudwatch_logs": {"linger_secs": LINGER_SECS},
            "sinks.security_hub": {
                "linger_secs": hub.linger_secs,
                "aggregation": {"enabled": True},
                "rate_per_sec": hub.rate_per_sec,
                "burst": hub.burst,
            },
        }
    )

    def synced() -> bool:
        kinds = running.app.status()["enrichment"]["kubernetes"].get("kinds", {})
        return bool(kinds) and all(kind["synced"] for kind in kinds.values())

    await running.until(synced)
    return running


async def test_the_scenario(aws: FakeAws, forwarder: Start, tmp_path: Path) -> None:
    """Each alert's event and finding within the batch's linger; a repetition is counted, and told with the first update."""
    runner = web.AppRunner(demo_kubernetes.application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        running = await started(forwarder, tmp_path, f"http://127.0.0.1:{runner.addresses[0][1]}")
        (etc,), (shadow, again) = real(ETC, ETC_COMMAND), real(SHADOW, SHADOW_COMMAND)
        seconds: dict[str, float] = {}
        for rule, body in ((ETC, etc), (SHADOW, shadow)):
            began = time.monotonic()
            (answer,) = await running.post(body)
            assert answer.status == 200
            seconds[f"{rule}: answered"] = round(time.monotonic() - began, 3)
            seconds[f"{rule}: log event"] = await until(written(aws, rule), 10, began)
            seconds[f"{rule}: finding"] = await until(counted(aws, rule, 1), 10, began)
        assert max(seconds.values()) < LINGER_SECS + SLACK_SECS
        said_as_the_page_says(aws)
        await found_as_the_page_says(aws)

        began = time.monotonic()
        await running.post(again)
        await until(lambda: running.app.status()["sinks"]["security_hub"]["aggregating"] == 1, 10, began)
        assert counted(aws, SHADOW, 1)()
        seconds["repetition: finding"] = await until(counted(aws, SHADOW, 2), FIRST_FLUSH_SECS + 30, began)
        assert (
            FIRST_FLUSH_SECS - SLACK_SECS - LINGER_SECS
            < seconds["repetition: finding"]
            < FIRST_FLUSH_SECS + SLACK_SECS
        )
        status = running.app.status()["sinks"]
        assert {(sink["pending"], sink["dead_letters"]) for sink in status.values()} == {(0, 0)}
        (ROOT / "build").mkdir(exist_ok=True)
        (ROOT / "build" / "validate.json").write_text(json.dumps(seconds, indent=2) + "\n")
    finally:
        await runner.cleanup()


def said_as_the_page_says(aws: FakeAws) -> None:
    """What the page's table tells of events and findings."""
    for rule, severity, types in (
        (ETC, "HIGH", "TTPs/Persistence"),
        (SHADOW, "MEDIUM", "TTPs/Credential Access/T1555"),
    ):
        (event,) = [event for event in aws.messages() if event["rule"] == rule]
        assert (event["kubernetes"]["namespace"], event["kubernetes"]["pod"]) == ("shop", POD)
        finding = finding_of(aws, rule)
        assert finding["Severity"]["Label"] == severity
        assert finding["Types"][0].startswith(types)
        assert finding["ProductFields"]["falco/id"] == event["id"]
        row = next(line for line in PAGE.splitlines() if line.startswith("|") and f"`{rule}`" in line)
        assert severity in row
        assert f"`{event['priority']}`" in row


async def found_as_the_page_says(aws: FakeAws) -> None:
    """The page's `get-findings` finds both findings."""
    commands = re.findall(r"get-findings.*?--filters '(.*?)'", PAGE, re.DOTALL)
    assert commands
    async with get_session().create_client("securityhub") as hub:
        for filters in commands:
            answer = await hub.get_findings(Filters=json.loads(filters))
            assert {finding["Title"] for finding in answer["Findings"]} >= {ETC, SHADOW}


def test_the_page_names_the_default_times() -> None:
    assert f"`linger_secs` ({LINGER_SECS:g} s)" in PAGE
    assert f"{FIRST_FLUSH_SECS:g} s" in PAGE
