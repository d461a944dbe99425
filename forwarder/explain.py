"""``check --explain``: which rule of the house an alert meets, and what each sink does with it. Nothing is sent.

What enrichment would find cannot be known here. But an event copied from CloudWatch Logs carries it (``kubernetes``, ``node``, ``ecs``,
``cluster``), and then it is used as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from forwarder import alert
from forwarder.asff import SEVERITIES
from forwarder.asff_context import Advice
from forwarder.asff_types import finding_types
from forwarder.facts import Facts, facts_of
from forwarder.record import ALERT, TEXT, Record
from forwarder.rules import NO_RULE, Rules, Verdict
from forwarder.settings import Settings, enabled_sinks
from forwarder.sinks import sink_class

ENRICHED = ("cluster", "kubernetes", "node", "ecs")
PASSED_MAX = 20
"""Rules shown that did not match: those nearest to the one that did."""
_WHY = {
    "drop": "the rule drops it",
    "silence": "the rule silences findings",
    "route": "the rule names other sinks",
    "not_a_finding": "Falco's own messages and text alerts become no findings",
}
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def explain(settings: Settings, data: bytes, at: float) -> str:
    """The whole answer for one alert, an array or NDJSON, at a time in seconds since 1970.

    Raises:
        Unparsable: there is no alert in it.

    """
    rules = Rules(settings.rules, cluster=settings.cluster.name)
    alerts = alert.decode(data).alerts
    lines: list[str] = []
    unenriched = 0
    for number, one in enumerate(alerts, 1):
        record = _record(one)
        unenriched += not record.enrichment
        lines += [f"alert {number} of {len(alerts)}: {_title(facts_of(record))}"]
        lines += [f"  {line}" for line in _of_alert(settings, rules, record, at)]
    if unenriched:
        lines.append(
            f"{unenriched} of {len(alerts)} without `kubernetes`, `node` or `cluster`: namespace, pod and container come from Falco's "
            "fields only, there are no labels and no workload. Paste the event from CloudWatch Logs to have them."
        )
    return "\n".join(lines)


def _record(one: alert.Alert) -> Record:
    return Record(
        kind=TEXT if one.text else ALERT,
        id=one.id,
        priority=one.rank,
        time_ns=0,
        received_ns=0,
        internal=one.internal,
        body=one.body,
        enrichment=_enrichment(one.sender_keys),
        hostname=one.hostname,
    )


def _enrichment(sender_keys: bytes) -> bytes:
    """What our own event says of its surroundings, as a record has it."""
    members = _members.decode(sender_keys) if sender_keys else {}
    known = {name: members[name] for name in ENRICHED if name in members}
    if not known:
        return b""
    enrichment = alert.encode(known)[1:-1]
    try:
        facts_of(Record(ALERT, "", 0, 0, 0, False, b"{}", enrichment))
    except msgspec.ValidationError as error:
        raise alert.Unparsable(f"enrichment is not as the forwarder writes it: {error}") from None
    return enrichment


def _title(facts: Facts) -> str:
    parts = [facts.rule or "(no rule)", facts.priority or "no priority", facts.source]
    parts += [
        f"{name} {getattr(facts, name)}" for name in ("namespace", "workload", "pod") if getattr(facts, name)
    ]
    text = ", ".join(parts)
    return text if text.isprintable() else alert.encode(text).decode()  # an alert must not steer a terminal


def _quoted(text: str) -> str:
    return alert.encode(text).decode()


def _of_alert(settings: Settings, rules: Rules, record: Record, at: float) -> Iterator[str]:
    facts = facts_of(record)
    verdict = rules.decide(facts, at)
    if not rules:
        yield "rule of the house: there are none"
    else:
        yield f"rule of the house: {'none matches' if verdict is NO_RULE else _quoted(verdict.rule)}"
    passed = [rule for rule in rules.trace(facts, at) if rule.why]
    if len(passed) > PASSED_MAX:
        yield f"  {len(passed) - PASSED_MAX} rules before these do not match"
    for rule in passed[-PASSED_MAX:]:
        yield f"  not {_quoted(rule.name)}: {rule.why}"
    for sink in enabled_sinks(settings):
        yield f"{sink}: {_at_sink(settings, sink, record, verdict)}"
        if sink_class(sink).findings_only and not _reason(settings, sink, record, verdict):
            yield from (f"  {line}" for line in _finding(settings, facts, verdict))


def _reason(settings: Settings, sink: str, record: Record, verdict: Verdict) -> str:
    findings = sink_class(sink).findings_only
    minimum = alert.rank(getattr(settings.sinks, sink).minimum_priority) or 0
    if findings and (record.kind != ALERT or record.internal):
        return "not_a_finding"
    return verdict.keeps_out(sink, record.priority, minimum, findings=findings)


def _at_sink(settings: Settings, sink: str, record: Record, verdict: Verdict) -> str:
    reason = _reason(settings, sink, record, verdict)
    if not reason:
        return "gets it"
    if reason != "minimum_priority":
        return f"does not get it ({reason}): {_WHY[reason]}"
    own = alert.rank(getattr(settings.sinks, sink).minimum_priority) or 0
    minimum = alert.PRIORITIES[verdict.minimum_ranks.get(sink, own)]
    whose = "the rule's" if sink in verdict.minimum_ranks else "the sink's"
    return (
        f"does not get it (minimum_priority): {alert.PRIORITIES[record.priority]} is below {whose} {minimum}"
    )


def _finding(settings: Settings, facts: Facts, verdict: Verdict) -> Iterator[str]:
    hub: Any = settings.sinks.security_hub
    container = facts.text("container.full_id") or facts.text("container.id")
    types = list(verdict.finding_types) or finding_types(
        tuple(facts.tags), facts.source, in_container=container not in {"", "host"}
    )
    yield f"severity: {verdict.severity or SEVERITIES[hub.severity][facts.rank]}"
    yield f"types: {', '.join(types)}"
    known = hub.remediation.get(facts.rule)
    advice = verdict.remediation or (known and Advice(known.text, known.url))
    yield f"remediation: {' '.join(filter(None, advice)) if advice else 'none'}"
