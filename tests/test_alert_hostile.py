"""Decoding of text form, keys that are ours, broken encodings and everything an attacker may post."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forwarder import alert_fields
from forwarder.alert import PRIORITIES, RESERVED_KEYS, Alert, Unparsable, decode
from tests.samples import REAL_BODIES, TEXT_LINES, body_of

R = b'"rule":"r","priority":"Notice","output":"o"'
WITHOUT_SURROGATES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WITHOUT_SURROGATES
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WITHOUT_SURROGATES, inner, max_size=3),
    max_leaves=8,
)
KNOWN_KEYS = (
    "priority",
    "time",
    "source",
    "hostname",
    "output",
    "message",
    "tags",
    "uuid",
    "output_fields",
    *sorted(RESERVED_KEYS),
)


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


def exact(text: str | bytes) -> Any:
    """JSON with floats as they are written, so that equality is exact."""
    return json.loads(text, parse_float=lambda number: ("float", number))


# ---- text form --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("prefix", [b"", b"2023-05-10T", b" \n"])
def test_real_text_line_is_a_text_alert(number: int, prefix: bytes) -> None:
    line = prefix + TEXT_LINES[number]
    text = line.strip().decode()
    alert = one(line + b"\n")
    assert alert.text
    assert alert.output == text
    assert PRIORITIES[alert.rank] == alert.priority
    assert (alert.rule, alert.id, alert.tags, alert.time_ns, alert.internal) == ("", "", (), None, False)
    assert json.loads(alert.body) == {"output": text, "priority": alert.priority}


@pytest.mark.parametrize("zone", ["Z", "+0200", "-07:00"])
def test_text_form_with_iso_time_and_zone(zone: str) -> None:
    alert = one(f"2023-05-10T14:07:31.295984000{zone}: Error it happened".encode())
    assert (alert.text, alert.rank) == (True, 3)


def test_lines_of_text_form_are_alerts_and_continuations_stay() -> None:
    body = TEXT_LINES[0] + b"\n  and more: of it\n" + TEXT_LINES[1] + b"\r\n12:00:00.1: info last"
    found = decode(body).alerts
    assert [alert.output for alert in found] == [
        TEXT_LINES[0].decode() + "\n  and more: of it",
        TEXT_LINES[1].decode(),
        "12:00:00.1: info last",
    ]
    assert [alert.rank for alert in found] == [5, 5, 6]


def test_all_text_lines_in_one_body() -> None:
    assert [alert.output.encode() for alert in decode(b"\n".join(TEXT_LINES)).alerts] == TEXT_LINES


@pytest.mark.parametrize(
    "body", [b"hello", b"14:07: Notice x", b"14:07:31: Noticeable", b"Notice x", b"x 14:07:31.2: Notice x"]
)
def test_other_text_is_refused(body: bytes) -> None:
    assert "text form" in fault(body)


# ---- no alert ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \r\n\t",
        b"\xef\xbb\xbf",
        b"null",
        b"1",
        b'"text"',
        b"{}",
        b"[]",
        b"[{}]",
        b'{"rule":""}',
        b'{"rule":null,"output":"<NA>"}',
        b'{"priority":"Notice"}',
        b'{"rule":"r"',
        b'{"rule":"r"} x',
        b'{"rule":"r"}{"rule":"r"}',
        b"{'rule':'r'}",
        b'{"rule":"r",}',
        b'[{"rule":"r"}',
        b'{"rule":"a\x00b"}',
        b'{"rule":"r"}\x00',
        b'{"rule":"a\nb"}',
        '{"rule":"r"}'.encode("utf-16"),
        b'{"rule":"r","x":NaN}',
        b'{"rule":"r","output_fields":{"x":Infinity}}',
        b'{"rule":"r","x":-Infinity}',
        b'{"rule":"r","x":01}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"rule":' * 100_000 + b"1" + b"}" * 100_000,
        b"{" + R + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{" + R + b',"output_fields":{"x":' + b'{"y":' * 1_100 + b"1" + b"}" * 1_101 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_cannot_be_used_is_refused_with_its_fault(body: bytes) -> None:
    assert len(fault(body)) < 400


def test_a_fault_quotes_no_endless_line() -> None:
    assert len(fault(b"{" + b'"x":"' + b"\\" * 100_000)) < 400


@pytest.mark.parametrize("depth", [1_100, 100_000])
@pytest.mark.parametrize("place", [b'"output_fields":{"x":%b}', b'"x":%b', b'"rule":%b', b'"tags":%b'])
def test_deep_nesting_never_escapes_as_another_error(depth: int, place: bytes) -> None:
    body = b"{" + R + b"," + place % (b"[" * depth + b"]" * depth) + b"}"
    try:
        assert one(body).body == body
    except Unparsable as refusal:
        assert "nested too deeply" in str(refusal)  # noqa: PT017 - either way is right


# ---- hostile, but decodable -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"9" * 5_000, b"-" + b"9" * 5_000, b"1e400", b"1e-400", b"-0.0", b"1E+2"])
@pytest.mark.parametrize("place", [b'"output_fields":{"x":%b}', b'"x":%b', b'"priority":%b', b'"time":%b'])
def test_numbers_beyond_any_type_are_kept_as_sent(value: bytes, place: bytes) -> None:
    body = b'{"rule":"r",' + place % value + b"}"
    assert one(body).body == body


def test_a_huge_integer_does_not_spoil_the_other_fields() -> None:
    huge = "9" * 5_000
    body = b'{"rule":"r","output_fields":{"a":"x \\"y\\"","b":null,"c":1,"d":true,"e":%b}}' % huge.encode()
    found = alert_fields.fields(one(body).fields)
    assert {key: str(value) for key, value in found.items()} == {
        "a": 'x "y"',
        "b": "None",
        "c": "1",
        "d": "True",
        "e": huge,
    }


@pytest.mark.parametrize("value", [b"null", b"5", b'"x"', b"[1]", b"true"])
def test_fields_of_another_shape_are_none(value: bytes) -> None:
    alert = one(b'{"rule":"r","output_fields":' + value + b"}")
    assert alert_fields.fields(alert.fields) == {}


@pytest.mark.parametrize(
    "place",
    [
        b'"x":"%b"',
        b'"rule":"%b"',
        b'"output_fields":{"x":"%b"}',
        b'"%b":1',
        b'"cluster":"%b"',
        b'"tags":["%b"]',
    ],
)
@pytest.mark.parametrize("half", [b"\\ud800", b"\\udc00", b"a\\udfffb", b"\\ud800\\u0041", b"\\ud83d\\ud83d"])
def test_half_a_surrogate_pair_is_refused_or_forwarded_as_sent(half: bytes, place: bytes) -> None:
    """Never anything that breaks later: what passes can be written as UTF-8 again."""
    body = b'{"rule":"r",' + place % half + b"}"
    try:
        alert = one(body)
    except Unparsable:
        return
    json.dumps([alert.rule, alert.tags, alert_fields.fields(alert.fields)], ensure_ascii=False).encode()
    assert half in alert.body + alert.sender_keys


def test_escaped_surrogate_pair_is_one_character() -> None:
    assert one(b'{"rule":"\\ud83d\\ude00"}').rule == "\U0001f600"


@pytest.mark.parametrize("body", [b'{"rule":"a","rule":"b"}', b'{"rule":"a","x":5,"rule":"b","rule":7}'])
def test_the_last_of_duplicate_keys_counts(body: bytes) -> None:
    assert one(body).rule == str(json.loads(body)["rule"])


def test_escaped_nul_is_text() -> None:
    assert one(b'{"rule":"a\\u0000b"}').rule == "a\x00b"


@pytest.mark.parametrize("bom", [b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_a_byte_order_mark_is_taken_off(bom: bytes) -> None:
    decoded = decode(bom + b'{"rule":"r"}')
    assert decoded.alerts[0].body == b'{"rule":"r"}'
    assert not decoded.utf8_replaced


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"a\xffb", "a\ufffdb"),
        (b"\xc3", "\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"\xf0\x9f\x98\x80\xf0\x9f", "\U0001f600\ufffd"),
    ],
)
def test_invalid_utf8_is_replaced_and_told(sent: bytes, kept: str) -> None:
    for bom in (b"", b"\xef\xbb\xbf"):
        decoded = decode(bom + b'{"rule":"' + sent + b'"}')
        assert decoded.utf8_replaced
        assert decoded.alerts[0].rule == kept
        assert decoded.alerts[0].body == body_of({"rule": kept})


def test_valid_utf8_is_not_reported_as_replaced() -> None:
    assert not decode(body_of({"rule": "\u00e4\U0001f600"})).utf8_replaced


# ---- wrong types ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(5, "5"), (1.5, "1.5"), (True, "true"), (["a"], '["a"]'), ({"a": 1}, '{"a":1}')],
)
def test_wrong_types_become_text(value: Any, text: str) -> None:
    body = body_of({"rule": value, "hostname": value, "source": value, "output": value, "uuid": value})
    alert = one(body)
    assert {alert.rule, alert.hostname, alert.source, alert.output, alert.id} == {text}
    assert alert.body == body


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        ("a, b ,,c", ("a", "b", "c")),
        (None, ()),
        ([1, "x", True], ("1", "x", "true")),
        (7, ("7",)),
        ([], ()),
    ],
)
def test_tags_of_any_shape(value: Any, tags: tuple[str, ...]) -> None:
    assert one(body_of({"rule": "r", "tags": value})).tags == tags


# ---- keys that are ours -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(RESERVED_KEYS - {"_aws"}))
def test_a_key_that_is_ours_moves_to_sender_keys(key: str) -> None:
    alert = one(body_of({"a": 1, key: {"x": 2**70}, "rule": "r", "z": [1.50]}))
    assert json.loads(alert.body) == {"a": 1, "rule": "r", "z": [1.5]}
    assert json.loads(alert.sender_keys) == {key: {"x": 2**70}}


@pytest.mark.parametrize("key", [b"_aws", b"\\u005faws", b'_aws":1,"_aws'])
def test_aws_metrics_are_never_passed_on(key: bytes) -> None:
    alert = one(b'{"rule":"r","' + key + b'":{"CloudWatchMetrics":[]},"x":1}')
    assert json.loads(alert.body) == {"rule": "r", "x": 1}
    assert alert.sender_keys == b""


def test_same_names_further_down_stay() -> None:
    body = body_of({"rule": "r", "output_fields": {"_aws": 1, "id": 2}, "x": {"cluster": 3}})
    alert = one(body)
    assert (alert.body, alert.sender_keys) == (body, b"")


# ---- properties -------------------------------------------------------------------------------------

FRAGMENTS = st.lists(
    st.sampled_from(
        [
            *(b'{ } [ ] , : " \\ \n \\ud800 \\u0000 \xff \xef\xbb\xbf null true -1e999 9e9 NaN'.split(b" ")),
            *(b'"%b":' % key.encode() for key in ("rule", "output", "tags", "_aws", "id", "output_fields")),
            b'{"rule":"r"}',
            b'["a"]',
            b'"text"',
            TEXT_LINES[0],
            REAL_BODIES[0],
        ]
    ),
    max_size=12,
).map(b"".join)


@given(st.binary(max_size=60) | FRAGMENTS | FRAGMENTS.map(lambda inner: b'{"rule":"r",' + inner + b"}"))
@settings(max_examples=400, deadline=None)
def test_decoding_raises_nothing_but_unparsable(body: bytes) -> None:
    try:
        found = decode(body).alerts
    except Unparsable:
        return
    for alert in found:
        assert isinstance(alert_fields.fields(alert.fields), dict)
        alert.body.decode()
        assert isinstance(json.loads(alert.body), dict)


@given(
    st.dictionaries(st.sampled_from(KNOWN_KEYS) | WITHOUT_SURROGATES, VALUES, max_size=8),
    WITHOUT_SURROGATES.map(lambda text: f"r{text}"),
    st.booleans(),
)
@example({"cluster": 2**64, "n": 2**64 + 1, "f": 1e22}, "r", True)
@settings(max_examples=300, deadline=None)
def test_all_members_keep_their_values_exactly(members: dict[str, Any], rule: str, ascii_only: bool) -> None:
    body = body_of(members | {"rule": rule}, ascii_only=ascii_only)
    alert = one(body)
    sent = exact(body)
    ours = {key: sent.pop(key) for key in RESERVED_KEYS & sent.keys()}
    assert exact(alert.body) == sent
    if not ours:
        assert alert.body == body
    ours.pop("_aws", None)
    assert exact(alert.sender_keys or b"{}") == ours


@given(st.dictionaries(st.sampled_from(KNOWN_KEYS) | WITHOUT_SURROGATES, VALUES, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_stored_body_reads_back_as_the_same_alert(members: dict[str, Any]) -> None:
    """What ingest decided is what delivery sees: nothing is lost or moved by reading it again."""
    alert = one(body_of(members | {"rule": "r"}))
    again = one(alert.body)
    for name in ("id", "rule", "priority", "rank", "time_ns", "source", "hostname", "output", "tags", "body"):
        assert getattr(again, name) == getattr(alert, name)
    assert again.sender_keys == b""


def test_decoding_keeps_no_memory_of_large_bodies() -> None:
    """Caches are for small, repeated values: hostile ones must not pile up."""
    tracemalloc.start()
    try:
        for number in range(20):
            filler = f"{number}" * 100_000
            body = body_of({"rule": filler, "tags": [filler], "time": filler, "priority": filler})
            alert_fields.fields(one(body).fields)
        retained, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert retained < 2_000_000
