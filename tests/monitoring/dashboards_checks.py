"""What a linter of dashboards asks of ours, and that no metric is forgotten. Run by `make monitoring-test`; needs no Prometheus but promtool."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from helm.dashboards.panels import COLUMNS
from helm.dashboards.write import texts
from tests.chart.rendering import objects_of
from tests.monitoring.asking import (
    ALL,
    DASHBOARDS,
    ROOT,
    Question,
    filled,
    insights,
    loaded,
    panels,
    questions,
)
from tests.monitoring.prometheus import SETS, promtool

METRICS = dict(
    re.findall(
        r"^\| `(falco_forwarder_[a-z0-9_]+)` \| (counter|gauge|histogram)",
        (ROOT / "docs/metrics.md").read_text(),
        re.MULTILINE,
    )
)
NOT_SHOWN = {
    "falco_forwarder_dead_letters_removed_total": "what is removed was counted when it was set aside",
    "falco_forwarder_kubernetes_synced": "the first list takes a moment; after that kubernetes_stale tells",
    "falco_forwarder_rate_limit_per_second": "a setting",
    "falco_forwarder_received_bytes_total": "the spool's bytes tell more",
    "falco_forwarder_rules_reloads_total": "rules_reload_ok tells what is true now",
    "falco_forwarder_sensor_info": "versions of Falco are no matter of operations",
    "falco_forwarder_sensors_expected": "added up or not by the chart's mode; the dashboards count the nodes themselves",
    "falco_forwarder_sensors_silent": "of one replica; the dashboards put replicas together",
    "falco_forwarder_sink_recovered": "of interest at a start only",
    "falco_forwarder_spool_events": "waiting is shown by sink",
    "falco_forwarder_unparsed_forwarded_events_total": "waiting bodies are shown",
    "falco_forwarder_utf8_replaced_bodies_total": "marked in the event itself",
}
both = pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)


def test_files_are_what_the_program_writes() -> None:
    assert set(texts()) == set(DASHBOARDS)
    assert len(DASHBOARDS) == 2
    for file, text in texts().items():
        assert file.read_text() == text, f"{file.name}: make dashboards"


def test_names_differ() -> None:
    found = [loaded(file) for file in DASHBOARDS]
    for name in ("uid", "title"):
        assert len({it[name] for it in found}) == len(found)


@both
def test_dashboard(file: Path) -> None:
    """Not changed by hand in Grafana, tagged, and every link leads to one of ours."""
    dashboard = loaded(file)
    assert dashboard["editable"] is False
    assert dashboard["tags"]
    assert len(dashboard["uid"]) <= 40
    assert {link["url"] for link in dashboard["links"]} <= {f"/d/{loaded(it)['uid']}" for it in DASHBOARDS}


@both
def test_variables_are_defined_and_used(file: Path) -> None:
    dashboard = loaded(file)
    variables = {it["name"]: it for it in dashboard["templating"]["list"]}
    text = json.dumps(dashboard["panels"]) + json.dumps([it.get("query") for it in variables.values()])
    text += json.dumps([it.get("datasource") for it in variables.values()])
    used = set(re.findall(r"\$\{?([a-z_]+)\}?", text)) - {"__rate_interval", "__range"}
    assert used == set(variables)
    assert {"datasource", "cluster", "namespace", "sink"} <= set(variables)
    for variable in variables.values():
        assert variable["label"]
        if variable["type"] == "query":
            assert variable["refresh"], "values are asked for again"
        if variable.get("multi"):
            assert variable["allValue"] == ".*", "also where scraping adds no such label"


@both
def test_panels(file: Path) -> None:
    shown = list(panels(loaded(file)))
    assert Counter(it["title"] for it in shown).most_common(1)[0][1] == 1
    assert len({it["id"] for it in loaded(file)["panels"]}) == len(loaded(file)["panels"])
    for panel in shown:
        title = panel["title"]
        assert title, panel
        assert panel["description"], title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert panel["targets"], title
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)), title
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"], title
            assert panel["datasource"]["uid"] in {"${datasource}", "${cloudwatch}"}, title
            if panel["type"] in {"timeseries", "state-timeline"} and target.get("expr"):
                assert target["legendFormat"], title


@both
def test_nothing_overlaps(file: Path) -> None:
    places = [(it["title"], it["gridPos"]) for it in loaded(file)["panels"]]
    for name, place in places:
        assert place["x"] + place["w"] <= COLUMNS, name
    for (one, a), (other, b) in combinations(places, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{one} / {other}"


def test_queries_are_promql(tmp_path: Path) -> None:
    """Read by promtool, each as a rule."""
    asked = questions("prometheus")
    rules = [
        {"record": f"panel:{place}", "expr": filled(it.expr, ALL, rate_secs=60, range_secs=3600)}
        for place, it in enumerate(asked)
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    said = promtool("check", "rules", tmp_path / "rules.yaml")
    assert f"{len(asked)} rules found" in said


@pytest.mark.parametrize(
    "question", questions("prometheus"), ids=lambda it: f"{it.dashboard}-{it.panel}".replace(" ", "_")
)
def test_query(question: Question) -> None:
    """Counters only as rates that fit the resolution, summed; gauges never as rates; every series by the chosen variables."""
    expr = question.expr
    selectors = re.findall(r"(\w+)\{([^}]*)\}(\[[^]]*\])?", expr)
    assert selectors, expr
    for name, matchers, window in selectors:
        metric = re.sub(r"_(bucket|sum|count)$", "", name)
        assert metric in METRICS, f"{metric} is no metric"
        assert matchers.startswith('cluster=~"$cluster", namespace=~"$namespace"'), expr
        assert ("sink=~" in matchers) <= (_labels(metric, "sink")), f"{metric} has no sink"
        if METRICS[metric] == "gauge":
            assert not window, f"{metric} is a gauge"
        else:
            assert window in {"[$__rate_interval]", "[$__range]"}, f"{metric} counts"
            assert re.search(rf"sum(?: by \([^)]*\))? ?\((?:rate|increase)\({name}\{{", expr), expr


def test_every_metric_is_shown_or_has_a_reason_not_to_be() -> None:
    text = " ".join(it.expr for it in questions("prometheus"))
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"falco_forwarder_[a-z0-9_]+", text)
    }
    assert shown | set(NOT_SHOWN) == set(METRICS)
    assert not shown & set(NOT_SHOWN)
    assert all(NOT_SHOWN.values())


def test_insights_groups_by_what_events_have() -> None:
    """Keys of our own or of Falco's, never of `output_fields`: those differ from rule to rule, and their names have dots."""
    asked = questions("cloudwatch")
    assert asked
    for question in asked:
        assert "output_fields" not in question.expr
        assert "count(" not in question.expr, "after a crash an event may be there twice, with the same id"
        assert "limit" in question.expr or "bin($bin)" in question.expr, "a table has an end"


