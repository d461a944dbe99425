"""Senders that want all of the receiver: memory, connections, the log. Falco still gets in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import logging
import resource
import socket
import tracemalloc
from typing import Any

import pytest

from forwarder import receiver, receiver_answers, receiver_connection
from forwarder.alert import ALERTS_PER_BODY_MAX
from forwarder.logs import LoopFaults
from tests.falco import close, is_one_line_error, request, send_raw
from tests.running import Running, Start
from tests.samples import REAL_BODIES

MIB = 1 << 20
SMALL = {"receiver.body_bytes_max": MIB, "receiver.bodies_bytes_max": 4 * MIB}
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(running: Running, *parts: bytes) -> Streams:
    streams = await asyncio.open_connection("127.0.0.1", running.port)
    for part in parts:
        streams[1].write(part)
        await streams[1].drain()
    return streams


async def leave(*connections: Streams) -> None:
    for _, writer in connections:
        await close(writer)


async def everyone_posts(running: Running) -> None:
    assert [answer.status for answer in await running.post(*REAL_BODIES[:20])] == [200] * 20


@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
async def test_what_is_only_announced_costs_nobody(forwarder: Start, method: str) -> None:
    running = await forwarder(SMALL)
    head = f"{method} /ping HTTP/1.1\r\nHost: x\r\nContent-Length: {MIB}\r\n\r\n".encode()
    idle = [await connect(running, head) for _ in range(20)]
    await everyone_posts(running)
    assert running.app.receiver._bodies.bytes == 0
    await leave(*idle)


@pytest.mark.parametrize("chunked", [False, True])
async def test_one_address_has_half_of_the_memory(
    forwarder: Start, log_lines: io.StringIO, chunked: bool
) -> None:
    """Bodies that dribble: the third is refused when there is no room any more; then there is room for all again."""
    running = await forwarder(SMALL)
    part = b"x" * (900 << 10)
    size = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1048576"
    head = b"POST / HTTP/1.1\r\nHost: x\r\n" + size + b"\r\n\r\n" + (b"%x\r\n" % MIB if chunked else b"")
    bodies = running.app.receiver._bodies
    slow = [await connect(running, head + part) for _ in range(2)]
    await running.until(lambda: bodies.bytes == 2 * len(part))
    answer = await send_raw(running.port, head + part)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert answer.headers["connection"] == "close"
    assert is_one_line_error(answer)
    await everyone_posts(running)
    scrape = await running.scrape()
    assert scrape.total("connections_closed_total", limit="bodies") == 1
    assert log_lines.getvalue().count("sender turned away") == 1
    await leave(*slow)
    await running.until(lambda: bodies.bytes == 0)
    assert bodies._peers == {}


async def test_all_addresses_together_have_all_of_it(forwarder: Start) -> None:
    running = await forwarder(SMALL)
    bodies = running.app.receiver._bodies
    with bodies.claim("a") as a, bodies.claim("b") as b:
        assert a.grow(2 * MIB)
        assert not a.grow(1)
        assert b.grow(2 * MIB - 1)
        assert not bodies.claim("c").grow(1)
    bodies.give("c", 1)
    assert bodies.bytes == 0
    assert bodies._peers == {}


async def test_a_body_is_for_alerts_only(forwarder: Start) -> None:
    """Refused unread, also where the sender waits to be asked for it."""
    running = await forwarder()
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
        raw = f"{method} /ping HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
        reader, writer = await connect(running, raw.encode())
        assert (await reader.readline()).split()[1] == b"405"
        await leave((reader, writer))


async def test_leaving_instead_of_going_on_is_no_fault_of_ours(
    forwarder: Start, log_lines: io.StringIO
) -> None:
    running = await forwarder()
    for _ in range(50):
        _, writer = await connect(
            running, b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
        )
        writer.transport.abort()
    await running.until(lambda: not running.app.receiver.server.connections)
    assert (await running.scrape()).total("http_requests_total", status="500") == 0
    assert "Traceback" not in log_lines.getvalue()


@pytest.mark.parametrize(
    "header", [b"x-a: " + b"a" * 5000, b"\r\n".join(b"x-%d: a" % number for number in range(70))]
)
async def test_headers_have_a_size(forwarder: Start, header: bytes) -> None:
    running = await forwarder()
    answer = await send_raw(running.port, b"POST / HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
    assert answer.status == 400
    await everyone_posts(running)


async def test_who_only_pings_makes_room_for_falco(forwarder: Start) -> None:
    """Of those that never posted, the one longest idle; Falco's own connection stays."""
    running = await forwarder({"receiver.connections_max": 5})
    async with running.falco() as falco:
        assert (await falco.post(REAL_BODIES[0])).status == 200
        pinging = [await connect(running, b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(4)]
        for reader, _ in pinging:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        for body in REAL_BODIES[1:6]:
            assert [answer.status for answer in await running.post(body)] == [200]
        assert (await falco.post(REAL_BODIES[6])).status == 200
        assert falco.connections == 1
    async with asyncio.timeout(3):
        assert b"pong" in await pinging[0][0].read()  # closed
    scrape = await running.scrape()
    assert scrape.total("connections_closed_total", limit="idle") >= 1
    assert scrape.total("connections_closed_total", limit="connections") == 0
    await leave(*pinging)


async def test_who_reads_no_answers_is_cut_off(
    forwarder: Start, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """Answers do not pile up, and a connection that was told to close and does not is torn down."""
    monkeypatch.setattr(receiver_answers, "UNREAD_BYTES_MAX", 4096)
    monkeypatch.setattr(receiver_connection, "CLOSING_SECS_MAX", 0.1)
    running = await forwarder()
    sender = socket.socket()
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sender.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sender, ("127.0.0.1", running.port))
    await running.until(lambda: running.app.receiver.server.connections)
    (connection,) = running.app.receiver.server.connections
    assert isinstance(connection, receiver_connection.Connection)
    connection._wire.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    more = request(REAL_BODIES[0]) * 20
    with sender:
        async with asyncio.timeout(15):
            while running.app.receiver.server.connections:
                with contextlib.suppress(OSError):  # full, or cut off
                    sender.send(more)
                await asyncio.sleep(0.01)
    assert (await running.scrape()).total("stored_events_total") == 1, "the same bytes again and again"
    await running.until(lambda: running.app.receiver._bodies.bytes == 0)
    await everyone_posts(running)


@pytest.mark.parametrize("end", ["GET", "chunked"])
async def test_no_rest_is_seen_where_none_is(forwarder: Start, impatient: None, end: str) -> None:
    """A request without a body, and one in chunks, leave a connection that may idle; half a header behind them does not."""
    running = await forwarder({"receiver.header_secs_max": 0.2})
    if end == "GET":
        whole = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
    else:
        body = REAL_BODIES[0]
        whole = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
        whole %= (len(body), body)
    quiet, pushy = await connect(running, whole), await connect(running, whole + b"POST / HTT")
    async with asyncio.timeout(5):
        await pushy[0].read()  # closed
    await asyncio.sleep(0.3)
    assert len(running.app.receiver.server.connections) == 1
    quiet[1].write(whole)
    assert (await quiet[0].readline()).startswith(b"HTTP/1.1 200")
    await leave(quiet, pushy)


async def test_a_refused_array_leaves_no_memory_behind(
    forwarder: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The elements of an array that is too long are gone before the disk is waited for."""
    running = await forwarder()
    body = b"[" + b"{}," * 300_000 + b"{}]"
    held: list[int] = []
    keep = running.app.ingest._keep_unparsed

    async def watched(*arguments: Any) -> Any:
        held.append(tracemalloc.get_traced_memory()[0])
        return await keep(*arguments)

    monkeypatch.setattr(running.app.ingest, "_keep_unparsed", watched)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        (answer,) = await running.post(body)
    finally:
        tracemalloc.stop()
    assert answer.status == 400
    assert f"more than {ALERTS_PER_BODY_MAX}".encode() in answer.body
    assert held[0] - before < 6 * len(body), "the elements take twenty times as much"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_both_families_are_listened_to(forwarder: Start, address: str) -> None:
    """By receiver and admin port; an IPv4 sender is known by its IPv4 address."""
    running = await forwarder({"receiver.host": "", "admin.host": ""})
    for port, path, said in ((running.port, "/ping", b"pong"), (running.app.admin.port, "/livez", b"ok")):
        reader, writer = await asyncio.open_connection(address, port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        if port == running.port:
            await running.until(lambda: running.app.receiver.server.connections)
            (connection,) = running.app.receiver.server.connections
            assert getattr(connection, "peer", "") == address
        assert said in await reader.read()
        await leave((reader, writer))


async def test_as_many_connections_as_there_are_files_for(
    forwarder: Start, monkeypatch: pytest.MonkeyPatch, log_lines: io.StringIO
) -> None:
    """The soft limit is raised as far as it may be; what it does not allow is not accepted."""
    asked: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: asked.append((what, limits)))
    running = await forwarder()
    assert asked == [(resource.RLIMIT_NOFILE, (1000, 1000))]
    assert running.app.receiver._connections_max == 1000 - receiver.DESCRIPTORS_KEPT
    assert "fewer connections than configured" in log_lines.getvalue()


def test_the_loops_own_reports_are_few(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    faults = LoopFaults(lambda: clock[0])
    loop = asyncio.new_event_loop()
    caplog.set_level(logging.ERROR)
    error = OSError(errno.EMFILE, "Too many open files")
    try:
        for second in range(25):
            clock[0] = float(second)
            for _ in range(1000):
                faults(loop, {"message": "socket.accept() out of system resource", "exception": error})
            faults(loop, {"message": "something else"})
        for number in range(1000):
            faults(loop, {"message": f"kind {number}"})
    finally:
        loop.close()
    texts = [record.getMessage() for record in caplog.records]
    accepted = [text for text in texts if text.startswith("socket.accept()")]
    assert len(accepted) == 3
    assert "9999 times since" in accepted[1]
    assert len([text for text in texts if text.startswith("something else")]) == 3
