"""Decoding: every shape Falco and its friends have sent since 2017, and everything hostile."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwarder import alert_fields
from forwarder.alert import (
    ALERTS_PER_BODY_MAX,
    PRIORITIES,
    UNKNOWN_PRIORITY_RANK,
    Alert,
    Unparsable,
    decode,
    rank,
)
from forwarder.record import Record
from forwarder.timestamp import iso_milliseconds, time_ns
from tests.samples import REAL_ALERTS, REAL_BODIES, body_of


def one(body: bytes) -> Alert:
    """The only alert of a body."""
    (alert,) = decode(body).alerts
    return alert


def fault(body: bytes) -> str:
    """Why a body is refused: one line."""
    with pytest.raises(Unparsable) as caught:
        decode(body)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


# ---- real alerts ------------------------------------------------------------------------------------


def test_there_are_119_real_alerts() -> None:
    assert len(REAL_BODIES) == 119


@pytest.mark.parametrize("number", range(119))
def test_real_alert_is_decoded_and_its_bytes_kept(number: int) -> None:
    body, sent = REAL_BODIES[number], REAL_ALERTS[number]
    alert = one(body)
    assert alert.body == body
    assert alert.sender_keys == b""
    assert not alert.text
    assert alert.rule == sent["rule"]
    assert alert.priority == sent["priority"]
    assert alert.priority_known
    assert PRIORITIES[alert.rank] == sent["priority"]
    assert alert.output == sent.get("output", "").strip()
    assert alert.tags == tuple(sent.get("tags") or ())
    assert alert.source == (sent.get("source") or "syscall")
    assert alert.hostname == (sent.get("hostname") or "")
    assert alert.id == (sent.get("uuid") or "")
    assert alert.internal == (sent["rule"].startswith("Falco internal") or sent.get("source") == "internal")


@pytest.mark.parametrize("number", range(119))
def test_time_of_real_alert_is_exact_to_the_nanosecond(number: int) -> None:
    text = REAL_ALERTS[number]["time"]
    seconds, _, fraction = text.removesuffix("Z").partition(".")
    moment = datetime.fromisoformat(seconds + "+00:00")
    expected = int(moment.timestamp()) * 10**9 + int(fraction.ljust(9, "0") or 0)
    assert one(REAL_BODIES[number]).time_ns == expected


@pytest.mark.parametrize("number", range(119))
def test_fields_of_real_alert_keep_every_value(number: int) -> None:
    sent = json.loads(REAL_BODIES[number], parse_float=str).get("output_fields") or {}
    assert alert_fields.fields(one(REAL_BODIES[number]).fields) == sent


def test_nanoseconds_beyond_2_to_the_53_are_exact() -> None:
    alert = one(b'{"rule":"r","output_fields":{"evt.time":1739178940698757001,"d":1.10}}')
    assert alert_fields.fields(alert.fields) == {"evt.time": 1739178940698757001, "d": "1.10"}


# ---- priorities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [str.upper, str.lower, str.title, str.swapcase, lambda p: f" {p} "])
@pytest.mark.parametrize("number", range(8))
def test_priority_counts_in_any_case(number: int, change: Any) -> None:
    alert = one(body_of({"rule": "r", "priority": change(PRIORITIES[number])}))
    assert (alert.rank, alert.priority_known) == (number, True)
    assert rank(change(PRIORITIES[number])) == number


@pytest.mark.parametrize("text", ["info", "Info", "INFO"])
def test_info_is_informational(text: str) -> None:
    assert one(body_of({"rule": "r", "priority": text})).rank == PRIORITIES.index("Informational")


@pytest.mark.parametrize("value", ["Fatal", "", None, "<NA>", 3, ["Notice"], "warn ing"])
def test_unknown_priority_is_treated_as_warning(value: Any) -> None:
    alert = one(body_of({"rule": "r", "priority": value}))
    assert (alert.rank, alert.priority_known) == (UNKNOWN_PRIORITY_RANK, False)
    assert UNKNOWN_PRIORITY_RANK == PRIORITIES.index("Warning") == 4
    assert rank("Fatal") is None


# ---- what is absent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [None, "", "<NA>", "  "])
def test_null_empty_and_na_are_absent(nothing: str | None) -> None:
    keys = ("priority", "time", "source", "hostname", "output", "uuid")
    alert = one(body_of(dict.fromkeys(keys, nothing) | {"rule": "r"}))
    assert (alert.id, alert.priority, alert.time, alert.source, alert.hostname) == ("", "", "", "syscall", "")
    assert (alert.output, alert.tags, alert.rank, alert.time_ns) == ("", (), 4, None)


@pytest.mark.parametrize("nothing", [None, "", "<NA>"])
@pytest.mark.parametrize("wrong", [{}, {"hostname": 5}])
def test_message_stands_in_for_an_absent_output(nothing: str | None, wrong: dict[str, Any]) -> None:
    alert = one(body_of({"rule": nothing, "output": nothing, "message": "m"} | wrong))
    assert alert.output == "m"


@pytest.mark.parametrize("missing", ["output", "priority", "rule", "time", "source", "tags", "output_fields"])
def test_any_one_key_may_be_missing(missing: str) -> None:
    members = {
        "output": "o",
        "priority": "Error",
        "rule": "r",
        "time": "2026-11-20T09:00:00.000000001Z",
        "source": "okta",
        "hostname": "h",
        "tags": ["a"],
        "output_fields": {"a": 1},
    }
    del members[missing]
    alert = one(body_of(members))
    assert alert.output == members.get("output", "")
    assert alert.rule == members.get("rule", "")
    assert alert.time == members.get("time", "")
    assert alert_fields.fields(alert.fields) == members.get("output_fields", {})


def test_the_shape_of_2017_is_an_alert() -> None:
    body = (
        b'{"output":"16:31:56.746609046: Error File below a known binary directory opened for writing",'
        b'"priority":"Error","rule":"Write below binary dir","time":"2017-10-09T23:31:56.746609046Z"}'
    )
    alert = one(body)
    assert (alert.rule, alert.rank, alert.source, alert.hostname) == (
        "Write below binary dir",
        3,
        "syscall",
        "",
    )
    assert alert.time_ns == 1507591916746609046
    assert alert.body == body


def test_uuid_of_falcosidekick_is_the_id() -> None:
    uuid = "32aa5dc6-8b0f-4e6b-b8c6-4e2f8c0c6a35"
    alert = one(body_of({"rule": "r", "uuid": uuid, "source": "syscalls", "time": "2026-01-01T00:00:00.1Z"}))
    assert (alert.id, alert.source, alert.time_ns) == (uuid, "syscalls", 1767225600100000000)


@pytest.mark.parametrize("uuid", ["x" * 129, "a\nb", "a\x00b", "\x1b[2J"])
def test_unusable_uuid_is_no_id(uuid: str) -> None:
    assert one(body_of({"rule": "r", "uuid": uuid})).id == ""


@pytest.mark.parametrize(
    ("members", "internal"),
    [
        ({"rule": "Falco internal: syscall event drop"}, True),
        ({"rule": "x", "source": "internal"}, True),
        ({"rule": "About Falco internal: x"}, False),
    ],
)
def test_messages_of_falco_about_itself_are_internal(members: dict[str, Any], internal: bool) -> None:
    assert one(body_of(members)).internal is internal


# ---- times ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00.000000001Z", 1),
        ("1970-01-01t00:00:01z", 10**9),
        ("1970-01-01 00:00:01", 10**9),
        ("1970-01-01T01:00:00.5+01:00", 5 * 10**8),
        ("1969-12-31T23:30:00,25-0030", 25 * 10**7),
        ("2018-02-20T19:19:19.82302759Z", 1519154359823027590),
        ("1970-01-01T00:00:00.1234567899999Z", 123456789),
        ("2026-02-30T00:00:00Z", None),
        ("2026-02-30T00:00:00.000000000Z", None),
        ("1970-01-01T00:00:00.00000000xZ", None),
        ("1970-01-01x00:00:00.000000000Z", None),
        ("1970-01-01T00:00:00.00000000\u0662Z", None),
        ("1970-01-01T00:00:00.000 +01:00Z", None),
        ("2026-01-01T24:61:00Z", None),
        ("yesterday", None),
        ("", None),
        ("2026-01-01", None),
        ("2026-01-01T00:00:00Z and more", None),
        ("\u0662026-01-01T00:00:00Z", None),
    ],
)
def test_times(text: str, expected: int | None) -> None:
    assert time_ns(text) == expected


@pytest.mark.parametrize("year", ["0001", "1600", "1969", "2262", "2600", "9999"])
def test_any_year_gives_a_time_a_record_can_store(year: str) -> None:
    """A record with a time beyond 64 bits cannot be written: it would take the spool's writer with it."""
    found = one(body_of({"rule": "r", "time": f"{year}-06-15T12:00:00Z"})).time_ns
    record = Record(0, "id", 4, found or 0, 0, internal=False, body=b"{}")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Record) == record


