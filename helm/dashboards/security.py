"""The dashboard of those who read the alerts: what Falco saw, what became findings, and what was kept from them.

Metrics have no label with a rule, a namespace, a pod or a host: whoever can post an alert could fill Prometheus with series. Those questions
go to where the alerts are, by CloudWatch Logs Insights.
"""

from __future__ import annotations

from helm.dashboards.operations import SENSORS
from helm.dashboards.panels import (
    ORANGE,
    RED,
    REPLICAS,
    Logs,
    Object,
    Query,
    Row,
    bars,
    choice,
    dashboard,
    graph,
    source,
    stat,
    table,
)
from helm.dashboards.queries import RATE, SILENT_NOW, per_second


def grown(metric: str, legend: str, matchers: str = "", scope: str = "") -> Query:
    """How much a counter grew in the chosen time."""
    inside = f"{scope}|{matchers}" if matchers else scope
    return Query(
        f"sum(increase(falco_forwarder_{metric}_total@{{{inside}}}[$__range]))", legend, instant=True
    )


OVERVIEW = Row(
    "In the chosen time",
    [
        stat("Alerts stored", "Of all priorities, each once.", grown("stored_events", "stored")),
        stat(
            "New findings",
            "Issues Security Hub was told of for the first time.",
            grown("finding_updates", "new", 'reason="first"'),
        ),
        stat(
            "Became more severe",
            "Findings raised to a higher severity, or back from the archive.",
            grown("finding_updates", "raised", 'reason="priority"'),
            steps=[(1, ORANGE)],
        ),
        stat(
            "Issues remembered",
            "Each is one finding with a count.",
            Query("sum(falco_forwarder_issues@{})", "issues"),
        ),
        stat(
            "Silences in force",
            "They end by themselves; /status lists them with their reason.",
            Query("max(falco_forwarder_rules_silences_active@{})", "silences"),
            steps=[(1, ORANGE)],
        ),
        stat(
            "Silenced or dropped",
            "Alerts a rule of the house kept from a sink.",
            grown("filtered_events", "alerts", 'reason=~"silence|drop"', "sink"),
            steps=[(1, ORANGE)],
        ),
        stat(
            "Alerts lost",
            "Refused with 503. Falco does not repeat.",
            grown("discarded_events", "lost"),
            steps=[(1, RED)],
        ),
        stat(
            "Silent sensors",
            "Nodes whose Falco no replica has heard for so long: nothing is known of them.",
            SILENT_NOW,
            steps=[(1, ORANGE)],
        ),
    ],
)

ONLY_ALERTS = "filter ispresent(rule)"
COST = "CloudWatch Logs Insights: each look costs by the bytes it reads."
CLOUDWATCH = Row(
    "Alerts (CloudWatch Logs Insights)",
    [
        bars(
            "Alerts by priority",
            COST,
            Logs(f"{ONLY_ALERTS}\n| stats count_distinct(id) as alerts by bin($bin), priority"),
            width=16,
        ),
        table(
            "Rules",
            f"The most frequent. {COST}",
            Logs(
                f"{ONLY_ALERTS}\n| stats count_distinct(id) as alerts by rule, priority\n| sort alerts desc\n| limit 20"
            ),
        ),
        table(
            "Namespaces",
            f"Of the pods alerts are about. {COST}",
            Logs(
                "filter ispresent(kubernetes.namespace)\n| stats count_distinct(id) as alerts by kubernetes.namespace\n| sort alerts desc\n| limit 20"
            ),
        ),
        table(
            "Workloads: top talkers",
            f"Owners of the pods; a rollout does not change them. {COST}",
            Logs(
                "filter ispresent(kubernetes.workload.name)\n"
                "| stats count_distinct(id) as alerts by kubernetes.namespace, kubernetes.workload.kind, kubernetes.workload.name\n"
                "| sort alerts desc\n| limit 20"
            ),
        ),
        table(
            "Nodes",
            f"Where it happened. {COST}",
            Logs(
                "filter ispresent(node.name)\n| stats count_distinct(id) as alerts by node.name, node.instance_id\n| sort alerts desc\n| limit 20"
            ),
        ),
        table(
            "Images",
            f"Of the containers. {COST}",
            Logs(
                "filter ispresent(kubernetes.image)\n| stats count_distinct(id) as alerts by kubernetes.image\n| sort alerts desc\n| limit 20"
            ),
        ),
        table(
            "The latest severe alerts",
            f"Critical and worse. {COST}",
            Logs(
                'filter priority in ["Emergency", "Alert", "Critical"]\n'
                "| fields @timestamp, priority, rule, kubernetes.namespace, kubernetes.pod, node.name, output\n"
                "| sort @timestamp desc\n| limit 50"
            ),
            width=16,
        ),
    ],
)

