"""What waits for the spool's next commit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from forwarder.record import DeadLetter, Record
from forwarder.spool_values import IssueChanges

COMMIT_RECORDS_MAX = 1024


class Waiting(NamedTuple):
    """Records that somebody wants to be durable."""

    records: Sequence[Record]
    dead: Sequence[DeadLetter]
    size_bytes: int
    done: asyncio.Future[None]


class Settling(NamedTuple):
    """What a sink has done, to be written down."""

    sink: str
    offset: int | None
    dead: Sequence[DeadLetter]
    unparsed: int
    issues: IssueChanges | None
    done: asyncio.Future[None]


def take(waiting: list[Waiting], bytes_max: int) -> tuple[list[Waiting], list[Waiting]]:
    """What goes into one commit, at least one of them, and the rest."""
    count = size = 0
    for index, item in enumerate(waiting):
        if index and (count >= COMMIT_RECORDS_MAX or size >= bytes_max):
            return waiting[:index], waiting[index:]
        count += len(item.records)
        size += item.size_bytes
    return waiting, []
