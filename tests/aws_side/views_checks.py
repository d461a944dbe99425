"""Queries, metric filters, alarms, dashboard, insights and the EventBridge rule, against what our events and findings really are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from forwarder.sensors_watch import RULE as SENSOR_RULE
from tests.aws_side import patterns
from tests.aws_side.patterns import (
    SYSTEM_FIELDS,
    MetricFilter,
    attribute,
    event_matches,
    fields_in,
    names_in,
    passes,
    value_at,
)
from tests.aws_side.scene import Scene, imported
from tests.aws_side.templates import FOLDER, resources

QUERIES = resources("watching.yaml", "AWS::Logs::QueryDefinition")
FILTERS = {
    properties["MetricTransformations"][0]["MetricName"]: properties["FilterPattern"]
    for properties in resources("watching.yaml", "AWS::Logs::MetricFilter").values()
}
ALARMS = resources("watching.yaml", "AWS::CloudWatch::Alarm")
INSIGHTS = resources("findings.yaml", "AWS::SecurityHub::Insight")
RULE = resources("findings.yaml", "AWS::Events::Rule")["SevereRule"]
BODY, TEXTS = resources("watching.yaml", "AWS::CloudWatch::Dashboard")["Dashboard"]["DashboardBody"]
WIDGETS: list[dict[str, Any]] = json.loads(
    re.sub(r"\$\{(\w+)\}", lambda place: TEXTS.get(place[1], place[0]), BODY)
)["widgets"]
PAGES = [*FOLDER.glob("*.md"), FOLDER.parent / "validate.md"]
PRIORITIES = {
    "Critical": {"Critical", "Alert", "Emergency"},
    "Error": {"Error"},
    "Warning": {"Warning"},
    "Notice": {"Notice"},
}

pytestmark = pytest.mark.timeout(120)


def internal(event: dict[str, Any]) -> bool:
    return str(event.get("rule", "")).startswith("Falco internal: ")


def queries_in(page: Path) -> list[str]:
    """Code blocks that hold a Logs Insights query."""
    blocks = re.findall(r"^ *```(?:\w*)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if re.match(r"\s*(fields|filter|stats) ", block)]


# ---- Logs Insights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUERIES)
def test_fields_of_a_saved_query_are_in_real_events(name: str, scene: Scene) -> None:
    known = {field for event in scene.events for field in names_in(event)} | SYSTEM_FIELDS
    named = fields_in(QUERIES[name]["QueryString"])
    assert named
    assert named <= known, named - known


def test_fields_of_the_dashboards_queries_are_in_real_events(scene: Scene) -> None:
    known = {field for event in scene.events for field in names_in(event)} | SYSTEM_FIELDS
    queries = [widget["properties"]["query"] for widget in WIDGETS if widget["type"] == "log"]
    assert len(queries) == 3
    for query in queries:
        assert fields_in(query) <= known, query


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_of_queries_in_the_docs_are_in_real_events(page: Path, scene: Scene) -> None:
    known = {field for event in scene.events for field in names_in(event)} | SYSTEM_FIELDS
    for query in queries_in(page):
        assert fields_in(query) <= known, query


def test_the_pages_do_hold_queries() -> None:
    """As many as `multi-account.md` and `validate.md` have; none is overlooked, and one that is added is counted here."""
    held = {page.name: len(queries_in(page)) for page in PAGES}
    assert {name: count for name, count in held.items() if count} == {
        "multi-account.md": 2,
        "validate.md": 1,
    }


def test_a_field_that_is_not_there_would_be_seen(scene: Scene) -> None:
    assert fields_in(
        'fields @timestamp, pod.name | filter rule = "x" | stats count_distinct(id) as n by n'
    ) == {
        "@timestamp",
        "pod.name",
        "rule",
        "id",
    }
    assert "pod.name" not in {field for event in scene.events for field in names_in(event)}


# ---- metric filters, alarms, dashboard ------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRIORITIES))
def test_a_metric_counts_the_alerts_of_its_priority(name: str, scene: Scene) -> None:
    counted = [event["id"] for event in scene.events if MetricFilter(FILTERS[name]).matches(event)]
    expected = [
        event["id"]
        for event in scene.events
        if event.get("priority") in PRIORITIES[name] and not internal(event)
    ]
    assert counted == expected
    assert counted


def test_a_metric_counts_drops(scene: Scene) -> None:
    counted = [event for event in scene.events if MetricFilter(FILTERS["SensorDrops"]).matches(event)]
    assert [event["rule"] for event in counted] == ["Falco internal: syscall event drop"] * 4


def test_a_metric_counts_what_is_no_alert(scene: Scene) -> None:
    (counted,) = [event for event in scene.events if MetricFilter(FILTERS["Unreadable"]).matches(event)]
    assert counted["unparsed"] == "this is no alert"


def test_every_metric_is_tried() -> None:
    assert set(FILTERS) == {*PRIORITIES, "SensorDrops", "Unreadable"}


def test_alarms_and_dashboard_name_metrics_that_are_made() -> None:
    own = [alarm for alarm in ALARMS.values() if alarm["Namespace"] != "AWS/Logs"]
    assert {alarm["MetricName"] for alarm in own} <= set(FILTERS)
    assert {alarm["Namespace"] for alarm in own} == {"Falco/${ClusterName}"}
    shown = [metric for widget in WIDGETS for metric in widget["properties"].get("metrics", ())]
    assert {metric[1] for metric in shown if metric[0] == "Falco/${ClusterName}"} == set(FILTERS)
    assert {metric[1] for metric in shown if metric[0] == "AWS/Logs"} == {
        "IncomingLogEvents",
        "IncomingBytes",
    }


@pytest.mark.parametrize("pattern", ["{ $.a > 1 }", "{ $.a = b }", '{ $.a = "b" $.c = "d" }', "ERROR"])
def test_what_cannot_be_read_is_no_match_but_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        MetricFilter(pattern)


# ---- Security Hub ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(INSIGHTS) - {"SensorsInsight"}))
def test_an_insight_has_findings_and_groups(name: str, scene: Scene) -> None:
    """Some findings are in it, some are not (all are ours and active, so the first one has them all), and each has a group."""
    insight = INSIGHTS[name]
    inside = [finding for finding in scene.findings if passes(finding, insight["Filters"])]
    assert inside
    assert (len(inside) < len(scene.findings)) == (name != "RulesInsight")
    grouped = [finding for finding in inside if attribute(finding, insight["GroupByAttribute"])]
    # Some old alerts do not tell their image.
    assert len(grouped) == len(inside) or (name == "ImagesInsight" and len(grouped) > len(inside) / 2)


def test_the_insight_of_silent_sensors(scene: Scene) -> None:
    """Its findings are not in the scene: by the title that the code gives them."""
    silent = scene.findings[0] | {"Title": f"{SENSOR_RULE} on node ip-10-0-1-17"}
    assert passes(silent, INSIGHTS["SensorsInsight"]["Filters"])
    assert not any(passes(finding, INSIGHTS["SensorsInsight"]["Filters"]) for finding in scene.findings)


def test_an_insight_leaves_out_what_is_not_ours(scene: Scene) -> None:
    foreign = scene.findings[0] | {"ProductName": "GuardDuty"}
    archived = scene.findings[0] | {"RecordState": "ARCHIVED"}
    for name, insight in INSIGHTS.items():
        assert not passes(foreign, insight["Filters"]), name
        assert not passes(archived, insight["Filters"]), name


# ---- EventBridge ----------------------------------------------------------------------------------------


def test_the_rule_takes_severe_new_findings_and_no_others(scene: Scene) -> None:
    pattern = RULE["EventPattern"]
    taken = {finding["Id"] for finding in scene.findings if event_matches(pattern, imported(finding))}
    severe = {
        finding["Id"] for finding in scene.findings if finding["Severity"]["Label"] in {"HIGH", "CRITICAL"}
    }
    assert taken == severe
    assert 0 < len(taken) < len(scene.findings)


@pytest.mark.parametrize(
    "change",
    [
        {"ProductName": "GuardDuty"},
        {"RecordState": "ARCHIVED"},
        {"Workflow": {"Status": "NOTIFIED"}},
        {"Severity": {"Label": "MEDIUM"}},
    ],
)
def test_the_rule_leaves_out(change: dict[str, Any], scene: Scene) -> None:
    severe = next(finding for finding in scene.findings if finding["Severity"]["Label"] == "HIGH")
    assert event_matches(RULE["EventPattern"], imported(severe))
    assert not event_matches(RULE["EventPattern"], imported(severe | change))


def test_the_rule_leaves_out_other_events(scene: Scene) -> None:
    severe = next(finding for finding in scene.findings if finding["Severity"]["Label"] == "HIGH")
    event = imported(severe)
    assert not event_matches(
        RULE["EventPattern"], event | {"detail-type": "Security Hub Findings - Custom Action"}
    )
    assert not event_matches(RULE["EventPattern"], event | {"source": "aws.guardduty"})


def test_one_finding_of_a_list_has_to_match_as_a_whole() -> None:
    pattern = {"findings": {"a": [1], "b": {"c": [2]}}}
    assert event_matches(pattern, {"findings": [{"a": 9}, {"a": 1, "b": {"c": 2}}]})
    assert not event_matches(pattern, {"findings": [{"a": 1}, {"b": {"c": 2}}]})


def transformers() -> list[dict[str, Any]]:
    """Of the template, and of the page."""
    text = (FOLDER / "automated-response.md").read_text()
    blocks = re.findall(r"^ *```json\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    paged = [found for block in blocks if "InputPathsMap" in (found := json.loads(block))]
    assert paged
    (target,) = RULE["Targets"][1]
    return [target["InputTransformer"], *paged]


def test_transformers_name_members_that_our_findings_have(scene: Scene) -> None:
    """Each path leads somewhere in at least one severe finding, each word of the template has a path."""
    severe = [
        imported(finding)
        for finding in scene.findings
        if event_matches(RULE["EventPattern"], imported(finding))
    ]
    for transformer in transformers():
        paths = transformer["InputPathsMap"]
        assert set(re.findall(r"<(\w+)>", transformer["InputTemplate"])) == set(paths)
        for name, path in paths.items():
            assert any(value_at(event, path) for event in severe), name


def test_patterns_of_the_page_match(scene: Scene) -> None:
    """Every EventBridge pattern in the docs takes at least one of our findings, and not all of them."""
    text = (FOLDER / "automated-response.md").read_text()
    blocks = re.findall(r"^ *```json\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    found = [pattern for block in blocks if "detail-type" in (pattern := json.loads(block))]
    assert found
    for pattern in found:
        taken = [finding for finding in scene.findings if event_matches(pattern, imported(finding))]
        assert 0 < len(taken) < len(scene.findings), pattern


def test_findings_first_told_with_more_than_one_alert_exist(scene: Scene) -> None:
    """Why no pattern asks for `falco/count` "1": alerts of one moment are told together."""
    first = [finding for finding in scene.findings if finding["CreatedAt"] == finding["UpdatedAt"]]
    assert any(finding["ProductFields"]["falco/count"] != "1" for finding in first)


def test_the_matchers_are_tried() -> None:
    """The order of the operators, and the wildcard."""
    found = MetricFilter('{ $.a = "x" && $.b = "y*" || $.c != "z" }')
    assert found.selectors == {"a", "b", "c"}
    assert found.matches({"a": "x", "b": "yes"})
    assert not found.matches({"a": "x", "b": "no"})
    assert found.matches({"c": "w"})
    assert not found.matches({"a": "w", "c": "z"})
    assert patterns.value_at({"a": [{"b": 1}]}, "$.a[0].b") == 1
