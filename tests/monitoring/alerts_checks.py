"""Every alert of the chart: when it fires, when it does not (by promtool), and its runbook. Run by `make monitoring-test`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import objects_of, one
from tests.monitoring.prometheus import SETS, Object, alerts_of, chart_groups, promtool

ROOT = Path(__file__).resolve().parents[2]
RUNBOOKS = ROOT / "docs/runbooks"
# Texts only: to YAML, promtool's 0x60 would be the number 96.
CASES: dict[str, dict[str, list[Object]]] = yaml.load(
    (Path(__file__).parent / "alerts.yaml").read_text(),
    yaml.BaseLoader,  # noqa: S506 - makes nothing but texts, lists and mappings
)
REPLICA = {"namespace": "falco", "pod": "f-0"}
SILENT_MINUTES = (0, 5, 10, 15, 20, 30, 40, 50, 60)
SECTIONS = ("What it means", "What is at stake", "How to see it", "What to do", "When it is no fault")


@pytest.fixture(scope="module")
def alerts() -> dict[str, Object]:
    return alerts_of(chart_groups())


def test_every_alert_has_both_cases(alerts: dict[str, Object]) -> None:
    """And a silent one looks at the metrics the alert looks at: it is not silent because there is nothing."""
    assert set(CASES) == set(alerts)
    assert len(alerts) > 25
    for name, case in CASES.items():
        assert case["fires"], name
        assert case["silent"], name
        for item in case["silent"]:
            named = {re.split(r"\{", series)[0] for series in item["series"]}
            assert named == _metrics(name, alerts[name]["expr"]), name


@pytest.mark.parametrize("name", CASES)
def test_fires_and_is_silent(name: str, alerts: dict[str, Object], tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": chart_groups()}))
    rule, case = alerts[name], CASES[name]
    tests = [_firing(name, rule, item) for item in case["fires"]]
    tests += [_silent(name, item) for item in case["silent"]]
    content = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(content))
    promtool("test", "rules", tmp_path / "test.yaml")


def test_every_alert_has_its_page_and_every_page_its_alert(alerts: dict[str, Object]) -> None:
    pages = {file.stem for file in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == {name.lower() for name in alerts}


@pytest.mark.parametrize("name", CASES)
def test_page(name: str, alerts: dict[str, Object]) -> None:
    """It has its parts, in order, says how severe it is and for how long it must be true, and stands in the index."""
    text = (RUNBOOKS / f"{name.lower()}.md").read_text()
    rule = alerts[name]
    assert text.startswith(f"# {name}\n\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == list(SECTIONS)
    lasting = f"true for {rule['for']}" if "for" in rule else "at once"
    assert f"Severity {rule['labels']['severity']}, {lasting}." in text
    assert _plain(rule["expr"]) in _promql(text), "the alert's expression is no query of the page"
    index = (RUNBOOKS / "README.md").read_text()
    assert f"| {rule['labels']['severity']} | [{name}]({name.lower()}.md) |" in index


def test_index_has_nothing_else(alerts: dict[str, Object]) -> None:
    assert set(re.findall(r"\]\(([a-z]+)\.md\)", (RUNBOOKS / "README.md").read_text())) == {
        it.lower() for it in alerts
    }


@pytest.mark.parametrize(
    ("url", "page"),
    [
        (
            "https://git.example.com/forwarder/blob/main/docs/runbooks",
            "https://git.example.com/forwarder/blob/main/docs/runbooks/NAME.md",
        ),
        ("https://git.example.com/docs/runbooks/", "https://git.example.com/docs/runbooks/NAME.md"),
        ("https://wiki.example.com/{alert}?space=ops", "https://wiki.example.com/NAME?space=ops"),
    ],
)
def test_runbook_link(url: str, page: str) -> None:
    sets = [*SETS, f"prometheusRule.runbookUrl={url.replace('{', chr(92) + '{').replace('}', chr(92) + '}')}"]
    for name, rule in alerts_of(one(objects_of(None, sets=sets), "PrometheusRule")["spec"]["groups"]).items():
        assert rule["annotations"]["runbook_url"] == page.replace("NAME", name.lower())


def _plain(expr: str) -> str:
    """Without the release's namespace, in one line."""
    without = re.sub(r'namespace="falco"(?:, )?', "", expr).replace("{}", "")
    return " ".join(without.split())


def _promql(text: str) -> set[str]:
    """The queries of a page: a line each; one that is indented goes on with the line before."""
    blocks = re.findall(r"```promql\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(re.sub(r"\n +", " ", block) for block in blocks).splitlines()
    return {_plain(line) for line in lines}


def _metrics(name: str, expr: str) -> set[str]:
    if name == "FalcoSensorSilent":  # it looks at a recorded series, which is made of this one
        return {"sensor_last_seen_seconds"}
    return {it.removeprefix("falco_forwarder_") for it in re.findall(r"falco_forwarder_[a-z0-9_]+", expr)}


def _series(series: dict[str, Any]) -> list[Object]:
    """With prefix, and the labels of a replica where it has no others."""
    found = []
    for key, values in series.items():
        name, _, rest = key.partition("{")
        given = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        labels = ",".join(f'{label}="{value}"' for label, value in (REPLICA | given).items())
        found.append(
            {
                "series": f"falco_forwarder_{name}{{{labels}}}",
                "values": values.replace("for ever Inf", " ".join(["Inf"] * 61)),
            }
        )
    return found


def _firing(name: str, rule: Object, case: Object) -> Object:
    """Silent a minute before it should fire; then with these labels and texts."""
    due = int(case["since"]) + int(str(rule.get("for", "0m")).removesuffix("m"))
    labels = {
        key: value
        for key, value in (REPLICA | rule["labels"] | case.get("labels", {})).items()
        if value != "null"
    }
    annotations = {**rule["annotations"], "summary": case["summary"]}
    assert "{{" not in annotations.get("description", ""), "descriptions are the same for all"
    checks: list[Object] = [
        {
            "eval_time": f"{due}m",
            "alertname": name,
            "exp_alerts": [{"exp_labels": labels, "exp_annotations": annotations}],
        }
    ]
    if due:
        checks.insert(0, {"eval_time": f"{due - 1}m", "alertname": name, "exp_alerts": []})
    return {
        "name": f"{name} fires",
        "interval": "1m",
        "input_series": _series(case["series"]),
        "alert_rule_test": checks,
    }


def _silent(name: str, case: Object) -> Object:
    checks = [{"eval_time": f"{minute}m", "alertname": name, "exp_alerts": []} for minute in SILENT_MINUTES]
    return {
        "name": f"{name}: {case['why']}",
        "interval": "1m",
        "input_series": _series(case["series"]),
        "alert_rule_test": checks,
    }
