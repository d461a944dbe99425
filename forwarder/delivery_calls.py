"""Calls of one sink: the attempt, what its failure means, and how long to wait after it.

The taxonomy is that of ``contract``; what each failure asks for is told in ``delivery``. A patient caller has its batch tried again here until
it is settled; an impatient one (findings, where something more severe may have come meanwhile) gets the failure and chooses anew.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Annotated

import msgspec
import structlog

from forwarder.batch import Item
from forwarder.config import setting
from forwarder.contract import (
    Again,
    Blocked,
    DeliveryError,
    Permanent,
    Permission,
    Reject,
    Service,
    TooLarge,
    Transient,
)
from forwarder.delivery_round import DELIVERED, Round
from forwarder.delivery_status import Progress
from forwarder.metrics import Metrics

BACKOFF_BASE_SECS, BACKOFF_MAX_SECS = 0.5, 30.0
PROBE_SECS = 60.0
REFUSALS_IN_A_ROW_MAX = 20
"""So many call-level dead letters without one success look like a fault of ours: pause between them."""
SUSPECTS_MAX = 8
"""So many records of one round without permission: it is not the records."""

log = structlog.get_logger("delivery")


class DeliverySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings every sink shares."""

    call_secs_max: Annotated[float, setting("Longest wait for one call.", unit="seconds", gt=0, le=300)] = (
        30.0
    )
    drain_secs_max: Annotated[
        float,
        setting(
            "After SIGTERM, longest time to deliver what waits. The rest stays in the spool.",
            unit="seconds",
            ge=0,
            le=3600,
        ),
    ] = 25.0


class Stop(Exception):  # noqa: N818
    """Draining: no new waits."""


