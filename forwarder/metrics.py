"""Every metric of the forwarder, declared once: name, help, labels, buckets.

Rules: prefix ``falco_forwarder_``; units last; counters end in ``_total`` and grow after success only; every
label value comes from a closed set and its series exists at 0 from the first scrape (sensors' nodes apart: ``sensors_metrics``), so that alert rules and
dashboards never meet a gap. The registry belongs to the instance: two applications in one process (tests) do
not share numbers.

The law at rest (nothing under way), which a test holds us to:

    received = stored + duplicate + unparsed + discarded
    recovered + stored = filtered + delivered + dead-lettered + pending + aggregating      (for each sink)
"""

from __future__ import annotations

import math
import sqlite3
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from forwarder import __version__

PREFIX = "falco_forwarder"
PRIORITY_LABELS = (
    "emergency",
    "alert",
    "critical",
    "error",
    "warning",
    "notice",
    "informational",
    "debug",
)
DISCARD_REASONS = ("spool_full", "spool_failed")
ERROR_CODES = (
    "throttled",
    "unavailable",
    "network",
    "timeout",
    "credentials",
    "permission",
    "disabled",
    "not_found",
    "invalid",
    "too_large",
    "conflict",
    "unknown",
)
DEAD_LETTER_REASONS = (
    "invalid",
    "rejected",
    "too_large",
    "permission",
    "unmappable",
    "unknown",
    "broken_block",
)
FILTER_REASONS = ("not_a_finding", "minimum_priority", "route", "drop", "silence")
FINDING_UPDATES = ("first", "priority", "count", "archive", "notice")
ENRICHMENT_RESULTS = (
    "pod_uid",
    "name",
    "container_id",
    "pod_ip",
    "node",
    "audit",
    "node_unknown",
    "miss",
    "unsynced",
    "no_api",
    "not_applicable",
    "failed",
)
KUBERNETES_KINDS = ("pods", "nodes", "namespaces", "replicasets", "jobs")
WATCH_RESTARTS = (
    "ended",
    "short",
    "expired",
    "too_new",
    "network",
    "timeout",
    "throttled",
    "unavailable",
    "credentials",
    "permission",
    "refused",
    "decode",
)
STATES = ("starting", "delivering", "retrying", "blocked", "stopped")
AUTH_FAULTS = ("missing", "wrong")
HANDSHAKE_FAULTS = (
    "plain_http",
    "no_certificate",
    "untrusted_certificate",
    "refused_by_sender",
    "left",
    "other",
)
CONNECTION_LIMITS = ("connections", "idle", "header_timeout", "age", "bodies")

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LATENCY = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, 21600)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Latency(Collector):
    """A histogram for the path of every alert: cheaper than the library's, because no thread shares it."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """All metrics of one application, in a registry of its own."""

    def __init__(self, sinks: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self.sinks = tuple(sinks)
        self._ingest()
        self._spool()
        self._delivery()
        self._rules()
        self._enrichment()
        self._process()

    def _ingest(self) -> None:
        self.received = self._counter("received_events", "Alerts received, unparsable bodies included")
        self.received_bytes = self._counter("received_bytes", "Bytes of received bodies")
        self.stored = self._counter("stored_events", "Alerts written to the spool and acknowledged")
        self.duplicates = self._counter(
            "duplicate_events", "Alerts acknowledged but not stored again: the same bytes came before"
        )
        self.unparsed = self._counter(
            "unparsed_events", "Bodies nobody could read: kept as dead letters and sent to log sinks raw"
        )
        discarded = self._counter(
            "discarded_events",
            "Alerts really lost: refused with 503 after holding the answer",
            "reason",
            "priority",
        )
        self.discarded = {
            (reason, rank): discarded.labels(reason, label)
            for reason in DISCARD_REASONS
            for rank, label in enumerate(PRIORITY_LABELS)
        }
        self.text_mode = self._counter(
            "text_mode_events", "Alerts in text form: set json_output true in Falco, findings need it"
        )
        self.unknown_priority = self._counter(
            "unknown_priority_events", "Alerts with a priority Falco does not have, treated as warning"
        )
        self.utf8_replaced = self._counter(
            "utf8_replaced_bodies", "Bodies in which invalid UTF-8 was replaced by U+FFFD"
        )
        self.held = self._gauge("held_requests", "Requests waiting for room in the spool")
        self.ack_seconds = Latency(
            f"{PREFIX}_ack_seconds", "From the whole body to the durable answer", _FAST
        )
        self.registry.register(self.ack_seconds)
        requests = self._counter("http_requests", "Answers of the receiver", "status")
        self.requests = {
            status: requests.labels(str(status)) for status in (200, 400, 401, 405, 408, 413, 415, 500, 503)
        }
        self.connections = self._gauge("connections", "Open connections of senders")
        closed = self._counter(
            "connections_closed",
            "Connections closed by a limit. connections, bodies: turned away, their alert was not read; idle: one that never sent a "
            "request made room; age: with an answer",
            "limit",
        )
        self.connections_closed = {limit: closed.labels(limit) for limit in CONNECTION_LIMITS}
        self._receiver_files()

    def _receiver_files(self) -> None:
        refused = self._counter(
            "auth_failures", "Requests refused with 401: credentials missing, or not in the file", "reason"
        )
        self.auth_failures = {reason: refused.labels(reason) for reason in AUTH_FAULTS}
        failed = self._counter(
            "tls_handshakes_failed",
            "Connections that never were one. plain_http: no TLS; no_certificate, untrusted_certificate: of the sender; "
            "refused_by_sender: it does not trust ours; left: it closed, or said nothing in time, as a port scan does",
            "reason",
        )
        self.handshakes_failed = {reason: failed.labels(reason) for reason in HANDSHAKE_FAULTS}
        self.certificate_expires = self._gauge(
            "certificate_expires_timestamp_seconds",
            "When the receiver's certificate expires, +Inf without TLS",
        )
        self.certificate_expires.set(math.inf)
        self.receiver_files_ok = self._gauge(
            "receiver_files_ok",
            "0 while a changed certificate, key or credentials file has faults and what was in force stays",
        )
        self.receiver_files_ok.set(1)

    def _spool(self) -> None:
        self.commit_batch = self._histogram(
            "commit_batch_events", "Alerts in one group commit", buckets=_COUNTS
        )
        self.sync_seconds = self._histogram(
            "fsync_seconds", "Duration of a commit, sync included", buckets=_FAST
        )
        self.spool_events = self._gauge("spool_events", "Alerts on disk")
        self.spool_bytes = self._gauge("spool_bytes", "Bytes of the quota in use")
        self.spool_capacity = self._gauge("spool_capacity_bytes", "The quota now in force")
        self.spool_corrupt = self._gauge(
            "spool_corrupt", "1 if a broken database was set aside at start, see the log"
        )
        self.spool_broken = self._counter("spool_broken_blocks", "Blocks set aside as unreadable")
        self.spool_errors = self._counter("spool_write_errors", "Commits the volume refused")
        self.spool_oldest = self._per_sink_gauge("spool_oldest_seconds", "Age of the oldest alert waiting")

    def _delivery(self) -> None:
        self.pending = self._per_sink_gauge("sink_pending", "Alerts the sink has not settled")
        self.pending_unparsed = self._per_sink_gauge(
            "sink_pending_unparsed", "Unparsable bodies a log sink has not sent on"
        )
        self.recovered = self._per_sink_gauge("sink_recovered", "Alerts found waiting at start")
        self.delivered = self._per_sink_counter("sent_events", "Alerts the service accepted")
        self.sent_bytes = self._per_sink_counter(
            "sent_bytes", "Bytes of accepted requests, before any compression"
        )
        filtered = self._counter(
            "filtered_events",
            "Alerts the configuration keeps from this sink. not_a_finding: Falco's internal messages and texts; minimum_priority: "
            "the sink's or a rule's; route: a rule sends it elsewhere; drop, silence: a rule says so",
            "sink",
            "reason",
        )
        self.filtered = {
            (sink, reason): filtered.labels(sink, reason) for sink in self.sinks for reason in FILTER_REASONS
        }
        self.unparsed_forwarded = self._per_sink_counter(
            "unparsed_forwarded_events", "Unparsable bodies sent on raw"
        )
        self.retries = self._per_sink_counter("retries", "Repeated calls")
        self.truncated = self._per_sink_counter(
            "truncated_events", "Alerts cut to fit a limit of the service"
        )
        self.adjusted = self._per_sink_counter(
            "timestamp_adjusted_events", "Alerts whose timestamp was moved into the accepted window"
        )
        failures = self._counter("send_failed", "Calls that failed, by bounded code", "sink", "error_code")
        self.failures = {
            (sink, code): failures.labels(sink, code) for sink in self.sinks for code in ERROR_CODES
        }
        dead = self._counter("dead_lettered_events", "Alerts set aside for good", "sink", "reason")
        self.dead_lettered = {
            (sink, reason): dead.labels(sink, reason) for sink in self.sinks for reason in DEAD_LETTER_REASONS
        }
        self.dead_letters = self._gauge("dead_letter_events", "Dead letters on disk", "sink")
        for name in (*self.sinks, "receiver", "spool"):
            self.dead_letters.labels(name)
        self.dead_removed = self._counter(
            "dead_letters_removed", "Dead letters removed at the end of their retention or share"
        )
        self.in_flight = self._per_sink_gauge("in_flight", "Calls under way")
        self.concurrency = self._per_sink_gauge("adaptive_concurrency_limit", "Calls allowed at a time")
        self.rate_limit = self._per_sink_gauge(
            "rate_limit_per_second", "Calls allowed each second, 0 = unlimited"
        )
        self.call_seconds = self._per_sink_histogram("rtt_seconds", "Duration of a call", _SLOW)
        self.latency = self._per_sink_histogram(
            "e2e_latency_seconds", "From receipt to acceptance by AWS, oldest alert of a batch", _LATENCY
        )
        self.batch_events = self._per_sink_histogram("sent_batch_events", "Alerts in one call", _COUNTS)
        self.last_success = self._per_sink_gauge(
            "last_success_timestamp_seconds", "When the service last accepted a call, 0 = not yet"
        )
        self.clock_skew = self._per_sink_gauge(
            "clock_skew_seconds", "The service's clock minus ours, by the last answer; to a second"
        )
        self.credentials_expire = self._per_sink_gauge(
            "credentials_expire_timestamp_seconds",
            "When the credentials expire, +Inf where they do not or there are none yet",
        )
        self._findings()
        state = self._gauge("sink_state", "1 for the state the sink is in", "sink", "state")
        self.state = {(sink, name): state.labels(sink, name) for sink in self.sinks for name in STATES}

    def _findings(self) -> None:
        self.aggregating = self._per_sink_gauge(
            "sink_aggregating",
            "Alerts counted in an issue whose finding does not say so yet, because the time of its next update has not come",
        )
        self.issues = self._gauge("issues", "Issues that aggregation remembers")
        self.issues_max = self._gauge("issues_max", "Most issues that fit")
        self.aggregated = self._counter("aggregated_events", "Alerts counted in issues")
        self.issues_evicted = self._counter(
            "issues_evicted", "Issues forgotten because the table was full: what comes is a new finding"
        )
        updates = self._counter(
            "finding_updates",
            "Findings the service accepted. first: a new one; priority: more severe than before, or back from the archive; count: more alerts; "
            "archive: idle for long; notice: of the forwarder itself",
            "reason",
        )
        self.finding_updates = {reason: updates.labels(reason) for reason in FINDING_UPDATES}

    def _rules(self) -> None:
        self.rules = self._gauge("rules", "Rules of the house in force")
        self.silences = self._gauge("rules_silences_active", "Silences in force")
        reloads = self._counter("rules_reloads", "Changed configuration files, by outcome", "result")
        self.rules_reloads = {result: reloads.labels(result) for result in ("ok", "failed")}
        self.rules_reload_ok = self._gauge(
            "rules_reload_ok",
            "0 while the configuration file has faults and the rules before it stay in force",
        )
        self.rules_reload_ok.set(1)

    def _enrichment(self) -> None:
        results = self._counter(
            "enrichment",
            "Alerts by how their pod was found: pod_uid, name, container_id, pod_ip; node: a host's alert whose node is "
            "known (node_unknown: is not); audit: k8s_audit; miss: unknown pod; unsynced: unknown, before the first list; "
            "no_api: no API server to ask; not_applicable: a plugin's alert, it happened elsewhere; failed: a fault of ours",
            "result",
        )
        self.enrichment = {result: results.labels(result) for result in ENRICHMENT_RESULTS}
        self.enrichment_completed = self._counter(
            "enrichment_completed", "Alerts of which the second look, at a sink's delivery, found more"
        )
        objects = self._gauge(
            "kubernetes_objects", "Objects in the cache; tombstones are deleted pods", "kind"
        )
        self.kubernetes_objects = {kind: objects.labels(kind) for kind in (*KUBERNETES_KINDS, "tombstones")}
        synced = self._gauge("kubernetes_synced", "1 once the kind has been listed", "kind")
        stale = self._gauge("kubernetes_stale", "1 while the cache may be behind the API server", "kind")
        age = self._gauge(
            "kubernetes_last_event_age_seconds", "Since the last list, event or bookmark", "kind"
        )
        restarts = self._counter(
            "kubernetes_watch_restarts",
            "Watches that ended, by reason; ended: in good order",
            "kind",
            "reason",
        )
        self.kubernetes_synced = {kind: synced.labels(kind) for kind in KUBERNETES_KINDS}
        self.kubernetes_stale = {kind: stale.labels(kind) for kind in KUBERNETES_KINDS}
        self.kubernetes_event_age = {kind: age.labels(kind) for kind in KUBERNETES_KINDS}
        self.watch_restarts = {
            (kind, reason): restarts.labels(kind, reason)
            for kind in KUBERNETES_KINDS
            for reason in WATCH_RESTARTS
        }

    def _process(self) -> None:
        self.loop_lag = self._gauge(
            "event_loop_lag_seconds", "Largest delay of the event loop in the last 10 s"
        )
        self.ready = self._gauge("ready", "1 if new alerts can be stored durably")
        info = self._gauge("build_info", "Always 1", "version", "sqlite_version")
        info.labels(__version__, sqlite3.sqlite_version).set(1)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, registry=self.registry, buckets=buckets)

    def _per_sink_counter(self, name: str, text: str) -> dict[str, Counter]:
        metric = self._counter(name, text, "sink")
        return {sink: metric.labels(sink) for sink in self.sinks}

    def _per_sink_gauge(self, name: str, text: str) -> dict[str, Gauge]:
        metric = self._gauge(name, text, "sink")
        return {sink: metric.labels(sink) for sink in self.sinks}

    def _per_sink_histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> dict[str, Histogram]:
        metric = self._histogram(name, text, "sink", buckets=buckets)
        return {sink: metric.labels(sink) for sink in self.sinks}
