"""Alerts and dashboards on a real Prometheus that scrapes two running replicas. Run by `make monitoring-test`."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.monitoring.asking import ALL, DASHBOARDS, Question, filled, insights, loaded, questions
from tests.monitoring.prometheus import Object, Prometheus, alerts_of, chart_groups, shortened
from tests.monitoring.scene import Scene, fresh, sample

RATE_SECS, RANGE_SECS = 10, 60
CHOSEN = ALL | {
    "cluster": "shop-prod",
    "namespace": "falco",
    "pod": "(falco-aws-forwarder-0|falco-aws-forwarder-1)",
    "sink": "security_hub",
}
"""As Grafana writes what somebody has chosen."""

pytestmark = [pytest.mark.usefixtures("impatient", "log_lines"), pytest.mark.timeout(110)]


async def test_alerts_and_dashboards(tmp_path: Path) -> None:
    """One story: all is well and seen, then one thing after the other breaks and is told."""
    groups = chart_groups()
    async with (
        Scene(tmp_path) as scene,
        Prometheus(tmp_path, scene.targets(), groups + shortened(groups)) as prometheus,
    ):
        await prometheus.until(lambda: _all_up(prometheus, 2), 20, "both replicas are up")
        await scene.every_node_speaks()
        async with _sending(scene):
            await _every_panel_has_data(prometheus)
            await _variables_have_values(prometheus)
            _every_insights_query_has_rows(scene)
            await _every_rule_is_healthy(prometheus, groups)
            await _no_alert_is_active(prometheus)
        await _refusals_are_told(scene, prometheus)
        await _strange_bodies_are_told(scene, prometheus)
        await _an_outage_is_told(scene, prometheus)
        await _absence_is_told(scene, prometheus)


@asynccontextmanager
async def _sending(scene: Scene) -> AsyncIterator[None]:
    """Real alerts, as long as the dashboards are looked at."""

    async def send() -> None:
        seed = random.Random(7)
        while True:
            await scene.send(20, seed)
            await asyncio.sleep(0.3)

    sending = asyncio.create_task(send())
    try:
        yield
    finally:
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending


async def _all_up(prometheus: Prometheus, count: int) -> bool:
    targets = (await prometheus.ask("targets", state="active"))["activeTargets"]
    return len(targets) == count and all(
        target["health"] == "up" and not target["lastError"] for target in targets
    )


async def _every_panel_has_data(prometheus: Prometheus) -> None:
    """Every query, with everything and with something chosen, has a number for at least one series."""
    asked = [(question, values) for question in questions("prometheus") for values in (ALL, CHOSEN)]
    assert len(asked) > 150
    missing = asked

    async def none_is_missing() -> bool:
        nonlocal missing
        missing = [
            (question, values)
            for question, values in missing
            if not await _has_data(prometheus, question, values)
        ]
        return not missing

    try:
        await prometheus.until(none_is_missing, 40)
    except AssertionError:
        left = [f"{it.dashboard}: {it.panel}: {it.expr}" for it, _ in missing]
        raise AssertionError("no data:\n" + "\n".join(left)) from None


async def _has_data(prometheus: Prometheus, question: Question, values: dict[str, str]) -> bool:
    expr = filled(question.expr, values, rate_secs=RATE_SECS, range_secs=RANGE_SECS)
    found = [series for series in await prometheus.query(expr) if series["value"][1] != "NaN"]
    for label in re.findall(r"\{\{(\w+)\}\}", question.legend):
        assert all(label in series["metric"] for series in found), f"{question.panel} is not by {label}"
    return bool(found)


async def _variables_have_values(prometheus: Prometheus) -> None:
    for file in DASHBOARDS:
        for variable in loaded(file)["templating"]["list"]:
            if variable["type"] == "query" and variable["datasource"]["type"] == "prometheus":
                selector, _, label = (
                    variable["definition"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
                )
                matching = {"match[]": filled(selector, ALL, rate_secs=RATE_SECS, range_secs=RANGE_SECS)}
                assert await prometheus.ask(f"label/{label}/values", **matching), variable["name"]


def _every_insights_query_has_rows(scene: Scene) -> None:
    """On the events that arrived, by a reader of the few commands they use: AWS itself is not asked."""
    events: list[Object] = [
        json.loads(it.message) | {"@timestamp": it.timestamp} for it in scene.aws.events()
    ]
    assert len(events) > 50
    asked = questions("cloudwatch")
    assert len(asked) >= 6
    for question in asked:
        rows = insights(
            filled(question.expr, {"bin": "1m"}, rate_secs=RATE_SECS, range_secs=RANGE_SECS), events
        )
        assert rows, question
        for name in rows[0]:
            assert any(row[name] is not None for row in rows), f"{question.panel}: nothing has {name}"


async def _every_rule_is_healthy(prometheus: Prometheus, groups: list[Object]) -> None:
    async def evaluated() -> bool:
        return all(rule["health"] != "unknown" for rule in await prometheus.rules())

    await prometheus.until(evaluated, 15, "every rule was evaluated")
    rules = await prometheus.rules()
    assert len(rules) == sum(len(group["rules"]) for group in groups) + len(alerts_of(groups))
    assert [rule for rule in rules if rule["health"] != "ok" or rule.get("lastError")] == []


async def _no_alert_is_active(prometheus: Prometheus) -> None:
    """None of the chart's fired at any time. SinkFailing may be pending until the first call of all has succeeded."""

    async def quiet() -> bool:
        return not [name for name, short in await prometheus.active() if not short]

    await prometheus.until(quiet, 15, "no alert is active")
    assert await prometheus.query('count_over_time(ALERTS{alertstate="firing", shortened=""}[5m])') == []


