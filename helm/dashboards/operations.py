"""The dashboard of those who run the forwarder: is it taking alerts, is it getting rid of them, and if not, where do they wait."""

from __future__ import annotations

from helm.dashboards.panels import (
    GREEN,
    ORANGE,
    RED,
    REPLICAS,
    Object,
    Query,
    Row,
    dashboard,
    graph,
    heatmap,
    stat,
    states,
    table,
)
from helm.dashboards.queries import EXPECTED, SILENT, SILENT_NOW, mean, per_second, quantiles

OVERVIEW = Row(
    "Now",
    [
        stat(
            "Replicas ready",
            "Replicas that can store new alerts, and all that are scraped.",
            Query("sum(falco_forwarder_ready@{})", "ready"),
            Query("count(falco_forwarder_build_info@{})", "scraped"),
        ),
        stat(
            "Alerts received",
            "Bodies that arrived, readable or not.",
            per_second("received_events", "", "received"),
            unit="cps",
        ),
        stat(
            "Alerts waiting",
            "Not yet settled, over all chosen sinks: an alert two sinks wait for counts twice.",
            Query("sum(falco_forwarder_sink_pending@{sink})", "waiting"),
        ),
        stat(
            "Oldest waiting",
            "Age of the oldest alert a sink has not settled. Orange at 5 minutes, red at 30, as the alerts.",
            Query("max(falco_forwarder_spool_oldest_seconds@{sink})", "oldest"),
            unit="s",
            steps=[(300, ORANGE), (1800, RED)],
        ),
        stat(
            "Spool used",
            "Of the quota in force, the fullest replica. When it is full, new alerts are refused.",
            Query("max(falco_forwarder_spool_bytes@{} / falco_forwarder_spool_capacity_bytes@{})", "used"),
            unit="percentunit",
            steps=[(0.5, ORANGE), (0.8, RED)],
        ),
        stat(
            "Alerts lost",
            "Refused with 503 in the chosen time, because the spool was full or could not be written. Falco does not repeat.",
            Query("sum(increase(falco_forwarder_discarded_events_total@{}[$__range]))", "lost", instant=True),
            steps=[(1, RED)],
        ),
        stat(
            "Dead letters",
            "On disk: what a service will never take, with its reason.",
            Query("sum(falco_forwarder_dead_letter_events@{})", "dead letters"),
            steps=[(1, ORANGE)],
        ),
        stat(
            "Silent sensors",
            "Nodes whose Falco no replica has heard for so long.",
            SILENT_NOW,
            steps=[(1, ORANGE)],
        ),
    ],
)

FLOW = Row(
    "Flow",
    [
        graph(
            "What became of alerts at the receiver",
            "Stored means synced to disk and answered 200.",
            per_second("stored_events", "", "stored"),
            per_second("duplicate_events", "", "duplicate"),
            per_second("unparsed_events", "", "unparsed"),
            per_second("discarded_events", "", "refused with 503"),
            unit="cps",
            stacked=True,
        ),
        graph(
            "Delivered",
            "Alerts a service accepted; for Security Hub, alerts its findings count.",
            per_second("sent_events", "sink", "{{sink}}", "sink"),
            unit="cps",
        ),
        graph(
            "Filtered",
            "Alerts the configuration keeps from a sink.",
            per_second("filtered_events", "sink, reason", "{{sink}} {{reason}}", "sink"),
            unit="cps",
            stacked=True,
        ),
        graph(
            "Answers of the receiver",
            "By HTTP status.",
            per_second("http_requests", "status", "{{status}}"),
            unit="reqps",
            stacked=True,
        ),
        graph(
            "Senders",
            "Open connections, and requests that wait for room in the spool.",
            Query("sum(falco_forwarder_connections@{})", "connections"),
            Query("sum(falco_forwarder_held_requests@{})", "held requests"),
        ),
        graph(
            "Turned away",
            "Requests without the right credentials, TLS handshakes that failed, connections closed by a limit (left and age are normal).",
            per_second("auth_failures", "reason", "credentials {{reason}}"),
            per_second("tls_handshakes_failed", "reason", "TLS {{reason}}"),
            per_second("connections_closed", "limit", "limit {{limit}}"),
            unit="cps",
        ),
    ],
)

