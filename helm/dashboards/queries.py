"""Queries both dashboards use."""

from __future__ import annotations

from helm.dashboards.panels import Query

RATE = "[$__rate_interval]"


def quantiles(metric: str, scope: str = "", by: str = "") -> tuple[Query, Query]:
    """Half and 99 % of the observations took less than this."""
    labels = f"le, {by}" if by else "le"
    name = f" {{{{{by}}}}}" if by else ""
    half, most = (
        Query(
            f"histogram_quantile({share}, sum by ({labels}) (rate(falco_forwarder_{metric}_bucket@{{{scope}}}{RATE})))",
            f"{word}{name}",
        )
        for share, word in ((0.5, "half"), (0.99, "99 %"))
    )
    return half, most


def per_second(metric: str, by: str, legend: str, scope: str = "") -> Query:
    """The growth of a counter, summed over replicas."""
    grouping = f" by ({by}) " if by else ""
    return Query(f"sum{grouping}(rate(falco_forwarder_{metric}_total@{{{scope}}}{RATE}))", legend)


def mean(metric: str, scope: str = "", by: str = "", legend: str = "") -> Query:
    """The mean of a histogram's observations."""
    grouping = f" by ({by}) " if by else ""
    top, bottom = (
        f"sum{grouping}(rate(falco_forwarder_{metric}_{end}@{{{scope}}}{RATE}))" for end in ("sum", "count")
    )
    return Query(f"{top} / {bottom}", legend)


SILENT = "time() - max by (cluster, node) (falco_forwarder_sensor_last_seen_seconds@{cluster})"
EXPECTED = Query(
    "count(max by (cluster, node) (falco_forwarder_sensor_last_seen_seconds@{cluster})) or vector(0)",
    "expected",
)
"""Each has a series at every replica that watches it: all replicas of a stateful set, the node's own of a daemon set."""
SILENT_NOW = Query(f"count({SILENT} > $silent_after) or vector(0)", "silent")
"""Nodes nobody hears, whatever replica they are connected to: see docs/sensors.md."""
