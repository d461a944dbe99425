"""How fast a sink may call its service: calls at a time, and calls each second.

Both adapt: a throttle halves what is allowed, success wins it back step by step. Time is the event loop's,
so that an hour passes in a test without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

RATE_FLOOR = 0.05
"""The rate never falls below this share of what is configured."""
RATE_STEP = 0.02
"""Share of the configured rate that each success wins back."""


class Pace:
    """Concurrency limit (AIMD) and token bucket of one sink."""

    def __init__(self, *, concurrency_max: int, rate_per_sec: float = 0.0, burst: int = 1) -> None:
        self._concurrency_max = concurrency_max
        self._rate_max = rate_per_sec
        self._burst = burst
        self._tokens = float(burst)
        self._filled_at: float | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._next_token = asyncio.Lock()
        self.rate = rate_per_sec
        """Calls each second now allowed; 0 means unlimited."""
        self.limit = float(concurrency_max)
        """Calls at a time now allowed."""
        self.in_flight = 0

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a free call and a token; hold the call for the length of the block."""
        await self._take()
        try:
            if self._rate_max > 0:
                await self._token()
            yield
        finally:
            self._give_back()

    def succeeded(self) -> None:
        self.limit = min(self._concurrency_max, self.limit + 1 / self.limit)
        self.rate = min(self._rate_max, self.rate + self._rate_max * RATE_STEP)

    def throttled(self) -> None:
        self._refill()
        self.limit = max(1.0, self.limit / 2)
        self.rate = max(self._rate_max * RATE_FLOOR, self.rate / 2)
        self._tokens = min(self._tokens, 0.0)

    async def _take(self) -> None:
        """In the order of asking: nobody overtakes, nobody starves."""
        if not self._waiting and self.in_flight < max(1, int(self.limit)):
            self.in_flight += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back()  # the call was ours already
            raise

    def _give_back(self) -> None:
        self.in_flight -= 1
        while self._waiting and self.in_flight < max(1, int(self.limit)):
            turn = self._waiting.popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(None)

    async def _token(self) -> None:
        async with self._next_token:
            self._refill()
            if self._tokens < 1:
                await asyncio.sleep((1 - self._tokens) / self.rate)
                self._refill()
            self._tokens -= 1

    def _refill(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._filled_at is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self.rate)
        self._filled_at = now