SPOOL = Row(
    "Spool",
    [
        graph(
            "Disk",
            "Bytes in use, and the quota of all chosen replicas.",
            Query("sum by (pod) (falco_forwarder_spool_bytes@{})", "{{pod}}"),
            Query("sum(falco_forwarder_spool_capacity_bytes@{})", "quota of all"),
            unit="bytes",
        ),
        graph(
            "Waiting",
            "Alerts a sink has not settled; counted in a finding whose next update has its time; unparsed bodies.",
            Query("sum by (sink) (falco_forwarder_sink_pending@{sink})", "{{sink}} waiting"),
            Query("sum by (sink) (falco_forwarder_sink_aggregating@{sink})", "{{sink}} aggregating"),
            Query("sum by (sink) (falco_forwarder_sink_pending_unparsed@{sink})", "{{sink}} unparsed"),
        ),
        graph(
            "Age of the oldest waiting",
            "By sink, the worst replica.",
            Query("max by (sink) (falco_forwarder_spool_oldest_seconds@{sink})", "{{sink}}"),
            unit="s",
        ),
        graph(
            "Duration of a commit",
            "Sync included. Falco waits for it.",
            *quantiles("fsync_seconds"),
            unit="s",
        ),
        graph(
            "Alerts in one commit",
            "Mean: alerts that arrive during a sync share the next.",
            mean("commit_batch_events", legend="alerts"),
        ),
        graph(
            "Faults of the volume",
            "Commits the volume refused, blocks that could not be read. Anything but 0 needs somebody.",
            Query(
                "sum(increase(falco_forwarder_spool_write_errors_total@{}[$__rate_interval]))",
                "commits refused",
            ),
            Query(
                "sum(increase(falco_forwarder_spool_broken_blocks_total@{}[$__rate_interval]))",
                "broken blocks",
            ),
            Query("sum(falco_forwarder_spool_corrupt@{})", "databases set aside"),
        ),
    ],
)

SINKS = Row(
    "Sinks",
    [
        states(
            "State",
            "Retrying is normal for a moment. Blocked needs somebody: credentials, a permission, a service that is off.",
            Query(
                'max by (pod, sink) (falco_forwarder_sink_state@{sink|state="retrying"})'
                ' + 2 * max by (pod, sink) (falco_forwarder_sink_state@{sink|state="blocked"})',
                "{{sink}} {{pod}}",
            ),
            {0: ("delivering", GREEN), 1: ("retrying", ORANGE), 2: ("blocked", RED)},
        ),
        graph(
            "Calls that failed",
            "By code; throttled is AWS's limit.",
            per_second("send_failed", "sink, error_code", "{{sink}} {{error_code}}", "sink"),
            unit="cps",
        ),
        graph(
            "Since the last accepted call",
            "Grows also where there is nothing to send.",
            Query(
                "time() - max by (sink) (falco_forwarder_last_success_timestamp_seconds@{sink} > 0)",
                "{{sink}}",
            ),
            unit="s",
        ),
        graph("Duration of a call", "By sink.", *quantiles("rtt_seconds", "sink", "sink"), unit="s"),
        graph(
            "From receipt to acceptance",
            "The oldest alert of each call. For Security Hub, updates of a finding wait for their time.",
            *quantiles("e2e_latency_seconds", "sink", "sink"),
            unit="s",
        ),
        graph(
            "Calls under way",
            "And how many are allowed at a time; the limit adapts.",
            Query("sum by (sink) (falco_forwarder_in_flight@{sink})", "{{sink}} under way"),
            Query("sum by (sink) (falco_forwarder_adaptive_concurrency_limit@{sink})", "{{sink}} allowed"),
        ),
        graph("Alerts in one call", "Mean.", mean("sent_batch_events", "sink", "sink", "{{sink}}")),
        graph(
            "Bytes sent",
            "Of accepted requests.",
            per_second("sent_bytes", "sink", "{{sink}}", "sink"),
            unit="Bps",
        ),
        graph(
            "Repeated calls",
            "Back-off 0.5 s to 30 s.",
            per_second("retries", "sink", "{{sink}}", "sink"),
            unit="cps",
        ),
        graph(
            "New dead letters",
            "By sink and reason. /dead-letters shows them with the service's words.",
            Query(
                "sum by (sink, reason) (increase(falco_forwarder_dead_lettered_events_total@{sink}[$__rate_interval]))",
                "{{sink}} {{reason}}",
            ),
        ),
        graph(
            "Changed to fit",
            "Alerts cut to a limit of the service, or whose timestamp was moved into the accepted window.",
            per_second("truncated_events", "sink", "{{sink}} truncated", "sink"),
            per_second("timestamp_adjusted_events", "sink", "{{sink}} timestamp", "sink"),
            unit="cps",
        ),
        graph(
            "Credentials and clock",
            "Time the credentials still have (none where they do not expire), and AWS's clock minus ours.",
            Query(
                "min by (sink) (falco_forwarder_credentials_expire_timestamp_seconds@{sink} < Inf) - time()",
                "{{sink}} credentials",
            ),
            Query("max by (sink) (falco_forwarder_clock_skew_seconds@{sink})", "{{sink}} clock"),
            unit="s",
        ),
    ],
)

