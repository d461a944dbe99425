"""The spool's asynchronous half: group commit, waiting, quota, failure."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forwarder.metrics import Metrics
from forwarder.record import DeadLetter, Record
from forwarder.spool import (
    FULL_SECS_MIN,
    TAIL_BYTES_MAX,
    Spool,
    SpoolFailedError,
    SpoolFullError,
)
from forwarder.spool_schema import SpoolUnusableError
from forwarder.spool_settings import SpoolSettings
from forwarder.spool_values import Batch, Written
from tests.test_spool_store import flip_block, record

SINKS = ("cloudwatch_logs", "security_hub")


def make(directory: Path, **changes: object) -> Spool:
    settings = SpoolSettings(directory=str(directory), **({"sync": "normal"} | changes))  # type: ignore[arg-type]
    return Spool(settings, sinks=SINKS, metrics=Metrics(SINKS), now=lambda: 1_800_000_000.0)


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    spool = make(tmp_path)
    await spool.open()
    yield spool
    await spool.close()


async def test_appends_of_one_loop_turn_share_a_commit(spool: Spool) -> None:
    await asyncio.gather(*(spool.append([record(i)]) for i in range(50)))
    count = spool._metrics.registry.get_sample_value("falco_forwarder_commit_batch_events_count")
    assert count == 1
    assert spool.end == 50


async def test_one_commit_is_bounded_in_records(spool: Spool) -> None:
    await asyncio.gather(*(spool.append([record(i)]) for i in range(3000)))
    count = spool._metrics.registry.get_sample_value("falco_forwarder_commit_batch_events_count")
    assert count == 3


async def test_offsets_follow_the_order_of_appending(spool: Spool) -> None:
    await asyncio.gather(spool.append([record(0), record(1)]), spool.append([record(2)]))
    chunk = await spool.read(0, records_max=10, bytes_max=1 << 20)
    assert chunk.records == [record(0), record(1), record(2)]


async def test_arrived_wakes_when_the_offset_is_stored_and_not_before(spool: Spool) -> None:
    waiter = asyncio.create_task(spool.arrived(1))
    await spool.append([record(0)])
    await asyncio.sleep(0)
    assert not waiter.done()
    await spool.append([record(1)])
    await asyncio.wait_for(waiter, 1)


async def test_cancelled_waiters_leave_nothing_behind(spool: Spool) -> None:
    tasks = [asyncio.create_task(spool.arrived(5)), asyncio.create_task(spool.room())]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not spool._arrivals
    assert not spool._room


async def test_the_tail_is_bounded_and_older_records_come_from_disk(spool: Spool) -> None:
    """A sink far behind reads the same records as one up to date."""
    size = 200_000
    for number in range(3 * TAIL_BYTES_MAX // size):
        await spool.append([record(number, size)])
    assert spool._tail.size_bytes <= TAIL_BYTES_MAX + size + 1000
    first = await spool.read(0, records_max=1, bytes_max=1)
    last = await spool.read(spool.end - 1, records_max=1, bytes_max=1)
    assert first.records == [record(0, size)]
    assert last.records == [record(spool.end - 1, size)]


async def test_tail_reads_respect_their_limits_and_start_inside_a_block(spool: Spool) -> None:
    await asyncio.gather(*(spool.append([record(i)]) for i in range(10)))
    await asyncio.gather(*(spool.append([record(i)]) for i in range(10, 20)))
    chunk = await spool.read(3, records_max=100, bytes_max=1 << 20)
    assert chunk.records == [record(i) for i in range(3, 20)]
    assert (await spool.read(3, records_max=1, bytes_max=1 << 20)).end == 10


async def test_state_survives_a_restart(tmp_path: Path) -> None:
    spool = make(tmp_path)
    await spool.open()
    await spool.append([record(i) for i in range(5)])
    letter = DeadLetter(sink="security_hub", id="x", reason="invalid", detail="", at=1.0, body=b"b")
    await spool.settle("security_hub", 3, [letter])
    await spool.close()
    spool = make(tmp_path)
    await spool.open()
    assert (spool.end, spool.pending("cloudwatch_logs"), spool.pending("security_hub")) == (5, 5, 2)
    assert spool.dead == {"security_hub": 1}
    assert [item.id for _, item in await spool.dead_letters(1 << 60, 10)] == ["x"]
    await spool.close()


async def test_admission_by_fill_and_priority(spool: Spool) -> None:
    """Up to 90 % everything, up to 100 % Notice and higher, then nothing."""
    spool.limit_bytes = 1000
    for used, debug, notice in ((0, True, True), (899, True, True), (900, False, True), (1000, False, False)):
        spool.used_bytes = used
        assert spool.admits(7) is debug
        assert spool.admits(6) is debug
        assert spool.admits(5) is notice
    spool.limit_bytes = 0
    assert spool.fill == 1.0


async def test_housekeeping_frees_what_all_sinks_passed_and_wakes_held_requests(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await spool.append([record(i) for i in range(5)])
    used = spool.used_bytes
    await spool.settle("cloudwatch_logs", 5)
    waiting = asyncio.create_task(spool.room())
    await spool._round(expire=True)
    assert spool.used_bytes == used, "the other sink still needs them"
    await spool.settle("security_hub", 5)
    await spool._round(expire=False)
    assert (spool.used_bytes, spool.events) == (0, 0)
    await asyncio.wait_for(waiting, 1)


class Broken:
    """Stands in for a volume: every write fails with a chosen SQLite error code."""

    def __init__(self, spool: Spool, code: int) -> None:
        self._spool = spool
        self._write = spool._store.write
        self._code = code
        spool._store.write = self.write  # type: ignore[method-assign]
        spool._store.probe = self.probe  # type: ignore[method-assign]

    def _error(self) -> sqlite3.OperationalError:
        error = sqlite3.OperationalError("injected")
        error.sqlite_errorcode = self._code
        return error

    def write(self, batch: Batch, now: float) -> Written:
        return Written(0, 0, 0.0, self._error(), frozenset(batch.cursors))

    def probe(self) -> None:
        raise self._error()

    def mend(self) -> None:
        self._spool._store.write = self._write  # type: ignore[method-assign]
        self._spool._store.probe = lambda: None  # type: ignore[method-assign]


async def test_a_failing_volume_refuses_appends_keeps_settles_and_recovers(spool: Spool) -> None:
    """EIO: nothing acknowledged, cursors wait, and all goes on once the volume is well."""
    await spool.append([record(0)])
    broken = Broken(spool, sqlite3.SQLITE_IOERR)
    with pytest.raises(SpoolFailedError):
        await spool.append([record(1)])
    assert spool.failure
    settling = spool.settle("cloudwatch_logs", 1)
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert not settling.done()
    with pytest.raises(sqlite3.Error):
        await spool._round(expire=False)
    broken.mend()
    await spool._round(expire=False)
    assert not spool.failure
    await asyncio.wait_for(settling, 5)
    await spool.append([record(1)])
    assert spool.cursors["cloudwatch_logs"] == 1


async def test_a_full_volume_lowers_the_quota_to_what_fitted_until_there_is_room(spool: Spool) -> None:
    await spool.append([record(0, 1000)])
    broken = Broken(spool, sqlite3.SQLITE_FULL)
    with pytest.raises(SpoolFullError):
        await spool.append([record(1)])
    assert not spool.failure, "full is not broken"
    assert not spool.admits(0)
    broken.mend()
    await spool._round(expire=False)
    assert not spool.admits(7), "not at once: readiness must not flicker"
    spool._full_at -= FULL_SECS_MIN
    await spool._round(expire=False)
    assert spool.admits(7)


async def test_a_broken_block_is_counted(tmp_path: Path) -> None:
    spool = make(tmp_path)
    await spool.open()
    await spool.append([record(i) for i in range(3)])
    await spool.close()
    flip_block(tmp_path, 0)
    spool = make(tmp_path)
    await spool.open()
    assert (await spool.read(0, records_max=5, bytes_max=1 << 20)).broken == 3
    assert spool._metrics.registry.get_sample_value("falco_forwarder_spool_broken_blocks_total") == 1
    await spool.close()


async def test_open_reports_an_unusable_directory_and_leaves_no_thread(tmp_path: Path) -> None:
    first = make(tmp_path)
    await first.open()
    second = make(tmp_path)
    with pytest.raises(SpoolUnusableError):
        await second.open()
    second._writer._thread.join(5)
    assert not second._writer._thread.is_alive()
    await first.close()


async def test_filling_up_is_said_once(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    spool.limit_bytes = 100_000
    await spool.append([Record(0, "i", 4, 1, 1, internal=False, body=os.urandom(85_000))])
    assert 0.8 < spool.fill < 1
    spool.publish()
    assert spool._warned
    spool.used_bytes = 0
    spool.publish()
    assert not spool._warned
