"""What a body may hold, and what not: sizes, encodings, unparsable and hostile JSON, forged log lines."""

from __future__ import annotations

import gzip
import io
import json
import time

import pytest

from tests.fakes.aws import FakeAws
from tests.falco import get, is_one_line_error, request, send_raw
from tests.running import Start
from tests.samples import REAL_BODIES, body_of

pytestmark = pytest.mark.usefixtures("impatient")

ALERT = REAL_BODIES[0]
SOON = 5.0
"""Upper bound for what takes a fraction of a second on a quiet machine."""


# ---- sizes and encodings -----------------------------------------------------------------------------


async def test_too_large_by_its_header(forwarder: Start) -> None:
    """413 from the header alone: not a byte of the body is waited for."""
    running = await forwarder({"receiver.body_bytes_max": 2048})
    for length in (2049, 10**9, 9 * 10**18):
        started = time.monotonic()
        answer = await send_raw(running.port, request(b"", length=length))
        assert time.monotonic() - started < 2
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert is_one_line_error(answer)
    assert (await send_raw(running.port, request(b"", length="9" * 40))).status in {400, 413}


async def test_chunks_without_end(forwarder: Start) -> None:
    """413 as soon as the limit is passed, not when the deadline of the body is."""
    running = await forwarder({"receiver.body_bytes_max": 64 << 10})
    head = request(b"", "Transfer-Encoding: chunked", length="")
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    started = time.monotonic()
    answer = await send_raw(running.port, head, *[chunk] * 6)
    assert time.monotonic() - started < SOON
    assert (answer.status, answer.headers["connection"]) == (413, "close")


async def test_a_chunked_body_is_an_alert_too(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(ALERT), ALERT)
    answer = await send_raw(running.port, request(b"", "Transfer-Encoding: chunked", length="") + body)
    assert (answer.status, answer.body) == (200, b"")


async def test_a_broken_chunk_is_the_senders_fault(forwarder: Start) -> None:
    """400 at once or, where aiohttp does not tell that the body broke, 408 in the end. Never our fault."""
    running = await forwarder({"receiver.body_secs_max": 0.3})
    head = request(b"", "Transfer-Encoding: chunked", length="")
    for chunk in (b"zz\r\nabc\r\n", b"-5\r\nabc\r\n", b"3\r\nabcdef\r\n0\r\n\r\n"):
        assert (await send_raw(running.port, head + chunk)).status in {400, 408}
        assert (await send_raw(running.port, head, chunk, pause_secs=0.05)).status in {400, 408}


async def test_compressed_bodies_are_refused_at_once(forwarder: Start) -> None:
    """415 before the body has come, whatever it would unpack to."""
    running = await forwarder()
    for encoding in ("gzip", "GZIP", "deflate", "br", "gzip, gzip", "nonsense"):
        started = time.monotonic()
        answer = await send_raw(running.port, request(b"", f"Content-Encoding: {encoding}", length=1000))
        assert time.monotonic() - started < 2
        assert (encoding, answer.status) == (encoding, 415)
        assert is_one_line_error(answer)


async def test_a_gzip_bomb_is_not_unpacked(forwarder: Start) -> None:
    bomb = gzip.compress(bytes(64 << 20), 9)
    running = await forwarder()
    started = time.process_time()
    assert (await send_raw(running.port, request(bomb, "Content-Encoding: gzip"))).status == 415
    assert time.process_time() - started < 0.5


async def test_a_gzip_body_without_its_header_is_unparsable(forwarder: Start) -> None:
    running = await forwarder()
    assert (await send_raw(running.port, request(gzip.compress(ALERT)))).status == 400


# ---- bodies that are no alerts -----------------------------------------------------------------------

