"""One service down for an hour of simulated time at 200 alerts a second, the other one up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import structlog

from forwarder.batch import Item, Limits
from forwarder.contract import Reject, Transient
from forwarder.delivery import Worker
from forwarder.delivery_calls import DeliverySettings
from forwarder.metrics import Metrics
from forwarder.record import Record
from forwarder.spool import Spool
from forwarder.spool_settings import SpoolSettings
from tests.scripted import ScriptedSink, inline

HOUR_SECS, PER_SEC = 3600, 200
BODY = b'{"rule":"Terminal shell in container","priority":"Notice","output":"%06d"}'
MEMORY_MIB_MAX = 60
LIMITS = {"cloudwatch_logs": Limits(10_000, 1_000_000), "security_hub": Limits(100, 5_500_000)}


@pytest.fixture(autouse=True)
def nothing_blocks() -> None:
    """Replaces the check for blocking calls: in simulated time the spool writes on the loop."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Captured debug lines of an hour would be most of the memory."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


class Counting(ScriptedSink):
    """Counts instead of keeping every id, so that its memory does not hide the forwarder's."""

    def __init__(self, name: str, down: str) -> None:
        super().__init__(name, limits=LIMITS[name], concurrency_max=4, call_secs=0.02)
        self.down = down == name
        self.total = 0

    async def deliver(self, items: Sequence[Item]) -> dict[int, Reject]:
        await asyncio.sleep(self.call_secs)
        if self.down:
            raise Transient("connection refused", code="network")
        self.total += len(items)
        return {}


@pytest.mark.looptime
@pytest.mark.timeout(150)
@pytest.mark.parametrize("down", ["cloudwatch_logs", "security_hub"])
async def test_an_hour_of_outage(down: str, tmp_path: Path) -> None:
    """The healthy sink keeps up, the other catches up completely, storing never stops, memory stays bounded."""
    names = list(LIMITS)
    metrics = Metrics(names)
    settings = SpoolSettings(directory=str(tmp_path), sync="normal", bytes_max=1 << 30)
    spool = inline(Spool(settings, sinks=names, metrics=metrics, now=lambda: 1.0))
    await spool.open()
    sinks = {name: Counting(name, down) for name in names}
    workers = [
        Worker(
            sink,
            spool=spool,
            settings=DeliverySettings(),
            metrics=metrics,
            now=lambda: 1.0,
            rng=random.Random(1),
        )
        for sink in sinks.values()
    ]
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    worst_healthy = 0
    (healthy,) = set(names) - {down}
    for second in range(HOUR_SECS):
        await spool.append(
            [Record(0, f"{second}-{i}", 5, 1, 1, internal=False, body=BODY % i) for i in range(PER_SEC)]
        )
        await asyncio.sleep(1)
        assert spool.admits(7), "nothing is ever refused"
        worst_healthy = max(worst_healthy, spool.pending(healthy))
    total = HOUR_SECS * PER_SEC
    assert spool.pending(down) == total
    assert worst_healthy <= 5 * PER_SEC
    sinks[down].down = False
    started = asyncio.get_running_loop().time()
    while spool.pending(down):  # noqa: ASYNC110 - simulated time
        await asyncio.sleep(0.5)
    assert asyncio.get_running_loop().time() - started < HOUR_SECS
    assert (sinks[healthy].total, sinks[down].total) == (total, total)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    assert grown < MEMORY_MIB_MAX, f"grew by {grown:.0f} MiB"
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await spool.close()
