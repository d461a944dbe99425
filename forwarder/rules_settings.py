"""Section ``rules``: the rules of the house as they are written, and everything that can be wrong with one. Pure.

All members have defaults, also those that are required: so every fault of a rule can be told beside the others, and a rule keeps its
place in the list. What needs the rest of the configuration (names of sinks, labels that are kept) is in ``faults_among``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from forwarder.alert import encode as json_encode
from forwarder.alert import rank
from forwarder.asff_schema import TYPES_MAX, FindingType, Url
from forwarder.rules_faults import (
    TEXT_LENGTH_MAX,
    Faults,
    Patterns,
    field_faults,
    fits,
    list_faults,
    names_faults,
    no_priority,
    pattern_faults,
    priority_faults,
    text_faults,
)

RULES_MAX = 1000
PATTERNS_TOTAL_MAX = 10_000
NAME_LENGTH_MAX = 128
KEY_LENGTH_MAX = 317
"""Of a label: a prefix of 253, a slash, 63."""
SEVERITY_LABELS = ("CRITICAL", "HIGH", "MEDIUM", "LOW", "INFORMATIONAL")

PATTERN_MATCHERS = (
    "rule",
    "source",
    "tags",
    "namespace",
    "pod",
    "workload",
    "container",
    "node",
    "cluster",
    "user",
    "hostname",
    "image",
)
_DAY = re.compile(r"\d{4}-\d\d-\d\d\Z", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class MatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``match`` of a rule: all that are given must hold."""

    rule: Patterns = UNSET
    priority: str | list[Any] | dict[str, Any] | UnsetType = UNSET
    source: Patterns = UNSET
    tags: Patterns = UNSET
    namespace: Patterns = UNSET
    pod: Patterns = UNSET
    workload: Patterns = UNSET
    container: Patterns = UNSET
    node: Patterns = UNSET
    cluster: Patterns = UNSET
    user: Patterns = UNSET
    hostname: Patterns = UNSET
    image: Patterns = UNSET
    labels: dict[str, str | list[str]] | UnsetType = UNSET
    namespace_labels: dict[str, str | list[str]] | UnsetType = UNSET
    fields: dict[str, Any] | UnsetType = UNSET

    def faults(self) -> Faults:
        for name in PATTERN_MATCHERS:
            yield from pattern_faults(name, getattr(self, name))
        if self.priority is not UNSET:
            yield from priority_faults(self.priority)
        for name in ("labels", "namespace_labels"):
            labels = getattr(self, name)
            yield from names_faults(name, labels, KEY_LENGTH_MAX)
            for label, patterns in (labels or {}).items():
                yield from pattern_faults(f"{name}.{label}", patterns)
        yield from names_faults("fields", self.fields, NAME_LENGTH_MAX)
        for name, wanted in (self.fields or {}).items():
            yield from field_faults(f"fields.{name}", wanted)


class SilenceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``silence`` of a rule: until when, why, and who says so. All three are required."""

    until: str = ""
    reason: str = ""
    by: str = ""

    def faults(self) -> Faults:
        for name in ("reason", "by"):
            yield from text_faults(name, getattr(self, name))
        try:
            until_secs(self.until)
        except ValueError as error:
            yield "until", str(error)


class AdviceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``remediation`` of a rule."""

    text: str = ""
    url: str = ""

    def faults(self) -> Faults:
        if not self.text.strip() and not self.url:
            yield "", "needs a text or a url"
        if len(self.text) > TEXT_LENGTH_MAX:
            yield "text", f"is longer than {TEXT_LENGTH_MAX} characters, the most that Security Hub takes"
        if self.url and not fits(self.url, Url):
            yield "url", "must be a URL that begins with https:// or http://, of at most 2048 characters"


class RuleSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One rule of the house: which alerts, and what becomes of them."""

    name: str = ""
    match: MatchSettings = msgspec.field(default_factory=MatchSettings)
    sinks: list[str] | UnsetType = UNSET
    minimum_priority: dict[str, str] | UnsetType = UNSET
    severity: str | UnsetType = UNSET
    finding_types: list[str] | UnsetType = UNSET
    remediation: AdviceSettings | None = None
    drop: bool = False
    silence: SilenceSettings | None = None

    def faults(self) -> Faults:
        if _CONTROL.search(self.name) or len(self.name) > NAME_LENGTH_MAX:
            yield "name", f"must have at most {NAME_LENGTH_MAX} characters, none of them a control character"
        yield from list_faults("sinks", self.sinks)
        for sink, name in (self.minimum_priority or {}).items():
            if rank(name) is None:
                yield f"minimum_priority.{sink}", no_priority(name)
        if self.minimum_priority == {}:
            yield "minimum_priority", "is empty"
        if self.severity is not UNSET and self.severity.upper() not in SEVERITY_LABELS:
            yield "severity", f"{self.severity!r} is not one of {', '.join(SEVERITY_LABELS)}"
        yield from list_faults("finding_types", self.finding_types, TYPES_MAX)
        for place, kind in enumerate(self.finding_types or ()):
            if not fits(kind, FindingType):
                yield f"finding_types[{place}]", f"{kind!r} is no finding type of Security Hub: {_TYPE_HELP}"
        yield from self._clashes()

    def _clashes(self) -> Faults:
        others = {
            "sinks": self.sinks,
            "minimum_priority": self.minimum_priority,
            "severity": self.severity,
            "finding_types": self.finding_types,
            "remediation": self.remediation,
        }
        given = [name for name, value in others.items() if value is not UNSET and value is not None]
        if self.drop and self.silence is not None:
            yield "drop", "excludes every other action: silence" + "".join(f", {name}" for name in given)
        elif given and (self.drop or self.silence is not None):
            yield "drop" if self.drop else "silence", f"excludes every other action: {', '.join(given)}"


_TYPE_HELP = (
    "namespace, category and classifier with slashes between, the namespace one of Software and Configuration Checks, TTPs, "
    "Effects, Unusual Behaviors, Sensitive Data Identifications"
)


def name_of(rule: RuleSettings, place: int) -> str:
    """The rule's name; ``rule 1`` and so on where it has none."""
    return rule.name or f"rule {place + 1}"


