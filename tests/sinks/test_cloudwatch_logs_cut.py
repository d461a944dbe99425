"""Alerts larger than a log event: cut where they are longest, named, and never over the limit."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwarder.aws import Aws, AwsSettings
from forwarder.record import UNPARSED, Record
from forwarder.sinks.cloudwatch_logs import (
    CALL_BYTES_MAX,
    EVENT_BYTES_MAX,
    EVENT_OVERHEAD_BYTES,
    CloudWatchLogs,
    CloudWatchLogsSettings,
)
from tests.samples import RECEIVED_NS, body_of, record_of

MB = 1_000_000
OURS = {"id", "cluster", "account", "region", "forwarder"}
ELLIPSIS = "\u2026"


def sink() -> CloudWatchLogs:
    return CloudWatchLogs(
        CloudWatchLogsSettings(enabled=True, log_group="/falco"),
        aws=Aws(AwsSettings(region="eu-west-1", account_id="111122223333")),
        cluster="prod",
        replica="r",
        now=lambda: RECEIVED_NS / 1e9,
    )


SINK = sink()


def exact(text: str | bytes) -> Any:
    """JSON with numbers as they are written."""
    return json.loads(text, parse_float=lambda t: ("number", t), parse_int=lambda t: ("number", t))


def cut(record: Record) -> dict[str, Any]:
    """The event of an alert that must be cut, judged by what holds for all of them."""
    item = SINK.encode(record, 0)
    message: str = json.loads(item.data)["message"]
    assert item.truncated
    assert item.size_bytes == len(message.encode()) + EVENT_OVERHEAD_BYTES <= CALL_BYTES_MAX
    event: dict[str, Any] = exact(message)
    note = event["forwarder"]
    assert note["sha256"] == hashlib.sha256(record.body).hexdigest()
    names = note["truncated"]
    assert names == sorted(set(names))
    assert names
    assert event["id"] == record.id
    if record.kind == UNPARSED:
        text = record.body.decode("utf-8", "replace")
        assert names == ["unparsed"]
        assert text.startswith(event["unparsed"].removesuffix(ELLIPSIS))
        return event
    judge(exact(record.body), {key: event[key] for key in event.keys() - OURS}, names)
    return event


def judge(sent: dict[str, Any], shown: dict[str, Any], names: list[str]) -> None:
    """What is not named is unchanged; what is named is a beginning of what was sent."""
    if names == ["*"]:
        assert shown
        for key, value in shown.items():
            assert value == sent.get(key) or str(value).endswith(ELLIPSIS)
        return
    assert shown.keys() == sent.keys()
    places: dict[tuple[str, ...], Any] = {(key,): value for key, value in sent.items()}
    if isinstance(sent.get("output_fields"), dict) and "output_fields" not in names:
        del places["output_fields",]
        assert shown["output_fields"].keys() == sent["output_fields"].keys()
        places |= {("output_fields", key): value for key, value in sent["output_fields"].items()}
    for path, value in places.items():
        found: Any = shown
        for key in path:
            found = found[key]
        if ".".join(path) in names:
            assert isinstance(found, str)
            assert found.endswith(ELLIPSIS)
            if isinstance(value, str):
                assert value.startswith(found.removesuffix(ELLIPSIS))
        else:
            assert found == value


def size(event: dict[str, Any]) -> int:
    return len(body_of(event))


# ---- one long value ---------------------------------------------------------------------------------


def test_what_just_fits_is_left_alone() -> None:
    empty = SINK.encode(record_of({"rule": "r", "output": ""}), 0).size_bytes
    room = CALL_BYTES_MAX - empty
    fits = SINK.encode(record_of({"rule": "r", "output": "x" * room}), 0)
    assert (fits.size_bytes, fits.truncated) == (CALL_BYTES_MAX, False)
    cut(record_of({"rule": "r", "output": "x" * (room + 1)}))


@pytest.mark.parametrize(
    ("members", "name"),
    [
        ({"output": "x" * 2 * MB}, "output"),
        ({"output_fields": {"jevt.obj": "x" * 2 * MB, "n": 2**70}}, "output_fields.jevt.obj"),
        ({"output": "short", "ka.req": {"a": ["y" * 2 * MB]}}, "ka.req"),
        ({"output_fields": ["z" * 2 * MB]}, "output_fields"),
        ({"output_fields": {"list": list(range(500_000))}}, "output_fields.list"),
        ({"tags": ["tag"] * 500_000}, "tags"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_the_long_value_is_cut(members: dict[str, Any], name: str) -> None:
    event = cut(record_of({"rule": "r", "priority": "Notice", "evt.num": 2**64 + 1} | members))
    assert event["forwarder"]["truncated"] == [name]
    assert size(event) > 0.8 * EVENT_BYTES_MAX


def test_a_number_of_two_million_digits() -> None:
    event = cut(record_of(b'{"rule":"r","output_fields":{"n":' + b"9" * 2 * MB + b',"f":1e400}}'))
    assert event["output_fields"]["n"].startswith("999")
    assert event["output_fields"]["f"] == ("number", "1e400")


@pytest.mark.parametrize("character", ["\x01", '"', "\\", "\n", "\u00e4", "\u4e2d", "\U0001f600", "\u2028"])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_characters_of_many_bytes_use_the_room_there_is(character: str, ascii_only: bool) -> None:
    """Cut to the bytes that fit, at a character; not far below it."""
    body = body_of({"rule": "r", "output": character * 800_000, "x": "kept"}, ascii_only=ascii_only)
    event = cut(record_of(body))
    assert event["forwarder"]["truncated"] == ["output"]
    assert set(event["output"]) == {character, ELLIPSIS}
    assert size(event) > 0.5 * EVENT_BYTES_MAX


@pytest.mark.parametrize("ends", ["\x01x", "x\x01", "\u4e2dx", '"\U0001f600'])
def test_characters_of_different_sizes_in_one_value(ends: str) -> None:
    """The beginning, which is kept, takes more or less room than the average."""
    text = ends[0] * 250_000 + ends[1] * 600_000
    event = cut(record_of({"rule": "r", "output": text}))
    assert size(event) > 0.1 * EVENT_BYTES_MAX


@pytest.mark.parametrize("raw", [b"x", b"\xff", b'"', b"\x00", "\u4e2d".encode()], ids=repr)
def test_an_unparsed_body_of_four_megabytes(raw: bytes) -> None:
    body = (raw * (4 << 20))[: 4 << 20]
    record = Record(
        UNPARSED, "f" * 32, 4, RECEIVED_NS, RECEIVED_NS, internal=False, body=body, notes=b'"reason":"x"'
    )
    event = cut(record)
    assert event["forwarder"]["reason"] == "x"
    assert size(event) > 0.5 * EVENT_BYTES_MAX


# ---- many values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "length"), [(2, 900_000), (30, 50_000), (100, 30_000), (1_000, 3_000)])
def test_many_medium_values(count: int, length: int) -> None:
    fields = {f"field{number}": "v" * (length + number) for number in range(count)}
    event = cut(record_of({"rule": "r", "time": "t", "output": "what happened", "output_fields": fields}))
    assert event["rule"] == "r"
    assert event["output"] == "what happened"


@pytest.mark.parametrize("count", [100_000, 200_000])
def test_without_any_long_value_the_well_known_members_stay(count: int) -> None:
    fields = {f"field{number}": number for number in range(count)}
    known = {"time": "t", "rule": "r", "priority": "Notice", "source": "s", "hostname": "h", "uuid": "u"}
    event = cut(record_of(known | {"output_fields": fields}))
    assert known.items() <= event.items()
    if event["forwarder"]["truncated"] == ["*"]:
        assert "output_fields" not in event


def test_names_longer_than_an_event() -> None:
    cut(record_of({"rule": "r", "k" * 2 * MB: 1}))
    cut(record_of({"rule": "r", "output_fields": {"k" * 600_000: "v" * 600_000}}))
    event = cut(record_of({"output": "o" * 5000, "k" * 2 * MB: 1}))
    assert event["output"]


def test_quotes_in_a_name_are_escaped() -> None:
    event = cut(record_of({"rule": "r", 'a"b\\': "x" * 2 * MB}))
    assert event["forwarder"]["truncated"] == ['a"b\\']


def test_keys_of_ours_that_the_sender_used_are_cut_too() -> None:
    """They travel in the notes: an alert must not grow beyond an event by them."""
    record = record_of({"rule": "r", "cluster": "x" * 2 * MB})
    assert len(record.notes) > 2 * MB
    item = SINK.encode(record, 0)
    message = json.loads(item.data)["message"]
    assert len(message.encode()) <= EVENT_BYTES_MAX
    assert json.loads(message)["rule"] == "r"


# ---- anything ---------------------------------------------------------------------------------------

PIECES = st.builds(
    lambda character, length: character * length,
    st.sampled_from(["x", '"', "\x02", "\u00e4", "\U0001f600", "\\"]),
    st.integers(1, 300_000) | st.sampled_from([1, 63, 64, 65, 999_000]),
)
VALUES = PIECES | st.lists(PIECES, max_size=3) | st.integers() | st.none() | st.booleans()


@given(
    st.dictionaries(st.sampled_from(["output", "message", "a", "b.c", "tags"]), VALUES, max_size=5),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), VALUES, max_size=9)
    | VALUES,
)
@settings(max_examples=40, deadline=None)
def test_any_alert_fits_an_event(members: dict[str, Any], fields: Any) -> None:
    record = record_of(members | {"rule": "r", "output_fields": fields})
    item = SINK.encode(record, 0)
    if item.truncated:
        cut(record)
    else:
        assert exact(json.loads(item.data)["message"]).items() >= exact(record.body).items()
        assert item.size_bytes <= CALL_BYTES_MAX
