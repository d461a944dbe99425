"""The queries of the dashboards, with variables filled in as Grafana does it, and the part of Logs Insights they are written in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "helm/falco-aws-forwarder/files/dashboards").glob("*.json"))
ALL = {"cluster": ".*", "namespace": ".*", "pod": ".*", "sink": ".*", "silent_after": "2700"}
"""Nothing chosen."""

Object = dict[str, Any]


class Question(NamedTuple):
    """A query of a panel."""

    dashboard: str
    panel: str
    kind: str
    expr: str
    legend: str


def panels(dashboard: Mapping[str, Any]) -> Iterator[Object]:
    """All panels but rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def loaded(file: Path) -> Object:
    """A dashboard."""
    found: Object = json.loads(file.read_text())
    return found


def questions(plugin: str) -> list[Question]:
    """Of both dashboards, for one kind of data source."""
    return [
        Question(
            file.stem,
            panel["title"],
            panel["type"],
            target.get("expr") or target["expression"],
            target.get("legendFormat", ""),
        )
        for file in DASHBOARDS
        for panel in panels(loaded(file))
        for target in panel["targets"]
        if target["datasource"]["type"] == plugin
    ]


def filled(expr: str, values: Mapping[str, str], *, rate_secs: int, range_secs: int) -> str:
    """The query as it reaches the data source."""
    known = {**values, "__rate_interval": f"{rate_secs}s", "__range": f"{range_secs}s"}
    return re.sub(r"\$\{?(\w+)\}?", lambda found: known[found[1]], expr)


# ---- CloudWatch Logs Insights ---------------------------------------------------------------------------


def insights(query: str, events: list[Object]) -> list[dict[str, Any]]:
    """The rows of a query: filter, fields, stats count_distinct() by, sort, limit, and nothing else of the language."""
    rows = [flat(event) for event in events]
    for command in re.split(r"\n?\| ", query):
        rows = _step(command, rows)
    return rows


def flat(event: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """JSON as Insights names its fields: members of members with a dot."""
    found: dict[str, Any] = {}
    for key, value in event.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _step(command: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if found := re.fullmatch(r"filter ispresent\(([\w.]+)\)", command):
        return [row for row in rows if row.get(found[1]) is not None]
    if found := re.fullmatch(r"filter (\w+) in (\[.*\])", command):
        return [row for row in rows if row.get(found[1]) in json.loads(found[2])]
    if found := re.fullmatch(r"fields (.*)", command):
        return [{name: row.get(name) for name in found[1].split(", ")} for row in rows]
    if found := re.fullmatch(r"stats count_distinct\((\w+)\) as (\w+) by (.*)", command):
        names = found[3].split(", ")
        groups: dict[tuple[Any, ...], set[Any]] = {}
        for row in rows:
            groups.setdefault(tuple(_field(name, row) for name in names), set()).add(row.get(found[1]))
        return [
            dict(zip(names, values, strict=True)) | {found[2]: len(seen - {None})}
            for values, seen in groups.items()
        ]
    if found := re.fullmatch(r"sort (\S+) desc", command):
        return sorted(rows, key=itemgetter(found[1]), reverse=True)
    if found := re.fullmatch(r"limit (\d+)", command):
        return rows[: int(found[1])]
    raise AssertionError(f"what does this mean: {command}")


def _field(name: str, row: Mapping[str, Any]) -> Any:
    if found := re.fullmatch(r"bin\((\d+)([smhd])\)", name):
        secs = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
        return row["@timestamp"] // (secs * 1000) * secs * 1000
    return row.get(name)
