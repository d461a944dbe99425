"""The application under test with clocks of its own, alerts with what must come of them, and the comparison."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.cluster.mirrored import KINDS
from tests.cluster.scene import REGION, Scene, cluster_resource, container_resource, pod_resource
from tests.enriched import alert
from tests.fakes.aws import FakeAws
from tests.running import Running

PLACE = {"Region": REGION, "Partition": "aws"}


class Clock:
    """The application's clocks, which a test can put forward."""

    def __init__(self) -> None:
        self.ahead_secs = 0.0

    def now(self) -> float:
        return time.time() + self.ahead_secs

    def now_ns(self) -> int:
        return time.time_ns() + int(self.ahead_secs * 1e9)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_secs


async def fresh(running_app: Running) -> None:
    """Everything is listed and watched."""

    def ready() -> bool:
        running_app.app.publish()
        kinds = running_app.app.status()["enrichment"]["kubernetes"].get("kinds", {})
        return len(kinds) == len(KINDS) and not any(kind["stale"] for kind in kinds.values())

    await running_app.until(ready)


def stamp(secs: float) -> str:
    """Falco's time."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(secs)) + f".{int(secs % 1 * 1e9):09d}Z"


def short(identity: str) -> str:
    return identity[:12]


class Case(NamedTuple):
    """An alert and what must come of it; without ``kubernetes`` or ``node`` the event has none."""

    fields: Mapping[str, Any]
    kubernetes: Mapping[str, Any] | None = None
    node: str = ""
    members: Mapping[str, Any] = {}
    container: Mapping[str, Any] | None = None
    """The finding's first resource, where it is not what ``kubernetes`` tells."""


async def check(running_app: Running, aws: FakeAws, scene: Scene, cases: Mapping[str, Case]) -> None:
    """Post all, compare all: the events' ``kubernetes`` and ``node``, the findings' ``Resources``."""
    now = {"time": stamp(time.time())}
    await running_app.post(
        *[alert(case.fields, output=name, **now | dict(case.members)) for name, case in cases.items()]
    )
    await running_app.at_rest()
    events = {event["output"]: event for event in aws.messages()}
    findings = {finding["Description"]: finding for finding in aws.findings.values()}
    for name, case in cases.items():
        event = events[name]
        assert event.get("kubernetes") == case.kubernetes, name
        assert event.get("node") == (scene.node_of(case.node) if case.node else None), name
        if case.members.get("source") == "internal":
            assert name not in findings
            continue
        assert findings[name]["Resources"] == resources_of(scene, case, event.get("hostname") or ""), name
    assert aws.validation_errors == []


def resources_of(scene: Scene, case: Case, hostname: str) -> list[dict[str, Any]]:
    """Container, else pod or namespace; host; cluster. The first one is the target."""
    found: list[dict[str, Any]] = []
    told = case.kubernetes or {}
    if case.container is not None:
        found.append(dict(case.container))
    elif "container_id" in told:
        found.append(container_resource(told))
    elif "namespace" in told:
        found.append(pod_resource(told))
    if case.node:
        found.append(scene.host_resource(case.node, hostname))
    elif hostname:
        found.append({"Type": "Other", "Id": hostname, "Details": {"Other": {"hostname": hostname}}} | PLACE)
    found.append(cluster_resource())
    found[0] = found[0] | {"ResourceRole": "Target"}
    return found


def told_container(identity: str, **facts: str) -> dict[str, Any]:
    """``Container`` where only Falco's word is there."""
    details = {"Details": {"Other": facts}} if facts else {}
    return {"Type": "Container", "Id": identity} | PLACE | details
