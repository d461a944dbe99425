"""The whole application beside a fake API server: what it hears of sensors, and the finding of one that is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forwarder import sensors_watch
from tests.e2e.test_enrichment import NODE, api, changes
from tests.enriched import alert, resource
from tests.fakes import kubernetes_objects as objects
from tests.fakes.aws import FakeAws
from tests.fakes.kubernetes import FakeKubernetes
from tests.running import Running, Start

__all__ = ["api"]

pytestmark = pytest.mark.usefixtures("impatient")


async def listed(running: Running, nodes: int) -> None:
    def ready() -> bool:
        running.app.publish()
        return len(running.app.sensors.all()) == nodes and running.app.sensors.list_is_current()

    await running.until(ready)


async def test_metrics_and_what_other_replicas_are_told(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path
) -> None:
    api.create("nodes", objects.node("quiet", internal_ip="10.0.1.18"))
    running = await forwarder(changes(api, tmp_path))
    await listed(running, 2)
    assert await running.json("/sensors") == {"nodes": {}}
    await running.post(alert({"container.id": "host"}, hostname=NODE))
    await running.until(lambda: running.app.sensors.heard()["nodes"])  # whether or not anybody scrapes
    told = await running.json("/sensors")
    assert list(told["nodes"]) == [NODE]
    scrape = await running.scrape()
    assert scrape.total("sensors_expected") == 2
    assert scrape.total("sensors_silent") == 0
    assert scrape.total("sensor_last_seen_seconds", node=NODE) == pytest.approx(told["nodes"][NODE], abs=0.1)
    assert (await running.json("/status"))["sensors"] == {"node_list": True, "expected": 2, "silent_here": 0}


async def test_the_selector_of_the_settings_is_heeded(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path
) -> None:
    api.create("nodes", objects.node("selected", labels={"falco": "yes"}, internal_ip="10.0.1.18"))
    running = await forwarder(changes(api, tmp_path) | {"sensors.node_selector": {"falco": "yes"}})
    await running.until(lambda: len(running.app.status()["enrichment"]["kubernetes"].get("kinds", {})))
    await listed(running, 1)
    assert [sensor.node for sensor in running.app.sensors.all()] == ["selected"]


async def test_the_finding_of_a_silent_sensor_comes_and_goes(
    aws: FakeAws, forwarder: Start, api: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors_watch, "ROUND_SECS", 0.1)
    running = await forwarder(changes(api, tmp_path) | {"sensors.finding.enabled": True})
    await listed(running, 1)
    running.app.sensors.silent_after_secs = 0.3

    def finding() -> Any:
        return next((found for found in aws.findings.values() if "Falco sensor silent" in found["Title"]), {})

    await running.until(lambda: finding().get("RecordState") == "ACTIVE")
    assert finding()["Title"] == f"Falco sensor silent on node {NODE}"
    assert resource(finding(), "AwsEc2Instance")["Id"].endswith("instance/i-0123456789abcdef0")
    running.app.sensors.silent_after_secs = 600
    await running.post(alert({"container.id": "host"}, hostname=NODE))
    await running.until(lambda: finding().get("RecordState") == "ARCHIVED")
    assert not any("Falco sensor silent" in str(message) for message in aws.messages())
    assert aws.validation_errors == []
