"""What the chart makes of `prometheusRule` and `dashboards`: which rules, numbers, labels and place. Run by `make monitoring-test`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import CHART, DAEMONSET, NAMESPACE, Object, helm, objects_of, one
from tests.monitoring.prometheus import RULES_FILE, SETS, alerts_of, placeholders_in

AUTOSCALED = (
    "autoscaling.enabled=true,autoscaling.minReplicas=3,autoscaling.maxReplicas=5,"
    "autoscaling.metrics[0].type=Resource"
)
SENSOR_ALERTS = {"FalcoSensorSilent", "FalcoSensorDrops"}


def rule_object(*sets: str) -> Object:
    return one(objects_of(None, sets=[*SETS, *sets]), "PrometheusRule")


def groups_of(*sets: str) -> list[Object]:
    groups: list[Object] = rule_object(*sets)["spec"]["groups"]
    return groups


def daemonset_groups(*sets: str) -> list[Object]:
    found = one(objects_of(DAEMONSET, sets=["prometheusRule.enabled=true", *sets]), "PrometheusRule")
    groups: list[Object] = found["spec"]["groups"]
    return groups


def recorded(groups: list[Object], name: str) -> str:
    (found,) = [rule["expr"] for group in groups for rule in group["rules"] if rule.get("record") == name]
    return str(found)


@pytest.mark.parametrize(
    ("sets", "replicas"),
    [((), 2), (("replicas=4",), 4), ((AUTOSCALED,), 3)],
    ids=["default", "four", "autoscaled"],
)
def test_a_missing_replica_is_counted_against_the_values(sets: tuple[str, ...], replicas: int) -> None:
    rule = alerts_of(groups_of(*sets))["FalcoForwarderReplicaMissing"]
    assert rule["expr"] == f'count(falco_forwarder_build_info{{namespace="{NAMESPACE}"}}) < {replicas}'


def test_one_replica_alone_is_absent_not_missing() -> None:
    """Where one is expected the expression could never be true."""
    alerts = alerts_of(groups_of("replicas=1"))
    assert "FalcoForwarderReplicaMissing" not in alerts
    assert "FalcoForwarderAbsent" in alerts


def test_a_daemon_set_counts_the_nodes_that_were_told() -> None:
    expected = alerts_of(daemonset_groups())["FalcoForwarderReplicaMissing"]["expr"]
    assert expected.endswith("< 4")
    unknown = daemonset_groups(
        "daemonset.expectedNodes=0", "config.sinks.security_hub.enabled=false"
    )  # Security Hub's rate needs the number
    assert "FalcoForwarderReplicaMissing" not in alerts_of(unknown)


def test_expected_sensors_are_summed_where_each_replica_has_its_own_node() -> None:
    assert recorded(groups_of(), "falco_sensors:expected") == "max(falco_forwarder_sensors_expected)"
    assert recorded(daemonset_groups(), "falco_sensors:expected") == "sum(falco_forwarder_sensors_expected)"


@pytest.mark.parametrize(("given", "whole"), [("900.5", "901"), ("900", "900"), ("86400", "86400")])
def test_seconds_are_whole(given: str, whole: str) -> None:
    """Prometheus knows no fractions of a second in a duration."""
    number = ("--set-json", f"config.sensors.silent_after_secs={given}")  # --set would make a text of it
    groups = one(objects_of(None, *number, sets=SETS), "PrometheusRule")["spec"]["groups"]
    assert f"[{whole}s]" in recorded(groups, "node:falco_sensor_silent_seconds")
    assert recorded(groups, "falco_sensors:silent") == (
        f"count(node:falco_sensor_silent_seconds > {whole}) or vector(0)"
    )
    assert alerts_of(groups)["FalcoSensorSilent"]["expr"] == f"node:falco_sensor_silent_seconds > {whole}"


def test_every_placeholder_is_filled_in() -> None:
    assert placeholders_in(RULES_FILE.read_text()) == {
        "SELECTOR",
        "SILENT_AFTER_SECS",
        "REPLICAS_EXPECTED",
        "OVER_REPLICAS",
    }
    for groups in (groups_of(), daemonset_groups()):
        assert not placeholders_in(str(groups))


def test_rules_of_sensors_can_be_left_to_another_release() -> None:
    """Their series have no label of a release: two would record the same."""
    both, without = groups_of(), groups_of("prometheusRule.sensors=false")
    assert set(alerts_of(both)) - set(alerts_of(without)) == SENSOR_ALERTS
    assert not [rule for group in without for rule in group["rules"] if "record" in rule]
    assert all(group["rules"] for group in without), "a group without rules is a fault to some"


def test_left_out_are_only_alerts_there_are() -> None:
    names = set(alerts_of(groups_of()))
    left = set(alerts_of(groups_of("prometheusRule.disabled={FalcoForwarderTextMode,FalcoSensorDrops}")))
    assert names - left == {"FalcoForwarderTextMode", "FalcoSensorDrops"}
    refused = helm("template", sets=[*SETS, "prometheusRule.disabled={FalcoForwarderTextmode,Mine}"])
    assert refused.returncode != 0
    for name in ("FalcoForwarderTextmode", "Mine"):
        assert f"prometheusRule.disabled: {name} is no alert of the chart" in refused.stderr
    assert all(name in refused.stderr for name in names), "the names that could be meant"


def test_an_alert_that_a_mode_has_not_can_be_disabled() -> None:
    groups_of("replicas=1", "prometheusRule.disabled={FalcoForwarderReplicaMissing}")
    groups_of("prometheusRule.sensors=false", "prometheusRule.disabled={FalcoSensorSilent}")


def test_labels_for_routing_are_on_every_alert() -> None:
    plain = groups_of()
    groups = groups_of("prometheusRule.ruleLabels.team=security", "prometheusRule.ruleLabels.page=yes")
    for name, alert in alerts_of(groups).items():
        added = {"team": "security", "page": "yes"}
        assert alert["labels"] == alerts_of(plain)[name]["labels"] | added, name
    assert not any(rule.get("labels") for group in groups for rule in group["rules"] if "record" in rule)


@pytest.mark.parametrize(
    "name", ["severity", "alertname", "with-dash", "__meta"], ids=lambda name: name.strip("_")
)
def test_a_label_that_would_do_harm_is_refused(name: str) -> None:
    refused = helm("template", sets=[*SETS, f"prometheusRule.ruleLabels.{name}=x"])
    assert refused.returncode != 0
    assert re.search(r"prometheusRule.ruleLabels|/prometheusRule/ruleLabels", refused.stderr), refused.stderr


def test_the_object_can_be_elsewhere_than_the_release() -> None:
    """The series are still those of the release's namespace."""
    assert rule_object()["metadata"]["namespace"] == NAMESPACE
    moved = rule_object("prometheusRule.namespace=monitoring")
    assert moved["metadata"]["namespace"] == "monitoring"
    assert f'namespace="{NAMESPACE}"' in alerts_of(moved["spec"]["groups"])["FalcoForwarderAbsent"]["expr"]


