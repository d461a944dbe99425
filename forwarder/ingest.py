"""Ingest: what happens to a body between the receiver's last byte and its answer.

Decode, de-duplicate, enrich from memory, append to the spool, and only then say so. Pure policy: it knows
nothing of HTTP and never waits on a network; the receiver maps its outcome to an answer.

- **De-duplication.** Falco's HTTP client sends the very same bytes again when a kept-alive connection breaks
  after the request was read. An alert whose bytes came before (10 to 20 minutes, but no further back than 50,000 to 100,000 alerts) is
  acknowledged and counted, not stored again. A duplicate of an alert whose commit is under way waits for
  that commit: it is never acknowledged before the first one is durable.
- **No room.** The answer is held up to ``receiver.hold_secs_max``; time is the only backpressure Falco
  understands. Then the alert is refused, and counted as discarded.
- **Unreadable.** The raw body is kept as a dead letter of ``receiver`` and goes to the log sinks as it is.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

import structlog

from forwarder.alert import Alert, Decoded, Unparsable, decode, encode
from forwarder.custom_members import CustomMembers
from forwarder.enricher import Enrichment
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
HOSTNAME_LENGTH_MAX = 256
LOSS_LINE_SECS = 10.0

log = structlog.get_logger("ingest")


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
        enrichment: Enrichment | None = None,
        saw: Callable[[Alert, str], None] | None = None,
        custom: CustomMembers | None = None,
    ) -> None:
        """``saw`` is told of every alert and its peer: whoever sent it lives; ``custom`` adds to every alert."""
        self._spool = spool
        self._metrics = metrics
        self._hold_secs_max = hold_secs_max
        self._now_ns = now_ns
        self._now = now_monotonic
        self._enrichment = enrichment
        self._saw = saw
        self._custom = custom or None
        self._seen = Seen(now_monotonic)
        self._flying: dict[bytes, asyncio.Future[None]] = {}
        self._held = 0
        self._hinted_at = -TEXT_HINT_SECS
        self._said_at = -LOSS_LINE_SECS
        self._unsaid = 0
        self._received = self._received_bytes = self._stored = self._duplicates = 0
        self._observe = metrics.ack_seconds.observe

    def publish(self) -> None:
        """Fold what was counted since the last time into the metrics, and forget old digests.

        Counting in plain integers keeps four metric updates off the path of every alert; the application calls
        this several times a second and before each scrape.
        """
        metrics = self._metrics
        metrics.received.inc(self._received)
        metrics.received_bytes.inc(self._received_bytes)
        metrics.stored.inc(self._stored)
        metrics.duplicates.inc(self._duplicates)
        self._received = self._received_bytes = self._stored = self._duplicates = 0
        self._seen.expire()

    async def take(self, body: bytes, peer: str = "") -> Answer:
        """Make one body durable. Returns only when it is, or when it is known that it will not be.

        ``peer`` is the sender's address: where nothing else does, it tells the node.
        """
        started = self._now()
        self._received_bytes += len(body)
        decoded = _decoded(body)
        if isinstance(decoded, str):
            self._received += 1
            return await self._keep_unparsed(body, decoded)
        alerts = decoded.alerts
        self._received += len(alerts)
        if decoded.utf8_replaced:
            self._metrics.utf8_replaced.inc()
        for alert in alerts:
            if self._saw is not None:
                self._saw(alert, peer)
            if not alert.priority_known:
                self._metrics.unknown_priority.inc()
            if alert.text:
                self._metrics.text_mode.inc()
                self._hint()
        if len(alerts) == 1:
            answer = await self._take_one(alerts[0], peer, utf8_replaced=decoded.utf8_replaced)
            if answer is STORED:
                self._observe(self._now() - started)
                return answer
            if answer is not None and self._hold_secs_max <= 0:
                self._discard([alerts[0].rank], answer.outcome)
                return answer
        return await self._take_all(alerts, started, peer, utf8_replaced=decoded.utf8_replaced)

    async def _take_one(self, alert: Alert, peer: str, *, utf8_replaced: bool) -> Answer | None:
        """The usual case, kept short: a new alert, and room for it. None where it is not that case."""
        digest = _digest(alert)
        if digest in self._flying or digest in self._seen or not self._spool.admits(alert.rank):
            return None
        record = self._record(alert, digest, peer, utf8_replaced=utf8_replaced)
        done = self._flying[digest] = self._spool.append((record,))
        try:
            await done
        except (SpoolFullError, SpoolFailedError) as error:
            return _refused(error)
        else:
            self._seen.add(digest)
            self._stored += 1
            return STORED
        finally:
            del self._flying[digest]

    async def _take_all(
        self, alerts: Sequence[Alert], started: float, peer: str, *, utf8_replaced: bool
    ) -> Answer:
        """Any number of alerts, new and known, with patience where there is no room."""
        digests = [_digest(alert) for alert in alerts]
        missing = {
            digest: self._record(alert, digest, peer, utf8_replaced=utf8_replaced)
            for digest, alert in zip(digests, alerts, strict=True)
            if digest not in self._seen
        }
        stored = 0
        answer = STORED
        if missing:
            answer, stored = await self._patiently(missing, started)
        self._stored += stored
        if answer is STORED:
            self._duplicates += len(alerts) - stored
            self._observe(self._now() - started)
            return answer
        lost = [alert.rank for digest, alert in zip(digests, alerts, strict=True) if digest in missing]
        self._duplicates += len(alerts) - stored - len(lost)
        self._discard(lost, answer.outcome)
        return answer

    async def _patiently(self, missing: dict[bytes, Record], started: float) -> tuple[Answer, int]:
        """Try until everything is stored, holding the caller for a while where there is no room."""
        stored = 0
        while True:
            answer, more = await self._attempt(missing)
            stored += more
            left = started + self._hold_secs_max - self._now()
            if answer is STORED or left <= 0 or self._held >= HELD_REQUESTS_MAX:
                return answer, stored
            await self._hold(min(left, RETRY_SECS))

    async def _attempt(self, missing: dict[bytes, Record]) -> tuple[Answer, int]:
        """Store what nobody else is storing, wait for what somebody is; what is durable leaves ``missing``."""
        fresh: dict[bytes, Record] = {}
        others: dict[bytes, asyncio.Future[None]] = {}
        for digest, record in list(missing.items()):
            flying = self._flying.get(digest)
            if flying is not None:
                others[digest] = flying
            elif digest in self._seen:
                del missing[digest]
            else:
                fresh[digest] = record
        answer, stored = STORED, 0
        if fresh:
            answer = await self._append(list(fresh.values()), (), fresh)
            if answer is STORED:
                stored = len(fresh)
                for digest in fresh:
                    del missing[digest]
        for digest, other in others.items():
            try:
                await asyncio.shield(other)
            except (SpoolFullError, SpoolFailedError) as error:
                answer = _refused(error)
            else:
                del missing[digest]
        return answer, stored

    async def _append(
        self, records: Sequence[Record], dead: Sequence[DeadLetter], digests: Iterable[bytes]
    ) -> Answer:
        """One attempt to append, all or nothing."""
        rank = records[0].priority if len(records) == 1 else min([record.priority for record in records])
        if not self._spool.admits(rank):
            return Answer(Outcome.FULL, "the spool is full")
        done = self._spool.append(records, dead)
        for digest in digests:
            self._flying[digest] = done
        try:
            await done
        except (SpoolFullError, SpoolFailedError) as error:
            return _refused(error)
        else:
            for digest in digests:
                self._seen.add(digest)
            return STORED
        finally:
            for digest in digests:
                self._flying.pop(digest, None)

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
        started = self._now()
        while (answer := await self._append([record], [letter], ())) is not STORED:
            left = started + self._hold_secs_max - self._now()
            if left <= 0 or self._held >= HELD_REQUESTS_MAX:
                break
            await self._hold(min(left, RETRY_SECS))
        if answer is not STORED:
            self._discard([UNPARSED_RANK], answer.outcome)
            return answer
        self._metrics.unparsed.inc()
        return Answer(Outcome.UNPARSED, fault)

    def _record(self, alert: Alert, digest: bytes, peer: str, *, utf8_replaced: bool) -> Record:
        now_ns = self._now_ns()
        time_ns = now_ns if alert.time_ns is None else alert.time_ns
        notes: list[bytes] = []
        if not alert.priority_known:
            notes.append(b'"priority_unknown":true')
        if utf8_replaced:
            notes.append(b'"utf8_replaced":true')
        if alert.sender_keys:
            notes.append(b'"sender_keys":' + alert.sender_keys)
        if alert.text:
            notes.append(b'"text_mode":true')
        enrichment, complete = b"", True
        if self._enrichment is not None and not alert.text:
            enrichment, complete = self._enrichment.of(alert, time_ns, peer)
        return Record(
            TEXT if alert.text else ALERT,
            alert.id or digest.hex(),
            alert.rank,
            time_ns,
            now_ns,
            alert.internal,
            alert.body if self._custom is None or alert.text else self._custom.added_to(alert.body),
            enrichment,
            b",".join(notes) if notes else b"",
            alert.hostname[:HOSTNAME_LENGTH_MAX],
            not complete,
            "" if complete else peer,
        )

    def _hint(self) -> None:
        if self._now() - self._hinted_at >= TEXT_HINT_SECS:
            self._hinted_at = self._now()
            log.error(
                "Falco sends text: no rule, no tags, no findings. Set json_output: true in falco.yaml "
                "(Helm: --set falco.json_output=true)"
            )

    def _discard(self, ranks: Sequence[int], outcome: Outcome) -> None:
        """Count the loss; say so at once, then every ten seconds while it goes on."""
        reason = "spool_full" if outcome is Outcome.FULL else "spool_failed"
        for rank in ranks:
            self._metrics.discarded[reason, rank].inc()
        self._unsaid += len(ranks)
        now = self._now()
        if now - self._said_at >= LOSS_LINE_SECS:
            log.error("alerts refused and lost: Falco never retries", count=self._unsaid, reason=reason)
            self._said_at, self._unsaid = now, 0


def _refused(error: Exception) -> Answer:
    if isinstance(error, SpoolFullError):
        return Answer(Outcome.FULL, "the spool's volume is full")
    return Answer(Outcome.FAILED, f"the spool cannot be written: {error}")


def _digest(alert: Alert) -> bytes:
    """Of the sender's bytes as far as they are kept."""
    data = alert.body + alert.sender_keys if alert.sender_keys else alert.body
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def _decoded(body: bytes) -> Decoded | str:
    """The alerts, or why there are none. Not the error itself: its traceback would keep all that was decoded while we wait for the disk."""
    try:
        return decode(body)
    except Unparsable as fault:
        return str(fault)
