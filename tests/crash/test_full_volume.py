"""A full volume: refuse what cannot be stored, go on delivering what is, recover without a hand.

SQLite on a full file system live-locks by itself, because even a cursor needs room in the log. The spool directory
here is a tmpfs of 12 MB, which needs root: with a quota that fits it, with one that does not, and with somebody
else's file taking the last byte. The alerts carry noise that does not compress, to fill it with few of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.harness import MIB, Stage, get, say, seeded, wait_until
from tests.crash.senders import Attempt, Connection, Load, post_one

pytestmark = pytest.mark.crash

VOLUME_BYTES = 12 * MIB
HOLD_SECS = 0.2
FILLER_BYTES = 6000
FILL_SECS_MAX = 60.0
RECOVER_SECS_MAX = 60.0
SHED_FILL = 0.9


@pytest.fixture
def rng() -> random.Random:
    return seeded()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A directory on a small volume of its own."""
    path = tmp_path.resolve() / "volume"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={VOLUME_BYTES}", "tmpfs", str(path)]
    result = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=30)
    if result.returncode != 0:
        pytest.fail(f"these tests mount a tmpfs, which needs root: {result.stderr.strip()}", pytrace=False)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True, timeout=30)


def full_stage(directory: Path, rng: random.Random, volume: Path, *, bytes_max: int) -> Stage:
    return Stage(directory, rng, spool=volume / "spool", bytes_max=bytes_max, hold_secs_max=HOLD_SECS)


def post(stage: Stage, count: int, priority: str) -> Counter[int]:
    """Statuses of some alerts of one priority, posted one after the other."""
    connection = Connection(stage.ports.receiver)
    with contextlib.closing(connection):
        return Counter(post_one(stage.ledger, connection, priority=priority).status for _ in range(count))


def since(stage: Stage, mark: int) -> list[Attempt]:
    return list(stage.ledger.attempts)[mark:]


def fill(stage: Stage) -> None:
    """Post alerts until nothing but refusals comes back for a while."""

    def refused_only() -> bool:
        last = list(stage.ledger.attempts)[-40:]
        return len(last) == 40 and all(attempt.status == 503 for attempt in last)

    with Load(stage.ledger, stage.ports.receiver, rate=2000.0, priority="Notice", filler_bytes=FILLER_BYTES):
        wait_until(refused_only, FILL_SECS_MAX, lambda: f"full: {stage.ledger.statuses}")


def never_failed(stage: Stage) -> None:
    """The process is alive, and every answer was a 200 or a 503."""
    assert stage.forwarder.running, stage.forwarder.tail()
    assert set(stage.ledger.statuses) == {200, 503}, stage.ledger.statuses
    assert stage.forwarder.starts == 1


def accepts_again(stage: Stage) -> float:
    """Wait until alerts of the lowest priority are stored again."""
    return wait_until(
        lambda: post(stage, 1, "Debug")[200] == 1,
        RECOVER_SECS_MAX,
        lambda: (
            f"it accepts: {stage.forwarder.status()}, {volume_line(stage.spool)}\n{stage.forwarder.tail()}"
        ),
    )


def volume_line(spool: Path) -> str:
    volume = os.statvfs(spool)
    files = {path.name: path.stat().st_size for path in sorted(spool.iterdir())}
    return f"{files}, {volume.f_bavail * volume.f_frsize} bytes free"


def test_full_quota_sheds_by_priority_and_recovers(tmp_path: Path, rng: random.Random, volume: Path) -> None:
    """Quota full while AWS is down: Debug goes first, nothing unstored is acknowledged, all drains by itself."""
    with full_stage(tmp_path, rng, volume, bytes_max=8 * MIB) as stage:
        stage.forwarder.start()
        with Load(stage.ledger, stage.ports.receiver, rate=400.0, priority="Notice", filler_bytes=6000):
            wait_until(lambda: stage.forwarder.fill >= SHED_FILL, FILL_SECS_MAX, lambda: "90 % are used")
        assert stage.forwarder.fill < 1.0, "filled too fast to look at the priorities"
        assert post(stage, 2, "Debug") == {503: 2}
        assert post(stage, 2, "Informational") == {503: 2}
        assert post(stage, 2, "Notice") == {200: 2}
        assert post(stage, 2, "Emergency") == {200: 2}
        fill(stage)
        assert post(stage, 2, "Emergency") == {503: 2}
        assert get(stage.ports.admin, "/readyz")[0] == 503
        assert get(stage.ports.admin, "/livez")[0] == 200
        assert stage.forwarder.fill < 1.05, "the quota does not hold"
        say(f"full: {volume_line(stage.spool)}")
        stage.aws.start()
        drained, accepted = stage.forwarder.drain(), accepts_again(stage)
        say(f"drained after {drained:.1f} s, accepts {accepted:.1f} s later: {volume_line(stage.spool)}")
        assert "ballast given up" not in stage.forwarder.text(), "the quota alone filled the volume"
        assert stage.forwarder.ready
        with Load(stage.ledger, stage.ports.receiver):
            time.sleep(1.0)
        stage.forwarder.drain()
        never_failed(stage)
        assert stage.forwarder.metric("falco_forwarder_discarded_events_total") == stage.ledger.statuses[503]
        assert stage.judge().dead == 0