@given(st.datetimes(datetime(1970, 1, 1), datetime(2261, 1, 1)), st.integers(0, 999))  # noqa: DTZ001
@settings(max_examples=60, deadline=None)
def test_time_and_its_text_agree(moment: datetime, nanoseconds: int) -> None:
    text = f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond:06d}{nanoseconds:03d}Z"
    found = time_ns(text.zfill(30))
    assert found is not None
    assert found % 1000 == nanoseconds
    assert iso_milliseconds(found) == text.zfill(30)[:23] + "Z"


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(-5, "1970-01-01T00:00:00"), (10**30, "9999-12-31T23:59:59"), (1_500_000_000, "1970-01-01T00:00:01")],
)
def test_iso_times_stay_within_four_digit_years(nanoseconds: int, text: str) -> None:
    assert iso_milliseconds(nanoseconds).startswith(text)


# ---- several alerts in one body ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'[{"rule":"a"},{"rule":"b"}]',
        b' [ {"rule":"a"} ,\n {"rule":"b"} ] \n',
        b'{"rule":"a"}\n{"rule":"b"}',
        b'{"rule":"a"}\r\n\r\n  {"rule":"b"}\r\n',
    ],
)
def test_arrays_and_lines_give_their_alerts_in_order(body: bytes) -> None:
    assert [(a.rule, a.body) for a in decode(body).alerts] == [("a", b'{"rule":"a"}'), ("b", b'{"rule":"b"}')]


