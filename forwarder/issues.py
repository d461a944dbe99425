"""The table of issues: counts alerts, decides which finding is told when, forgets what is over. Pure, no I/O.

Job: ``count`` takes one alert into its issue; ``claim`` gives out what has to be told (in which order: ``issues_due``). A first alert, a rise in severity and an archiving are due at once; a count that moved is due when the time since
the finding was last told has passed (``flush_secs``).

Every change is noted and handed out by ``changes`` for the spool's next transaction. Whoever mutates submits the changes before anything
else runs, so that the database follows the same order.

Invariants: what waits to be told is never forgotten. A key that was forgotten never gets its old Id again: the table's generation, which
goes up whenever an issue is forgotten, is part of the Id of every issue begun since. Memory is bounded: ``entries_max`` packed issues, and
``details_bytes_max`` of latest alerts on disk; where either is reached and nothing can be forgotten, ``count`` refuses, and the alert stays
where it is.

After a crash ``load`` has what was last written; what was told but not noted is told again with a later ``UpdatedAt``.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import islice

import msgspec
from msgspec.structs import replace

from forwarder.issue import (
    GROUP,
    LABELS,
    NOTICE,
    SINGLE,
    Claim,
    Issue,
    Sighting,
    begun,
    counted,
    pack,
    unpack,
)
from forwarder.issues_due import Clock, Due, Waiting
from forwarder.issues_journal import Journal
from forwarder.issues_settings import AggregationSettings
from forwarder.record import Record
from forwarder.spool_values import IssueChanges, StoredIssues

EVICTED_SHARE = 16
ISSUE_BYTES_USUAL = 512
"""Of memory: a table of larger ones holds fewer."""
NOTICES_MAX, NOTICE_DAYS_MAX = 10_000, 90
"""The service itself forgets a finding after so long: until then a notice keeps its count and its creation."""
DAY_MS = 86_400_000
HOUSEKEEPING_ISSUES_MAX = 2_000
"""Looked at in one go, so that the event loop is not held up."""


class Issues:
    """All issues of one sink."""

    def __init__(
        self,
        settings: AggregationSettings,
        clock: Clock,
        *,
        aging_secs: float,
        entries_max: int,
        details_bytes_max: int,
        table_bytes_max: int = 1 << 40,
    ) -> None:
        """``entries_max``, ``table_bytes_max`` and ``details_bytes_max`` are what fits the spool's volume."""
        self._settings = settings
        self._clock = clock
        self.entries_max = min(entries_max, settings.entries_max)
        self._table_bytes_max = min(table_bytes_max, self.entries_max * ISSUE_BYTES_USUAL)
        self._details_bytes_max = details_bytes_max
        self._table_bytes = 0
        self._hurrying = False
        self._unlooked: deque[bytes] = deque()
        """Keys that this round of housekeeping has not looked at."""
        self._table: OrderedDict[bytes, bytes] = OrderedDict()
        self._notices: dict[bytes, str] = {}
        self._due = Due(len(LABELS), aging_secs=aging_secs, monotonic=clock.monotonic)
        self._pressing: dict[bytes, int] = {}
        self._flying: set[bytes] = set()
        self._journal = Journal()
        self.generation = 0
        self.untold = 0
        """Alerts counted whose finding does not say so yet."""
        self.due_alerts = 0
        """Of them, those of issues that are due or under way."""
        self.details_bytes = 0
        self.evicted = 0

    def __len__(self) -> int:
        """Issues of alerts; notices take no room from them."""
        return len(self._table) - len(self._notices)

    # ---- what was stored ----------------------------------------------------------------------------

    def load(self, stored: StoredIssues, *, fresh: bool = False) -> int:
        """Take over what the spool has; how many of it could not be read.

        ``fresh``: the sink begins at the present. Counts go on, but what waited to be told waits no more.
        """
        self.generation = stored.generation
        broken = len(stored.broken)
        for key in stored.broken:
            self._journal.removed(key)
        for row in stored.rows:
            try:
                issue = unpack(row.state)
            except msgspec.MsgspecError:
                broken += 1
                self._journal.removed(row.key)
                continue
            if fresh and issue.kind == SINGLE:
                self._journal.removed(row.key)
                continue
            if fresh and issue.waits and issue.kind == GROUP:
                issue = replace(issue, told=issue.count, urgent=False, detail_bytes=0)
                self._journal.changed(row.key, issue.touched_ms)
                self._journal.detail_removed(row.key)
            self._store(row.key, issue)
            self.details_bytes += issue.detail_bytes
            self.untold += issue.untold
            if issue.kind == NOTICE:
                self._notices[row.key] = issue.name
            self._wait(row.key, issue)
        if broken:
            self._forgot()
        return broken

    def has_changes(self) -> bool:
        return bool(self._journal)

    def changes(self) -> IssueChanges | None:
        """What changed since the last time, or None."""
        return self._journal.take(self._table)

    # ---- counting -----------------------------------------------------------------------------------

    def admits(self) -> bool:
        """Whether another latest alert may be kept. Where not, what is kept is told before its time, to make room."""
        if self.details_bytes < self._details_bytes_max:
            return True
        self.hurry()
        return not self._pressing

    def count(self, key: bytes, sighting: Sighting, *, single: str = "") -> bool:
        """One more alert of this issue; False where there is no room, and nothing was changed.

        ``single`` is the alert's id where it shall have a finding of its own.
        """
        packed = self._table.get(key)
        now_ms = self._clock.now_ms()
        if packed is None:
            if not self._make_room():
                return False
            kind = SINGLE if single else GROUP
            issue = begun(sighting, kind=kind, generation=self.generation, now_ms=now_ms, name=single)
            before, level_before = 0, issue.level
        else:
            known = unpack(packed)
            issue = counted(known, sighting, now_ms)
            before, level_before = known.detail_bytes, known.level
        self._put(key, issue, sighting.record, before)
        self.untold += 1
        if key in self._pressing:
            self._pressing[key] += 1
            self.due_alerts += 1
            self._move(key, issue, rose=issue.level > level_before)
        else:
            self._wait(key, issue)
        return True

    def tell(self, key: bytes, notice: Issue, record: Record) -> None:
        """A notice of our own: begins its issue, or goes on with it. Told at once where it is urgent."""
        packed = self._table.get(key)
        before = 0
        if packed is None and len(self._notices) >= NOTICES_MAX:
            return  # so many things are wrong that one more is no news
        if packed is not None:
            known = unpack(packed)
            before = known.detail_bytes
            notice = replace(
                notice,
                count=known.count + 1 if notice.count <= known.count else notice.count,
                told=known.told,
                first_ns=known.first_ns,
                step=known.step,
                told_ms=known.told_ms,
                created_ms=known.created_ms,
                updated_ms=known.updated_ms,
                cluster=known.cluster,
            )
        notice = replace(notice, detail_bytes=record.size_bytes)
        self._notices[key] = notice.name
        self._put(key, notice, record, before)
        if key not in self._pressing:
            self._wait(key, notice)

    def notice(self, key: bytes) -> Issue | None:
        """The state of a notice."""
        packed = self._table.get(key)
        return unpack(packed) if packed is not None else None

    def notices(self) -> Iterator[str]:
        """Names of the notices that are not archived."""
        for key, name in self._notices.items():
            if not unpack(self._table[key]).archived:
                yield name

    # ---- telling ------------------------------------------------------------------------------------

    @property
    def due(self) -> int:
        """Issues that may be claimed now."""
        self._wake()
        return len(self._due)

    def next_at(self) -> float | None:
        """When the next issue is due, monotonic; None: not before something happens."""
        return self._due.next_at()

    def oldest_secs(self) -> float:
        """How long the issue has been due that waits longest."""
        return self._due.oldest_secs()

    def claim(self, count_max: int) -> list[Claim]:
        """Up to so many issues to tell now, the most severe first; their ``updated_ms`` is new and must be stored before they are told."""
        self._wake()
        now_ms = self._clock.now_ms()
        claims = []
        for key, since in self._due.take(count_max):
            issue = unpack(self._table[key])
            if issue.kind != SINGLE:
                updated_ms = max(now_ms, issue.updated_ms + 1)
                issue = replace(issue, updated_ms=updated_ms, created_ms=issue.created_ms or updated_ms)
                self._store(key, issue)
                self._journal.changed(key, issue.touched_ms)
            self._flying.add(key)
            claims.append(Claim(key, issue, since))
        return claims

    def settle(self, claim: Claim, *, sent: bool = True) -> int:
        """The service accepted the claim, or refused it for good: how many alerts are told by that.

        Not ``sent``: a silence kept it back, so what comes after the silence does not wait for an update's time.
        """
        key, told = claim.key, claim.issue
        issue = unpack(self._table[key])
        self._flying.discard(key)
        self._due.settled(key)
        self.due_alerts -= self._pressing.pop(key)
        fresh = 0 if issue.kind == NOTICE else told.count - issue.told
        self.untold -= fresh
        rose = issue.level > told.level or issue.rank < told.rank or issue.archived != told.archived
        rose |= issue.kind == SINGLE and issue.count > told.count  # it has no next update to wait for
        issue = replace(
            issue, told=told.count, urgent=rose, step=issue.step + sent, told_ms=self._clock.now_ms()
        )
        if issue.kind == SINGLE and not issue.waits:
            self._remove(key, issue.detail_bytes)
            return fresh
        if not issue.waits and not self._keeps_detail(issue):
            self.details_bytes -= issue.detail_bytes
            issue = replace(issue, detail_bytes=0)
            self._journal.detail_removed(key)
        self._store(key, issue)
        self._journal.changed(key, issue.touched_ms)
        self._wait(key, issue)
        return fresh

    def put_back(self, claim: Claim, delay_secs: float = 0.0) -> None:
        """The service has not decided: to be claimed again, at once or after a while."""
        self._flying.discard(claim.key)
        if delay_secs > 0:
            self._due.later(claim.key, delay_secs)
        else:
            self._due.put_back(Waiting(claim.key, claim.since), unpack(self._table[claim.key]).level)

    def hurry(self) -> None:
        """What waits for its time is due now; what was put back keeps its back-off."""
        for key in self._due.hurry(but_for=self._pressing):
            self._press(key)

    def finish(self) -> None:
        """From now on nothing waits for its time: the process ends, and its volume may end with it."""
        self._hurrying = True
        self.hurry()

    # ---- forgetting ---------------------------------------------------------------------------------

    def housekeep(self) -> None:
        """Archive and forget what has been idle for long; a slice of it at a time."""
        now_ms = self._clock.now_ms()
        forget_ms = now_ms - int(self._settings.idle_days * DAY_MS)
        days = self._settings.archive_after_idle_days
        archive_ms = now_ms - int(days * DAY_MS) if days else None
        forgotten = False
        self._unlooked.extend(() if self._unlooked else self._table)
        for _ in range(min(HOUSEKEEPING_ISSUES_MAX, len(self._unlooked))):
            key = self._unlooked.popleft()
            if key in self._table and not self._is_waiting(key):
                # All are looked at, not only the head: the clock may have been ahead for a while.
                forgotten |= self._retire(key, unpack(self._table[key]), forget_ms, archive_ms)
        if forgotten:
            self._forgot()

    def _retire(self, key: bytes, issue: Issue, forget_ms: int, archive_ms: int | None) -> bool:
        """Archive or forget one idle issue; whether it was forgotten."""
        if issue.kind == NOTICE:
            if not issue.archived:
                return False
            forget_ms, archive_ms = self._clock.now_ms() - NOTICE_DAYS_MAX * DAY_MS, None
        if issue.touched_ms <= forget_ms:
            self._remove(key, issue.detail_bytes)
            return True
        idle = archive_ms is not None and issue.touched_ms <= archive_ms
        if idle and not issue.archived and issue.detail_bytes:
            self._store(key, replace(issue, archived=True, urgent=True))
            self._journal.changed(key, issue.touched_ms)
            self._press(key)
        return False

    def _make_room(self) -> bool:
        excess = len(self) - self.entries_max + 1
        if excess <= 0 and self._table_bytes < self._table_bytes_max:
            return True
        wanted = max(1, excess, self.entries_max // EVICTED_SHARE)
        idle = (key for key in self._table if not self._is_waiting(key) and key not in self._notices)
        victims = list(islice(idle, wanted))
        for key in victims:
            self._remove(key, unpack(self._table[key]).detail_bytes)
        if not victims:
            self.hurry()  # what waits for its time is in the way
            return False
        self.evicted += len(victims)
        self._forgot()
        return True

    def _remove(self, key: bytes, detail_bytes: int) -> None:
        self._table_bytes -= len(self._table.pop(key))
        self._notices.pop(key, None)
        self.details_bytes -= detail_bytes
        self._journal.removed(key)

    def _forgot(self) -> None:
        self.generation += 1
        self._journal.forgot(self.generation)

    def _keeps_detail(self, issue: Issue) -> bool:
        """Archiving takes a whole finding, so the latest alert stays where that is wanted and there is room."""
        wanted = self._settings.archive_after_idle_days > 0 and issue.kind == GROUP and not issue.archived
        return wanted and 2 * self.details_bytes <= self._details_bytes_max

    # ---- waiting ------------------------------------------------------------------------------------

    def _put(self, key: bytes, issue: Issue, record: Record, detail_bytes_before: int) -> None:
        self._store(key, issue)
        self._table.move_to_end(key)
        self.details_bytes += issue.detail_bytes - detail_bytes_before
        self._journal.changed(key, issue.touched_ms)
        self._journal.detail(key, record)

    def _store(self, key: bytes, issue: Issue) -> None:
        packed = pack(issue)
        self._table_bytes += len(packed) - len(self._table.get(key, b""))
        self._table[key] = packed

    def _move(self, key: bytes, issue: Issue, *, rose: bool) -> None:
        """An issue that is due or was put back has risen: it goes to its new place, at once."""
        level = self._due.level(key)
        if (level is None and rose and key not in self._flying) or level not in {None, issue.level}:
            self._due.push(key, issue.level)

    def _is_waiting(self, key: bytes) -> bool:
        return key in self._pressing or self._due.is_later(key)

    def _wait(self, key: bytes, issue: Issue) -> None:
        """Put an issue where it belongs: due now, due later, or nowhere."""
        if issue.urgent or (issue.waits and self._hurrying):
            self._press(key)
        elif issue.waits and not self._due.is_later(key):
            flushes = self._settings.flush_secs
            interval = flushes[min(issue.step, len(flushes)) - 1] if issue.step else 0.0
            passed = (self._clock.now_ms() - issue.told_ms) / 1000
            # Not longer than the interval, should the clock have stepped back.
            self._due.later(key, min(max(0.0, interval - passed), interval))

    def _wake(self) -> None:
        for key in self._due.ripe():
            self._press(key)

    def _press(self, key: bytes) -> None:
        """Due now."""
        issue = unpack(self._table[key])
        if key not in self._pressing:
            self._pressing[key] = issue.untold
            self.due_alerts += issue.untold
        self._due.push(key, issue.level)
