"""Ingest: what happens to a body between the receiver's last byte and its answer.

Decode, de-duplicate, enrich from memory, append to the spool, and only then say so. Pure policy: it knows
nothing of HTTP and never waits on a network; the receiver maps its outcome to an answer.

- **De-duplication.** Falco's HTTP client sends the very same bytes again when a kept-alive connection breaks
  after the request was read. An alert whose bytes came before (10 minutes at least, 100,000 alerts at most) is
  acknowledged and counted, not stored again. A duplicate of an alert whose commit is under way waits for
  that commit: it is never acknowledged before the first one is durable.
- **No room.** The answer is held up to ``receiver.hold_secs_max``; time is the only backpressure Falco
  understands. Then the alert is refused, and counted as discarded.
- **Unreadable.** The raw body is kept as a dead letter of ``receiver`` and goes to the log sinks as it is.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import structlog

from forwarder.alert import Alert, Unparsable, decode, encode
from forwarder.metrics import Metrics
from forwarder.record import ALERT, TEXT, UNPARSED, DeadLetter, Record
from forwarder.spool import Spool, SpoolFailedError, SpoolFullError

DUPLICATE_WINDOW_SECS = 600.0
DUPLICATES_MAX = 100_000
HELD_REQUESTS_MAX = 1024
RETRY_SECS = 0.25
UNPARSED_RANK = 4
DIGEST_BYTES = 16
TEXT_HINT_SECS = 3600.0

log = structlog.get_logger("ingest")


class Enricher(Protocol):
    """Adds what it knows of an alert's surroundings, from memory, in microseconds."""

    def enrich(self, alert: Alert) -> Mapping[str, object]:
        """Keys for the root of the CloudWatch event (``kubernetes``, ``node``, ``ecs``), or nothing."""


class Outcome(Enum):
    """What became of a body."""

    STORED = "stored"
    UNPARSED = "unparsed"
    FULL = "full"
    FAILED = "failed"


class Answer(NamedTuple):
    """Outcome, and the fault in one line where there is one."""

    outcome: Outcome
    fault: str = ""


STORED = Answer(Outcome.STORED)


