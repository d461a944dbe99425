"""SIGKILL while alerts are counted into findings: the counts are exact all the same.

Falcos replay the real alerts round after round, each alert with a new time, and never repeat one. Kills fall at
random moments, between a finding's acceptance by the service and the note of it, and into starts, which load what
was counted.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.crash import counts
from tests.crash.harness import Stage, say, seeded
from tests.crash.oracle import read_spool
from tests.crash.senders import Load
from tests.samples import REAL_ALERTS

pytestmark = pytest.mark.crash

AT_FIRST, AT_RANDOM, WHILE_TELLING, WHILE_STARTING = (
    "at the first findings",
    "at random",
    "while telling",
    "while starting",
)
KILLS = [AT_RANDOM] * 3 + [WHILE_TELLING] * 4 + [WHILE_STARTING] * 2
KILL_AFTER_SECS = (0.1, 2.5)
START_KILL_AFTER_SECS = (0.1, 1.2)
TELL_SECS_MAX = 10.0
SENDERS, RATE = 4, 400.0
ROUNDS_MIN = 30
AGGREGATION = "{enabled: true, flush_secs: [1]}"


@pytest.fixture
def rng() -> random.Random:
    return seeded()


def _wait_for_a_finding(stage: Stage) -> bool:
    """Return between the service's acceptance of findings and its answer, so that nobody has noted that they are told."""
    deadline = time.monotonic() + TELL_SECS_MAX
    with stage.aws.journal.open("rb") as journal:
        journal.seek(0, 2)
        while time.monotonic() < deadline:
            if b'"kind": "finding"' in journal.read():
                return True
    return False


def test_ten_kills_miscount_nothing(tmp_path: Path, rng: random.Random) -> None:
    """One finding for each issue, its count that of the stored alerts, after 10 kills; no version contradicts one before."""
    kinds = [AT_FIRST, *rng.sample(KILLS, len(KILLS))]
    died: Counter[str] = Counter()
    with Stage(tmp_path, rng, aggregation=AGGREGATION) as stage:
        stage.aws.start()
        with Load(stage.ledger, stage.ports.receiver, senders=SENDERS, rate=RATE):
            for kind in kinds:
                if kind == AT_FIRST:
                    stage.forwarder.spawn()
                    assert _wait_for_a_finding(stage), "nothing was told"
                elif kind == WHILE_STARTING:
                    stage.forwarder.spawn()
                    time.sleep(rng.uniform(*START_KILL_AFTER_SECS))
                else:
                    stage.forwarder.start()
                    time.sleep(rng.uniform(*KILL_AFTER_SECS))
                    assert kind != WHILE_TELLING or _wait_for_a_finding(stage), "nothing was told"
                assert stage.forwarder.running, stage.forwarder.tail()
                stage.forwarder.kill()
                died[kind] += 1
            stage.forwarder.start()
            time.sleep(2.0)
        settled = stage.forwarder.drain()
        stage.forwarder.kill()
        spooled = read_spool(stage.spool)
        judged = counts.count(stage.ledger, stage.aws.journal)
        rounds = len(stage.ledger.attempts) / len(REAL_ALERTS)
        say(f"kills {dict(died)}; {rounds:.0f} rounds; settled in {settled:.1f} s; {judged}")
        assert judged.wrong == []
        assert set().union(*spooled.dead.values(), *spooled.waiting.values()) == set()
        assert spooled.integrity == "ok"
        assert died.total() == 10
        assert rounds >= ROUNDS_MIN, "hardly a replay"
        assert judged.unanswered > 0, "no kill cut a request"
        assert judged.retold > 0, "no kill fell between a finding and the note of it"
        assert judged.updates > 2 * judged.findings, "hardly an update"
        assert set(stage.ledger.statuses) == {0, 200}, stage.ledger.statuses
        assert "Traceback" not in stage.forwarder.text(), stage.forwarder.tail(40)
