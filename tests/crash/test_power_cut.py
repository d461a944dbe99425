"""A simulated power cut: only what was synced survives.

A library preloaded into the forwarder (``power_cut.c``) keeps a copy of each spool file as of its last sync. The
cut is SIGKILL, after which the copy takes the place of the spool directory. In the torn rounds each disk sector
written since that sync survives or not by chance, as with a disk that had begun to write. What the model leaves
out: directory entries count as durable, and a sector is written whole or not at all.

The control runs the same cut with ``sync: normal``, which syncs only at checkpoints and promises nothing here: it
must lose alerts, or the model would prove nothing.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.crash.harness import MIB, Stage, say, seeded
from tests.crash.oracle import judge, read_spool
from tests.crash.senders import Load

pytestmark = pytest.mark.crash

SECTOR_BYTES = 512
ROUNDS_AWS_DOWN, ROUNDS_AWS_UP = 4, 4
CUT_AFTER_SECS = (0.5, 2.5)
CONTROL_ALERTS = 150
TEMPORARY = ".tmp-"
LOG = "spool.db-wal"


@pytest.fixture
def rng() -> random.Random:
    return seeded()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """The preloaded library, built here."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.fail("the power-cut tests need a C compiler named cc (gcc or clang)", pytrace=False)
    built = tmp_path / "power_cut.so"
    source = Path(__file__).with_name("power_cut.c")
    command = [compiler, "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(built), str(source), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if result.returncode != 0:
        pytest.fail(f"power_cut.c does not compile:\n{result.stderr}", pytrace=False)
    return built


class PowerCut:
    """A stage whose spool lives on a disk that forgets what was not synced."""

    def __init__(
        self, directory: Path, rng: random.Random, library: Path, *, sync: str, bytes_max: int
    ) -> None:
        self._rng = rng
        spool = directory.resolve() / "spool"
        self.shadow = directory.resolve() / "shadow"
        for folder in (spool, self.shadow):
            folder.mkdir()
        environment = {
            "LD_PRELOAD": str(library),
            "POWER_CUT_DIR": str(spool),
            "POWER_CUT_SHADOW": str(self.shadow),
        }
        self.stage = Stage(
            directory, rng, spool=spool, environment=environment, sync=sync, bytes_max=bytes_max
        )

    def cut(self, *, torn: bool) -> None:
        """Kill the process and leave in the spool directory what a disk would have kept."""
        stage = self.stage
        stage.forwarder.kill()
        for path in self.shadow.glob(f"{TEMPORARY}*"):
            path.unlink()
        for path in self.shadow.iterdir() if torn else ():
            written = stage.spool / path.name
            if written.exists():
                path.write_bytes(self._tear(path.read_bytes(), written.read_bytes()))
        shutil.rmtree(stage.spool)
        shutil.copytree(self.shadow, stage.spool)
        assert read_spool(stage.spool).integrity == "ok"

    def _tear(self, synced: bytes, written: bytes) -> bytes:
        """Of each sector that was written since the last sync, the new or the old state."""
        length = self._rng.choice((len(synced), len(written)))
        sectors = []
        for start in range(0, length, SECTOR_BYTES):
            old, new = (data[start : start + SECTOR_BYTES] for data in (synced, written))
            kept = new if not old or (new and self._rng.random() < 0.5) else old
            sectors.append(kept.ljust(SECTOR_BYTES, b"\0"))
        return b"".join(sectors)[:length]

    def syncs(self, name: str) -> int:
        """How often the library saw a sync of a file."""
        log = Path(f"{self.shadow}.syncs")
        return log.read_text().splitlines().count(name) if log.exists() else 0


def test_power_cuts_lose_nothing_with_full_sync(tmp_path: Path, rng: random.Random, library: Path) -> None:
    """Everything acknowledged before any of 8 power cuts is delivered, with AWS down and with AWS up."""
    # A small quota keeps the log small, which is copied at every sync.
    power = PowerCut(tmp_path, rng, library, sync="full", bytes_max=16 * MIB)
    with power.stage as stage:
        kinds = itertools.cycle((False, True))
        acknowledged = []
        for up in [False] * ROUNDS_AWS_DOWN + [True] * ROUNDS_AWS_UP:
            if up and not stage.aws.running:
                stage.aws.start()
            before = len(stage.ledger.acknowledged)
            stage.forwarder.start()
            with Load(stage.ledger, stage.ports.receiver):
                time.sleep(rng.uniform(*CUT_AFTER_SECS))
                power.cut(torn=next(kinds))
            acknowledged.append(len(stage.ledger.acknowledged) - before)
            if not up:
                waiting = read_spool(stage.spool).waiting["cloudwatch_logs"]
                lost = stage.ledger.acknowledged.keys() - waiting
                assert not lost, f"{len(lost)} acknowledged alerts are not in the spool after a power cut"
        stage.forwarder.start()
        stage.forwarder.drain()
        verdict = stage.judge()
        say(f"acknowledged a round: {acknowledged}; syncs: {power.syncs(LOG)} of the log")
        assert min(acknowledged) > 0, acknowledged
        assert power.syncs(LOG) > len(acknowledged), "the library saw hardly a sync"
        assert power.syncs("spool.db") > 0, "no checkpoint was synced"
        assert verdict.waiting == verdict.dead == 0, verdict


def test_power_cut_loses_alerts_without_full_sync(tmp_path: Path, rng: random.Random, library: Path) -> None:
    """The control: with ``sync: normal`` acknowledged alerts are lost, and those delivered before are not."""
    # The end of a first life syncs the spool. In the second a large quota and an early cut see to it that the log
    # is nowhere near full, which would sync it: a cut right after a checkpoint finds everything safe.
    power = PowerCut(tmp_path, rng, library, sync="normal", bytes_max=1024 * MIB)
    with power.stage as stage:
        stage.forwarder.start()
        assert stage.forwarder.terminate()[0] == 0
        stage.forwarder.start()
        with Load(stage.ledger, stage.ports.receiver):
            while len(stage.ledger.acknowledged) < CONTROL_ALERTS:
                time.sleep(0.01)
            power.cut(torn=False)
        stage.aws.start()
        stage.forwarder.start()
        stage.forwarder.drain()
        stage.forwarder.kill()
        verdict = judge(stage.ledger, stage.aws.journal, stage.spool)
        say(f"{verdict}; {len(verdict.lost)} lost; {power.syncs(LOG)} syncs of the log")
        assert verdict.lost, "nothing was lost without syncs: the model does not cut the power"
        assert not verdict.altered, verdict
