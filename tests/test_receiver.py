"""The receiver against clients that are slow, rude, broken, or Falco: deadlines, connections, abuse of HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import time
from typing import Any

import pytest

from tests.fakes.aws import FakeAws
from tests.falco import Answer, close, get, is_one_line_error, read_answer, request, send_raw
from tests.running import Running, Start
from tests.samples import REAL_BODIES, body_of

pytestmark = pytest.mark.usefixtures("impatient")

ALERT = REAL_BODIES[0]
SOON = 5.0
"""Upper bound for what takes a fraction of a second on a quiet machine."""


async def seconds_until_closed(port: int, *parts: bytes, pause_secs: float = 0.0) -> float:
    """Send parts, then wait; how long the server let the connection live."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.monotonic()
    try:
        async with asyncio.timeout(SOON):
            try:
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(pause_secs)
                    if reader.at_eof() or reader.exception():
                        break
                await reader.read()
            except ConnectionError:
                pass
    finally:
        await close(writer)
    return time.monotonic() - started


# ---- deadlines and connections -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"POST / HT"],
        [b"POST / HTTP/1.1\r\nHost: x\r\nContent-Le"],
        [b"POST / HTTP/1.1\r\n", *(f"X-{n}: y\r\n".encode() for n in range(60))],
    ],
    ids=["idle from the start", "half a line", "half a header", "a header line at a time"],
)
async def test_a_header_has_a_deadline(forwarder: Start, parts: list[bytes]) -> None:
    running = await forwarder({"receiver.header_secs_max": 0.3})
    secs = await seconds_until_closed(running.port, *parts, pause_secs=0.05)
    assert 0.25 < secs < 2.5
    assert (await running.scrape()).total("connections_closed_total", limit="header_timeout") == 1


async def test_half_a_header_behind_a_whole_request_has_a_deadline(forwarder: Start) -> None:
    """Pipelined into the same packet as a request, it is no way around the deadline."""
    running = await forwarder({"receiver.header_secs_max": 0.3})
    assert await seconds_until_closed(running.port, request(ALERT) + b"POST / HTTP/1.1\r\nHos") < 2.5


async def test_a_second_header_has_a_deadline(forwarder: Start) -> None:
    running = await forwarder({"receiver.header_secs_max": 0.3})
    secs = await seconds_until_closed(running.port, request(ALERT), b"POST / HTTP/1.1\r\nHos", pause_secs=0.1)
    assert secs < 2.5


async def test_a_slow_body_has_a_deadline(forwarder: Start) -> None:
    """A byte at a time is not enough, and the answer names the fault."""
    running = await forwarder({"receiver.body_secs_max": 0.3})
    drips = [bytes([byte]) for byte in ALERT[:100]]
    head = request(b"", length=len(ALERT))
    started = time.monotonic()
    answer = await send_raw(running.port, head, *drips, pause_secs=0.01)
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert is_one_line_error(answer)
    assert time.monotonic() - started < SOON
    assert (await running.scrape()).total("http_requests_total", status="408") == 1


async def test_a_body_may_come_slowly_within_its_time(aws: FakeAws, forwarder: Start) -> None:
    """The deadline of the header does not cut a body that still arrives."""
    running = await forwarder({"receiver.header_secs_max": 0.1, "receiver.body_secs_max": 5})
    pieces = [ALERT[at : at + 100] for at in range(0, len(ALERT), 100)]
    answer = await send_raw(running.port, request(b"", length=len(ALERT)), *pieces, pause_secs=0.06)
    assert answer.status == 200


async def test_idle_connections_do_not_hurt_falco(forwarder: Start) -> None:
    running = await forwarder({"receiver.header_secs_max": 0.4})
    idle = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(300)]
    async with running.falco() as falco:
        started = time.monotonic()
        assert [(await falco.post(body)).status for body in REAL_BODIES[:20]] == [200] * 20
        assert time.monotonic() - started < SOON
        async with asyncio.timeout(SOON):
            assert await asyncio.gather(*(reader.read() for reader, _ in idle)) == [b""] * 300
        assert (await falco.post(REAL_BODIES[20])).status == 200, "a served connection may idle on"
        assert (falco.connections, falco.resent) == (1, 0)
        assert (await running.scrape()).total("connections") == 1
    for _, writer in idle:
        await close(writer)


async def test_the_connection_cap_spares_connections_in_use(forwarder: Start) -> None:
    """The one that never sent a request makes room; Falco's stay, and a new one gets in."""
    running = await forwarder({"receiver.connections_max": 3})
    async with running.falco() as first, running.falco() as second:
        assert (await first.post(REAL_BODIES[0])).status == 200
        idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", running.port)
        assert (await second.post(REAL_BODIES[1])).status == 200
        async with running.falco() as third:
            assert (await third.post(REAL_BODIES[2])).status == 200
        async with asyncio.timeout(SOON):
            assert await idle_reader.read() == b""
        await close(idle_writer)
        assert (await first.post(REAL_BODIES[3])).status == 200
        assert (await second.post(REAL_BODIES[4])).status == 200
        assert (first.connections, second.connections) == (1, 1)
    scrape = await running.scrape()
    assert scrape.total("connections_closed_total", limit="idle") == 1
    await asyncio.sleep(0.05)
    assert (await running.scrape()).total("connections") == 0


