"""Asking the other replicas over real sockets: good ones, slow ones, and ones that answer anything but what was asked."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from forwarder import sensors_peers
from forwarder.admin import Admin, AdminSettings
from forwarder.metrics import Metrics
from forwarder.sensors_peers import ANSWER_BYTES_MAX, Peers
from forwarder.sensors_watch import Answers

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Inside:
    """What the admin port needs, as far as it is asked here."""

    def __init__(self, nodes: dict[str, float]) -> None:
        self.nodes = nodes
        self.metrics = Metrics([])

    def alive(self) -> str:
        return ""

    def ready(self) -> str:
        return ""

    def status(self) -> dict[str, Any]:
        return {}

    def sensors_heard(self) -> dict[str, Any]:
        return {"nodes": self.nodes}

    def publish(self) -> None:
        pass

    async def dead_letters(self, before: int, limit: int) -> list[Any]:
        return []


class Others:
    """Starts peers, stops them in the end."""

    def __init__(self) -> None:
        self._stops: list[Callable[[], Awaitable[None]]] = []

    async def forwarder(self, nodes: dict[str, float]) -> str:
        admin = Admin(AdminSettings(host="127.0.0.1", port=0), Inside(nodes))
        await admin.start()
        self._stops.append(admin.stop)
        return f"127.0.0.1:{admin.port}"

    async def answering(self, answer: Answer) -> str:
        application = web.Application()
        application.router.add_get("/sensors", answer)
        runner = web.AppRunner(application, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._stops.append(runner.cleanup)
        return f"127.0.0.1:{runner.addresses[0][1]}"

    async def stop(self) -> None:
        for stop in self._stops:
            await stop()


@pytest.fixture
async def others() -> AsyncIterator[Others]:
    made = Others()
    yield made
    await made.stop()


async def test_the_latest_time_of_all_that_answer(others: Others) -> None:
    one = await others.forwarder({"a": 10.5, "b": 20.0})
    two = await others.forwarder({"b": 30.25, "c": 1.0})
    assert await Peers([one, two, one]).ask() == Answers({"a": 10.5, "b": 30.25, "c": 1.0})


async def test_nobody_to_ask() -> None:
    assert await Peers([]).ask() == Answers({})


async def bytes_of(body: bytes, **headers: str) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, headers=headers)

    return answer


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"nodes": 5}',
        b'{"nodes": {"a": "x"}}',
        b'{"nodes": {"a": NaN}}',
        b'{"nodes": {"a": 1}',
        b"\xff\xfe",
        b"<html>",
        b"[" * 100_000,
        json.dumps({"nodes": {str(number): 1 for number in range(20_001)}}).encode(),
    ],
    ids=lambda body: repr(body[:24]),
)
async def test_garbage_is_no_answer(others: Others, body: bytes) -> None:
    good, bad = await others.forwarder({"a": 10.0}), await others.answering(await bytes_of(body))
    heard, trouble = await Peers([good, bad]).ask()
    assert heard == {"a": 10.0}
    assert trouble.startswith(f"http://{bad}/sensors: ")


async def test_ten_megabytes_are_no_answer(others: Others) -> None:
    sent = 0

    async def long(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while sent < 10 << 20:
            await response.write(b" " * 65_536)
            sent += 65_536
        return response

    peer = await others.answering(long)
    heard, trouble = await Peers([peer]).ask()
    assert (heard, f"more than {ANSWER_BYTES_MAX}" in trouble) == ({}, True)


async def test_compressed_answers_are_not_unpacked(others: Others) -> None:
    peer = await others.answering(
        await bytes_of(b"\x1f\x8b\x08\x00" + b"x" * 100, **{"Content-Encoding": "gzip"})
    )
    heard, trouble = await Peers([peer]).ask()
    assert (heard, "not the answer of a forwarder" in trouble) == ({}, True)


async def test_statuses_and_redirects_are_no_answers(others: Others) -> None:
    good = await others.forwarder({"a": 1.0})

    async def elsewhere(_: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(f"http://{good}/sensors")

    async def broken(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    for answer, status in ((elsewhere, 302), (broken, 503)):
        peer = await others.answering(answer)
        assert await Peers([peer]).ask() == Answers({}, f"http://{peer}/sensors: HTTP {status}")


@pytest.mark.parametrize("header", [True, False])
async def test_a_slow_peer_costs_no_more_than_its_time(
    others: Others, monkeypatch: pytest.MonkeyPatch, header: bool
) -> None:
    monkeypatch.setattr(sensors_peers, "ANSWER_SECS_MAX", 0.3)

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if header:
            await response.prepare(request)
            await response.write(b'{"nodes": {')
        await asyncio.sleep(1)
        return response

    good, peer = await others.forwarder({"a": 10.0}), await others.answering(slow)
    started = time.monotonic()
    heard, trouble = await Peers([good, peer]).ask()
    assert time.monotonic() - started < 3
    assert heard == {"a": 10.0}
    assert trouble.startswith(f"http://{peer}/sensors: ")


async def test_a_closed_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        peer = f"127.0.0.1:{taken.getsockname()[1]}"
        heard, trouble = await Peers([peer]).ask()
    assert (heard, trouble.startswith(f"http://{peer}/sensors: ")) == ({}, True)


def resolving(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    async def getaddrinfo(host: str, port: int, **_: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


async def test_a_name_is_asked_at_all_its_addresses(others: Others, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def noted(_: aiohttp.ClientSession, url: str) -> dict[str, float]:
        asked.append(url)
        return {url: 1.0}

    monkeypatch.setattr(sensors_peers, "_one", noted)
    resolving(monkeypatch, ["10.0.0.1", "10.0.0.2", "fd00::1", "10.0.0.1"])
    assert (await Peers(["forwarder-headless:8080"]).ask()).trouble == ""
    assert sorted(asked) == [
        "http://10.0.0.1:8080/sensors",
        "http://10.0.0.2:8080/sensors",
        "http://[fd00::1]:8080/sensors",
    ]


async def test_no_more_than_32_addresses_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was not asked is missing."""
    asked: list[str] = []

    async def noted(_: aiohttp.ClientSession, url: str) -> dict[str, float]:
        asked.append(url)
        return {}

    monkeypatch.setattr(sensors_peers, "_one", noted)
    resolving(monkeypatch, [f"10.0.1.{number}" for number in range(40)])
    answers = await Peers(["f:1"]).ask()
    assert (len(asked), answers.trouble) == (32, "40 addresses, and no more than 32 are asked")


async def test_a_name_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, socket.gaierror(-2, "Name or service not known"))
    assert await Peers(["nowhere:1"]).ask() == Answers({}, "nowhere: Name or service not known")
    resolving(monkeypatch, UnicodeError("label too long"))
    assert (await Peers(["x:1"]).ask()).trouble == "x: its name was not resolved"


async def test_addresses_of_version_6() -> None:
    assert Peers(["[::1]:80"])._peers == [("::1", 80)]