UNPARSABLE: dict[str, bytes] = {
    "no JSON": b"hello",
    "truncated": ALERT[:-20],
    "trailing bytes": ALERT + b" x",
    "two objects": ALERT + ALERT,
    "empty": b"",
    "white space": b" \r\n\t",
    "empty array": b"[]",
    "array of numbers": b"[1, 2]",
    "array with one bad": b"[" + ALERT + b", {}]",
    "NDJSON with one bad": ALERT + b"\n{}\n" + REAL_BODIES[1],
    "number": b"42",
    "text": b'"rule"',
    "null": b"null",
    "empty object": b"{}",
    "single quotes": b"{'rule': 'x'}",
    "only a mark": b"\xef\xbb\xbf",
    "NUL bytes": b"\0" * 64,
    "UTF-16": ALERT.decode().encode("utf-16"),
    "binary": bytes(range(256)),
    "nested in vain": b"[" * 100_000,
}


async def test_what_cannot_be_read_is_kept_and_forwarded(aws: FakeAws, forwarder: Start) -> None:
    """400 with one line that names the fault, a dead letter with the raw body, ``unparsed`` in CloudWatch."""
    running = await forwarder()
    answers = await running.post(*UNPARSABLE.values())
    assert {name: answer.status for name, answer in zip(UNPARSABLE, answers, strict=True)} == dict.fromkeys(
        UNPARSABLE, 400
    )
    assert all(map(is_one_line_error, answers))
    letters = await running.json("/dead-letters")
    await running.at_rest()
    events = {event["id"]: event for event in aws.messages()}
    assert len(letters) == len(events) == len(UNPARSABLE)
    for letter, body, answer in zip(reversed(letters), UNPARSABLE.values(), answers, strict=True):
        text = body.decode("utf-8", "replace")
        assert (letter["sink"], letter["reason"]) == ("receiver", "unparsed")
        assert letter["detail"] == json.loads(answer.body)["error"]
        assert letter["body"] == text[: len(letter["body"])]
        assert letter["body_bytes"] == len(body)
        assert events[letter["id"]]["unparsed"] == text
        assert events[letter["id"]]["account"] == aws.account
    assert aws.findings == {}
    assert aws.validation_errors == []


