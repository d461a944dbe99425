"""SIGKILL at random moments under load: what a killed process had acknowledged is delivered after its restart.

The page cache survives a killed process, so this says nothing about a power cut (``test_power_cut``). It does
exercise recovery of the write-ahead log, kills between an AWS call and its cursor, and kills during a start.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

import pytest

from tests.crash.harness import Stage, say, seeded
from tests.crash.senders import Load

pytestmark = pytest.mark.crash

KILLS = 20
KILL_AFTER_SECS = (0.05, 1.6)
START_KILL_EVERY = 5
START_KILL_AFTER_SECS = (0.1, 1.2)
AIMED_KILL_EVERY = 4
READY_SECS_MAX = 5.0
RATE_MIN = 300.0


def _wait_for_delivery(stage: Stage) -> None:
    """Return between AWS's acceptance of a call and its answer, so that the cursor is still behind it."""
    before = stage.aws.journal.stat().st_size
    deadline = time.monotonic() + 10.0
    while stage.aws.journal.stat().st_size == before and time.monotonic() < deadline:
        pass


@pytest.fixture
def rng() -> random.Random:
    return seeded()


def test_twenty_kills_lose_nothing(tmp_path: Path, rng: random.Random) -> None:
    """Every alert acknowledged before any of 20 kills is delivered, unaltered, and starts stay fast."""
    starts: list[float] = []
    with Stage(tmp_path, rng) as stage:
        stage.aws.start()
        up_secs = 0.0
        with Load(stage.ledger, stage.ports.receiver):
            for number in range(1, KILLS + 1):
                if number % START_KILL_EVERY == 0:
                    # One kill in the midst of a start, which may already be replaying the log.
                    stage.forwarder.spawn()
                    time.sleep(rng.uniform(*START_KILL_AFTER_SECS))
                    stage.forwarder.kill()
                starts.append(stage.forwarder.start())
                since = time.monotonic()
                time.sleep(rng.uniform(*KILL_AFTER_SECS))
                if number % AIMED_KILL_EVERY == 0:
                    _wait_for_delivery(stage)
                stage.forwarder.kill()
                up_secs += time.monotonic() - since
            starts.append(stage.forwarder.start())
            since = time.monotonic()
            time.sleep(2.0)
            up_secs += time.monotonic() - since
        drained = stage.forwarder.drain()
        verdict = stage.judge()
        rate = verdict.acknowledged / up_secs
        say(
            f"{stage.forwarder.starts} starts, ready after {statistics.median(starts):.2f} s in the median, "
            f"{max(starts):.2f} s at most; {rate:.0f} acknowledged/s while up; drained in {drained:.1f} s"
        )
        statuses = stage.ledger.statuses
        assert set(statuses) == {0, 200}, statuses
        assert statuses[0] >= KILLS, "the kills broke hardly a request"
        assert verdict.redelivered > 0, "no kill fell between a delivery and its cursor"
        assert verdict.dead == 0, verdict
        assert rate >= RATE_MIN, "too little load"
        assert statistics.median(starts) < READY_SECS_MAX, starts


def test_kills_while_aws_is_down_lose_nothing(tmp_path: Path, rng: random.Random) -> None:
    """What three killed processes left in the spool while AWS was down is delivered by the fourth."""
    with Stage(tmp_path, rng) as stage:
        stage.aws.start()
        with Load(stage.ledger, stage.ports.receiver):
            stage.forwarder.start()
            time.sleep(0.5)
            stage.aws.kill()
            for _ in range(3):
                time.sleep(rng.uniform(1.0, 2.0))
                stage.forwarder.kill()
                stage.forwarder.start()
        waiting = stage.forwarder.pending
        say(f"{waiting} alerts wait in the spool after three kills")
        assert waiting > 500, "hardly anything waited"
        stage.forwarder.kill()
        stage.aws.start()
        stage.forwarder.start()
        stage.forwarder.drain()
        verdict = stage.judge()
        assert verdict.dead == 0, verdict
        assert verdict.waiting == 0, verdict
