"""The spool's storage against a model, and against damage."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forwarder.record import DeadLetter, Record
from forwarder.spool_ballast import BALLAST_NAME
from forwarder.spool_schema import (
    DATABASE_NAME,
    SCHEMA_VERSION,
    SpoolUnusableError,
    block_cost,
    decode_block,
    encode_block,
)
from forwarder.spool_store import Store
from forwarder.spool_values import Batch

SINKS = ("logs", "hub")
NOW = 1_800_000_000.0


def record(number: int, size: int = 100) -> Record:
    body = b'{"rule":"r","n":%d,"pad":"%b"}' % (number, b"x" * size)
    return Record(0, f"{number:032x}", 4, number, number, internal=False, body=body, hostname="node")


def noise(number: int) -> Record:
    """A record that does not compress, the same for the same number."""
    return Record(0, str(number), 4, 1, 1, internal=False, body=random.Random(number).randbytes(3000))


def letter(sink: str = "logs", identity: str = "a", size: int = 10, at: float = NOW) -> DeadLetter:
    return DeadLetter(sink=sink, id=identity, reason="invalid", detail="d", at=at, body=b"b" * size)


def store_at(directory: Path, **changes: object) -> Store:
    keys: dict[str, object] = {
        "full_sync": False,
        "bytes_max": 64 << 20,
        "dead_retention_secs": 86400.0,
        "unparsed_bytes_max": 1 << 16,
    }
    return Store(directory, **(keys | changes))  # type: ignore[arg-type]


class SpoolModel(RuleBasedStateMachine):
    """Random writes, settles, reads, housekeeping and crashes must match a plain list and two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="spool-model-"))
        self.model: list[Record] = []
        self.cursors = dict.fromkeys(SINKS, 0)
        self.dead = 0
        self.used = 0
        self.store = store_at(self.directory)
        self.store.open(SINKS)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    @rule(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=20))
    def write(self, sizes: list[int]) -> None:
        records = [record(len(self.model) + index, size) for index, size in enumerate(sizes)]
        written = self.store.write(Batch(records, {}, []), NOW)
        assert written.error is None
        assert written.first == len(self.model)
        self.used += written.stored_bytes
        self.model += records

    @rule(sink=st.sampled_from(SINKS), part=st.floats(0, 1), buried=st.booleans())
    def settle(self, sink: str, part: float, buried: bool) -> None:
        offset = self.cursors[sink] + int((len(self.model) - self.cursors[sink]) * part)
        letters = [letter(sink)] if buried else []
        written = self.store.write(Batch([], {sink: offset}, letters), NOW)
        assert not written.unsettled
        self.used += written.stored_bytes
        self.dead += len(letters)
        self.cursors[sink] = offset

    @rule(sink=st.sampled_from(SINKS), records_max=st.integers(1, 50), bytes_max=st.integers(1, 20_000))
    def read(self, sink: str, records_max: int, bytes_max: int) -> None:
        offset = self.cursors[sink]
        chunk = self.store.read(offset, records_max=records_max, bytes_max=bytes_max)
        assert chunk.start == offset
        assert chunk.records == self.model[chunk.start : chunk.end]
        assert bool(chunk.records) == (offset < len(self.model))

    @rule()
    def housekeep(self) -> None:
        before = self.used
        done = self.store.housekeep(NOW, expire=False)
        self.used = before - done.freed_bytes
        for sink in SINKS:
            assert (sink in done.oldest) == (self.cursors[sink] < len(self.model))

    @rule(clean=st.booleans())
    def reopen(self, clean: bool) -> None:
        if clean:
            self.store.close()
        else:  # a killed process: nothing is folded or closed in order, the files stay as they are
            crashed = Path(tempfile.mkdtemp(prefix="spool-model-"))
            for file in self.directory.iterdir():
                shutil.copy2(file, crashed / file.name)
            self.store.close()
            shutil.rmtree(self.directory)
            self.directory = crashed
        self.store = store_at(self.directory)
        state = self.store.open(SINKS)
        assert state.end == len(self.model)
        assert state.cursors == self.cursors
        assert state.used_bytes == self.used
        assert sum(state.dead.values()) == self.dead
        assert state.quarantined is None

    @precondition(lambda self: self.model)
    @invariant()
    def nothing_unsettled_is_gone(self) -> None:
        lowest = min(self.cursors.values())
        read: list[Record] = []
        while lowest + len(read) < len(self.model):
            read += self.store.read(lowest + len(read), records_max=1000, bytes_max=1 << 30).records
        assert read == self.model[lowest:]


SpoolModel.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSpoolModel = SpoolModel.TestCase


def test_block_round_trip_keeps_every_field() -> None:
    records = [
        record(1),
        Record(2, "u", 7, -5, 6, internal=True, body=b"\xff\x00", enrichment=b"e", notes=b"n"),
    ]
    assert decode_block(*encode_block(records)) == records


def test_block_cost_is_whole_pages_beyond_the_first_kilobyte() -> None:
    assert block_cost(10) == 106
    assert block_cost(3000) == 4096
    assert block_cost(4096) == 8192


