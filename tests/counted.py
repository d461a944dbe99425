"""The pipeline of findings in simulated time: a spool on disk, a log sink beside, the worker for findings, a strict hub."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forwarder.alert import rank
from forwarder.batch import Item
from forwarder.contract import Reject
from forwarder.delivery import Worker
from forwarder.delivery_calls import DeliverySettings
from forwarder.delivery_findings import FindingsWorker
from forwarder.ingest import STORED, Ingest
from forwarder.metrics import Metrics
from forwarder.rules import RuleBook
from forwarder.rules_settings import RuleSettings
from forwarder.spool import Spool
from forwarder.spool_settings import SpoolSettings
from tests.hub import Hub
from tests.samples import body_of
from tests.scripted import LARGE, ScriptedSink, inline

LOGS, HUB = "cloudwatch_logs", "security_hub"
STARTED_AT = 1_800_000_000.0


class Logs(ScriptedSink):
    """Counts what it took: every alert once."""

    def __init__(self) -> None:
        super().__init__(LOGS, limits=LARGE, call_secs=0.02)
        self.took: Counter[str] = Counter()

    async def deliver(self, items: Sequence[Item]) -> dict[int, Reject]:
        await asyncio.sleep(self.call_secs)
        self.took.update(item.data.decode() for item in items)
        return {}


class Pipeline:
    """Ingest to hub. ``kill`` ends it as SIGKILL does: nothing more is written; ``start`` goes on from the disk."""

    def __init__(self, directory: Path, *, bytes_max: int = 1 << 28, **settings: Any) -> None:
        self.directory = directory
        self.bytes_max = bytes_max
        self.skew_secs = 0.0
        """Added to the wall clock."""
        self.hub = Hub(now=self.now, **settings)
        self.logs = Logs()
        self.rules: Sequence[RuleSettings] = ()
        self.complete: Any = lambda record: record

    def now(self) -> float:
        return STARTED_AT + asyncio.get_running_loop().time() + self.skew_secs

    async def start(self) -> None:
        self.metrics = Metrics([LOGS, HUB])
        settings = SpoolSettings(directory=str(self.directory), sync="normal", bytes_max=self.bytes_max)
        self.spool = inline(Spool(settings, sinks=[LOGS, HUB], metrics=self.metrics, now=self.now))
        await self.spool.open()
        self.book = RuleBook(self.rules, now=self.now)
        self.ingest = Ingest(
            spool=self.spool,
            metrics=self.metrics,
            hold_secs_max=0,
            now_ns=lambda: int(self.now() * 1e9),
            now_monotonic=asyncio.get_running_loop().time,
        )
        options: dict[str, Any] = {
            "spool": self.spool,
            "settings": DeliverySettings(),
            "metrics": self.metrics,
            "now": self.now,
            "rng": random.Random(1),
            "rules": self.book,
            "complete": self.complete,
        }
        self.worker = FindingsWorker(self.hub.sink, **options)
        await self.worker.load()
        self.tasks = [
            asyncio.create_task(work) for work in (Worker(self.logs, **options).run(), self.worker.run())
        ]
        await asyncio.sleep(0)

    async def post(self, *alerts: dict[str, Any]) -> None:
        """Each a body of its own, acknowledged."""
        for alert in alerts:
            assert await self.ingest.take(body_of(alert)) is STORED

    async def kill(self) -> None:
        for task in self.tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.spool.close()

    async def told(self, secs: float = 90_000) -> None:
        """Until every count is told."""
        async with asyncio.timeout(secs):
            while (status := self.worker.status()).pending or status.aggregating:  # noqa: ASYNC110 - simulated time
                await asyncio.sleep(0.25)

    async def quiet(self, secs: float = 600) -> None:
        """Until nothing is pending; counts may wait for their time."""
        async with asyncio.timeout(secs):
            await asyncio.sleep(0.01)
            while self.worker.status().pending:  # noqa: ASYNC110 - simulated time
                await asyncio.sleep(0.05)

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"falco_forwarder_{name}", labels)
        assert value is not None, name
        return value

    async def dead(self) -> list[tuple[str, str]]:
        letters = await self.spool.dead_letters(1 << 60, 1000)
        return [(letter.reason, letter.detail) for _, letter in letters]


def alert(
    rule: str = "Terminal shell in container", priority: str = "Warning", **members: Any
) -> dict[str, Any]:
    """An alert of a pod, unless told otherwise; ``nr`` makes its bytes new."""
    fields = {
        "k8s.ns.name": members.pop("namespace", "shop"),
        "k8s.pod.name": members.pop("pod", "web-1"),
        "container.name": members.pop("container", "web"),
        "nr": members.pop("nr", 0),
    }
    return {
        "rule": rule,
        "priority": priority,
        "source": "syscall",
        "hostname": "node-1",
        "output": f"{rule} happened",
        "time": "2027-01-15T08:00:00.000000000Z",
        "output_fields": fields | members.pop("fields", {}),
    } | members


def moved(body: dict[str, Any], at: float, number: int) -> dict[str, Any]:
    """The same alert at another time; ``number`` sets apart what is the same in the file."""
    time = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{number:09d}Z"
    return body | {"time": time}


def is_finding(body: dict[str, Any]) -> bool:
    internal = body.get("source") == "internal" or body["rule"].startswith("Falco internal: ")
    return not internal and (rank(body["priority"]) or 0) <= 5


def about(body: dict[str, Any]) -> tuple[Any, ...]:
    """What an alert is about, as docs/findings.md says it, without enrichment: written without looking at the code."""
    fields = body.get("output_fields") or {}

    def text(*names: str) -> str:
        values = (fields.get(name) for name in names)
        return next((value for value in values if isinstance(value, str) and value not in {"", "<NA>"}), "")

    source = body.get("source") or "syscall"
    namespace = text("k8s.ns.name", "k8smeta.ns.name", "ka.target.namespace")
    pod = text("k8s.pod.name", "k8smeta.pod.name")
    container = (
        text("container.name").replace("host", "")
        if text("container.name") == "host"
        else text("container.name")
    )
    if source == "syscall":
        return body["rule"], source, namespace, pod, container, "" if pod else body.get("hostname", "")
    user = text("ka.user.name", "ct.user", "okta.actor.name", "github.user", "gcp.user")
    target = (text("ka.target.resource"), text("ka.target.name"))
    return body["rule"], source, namespace, pod, container, user, target
