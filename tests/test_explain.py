"""``check --explain`` says which rule matched and where the alert goes, and it says the same as the rules do."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from forwarder.__main__ import EXIT_CONFIG, EXIT_FAILED, EXIT_OK, main
from forwarder.alert import Unparsable
from forwarder.explain import PASSED_MAX, explain
from forwarder.settings import Settings, load_settings
from tests.samples import REAL_BODIES, TEXT_LINES

AT = 1_790_000_000.0
CONFIG = """
cluster: {name: shop-prod}
aws: {region: eu-west-1}
sinks:
  cloudwatch_logs: {enabled: true, log_group: /falco/shop-prod}
  security_hub:
    enabled: true
    remediation: {Known rule: {text: Look here., url: https://wiki/known}}
rules:
  - {name: noise, match: {rule: "Contact*", namespace: kube-system}, drop: true}
  - name: scanner
    match: {workload: trivy}
    silence: {until: 2026-12-01, reason: nightly, by: maria}
  - name: payments
    match: {labels: {team: payments}}
    severity: critical
    finding_types: [TTPs/Execution, Effects]
    remediation: {text: Call them.}
  - {name: only logs, match: {namespace: "dev-*"}, sinks: [cloudwatch_logs]}
  - {name: less, match: {namespace: test}, minimum_priority: {security_hub: error}}
"""
NOTE = "without `kubernetes`, `node` or `cluster`"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "forwarder.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def settings(config: Path) -> Settings:
    return load_settings(config, {})


def alert(rule: str = "Terminal shell", priority: str = "Warning", **members: Any) -> bytes:
    tags = ["mitre_discovery"]
    return json.dumps(
        {"rule": rule, "priority": priority, "output": "o", "source": "syscall", "tags": tags} | members
    ).encode()


def told(settings: Settings, data: bytes, at: float = AT) -> list[str]:
    """Lines without the headline and the note."""
    _, *lines = explain(settings, data, at).splitlines()
    return [line.strip() for line in lines if NOTE not in line]


def test_no_rule_matches(settings: Settings) -> None:
    assert told(settings, alert("Known rule")) == [
        "rule of the house: none matches",
        'not "noise": rule is "Known rule"',
        'not "scanner": the alert has no workload',
        'not "payments": the alert has no labels.team',
        'not "only logs": the alert has no namespace',
        'not "less": the alert has no namespace',
        "cloudwatch_logs: gets it",
        "security_hub: gets it",
        "severity: MEDIUM",
        "types: TTPs/Discovery",
        "remediation: Look here. https://wiki/known",
    ]


def test_what_a_rule_says_of_the_finding(settings: Settings) -> None:
    event = alert(kubernetes={"namespace": "pay", "labels": {"team": "payments"}}, id="x", forwarder={"v": 1})
    assert told(settings, event)[0] == 'rule of the house: "payments"'
    assert told(settings, event)[-4:] == [
        "security_hub: gets it",
        "severity: CRITICAL",
        "types: TTPs/Execution, Effects",
        "remediation: Call them.",
    ]


@pytest.mark.parametrize(
    ("data", "logs", "hub"),
    [
        (
            alert("Contact X", output_fields={"k8s.ns.name": "kube-system"}),
            "does not get it (drop): the rule drops it",
            "does not get it (drop): the rule drops it",
        ),
        (
            alert(kubernetes={"workload": {"kind": "CronJob", "name": "trivy"}}),
            "gets it",
            "does not get it (silence): the rule silences findings",
        ),
        (
            alert(output_fields={"k8s.ns.name": "dev-1"}),
            "gets it",
            "does not get it (route): the rule names other sinks",
        ),
        (
            alert(output_fields={"k8s.ns.name": "test"}),
            "gets it",
            "does not get it (minimum_priority): Warning is below the rule's Error",
        ),
        (
            alert(priority="Info"),
            "gets it",
            "does not get it (minimum_priority): Informational is below the sink's Notice",
        ),
        (
            alert("Falco internal: syscall event drop"),
            "gets it",
            "does not get it (not_a_finding): Falco's own messages and text alerts become no findings",
        ),
        (
            TEXT_LINES[0],
            "gets it",
            "does not get it (not_a_finding): Falco's own messages and text alerts become no findings",
        ),
    ],
    ids=["drop", "silence", "route", "rule's minimum", "sink's minimum", "internal", "text"],
)
def test_where_it_goes_and_why_not(settings: Settings, data: bytes, logs: str, hub: str) -> None:
    lines = told(settings, data)
    assert f"cloudwatch_logs: {logs}" in lines
    assert lines[-1] == f"security_hub: {hub}"


def test_a_silence_that_has_ended(settings: Settings) -> None:
    event = alert(kubernetes={"workload": {"kind": "CronJob", "name": "trivy"}})
    assert 'not "scanner": its silence ended 2026-12-01T00:00:00Z' in told(settings, event, 1_800_000_000.0)


def test_only_enabled_sinks_are_told_of(config: Path) -> None:
    config.write_text(CONFIG.replace("  security_hub:\n    enabled: true", "  security_hub:"))
    lines = told(load_settings(config, {}), alert())
    assert [line for line in lines if "gets it" in line] == ["cloudwatch_logs: gets it"]


def test_without_rules_and_with_many(config: Path) -> None:
    config.write_text(CONFIG[: CONFIG.index("rules:")])
    assert told(load_settings(config, {}), alert())[0] == "rule of the house: there are none"
    many = "".join(f"  - {{match: {{rule: r{number}}}}}\n" for number in range(PASSED_MAX + 5))
    config.write_text(CONFIG[: CONFIG.index("rules:")] + "rules:\n" + many)
    lines = told(load_settings(config, {}), alert())
    assert lines[1] == "5 rules before these do not match"
    assert len([line for line in lines if line.startswith('not "rule ')]) == PASSED_MAX


def test_several_alerts_and_the_note(settings: Settings) -> None:
    enriched, plain = alert(kubernetes={"namespace": "a", "workload": {"kind": "Job", "name": "b"}}), alert()
    for data in (enriched + b"\n" + plain, b"[" + enriched + b"," + plain + b"]"):
        lines = explain(settings, data, AT).splitlines()
        assert [line for line in lines if line.startswith("alert ")] == [
            "alert 1 of 2: Terminal shell, Warning, syscall, namespace a, workload Job/b",
            "alert 2 of 2: Terminal shell, Warning, syscall",
        ]
        assert lines[-1].startswith(f"1 of 2 {NOTE}")
    assert NOTE not in explain(settings, enriched, AT)


def test_an_alert_does_not_steer_the_terminal(settings: Settings) -> None:
    assert "\x1b" not in explain(settings, alert("\x1b[2J", hostname="\x1b]0;x\x07"), AT)


def test_all_real_alerts(settings: Settings) -> None:
    text = explain(settings, b"\n".join(REAL_BODIES), AT)
    assert text.count("rule of the house: ") == text.count("cloudwatch_logs: gets it") == len(REAL_BODIES)


def test_enrichment_that_is_not_ours_is_refused(settings: Settings) -> None:
    with pytest.raises(Unparsable, match="enrichment is not as the forwarder writes it"):
        explain(settings, alert(kubernetes="x"), AT)


# ---- the command ------------------------------------------------------------------------------------


def test_the_command_with_a_file(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "alert.json"
    file.write_bytes(alert(output_fields={"k8s.ns.name": "dev-1"}))
    assert main(["check", "--config", str(config), "--explain", str(file)]) == EXIT_OK
    out, err = capsys.readouterr()
    assert out.startswith("configuration ok\nalert 1 of 1: Terminal shell")
    assert '  rule of the house: "only logs"\n' in out
    assert err == ""


def test_the_command_with_standard_input(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(alert())))
    assert main(["check", "--config", str(config), "--explain", "-"]) == EXIT_OK
    assert "none matches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no alert that can be explained: the body is empty"),
        (b"{broken", "has no alert that can be explained: "),
        (b'{"a": 1}', "neither rule nor output"),
        (None, "cannot be read: No such file or directory"),
    ],
    ids=str,
)
def test_a_bad_file(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    file = tmp_path / "alert.json"
    if content is not None:
        file.write_bytes(content)
    assert main(["check", "--config", str(config), "--explain", str(file)]) == EXIT_FAILED == 1
    err = capsys.readouterr().err
    assert err.startswith(f"falco-forwarder: {file} ")
    assert words in err


def test_a_bad_configuration_comes_first(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(CONFIG.replace("critical", "loud"))
    assert main(["check", "--config", str(config), "--explain", "/none"]) == EXIT_CONFIG
    assert "rules[2].severity (line " in capsys.readouterr().err