class Seen:
    """Digests of what was stored lately: two generations, so that forgetting costs nothing."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()
        self._turned_at = now()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._young or digest in self._old

    def add(self, digest: bytes) -> None:
        self._young.add(digest)
        if len(self._young) >= DUPLICATES_MAX // 2:
            self._turn()

    def expire(self) -> None:
        """Forget a generation once the window has passed (call it now and then)."""
        if self._now() - self._turned_at >= DUPLICATE_WINDOW_SECS:
            self._turn()

    def _turn(self) -> None:
        self._old, self._young = self._young, set()
        self._turned_at = self._now()


class Ingest:
    """Turns bodies into durable records."""

    def __init__(
        self,
        *,
        spool: Spool,
        metrics: Metrics,
        hold_secs_max: float,
        now_ns: Callable[[], int],
        now_monotonic: Callable[[], float],
        enrichers: Sequence[Enricher] = (),
    ) -> None:
        self._spool = spool
        self._metrics = metrics
        self._hold_secs_max = hold_secs_max
        self._now_ns = now_ns
        self._now = now_monotonic
        self._enrichers = tuple(enrichers)
        self._seen = Seen(now_monotonic)
        self._flying: dict[bytes, asyncio.Future[None]] = {}
        self._held = 0
        self._hinted_at = -TEXT_HINT_SECS
        self._received = self._received_bytes = self._stored = self._duplicates = 0
        self._observe = metrics.ack_seconds.observe

    def publish(self) -> None:
        """Fold what was counted since the last time into the metrics, and forget old digests.

        Counting in plain integers keeps four metric updates off the path of every alert; the application calls
        this every second and before each scrape.
        """
        metrics = self._metrics
        metrics.received.inc(self._received)
        metrics.received_bytes.inc(self._received_bytes)
        metrics.stored.inc(self._stored)
        metrics.duplicates.inc(self._duplicates)
        self._received = self._received_bytes = self._stored = self._duplicates = 0
        self._seen.expire()

    async def take(self, body: bytes) -> Answer:
        """Make one body durable. Returns only when it is, or when it is known that it will not be."""
        started = self._now()
        self._received_bytes += len(body)
        try:
            decoded = decode(body)
        except Unparsable as fault:
            self._received += 1
            return await self._keep_unparsed(body, str(fault))
        alerts = decoded.alerts
        self._received += len(alerts)
        fresh: dict[bytes, Record] = {}
        flying: list[asyncio.Future[None]] = []
        for alert in alerts:
            digest = _digest(alert)
            under_way = self._flying.get(digest)
            if under_way is not None:
                flying.append(under_way)
            elif digest not in self._seen and digest not in fresh:
                fresh[digest] = self._record(alert, digest, utf8_replaced=decoded.utf8_replaced)
        if decoded.utf8_replaced:
            self._metrics.utf8_replaced.inc()
        answer = STORED
        if fresh:
            records = list(fresh.values())
            rank = records[0].priority if len(records) == 1 else min(record.priority for record in records)
            answer = await self._append(records, (), rank, fresh)
        if flying and answer is STORED:
            answer = await self._others(flying)
        if answer is not STORED:
            self._discard([alert.rank for alert in alerts], answer.outcome)
            return answer
        self._stored += len(fresh)
        self._duplicates += len(alerts) - len(fresh)
        self._observe(self._now() - started)
        return answer

    @staticmethod
    async def _others(flying: list[asyncio.Future[None]]) -> Answer:
        """Wait for the commits our duplicates are in; where one fails, ours was no duplicate."""
        for other in flying:
            try:
                await asyncio.shield(other)
            except SpoolFullError:
                return Answer(Outcome.FULL, "the spool is full")
            except SpoolFailedError as error:
                return Answer(Outcome.FAILED, f"the spool cannot be written: {error}")
        return STORED

    async def _append(
        self,
        records: Sequence[Record],
        dead: Sequence[DeadLetter],
        rank: int,
        digests: Mapping[bytes, Record],
    ) -> Answer:
        """Append as soon as there is room, holding the caller for a while if there is none."""
        spool = self._spool
        deadline = 0.0
        outcome, fault = Outcome.FULL, "the spool is full"
        while True:
            if spool.admits(rank):
                done = spool.append(records, dead)
                for digest in digests:
                    self._flying[digest] = done
                try:
                    await done
                except SpoolFullError:
                    outcome, fault = Outcome.FULL, "the spool's volume is full"
                except SpoolFailedError as error:
                    outcome, fault = Outcome.FAILED, f"the spool cannot be written: {error}"
                else:
                    for digest in digests:
                        self._seen.add(digest)
                    return STORED
                finally:
                    for digest in digests:
                        self._flying.pop(digest, None)
            now = self._now()
            deadline = deadline or now + self._hold_secs_max
            if now >= deadline or self._held >= HELD_REQUESTS_MAX:
                return Answer(outcome, fault)
            await self._hold(min(deadline - now, RETRY_SECS))

    async def _hold(self, secs: float) -> None:
        self._held += 1
        self._metrics.held.set(self._held)
        try:
            async with asyncio.timeout(secs):
                await self._spool.room()
        except TimeoutError:
            pass
        finally:
            self._held -= 1
            self._metrics.held.set(self._held)

    async def _keep_unparsed(self, body: bytes, fault: str) -> Answer:
        identity = hashlib.sha256(body).hexdigest()[: 2 * DIGEST_BYTES]
        now_ns = self._now_ns()
        record = Record(
            kind=UNPARSED,
            id=identity,
            priority=UNPARSED_RANK,
            time_ns=now_ns,
            received_ns=now_ns,
            internal=False,
            body=body,
            notes=b'"reason":' + encode(fault),
        )
        letter = DeadLetter(
            sink="receiver", id=identity, reason="unparsed", detail=fault, at=now_ns / 1e9, body=body
        )
        answer = await self._append([record], [letter], UNPARSED_RANK, {})
        if answer is not STORED:
            self._discard([UNPARSED_RANK], answer.outcome)
            return answer
        self._metrics.unparsed.inc()
        return Answer(Outcome.UNPARSED, fault)

    def _record(self, alert: Alert, digest: bytes, *, utf8_replaced: bool) -> Record:
        now_ns = self._now_ns()
        notes: list[bytes] = []
        if not alert.priority_known:
            self._metrics.unknown_priority.inc()
            notes.append(b'"priority_unknown":true')
        if utf8_replaced:
            notes.append(b'"utf8_replaced":true')
        if alert.sender_keys:
            notes.append(b'"sender_keys":' + alert.sender_keys)
        if alert.text:
            self._metrics.text_mode.inc()
            self._hint()
            notes.append(b'"text_mode":true')
        return Record(
            TEXT if alert.text else ALERT,
            alert.id or digest.hex(),
            alert.rank,
            now_ns if alert.time_ns is None else alert.time_ns,
            now_ns,
            alert.internal,
            alert.body,
            self._enrich(alert) if self._enrichers else b"",
            b",".join(notes) if notes else b"",
            alert.hostname,
        )

    def _enrich(self, alert: Alert) -> bytes:
        found: dict[str, object] = {}
        for enricher in self._enrichers:
            found.update(enricher.enrich(alert))
        return encode(found)[1:-1] if found else b""

    def _hint(self) -> None:
        if self._now() - self._hinted_at >= TEXT_HINT_SECS:
            self._hinted_at = self._now()
            log.error(
                "Falco sends text: no rule, no tags, no findings. Set json_output: true in falco.yaml "
                "(Helm: --set falco.json_output=true)"
            )

    def _discard(self, ranks: Sequence[int], outcome: Outcome) -> None:
        reason = "spool_full" if outcome is Outcome.FULL else "spool_failed"
        for rank in ranks:
            self._metrics.discarded[reason, rank].inc()
        log.error("alerts refused and lost to Falco, which never retries", count=len(ranks), reason=reason)


def _digest(alert: Alert) -> bytes:
    """Of the sender's bytes as far as they are kept."""
    data = alert.body + alert.sender_keys if alert.sender_keys else alert.body
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]
