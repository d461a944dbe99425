"""``falco-forwarder replay``: posts stored Falco alerts to a receiver, as Falco does, one per request.

For backfill and for trying a set-up. Sends in order on a few kept-alive connections; a 503 (no room) is
tried again after its Retry-After, everything else is final and counted.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import aiohttp

TRIES_MAX = 60
REQUEST_SECS_MAX = 30.0
RETRY_AFTER_SECS_MAX = 30.0
BAR_WIDTH = 30
HTTP_OK, HTTP_UNAVAILABLE = 200, 503


class Report(NamedTuple):
    """What became of the alerts."""

    sent: int
    acknowledged: int
    refused: Counter[str]


async def replay(
    bodies: Iterable[bytes],
    url: str,
    *,
    senders: int = 1,
    progress: Callable[[int, int], None] = lambda _done, _acknowledged: None,
) -> Report:
    """Post every body; returns when all are answered."""
    waiting = iter(bodies)
    refused: Counter[str] = Counter()
    sent = acknowledged = 0

    async def sender() -> None:
        nonlocal sent, acknowledged
        for body in waiting:
            answer = await _post(session, url, body)
            sent += 1
            if answer:
                refused[answer] += 1
            else:
                acknowledged += 1
            progress(sent, acknowledged)

    timeout = aiohttp.ClientTimeout(total=REQUEST_SECS_MAX)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
        for _ in range(senders):
            group.create_task(sender())
    return Report(sent, acknowledged, refused)


async def _post(session: aiohttp.ClientSession, url: str, body: bytes) -> str:
    """Why the alert was not taken, or nothing."""
    why = ""
    for _ in range(TRIES_MAX):
        try:
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
                if answer.status == HTTP_OK:
                    return ""
                why = f"{answer.status} {(await answer.text()).strip()[:200]}"
                if answer.status != HTTP_UNAVAILABLE:
                    return why
                await asyncio.sleep(_retry_after(answer.headers.get("Retry-After", "")))
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"{type(error).__name__}: {error}"[:200]
    return why


def _retry_after(text: str) -> float:
    try:
        return min(max(float(text), 0.1), RETRY_AFTER_SECS_MAX)
    except ValueError:
        return 1.0


class Bar:
    """A progress bar on stderr; silent where that is no terminal."""

    def __init__(self, total: int, label: str) -> None:
        self._total = total
        self._label = label
        self._shown = -1

    def __call__(self, done: int, acknowledged: int) -> None:
        share = done * BAR_WIDTH // max(1, self._total)
        if not sys.stderr.isatty() or (share == self._shown and done != self._total):
            return
        self._shown = share
        bar = "#" * share + "." * (BAR_WIDTH - share)
        end = "\n" if done >= self._total else ""
        print(  # noqa: T201 - for the person at the terminal
            f"\r{self._label} [{bar}] {done}/{self._total}, acknowledged {acknowledged}",
            end=end,
            file=sys.stderr,
            flush=True,
        )
