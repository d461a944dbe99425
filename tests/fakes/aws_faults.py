"""Planned misbehaviour of the fake AWS: unwell services, lost answers and single failed findings."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(eq=False)
class Fault:
    """A planned misbehaviour; it wears off after `times` hits, or with `clear()`."""

    kind: Literal["fail", "hang", "reset", "reset-after", "truncate", "findings"]
    operation: str
    times: int | None = 1
    status: int = 500
    code: str = "InternalFailure"
    message: str = "injected"
    secs: float = 0.0
    when: Callable[[dict[str, Any]], bool] | None = None
    hits: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def clear(self) -> None:
        """End the fault; a request that hangs on it is served now."""
        self.times = self.hits
        self.released.set()

    def matches(self, operation: str, body: dict[str, Any]) -> bool:
        return (
            (self.times is None or self.hits < self.times)
            and self.operation in ("*", operation)
            and (self.when is None or self.when(body))
        )


def take_fault(faults: Iterable[Fault], operation: str, body: dict[str, Any]) -> Fault | None:
    """The first planned fault that applies; it counts as hit."""
    for fault in faults:
        if fault.matches(operation, body):
            fault.hits += 1
            return fault
    return None


class FaultPlan:
    """What a test may plan; the first matching fault of a request is played."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def fail(
        self,
        operation: str,
        *,
        times: int | None = 1,
        status: int = 500,
        code: str = "InternalFailure",
        message: str = "injected",
        when: Callable[[dict[str, Any]], bool] | None = None,
    ) -> Fault:
        """Answer with an error, without effect; `when` looks at the parsed request."""
        fault = Fault("fail", operation, times, status=status, code=code, message=message, when=when)
        return self._plan(fault)

    def hang(self, operation: str, *, times: int | None = 1, secs: float = 60.0) -> Fault:
        """Wait before serving. A request whose client went away meanwhile has no effect."""
        return self._plan(Fault("hang", operation, times, secs=secs))

    def reset(self, operation: str, *, times: int | None = 1, after_processing: bool = False) -> Fault:
        """Close the connection without an answer, before or after the request took effect."""
        return self._plan(Fault("reset-after" if after_processing else "reset", operation, times))

    def truncate(self, operation: str, *, times: int | None = 1) -> Fault:
        """Take effect, but send only the first half of the answer's body."""
        return self._plan(Fault("truncate", operation, times))

    def fail_findings(
        self,
        when: Callable[[dict[str, Any]], bool],
        *,
        code: str,
        message: str = "injected",
        times: int | None = None,
    ) -> Fault:
        """Report these findings in FailedFindings with HTTP 200; `times` counts findings."""
        fault = Fault("findings", "BatchImportFindings", times, code=code, message=message, when=when)
        return self._plan(fault)

    def _plan(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def _next_fault(self, operation: str, body: dict[str, Any]) -> Fault | None:
        return take_fault((fault for fault in self._faults if fault.kind != "findings"), operation, body)

    def _injected_finding_failure(self, finding: dict[str, Any]) -> tuple[str, str] | None:
        planned = [fault for fault in self._faults if fault.kind == "findings"]
        fault = take_fault(planned, "BatchImportFindings", finding)
        return (fault.code, fault.message) if fault else None
