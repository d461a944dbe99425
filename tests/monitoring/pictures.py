"""Fills a real Prometheus for some minutes and writes down what the panels' queries say: what `draw.py` makes pictures of.

Run by `make monitoring-pictures`. Two replicas, the demo's real alerts, and a story: a quiet start, more and more alerts, half a minute without AWS,
a flood, some that are turned away.
"""

# ruff: noqa: T201 - a program of the command line

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from forwarder import logs  # noqa: E402 - found after the line above
from tests.monitoring.asking import ALL, DASHBOARDS, filled, insights, loaded, panels  # noqa: E402 - as above
from tests.monitoring.prometheus import Prometheus, chart_groups  # noqa: E402 - as above
from tests.monitoring.scene import Scene  # noqa: E402 - as above

SECS = 240
OUTAGE = range(95, 125)
FLOOD = range(170, 185)
SNAPSHOT_EVERY_SECS = 20
STEP_SECS, RATE_SECS = 2, 12
SHOWN = ROOT / "build/monitoring/panels.json"


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="falco-forwarder-monitoring-") as folder:
        directory = Path(folder)
        with (directory / "forwarder.log").open("w") as log:
            logs.configure("warning", log)
            async with (
                Scene(directory, flush_secs=(2, 5, 15)) as scene,
                Prometheus(directory, scene.targets(), chart_groups()) as prometheus,
            ):
                print(f"two replicas and Prometheus run; this takes {SECS} s", flush=True)
                start = time.time()
                await _story(scene)
                found = await _shown(scene, prometheus, start, time.time())
    SHOWN.parent.mkdir(parents=True, exist_ok=True)
    SHOWN.write_text(json.dumps(found))
    print(f"wrote {SHOWN.relative_to(ROOT)}")


async def _story(scene: Scene) -> None:
    seed = random.Random(11)
    port = int(scene.aws.url.rpartition(":")[2])
    clock = asyncio.get_running_loop().time
    began = clock()
    for second in range(SECS):
        await asyncio.sleep(max(0.0, began + second - clock()))
        if second == OUTAGE.start:
            await scene.aws.stop()
        if second == OUTAGE.stop:
            await scene.aws.start(port)
        if second % SNAPSHOT_EVERY_SECS == 0:
            await scene.every_node_speaks(drops=second // 60)
        if second % 50 == 40:
            await scene.post_as_stranger()
        rate = 12 + 8 * math.sin(second / 25) + second / 20 + (90 if second in FLOOD else 0)
        await scene.send(round(rate * seed.uniform(0.7, 1.3)), seed)


async def _shown(scene: Scene, prometheus: Prometheus, start: float, end: float) -> dict[str, Any]:
    """Dashboard -> its panels, each with what its queries found."""
    events = [json.loads(it.message) | {"@timestamp": it.timestamp} for it in scene.aws.events()]
    found: dict[str, Any] = {"start": start, "end": end}
    for file in DASHBOARDS:
        shown = loaded(file)
        for panel in panels(shown):
            panel["found"] = [
                await _asked(prometheus, target, panel["type"], events, start, end)
                for target in panel["targets"]
            ]
        found[file.stem] = shown["panels"]
    return found


async def _asked(
    prometheus: Prometheus,
    target: dict[str, Any],
    kind: str,
    events: list[dict[str, Any]],
    start: float,
    end: float,
) -> list[Any]:
    if target["datasource"]["type"] == "cloudwatch":
        return insights(
            filled(target["expression"], {"bin": "10s"}, rate_secs=RATE_SECS, range_secs=SECS), events
        )
    expr = filled(target["expr"], ALL, rate_secs=RATE_SECS, range_secs=SECS)
    if kind == "table":
        return await prometheus.query(expr)
    return await prometheus.query_range(expr, start, end, STEP_SECS)


if __name__ == "__main__":
    asyncio.run(main())
