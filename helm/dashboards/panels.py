"""How a dashboard of Grafana is put together: variables, rows, panels, queries.

A query names its series with ``@{}``, which becomes the matchers of the dashboard's variables: ``@{}`` for those of a replica,
``@{sink}`` for those that are also of a sink, ``@{cluster}`` for what only makes sense over all replicas. What stands after a bar is added:
``@{sink|state="blocked"}``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

Object = dict[str, Any]

PROMETHEUS = {"type": "prometheus", "uid": "${datasource}"}
CLOUDWATCH = {"type": "cloudwatch", "uid": "${cloudwatch}"}
COLUMNS = 24
SCHEMA_VERSION = 38
"""Grafana 10.0's; newer ones read it."""
MATCHERS = {
    "cluster": 'cluster=~"$cluster", namespace=~"$namespace"',
    "": 'cluster=~"$cluster", namespace=~"$namespace", pod=~"$pod"',
    "sink": 'cluster=~"$cluster", namespace=~"$namespace", pod=~"$pod", sink=~"$sink"',
}
RED, ORANGE, GREEN, BLUE = "red", "orange", "green", "blue"


class Query(NamedTuple):
    """One target of a panel: PromQL, and what its series are called."""

    expr: str
    legend: str = ""
    instant: bool = False

    @property
    def text(self) -> str:
        return re.sub(r"@\{(cluster|sink|)(?:\|([^}]*))?\}", _matchers, self.expr)


class Logs(NamedTuple):
    """One target of a panel that asks CloudWatch Logs Insights."""

    text: str


def _matchers(found: re.Match[str]) -> str:
    return "{" + ", ".join(part for part in (MATCHERS[found[1]], found[2]) if part) + "}"


class Panel(NamedTuple):
    """A panel: its type, its size in the grid of 24 columns, and what Grafana is told of it."""

    kind: str
    title: str
    description: str
    queries: Sequence[Query | Logs]
    unit: str
    width: int
    height: int
    defaults: Object
    options: Object
    overrides: Sequence[Object] = ()


def stat(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    steps: Sequence[tuple[float, str]] = (),
    width: int = 3,
    none: str = "",
) -> Panel:
    """One number; ``steps`` are where it changes its colour."""
    thresholds: list[Object] = [{"color": GREEN if steps else BLUE, "value": None}]
    thresholds += [{"color": color, "value": value} for value, color in steps]
    defaults: Object = {
        "color": {"mode": "thresholds"},
        "thresholds": {"mode": "absolute", "steps": thresholds},
    }
    if none:
        defaults["noValue"] = none
    if unit == "short":  # a count: the growth of a counter is estimated, and seldom whole
        defaults["decimals"] = 0
    options = {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "textMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return Panel("stat", title, description, queries, unit, width, 4, defaults, options)


def graph(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    stacked: bool = False,
    width: int = 8,
    none: str = "",
) -> Panel:
    """Lines over time."""
    defaults: Object = {
        "color": {"mode": "palette-classic"},
        "min": 0,
        "custom": {
            "drawStyle": "line",
            "fillOpacity": 25 if stacked else 8,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        },
    }
    if none:
        defaults["noValue"] = none
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return Panel("timeseries", title, description, queries, unit, width, 8, defaults, options)


def states(title: str, description: str, query: Query, names: dict[int, tuple[str, str]]) -> Panel:
    """A bar for each series, coloured by what the value means: value -> (name, colour)."""
    shown = {
        str(value): {"text": text, "color": color, "index": place}
        for place, (value, (text, color)) in enumerate(names.items())
    }
    defaults: Object = {
        "color": {"mode": "thresholds"},
        "mappings": [{"type": "value", "options": shown}],
        "custom": {"fillOpacity": 70, "lineWidth": 0},
    }
    options = {"mergeValues": True, "showValue": "auto", "rowHeight": 0.8, "legend": {"showLegend": False}}
    return Panel("state-timeline", title, description, [query], "short", 8, 8, defaults, options)


def heatmap(title: str, description: str, query: Query, unit: str) -> Panel:
    """A histogram's buckets over time."""
    options = {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 64},
        "yAxis": {"unit": unit, "axisPlacement": "left"},
        "cellGap": 1,
        "legend": {"show": True},
        "tooltip": {"show": True},
    }
    return Panel("heatmap", title, description, [query], unit, 8, 8, {}, options)


def table(
    title: str,
    description: str,
    query: Query | Logs,
    *,
    unit: str = "short",
    width: int = 8,
    value: str = "Value",
) -> Panel:
    """Rows of labels and one value."""
    hidden = [
        {
            "matcher": {"id": "byName", "options": "Time"},
            "properties": [{"id": "custom.hidden", "value": True}],
        }
    ]
    units = [
        {
            "matcher": {"id": "byName", "options": "Value"},
            "properties": [{"id": "displayName", "value": value}],
        }
    ]
    options = {"showHeader": True, "cellHeight": "sm", "footer": {"show": False}}
    overrides = [*hidden, *units] if isinstance(query, Query) else []
    return Panel("table", title, description, [query], unit, width, 8, {}, options, overrides)


