"""Packing of encoded records into batches that a service accepts in one call. Pure.

Invariants: every item is in exactly one batch; no batch passes a limit; within a batch, items ascend by
``order`` (timestamps, where the service wants them sorted), stable for equal ones; items of different
partitions (log streams) never share a batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

import msgspec


class Limits(NamedTuple):
    """What one call of a service may carry, with the service's own way of counting bytes."""

    records_max: int
    bytes_max: int
    span_max: int | None = None
    """Largest distance between the first and last ``order`` of a batch, or no limit."""


class Item(msgspec.Struct, frozen=True):
    """One record, encoded for one sink."""

    index: int
    """Position among the records it was read with."""
    data: bytes
    """Its part of the request body."""
    size_bytes: int
    """What it counts against ``Limits.bytes_max``, overhead included."""
    order: int = 0
    """What the service sorts by: milliseconds, where it sorts at all."""
    partition: str = ""
    """What a batch must have in common: the log stream."""
    key: str = ""
    """The service's own identity of the record, by which it names a refused one."""
    truncated: bool = False
    adjusted: bool = False


def pack(items: Iterable[Item], limits: Limits) -> list[list[Item]]:
    """Batches of ``items`` within ``limits``; an item larger than a batch gets one of its own."""
    partitions: dict[str, list[Item]] = {}
    for item in items:
        partitions.setdefault(item.partition, []).append(item)
    batches: list[list[Item]] = []
    for members in partitions.values():
        members.sort(key=attrgetter("order"))
        batches += _cut(members, limits)
    return batches


def _cut(members: list[Item], limits: Limits) -> list[list[Item]]:
    batches: list[list[Item]] = []
    current: list[Item] = []
    size = 0
    for item in members:
        full = (
            len(current) >= limits.records_max
            or size + item.size_bytes > limits.bytes_max
            or (limits.span_max is not None and item.order - current[0].order > limits.span_max)
            if current
            else False
        )
        if full:
            batches.append(current)
            current, size = [], 0
        current.append(item)
        size += item.size_bytes
    if current:
        batches.append(current)
    return batches
