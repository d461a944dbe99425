"""Waiting for enough to do: a full batch, or something and the linger time is over, or the drain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from forwarder.spool import Spool


async def batch_waits(
    spool: Spool, offset: int, *, wanted: int, linger_secs: float, draining: asyncio.Event
) -> None:
    """Return when ``wanted`` records from ``offset`` on are stored, or one and the linger time is over, or on drain."""
    drain = asyncio.ensure_future(draining.wait())
    try:
        await first_of(spool.arrived(offset), drain, None)
        if spool.end - offset < wanted:
            await first_of(spool.arrived(offset + wanted - 1), drain, linger_secs)
    finally:
        drain.cancel()


async def first_of(awaited: Awaitable[object], other: asyncio.Future[Any], secs: float | None) -> None:
    """Until one of the two is there, or the time is over; the first is given up then."""
    task = asyncio.ensure_future(awaited)
    try:
        await asyncio.wait((task, other), timeout=secs, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
