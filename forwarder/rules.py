"""The rules of the house: what becomes of an alert. First match wins. Pure, but for the counts a ``RuleBook`` keeps.

A set of rules never changes; a reload puts another one in its place, whole. So a verdict is always that of one configuration, and what
is under way at that moment is decided by the old rules or by the new ones, never by a mixture.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from msgspec import UNSET

from forwarder.alert import encode as json_encode
from forwarder.alert import rank
from forwarder.asff_context import Advice
from forwarder.facts import Facts, facts_of
from forwarder.record import UNPARSED, Record
from forwarder.rules_match import Column, Columns
from forwarder.rules_settings import RuleSettings, iso_of, name_of, until_secs

SHOWN_LENGTH_MAX = 80
REMEMBERED_MAX = 4096
"""Values of all columns together; below 2 KB each."""


class Verdict(NamedTuple):
    """What becomes of an alert."""

    rule: str = ""
    """Name of the rule of the house that matched; nothing where none did."""
    sinks: frozenset[str] | None = None
    """Only these; None is all."""
    minimum_ranks: Mapping[str, int] = MappingProxyType({})
    """By sink, in the place of its own; absent is its own."""
    severity: str = ""
    """Label in the finding instead of the priority's."""
    finding_types: tuple[str, ...] = ()
    remediation: Advice | None = None
    drop: bool = False
    silenced: bool = False
    """By a silence in force: log sinks get it, but there is no finding."""

    def keeps_out(self, sink: str, rank: int, minimum_rank: int, *, findings: bool) -> str:
        """Why a sink does not get the alert: a value of the label ``reason``; nothing where it does."""
        if self is NO_RULE:
            return "minimum_priority" if rank > minimum_rank else ""
        if self.drop:
            return "drop"
        if self.silenced and findings:
            return "silence"
        if self.sinks is not None and sink not in self.sinks:
            return "route"
        return "minimum_priority" if rank > self.minimum_ranks.get(sink, minimum_rank) else ""


NO_RULE = Verdict()


class Silence(NamedTuple):
    """A silence, for the status."""

    name: str
    until: float
    reason: str
    by: str


class Passed(NamedTuple):
    """A rule that was looked at for an alert, and the first thing that kept it from matching."""

    name: str
    why: str
    """Nothing where it matched."""


class Rules:
    """A compiled set of rules."""

    def __init__(self, settings: Sequence[RuleSettings] = (), *, cluster: str = "") -> None:
        """``settings`` without faults; ``cluster`` is the configured name of the cluster."""
        self.names = tuple(name_of(rule, place) for place, rule in enumerate(settings))
        self.silences = tuple(_silences(settings))
        self._verdicts = [_verdict(rule, name) for rule, name in zip(settings, self.names, strict=True)]
        self._columns = Columns([rule.match for rule in settings], cluster)
        self._steps = [(column.used, column.read, column.memo, column) for column in self._columns.all]
        self._remembered = 0
        places = {silence: place for place, silence in enumerate(self.names)}
        ends = sorted((silence.until, 1 << places[silence.name]) for silence in self.silences)
        self._ends = [until for until, _ in ends]
        self._in_force = [(1 << len(settings)) - 1]
        """Bits of the rules that are there when so many silences have ended."""
        for _, bit in ends:
            self._in_force.append(self._in_force[-1] & ~bit)

    def __len__(self) -> int:
        return len(self.names)

    def decide(self, facts: Facts, at: float) -> Verdict:
        """The verdict of the first rule that matches at this time, seconds since 1970."""
        left = self._in_force[bisect_right(self._ends, at)] if self._ends else self._in_force[0]
        for used, read, memo, column in self._steps:
            if left & used:
                value = read(facts)
                holding = memo.get(value)
                left &= self._look(column, value) if holding is None else holding
        if not left:
            return NO_RULE
        return self._verdicts[(left & -left).bit_length() - 1]

    def _look(self, column: Column, value: Any) -> int:
        holding = column.holding(value)
        if column.is_usual(value):
            if self._remembered >= REMEMBERED_MAX:
                for other in self._columns.all:
                    other.memo.clear()
                self._remembered = 0
            column.memo[value] = holding
            self._remembered += 1
        return holding

    def trace(self, facts: Facts, at: float) -> Iterator[Passed]:
        """Every rule up to the one that matches, with what kept it from matching."""
        until = {silence.name: silence.until for silence in self.silences}
        for place, name in enumerate(self.names):
            if until.get(name, at + 1) <= at:
                yield Passed(name, f"its silence ended {iso_of(until[name])}")
                continue
            failing = next(self._columns.failing(facts, 1 << place), None)
            yield Passed(name, "" if failing is None else _failed(*failing))
            if failing is None:
                return