class Courier:
    """Makes the calls of one sink."""

    def __init__(
        self,
        sink: Service,
        *,
        settings: DeliverySettings,
        metrics: Metrics,
        now: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.sink = sink
        self.progress = Progress(sink.name, metrics, now)
        self.draining = asyncio.Event()
        """Set: give up at the first failure, wait for nothing."""
        self._settings = settings
        self._metrics = metrics
        self._now = now
        self._rng = rng
        self._refusals_in_a_row = 0
        self._successes = 0

    async def open(self) -> None:
        """Open the sink, however long that takes. Raises ``Stop`` on drain."""
        delay = BACKOFF_BASE_SECS
        while True:
            try:
                async with asyncio.timeout(self._settings.call_secs_max):
                    await self.sink.open()
            except TimeoutError:
                late = self._failed(Transient("no answer in time", code="timeout"))
                delay = await self.back_off(late, delay)
            except (Blocked, Permission, Permanent) as refusal:
                await self.pause(self._failed(refusal))
            except DeliveryError as trouble:
                delay = await self.back_off(self._failed(trouble), delay)
            else:
                self.progress.enter("delivering")
                return

    async def deliver(
        self,
        current: Round,
        batch: list[Item],
        encode: Callable[[Round, int], Item | None] | None,
    ) -> None:
        """Settle every record of a batch; raises ``Blocked`` where only a person can help.

        Without ``encode`` it is impatient: a failure that passes is raised, records to be tried again are left without an outcome.
        """
        delay = BACKOFF_BASE_SECS
        while batch:
            try:
                rejects = await self.call(batch)
            except (TooLarge, Permanent, Permission) as error:
                await self.bisect(current, batch, error, encode)
                return
            except Blocked:
                raise
            except DeliveryError as error:
                if encode is None:
                    raise
                delay = await self.back_off(error, delay)
                continue
            batch = self.accept(current, batch, rejects)
            if batch and encode is None:
                return
            if batch:
                first = next(iter(rejects.values()))
                delay = await self.back_off(Transient(first.detail, code="unknown"), delay)
                batch = [item for item in (encode(current, item.index) for item in batch) if item]  # type: ignore[misc]

    def accept(self, current: Round, batch: list[Item], rejects: dict[int, Reject]) -> list[Item]:
        """Note what was accepted; what is to be tried again. Raises ``Blocked`` where the service is off for us."""
        batch = current.accept(batch, rejects, self._now())
        if any(reject.again is Again.BLOCKED for reject in rejects.values()):
            raise Blocked(next(iter(rejects.values())).detail)
        return batch

    async def call(self, batch: list[Item]) -> dict[int, Reject]:
        """One call when it is its turn."""
        async with self.sink.pace.slot():
            return await self.attempt(batch)

    async def attempt(self, batch: list[Item]) -> dict[int, Reject]:
        """One call now; whoever calls this holds the slot."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        name = self.sink.name
        try:
            async with asyncio.timeout(self._settings.call_secs_max):
                rejects = await self.sink.deliver(batch)
        except TimeoutError:
            raise self._failed(Transient("no answer in time", code="timeout")) from None
        except DeliveryError as error:
            raise self._failed(error) from None
        finally:
            self._metrics.call_seconds[name].observe(loop.time() - started)
        self.sink.pace.succeeded()
        self._refusals_in_a_row = 0
        self._successes += 1
        self.progress.succeeded(self._now(), len(batch), clean=not rejects)
        log.debug("batch accepted", sink=name, records=len(batch) - len(rejects), rejected=len(rejects))
        return rejects

    async def bisect(
        self,
        current: Round,
        batch: list[Item],
        error: DeliveryError,
        encode: Callable[[Round, int], Item | None] | None,
    ) -> None:
        """The service refuses a call: halve it until the culprit is alone."""
        if len(batch) == 1:
            self._refuse(current, batch[0], error)
            return
        middle = len(batch) // 2
        before = self._successes
        await self.deliver(current, batch[:middle], encode)
        rest = batch[middle:]
        if self._successes > before and not isinstance(error, TooLarge) and len(rest) > 1:
            clean = all(current.outcomes.get(item.index) == DELIVERED for item in batch[:middle])
            if clean:  # the culprit is in the rest: no need to ask for all of it again
                await self.bisect(current, rest, error, encode)
                return
        await self.deliver(current, rest, encode)

    async def back_off(self, error: DeliveryError, previous: float) -> float:
        """Wait with decorrelated jitter; returns the delay for the next time. Raises ``Stop`` on drain."""
        self.progress.enter("retrying")
        self.progress.retried()
        delay = min(BACKOFF_MAX_SECS, self._rng.uniform(BACKOFF_BASE_SECS, previous * 3))
        await self.sleep(max(delay, min(error.delay_secs, BACKOFF_MAX_SECS)))
        return delay

    async def pause(self, error: DeliveryError) -> None:
        """Wait where only a person can help."""
        self.progress.block(error)
        await self.sleep(PROBE_SECS)

    async def sleep(self, secs: float) -> None:
        """Raises ``Stop`` on drain."""
        try:
            await asyncio.wait_for(self.draining.wait(), secs)
        except TimeoutError:
            return
        raise Stop

    def _failed(self, error: DeliveryError) -> DeliveryError:
        self.progress.failed(error)
        if error.code == "throttled":
            self.sink.pace.throttled()
        return error

    def _refuse(self, current: Round, item: Item, error: DeliveryError) -> None:
        """A lone record is refused at call level."""
        if isinstance(error, Permission):
            # Its own fault, or ours altogether? Known when the round is over.
            current.suspects.append((item, error))
            if len(current.suspects) >= SUSPECTS_MAX:
                raise Blocked(str(error), code="permission")
            return
        self._refusals_in_a_row += 1
        current.bury(item.index, error.code, str(error), self._now())
        log.error(
            "alert refused by the service, kept as a dead letter", sink=self.sink.name, error=str(error)
        )
        if self._refusals_in_a_row >= REFUSALS_IN_A_ROW_MAX:
            self._refusals_in_a_row = 0
            raise Blocked(f"every alert is refused: {error}", code="invalid")
