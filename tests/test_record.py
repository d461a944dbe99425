"""The spooled record: its layout on disk, its size, and the log stream made of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwarder.record import ALERT, DeadLetter, Record, stream_name
from tests.samples import REAL_BODIES, record_of

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def test_the_layout_is_a_list_in_this_order() -> None:
    """Spools of older versions are read: fields may be appended with defaults, nothing else."""
    record = Record(ALERT, "id", 4, 1, 2, True, b"{}", b"e", b"n", "h", True, "10.0.0.1")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record)) == [
        0,
        "id",
        4,
        1,
        2,
        True,
        b"{}",
        b"e",
        b"n",
        "h",
        True,
        "10.0.0.1",
    ]


@pytest.mark.parametrize("kept", [7, 8, 9, 10, 11, 12])
def test_a_record_of_an_older_version_is_read_with_defaults(kept: int) -> None:
    values: list[Any] = [0, "id", 4, 1, 2, False, b"{}", b"e", b"n", "h", True, "10.0.0.1"]
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(values[:kept]), type=Record)
    expected = (values[:kept] + [b"", b"", "", False, ""][kept - 7 :])[:12]
    assert list(msgspec.structs.astuple(old)) == expected


def test_real_alerts_survive_the_spool() -> None:
    for body in REAL_BODIES:
        record = record_of(body)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Record) == record


@pytest.mark.parametrize(
    "members",
    [{}, {"uuid": "u" * 128}, {"hostname": "h" * 100_000}, {"cluster": "c" * 5000}, {"x": "y" * 5000}],
)
def test_the_size_is_never_too_little(members: dict[str, Any]) -> None:
    """Quota and memory bounds count by it."""
    record = record_of({"rule": "r"} | members)
    assert len(msgspec.msgpack.encode(record)) <= record.size_bytes


def test_records_and_dead_letters_cannot_be_changed() -> None:
    letter = DeadLetter(sink="s", id="i", reason="invalid", detail="d", at=1.0, body=b"")
    for frozen in (record_of({"rule": "r"}), letter):
        with pytest.raises(AttributeError):
            frozen.body = b"x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{replica}", "r-0"),
        ("{cluster}/{hostname}/{date}", "prod/node_1/2026-11-20"),
        ("{hostname}-{hostname}", "node_1-node_1"),
        ("fixed", "fixed"),
        ("a:b*c", "a_b_c"),
        ("{other}", "{other}"),
        ("", "unknown"),
        ("x" * 600, "x" * 512),
    ],
)
def test_stream_names(template: str, name: str) -> None:
    assert stream_name(template, replica="r-0", cluster="prod", hostname="node:1", day="2026-11-20") == name


def test_a_stream_without_hostname_or_anything() -> None:
    assert stream_name("{hostname}", replica="", cluster="", hostname="", day="") == "unknown"
    assert stream_name("{cluster}", replica="", cluster="", hostname="", day="") == "unknown"


@given(NAMES, NAMES, NAMES)
@settings(max_examples=100, deadline=None)
def test_a_stream_name_is_one_the_service_takes(replica: str, cluster: str, hostname: str) -> None:
    template = "{replica}/{cluster}/{hostname}" * 9
    name = stream_name(template, replica=replica, cluster=cluster, hostname=hostname, day="d")
    assert 1 <= len(name) <= 512
    assert not {":", "*"} & set(name)
