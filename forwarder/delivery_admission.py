"""Which records a sink takes: what it is for, the rules of the house, its minimum priority. Every refusal has a reason, which is counted."""

from __future__ import annotations

from typing import NamedTuple

from forwarder.contract import Service
from forwarder.facts import Facts, facts_of
from forwarder.record import ALERT, UNPARSED, Record
from forwarder.rules import NO_RULE, RuleBook, Verdict


class Admitted(NamedTuple):
    """What is known of a record that was looked at."""

    reason: str
    """Why the sink does not take it, one of ``metrics.FILTER_REASONS``; or nothing."""
    verdict: Verdict
    facts: Facts


class Admission:
    """The door of one sink."""

    def __init__(self, sink: Service, rules: RuleBook | None) -> None:
        self._sink = sink
        self._rules = rules

    def refusal(self, record: Record) -> str:
        """Why the sink does not take a record, or nothing. Reads the alert only where there are rules."""
        sink = self._sink
        if sink.findings_only and (record.kind != ALERT or record.internal):
            return "not_a_finding"
        if record.kind == UNPARSED:
            return ""
        if self._rules is None or not self._rules.rules:
            return "minimum_priority" if record.priority > sink.minimum_rank else ""
        verdict, _ = self._rules.decide(record, sink.name)
        return verdict.keeps_out(sink.name, record.priority, sink.minimum_rank, findings=sink.findings_only)

    def look(self, record: Record) -> Admitted | None:
        """The same, with what was read; None for what can never be a finding."""
        if record.kind != ALERT or record.internal:
            return None
        sink = self._sink
        verdict, facts = NO_RULE, None
        if self._rules is not None:
            verdict, facts = self._rules.decide(record, sink.name)
        reason = verdict.keeps_out(sink.name, record.priority, sink.minimum_rank, findings=True)
        return Admitted(reason, verdict, facts or facts_of(record))
