"""The section ``rules`` as a person writes it: every fault at once, each with its line, and what is right loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from forwarder.config import ConfigError, Fault, documented, load
from forwarder.rules import Rules
from forwarder.rules_faults import NAMES_MAX, PATTERNS_MAX, TEXT_LENGTH_MAX
from forwarder.rules_glob import PATTERN_LENGTH_MAX, STARS_MAX
from forwarder.rules_settings import (
    KEY_LENGTH_MAX,
    NAME_LENGTH_MAX,
    PATTERNS_TOTAL_MAX,
    RULES_MAX,
    RuleSettings,
)
from forwarder.settings import Settings, load_settings

MINIMAL = """cluster: {name: prod}
aws: {region: eu-west-1}
sinks:
  cloudwatch_logs: {enabled: true, log_group: /falco/prod}
"""

EVERY_FAULT = """\
cluster: {name: prod}
aws: {region: eu-west-1}
sinks:
  cloudwatch_logs: {enabled: true, log_group: /falco/prod}
enrichment:
  kubernetes: {labels: [app, "example.com/*"]}
rules:
  - name: twice
    mach: {rule: x}
  - name: twice
    match:
      ruel: x
      rule: 5
      priority: loud
      source: []
      tags: [a, ""]
      namespace:
      pod: ["ok", 7]
      labels:
        team: x
        example.com/tier: ["", y]
      namespace_labels: {}
      fields:
        proc.name: [a, b]
        fd.name: {golb: "/etc/*"}
        user.uid: {one_of: []}
        user.name: {glob: 5}
        a.null:
        a.list: {one_of: 5}
        a.both: {glob: x, one_of: [.nan]}
  - match: {priority: {at_lest: error}}
    sinks: [cloudwatch_log]
    minimum_priority:
      s3: error
      security_hub: high
    severity: severe
    finding_types:
      - TTPs/Execution
      - Malware
      - TTPs/a/b/c
    remediation:
      url: wiki
  - remediation: {}
    match: {priority: {at_least: [error]}}
  - match: {priority: [error, louder]}
    drop: true
    severity: HIGH
    sinks: []
  - silence: {until: 2026-99-99}
    finding_types: []
  - silence:
      until: 2026-12-01T18:00:00
      reason: " "
      by: me
    drop: true
  - drop: "yes"
    minimum_priority: {}
  - name: rule 10
  - just text
  - match: {priority: [], fields: 5}
    silence: {until: soon, reason: x, by: y, unti: z}
  - name: "tab\\there"
    match: {node: "@long", hostname: "*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a"}