LATENCY = Row(
    "Latency",
    [
        graph("From body to answer", "What Falco waits for.", *quantiles("ack_seconds"), unit="s"),
        heatmap(
            "From body to answer, all of them",
            "How many alerts took how long.",
            Query(
                "sum by (le) (increase(falco_forwarder_ack_seconds_bucket@{}[$__rate_interval]))", "{{le}}"
            ),
            "s",
        ),
        graph(
            "Delay of the event loop",
            "The largest of the last 10 s. At 5 s the kubelet restarts the pod.",
            Query("max by (pod) (falco_forwarder_event_loop_lag_seconds@{})", "{{pod}}"),
            unit="s",
        ),
    ],
)

ENRICHMENT = Row(
    "Enrichment",
    [
        graph(
            "How alerts found their pod",
            "See docs/enrichment.md. miss: a pod nobody knows.",
            per_second("enrichment", "result", "{{result}}"),
            unit="cps",
            stacked=True,
        ),
        graph(
            "Found more at delivery",
            "Alerts of which the second look found more.",
            per_second("enrichment_completed", "", "completed"),
            unit="cps",
        ),
        graph(
            "Objects in memory",
            "By kind, the largest replica; tombstones are deleted pods.",
            Query("max by (kind) (falco_forwarder_kubernetes_objects@{})", "{{kind}}"),
        ),
        states(
            "May be out of date",
            "Kinds of which the API server may know more than we do.",
            Query("max by (pod, kind) (falco_forwarder_kubernetes_stale@{})", "{{kind}} {{pod}}"),
            {0: ("current", GREEN), 1: ("stale", ORANGE)},
        ),
        graph(
            "Since the last word of the API server",
            "A list, an event or a bookmark.",
            Query("max by (kind) (falco_forwarder_kubernetes_last_event_age_seconds@{})", "{{kind}}"),
            unit="s",
        ),
        graph(
            "Watches that ended",
            "By reason; ended is normal.",
            Query(
                "sum by (kind, reason) (increase(falco_forwarder_kubernetes_watch_restarts_total@{}[$__rate_interval]))",
                "{{kind}} {{reason}}",
            ),
        ),
    ],
)

SENSORS = Row(
    "Sensors",
    [
        graph(
            "Nodes Falco should run on",
            "And those whose Falco no replica has heard for so long.",
            EXPECTED,
            SILENT_NOW,
        ),
        table(
            "Longest silence",
            "Since any replica heard the node's Falco; a replica that just started counts from its start.",
            Query(f"topk(20, {SILENT})"),
            unit="s",
            value="silent for",
        ),
        graph(
            "What Falco dropped",
            "outputs_queue: alerts it could not send. syscall: events it never saw.",
            Query(
                "sum by (node, reason) (increase(falco_forwarder_sensor_dropped_total@{cluster}[$__rate_interval]))",
                "{{node}} {{reason}}",
            ),
        ),
    ],
)

CONFIGURATION = Row(
    "Configuration",
    [
        graph(
            "Replicas by version",
            "More than one version: a roll-out is under way.",
            Query("count by (version) (falco_forwarder_build_info@{})", "{{version}}"),
        ),
        graph(
            "Rules of the house",
            "In force, and silences among them.",
            Query("max(falco_forwarder_rules@{})", "rules"),
            Query("max(falco_forwarder_rules_silences_active@{})", "silences"),
        ),
        states(
            "Changed files",
            "0 faults, or what was read before stays in force: the configuration, and the receiver's certificate, key and credentials.",
            Query(
                "min by (pod) (falco_forwarder_rules_reload_ok@{}) * min by (pod) (falco_forwarder_receiver_files_ok@{})",
                "{{pod}}",
            ),
            {1: ("in force", GREEN), 0: ("faults, see the log", RED)},
        ),
        stat(
            "Receiver's certificate",
            "Time it still has, the shortest of the replicas.",
            Query("min(falco_forwarder_certificate_expires_timestamp_seconds@{} < Inf) - time()", "left"),
            unit="s",
            none="no TLS",
            width=4,
        ),
    ],
)


def operations() -> Object:
    """The dashboard."""
    rows = [OVERVIEW, FLOW, SPOOL, SINKS, LATENCY, ENRICHMENT, SENSORS, CONFIGURATION]
    return dashboard(
        "falco-forwarder-operations",
        "Falco AWS Forwarder / Operations",
        "Flow, spool, sinks, latency, enrichment and sensors. Numbers over all replicas, unless a pod is chosen.",
        REPLICAS,
        rows,
        "30s",
    )