@pytest.mark.parametrize("part", ["prometheusRule", "dashboards"])
def test_labels_of_a_part_beat_common_ones_but_not_the_charts_own(part: str) -> None:
    sets = [*SETS, "dashboards.enabled=true", "commonLabels.release=common,commonLabels.team=platform"]
    sets += [f"{part}.labels.release=mine", f"{part}.labels.app\\.kubernetes\\.io/component=other"]
    found = objects_of(None, sets=sets)
    ours: list[dict[str, Any]] = [
        it["metadata"]["labels"]
        for it in found
        if (
            it["kind"] == "PrometheusRule"
            if part == "prometheusRule"
            else "-dashboard-" in it["metadata"]["name"]
        )
    ]
    assert len(ours) == (1 if part == "prometheusRule" else 2)
    for labels in ours:
        assert labels["release"] == "mine"
        assert labels["team"] == "platform"
        assert labels["app.kubernetes.io/component"] == "forwarder"


@pytest.mark.parametrize("selector", ['job="a: b"', 'job="a #b"', "job='x', namespace=~\"a|b\""])
def test_a_selector_stands_in_every_expression_as_it_is(selector: str, tmp_path: Path) -> None:
    """Whatever YAML would make of it."""
    values = tmp_path / "values.yaml"
    given = yaml.safe_load((CHART / "ci/default-values.yaml").read_text())
    values.write_text(yaml.safe_dump({**given, "prometheusRule": {"enabled": True, "selector": selector}}))
    found = alerts_of(one(objects_of(values), "PrometheusRule")["spec"]["groups"])
    assert len(found) >= 30
    assert all(selector in rule["expr"] for name, rule in found.items() if name.startswith("FalcoForwarder"))


@pytest.mark.parametrize("selector", ['{job="a"}', 'job="a",\nnamespace="b"'])
def test_a_selector_with_more_than_labels_is_refused(selector: str, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"prometheusRule": {"enabled": True, "selector": selector}}))
    done = helm("template", CHART / "ci/default-values.yaml", "--values", str(values))
    assert done.returncode != 0
    assert "prometheusRule.selector: is labels without braces" in done.stderr