def test_quota_above_the_volume_recovers_from_no_space(
    tmp_path: Path, rng: random.Random, volume: Path
) -> None:
    """Real ENOSPC by a quota larger than the volume: delivery goes on once AWS is back, and it recovers."""
    with full_stage(tmp_path, rng, volume, bytes_max=1024 * MIB) as stage:
        stage.forwarder.start()
        fill(stage)
        say(f"full: {volume_line(stage.spool)}")
        stage.aws.start()
        drained, accepted = stage.forwarder.drain(), accepts_again(stage)
        say(f"drained after {drained:.1f} s, accepts {accepted:.1f} s later: {volume_line(stage.spool)}")
        mark = len(stage.ledger.attempts)
        with Load(stage.ledger, stage.ports.receiver):
            time.sleep(2.0)
        stage.forwarder.drain()
        never_failed(stage)
        statuses = Counter(attempt.status for attempt in since(stage, mark))
        say(f"after its recovery: {statuses}; {volume_line(stage.spool)}")
        assert statuses[200] > statuses[503], "it recovered only for a moment"
        assert stage.judge().dead == 0


@pytest.mark.parametrize(("filler_bytes", "rate"), [(6_000, 200.0), (60_000, 100.0)], ids=["small", "large"])
def test_volume_filled_by_somebody_else(
    tmp_path: Path, rng: random.Random, volume: Path, filler_bytes: int, rate: float
) -> None:
    """Another file takes the last byte under load: delivery goes on, and its removal is enough to recover."""
    with full_stage(tmp_path, rng, volume, bytes_max=8 * MIB) as stage:
        stage.aws.start()
        stage.forwarder.start()
        other = volume / "other"
        with Load(stage.ledger, stage.ports.receiver, filler_bytes=filler_bytes, rate=rate):
            time.sleep(1.0)
            hog(other)
            say(f"full: {volume_line(stage.spool)}")
            wait_until(lambda: stage.ledger.statuses[503] > 50, FILL_SECS_MAX, lambda: "refusals")
        # All that was acknowledged is delivered and settled, with no room but the ballast's.
        drained = stage.forwarder.drain()
        say(f"drained after {drained:.1f} s: {volume_line(stage.spool)}")
        # Now the other one takes that room too, again and again.
        with Load(stage.ledger, stage.ports.receiver, filler_bytes=filler_bytes, rate=rate):
            for _ in range(40):
                hog(other)
                time.sleep(0.05)
        say(f"full to the brim: {volume_line(stage.spool)}, {stage.ledger.statuses}")
        other.unlink()
        say(f"accepts {accepts_again(stage):.1f} s after the removal: {volume_line(stage.spool)}")
        with Load(stage.ledger, stage.ports.receiver):
            time.sleep(1.0)
        stage.forwarder.drain()
        never_failed(stage)
        wait_until(lambda: stage.forwarder.ready, RECOVER_SECS_MAX, lambda: "ready")
        assert (volume / "spool" / "spool.ballast").exists(), "the ballast is not back"
        assert stage.judge().dead == 0


def test_volume_filled_while_aws_is_down(tmp_path: Path, rng: random.Random, volume: Path) -> None:
    """With alerts waiting and not a byte left, AWS comes back: they are delivered and settled all the same."""
    with full_stage(tmp_path, rng, volume, bytes_max=8 * MIB) as stage:
        stage.forwarder.start()
        other = volume / "other"
        with Load(stage.ledger, stage.ports.receiver, filler_bytes=FILLER_BYTES, rate=400.0):
            wait_until(lambda: stage.forwarder.fill >= 0.5, FILL_SECS_MAX, lambda: "half is used")
            hog(other)
            wait_until(lambda: stage.ledger.statuses[503] > 50, FILL_SECS_MAX, lambda: "refusals")
        say(f"full: {volume_line(stage.spool)}")
        stage.aws.start()
        drained = stage.forwarder.drain()
        say(f"drained after {drained:.1f} s: {volume_line(stage.spool)}")
        other.unlink()
        say(f"accepts {accepts_again(stage):.1f} s after the removal: {volume_line(stage.spool)}")
        never_failed(stage)
        assert stage.judge().dead == 0


@pytest.mark.parametrize("orderly", [False, True], ids=["killed", "stopped"])
def test_start_on_a_full_volume_delivers_what_is_stored(
    tmp_path: Path, rng: random.Random, volume: Path, orderly: bool
) -> None:
    """Started with no byte left: no crash loop, what is stored is delivered, and it recovers."""
    with full_stage(tmp_path, rng, volume, bytes_max=8 * MIB) as stage:
        stage.forwarder.start()
        with Load(stage.ledger, stage.ports.receiver, rate=200.0):
            time.sleep(2.0)
        if orderly:
            assert stage.forwarder.terminate()[0] == 0
        else:
            stage.forwarder.kill()
        other = volume / "other"
        hog(other)
        say(f"full: {volume_line(stage.spool)}")
        stage.aws.start()
        stage.forwarder.spawn()
        stage.forwarder.wait_alive()
        drained = stage.forwarder.drain()
        say(f"drained after {drained:.1f} s: {volume_line(stage.spool)}")
        other.unlink()
        accepts_again(stage)
        assert stage.judge().dead == 0


def hog(path: Path) -> None:
    """Let a file take what is left of the volume."""
    block = bytes(1 << 12)
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(block)
