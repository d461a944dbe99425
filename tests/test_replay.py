"""Replaying stored alerts: one per request and as they are, 503 again and everything else counted."""

from __future__ import annotations

import asyncio
import io
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from forwarder import replay as module
from forwarder.replay import Bar, replay

BODIES = [b'{"rule":"%d"}' % number for number in range(10)]


class Receiver:
    """Notes what comes and answers as told."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.requests: list[web.BaseRequest] = []
        self.connections: set[object] = set()
        self.answer: Callable[[bytes], Awaitable[web.StreamResponse]] = self.fine
        self.url = ""

    async def fine(self, body: bytes) -> web.StreamResponse:
        return web.Response()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.bodies.append(body)
        self.requests.append(request)
        self.connections.add(request.transport)
        return await self.answer(body)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    runner = web.ServerRunner(web.Server(found.handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    yield found
    await runner.cleanup()


async def test_every_body_is_posted_in_order_on_one_connection(receiver: Receiver) -> None:
    bodies = [*BODIES, b"not json", "\u00e4".encode(), b"\xff"]
    report = await replay(bodies, receiver.url)
    assert report == (13, 13, Counter())
    assert receiver.bodies == bodies
    assert len(receiver.connections) == 1
    assert {request.method for request in receiver.requests} == {"POST"}
    assert {request.headers["Content-Type"] for request in receiver.requests} == {"application/json"}


async def test_nothing_to_replay(receiver: Receiver) -> None:
    assert await replay([], receiver.url) == (0, 0, Counter())


async def test_several_senders_share_the_work(receiver: Receiver) -> None:
    """Four wait for each other: they are really under way at a time."""
    barrier = asyncio.Barrier(4)

    async def together(_: bytes) -> web.StreamResponse:
        async with asyncio.timeout(5):
            await barrier.wait()
        return web.Response()

    receiver.answer = together
    bodies = BODIES[:8]
    assert (await replay(bodies, receiver.url, senders=4)).acknowledged == 8
    assert sorted(receiver.bodies) == sorted(bodies)
    assert len(receiver.connections) == 4


async def test_progress_is_told(receiver: Receiver) -> None:
    seen: list[tuple[int, int]] = []
    await replay(
        BODIES[:3], receiver.url, progress=lambda sent, acknowledged: seen.append((sent, acknowledged))
    )
    assert seen == [(1, 1), (2, 2), (3, 3)]


async def test_refusals_are_final_and_counted(receiver: Receiver) -> None:
    async def refuse_odd(body: bytes) -> web.StreamResponse:
        return web.Response(status=400, text='{"error":"no"}\n') if body in BODIES[1::2] else web.Response()

    receiver.answer = refuse_odd
    report = await replay(BODIES, receiver.url)
    assert report == (10, 5, Counter({'400 {"error":"no"}': 5}))
    assert len(receiver.bodies) == 10


async def test_a_full_receiver_is_asked_again(receiver: Receiver) -> None:
    left = [503, 503, 200]

    async def full_at_first(_: bytes) -> web.StreamResponse:
        return web.Response(status=left.pop(0), headers={"Retry-After": "0"})

    receiver.answer = full_at_first
    assert await replay(BODIES[:1], receiver.url) == (1, 1, Counter())
    assert receiver.bodies == BODIES[:1] * 3


async def test_a_receiver_that_stays_full_is_given_up(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_: bytes) -> web.StreamResponse:
        return web.Response(status=503, text="full", headers={"Retry-After": "0"})

    receiver.answer = full
    monkeypatch.setattr(module, "TRIES_MAX", 2)
    assert await replay(BODIES[:1], receiver.url) == (1, 0, Counter({"503 full": 1}))
    assert len(receiver.bodies) == 2


async def test_no_receiver_there(receiver: Receiver) -> None:
    report = await replay(BODIES[:2], "http://127.0.0.1:1/")
    assert (report.sent, report.acknowledged) == (2, 0)
    assert all("Connect" in why for why in report.refused)
    assert (await replay(BODIES[:1], "no url")).refused


async def test_a_receiver_that_hangs_up_or_never_answers(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang_up(_: bytes) -> web.StreamResponse:
        transport = receiver.requests[-1].transport
        assert transport is not None
        transport.abort()
        return web.Response()

    receiver.answer = hang_up
    assert (await replay(BODIES[:1], receiver.url)).acknowledged == 0
    released = asyncio.Event()

    async def never(_: bytes) -> web.StreamResponse:
        await released.wait()
        return web.Response()

    receiver.answer = never
    monkeypatch.setattr(module, "REQUEST_SECS_MAX", 0.05)
    report = await replay(BODIES[:1], receiver.url)
    released.set()
    assert [why.split(":")[0] for why in report.refused] == ["TimeoutError"] or "Timeout" in str(
        report.refused
    )


@pytest.mark.parametrize(
    ("text", "secs"),
    [
        ("5", 5.0),
        ("0", 0.1),
        ("-1", 0.1),
        ("3600", 30.0),
        ("inf", 30.0),
        ("", 1.0),
        ("soon", 1.0),
        ("Fri, 20 Nov 2026 09:00:00 GMT", 1.0),
    ],
)
def test_how_long_to_wait(text: str, secs: float) -> None:
    assert module._retry_after(text) == secs


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_the_bar_is_drawn_when_it_changes_and_ends_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = Bar(300, "replay")
    for done in range(1, 301):
        bar(done, done - 1)
    text = terminal.getvalue()
    assert text.count("\r") == 31
    assert text.endswith("replay [##############################] 300/300, acknowledged 299\n")
    Bar(0, "nothing")(0, 0)
    assert terminal.getvalue().endswith("0/0, acknowledged 0\n")


def test_the_bar_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    Bar(1, "replay")(1, 1)
    assert capsys.readouterr().err == ""
