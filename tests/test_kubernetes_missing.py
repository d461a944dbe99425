"""Pods nobody has heard of, in simulated time: remembered, bounded, fetched slowly, and never a path of somebody's choosing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forwarder.kubernetes_api import ApiError
from forwarder.kubernetes_missing import (
    FETCHES_PER_SEC,
    FRESH_SECS,
    MISSING_MAX,
    MISSING_SECS,
    WAITING_MAX,
    Missing,
)

pytestmark = pytest.mark.looptime

PATH = re.compile(r"/api/v1/namespaces/[a-z0-9]([a-z0-9-]*[a-z0-9])?/pods/[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


class Asked:
    """An API that remembers what it was asked, and when; answers the path, or what ``answer`` raises."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.times: list[float] = []
        self.answer: Callable[[str], bytes] = str.encode
        self.secs = 0.0

    async def ask(self, path: str) -> bytes:
        self.paths.append(path)
        self.times.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.secs)
        return self.answer(path)


class Bench:
    """``Missing``, an API, and what was found."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.api = Asked()
        self.found: list[bytes] = []
        self.take: Callable[[bytes], None] = self.found.append
        self.missing = Missing(self.api, self.handed, lambda: self.now)  # type: ignore[arg-type]

    def handed(self, data: bytes) -> None:
        self.take(data)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@contextlib.asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(bench.missing.run())
    yield task
    alive = not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert alive, "the fetcher ended"


def path(name: str) -> str:
    return f"/api/v1/namespaces/shop/pods/{name}"


# ---- the negative cache -----------------------------------------------------------------------------


def test_a_miss_is_fresh_for_a_moment_and_asked_for_once(bench: Bench) -> None:
    """True means that the watch may still bring it: delivery looks once more."""
    told = []
    for _ in range(31):
        told.append(bench.missing.remember("shop", "web-0"))
        bench.now += 1
    assert (FRESH_SECS, MISSING_SECS) == (5, 30)
    assert told == [True] * 5 + [False] * 25 + [True]
    assert len(bench.missing) == 1
    assert bench.missing._queue.qsize() == 2


def test_pods_of_one_name_are_not_confused(bench: Bench) -> None:
    for namespace, name in (("a", "b"), ("b", "a"), ("", "a"), ("", "b"), ("a", "b")):
        assert bench.missing.remember(namespace, name)
    assert len(bench.missing) == 4
    assert bench.missing._queue.qsize() == 2


def test_what_is_old_is_forgotten_and_nothing_else(bench: Bench) -> None:
    bench.missing.remember("shop", "a")
    bench.now += 10
    bench.missing.remember("shop", "b")
    bench.now += 10
    bench.missing.remember("shop", "a")  # does not make it younger
    bench.now += 9.9
    bench.missing.expire()
    assert len(bench.missing) == 2
    bench.now += 0.1
    bench.missing.expire()
    assert len(bench.missing) == 1
    bench.missing.remember("shop", "a")  # again: it is the youngest now
    bench.now += 20
    bench.missing.expire()
    assert len(bench.missing) == 1
    bench.now += 10
    bench.missing.expire()
    assert len(bench.missing) == 0


def test_memory_is_bounded_and_the_oldest_go_first(bench: Bench) -> None:
    assert MISSING_MAX == 10_000
    bench.missing.remember("", "first")
    bench.now += FRESH_SECS
    assert not bench.missing.remember("", "first")
    for number in range(MISSING_MAX - 1):
        bench.missing.remember("", f"container-{number}")
    assert not bench.missing.remember("", "first")
    for number in range(3 * MISSING_MAX):
        bench.missing.remember("", f"other-{number}")
    assert len(bench.missing) == MISSING_MAX
    assert bench.missing.remember("", "first")  # nobody remembers


def test_the_queue_is_bounded(bench: Bench) -> None:
    for number in range(WAITING_MAX + 50):
        assert bench.missing.remember("shop", f"web-{number}")
    assert WAITING_MAX == 100
    assert (bench.missing._queue.qsize(), bench.missing.dropped) == (WAITING_MAX, 50)


# ---- names that are none ----------------------------------------------------------------------------

HOSTILE = [
    "../../../../api/v1/secrets", "a/../../secrets/b", "..", ".", "a/b", "/", "a?watch=1", "a#b", "a%2fb", "%2e%2e",
    "a\\b", "a b", "a\n", "\na", "a\r\nX: y", "a\x00", "A", "Web-0", "-a", "a-", ".a", "a.", "", "a_b", "a:b", "a;b",
    "\u00e4", "\uff41", "\u0661", "a\u2028", "a" * 254, "<NA>", "a@b", "a&b", "{a}", "a,b",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
async def test_what_is_no_name_never_reaches_the_api(bench: Bench, name: str) -> None:
    async with running(bench):
        bench.missing.remember("shop", name)
        bench.missing.remember(name, "web-0")
        bench.missing.remember(name, name)
        await asyncio.sleep(10)
    assert bench.api.paths == []
    assert len(bench.missing) >= 2  # and yet it is remembered


@pytest.mark.parametrize(
    ("namespace", "name"),
    [("a" * 64, "web-0"), ("a.b", "web-0"), ("", "web-0"), ("shop", "a" * 254), ("shop.", "a")],
)
async def test_a_namespace_is_one_label(bench: Bench, namespace: str, name: str) -> None:
    async with running(bench):
        bench.missing.remember(namespace, name)
        await asyncio.sleep(1)
    assert bench.api.paths == []


async def test_longest_names_are_names(bench: Bench) -> None:
    async with running(bench):
        bench.missing.remember("n" * 63, "p" * 253)
        bench.missing.remember("0", "a.b-c.0")
        await asyncio.sleep(1)
    assert bench.api.paths == [
        f"/api/v1/namespaces/{'n' * 63}/pods/{'p' * 253}",
        "/api/v1/namespaces/0/pods/a.b-c.0",
    ]


@given(st.text(max_size=10) | st.text("ab0-./%A\n", max_size=10), st.text("ab0-./%A\n", max_size=10))
@example("a", "a..b")
@settings(max_examples=300, deadline=None)
def test_whatever_is_asked_for_is_a_pod_of_a_namespace(namespace: str, name: str) -> None:
    bench = Bench()
    bench.missing.remember(namespace, name)
    while not bench.missing._queue.empty():
        assert PATH.fullmatch("/api/v1/namespaces/{}/pods/{}".format(*bench.missing._queue.get_nowait()))


# ---- fetching ---------------------------------------------------------------------------------------


async def test_fetched_in_the_order_of_the_misses_and_handed_on(bench: Bench) -> None:
    async with running(bench):
        for number in range(5):
            bench.missing.remember("shop", f"web-{number}")
            bench.missing.remember("shop", f"web-{number}")
        await asyncio.sleep(10)
    assert bench.api.paths == [path(f"web-{number}") for number in range(5)]
    assert bench.found == [item.encode() for item in bench.api.paths]
    assert bench.missing.fetched == 5


@pytest.mark.parametrize("outcome", ["found", "not found", "fails"])
async def test_at_most_ten_fetches_a_second(bench: Bench, outcome: str) -> None:
    assert FETCHES_PER_SEC == 10

    def answer(_: str) -> bytes:
        if outcome == "found":
            return b"{}"
        raise ApiError("refused" if outcome == "not found" else "unavailable", "no", status=404)

    bench.api.answer = answer
    async with running(bench):
        for number in range(WAITING_MAX):
            bench.missing.remember("shop", f"web-{number}")
        await asyncio.sleep(5)
        assert 45 <= len(bench.api.times) <= 51
        await asyncio.sleep(10)
    times = bench.api.times
    assert len(times) == WAITING_MAX
    assert min(later - earlier for earlier, later in itertools.pairwise(times)) > 0.0999
    assert all(late - early > 0.999 for early, late in zip(times, times[10:], strict=False))


async def test_one_at_a_time_however_slow_the_api_is(bench: Bench) -> None:
    bench.api.secs = 3.0
    async with running(bench):
        for number in range(3):
            bench.missing.remember("shop", f"web-{number}")
        await asyncio.sleep(20)
    steps = [round(time - bench.api.times[0], 6) for time in bench.api.times]
    assert steps == [0, 3.1, 6.2]


@pytest.mark.parametrize(
    "error",
    [
        ApiError("refused", "not found", status=404),
        ApiError("permission", "forbidden", status=403),
        ApiError("network", "gone"),
        msgspec.ValidationError("odd"),
        RuntimeError("a fault of ours"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        RecursionError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["api", "cache"])
async def test_no_failure_ends_the_fetching(bench: Bench, error: Exception, where: str) -> None:
    def fail(_: object) -> Any:
        raise error

    if where == "api":
        bench.api.answer = fail
    else:
        bench.take = fail
    async with running(bench):
        bench.missing.remember("shop", "bad")
        await asyncio.sleep(1)
        bench.api.answer, bench.take = str.encode, bench.found.append
        bench.missing.remember("shop", "good")
        await asyncio.sleep(1)
    assert bench.api.paths == [path("bad"), path("good")]
    assert bench.found == [path("good").encode()]
    assert bench.missing.fetched == 1


async def test_what_is_not_there_is_asked_for_again_after_half_a_minute(bench: Bench) -> None:
    def nobody(_: str) -> bytes:
        raise ApiError("refused", "not found", status=404)

    bench.api.answer = nobody
    started = asyncio.get_running_loop().time()
    async with running(bench):
        for _ in range(620):
            bench.now = 1000.0 + asyncio.get_running_loop().time() - started
            bench.missing.remember("shop", "web-0")
            bench.missing.expire()
            await asyncio.sleep(0.1)
    assert bench.api.paths == [path("web-0")] * 3


async def test_cancelled_in_the_middle_of_a_fetch(bench: Bench) -> None:
    bench.api.secs = 100.0
    task = asyncio.create_task(bench.missing.run())
    bench.missing.remember("shop", "web-0")
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.found == []