def bars(title: str, description: str, query: Logs, width: int = 8) -> Panel:
    """Counts over time, from CloudWatch Logs Insights."""
    defaults: Object = {
        "color": {"mode": "palette-classic"},
        "custom": {
            "drawStyle": "bars",
            "fillOpacity": 80,
            "lineWidth": 0,
            "stacking": {"mode": "normal", "group": "A"},
        },
    }
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return Panel("timeseries", title, description, [query], "short", width, 8, defaults, options)


class Row(NamedTuple):
    """A heading and its panels, laid out from left to right."""

    title: str
    panels: Sequence[Panel]


def variable(name: str, label: str, expression: str) -> Object:
    """One whose values come from labels. ``.*`` for all: also where scraping adds no such label."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": PROMETHEUS,
        "query": {"query": expression, "refId": name},
        "definition": expression,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def source(name: str, label: str, plugin: str) -> Object:
    """The one that picks the data source."""
    return {
        "name": name,
        "label": label,
        "type": "datasource",
        "query": plugin,
        "refresh": 1,
        "multi": False,
        "includeAll": False,
    }


def text_box(name: str, label: str, value: str) -> Object:
    """One somebody types in."""
    current = {"selected": True, "text": value, "value": value}
    return {
        "name": name,
        "label": label,
        "type": "textbox",
        "query": value,
        "current": current,
        "options": [current],
    }


def choice(name: str, label: str, values: Sequence[str], chosen: str) -> Object:
    """One of a few."""
    options = [{"selected": it == chosen, "text": it, "value": it} for it in values]
    current = {"selected": True, "text": chosen, "value": chosen}
    return {
        "name": name,
        "label": label,
        "type": "custom",
        "query": ",".join(values),
        "current": current,
        "options": options,
    }


REPLICAS = (
    source("datasource", "Data source", "prometheus"),
    variable("cluster", "Cluster", "label_values(falco_forwarder_build_info, cluster)"),
    variable(
        "namespace", "Namespace", 'label_values(falco_forwarder_build_info{cluster=~"$cluster"}, namespace)'
    ),
    variable(
        "pod",
        "Pod",
        'label_values(falco_forwarder_build_info{cluster=~"$cluster", namespace=~"$namespace"}, pod)',
    ),
    variable(
        "sink",
        "Sink",
        'label_values(falco_forwarder_sink_pending{cluster=~"$cluster", namespace=~"$namespace"}, sink)',
    ),
    text_box("silent_after", "Silent after (s)", "2700"),
)
"""The variables of both dashboards."""


def dashboard(
    uid: str, title: str, description: str, variables: Sequence[Object], rows: Sequence[Row], refresh: str
) -> Object:
    """The whole of it, as Grafana imports it."""
    panels: list[Object] = []
    top = 0
    for row in rows:
        panels.append(
            {
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
            }
        )
        top += 1
        left = height = 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            panels.append(_panel(panel, left, top))
            left, height = left + panel.width, max(height, panel.height)
        top += height
    for number, item in enumerate(panels, 1):
        item["id"] = number
    other = "falco-forwarder-security" if uid.endswith("operations") else "falco-forwarder-operations"
    link = {
        "title": other.rpartition("-")[2].capitalize(),
        "type": "link",
        "url": f"/d/{other}",
        "keepTime": True,
        "includeVars": True,
        "icon": "dashboard",
        "tags": [],
        "asDropdown": False,
        "targetBlank": False,
        "tooltip": "",
    }
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["falco", "falco-aws-forwarder"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": False,
        "graphTooltip": 1,
        "refresh": refresh,
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "",
        "links": [link],
        "templating": {"list": list(variables)},
        "annotations": {"list": []},
        "panels": panels,
    }


def _panel(panel: Panel, left: int, top: int) -> Object:
    logs = isinstance(panel.queries[0], Logs)
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": CLOUDWATCH if logs else PROMETHEUS,
        "gridPos": {"h": panel.height, "w": panel.width, "x": left, "y": top},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, **panel.defaults},
            "overrides": list(panel.overrides),
        },
        "options": panel.options,
        "targets": [
            _target(query, chr(ord("A") + place), panel.kind) for place, query in enumerate(panel.queries)
        ],
    }


def _target(query: Query | Logs, reference: str, kind: str) -> Object:
    if isinstance(query, Logs):
        return {
            "datasource": CLOUDWATCH,
            "refId": reference,
            "id": "",
            "queryMode": "Logs",
            "region": "$region",
            "logGroups": [{"arn": "$log_group", "name": "$log_group"}],
            "expression": query.text,
            "statsGroups": [],
        }
    instant = query.instant or kind == "table"
    shape = {"table": "table", "heatmap": "heatmap"}.get(kind, "time_series")
    return {
        "datasource": PROMETHEUS,
        "refId": reference,
        "expr": query.text,
        "legendFormat": query.legend,
        "format": shape,
        "instant": instant,
        "range": not instant,
    }
