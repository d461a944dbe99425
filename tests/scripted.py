"""A sink that does as it is told, for the delivery worker's tests: the service's side is a list of scripted answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from forwarder.batch import Item, Limits
from forwarder.contract import Reject
from forwarder.pace import Pace
from forwarder.record import Record
from forwarder.spool import Spool

Answer = dict[int, Reject] | BaseException | None
Script = Callable[[list[str]], Answer]


class InlineJobs:
    """Runs the spool's writes on the spot instead of in its thread, so that simulated time stands still for them."""

    def put(self, job: Callable[[], None] | None) -> None:
        if job is not None:
            job()

    def get(self) -> None:
        """Ends the writer thread as soon as it starts."""


def inline(spool: Spool) -> Spool:
    """A spool whose disk takes no simulated time."""
    spool._writer._jobs = InlineJobs()  # type: ignore[assignment]
    return spool


LARGE = Limits(10_000, 1_000_000)


class ScriptedSink:
    """Accepts everything unless ``script`` says otherwise; remembers what it accepted and every call's size."""

    service, role = "logs", None

    def __init__(
        self,
        name: str = "cloudwatch_logs",
        *,
        limits: Limits = LARGE,
        script: Script = lambda _ids: None,
        findings_only: bool = False,
        concurrency_max: int = 1,
        linger_secs: float = 1.0,
        call_secs: float = 0.05,
    ) -> None:
        self.name = name
        self.limits = limits
        self.script = script
        self.findings_only = findings_only
        self.linger_secs = linger_secs
        self.minimum_rank = 7
        self.pace = Pace(concurrency_max=concurrency_max)
        self.call_secs = call_secs
        self.open_errors: list[BaseException] = []
        self.accepted: list[str] = []
        self.calls: list[tuple[float, int]] = []
        self.encoded = 0
        self.refuse_encoding: Callable[[Record], BaseException | None] = lambda _record: None
        self.most_at_once = 0

    async def open(self) -> None:
        if self.open_errors:
            raise self.open_errors.pop(0)

    def encode(self, record: Record, index: int) -> Item:
        error = self.refuse_encoding(record)
        if error is not None:
            raise error
        self.encoded += 1
        return Item(index=index, data=record.id.encode(), size_bytes=len(record.body) + 26)

    async def deliver(self, items: Sequence[Item]) -> dict[int, Reject]:
        ids = [item.data.decode() for item in items]
        self.calls.append((asyncio.get_running_loop().time(), len(items)))
        self.most_at_once = max(self.most_at_once, self.pace.in_flight)
        await asyncio.sleep(self.call_secs)
        answer = self.script(ids)
        if isinstance(answer, BaseException):
            raise answer
        rejects = answer or {}
        self.accepted += [identity for place, identity in enumerate(ids) if place not in rejects]
        return rejects