"""

FAULTS = [
    "rules[0].mach (line 9): unknown key, did you mean match?",
    "rules[1].name (line 10): is the name of rules[0] too",
    "rules[1].match.ruel (line 12): unknown key, did you mean rule?",
    "rules[1].match.rule (line 13): expected text or list, got int (5); put it in quotes",
    "rules[1].match.priority (line 14): 'loud' is not one of emergency, alert, critical, error, warning, notice, informational, debug",
    "rules[1].match.source (line 15): is an empty list: leave it out, or name something",
    "rules[1].match.tags[1] (line 16): is empty: what is absent matches nothing",
    "rules[1].match.namespace (line 17): expected text or list, got null (None)",
    "rules[1].match.pod (line 18): expected str, got int at [1] (['ok', 7]); put it in quotes",
    "rules[1].match.labels.team (line 20): label team is not kept: add it to enrichment.kubernetes.labels",
    "rules[1].match.labels.example.com/tier[0] (line 21): is empty: what is absent matches nothing",
    "rules[1].match.namespace_labels (line 22): is empty: leave it out, or name something",
    "rules[1].match.fields.proc.name (line 24): is a list: write {one_of: ['a', 'b']}",
    "rules[1].match.fields.fd.name.golb (line 25): unknown key, did you mean glob?",
    "rules[1].match.fields.user.uid.one_of (line 26): is an empty list: leave it out, or name something",
    "rules[1].match.fields.user.name.glob (line 27): must be a text or a list of texts, not 5",
    "rules[1].match.fields.a.null (line 28): must be a text, a number or a boolean, not None",
    "rules[1].match.fields.a.list.one_of (line 29): must be a list, not 5",
    "rules[1].match.fields.a.both (line 30): needs either glob or one_of",
    "rules[1].match.fields.a.both.one_of[0] (line 30): is no number that an alert can have",
    "rules[2].match.priority.at_lest (line 31): unknown key, did you mean at_least?",
    "rules[2].sinks[0] (line 32): 'cloudwatch_log' is no sink (there are: cloudwatch_logs, security_hub)",
    "rules[2].minimum_priority.s3 (line 34): 's3' is no sink (there are: cloudwatch_logs, security_hub)",
    "rules[2].minimum_priority.security_hub (line 35): 'high' is not one of emergency, alert, critical, error, warning, notice, informational, debug",
    "rules[2].severity (line 36): 'severe' is not one of CRITICAL, HIGH, MEDIUM, LOW, INFORMATIONAL",
    "rules[2].finding_types[1] (line 39): 'Malware' is no finding type of Security Hub: namespace, category and classifier with slashes between, the namespace one of Software and Configuration Checks, TTPs, Effects, Unusual Behaviors, Sensitive Data Identifications",
    "rules[2].finding_types[2] (line 40): 'TTPs/a/b/c' is no finding type of Security Hub: namespace, category and classifier with slashes between, the namespace one of Software and Configuration Checks, TTPs, Effects, Unusual Behaviors, Sensitive Data Identifications",
    "rules[2].remediation.url (line 42): must be a URL that begins with https:// or http://, of at most 2048 characters",
    "rules[3].remediation (line 43): needs a text or a url",
    "rules[3].match.priority.at_least (line 44): ['error'] is not one of emergency, alert, critical, error, warning, notice, informational, debug",
    "rules[4].match.priority[1] (line 45): 'louder' is not one of emergency, alert, critical, error, warning, notice, informational, debug",
    "rules[4].drop (line 46): excludes every other action: sinks, severity",
    "rules[4].sinks (line 48): is an empty list: leave it out, or name something",
    "rules[5].silence.reason (line 49): is required",
    "rules[5].silence.by (line 49): is required",
    "rules[5].silence.until (line 49): '2026-99-99' is not a date (2026-12-01) or a time (2026-12-01T18:00:00+01:00)",
    "rules[5].silence (line 49): excludes every other action: finding_types",
    "rules[5].finding_types (line 50): is an empty list: leave it out, or name something",
    "rules[6].silence.until (line 52): '2026-12-01T18:00:00' has no time zone: write 2026-12-01T18:00:00Z for UTC",
    "rules[6].silence.reason (line 53): is required",
    "rules[6].drop (line 55): excludes every other action: silence",
    "rules[7].drop (line 56): expected bool, got str ('yes')",
    "rules[7].minimum_priority (line 57): is empty",
    "rules[9] (line 59): must be a mapping, not str 'just text'",
    "rules[9].name (line 59): is the name of rules[8] too",
    "rules[10].match.fields (line 60): expected object, got int (5)",
    "rules[10].match.priority (line 60): is an empty list: leave it out, or name something",
    "rules[10].silence.unti (line 61): unknown key, did you mean until?",
    "rules[10].silence.until (line 61): 'soon' is not a date (2026-12-01) or a time (2026-12-01T18:00:00+01:00)",
    "rules[11].name (line 62): must have at most 128 characters, none of them a control character",
    "rules[11].match.node (line 63): has 513 characters, more than 512",
    "rules[11].match.hostname (line 63): has 17 stars, more than 16",
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "forwarder.yaml"


def loaded(file: Path, rules: Any, environment: dict[str, str] | None = None) -> Settings:
    file.write_text(MINIMAL + yaml.safe_dump({"rules": rules}))
    return load_settings(file, environment or {})


def faults_of(file: Path, rules: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        loaded(file, rules)
    return {fault.where: fault.what for fault in caught.value.faults}


# ---- faults -----------------------------------------------------------------------------------------


def test_every_fault_with_its_line(file: Path) -> None:
    file.write_text(EVERY_FAULT.replace("@long", "x" * (PATTERN_LENGTH_MAX + 1)))
    with pytest.raises(ConfigError) as caught:
        load_settings(file, {})
    assert [str(fault) for fault in caught.value.faults] == FAULTS


@pytest.mark.parametrize("kind", ["labels", "namespace_labels"])
def test_labels_that_nobody_keeps(file: Path, kind: str) -> None:
    kept = ["app", "app.kubernetes.io/name", "team"]
    assert loaded(file, [{"match": {kind: dict.fromkeys(kept, "x")}}]).rules
    (where, what), *_ = faults_of(file, [{"match": {kind: {"tier": "x"}}}]).items()
    assert where == f"rules[0].match.{kind}.tier"
    assert what == f"label tier is not kept: add it to enrichment.kubernetes.{kind}"


def test_a_sink_that_is_off_may_be_named(file: Path) -> None:
    assert loaded(file, [{"sinks": ["security_hub"], "minimum_priority": {"security_hub": "Error"}}]).rules


@pytest.mark.parametrize(
    ("match", "where"),
    [
        ({"priority": {}}, "priority"),
        ({"priority": None}, "priority"),
        ({"priority": [5]}, "priority[0]"),
        ({"fields": {"x": {}}}, "fields.x"),
        ({"fields": {"x": {"one_of": [None]}}}, "fields.x.one_of[0]"),
        ({"fields": {"x": {"one_of": [[1]]}}}, "fields.x.one_of[0]"),
        ({"fields": {"x": {"glob": []}}}, "fields.x.glob"),
        ({"fields": {"": 1}}, "fields"),
        ({"labels": {"app": None}}, "labels"),
        ({"labels": {"app": []}}, "labels.app"),
    ],
    ids=str,
)
def test_values_that_a_matcher_cannot_have(file: Path, match: Any, where: str) -> None:
    assert f"rules[0].match.{where}" in faults_of(file, [{"match": match}])


@pytest.mark.parametrize("written", [None, {}, "x", 5])
def test_rules_are_a_list(file: Path, written: Any) -> None:
    assert faults_of(file, written)["rules"].startswith("must be a list, not ")


LIMITS: list[tuple[str, Any, Any]] = [
    ("rules", [{}] * RULES_MAX, [{}] * (RULES_MAX + 1)),
    (
        "rules",
        [{"match": {"pod": ["a"] * PATTERNS_MAX}}] * (PATTERNS_TOTAL_MAX // PATTERNS_MAX),
        [{"match": {"pod": ["a"] * PATTERNS_MAX}}] * (PATTERNS_TOTAL_MAX // PATTERNS_MAX + 1),
    ),
    *(
        (where, [{"match": right}], [{"match": wrong}])
        for where, right, wrong in (
            ("rules[0].match.pod", {"pod": ["a"] * PATTERNS_MAX}, {"pod": ["a"] * (PATTERNS_MAX + 1)}),
            (
                "rules[0].match.pod",
                {"pod": "a" * PATTERN_LENGTH_MAX},
                {"pod": "a" * (PATTERN_LENGTH_MAX + 1)},
            ),
            ("rules[0].match.pod", {"pod": "*" * STARS_MAX}, {"pod": "*" * (STARS_MAX + 1)}),
            (
                "rules[0].match.fields",
                {"fields": {str(name): 1 for name in range(NAMES_MAX)}},
                {"fields": {str(name): 1 for name in range(NAMES_MAX + 1)}},
            ),
            (
                f"rules[0].match.fields.{'f' * (NAME_LENGTH_MAX + 1)}",
                {"fields": {"f" * NAME_LENGTH_MAX: 1}},
                {"fields": {"f" * (NAME_LENGTH_MAX + 1): 1}},
            ),
            (
                f"rules[0].match.labels.app.kubernetes.io/{'x' * KEY_LENGTH_MAX}",
                {"labels": {"app.kubernetes.io/name": "x"}},
                {"labels": {f"app.kubernetes.io/{'x' * KEY_LENGTH_MAX}": "x"}},
            ),
            (
                "rules[0].match.fields.x.one_of",
                {"fields": {"x": {"one_of": [1] * PATTERNS_MAX}}},
                {"fields": {"x": {"one_of": [1] * (PATTERNS_MAX + 1)}}},
            ),
        )
    ),
    (
        "rules[0].silence.reason",
        [{"silence": {"until": "2026-12-01", "by": "x", "reason": "r" * TEXT_LENGTH_MAX}}],
        [{"silence": {"until": "2026-12-01", "by": "x", "reason": "r" * (TEXT_LENGTH_MAX + 1)}}],
    ),
    (
        "rules[0].remediation.text",
        [{"remediation": {"text": "t" * TEXT_LENGTH_MAX}}],
        [{"remediation": {"text": "t" * (TEXT_LENGTH_MAX + 1)}}],
    ),
    ("rules[0].name", [{"name": "n" * NAME_LENGTH_MAX}], [{"name": "n" * (NAME_LENGTH_MAX + 1)}]),
]


@pytest.mark.parametrize(("where", "right", "wrong"), LIMITS, ids=lambda value: str(value)[:40])
def test_limits(file: Path, where: str, right: Any, wrong: Any) -> None:
    assert len(loaded(file, right).rules) == len(right)
    assert where in faults_of(file, wrong)


# ---- what loads -------------------------------------------------------------------------------------


def test_without_rules_there_are_none(file: Path) -> None:
    file.write_text(MINIMAL)
    assert load_settings(file, {}).rules == []


def test_an_expired_silence_is_no_fault(file: Path) -> None:
    """A configuration must not break by time passing."""
    (rule,) = loaded(file, [{"silence": {"until": "2020-01-01", "reason": "x", "by": "y"}}]).rules
    assert rule.silence is not None
    assert rule.silence.until == "2020-01-01"


def test_the_environment_replaces_all_rules(file: Path) -> None:
    found = loaded(
        file, [{"name": "file"}], {"FORWARDER__RULES": "[{name: a, severity: high}, {drop: true}]"}
    )
    assert [(rule.name, rule.drop) for rule in found.rules] == [("a", False), ("", True)]


def test_faults_of_rules_from_the_environment_name_it(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(file, [{"name": "file"}], {"FORWARDER__RULES": "[{severity: loud}]"})
    (fault,) = caught.value.faults
    assert (fault.where, fault.line) == ("rules[0].severity", 0)
    assert fault.what.endswith("(from FORWARDER__RULES)")


def test_rules_are_one_line_of_the_documentation() -> None:
    (leaf,) = (leaf for leaf in documented(Settings) if leaf.key.startswith("rules"))
    assert (leaf.key, leaf.environment, leaf.type, leaf.default) == ("rules", "FORWARDER__RULES", "list", [])
    assert "rules.md" in leaf.meaning


SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["a*", "error", "", "2026-12-01"])
KEYS = st.sampled_from(
    [
        "name",
        "match",
        "rule",
        "priority",
        "at_least",
        "labels",
        "app",
        "fields",
        "glob",
        "one_of",
        "sinks",
        "cloudwatch_logs",
        "minimum_priority",
        "severity",
        "drop",
        "silence",
        "until",
        "reason",
        "by",
        "text",
    ]
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(KEYS, TREES, max_size=4), max_size=3))
@hypothesis_settings(max_examples=300, deadline=None)
def test_whatever_is_written_there_rules_or_faults_come_out(
    tmp_path_factory: pytest.TempPathFactory, written: list[Any]
) -> None:
    """And what has no fault compiles."""
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    faults: list[Fault] = []
    try:
        found = loaded(file, written).rules
    except ConfigError as error:
        faults = error.faults
    else:
        assert len(Rules(found)) == len(written)
    last = file.read_text().count("\n")
    assert all(4 < fault.line <= last and fault.what for fault in faults), faults


# ---- lists of structs and lines, in any schema ------------------------------------------------------


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """An element with a key that has no default."""

    x: int
    next: RuleSettings | None = None


class Path_(msgspec.Struct, frozen=True, kw_only=True):  # noqa: N801 - a schema, not a path
    """A schema of its own."""

    points: list[Point] = msgspec.field(default_factory=list)
    by_name: dict[str, int] = msgspec.field(default_factory=dict)


def test_a_list_of_structs_in_any_schema(file: Path) -> None:
    file.write_text("points:\n- x: 1\n- {x: 2,\n   next: {name: n}}\n")
    points = load(Path_, file, {}).points
    assert [(point.x, point.next and point.next.name) for point in points] == [(1, None), (2, "n")]


def test_lines_of_what_is_missing_and_of_keys_with_dots(file: Path) -> None:
    file.write_text(
        "by_name:\n  a.b: 1\n  a: x\npoints:\n\n- next:\n    name: n\n- &it {x: 1}\n- *it\n- x: y\nother: 1\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(Path_, file, {})
    assert [(fault.where, fault.line) for fault in caught.value.faults] == [
        ("by_name", 1),
        ("points[0].x", 6),
        ("points[3].x", 10),
        ("other", 11),
    ]


def test_a_fault_without_a_line() -> None:
    assert str(Fault("a.b", "is wrong")) == "a.b: is wrong"
    assert str(Fault("a.b", "is wrong", 7)) == "a.b (line 7): is wrong"


@pytest.mark.parametrize("written", ["2026-12-01", "2026-99-99", "2026-12-01T10:00:00Z"])
def test_dates_are_text(file: Path, written: str) -> None:
    """A name that looks like a date is a name, and a bad date is not the fault of the whole file."""
    file.write_text(MINIMAL + f"replica: {{name: {written}}}\n")
    assert load_settings(file, {}).replica.name == written