async def _told(prometheus: Prometheus, *names: str, short: bool = False, state: str = "firing") -> None:
    """Waits until the alerts are in this state: as the chart has them, or shortened."""

    async def seen() -> bool:
        active = await prometheus.active()
        return all(state in active.get((name, short), ()) for name in names)

    await prometheus.until(seen, 15, f"{names} {state}: {await prometheus.active()}")


async def _refusals_are_told(scene: Scene, prometheus: Prometheus) -> None:
    """No permission at one sink, the other service is off. The alerts without `for` fire as the chart has them."""
    denied = scene.aws.fail(
        "PutLogEvents", times=None, status=400, code="AccessDeniedException", message="not authorized"
    )
    scene.aws.hub_enabled = False
    for replica in (0, 1):
        await scene.post(replica, fresh(sample()[0] | {"rule": "Refused", "priority": "Critical"}))
    await _told(prometheus, "FalcoForwarderCredentials", "FalcoForwarderSecurityHubDisabled")
    await _told(prometheus, "FalcoForwarderSinkBlocked", state="pending")
    await _told(prometheus, "FalcoForwarderSinkBlocked", short=True)
    denied.clear()
    scene.aws.hub_enabled = True
    for running in scene.replicas:
        await running.told()


async def _strange_bodies_are_told(scene: Scene, prometheus: Prometheus) -> None:
    """What nobody can read, text, a guessed password, no TLS."""
    assert await scene.post(0, b'{"rule": ') == 400
    assert await scene.post(0, b"12:00:00.000000000: Warning Something happened (user=root)") == 200
    assert await scene.post_as_stranger() == 401
    await scene.post_in_plain()
    await _told(prometheus, "FalcoForwarderUnparsed", "FalcoForwarderTextMode", "FalcoForwarderAuthFailures")
    await _told(prometheus, "FalcoForwarderTlsHandshakes", state="pending")
    await _told(prometheus, "FalcoForwarderTlsHandshakes", short=True)


async def _an_outage_is_told(scene: Scene, prometheus: Prometheus) -> None:
    """AWS is gone. The chart's own alerts would take minutes: their short copies fire."""
    for running in scene.replicas:
        await running.told()
    port = int(scene.aws.url.rpartition(":")[2])
    await scene.aws.stop()
    for replica in (0, 1):
        await scene.post(replica, fresh(sample()[0]))
    await _told(
        prometheus,
        "FalcoForwarderDeliveryLate",
        "FalcoForwarderDeliveryVeryLate",
        "FalcoForwarderSinkFailing",
        short=True,
    )
    active = await prometheus.active()
    assert ("FalcoForwarderDeliveryLate", False) not in active, "after seconds, not minutes"
    await scene.aws.start(port)
    for running in scene.replicas:
        await running.told()

    async def over() -> bool:
        return not {name for name, short in await prometheus.active() if short and "Delivery" in name}

    await prometheus.until(over, 15, "the outage is over")


async def _absence_is_told(scene: Scene, prometheus: Prometheus) -> None:
    """First one replica is missing, then all are."""
    first, second = scene.replicas
    await first.stop()
    await _told(prometheus, "FalcoForwarderReplicaMissing", state="pending")
    await _told(prometheus, "FalcoForwarderReplicaMissing", short=True)
    assert not [name for name, _ in await prometheus.active() if name == "FalcoForwarderAbsent"]
    await second.stop()
    await _told(prometheus, "FalcoForwarderAbsent", state="pending")
    await _told(prometheus, "FalcoForwarderAbsent", short=True)
