"""A real Prometheus on 127.0.0.1, and the rules of the chart it is given."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

from tests.chart.rendering import CHART, objects_of, one
from tests.monitoring.scene import free_port

Object = dict[str, Any]

INSTALL = "install Prometheus (Debian: apt-get install --no-install-recommends prometheus)"
START_SECS_MAX, STOP_SECS_MAX = 30.0, 15.0
POLL_SECS = 0.1
RULES_FILE = CHART / "files/alerts.yaml"
SETS = [
    "image.repository=example/falco-aws-forwarder",
    "config.sinks.cloudwatch_logs.enabled=true,config.sinks.cloudwatch_logs.log_group=/falco/shop-prod",
    "prometheusRule.enabled=true",
]
THRESHOLDS = {"> 300": "> 1", "> 1800": "> 2", "> 600": "> 1"}
"""What `shortened` makes of the seconds in DeliveryLate, DeliveryVeryLate and SinkFailing."""


def program(name: str) -> str:
    """The path of one of Prometheus' programs."""
    found = shutil.which(name)
    assert found, f"{name} is missing: {INSTALL}"
    return found


def promtool(*arguments: str | Path) -> str:
    """What it says; anything it finds fault with is a failure."""
    done = subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chart_groups() -> list[Object]:
    """The groups of rules as the chart renders them."""
    groups: list[Object] = one(objects_of(None, sets=SETS), "PrometheusRule")["spec"]["groups"]
    return groups


def alerts_of(groups: list[Object]) -> dict[str, Object]:
    """The alerts by name."""
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def placeholders_in(text: str) -> set[str]:
    """Words in capitals: what the template fills in. Comments do not count."""
    code = re.sub(r"^ *#.*$", "", text, flags=re.MULTILINE)
    return set(re.findall(r"SELECTOR|SILENT_AFTER_SECS|[A-Z]+(?:_[A-Z]+)+", code))


def shortened(groups: list[Object]) -> list[Object]:
    """The same alerts that wait a second where they wait minutes, and of three the thresholds in seconds; marked by a label."""
    short = []
    for alert in alerts_of(groups).values():
        rule = {**alert, "labels": alert["labels"] | {"shortened": "yes"}}
        if "for" in rule:
            rule["for"] = "1s"
        if alert["alert"].startswith(("FalcoForwarderDelivery", "FalcoForwarderSinkFailing")):
            rule["expr"] = re.sub(
                "|".join(map(re.escape, THRESHOLDS)), lambda it: THRESHOLDS[it[0]], rule["expr"]
            )
            assert rule["expr"] != alert["expr"], alert["alert"]
        short.append(rule)
    return [{"name": "shortened", "rules": short}]


class Prometheus:
    """Scrapes and evaluates once a second."""

    def __init__(self, directory: Path, targets: list[Object], groups: list[Object]) -> None:
        self._directory = directory
        self._port = free_port()
        (directory / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
        configuration = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "falco-aws-forwarder", "static_configs": targets}],
        }
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(configuration))

    async def __aenter__(self) -> Self:
        with (self._directory / "prometheus.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                program("prometheus"),
                f"--config.file={self._directory / 'prometheus.yaml'}",
                f"--storage.tsdb.path={self._directory / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
                stdout=log,
                stderr=log,
            )
        self._session = aiohttp.ClientSession(f"http://127.0.0.1:{self._port}")
        try:
            await self.until(self._ready, START_SECS_MAX)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECS_MAX)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def until(self, condition: Callable[[], Awaitable[Any]], secs: float, what: str = "") -> None:
        """Wait for something Prometheus must see; it announces nothing, so it is asked."""
        deadline = time.monotonic() + secs
        while not await condition():
            if time.monotonic() > deadline or self._process.returncode is not None:
                log = (self._directory / "prometheus.log").read_text()[-2000:]
                raise AssertionError(f"not within {secs} s: {what}\n{log}")
            await asyncio.sleep(POLL_SECS)

    async def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the HTTP API; a query that cannot be evaluated is a failure."""
        async with (
            self._session.post(f"/api/v1/{path}", data=parameters)
            if path.startswith("query")
            else self._session.get(f"/api/v1/{path}", params=parameters) as answer
        ):
            body = await answer.json()
        assert body["status"] == "success", f"{path} {parameters}: {body.get('error')}"
        return body["data"]

    async def query(self, expr: str) -> list[Object]:
        """Series with their values of now."""
        found: list[Object] = (await self.ask("query", query=expr))["result"]
        return found

    async def query_range(self, expr: str, start: float, end: float, step: float) -> list[Object]:
        parameters = {"query": expr, "start": str(start), "end": str(end), "step": str(step)}
        found: list[Object] = (await self.ask("query_range", **parameters))["result"]
        return found

    async def rules(self) -> list[Object]:
        """Every rule, with its health."""
        return [rule for group in (await self.ask("rules"))["groups"] for rule in group["rules"]]

    async def active(self) -> dict[tuple[str, bool], set[str]]:
        """(Alert, whether of the shortened ones) -> states of what is pending or firing."""
        found: dict[tuple[str, bool], set[str]] = {}
        for alert in (await self.ask("alerts"))["alerts"]:
            labels = alert["labels"]
            found.setdefault((labels["alertname"], "shortened" in labels), set()).add(alert["state"])
        return found

    async def _ready(self) -> bool:
        try:
            async with self._session.get("/-/ready") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False