async def test_a_client_that_leaves_is_no_fault_of_ours(forwarder: Start, log_lines: io.StringIO) -> None:
    """In the middle of a header or a body: nothing logged, nothing counted as our error."""
    running = await forwarder()
    for part in (b"POST / HT", request(ALERT[:50], length=len(ALERT)), request(b"", length=9)):
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.05)
        await close(writer)
    await asyncio.sleep(0.1)
    assert "request failed" not in log_lines.getvalue()
    assert "Traceback" not in log_lines.getvalue()
    assert (await running.scrape()).total("http_requests_total", status="500") == 0
    assert (await running.scrape()).total("received_events_total") == 0


# ---- abuse of HTTP -----------------------------------------------------------------------------------


ABUSE = {
    "100,000 headers": request(ALERT, *[f"X-{n}: y" for n in range(100_000)]),
    "a header of 9 KB": request(ALERT, "X: " + "y" * 9000),
    "a path of 9 KB": request(ALERT, path="/" + "p" * 9000),
    "two lengths": request(ALERT, f"Content-Length: {len(ALERT) + 1}"),
    "length and chunks": request(ALERT, "Transfer-Encoding: chunked"),
    "negative length": request(ALERT, length="-1"),
    "signed length": request(ALERT, length="+5"),
    "length of two numbers": request(ALERT, length="5 5"),
    "space before a colon": request(ALERT, "X : y", "Transfer-Encoding : chunked"),
    "folded header": b"POST / HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n",
    "no HTTP version": b"POST / HTTQ/1.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


async def test_abuse_of_http_is_refused(forwarder: Start) -> None:
    """400 and the connection ends; the next sender is served."""
    running = await forwarder()
    for name, raw in ABUSE.items():
        answer = await send_raw(running.port, raw)
        assert (name, answer.status) == (name, 400)
        assert is_one_line_error(answer)
        await running.until(lambda: not running.app.receiver.server.connections)
        assert (name, (await running.scrape()).total("received_events_total")) == (name, 0)
    assert (await running.post(ALERT))[0].status == 200
    assert (await running.scrape()).total("stored_events_total") == 1


async def test_any_path_takes_alerts(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    paths = ["/", "/falco", "/a/b?c=d", "//", "/%2e%2e/", "/%ff", "/a:b", "/?", "/metrics", "/healthz"]
    for path, body in zip(paths, REAL_BODIES, strict=False):
        answer = await send_raw(running.port, request(body, path=path))
        assert (path, answer.status, answer.body) == (path, 200, b"")
    assert (await running.scrape()).total("stored_events_total") == len(paths)


async def test_a_path_that_is_no_path_breaks_nothing(forwarder: Start) -> None:
    running = await forwarder()
    for path in ("http://[::1/", "http://host:99999/", "///[", "no-slash", "/\x80", "*"):
        answer = await send_raw(running.port, request(ALERT, path=path))
        assert (path, answer.status in {200, 400}) == (path, True)


async def test_other_methods(forwarder: Start) -> None:
    running = await forwarder()
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        answer = await _ask(running, method, "/")
        assert (method, answer.status, answer.headers["allow"]) == (method, 405, "POST")


async def _ask(running: Running, method: str, path: str) -> Answer:
    """As ``get``, for HEAD too, whose answer has a length but no body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    try:
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        async with asyncio.timeout(SOON):
            answer = await reader.read()
    finally:
        await close(writer)
    head, _, body = answer.partition(b"\r\n\r\n")
    again = asyncio.StreamReader()
    again.feed_data(head.replace(b"Content-Length", b"X-Length") + b"\r\n\r\n")
    parsed = await read_answer(again)
    return Answer(parsed.status, parsed.headers, body)


async def test_the_paths_of_falcosidekick(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    assert (await get(running.port, "/ping"))[::2] == (200, b"pong\n")
    health = await get(running.port, "/healthz")
    assert (health.status, json.loads(health.body)) == (200, {"status": "ok"})
    head = await _ask(running, "HEAD", "/healthz")
    assert (head.status, head.body) == (200, b"")
    answer = await send_raw(running.port, request(b"", path="/test"))
    assert (answer.status, answer.body) == (200, b"")
    assert (await send_raw(running.port, request(b"{ignored", path="/test"))).status == 200
    await running.at_rest()
    assert [(event["rule"], event["priority"]) for event in aws.messages()] == [("Test rule", "Debug")] * 2
    assert aws.findings == {}


async def test_admin_routes_are_not_on_the_ingest_port(forwarder: Start) -> None:
    running = await forwarder()
    for path in ("/metrics", "/status", "/livez", "/readyz", "/dead-letters"):
        assert (await get(running.port, path)).status == 405


# ---- Falco's own ways --------------------------------------------------------------------------------


async def test_one_connection_for_many_alerts(forwarder: Start) -> None:
    running = await forwarder()
    async with running.falco() as falco:
        for body in REAL_BODIES:
            assert (await falco.post(body)).status == 200
        assert falco.connections == 1


async def test_a_connection_for_every_alert(forwarder: Start) -> None:
    """Falco up to 0.35."""
    running = await forwarder()
    async with running.falco(reuse=False) as falco:
        for body in REAL_BODIES[:30]:
            assert (await falco.post(body)).status == 200
        assert falco.connections == 30


async def test_a_body_above_a_mebibyte_is_asked_for(aws: FakeAws, forwarder: Start) -> None:
    """Libcurl sends Expect: 100-continue from there on, and waits a second where nobody answers it."""
    running = await forwarder()
    body = body_of({"rule": "Big", "priority": "Notice", "output": "x" * 1_200_000})
    async with running.falco() as falco:
        answer = await falco.post(body)
        assert (answer.status, answer.body, falco.continued) == (200, b"", 1)
        assert (await falco.post(ALERT)).status == 200
        assert falco.connections == 1


async def test_asking_first_spares_a_refused_body(forwarder: Start) -> None:
    running = await forwarder({"receiver.body_bytes_max": 4096})
    async with running.falco(expect=True) as falco:
        assert (await falco.post(b"x" * 5000)).status == 413
        assert falco.continued == 0
        assert (await falco.post(ALERT)).status == 200
        assert (falco.continued, falco.connections) == (1, 2)


async def test_compress_uploads_compresses_nothing(forwarder: Start) -> None:
    """TE: gzip with Connection: TE: a plain body, and the connection stays."""
    running = await forwarder()
    async with running.falco(compress_uploads=True) as falco:
        for body in REAL_BODIES[:3]:
            answer = await falco.post(body)
            assert (answer.status, answer.body) == (200, b"")
            assert "content-encoding" not in answer.headers
        assert falco.connections == 1


async def test_text_mode_posts_are_taken(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    async with running.falco(content_type="text/plain") as falco:
        assert (await falco.post(b"13:44:05.478445995: Critical Something (user=root)")).status == 200
    await running.at_rest()
    (event,) = aws.messages()
    assert event["output"] == "13:44:05.478445995: Critical Something (user=root)"
    assert aws.findings == {}


async def test_a_connection_ends_at_its_age_with_an_answer(forwarder: Start) -> None:
    """Connection: close on the answer; nothing is lost, nothing is sent twice."""
    running = await forwarder({"receiver.connection_age_secs_max": 0.2})
    async with running.falco() as falco:
        assert "connection" not in (await falco.post(REAL_BODIES[0])).headers
        await asyncio.sleep(0.25)
        answer = await falco.post(REAL_BODIES[1])
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert (await falco.post(REAL_BODIES[2])).status == 200
        assert (falco.connections, falco.resent) == (2, 0)
    assert (await running.scrape()).total("connections_closed_total", limit="age") == 1


async def test_a_drain_refuses_nobody(forwarder: Start) -> None:
    """While endpoints are withdrawn new connections are taken and old ones end with an answer."""
    running = await forwarder({"receiver.drain_delay_secs": 0.5})
    async with running.falco() as old, running.falco() as new, running.falco() as idle:
        assert (await old.post(REAL_BODIES[0])).status == 200
        assert (await idle.post(REAL_BODIES[1])).status == 200
        stopping = asyncio.create_task(running.stop())
        await asyncio.sleep(0.05)
        for falco, body in ((old, REAL_BODIES[2]), (new, REAL_BODIES[3])):
            answer = await falco.post(body)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert (await running.get("/readyz")).status == 503
        await stopping
        with pytest.raises(OSError, match=r"."):
            await new.post(ALERT)


async def test_what_was_read_before_the_stop_is_answered(aws: FakeAws, forwarder: Start) -> None:
    """Many senders under way when the listener closes: what was acknowledged is delivered, none is left hanging."""
    running = await forwarder({"receiver.drain_delay_secs": 0.1})
    acknowledged: list[str] = []

    async def sender(name: int) -> None:
        async with running.falco() as falco:
            for number in range(10_000):
                rule = f"{name}-{number}"
                try:
                    answer = await falco.post(body_of({"rule": rule, "priority": "Debug"}))
                except OSError:
                    return
                if answer.status == 200:
                    acknowledged.append(rule)

    senders = [asyncio.create_task(sender(name)) for name in range(8)]
    await asyncio.sleep(0.2)
    await running.stop()
    await asyncio.gather(*senders)
    rules: list[Any] = [message["rule"] for message in aws.messages()]
    assert len(acknowledged) > 20
    assert set(acknowledged) <= set(rules)
