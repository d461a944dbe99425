"""A forwarder that runs inside a test's event loop, and how a test looks at it from outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml
from prometheus_client.parser import text_string_to_metric_families

from forwarder.app import Application
from forwarder.enrichment import ENRICHERS
from forwarder.metrics import PREFIX
from forwarder.settings import Settings, load_settings
from tests.falco import Answer, Falco, get

LOG_GROUP = "/falco/alerts"
STREAM = "replica-0"
REST_SECS_MAX = 15.0
STOP_SECS_MAX = 15.0


def settings_of(directory: Path, changes: Mapping[str, Any] | None = None) -> Settings:
    """Settings for a test: ``changes`` (nested, or with dotted keys) over both sinks on and free local ports."""
    return load_settings(configure(directory, changes), {})


def configure(directory: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write the configuration file of a test, at once as a ConfigMap's swap does; see ``settings_of``."""
    data: dict[str, Any] = {
        "cluster": {"name": "test-cluster"},
        "replica": {"name": STREAM},
        "spool": {"directory": str(directory / "spool")},
        "receiver": {"host": "127.0.0.1", "port": 0, "drain_delay_secs": 0},
        "admin": {"host": "127.0.0.1", "port": 0},
        "delivery": {"drain_secs_max": 2},
        "enrichment": {name: {"enabled": False} for name in ENRICHERS},
        "sinks": {
            "cloudwatch_logs": {"enabled": True, "log_group": LOG_GROUP, "linger_secs": 0.05},
            "security_hub": {
                "enabled": True,
                "linger_secs": 0.05,
                "rate_per_sec": 1000,
                "burst": 1000,
                "aggregation": {"enabled": False},
            },
        },
    }
    for key, value in (changes or {}).items():
        *sections, leaf = key.split(".")
        target = data
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = {**target[leaf], **value} if isinstance(value, Mapping) and leaf in target else value
    file = directory / "forwarder.yaml"
    replace(file, yaml.safe_dump(data))
    return file


def replace(file: Path, text: str) -> None:
    """Other content; nobody sees a half of it."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(file)


class Scrape:
    """What ``/metrics`` said, names without the prefix."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))

    def total(self, name: str, **labels: str) -> float:
        """Sum of the series of a sample name that carry these labels; fails where there is none."""
        found = [
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == f"{PREFIX}_{name}" and labels.items() <= sample.labels.items()
        ]
        assert found, f"no series {name} {labels}"
        return sum(found)

    def broken_law(self) -> dict[str, tuple[float, float]]:
        """Sides of the conservation law (see ``forwarder.metrics``) that do not balance."""
        sides = {
            "received": (
                self.total("received_events_total"),
                self.total("stored_events_total")
                + self.total("duplicate_events_total")
                + self.total("unparsed_events_total")
                + self.total("discarded_events_total"),
            )
        }
        for sink in self.sinks:
            sides[sink] = (
                self.total("sink_recovered", sink=sink) + self.total("stored_events_total"),
                self.total("filtered_events_total", sink=sink)
                + self.total("sent_events_total", sink=sink)
                + self.total("dead_lettered_events_total", sink=sink)
                + self.total("sink_pending", sink=sink)
                + self.total("sink_aggregating", sink=sink),
            )
        return {name: side for name, side in sides.items() if side[0] != side[1]}

    @property
    def sinks(self) -> set[str]:
        return {
            sample.labels["sink"]
            for family in self.families
            for sample in family.samples
            if sample.name == f"{PREFIX}_sink_pending"
        }


class Running:
    """One started application."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.stopped = False

    @property
    def port(self) -> int:
        return self.app.receiver.port

    def falco(self, **options: Any) -> Falco:
        """A sender for this forwarder."""
        return Falco(self.port, **options)

    async def post(self, *bodies: bytes) -> list[Answer]:
        """Post bodies one after the other on one connection."""
        async with self.falco() as falco:
            return [await falco.post(body) for body in bodies]

    async def get(self, path: str, *headers: str, method: str = "GET") -> Answer:
        """Ask the admin port."""
        return await get(self.app.admin.port, path, *headers, method=method)

    async def json(self, path: str) -> Any:
        answer = await self.get(path)
        assert answer.status == 200, answer
        return json.loads(answer.body)

    async def scrape(self) -> Scrape:
        answer = await self.get("/metrics")
        assert answer.status == 200
        return Scrape(answer.body.decode())

    async def until(self, condition: Callable[[], Any], secs: float = REST_SECS_MAX) -> None:
        """Wait for something to become true, seen from inside."""
        try:
            async with asyncio.timeout(secs):
                while not condition():  # noqa: ASYNC110 - what a test waits for announces itself to nobody
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not within {secs} s; {json.dumps(self.app.status())}") from None

    async def told(self, secs: float = REST_SECS_MAX) -> None:
        """Wait until nothing is pending and every count is told."""

        def idle() -> bool:
            return not any(
                state["pending"] + state["aggregating"] for state in self.app.status()["sinks"].values()
            )

        await self.until(idle, secs)
        await asyncio.sleep(0.02)  # as below
        await self.until(idle, secs)

    async def at_rest(self, *sinks: str, secs: float = REST_SECS_MAX) -> None:
        """Wait until these sinks (all, where none is named) have nothing pending; counts may wait for their time."""

        def idle() -> bool:
            states = self.app.status()["sinks"]
            return all(states[name]["pending"] == 0 for name in sinks or states)

        await self.until(idle, secs)
        await asyncio.sleep(0.02)  # the cursor moves a moment before its numbers are counted
        await self.until(idle, secs)

    async def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            async with asyncio.timeout(STOP_SECS_MAX):
                await self.app.stop()


class Start(Protocol):
    """The fixture ``forwarder``: starts one with changed settings, which reloads its rules if it shall."""

    async def __call__(
        self, changes: Mapping[str, Any] | None = None, *, reloads: bool = False
    ) -> Running: ...