def patterns_of(value: Patterns) -> list[str]:
    """A list in any case."""
    if isinstance(value, str):
        return [value]
    return value or []


def until_secs(text: str) -> float:
    """End of a silence, seconds since 1970; raises ValueError with what is wrong."""
    if not text:
        raise ValueError("is required: a date, or a time with its zone")
    try:
        until = datetime.fromisoformat(f"{text}T00:00:00+00:00" if _DAY.match(text) else text)
        seconds = until.timestamp() if until.tzinfo else math.nan
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text[:40]!r} is not a date (2026-12-01) or a time (2026-12-01T18:00:00+01:00)"
        ) from None
    if math.isnan(seconds):
        raise ValueError(f"{text[:40]!r} has no time zone: write {until:%Y-%m-%dT%H:%M:%S}Z for UTC")
    return seconds


def iso_of(until: float) -> str:
    """``2026-12-01T00:00:00Z``."""
    return datetime.fromtimestamp(until, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def ranks_of(priority: Any) -> frozenset[int]:
    """Ranks of the priorities that a matcher without faults lets through."""
    if isinstance(priority, dict):
        lowest = rank(priority["at_least"])
        return frozenset(range((lowest or 0) + 1))
    return frozenset(found for name in patterns_of(priority) if (found := rank(name)) is not None)


def field_text(value: Any) -> str:
    """What an output field is compared with: text as it is, numbers and booleans in their JSON form."""
    return value if isinstance(value, str) else json_encode(value).decode()


# ---- faults that only the whole configuration tells -------------------------------------------------


def faults_among(
    rules: Sequence[RuleSettings], *, sinks: Iterable[str], kept: Mapping[str, Sequence[str]]
) -> Faults:
    """``kept``: by the name of the matcher, the labels that enrichment keeps, prefixes with a star."""
    if len(rules) > RULES_MAX:
        yield "rules", f"there are {len(rules)}, more than {RULES_MAX}"
    known = list(sinks)
    seen: dict[str, int] = {}
    for place, rule in enumerate(rules):
        first = seen.setdefault(name_of(rule, place), place)
        if first != place:
            yield f"rules[{place}].name", f"is the name of rules[{first}] too"
        for where, sink in _sinks_named(rule):
            if sink not in known:
                yield f"rules[{place}].{where}", f"{sink!r} is no sink (there are: {', '.join(known)})"
        for matcher, allowed in kept.items():
            for label in getattr(rule.match, matcher) or ():
                if not _is_kept(label, allowed):
                    text = f"label {label} is not kept: add it to enrichment.kubernetes.{matcher}"
                    yield f"rules[{place}].match.{matcher}.{label}", text
    total = sum(_count(rule.match) for rule in rules)
    if total > PATTERNS_TOTAL_MAX:
        yield "rules", f"have {total} patterns together, more than {PATTERNS_TOTAL_MAX}"


def _sinks_named(rule: RuleSettings) -> Iterator[tuple[str, str]]:
    for place, sink in enumerate(rule.sinks or ()):
        yield f"sinks[{place}]", sink
    for sink in rule.minimum_priority or ():
        yield f"minimum_priority.{sink}", sink


def _is_kept(label: str, allowed: Sequence[str]) -> bool:
    return any(
        label.startswith(key.removesuffix("*")) if key.endswith("*") else label == key for key in allowed
    )


def _count(match: MatchSettings) -> int:
    count = sum(len(patterns_of(getattr(match, name))) for name in PATTERN_MATCHERS)
    for labels in (match.labels, match.namespace_labels):
        count += sum(len(patterns_of(patterns)) for patterns in (labels or {}).values())
    for wanted in (match.fields or {}).values():
        values = [*wanted.values()] if isinstance(wanted, dict) else [wanted]
        count += sum(len(value) if isinstance(value, list) else 1 for value in values)
    return count