FINDINGS = Row(
    "Findings",
    [
        graph(
            "Told to Security Hub",
            "first: a new one; priority: more severe, or back from the archive; count: more alerts; archive: idle for long; notice: of the forwarder.",
            per_second("finding_updates", "reason", "{{reason}}"),
            unit="cps",
            stacked=True,
        ),
        graph(
            "Alerts counted, findings told",
            "How much aggregation saves.",
            per_second("aggregated_events", "", "alerts counted in issues"),
            per_second("finding_updates", "", "findings told"),
            unit="cps",
        ),
        graph(
            "Not told yet",
            "Waiting for Security Hub; counted, but their finding's next update has its time.",
            Query('sum(falco_forwarder_sink_pending@{|sink="security_hub"})', "waiting"),
            Query('sum(falco_forwarder_sink_aggregating@{|sink="security_hub"})', "aggregating"),
        ),
        graph(
            "Table of issues",
            "When it is full the least recent are forgotten, and what comes of them is a new finding.",
            Query("sum(falco_forwarder_issues@{})", "issues"),
            Query("sum(falco_forwarder_issues_max@{})", "room"),
        ),
        graph(
            "Issues forgotten",
            "For lack of room.",
            Query("sum(increase(falco_forwarder_issues_evicted_total@{}[$__rate_interval]))", "forgotten"),
        ),
        graph(
            "Never taken by Security Hub",
            "Dead letters, by reason.",
            Query(
                'sum by (reason) (increase(falco_forwarder_dead_lettered_events_total@{|sink="security_hub"}[$__rate_interval]))',
                "{{reason}}",
            ),
        ),
    ],
)

KEPT_BACK = Row(
    "Kept back, refused, strange",
    [
        graph(
            "Kept from a sink",
            "silence, drop, route: a rule says so. minimum_priority: the sink's, or a rule's.",
            per_second("filtered_events", "sink, reason", "{{sink}} {{reason}}", "sink"),
            unit="cps",
            stacked=True,
        ),
        graph(
            "Lost, by priority",
            "Refused with 503: the spool was full or could not be written.",
            Query(
                f"sum by (priority) (rate(falco_forwarder_discarded_events_total@{{}}{RATE}))", "{{priority}}"
            ),
            unit="cps",
            stacked=True,
        ),
        graph(
            "Strange bodies",
            "unparsed: nobody can read it. text: Falco without json_output. unknown priority: treated as warning. duplicate: the same bytes again.",
            per_second("unparsed_events", "", "unparsed"),
            per_second("text_mode_events", "", "text"),
            per_second("unknown_priority_events", "", "unknown priority"),
            per_second("duplicate_events", "", "duplicate"),
            unit="cps",
        ),
        graph(
            "Senders refused",
            "Requests without the right credentials, and TLS handshakes that failed with an error.",
            per_second("auth_failures", "reason", "credentials {{reason}}"),
            per_second("tls_handshakes_failed", "reason", "TLS {{reason}}", '|reason!="left"'),
            unit="cps",
        ),
        graph(
            "Silences and rules in force",
            "The rules of the house, and silences among them. Silences end by themselves.",
            Query("max(falco_forwarder_rules_silences_active@{})", "silences"),
            Query("max(falco_forwarder_rules@{})", "rules"),
        ),
        graph(
            "Alerts whose pod nobody knows",
            "Their findings name no workload.",
            Query(
                f'sum by (result) (rate(falco_forwarder_enrichment_total@{{|result=~"miss|node_unknown|unsynced"}}{RATE}))',
                "{{result}}",
            ),
            unit="cps",
        ),
    ],
)


def _of_cloudwatch(name: str, label: str, query: Object) -> Object:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": {"type": "cloudwatch", "uid": "${cloudwatch}"},
        "query": {"refId": name, **query},
        "refresh": 1,
        "sort": 1,
        "multi": False,
        "includeAll": False,
    }


VARIABLES = (
    *REPLICAS,
    source("cloudwatch", "CloudWatch", "cloudwatch"),
    _of_cloudwatch("region", "Region", {"queryType": "regions"}),
    _of_cloudwatch(
        "log_group", "Log group", {"queryType": "logGroups", "region": "$region", "logGroupPrefix": "/falco"}
    ),
    choice("bin", "Bars of", ("1m", "5m", "15m", "1h", "6h", "1d"), "15m"),
)


def security() -> Object:
    """The dashboard."""
    return dashboard(
        "falco-forwarder-security",
        "Falco AWS Forwarder / Security",
        "Alerts, findings, silences and sensors. The row on top of CloudWatch Logs needs a CloudWatch data source.",
        VARIABLES,
        [OVERVIEW, CLOUDWATCH, FINDINGS, KEPT_BACK, SENSORS],
        "5m",
    )