class RuleBook:
    """The rules in force, and how often each matched, by sink."""

    def __init__(
        self, settings: Sequence[RuleSettings] = (), *, now: Callable[[], float], cluster: str = ""
    ) -> None:
        self._now = now
        self._cluster = cluster
        self._counts: dict[str, dict[str, int]] = {}
        self.rules = Rules()
        self.replace(settings)

    def replace(self, settings: Sequence[RuleSettings]) -> None:
        """Other rules from now on. Rules that keep their name keep their counts."""
        self.put(self.compiled(settings))

    def compiled(self, settings: Sequence[RuleSettings]) -> Rules:
        """May be called in another thread: a thousand rules take some milliseconds."""
        return Rules(settings, cluster=self._cluster)

    def put(self, rules: Rules) -> None:
        """Compiled rules in the place of the ones in force."""
        self._counts = {name: self._counts.get(name, {}) for name in rules.names}
        self.rules = rules

    def decide(self, record: Record, sink: str) -> tuple[Verdict, Facts | None]:
        """The verdict on a record for a sink, counted; the facts, if there was anything to decide."""
        if not self.rules or record.kind == UNPARSED:
            return NO_RULE, None
        facts = facts_of(record)
        verdict = self.rules.decide(facts, self._now())
        if verdict is not NO_RULE:
            counts = self._counts[verdict.rule]
            counts[sink] = counts.get(sink, 0) + 1
        return verdict, facts

    def status(self) -> dict[str, Any]:
        """Rules in their order, with the alerts that matched by sink; silences with how long they last."""
        now = self._now()
        return {
            "rules": [{"name": name, "matched": dict(self._counts[name])} for name in self.rules.names],
            "silences": [
                {
                    "name": silence.name,
                    "until": iso_of(silence.until),
                    "reason": silence.reason,
                    "by": silence.by,
                    "state": "active" if now < silence.until else "expired",
                    "silenced": max(self._counts[silence.name].values(), default=0),
                }
                for silence in self.rules.silences
            ],
        }


def _silences(settings: Sequence[RuleSettings]) -> Iterator[Silence]:
    for place, rule in enumerate(settings):
        if rule.silence is not None:
            until = until_secs(rule.silence.until)
            yield Silence(name_of(rule, place), until, rule.silence.reason, rule.silence.by)


def _verdict(rule: RuleSettings, name: str) -> Verdict:
    advice = rule.remediation
    return Verdict(
        rule=name,
        sinks=None if rule.sinks is UNSET else frozenset(rule.sinks),
        minimum_ranks=MappingProxyType(
            {sink: rank(priority) or 0 for sink, priority in (rule.minimum_priority or {}).items()}
        ),
        severity=(rule.severity or "").upper(),
        finding_types=tuple(rule.finding_types or ()),
        remediation=None if advice is None else Advice(advice.text or None, advice.url or None),
        drop=rule.drop,
        silenced=rule.silence is not None,
    )


def _failed(matcher: str, value: Any) -> str:
    if not value:
        return f"the alert has no {matcher}"
    text = ", ".join(value) if isinstance(value, tuple) else value
    shown = text if len(text) <= SHOWN_LENGTH_MAX else f"{text[:SHOWN_LENGTH_MAX]}..."
    return f"{matcher} is {json_encode(shown).decode()}"