def test_a_second_process_on_the_directory_is_refused(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    with pytest.raises(SpoolUnusableError, match="in use by another process"):
        store_at(tmp_path).open(SINKS)
    store.close()
    again = store_at(tmp_path)
    again.open(SINKS)
    again.close()


def test_a_spool_of_a_newer_version_is_refused_and_untouched(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    store.close()
    with sqlite3.connect(tmp_path / DATABASE_NAME) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    before = (tmp_path / DATABASE_NAME).read_bytes()
    with pytest.raises(SpoolUnusableError, match="newer version"):
        store_at(tmp_path).open(SINKS)
    assert (tmp_path / DATABASE_NAME).read_bytes() == before


def test_a_directory_that_cannot_be_made_is_refused_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolUnusableError, match="cannot be written"):
        store_at(tmp_path / "file" / "spool").open(SINKS)


def test_a_broken_database_is_set_aside_and_what_is_readable_is_saved(tmp_path: Path) -> None:
    """Damage in the last pages: the blocks before it, the cursors and the dead letters come over."""
    store = store_at(tmp_path)
    store.open(SINKS)
    for first in range(0, 400, 10):
        assert store.write(Batch([noise(first + i) for i in range(10)], {}, []), NOW).error is None
    store.write(Batch([], {"logs": 20}, [letter()]), NOW)
    store.close()
    path = tmp_path / DATABASE_NAME
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 8192] = os.urandom(8192)
    path.write_bytes(data)
    store = store_at(tmp_path)
    state = store.open(SINKS)
    assert state.quarantined is not None
    assert state.quarantined.exists()
    assert state.cursors["logs"] == 20
    assert state.dead == {"logs": 1}
    assert 0 < state.records < 400
    chunk = store.read(20, records_max=5, bytes_max=1 << 20)
    assert chunk.records[0] == noise(20)
    assert store.write(Batch([record(400)], {}, []), NOW).error is None
    store.close()


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / DATABASE_NAME).write_bytes(b"not a database" * 1000)
    store = store_at(tmp_path)
    state = store.open(SINKS)
    assert state.quarantined is not None
    assert state.quarantined.read_bytes().startswith(b"not a database")
    assert state.records == 0
    store.close()


