"""The watch over silent sensors: one finding for each node that no replica hears, archived when one does.

Each replica hears only the Falcos that are connected to it, and remembers nothing over a restart. So that a rolling restart, a node that
moves to another replica, or an API server that is away accuses nobody:

- A node is reported only where this replica has listened for it for ``silent_after_secs``: since its own start and since the node came.
- The other replicas are asked each round what they really heard, and it is remembered: one that is gone now may have been the last to
  hear a node. While one does not answer, nothing new is reported.
- While the list of nodes may be out of date, nothing new is reported: the node may be gone.
- What was reported before stays reported until somebody really hears the node, or it leaves the list.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import NamedTuple

import structlog

from forwarder.alert import encode
from forwarder.notice import Notice
from forwarder.record import ALERT, Record
from forwarder.sensors import Sensor, Sensors, SensorsSettings
from forwarder.timestamp import iso_milliseconds

ROUND_SECS = 15.0
NOTICES_PER_ROUND_MAX = 100
PATIENCE_ROUNDS = 4
SKEW_SECS_MAX = 300.0
"""Clocks of replicas may differ by so much; a time further ahead is nonsense."""
KEY = "sensor/"
RULE = "Falco sensor silent"
_PRIORITIES = {"informational": ("Informational", 6), "low": ("Notice", 5), "medium": ("Warning", 4)}
ADVICE = (
    "Check that its Falco pod runs, that it reaches the forwarder, and that it sends metrics snapshots: "
    "a quiet node says nothing else"
)

log = structlog.get_logger("sensors")


class Answers(NamedTuple):
    """What the other replicas say."""

    heard: Mapping[str, float]
    """The latest time any of them heard a node, seconds since 1970."""
    trouble: str = ""
    """Why somebody's answer is missing, or nothing."""


class Watch:
    """Compares, every ``ROUND_SECS``, what is silent with what is reported."""

    def __init__(
        self,
        settings: SensorsSettings,
        sensors: Sensors,
        *,
        ask: Callable[[], Awaitable[Answers]] | None,
        reported: Callable[[], Collection[str]],
        tell: Callable[[Notice], Awaitable[None]],
        now: Callable[[], float],
    ) -> None:
        """``reported`` gives the keys of active notices as they are stored; ``tell`` takes a new state of one."""
        self._settings = settings
        self._sensors = sensors
        self._ask = ask
        self._reported = reported
        self._tell = tell
        self._now = now
        self._elsewhere: dict[str, float] = {}
        self._troubled_rounds = 0
        self.trouble = ""
        """Why nothing new is reported at present."""

    async def run(self) -> None:
        """Until cancelled. A fault of ours costs one round."""
        while True:
            await asyncio.sleep(ROUND_SECS)
            try:
                await self.look()
            except Exception:
                log.exception("looking for silent sensors failed, trying again")

    async def look(self) -> None:
        """One round."""
        reported = {key.removeprefix(KEY) for key in self._reported() if key.startswith(KEY)}
        if not self._settings.finding.enabled:
            for node in sorted(reported)[:NOTICES_PER_ROUND_MAX]:
                await self._archive(node, "findings of silent sensors were turned off")
            return
        self._sensors.publish()
        if not self._sensors.known:
            return
        trouble = await self._hear_others()
        if not self._sensors.list_is_current():
            trouble = trouble or "the list of nodes may be out of date"
        self._say(trouble)
        for notice in self._changes(reported)[:NOTICES_PER_ROUND_MAX]:
            if not (notice.active and trouble):
                await self._tell(notice)

    async def _hear_others(self) -> str:
        """Ask the other replicas, and remember; what kept one from answering."""
        if self._ask is None:
            return ""
        answers = await self._ask()
        now = self._now()
        nodes = {sensor.node for sensor in self._sensors.all()}
        self._elsewhere = {node: at for node, at in self._elsewhere.items() if node in nodes}
        for node, at in answers.heard.items():
            if node in nodes and 0 < at <= now + SKEW_SECS_MAX:
                self._elsewhere[node] = max(min(at, now), self._elsewhere.get(node, at))
        return answers.trouble

    def _changes(self, reported: Collection[str]) -> list[Notice]:
        """What is over, then what is new."""
        now, limit = self._now(), self._sensors.silent_after_secs
        sensors = {sensor.node: sensor for sensor in self._sensors.all()}
        over = [
            self._over(node, "it is no longer a node Falco should run on")
            for node in sorted(set(reported) - sensors.keys())
        ]
        new = []
        for node, sensor in sensors.items():
            heard = self._last_heard(sensor)
            silent = heard is None or now - heard > limit
            if node in reported and heard is not None and not silent:
                over.append(self._over(node, f"it was heard at {_iso(heard)}"))
            elif node not in reported and silent and now - sensor.listened > limit:
                new.append(self._new(sensor, heard))
        return over + new

    def _last_heard(self, sensor: Sensor) -> float | None:
        """By any replica."""
        times = [at for at in (sensor.heard, self._elsewhere.get(sensor.node)) if at is not None]
        return max(times, default=None)

    async def _archive(self, node: str, why: str) -> None:
        await self._tell(self._over(node, why))

    def _over(self, node: str, why: str) -> Notice:
        return self._notice(node, f"Falco on node {node} is no longer reported as silent: {why}.", {})

    def _new(self, sensor: Sensor, heard: float | None) -> Notice:
        since = sensor.listened if heard is None else heard
        minutes = round((self._now() - since) / 60)
        said = (
            f"has not been heard since {_iso(since)} ({minutes} minutes)"
            if heard is not None
            else f"was never heard in {minutes} minutes, since {_iso(since)}"
        )
        facts = {
            "sensor.node": sensor.node,
            "sensor.silent_since": _iso(since),
            "sensor.last_heard": None if heard is None else _iso(heard),
            "sensor.falco_version": sensor.version or None,
        }
        return self._notice(sensor.node, f"Falco on node {sensor.node} {said}. {ADVICE}.", facts, active=True)

    def _notice(
        self, node: str, output: str, facts: Mapping[str, str | None], *, active: bool = False
    ) -> Notice:
        severity = self._settings.finding.severity
        priority, rank = _PRIORITIES[severity]
        now_ns = int(self._now() * 1e9)
        body = {
            "hostname": node,
            "output": output,
            "output_fields": facts,
            "priority": priority,
            "rule": RULE,
            "source": "forwarder",
            "tags": [],
            "time": f"{iso_milliseconds(now_ns)[:-1]}000000Z",
        }
        key = f"{KEY}{node}"
        record = Record(
            kind=ALERT,
            id=hashlib.sha256(f"{key}/{now_ns}".encode()).hexdigest()[:32],
            priority=rank,
            time_ns=now_ns,
            received_ns=now_ns,
            internal=False,
            body=encode(body),
            enrichment=self._sensors.node_enrichment(node),
            hostname=node,
        )
        return Notice(key, f"Falco sensor silent on node {node}", severity.upper(), active, record)

    def _say(self, trouble: str) -> None:
        """Once when it lasts, and once when it is over: a watch that begins again and a replica that restarts are usual."""
        if trouble:
            self._troubled_rounds += 1
            if self._troubled_rounds == PATIENCE_ROUNDS:
                log.warning("silent sensors cannot be told for sure: nothing new is reported", reason=trouble)
        else:
            if self._troubled_rounds >= PATIENCE_ROUNDS:
                log.info("silent sensors are reported again")
            self._troubled_rounds = 0
        self.trouble = trouble


def _iso(seconds: float) -> str:
    return iso_milliseconds(int(seconds * 1e9))
