"""The alerts of the PrometheusRule, read by Prometheus' own tool. Run by `make chart-test`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.chart.rendering import EVERYTHING, LOGS, ROOT, objects_of, one


def test_alerts_name_metrics_that_exist() -> None:
    known = set(
        re.findall(
            r"^\| `(falco_forwarder_[a-z0-9_]+)` \| (?:counter|gauge|histogram)",
            (ROOT / "docs/metrics.md").read_text(),
            re.MULTILINE,
        )
    )
    assert len(known) > 50
    rule = one(objects_of(EVERYTHING), "PrometheusRule")
    alerts = [it for group in rule["spec"]["groups"] for it in group["rules"] if "alert" in it]
    for alert in alerts:
        for name in re.findall(r"falco_forwarder_[a-z0-9_]+", alert["expr"]):
            assert re.sub(r"_(bucket|sum|count)$", "", name) in known, alert["alert"]
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    names = [it["alert"] for it in alerts]
    assert len(names) == len(set(names))
    assert "Mine" in names
    assert "FalcoForwarderIssuesEvicted" not in names
    assert all("runbook_url" in it["annotations"] for it in alerts if it["alert"] != "Mine")
    assert "SELECTOR" not in json.dumps(rule)
    assert "SILENT_AFTER" not in json.dumps(rule)


@pytest.mark.parametrize("case", [EVERYTHING, None], ids=["everything-on", "default"])
def test_prometheus_reads_the_alerts(case: Path | None, tmp_path: Path) -> None:
    """Every expression and template, by Prometheus' own tool."""
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: install Prometheus (Debian: apt-get install prometheus)"
    sets = [] if case else [LOGS, "prometheusRule.enabled=true"]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump(one(objects_of(case, sets=sets), "PrometheusRule")["spec"])
    )
    done = subprocess.run(
        [promtool, "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SUCCESS: [1-9][0-9]* rules found", done.stdout), done.stdout


def test_sensor_alerts_are_those_of_the_docs() -> None:
    documented = yaml.safe_load((ROOT / "tests/promql/sensors_rules.yaml").read_text())["groups"][0]["rules"]
    ours = one(objects_of(None, sets=[LOGS, "prometheusRule.enabled=true"]), "PrometheusRule")["spec"][
        "groups"
    ][1]["rules"]
    assert json.loads(json.dumps(ours).replace("2700s", "45m")) == documented