HOSTILE: dict[str, str] = {
    "1,100 levels": '{"a":' * 1100 + "1" + "}" * 1100,
    "100,000 levels": "[" * 100_000 + "]" * 100_000,
    "5,000 digits": "9" * 5000,
    "minus 5,000 digits": "-" + "9" * 5000,
    "1e400": "1e400",
    "-1e400": "-1e400",
    "1e-400": "1e-400",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "NUL": r'"a\u0000b"',
    "lone high surrogate": r'"\ud800"',
    "lone low surrogate": r'"\udc00 x"',
    "surrogates in the wrong order": r'"\udc00\ud800"',
    "a good pair": r'"\ud83d\ude00"',
    "control characters escaped": r'"\u0001\u001b[31m\u007f"',
    "raw control character": '"a\x01b"',
    "raw newline": '"a\nb"',
    "duplicate keys": '{"a": 1, "a": 2}',
    "leading zero": "007",
    "hexadecimal": "0x10",
    "bad escape": r'"\x41"',
    "formula": "\"=cmd|' /C calc'!A0\"",
    "HTML": '"<script>alert(1)</script>"',
}
PLACES = {
    "in a field": '{"rule":"R","priority":"Notice","output_fields":{"x":%s}}',
    "as a key we do not know": '{"rule":"R","priority":"Notice","x":%s}',
    "as rule": '{"rule":%s,"priority":"Notice","output":"o"}',
    "as time": '{"rule":"R","priority":"Notice","time":%s}',
    "as tags": '{"rule":"R","priority":"Notice","tags":[%s]}',
    "as uuid": '{"rule":"R","priority":"Notice","uuid":%s}',
    "as a key of ours": '{"rule":"R","priority":"Notice","kubernetes":%s}',
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
async def test_hostile_values_never_break_anything(aws: FakeAws, forwarder: Start, place: str) -> None:
    """Each is stored and arrives, or is unparsable and arrives raw: no 500, no stuck sink, no rejected call."""
    running = await forwarder()
    bodies = [(place % value).encode() for value in HOSTILE.values()]
    answers = await running.post(*bodies)
    statuses = dict(zip(HOSTILE, (answer.status for answer in answers), strict=True))
    assert set(statuses.values()) <= {200, 400}, statuses
    assert {statuses[name] for name in ("NUL", "a good pair", "HTML", "duplicate keys")} == {200}
    await running.at_rest()
    assert len(aws.events()) == len(bodies)
    assert aws.validation_errors == []
    messages = [json.loads(event.message, parse_int=str) for event in aws.events()]
    unparsed = [message for message in messages if "unparsed" in message]
    assert len(unparsed) == list(statuses.values()).count(400)
    states = running.app.status()["sinks"]
    assert {name: state["dead_letters"] for name, state in states.items()} == dict.fromkeys(states, 0)
    assert (await running.post(ALERT))[0].status == 200
    assert (await running.scrape()).broken_law() == {}


async def test_a_byte_order_mark_is_no_reason_to_lose_an_alert(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    assert (await running.post(b"\xef\xbb\xbf" + ALERT))[0].status == 200
    await running.at_rest()
    assert aws.messages()[0]["rule"] == json.loads(ALERT)["rule"]


async def test_invalid_utf8_is_replaced(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    body = b'{"rule":"Path \xff\xfe","priority":"Notice","output":"\xc3\x28 \xe2\x82 end"}'
    assert (await running.post(body))[0].status == 200
    await running.at_rest()
    (event,) = aws.messages()
    assert (event["rule"], event["output"]) == ("Path \ufffd\ufffd", "\ufffd( \ufffd end")
    assert event["forwarder"]["utf8_replaced"] is True
    assert len(aws.findings) == 1
    assert aws.validation_errors == []
    assert (await running.scrape()).total("utf8_replaced_bodies_total") == 1


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_a_field_of_a_megabyte(aws: FakeAws, forwarder: Start) -> None:
    """Accepted; cut to what an event and a finding may hold, with the digest of the whole."""
    running = await forwarder()
    value = "\N{GRINNING FACE}" * 300_000
    body = body_of({"rule": "Big", "priority": "Notice", "output": "o", "output_fields": {"v": value}})
    assert (await running.post(body))[0].status == 200
    await running.at_rest()
    (event,) = aws.messages()
    assert value.startswith(event["output_fields"]["v"].rstrip("\N{HORIZONTAL ELLIPSIS}"))
    assert event["forwarder"]["truncated"] == ["output_fields.v"]
    assert len(event["forwarder"]["sha256"]) == 64
    assert len(aws.findings) == 1
    assert aws.validation_errors == []


async def test_newlines_do_not_forge_log_lines(forwarder: Start, log_lines: io.StringIO) -> None:
    """Whatever an alert, a header or a path holds: every line of the log is one JSON object of ours."""
    running = await forwarder()
    forged = '\n{"event": "forged"}\r\nforged'
    await running.post(
        body_of({"rule": forged, "priority": forged, "output": forged, "hostname": forged}),
        forged.encode(),
        b'{"rule": "' + forged.encode() + b'"}',
    )
    await send_raw(running.port, b"POST / HTTP/1.1\nforged\r\n\r\n")
    await get(running.port, "/%0aforged")
    await running.at_rest()
    events = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    assert events
    assert all(event.keys() >= {"event", "level", "logger", "timestamp"} for event in events)
    assert "forged" not in {event["event"] for event in events}


async def test_no_line_is_logged_for_a_request(forwarder: Start, log_lines: io.StringIO) -> None:
    """Good, bad or not HTTP at all: a flood must not fill the log."""
    running = await forwarder()
    await running.post(ALERT)  # account and stream are made now
    await running.at_rest()
    before = log_lines.getvalue()
    await running.post(*REAL_BODIES, b"{", b"")
    for method in ("GET", "PUT", "BREW"):
        await get(running.port, "/", method=method)
    await send_raw(running.port, b"\x16\x03\x01 no HTTP\r\n\r\n")
    await send_raw(running.port, request(b"", length=10**12))
    await running.at_rest()
    assert log_lines.getvalue() == before