def test_a_database_without_its_meta_row_is_set_aside(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    store.close()
    connection = sqlite3.connect(tmp_path / DATABASE_NAME)
    connection.execute("DELETE FROM meta")
    connection.commit()
    connection.close()
    store = store_at(tmp_path)
    assert store.open(SINKS).quarantined is not None
    store.close()


def flip_block(directory: Path, first: int) -> None:
    connection = sqlite3.connect(directory / DATABASE_NAME)
    (payload,) = connection.execute("SELECT payload FROM block WHERE first=?", (first,)).fetchone()
    broken = bytearray(payload)
    broken[len(broken) // 2] ^= 0x55
    connection.execute("UPDATE block SET payload=? WHERE first=?", (bytes(broken), first))
    connection.commit()
    connection.close()


def test_a_flipped_bit_sets_one_block_aside_once_and_delivery_goes_on(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    for first in (0, 10, 20):
        store.write(Batch([record(first + i) for i in range(10)], {}, []), NOW)
    store.close()
    flip_block(tmp_path, 10)
    store = store_at(tmp_path)
    store.open(SINKS)
    chunk = store.read(0, records_max=100, bytes_max=1 << 20)
    assert (chunk.start, chunk.end, chunk.broken) == (0, 10, 0)
    for _ in SINKS:  # each sink meets the gap
        chunk = store.read(10, records_max=100, bytes_max=1 << 20)
        assert (chunk.start, chunk.end, chunk.broken, chunk.records) == (10, 20, 10, [])
    chunk = store.read(15, records_max=100, bytes_max=1 << 20)
    assert (chunk.start, chunk.end, chunk.broken) == (15, 20, 5)
    letters = store.dead_letters(1 << 60, 10)
    assert [(item.sink, item.reason) for _, item in letters] == [("spool", "broken_block")]
    assert store.read(20, records_max=100, bytes_max=1 << 20).records == [record(20 + i) for i in range(10)]
    store.close()


def test_a_block_with_the_wrong_count_is_broken(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    store.write(Batch([record(i) for i in range(3)], {}, []), NOW)
    store.close()
    connection = sqlite3.connect(tmp_path / DATABASE_NAME)
    connection.execute("UPDATE block SET n=5")
    connection.commit()
    connection.close()
    store = store_at(tmp_path)
    store.open(SINKS)
    assert store.read(0, records_max=9, bytes_max=1 << 20).broken == 5
    store.close()


def test_a_gap_between_blocks_ends_a_chunk(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    for first in (0, 2, 4):
        store.write(Batch([record(first), record(first + 1)], {}, []), NOW)
    store.close()
    connection = sqlite3.connect(tmp_path / DATABASE_NAME)
    connection.execute("DELETE FROM block WHERE first=2")
    connection.commit()
    connection.close()
    store = store_at(tmp_path)
    store.open(SINKS)
    assert store.read(0, records_max=9, bytes_max=1 << 20).end == 2
    behind = store.read(2, records_max=9, bytes_max=1 << 20)
    assert (behind.start, behind.end) == (4, 6)
    store.close()


def test_a_new_sink_starts_at_the_present_and_a_removed_one_holds_nothing_back(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(["logs"])
    store.write(Batch([record(i) for i in range(5)], {}, []), NOW)
    store.close()
    store = store_at(tmp_path)
    assert store.open(["logs", "hub"]).cursors == {"logs": 0, "hub": 5}
    store.close()
    store = store_at(tmp_path)
    assert store.open(["hub"]).cursors == {"hub": 5}
    assert store.housekeep(NOW, expire=False).freed_records == 5
    store.close()
    store = store_at(tmp_path)
    assert store.open(["hub"]).end == 5, "an empty spool goes on counting"
    store.close()


def test_dead_letters_page_newest_first(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    store.write(Batch([], {}, [letter(identity=str(i)) for i in range(5)]), NOW)
    page = store.dead_letters(1 << 60, 2)
    assert [item.id for _, item in page] == ["4", "3"]
    assert [item.id for _, item in store.dead_letters(page[-1][0], 2)] == ["2", "1"]
    store.close()


def test_dead_letters_go_after_their_retention_and_unparsed_bodies_beyond_their_share(tmp_path: Path) -> None:
    store = store_at(tmp_path, dead_retention_secs=100.0, unparsed_bytes_max=1000)
    store.open(SINKS)
    letters = [letter(at=NOW - 200), letter(identity="young", at=NOW - 50)]
    letters += [letter("receiver", f"u{i}", size=400, at=NOW) for i in range(4)]
    store.write(Batch([], {}, letters), NOW)
    done = store.housekeep(NOW, expire=True)
    assert done.dead_removed == 3
    assert [item.id for _, item in store.dead_letters(1 << 60, 10)] == ["u3", "u2", "young"]
    store.close()


def test_full_database_refuses_records_but_lets_cursors_and_dead_letters_through(tmp_path: Path) -> None:
    """max_page_count stops the growth; what is stored can still be settled, and room comes back."""
    store = store_at(tmp_path, bytes_max=1 << 20)
    store.open(SINKS)
    stored = 0
    while True:
        batch = [Record(0, "i", 4, 1, 1, internal=False, body=os.urandom(60_000))]
        written = store.write(Batch(batch, {"logs": stored}, []), NOW)
        if written.error is not None:
            break
        stored += 1
        assert stored < 200
    assert not written.unsettled
    assert not (tmp_path / BALLAST_NAME).exists(), "given up for the cursors"
    assert not store.write(Batch([], dict.fromkeys(SINKS, stored), []), NOW).unsettled
    done = store.housekeep(NOW, expire=False)
    assert done.freed_records == stored
    assert done.ballast, "written again where the volume has room"
    assert store.write(Batch([record(1, 60_000)], {}, []), NOW).error is None
    store.close()


def test_probe_fails_on_a_closed_database_and_works_on_an_open_one(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    store.probe()
    store.close()
    with pytest.raises(sqlite3.ProgrammingError):
        store.probe()


def test_salvage_passes_over_a_broken_block_and_counts_it(tmp_path: Path) -> None:
    """Blocks behind it come over too, and the gap is met by every sink."""
    store = store_at(tmp_path)
    store.open(SINKS)
    for number in range(5):
        store.write(Batch([noise(number)], {}, []), NOW)
    store.close()
    flip_block(tmp_path, 1)
    connection = sqlite3.connect(tmp_path / DATABASE_NAME)
    connection.execute("DELETE FROM meta")  # makes the whole database suspect
    connection.execute("DELETE FROM cursor")
    connection.commit()
    connection.close()
    store = store_at(tmp_path)
    state = store.open(SINKS)
    assert state.quarantined is not None
    assert (state.records, state.end) == (5, 5)
    assert state.cursors == dict.fromkeys(SINKS, 0), "lost cursors begin at the beginning"
    assert store.read(0, records_max=9, bytes_max=1 << 20).records == [noise(0)]
    assert store.read(1, records_max=9, bytes_max=1 << 20).broken == 1
    assert store.read(2, records_max=9, bytes_max=1 << 20).records == [noise(2), noise(3), noise(4)]
    assert state.dead == {"spool": 1}
    store.close()


def test_a_transaction_left_open_by_a_fault_takes_no_acknowledgement_with_it(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    store._db.execute("BEGIN IMMEDIATE")
    assert store.write(Batch([record(0)], {}, []), NOW).error is None
    assert not store._db.in_transaction
    assert not store.write(Batch([], {"logs": 1}, []), NOW).unsettled
    store.close()
    store = store_at(tmp_path)
    assert store.open(SINKS).records == 1
    store.close()


def test_a_dead_letter_no_database_takes_does_not_stop_the_writer(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.open(SINKS)
    bad = DeadLetter(sink="logs", id="x", reason="invalid", detail="\ud83d", at=NOW, body=b"")
    assert store.write(Batch([], {"logs": 0}, [bad]), NOW).unsettled == {"logs"}
    assert store.write(Batch([record(0)], {}, []), NOW).error is None
    store.close()