@pytest.mark.parametrize("mode", ["statefulset", "daemonset"])
def test_expected_nodes_are_counted_in_both_modes(mode: str, tmp_path: Path) -> None:
    """Three nodes: each replica of a stateful set has a series of each, each of a daemon set of its own."""
    pairs = [(f"n{node}", f"f-{replica}") for node in range(3) for replica in range(3)]
    series = [
        {
            "series": f'falco_forwarder_sensor_last_seen_seconds{{cluster="a",namespace="falco",node="{node}",pod="{pod}"}}',
            "values": "0x5",
        }
        for node, pod in pairs
        if mode == "statefulset" or node[1:] == pod[2:]
    ]
    (expr,) = [
        it.expr
        for it in questions("prometheus")
        if it.panel == "Nodes Falco should run on"
        and it.legend == "expected"
        and it.dashboard == "operations"
    ]
    asked = filled(expr, ALL, rate_secs=60, range_secs=3600)
    case = {"expr": asked, "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": 3}]}
    tests = {"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [case]}]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(tests))
    promtool("test", "rules", tmp_path / "test.yaml")


def test_titles_say_what_is_shown() -> None:
    """Two panels of one title show the same, wherever they are."""
    shown: dict[str, set[str]] = {}
    for file in DASHBOARDS:
        for panel in panels(loaded(file)):
            queries = json.dumps([it.get("expr") or it["expression"] for it in panel["targets"]])
            shown.setdefault(panel["title"], set()).add(queries)
    assert {title: found for title, found in shown.items() if len(found) > 1} == {}


def test_insights_counts_an_event_that_came_twice_once() -> None:
    events = [{"id": "a", "rule": "x"}, {"id": "a", "rule": "x"}, {"id": "b", "rule": "x"}, {"rule": "y"}]
    assert insights("stats count_distinct(id) as alerts by rule", events) == [
        {"rule": "x", "alerts": 2},
        {"rule": "y", "alerts": 0},
    ]


def test_chart_renders_them() -> None:
    """One ConfigMap each, which Grafana's side-car can read."""
    found = [
        it
        for it in objects_of(None, sets=[*SETS, "dashboards.enabled=true"])
        if "-dashboard-" in it["metadata"]["name"]
    ]
    assert [json.loads(text) for it in found for text in it["data"].values()] == [
        loaded(file) for file in DASHBOARDS
    ]
    assert all(it["metadata"]["labels"]["grafana_dashboard"] == "1" for it in found)


def _labels(metric: str, label: str) -> bool:
    row = re.search(
        rf"^\| `{metric}` \| \w+ \| ([^|]*) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE
    )
    assert row
    return label in re.split(r",\s*", row[1].strip())