def test_all_real_alerts_in_one_body() -> None:
    for body in (b"\n".join(REAL_BODIES), b"[" + b",".join(REAL_BODIES) + b"]"):
        assert [alert.body for alert in decode(body).alerts] == REAL_BODIES


def test_an_indented_object_is_one_alert() -> None:
    body = json.dumps(REAL_ALERTS[0], indent=2).encode()
    assert one(body).body == body


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'[{"rule":"a"},{"x":1}]', "element 2"),
        (b'[{"rule":"a"},5]', "element 2"),
        (b'[{"rule":"a"},[{"rule":"b"}]]', "element 2"),
        (b'{"rule":"a"}\n{"rule":', "line 2"),
        (b'{"rule":"a"}\n{"rule":"b"}\nfoo', "line 3"),
    ],
)
def test_one_bad_part_refuses_the_whole_body(body: bytes, where: str) -> None:
    assert fault(body).startswith(where)


@pytest.mark.parametrize("shape", ["array", "lines", "text"])
def test_too_many_alerts_are_refused(shape: str) -> None:
    def body(count: int) -> bytes:
        if shape == "text":
            return b"\n".join([b"14:07:31.295984000: Notice x"] * count)
        parts = [b'{"rule":"a"}'] * count
        return b"[" + b",".join(parts) + b"]" if shape == "array" else b"\n".join(parts)

    assert len(decode(body(ALERTS_PER_BODY_MAX)).alerts) == ALERTS_PER_BODY_MAX
    assert str(ALERTS_PER_BODY_MAX) in fault(body(ALERTS_PER_BODY_MAX + 1))
