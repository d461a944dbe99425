"""The rules of the house: every matcher and action, first match wins, and nothing an alert says can make them slow."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forwarder.alert import PRIORITIES, present
from forwarder.asff_context import Advice
from forwarder.asff_schema import Severity
from forwarder.facts import Facts, facts_of
from forwarder.record import TEXT, UNPARSED, Record
from forwarder.rules import NO_RULE, REMEMBERED_MAX, Passed, RuleBook, Rules, Verdict
from forwarder.rules_glob import TEXT_LENGTH_MAX, glob
from forwarder.rules_match import TAGS_MAX
from forwarder.rules_settings import SEVERITY_LABELS, RuleSettings
from tests.samples import REAL_BODIES, record_of

AT = 1_790_000_000.0
"""2026-09-21."""

ALERT: dict[str, Any] = {
    "hostname": "ip-10-0-1-17",
    "output": "something happened",
    "output_fields": {
        "proc.name": "bash",
        "fd.name": "/etc/shadow",
        "user.uid": 0,
        "proc.is_exe_writable": True,
        "proc.duration": 1.5,
        "proc.aname": ["sh", "init"],
        "user.name": "<NA>",
        "proc.tty": "",
        "container.image.repository": "docker.io/library/nginx",
        "container.image.tag": "1.27",
        "ka.user.name": "system:serviceaccount:ci:deployer",
        "evt.args": None,
    },
    "priority": "Warning",
    "rule": "Contact K8S API Server From Container",
    "source": "syscall",
    "tags": ["container", "mitre_execution", "T1059.004"],
}
ENRICHMENT = msgspec.json.encode(
    {
        "cluster": "shop-prod",
        "kubernetes": {
            "namespace": "team-shop",
            "pod": "web-7d4b9-x2x1z",
            "container": "app",
            "workload": {"kind": "Deployment", "name": "web"},
            "labels": {"app": "web", "team": "a"},
            "namespace_labels": {"team": "shop"},
        },
        "node": {"name": "node-7"},
    }
)[1:-1]


def rule(**members: Any) -> RuleSettings:
    return msgspec.convert(members, RuleSettings)


def rules(*written: dict[str, Any], cluster: str = "") -> Rules:
    return Rules([rule(**members) for members in written], cluster=cluster)


def facts(**changes: Any) -> Facts:
    return facts_of(record_of(ALERT | changes, enrichment=ENRICHMENT))


def bare(**changes: Any) -> Facts:
    """Without enrichment and without anything but a rule."""
    return facts_of(record_of({"rule": "R", "priority": "Warning", "output": "o"} | changes))


def matches(match: dict[str, Any], about: Facts | None = None) -> bool:
    return rules({"match": match}).decide(about or facts(), AT) is not NO_RULE


# ---- matchers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({"rule": "Contact K8S API Server From Container"}, True),
        ({"rule": "Contact K8S API*"}, True),
        ({"rule": "contact k8s api*"}, False),
        ({"rule": ["Other", "*From Container"]}, True),
        ({"rule": ["Other", "Contact"]}, False),
        ({"priority": "warning"}, True),
        ({"priority": "Error"}, False),
        ({"priority": ["notice", "WARNING"]}, True),
        ({"priority": ["notice", "error"]}, False),
        ({"priority": {"at_least": "warning"}}, True),
        ({"priority": {"at_least": "Notice"}}, True),
        ({"priority": {"at_least": "error"}}, False),
        ({"source": "syscall"}, True),
        ({"source": ["k8s_audit", "sys*"]}, True),
        ({"source": "k8s_audit"}, False),
        ({"tags": "T1059*"}, True),
        ({"tags": ["network", "mitre_execution"]}, True),
        ({"tags": ["network", "mitre_*_x"]}, False),
        ({"namespace": "team-*"}, True),
        ({"namespace": ["shop", "pay"]}, False),
        ({"pod": "web-*"}, True),
        ({"pod": "db-*"}, False),
        ({"workload": "Deployment/web*"}, True),
        ({"workload": "web"}, True),
        ({"workload": "Deployment"}, False),
        ({"workload": "StatefulSet/*"}, False),
        ({"container": "app"}, True),
        ({"container": "istio-*"}, False),
        ({"node": "node-?"}, True),
        ({"node": "node-??"}, False),
        ({"cluster": "*-prod"}, True),
        ({"cluster": "*-stage"}, False),
        ({"user": "system:serviceaccount:ci:*"}, True),
        ({"user": "admin"}, False),
        ({"hostname": "ip-10-*"}, True),
        ({"hostname": "ip-11-*"}, False),
        ({"image": "docker.io/library/*"}, True),
        ({"image": "docker.io/library/nginx:1.27"}, True),
        ({"image": "docker.io/library/nginx"}, False),
        ({"labels": {"app": "w*"}}, True),
        ({"labels": {"app": "web", "team": ["b", "a"]}}, True),
        ({"labels": {"app": "web", "team": "b"}}, False),
        ({"labels": {"tier": "*"}}, False),
        ({"namespace_labels": {"team": "shop"}}, True),
        ({"namespace_labels": {"team": "a"}}, False),
        ({"fields": {"proc.name": "bash"}}, True),
        ({"fields": {"proc.name": "ba*"}}, False),
        ({"fields": {"user.uid": 0}}, True),
        ({"fields": {"user.uid": "0"}}, True),
        ({"fields": {"user.uid": 1}}, False),
        ({"fields": {"proc.is_exe_writable": True}}, True),
        ({"fields": {"proc.is_exe_writable": "true"}}, True),
        ({"fields": {"proc.duration": 1.5}}, True),
        ({"fields": {"proc.aname": '["sh","init"]'}}, True),
        ({"fields": {"proc.aname": {"glob": '*"init"*'}}}, True),
        ({"fields": {"fd.name": {"glob": "/etc/*"}}}, True),
        ({"fields": {"fd.name": {"glob": ["/usr/*", "/etc/?hadow"]}}}, True),
        ({"fields": {"fd.name": {"glob": "/usr/*"}}}, False),
        ({"fields": {"user.uid": {"one_of": [1000, 0]}}}, True),
        ({"fields": {"user.uid": {"one_of": [1000, "root"]}}}, False),
        ({"fields": {"proc.name": "bash", "user.uid": 1000}}, False),
        ({}, True),
    ],
    ids=str,
)
def test_each_matcher(match: dict[str, Any], *, expected: bool) -> None:
    assert matches(match) is expected


def test_a_rule_without_match_is_for_every_alert() -> None:
    assert rules({"drop": True}).decide(bare(), AT).drop


@pytest.mark.parametrize("failing", ["rule", "priority", "namespace", "labels", "fields"])
def test_all_matchers_must_hold(failing: str) -> None:
    holding: dict[str, Any] = {
        "rule": "Contact*",
        "priority": {"at_least": "notice"},
        "namespace": "team-shop",
        "labels": {"app": "web"},
        "fields": {"proc.name": "bash"},
    }
    other: dict[str, Any] = {
        "rule": "X*",
        "priority": "debug",
        "namespace": "x",
        "labels": {"app": "x"},
        "fields": {"proc.name": "x"},
    }
    assert matches(holding)
    assert not matches(holding | {failing: other[failing]})


@pytest.mark.parametrize(
    "match",
    [
        *({name: "*"} for name in ("tags", "namespace", "pod", "workload", "container", "node", "cluster")),
        *({name: "*"} for name in ("user", "hostname", "image")),
        {"labels": {"app": "*"}},
        {"namespace_labels": {"team": "*"}},
        *({"fields": {name: {"glob": "*"}}} for name in ("proc.name", "user.name", "proc.tty", "evt.args")),
    ],
    ids=str,
)
def test_what_is_absent_matches_nothing(match: dict[str, Any]) -> None:
    absent = {"output_fields": {"user.name": "<NA>", "proc.tty": "", "evt.args": None}}
    assert not matches(match, bare(**absent))


def test_the_configured_cluster_is_the_cluster_of_every_alert() -> None:
    on = rules({"match": {"cluster": "shop-*"}}, cluster="shop-prod")
    assert on.decide(bare(), AT).rule == "rule 1"


@pytest.mark.parametrize("priority", [*PRIORITIES, "Info"])
def test_priorities_in_any_case(priority: str) -> None:
    assert matches({"priority": priority.upper()}, bare(priority=priority))
    assert matches({"priority": {"at_least": priority.lower()}}, bare(priority=priority))


def test_an_unknown_priority_is_a_warning() -> None:
    assert matches({"priority": "warning"}, bare(priority="Loud"))


def test_only_the_first_tags_are_looked_at() -> None:
    tags = [f"t{number}" for number in range(TAGS_MAX + 1)]
    assert matches({"tags": f"t{TAGS_MAX - 1}"}, bare(tags=tags))
    assert not matches({"tags": f"t{TAGS_MAX}"}, bare(tags=tags))


def test_only_the_beginning_of_a_text_is_looked_at() -> None:
    long = bare(output_fields={"proc.cmdline": "a" * TEXT_LENGTH_MAX + "b"})
    assert matches({"fields": {"proc.cmdline": {"glob": "a*"}}}, long)
    assert not matches({"fields": {"proc.cmdline": {"glob": "*b"}}}, long)


# ---- first match wins -------------------------------------------------------------------------------


def test_the_first_rule_that_matches_decides() -> None:
    on = rules(
        {"name": "other", "match": {"rule": "Other"}, "drop": True},
        {"name": "first", "match": {"rule": "Contact*"}, "severity": "LOW"},
        {"name": "second", "match": {"namespace": "team-shop"}, "drop": True},
    )
    verdict = on.decide(facts(), AT)
    assert (verdict.rule, verdict.severity, verdict.drop) == ("first", "LOW", False)


def test_a_rule_without_action_exempts_from_those_below() -> None:
    on = rules({"match": {"namespace": "team-shop"}}, {"drop": True})
    assert on.decide(facts(), AT) == Verdict(rule="rule 1")
    assert on.decide(bare(), AT).drop


def test_without_a_match_there_is_no_rule() -> None:
    assert rules({"match": {"rule": "Other"}}).decide(facts(), AT) is NO_RULE
    assert Rules().decide(facts(), AT) is NO_RULE
    assert not Rules()
    assert len(rules({}, {})) == 2


MATCHES: list[dict[str, Any]] = [
    {"rule": "*Shell*"},
    {"rule": ["Terminal shell in container", "Contact*"]},
    {"priority": {"at_least": "error"}},
    {"priority": ["notice", "debug"], "source": "syscall"},
    {"source": "k8s_audit"},
    {"tags": ["mitre_*", "T1059"]},
    {"tags": "container", "fields": {"proc.name": {"glob": "?ash"}}},
    {"hostname": "ip-*"},
    {"image": "*nginx*"},
    {"fields": {"user.uid": {"one_of": [0, 1000]}, "proc.name": {"glob": "*sh"}}},
    {"namespace": "default"},
]


@given(st.lists(st.sampled_from(MATCHES), max_size=12), st.sampled_from(REAL_BODIES))
@settings(max_examples=300, deadline=None)
def test_bits_say_the_same_as_one_rule_after_the_other(written: list[dict[str, Any]], body: bytes) -> None:
    """Real alerts, tried rule by rule, each in a set of its own."""
    about = facts_of(record_of(body))
    singly = [rules({"match": match}).decide(about, AT) is not NO_RULE for match in written]
    expected = f"rule {singly.index(True) + 1}" if True in singly else ""
    together = rules(*({"match": match} for match in written))
    assert together.decide(about, AT).rule == expected
    assert together.decide(about, AT).rule == expected, "and when it is remembered"
    passed = list(together.trace(about, AT))
    assert [step.name for step in passed if not step.why] == [expected] * bool(expected)
    assert len(passed) == (singly.index(True) + 1 if expected else len(written))


# ---- actions ----------------------------------------------------------------------------------------


def verdict_of(**actions: Any) -> Verdict:
    return rules(actions).decide(facts(), AT)


def reason(verdict: Verdict, sink: str, rank: int = 4) -> str:
    """Against the usual minimum: debug for logs, notice for findings."""
    findings = sink == "security_hub"
    return verdict.keeps_out(sink, rank, 5 if findings else 7, findings=findings)


def test_no_rule_leaves_the_sinks_own_minimum() -> None:
    assert [reason(NO_RULE, "security_hub", rank) for rank in (5, 6)] == ["", "minimum_priority"]
    assert reason(NO_RULE, "cloudwatch_logs", 7) == ""


def test_drop() -> None:
    verdict = verdict_of(drop=True)
    assert [reason(verdict, sink) for sink in ("cloudwatch_logs", "security_hub")] == ["drop", "drop"]


def test_sinks() -> None:
    verdict = verdict_of(sinks=["cloudwatch_logs"])
    assert verdict.sinks == frozenset({"cloudwatch_logs"})
    assert reason(verdict, "cloudwatch_logs") == ""
    assert reason(verdict, "security_hub") == "route"
    assert reason(verdict, "cloudwatch_logs", 8) == "minimum_priority", "a route does not lift the minimum"


def test_minimum_priority_takes_the_place_of_the_sinks_own() -> None:
    verdict = verdict_of(minimum_priority={"security_hub": "Error", "cloudwatch_logs": "info"})
    assert [reason(verdict, "security_hub", rank) for rank in (3, 4)] == ["", "minimum_priority"]
    assert [reason(verdict, "cloudwatch_logs", rank) for rank in (6, 7)] == ["", "minimum_priority"]
    lower = verdict_of(minimum_priority={"security_hub": "debug"})
    assert reason(lower, "security_hub", 7) == ""
    other = verdict_of(minimum_priority={"cloudwatch_logs": "error"})
    assert reason(other, "security_hub", 5) == "", "another sink keeps its own"


@pytest.mark.parametrize("label", SEVERITY_LABELS)
def test_severity(label: str) -> None:
    assert verdict_of(severity=label.lower()).severity == label
    assert msgspec.convert({"Label": label}, Severity).Label == label, "ASFF knows it"


def test_finding_types() -> None:
    assert verdict_of(finding_types=["TTPs/Execution", "Effects"]).finding_types == (
        "TTPs/Execution",
        "Effects",
    )


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"text": "Look", "url": "https://wiki/x"}, Advice("Look", "https://wiki/x")),
        ({"text": "Look"}, Advice("Look", None)),
        ({"url": "https://wiki/x"}, Advice(None, "https://wiki/x")),
    ],
)
def test_remediation(written: dict[str, str], expected: Advice) -> None:
    assert verdict_of(remediation=written).remediation == expected


SILENCE = {"until": "2026-12-01", "reason": "nightly scan", "by": "maria"}
UNTIL = 1_796_083_200.0
"""2026-12-01 00:00 UTC."""


def test_a_silence_keeps_the_logs_and_sends_no_finding() -> None:
    verdict = verdict_of(silence=SILENCE)
    assert verdict.silenced
    assert (reason(verdict, "cloudwatch_logs"), reason(verdict, "security_hub")) == ("", "silence")


@pytest.mark.parametrize(
    ("until", "end"),
    [
        ("2026-12-01", UNTIL),
        ("2026-12-01T00:00:00Z", UNTIL),
        ("2026-12-01T18:00:00+01:00", UNTIL + 17 * 3600),
        ("2026-12-01 18:00:00.5-05:30", UNTIL + 23.5 * 3600 + 0.5),
    ],
)
def test_a_silence_ends_by_itself(until: str, end: float) -> None:
    on = rules({"name": "s", "silence": SILENCE | {"until": until}}, {"name": "below", "severity": "LOW"})
    assert on.decide(facts(), end - 0.001).rule == "s"
    assert on.decide(facts(), end).rule == "below", "as if it were not there"
    assert on.decide(facts(), end - 0.001).rule == "s", "also when the clock steps back"


def test_silences_end_one_after_the_other() -> None:
    days = ["2026-12-03", "2026-12-01", "2026-12-02"]
    on = rules(*({"name": day, "silence": SILENCE | {"until": day}} for day in days))
    hours = [on.decide(facts(), UNTIL + hour * 3600).rule for hour in (-1, 1, 25, 49)]
    assert hours == ["2026-12-03", "2026-12-03", "2026-12-03", ""]
    assert [step.name for step in on.trace(facts(), UNTIL + 49 * 3600)] == days


# ---- the book ---------------------------------------------------------------------------------------


class Clock:
    """A clock to set."""

    def __init__(self) -> None:
        self.at = AT

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


def record(**changes: Any) -> Record:
    return msgspec.structs.replace(record_of(ALERT, enrichment=ENRICHMENT), **changes)


def test_the_book_counts_by_rule_and_sink(clock: Clock) -> None:
    book = RuleBook([rule(name="a", match={"rule": "Other"}), rule(name="b", severity="HIGH")], now=clock)
    for sink in ("cloudwatch_logs", "cloudwatch_logs", "security_hub"):
        verdict, about = book.decide(record(), sink)
        assert verdict.rule == "b"
        assert about == facts()
    assert book.status() == {
        "rules": [
            {"name": "a", "matched": {}},
            {"name": "b", "matched": {"cloudwatch_logs": 2, "security_hub": 1}},
        ],
        "silences": [],
    }


def test_without_rules_nothing_is_read(clock: Clock) -> None:
    assert RuleBook(now=clock).decide(record(body=b"{broken"), "security_hub") == (NO_RULE, None)


def test_what_nobody_could_read_meets_no_rule(clock: Clock) -> None:
    book = RuleBook([rule(drop=True)], now=clock)
    assert book.decide(record(kind=UNPARSED, body=b"\xff"), "cloudwatch_logs") == (NO_RULE, None)


def test_text_alerts_and_falcos_own_messages_meet_rules(clock: Clock) -> None:
    text = record(kind=TEXT, body=b'{"output":"13:44:05: Warning x","priority":"Warning"}', enrichment=b"")
    internal = record_of({"rule": "Falco internal: metrics snapshot", "priority": "Info", "output": "x"})
    book = RuleBook(
        [rule(name="own", match={"rule": "Falco internal: *"}, drop=True), rule(name="rest")], now=clock
    )
    assert book.decide(text, "cloudwatch_logs")[0].rule == "rest"
    assert book.decide(internal, "cloudwatch_logs")[0].drop


def test_silences_in_the_status(clock: Clock) -> None:
    book = RuleBook([rule(name="scan", silence=SILENCE)], now=clock)
    for sink in ("cloudwatch_logs", "security_hub", "security_hub"):
        book.decide(record(), sink)
    (silence,) = book.status()["silences"]
    assert silence == {
        "name": "scan",
        "until": "2026-12-01T00:00:00Z",
        "reason": "nightly scan",
        "by": "maria",
        "state": "active",
        "silenced": 2,
    }
    clock.at = UNTIL
    assert book.decide(record(), "security_hub")[0] is NO_RULE
    (silence,) = book.status()["silences"]
    assert (silence["state"], silence["silenced"]) == ("expired", 2)


def test_counts_survive_where_the_name_stays(clock: Clock) -> None:
    book = RuleBook([rule(name="a", match={"rule": "Other"}), rule(name="b")], now=clock)
    book.decide(record(), "s")
    before = book.rules
    book.replace([rule(name="b"), rule(name="c")])
    book.decide(record(), "s")
    assert [one["matched"] for one in book.status()["rules"]] == [{"s": 2}, {}]
    book.replace([])
    book.replace([rule(name="b")])
    assert book.status()["rules"] == [{"name": "b", "matched": {}}], "what is gone is forgotten"
    assert before.names == ("a", "b"), "a set of rules never changes"


# ---- why not ----------------------------------------------------------------------------------------


def test_why_earlier_rules_did_not_match() -> None:
    on = rules(
        {"name": "ended", "silence": SILENCE | {"until": "2026-01-01"}},
        {"name": "by rule", "match": {"rule": "X", "namespace": "y"}},
        {"name": "by label", "match": {"labels": {"tier": "*"}}},
        {"name": "by tag", "match": {"tags": "network"}},
        {"name": "by field", "match": {"fields": {"fd.name": "x"}}},
        {"name": "this"},
        {"name": "never looked at"},
    )
    about = facts(output_fields={"fd.name": "\x1b[2J" + "x" * 100})
    assert list(on.trace(about, AT)) == [
        Passed("ended", "its silence ended 2026-01-01T00:00:00Z"),
        Passed("by rule", 'rule is "Contact K8S API Server From Container"'),
        Passed("by label", "the alert has no labels.tier"),
        Passed("by tag", 'tags is "container, mitre_execution, T1059.004"'),
        Passed("by field", f'fields.fd.name is "\\u001b[2J{"x" * 76}..."'),
        Passed("this", ""),
    ]


# ---- globs ------------------------------------------------------------------------------------------

PATTERNS = st.text("ab*?", min_size=1, max_size=12)
TEXTS = st.text("ab", max_size=16)


@given(PATTERNS, TEXTS)
@example("a*?b", "ab")
@example("*a?b*", "aaabb")
@example("?*?", "a")
@example("**", "")
@example("a*a", "a")
@example("*ab*ab", "abab")
@settings(max_examples=3000, deadline=None)
def test_globs_against_the_standard_librarys(pattern: str, text: str) -> None:
    assert glob(pattern)(text) is fnmatchcase(text, pattern)


@given(st.text(max_size=8), st.text(max_size=8))
@settings(max_examples=300, deadline=None)
def test_everything_else_is_literal(before: str, after: str) -> None:
    """Brackets, backslashes, dots, line ends: characters like others."""
    literal = (before + "[a].\\n\n$" + after).replace("*", "").replace("?", "")
    for pattern in (f"{literal}*", f"*{literal}", f"*{literal}*", f"?{literal}", f"{literal}?*"):
        assert glob(pattern)(pattern.replace("*", "xy").replace("?", "z"))
        assert not glob(pattern)("x[a].\\n$")


HOSTILE = [
    ("*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b", "a"),
    ("*" + "?a" * 200 + "*b", "a"),
    ("*" + "a" * 250 + "?" + "a" * 250 + "b*", "a"),
    ("*" + "ab" * 250 + "c*", "ab"),
    ("*?*?*?*?*?*?*?*b", "a"),
    ("?" * 500 + "*b", "a"),
]


@pytest.mark.parametrize(("pattern", "unit"), HOSTILE, ids=lambda value: value[:12])
def test_no_pattern_and_no_text_explodes(pattern: str, unit: str) -> None:
    """Doubling the text at most doubles the work: counted in CPU time with a wide margin, the best of three."""
    match = glob(pattern)

    def cost(length: int) -> float:
        text = (unit * length)[:length]
        best = float("inf")
        for _ in range(3):
            begun = time.process_time()
            assert not match(text)
            best = min(best, time.process_time() - begun)
        return best

    assert cost(100_000) < 0.5
    assert cost(100_000) < 40 * cost(10_000) + 0.01


# ---- what is remembered -----------------------------------------------------------------------------


def remembered(on: Rules) -> list[Any]:
    return [value for column in on._columns.all for value in column.memo]


def test_a_flood_of_distinct_values_is_not_remembered() -> None:
    on = rules(
        {"match": {"rule": "A*", "pod": "x*", "tags": "t*"}},
        {"match": {"pod": "*-x", "fields": {"proc.cmdline": {"glob": "*y*"}}}},
        {"name": "all"},
    )
    about = facts()
    most = 0
    for number in range(3 * REMEMBERED_MAX):
        end = f"{number}-x"
        one = about._replace(rule=f"A{end}", pod=f"pod-{end}", fields={"proc.cmdline": f"run {end}"})
        assert on.decide(one, AT).rule == "all"
        most = max(most, sum(len(column.memo) for column in on._columns.all))
    assert REMEMBERED_MAX / 2 < most <= REMEMBERED_MAX


def test_large_values_are_not_remembered() -> None:
    on = rules({"match": {"rule": "*z", "tags": "z"}})
    on.decide(facts()._replace(rule="r" * 300 + "z", tags=["t" * 200, "u" * 200]), AT)
    on.decide(facts()._replace(rule="rz", tags=["t"] * 20), AT)
    assert remembered(on) == ["rz"]


def test_real_alerts_are_decided_alike_before_and_after_they_are_remembered() -> None:
    on = rules(*({"match": match} for match in MATCHES))
    about = [facts_of(record_of(body)) for body in REAL_BODIES]
    first = [on.decide(one, AT).rule for one in about]
    assert [on.decide(one, AT).rule for one in about] == first
    assert len(set(first)) >= 5, "the rules are for these alerts"
    assert all(present(one.rule) for one in about)
