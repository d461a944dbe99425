"""Who is told next: queues by severity for what is due, a heap for what is due later. Pure.

The most severe goes first. A quarter of what is taken at a time is kept for those that have waited half of ``aging_secs``: in turns the
oldest of each level, from the lowest up. Nothing starves, even where the more severe alone are more than fits, and nothing severe waits
behind what is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator
from heapq import heappop, heappush
from typing import NamedTuple

AGED_SHARE = 4


class Waiting(NamedTuple):
    """One key, and since when it has been due, monotonic seconds."""

    key: bytes
    since: float


class Clock(NamedTuple):
    """Wall clock for what is told, a monotonic one for waiting."""

    now_ms: Callable[[], int]
    monotonic: Callable[[], float]


class Due:
    """Keys that are due, by level, and keys that will be. A key is in one of the two, or in neither."""

    def __init__(self, levels: int, *, aging_secs: float, monotonic: Callable[[], float]) -> None:
        self._queues: tuple[deque[Waiting], ...] = tuple(deque() for _ in range(levels))
        self._aging_secs = aging_secs
        self._monotonic = monotonic
        self._levels: dict[bytes, int] = {}
        self._heap: list[tuple[float, bytes]] = []
        self._later: dict[bytes, float] = {}
        self._taken: dict[bytes, float] = {}
        """Since when those have been due that were taken: what hangs in a call, or was put off after one, waits no less."""

    def __len__(self) -> int:
        """How many are due."""
        return len(self._levels)

    def level(self, key: bytes) -> int | None:
        """The level a key is due with; None: it is not due."""
        return self._levels.get(key)

    def is_later(self, key: bytes) -> bool:
        return key in self._later

    def push(self, key: bytes, level: int) -> None:
        """Due now; a key that was due at another level moves."""
        self._later.pop(key, None)
        self._levels[key] = level
        self._queues[level].append(Waiting(key, self._monotonic()))

    def put_back(self, waiting: Waiting, level: int) -> None:
        """Back to its place in its queue, by the time it has waited."""
        self._levels[waiting.key] = level
        queue = self._queues[level]
        before: list[Waiting] = []
        while queue and queue[0].since <= waiting.since:
            before.append(queue.popleft())
        queue.appendleft(waiting)
        queue.extendleft(reversed(before))

    def later(self, key: bytes, delay_secs: float) -> None:
        """Due after a while."""
        at = self._monotonic() + delay_secs
        self._later[key] = at
        heappush(self._heap, (at, key))

    def hurry(self, but_for: Container[bytes]) -> list[bytes]:
        """Keys that wait for their time, except those; each must be pushed."""
        keys = [key for key in self._later if key not in but_for]
        for key in keys:
            del self._later[key]
        return keys

    def ripe(self) -> Iterator[bytes]:
        """Keys whose time has come; each must be pushed."""
        now = self._monotonic()
        while self._heap and self._heap[0][0] <= now:
            at, key = heappop(self._heap)
            if self._later.get(key) == at:
                del self._later[key]
                yield key

    def next_at(self) -> float | None:
        """When the next key is due, monotonic; None: not before something happens."""
        if self._levels:
            return self._monotonic()
        return self._heap[0][0] if self._heap else None

    def oldest_secs(self) -> float:
        """How long the key has been due that waits longest, taken or not."""
        waits = [head.since for level in range(len(self._queues)) if (head := self._head(level))]
        waits.extend(self._taken.values())
        return max(0.0, self._monotonic() - min(waits)) if waits else 0.0

    def take(self, count_max: int) -> list[Waiting]:
        """Up to so many, in the order in which they shall go."""
        chosen = self._aged(count_max // AGED_SHARE)
        for level in reversed(range(len(self._queues))):
            while len(chosen) < count_max and self._head(level) is not None:
                chosen.append(self._pop(level))
        for key, since in chosen:
            self._taken[key] = min(since, self._taken.get(key, since))
        return chosen

    def settled(self, key: bytes) -> None:
        """What was taken is done."""
        self._taken.pop(key, None)

    def _aged(self, count_max: int) -> list[Waiting]:
        """Those that have waited too long."""
        limit = self._monotonic() - self._aging_secs / 2
        chosen: list[Waiting] = []
        found = True
        while found:
            found = False
            for level in range(len(self._queues)):
                head = self._head(level)
                if head is not None and head.since <= limit and len(chosen) < count_max:
                    chosen.append(self._pop(level))
                    found = True
        return chosen

    def _pop(self, level: int) -> Waiting:
        waiting = self._queues[level].popleft()
        del self._levels[waiting.key]
        return waiting

    def _head(self, level: int) -> Waiting | None:
        """First of a queue that still belongs there: a key that moved leaves its old place behind."""
        queue = self._queues[level]
        while queue:
            if self._levels.get(queue[0].key) == level:
                return queue[0]
            queue.popleft()
        return None
