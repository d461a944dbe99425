"""A start that is killed while it saves what a broken database still gives: the next one begins where it stopped."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from forwarder.record import Record
from forwarder.spool_schema import DATABASE_NAME
from forwarder.spool_store import Store
from forwarder.spool_values import Batch

NOW = 1_800_000_000.0
SINKS = {"logs", "hub"}
COUNT = 5


KILLED = 137
START = """
import os, sys
from pathlib import Path
from forwarder import spool_schema
from tests.test_spool_salvage import SINKS, store_at

directory, step, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
real = getattr(spool_schema, step)

def counted(*arguments, **options):
    global left
    left -= 1
    if left < 0:
        os._exit(137)
    return real(*arguments, **options)

setattr(spool_schema, step, counted)
store = store_at(directory)
store.open(SINKS)
store.close()
"""
"""A start that dies when it comes to a step for the nth time."""


def killed_start(directory: Path, step: str, left: int) -> bool:
    """Whether it was killed: a start that never came so far was not."""
    here = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", START, str(directory), step, str(left)],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(here)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in {0, KILLED}, done.stderr.decode()
    return done.returncode == KILLED


def store_at(directory: Path) -> Store:
    return Store(
        directory, full_sync=True, bytes_max=8 << 20, dead_retention_secs=1e9, unparsed_bytes_max=1 << 20
    )


def broken_spool(directory: Path) -> None:
    """Five blocks, in a database that does not pass its check any more."""
    store = store_at(directory)
    store.open(SINKS)
    for number in range(COUNT):
        body = os.urandom(3000)
        store.write(Batch([Record(0, f"r{number}", 4, 1, 1, internal=False, body=body)], {}, []), NOW)
    store.close()
    connection = sqlite3.connect(directory / DATABASE_NAME)
    connection.execute("DELETE FROM meta")
    connection.commit()
    connection.close()


def ids(directory: Path) -> list[str]:
    store = store_at(directory)
    state = store.open(SINKS)
    try:
        assert state.end == COUNT
        return [record.id for record in store.read(0, records_max=99, bytes_max=1 << 22).records]
    finally:
        store.close()


def names(directory: Path) -> list[str]:
    """What stands aside, by the first word after the database's name."""
    return sorted(item.name.split(".")[2].split("-")[0] for item in directory.glob(f"{DATABASE_NAME}.*"))


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("_rename", 0),
        ("_connect", 1),
        ("_check", 1),
        ("_salvage", 0),
        ("_readable", 0),
        ("_verified", 3),
        ("_rename", 1),
    ],
)
def test_a_start_killed_at_any_step_loses_nothing(tmp_path: Path, step: str, left: int) -> None:
    broken_spool(tmp_path)
    assert killed_start(tmp_path, step, left)
    assert ids(tmp_path) == [f"r{number}" for number in range(COUNT)]
    assert set(names(tmp_path)) == {"broken"}
    assert ids(tmp_path) == [f"r{number}" for number in range(COUNT)]


@pytest.mark.parametrize("moved", [1, 2])
def test_a_start_killed_between_two_files_moves_the_others_too(tmp_path: Path, moved: int) -> None:
    """The log of the broken database must not be taken for that of the new one."""
    broken_spool(tmp_path)
    (tmp_path / f"{DATABASE_NAME}-wal").write_bytes(b"left behind")
    (tmp_path / f"{DATABASE_NAME}-shm").write_bytes(b"left behind")
    for ending in ("", "-wal", "-shm")[:moved]:
        (tmp_path / f"{DATABASE_NAME}{ending}").rename(tmp_path / f"{DATABASE_NAME}.salvage-1{ending}")
    assert ids(tmp_path) == [f"r{number}" for number in range(COUNT)]
    assert (tmp_path / f"{DATABASE_NAME}.broken-1").exists()
    assert not (tmp_path / f"{DATABASE_NAME}-shm").exists()


def test_saving_twice_changes_nothing(tmp_path: Path) -> None:
    """Killed after everything was saved and before it was said so; dead letters of broken blocks are not doubled."""
    broken_spool(tmp_path)
    connection = sqlite3.connect(tmp_path / DATABASE_NAME)
    connection.execute("UPDATE block SET crc = crc + 1 WHERE first = 2")
    connection.commit()
    connection.close()
    assert killed_start(tmp_path, "_rename", 1)
    store = store_at(tmp_path)
    state = store.open(SINKS)
    assert (state.records, state.dead) == (COUNT, {"spool": 1})
    store.close()
