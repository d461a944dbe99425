"""What the demo shows a person of what arrived, and whether that is all that was acknowledged."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from typing import Any, NamedTuple

from forwarder import alert
from forwarder.replay import Report

SEVERITIES = ("CRITICAL", "HIGH", "MEDIUM", "LOW", "INFORMATIONAL")
FINDINGS_SHOWN = 12
COLUMNS_USUAL, RULE_COLUMNS_MIN = 100, 20
MINIMUM_RANK = 5
UNKNOWN_POD = "(unknown pod)"


class Arrived(NamedTuple):
    """What an ordinary SDK client finds at AWS."""

    event_ids: list[str]
    findings: list[dict[str, Any]]
    dead_letters: int


def _severity(finding: dict[str, Any]) -> str:
    # The service copies it to the top level, the embedded one does not.
    return str(finding.get("FindingProviderFields", finding)["Severity"]["Label"])


def _alerts(finding: dict[str, Any]) -> int:
    return int(finding["ProductFields"].get("falco/count", 1))


def show(report: Report, arrived: Arrived) -> None:
    """What came, as a table, and one finding in full."""
    severities = Counter(_severity(finding) for finding in arrived.findings)
    rows = {
        "sent": report.sent,
        "acknowledged": report.acknowledged,
        "log events": len(arrived.event_ids),
        "findings": len(arrived.findings),
        "of alerts": sum(map(_alerts, arrived.findings)),
        "dead letters": arrived.dead_letters,
    } | {label: severities[label] for label in SEVERITIES}
    print()
    for name, number in rows.items():
        print(f"{name:<14} {number:>6}")
    newest = sorted(arrived.findings, key=lambda finding: str(finding["LastObservedAt"]), reverse=True)
    width = min(max(shutil.get_terminal_size((COLUMNS_USUAL, 24)).columns, 60), 160)
    shown = _various(newest)
    print(f"\n{len(shown)} of the newest findings, each of another workload or host:\n")
    _show_table(shown, width)
    print("\nThe alerts are real, the cluster is made up. What it does not know stays unknown.")
    if shown:
        print("\nThe first of them in full:")
        _show_finding(shown[0], width)


def _place(finding: dict[str, Any]) -> tuple[str, str]:
    """Workload and instance; what nobody knows stays unknown."""
    workload = instance = "-"
    for item in finding["Resources"]:
        if item["Type"] == "AwsEc2Instance":
            instance = item["Id"].rpartition("/")[2]
        elif item["Type"] == "Container":
            workload = item.get("Details", {}).get("Other", {}).get("workload", UNKNOWN_POD)
    return workload, instance


def _various(newest: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest of each workload and host, of a rule that is not shown yet where there is one."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for finding in newest:
        groups.setdefault(_place(finding), []).append(finding)
    shown: list[dict[str, Any]] = []
    for group in list(groups.values())[:FINDINGS_SHOWN]:
        rules = {finding["Title"] for finding in shown}
        shown.append(next((finding for finding in group if finding["Title"] not in rules), group[0]))
    return shown


def _show_table(findings: list[dict[str, Any]], width: int) -> None:
    rows = [
        (_severity(finding), str(_alerts(finding)), finding["Title"], *_place(finding))
        for finding in findings
    ]
    rows.insert(0, ("severity", "alerts", "rule", "workload", "instance"))
    level, count, name, place, host = [max(len(row[column]) for row in rows) for column in range(5)]
    name = min(name, max(RULE_COLUMNS_MIN, width - level - count - place - host - 8))
    for severity, alerts, rule, workload, instance in rows:
        first, *more = textwrap.wrap(rule, name, break_long_words=False)
        print(
            f"{severity:<{level}}  {alerts:>{count}}  {first:<{name}}  {workload:<{place}}  {instance}".rstrip()
        )
        for line in more:
            print(f"{'':<{level + count + 2}}  {line}")


def _show_finding(finding: dict[str, Any], width: int) -> None:
    print(f"\n{_severity(finding):<13} {finding['Title']}")
    first = finding["Resources"][0].get("Details", {}).get("Other", {})
    for label, text in (
        ("observed", "{FirstObservedAt} to {LastObservedAt}".format(**finding)),
        ("alerts", str(_alerts(finding))),
        ("what", finding["Description"]),
        ("where", ", ".join(f"{key}={value}" for key, value in first.items())),
        ("types", ", ".join(finding["FindingProviderFields"]["Types"])),
        ("resources", ", ".join(f"{item['Type']} {item['Id']}" for item in finding["Resources"])),
        (
            "log event",
            "{falco/log_group} {falco/log_stream} id={falco/id}".format(**finding["ProductFields"]),
        ),
        ("id", finding["Id"]),
    ):
        lines = textwrap.wrap(text, width - 11, break_long_words=False, break_on_hyphens=False)
        print(f" {label:<9} " + f"\n{'':<11}".join(lines))


def equal(bodies: list[bytes], report: Report, arrived: Arrived) -> bool:
    """Compare what arrived with what was acknowledged; says what differs."""
    decoded = [alert.decode(body).alerts[0] for body in bodies]
    expected = sum(item.rank <= MINIMUM_RANK and not item.internal for item in decoded)
    counted = sum(map(_alerts, arrived.findings))
    places = [_place(finding) for finding in arrived.findings]
    named = sum(workload not in {"-", UNKNOWN_POD} for workload, _ in places)
    hosts = sum(instance != "-" for _, instance in places)
    print(f"\nenriched: {named} of {len(places)} findings name a workload, {hosts} name an instance")
    differences = [
        text
        for wrong, text in (
            (report.acknowledged != report.sent, f"not acknowledged: {dict(report.refused)}"),
            (
                len(arrived.event_ids) != report.acknowledged
                or len(set(arrived.event_ids)) != len(arrived.event_ids),
                f"{report.acknowledged} acknowledged, {len(arrived.event_ids)} log events",
            ),
            (
                counted != expected,
                f"{expected} alerts expected in findings, {counted} counted",
            ),
            (arrived.dead_letters > 0, f"{arrived.dead_letters} dead letters"),
            (not named, "no finding names a workload"),
        )
        if wrong
    ]
    for text in differences:
        print(f"WRONG: {text}")
    if not differences:
        print(
            f"ok: all {report.acknowledged} acknowledged alerts are in CloudWatch Logs;\n"
            f"    the {expected} of priority Notice and higher are {len(arrived.findings)} findings in Security Hub, each counting its own"
        )
    return not differences
