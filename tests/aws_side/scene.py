"""What really arrives at AWS: the demo's alerts, through a real forwarder beside the demo's cluster, on the strict fake.

Templates, queries and patterns are judged by these events and findings, not by what somebody remembers of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import web

from forwarder import demo_kubernetes
from forwarder.app import Application
from forwarder.settings import load_settings
from tests.fakes.aws import FakeAws
from tests.running import Running, configure
from tests.samples import REAL_BODIES

NO_ALERT = b"this is no alert"
SILENT = "Falco sensor silent on node "


class Scene(NamedTuple):
    """Everything that was written."""

    events: list[dict[str, Any]]
    findings: list[dict[str, Any]]


def lead_to(aws: FakeAws, patch: pytest.MonkeyPatch) -> None:
    """An environment in which the SDK finds the fake and nothing else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    for name, value in (aws.environment() | nowhere).items():
        patch.setenv(name, value)


async def play(directory: Path) -> Scene:
    """Post every alert of the demo, and something that is none; wait until all of it is written."""
    runner = web.AppRunner(demo_kubernetes.application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    file = directory / "kubeconfig"
    file.write_text(demo_kubernetes.kubeconfig(f"http://127.0.0.1:{runner.addresses[0][1]}"))
    changes: Mapping[str, Any] = {
        "enrichment.kubernetes": {"enabled": True, "kubeconfig": str(file)},
        "sinks.security_hub": {"aggregation": {"flush_secs": [1]}},
    }
    with pytest.MonkeyPatch.context() as patch:
        async with FakeAws(rate_limits=False) as aws:
            lead_to(aws, patch)
            running = Running(Application(load_settings(configure(directory, changes), {}), validate=True))
            await running.app.start()
            try:
                await running.until(lambda: _synced(running.app.status()))
                await running.post(*REAL_BODIES, NO_ALERT)
                await running.told()
            finally:
                await running.stop()
                await runner.cleanup()
            return Scene(aws.messages(), list(aws.findings.values()))


def _synced(status: dict[str, Any]) -> bool:
    kinds = status["enrichment"]["kubernetes"].get("kinds", {})
    return bool(kinds) and all(kind["synced"] for kind in kinds.values())


def imported(finding: Mapping[str, Any]) -> dict[str, Any]:
    """The event "Security Hub Findings - Imported" of one finding, as the Security Hub user guide shows it."""
    return {
        "version": "0",
        "id": "8e5622f9-d81c-4d81-612a-9319e7ee2506",
        "detail-type": "Security Hub Findings - Imported",
        "source": "aws.securityhub",
        "account": finding["AwsAccountId"],
        "time": "2026-11-21T10:00:00Z",
        "region": finding["Region"],
        "resources": [f"{finding['ProductArn']}/{finding['Id']}"],
        "detail": {"findings": [json.loads(json.dumps(finding))]},
    }
