"""How a sink is doing: its state, its counts, its last error; in ``/status``, in metrics, and in the log when it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import structlog

from forwarder.contract import DeliveryError
from forwarder.delivery_round import Tally
from forwarder.metrics import STATES, Metrics

TELL_SECS = 600.0

log = structlog.get_logger("delivery")


class Status(NamedTuple):
    """A sink's part of ``/status``."""

    state: str
    pending: int
    """Everything the sink still has to do, unparsable bodies included: 0 means done."""
    oldest_secs: float
    """Age of the oldest alert that waits."""
    aggregating: int
    """Alerts counted in findings that say so at their next update: nothing is wrong with them."""
    recovered: int
    delivered: int
    filtered: int
    dead_letters: int
    retries: int
    last_success: float | None
    last_error: str | None
    last_error_code: str | None
    """As in the metric ``send_failed`` and in the log: ``network``, ``credentials`` ..."""


class Progress:
    """One sink's numbers since the start of the process."""

    def __init__(self, sink: str, metrics: Metrics, now: Callable[[], float]) -> None:
        self._now = now
        self._sink = sink
        self._metrics = metrics
        self._state = "starting"
        self._recovered = self._delivered = self._filtered = self._dead = self._retries = 0
        self._is_recovered = False
        self._last_success: float | None = None
        self._last_error: str | None = None
        self._last_error_code: str | None = None
        self._told_at = 0.0

    def status(self, *, pending: int, oldest_secs: float, aggregating: int = 0) -> Status:
        return Status(
            state=self._state,
            pending=pending,
            oldest_secs=round(oldest_secs, 1),
            aggregating=aggregating,
            recovered=self._recovered,
            delivered=self._delivered,
            filtered=self._filtered,
            dead_letters=self._dead,
            retries=self._retries,
            last_success=self._last_success,
            last_error=self._last_error,
            last_error_code=self._last_error_code if self._last_error else None,
        )

    def enter(self, state: str) -> None:
        """Change the state; said once in the log where it is news."""
        if state == self._state:
            return
        if state == "delivering" and self._state in {"retrying", "blocked"}:
            log.info("sink delivers again", sink=self._sink)
            self._last_error = None
        self._state = state
        for name in STATES:
            self._metrics.state[self._sink, name].set(name == state)

    def block(self, error: DeliveryError) -> None:
        self._last_error, self._last_error_code = str(error), error.code
        if self._state != "blocked":
            log.error("sink is blocked, alerts wait in the spool", sink=self._sink, error=str(error))
        self.enter("blocked")

    def failed(self, error: DeliveryError) -> None:
        """A call failed. An error is logged when it differs from the last one, and again while it goes on."""
        self._metrics.failures[self._sink, error.code].inc()
        text, now = str(error), self._now()
        if text != self._last_error or now - self._told_at >= TELL_SECS:
            self._told_at = now
            self._last_error, self._last_error_code = text, error.code
            log.warning("call failed", sink=self._sink, code=error.code, error=text)

    def succeeded(self, at: float, records: int, *, clean: bool) -> None:
        self._last_success = at
        self._metrics.last_success[self._sink].set(at)
        self._metrics.batch_events[self._sink].observe(records)
        if clean:
            self.enter("delivering")
            self._last_error = None  # also of a call that failed beside others that did not

    def recover(self, records: int) -> None:
        """Alerts found waiting at start; a worker that starts again has found nothing new."""
        if self._is_recovered:
            return
        self._is_recovered = True
        self._recovered = records
        self._metrics.recovered[self._sink].set(records)

    def retried(self) -> None:
        self._retries += 1
        self._metrics.retries[self._sink].inc()

    def filter(self, reason: str, count: int) -> None:
        """Alerts the configuration keeps from this sink."""
        self._filtered += count
        self._metrics.filtered[self._sink, reason].inc(count)

    def bury(self, reason: str, count: int) -> None:
        self._dead += count
        self._metrics.dead_lettered[self._sink, reason].inc(count)

    def count(self, tally: Tally, at: float) -> None:
        """What a settled prefix adds."""
        metrics, sink = self._metrics, self._sink
        self._delivered += tally.delivered
        metrics.delivered[sink].inc(tally.delivered)
        for reason, number in tally.filtered.items():
            self.filter(reason, number)
        metrics.unparsed_forwarded[sink].inc(tally.forwarded)
        metrics.sent_bytes[sink].inc(tally.size_bytes)
        metrics.truncated[sink].inc(tally.truncated)
        metrics.adjusted[sink].inc(tally.adjusted)
        for reason, number in tally.dead.items():
            self.bury(reason, number)
        if tally.oldest_ns is not None:
            metrics.latency[sink].observe(max(0.0, at - tally.oldest_ns / 1e9))
