"""Which node's Falco was heard when, which version it is, and what it dropped. Pure bookkeeping, in memory.

A Falco that died says nothing, and nothing is what a quiet node says too. So every alert counts as a sign of life, metrics snapshots
make it regular (``docs/sensors.md``), and the list of nodes tells who should have spoken.

``saw`` runs for every alert: it only notes who spoke. Once a second ``publish`` finds out which nodes those are. Whoever may post an
alert chooses its hostname, so who is not a node of the list is forgotten, and what is noted in between has a limit.

Falco's own counters (``falco.outputs_queue_num_drops``, ``scap.n_drops``) are passed on as they are: they start again with Falco, as
Prometheus expects. Where no snapshot told ``scap.n_drops``, the drops that Falco complained of are added up.

Ages are measured on the monotonic clock: a step of the wall clock makes no sensor silent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Raw

from forwarder.alert import Alert, encode
from forwarder.config import setting
from forwarder.enricher import PLUGIN_FREE_SOURCES

SNAPSHOT_RULE = "Falco internal: metrics snapshot"
DROP_RULE = "Falco internal: syscall event drop"
SPEAKERS_MAX = 10_000
"""Who spoke in the last second: hostname and address."""
UNKNOWN_SPEAKERS_MAX = 1000
UNKNOWN_SECS_MAX = 60.0
"""The watch may bring a node or its Falco pod a moment after its first message."""
RESOLVE_SECS = 1.0
HOSTNAME_LENGTH_MAX = 253
NUMBER_LENGTH_MAX = 32
COUNTER_MAX = 1 << 63
PEERS_MAX = 32

_INTERNAL = "Falco internal: "
_VERSION = re.compile(r"[0-9]{1,5}(\.[0-9]{1,5}){1,3}([-+][0-9A-Za-z.+-]{1,40})?\Z")

Reason = Literal["outputs_queue", "syscall"]


class FindingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Section ``sensors.finding``."""

    enabled: Annotated[bool, setting("A Security Hub finding for each node whose Falco is silent.")] = False
    severity: Annotated[
        Literal["informational", "low", "medium"], setting("Severity of that finding, in any case.")
    ] = "low"


class SensorsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Section ``sensors``."""

    node_selector: Annotated[
        dict[str, str],
        setting(
            "Labels of the nodes Falco should run on, as in its daemon set's nodeSelector; all must match, none means all nodes. "
            "Fargate and Windows nodes never count."
        ),
    ] = msgspec.field(default_factory=dict)
    silent_after_secs: Annotated[
        float,
        setting(
            "A node not heard for so long is silent: three intervals of Falco's metrics snapshots.",
            unit="seconds",
            ge=60,
            le=604_800,
        ),
    ] = 2700.0
    peers: Annotated[
        list[
            Annotated[str, msgspec.Meta(pattern=r"^([0-9A-Za-z._-]{1,253}|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}\Z")]
        ],
        setting(
            "Admin ports of the other replicas, `host:port`, asked before a node is called silent; a name is asked at all its addresses, "
            "so a headless Service is enough.",
            max_length=PEERS_MAX,
        ),
    ] = msgspec.field(default_factory=list)
    finding: FindingSettings = msgspec.field(default_factory=FindingSettings)


class NodeList(Protocol):
    """What is asked of the Kubernetes enricher."""

    def node_of(self, hostname: str, peer: str) -> str:
        """Name of the node a message came from just now, or nothing."""

    def sensor_nodes(self) -> dict[str, str] | None:
        """Names and UIDs of the nodes Falco should run on; None as long as nobody told us."""

    def nodes_are_current(self) -> bool:
        """Whether that is what the API server would say now."""

    def node_enrichment(self, name: str) -> bytes:
        """``"node":{...}``."""


class Sensor(NamedTuple):
    """What is known of one node's Falco. Times are seconds since 1970."""

    node: str
    heard: float | None
    """When it was last heard by this replica."""
    listened: float
    """Since when this replica has listened for it."""
    version: str
    dropped: Mapping[Reason, int]

    @property
    def last_seen(self) -> float:
        """Of a node never heard: since when it could have been, so that a replica that just started accuses nobody."""
        return self.listened if self.heard is None else max(self.heard, self.listened)


class _Snapshot(msgspec.Struct, frozen=True, gc=False):
    """What is read of an internal message's ``output_fields``: any shape, looked at later."""

    source: Raw = msgspec.field(name="evt.source", default=Raw(b""))
    version: Raw = msgspec.field(name="falco.version", default=Raw(b""))
    outputs_queue: Raw = msgspec.field(name="falco.outputs_queue_num_drops", default=Raw(b""))
    syscall: Raw = msgspec.field(name="scap.n_drops", default=Raw(b""))
    lost: Raw = msgspec.field(name="n_drops", default=Raw(b""))


class _Report:
    """What a speaker's internal messages said since the last ``publish``."""

    __slots__ = ("lost", "outputs_queue", "syscall", "version")

    def __init__(self) -> None:
        self.version = ""
        self.outputs_queue: int | None = None
        self.syscall: int | None = None
        self.lost = 0


class _Entry:
    """One node. Times are of the monotonic clock."""

    __slots__ = ("counts_itself", "dropped", "heard", "listened", "uid", "version")

    def __init__(self, uid: str, listened: float) -> None:
        self.uid = uid
        self.listened = listened
        self.heard: float | None = None
        self.version = ""
        self.dropped: dict[Reason, int] = {}
        self.counts_itself = False
        """A snapshot told ``scap.n_drops``."""

    def take(self, report: _Report) -> None:
        self.version = report.version or self.version
        if report.outputs_queue is not None:
            self.dropped["outputs_queue"] = report.outputs_queue
        if report.syscall is not None:
            self.dropped["syscall"] = report.syscall
            self.counts_itself = True
        elif report.lost and not self.counts_itself:
            self.dropped["syscall"] = min(self.dropped.get("syscall", 0) + report.lost, COUNTER_MAX)


_Speaker = tuple[str, str]
"""Falco's hostname, and the address its message came from."""
_snapshot = msgspec.json.Decoder(_Snapshot | None)


class Sensors:
    """The sensors of the node list, as this replica hears them."""

    def __init__(
        self,
        settings: SensorsSettings,
        *,
        nodes: NodeList | None,
        now: Callable[[], float],
        monotonic: Callable[[], float],
        cluster: Callable[[], str] = lambda: "",
    ) -> None:
        """``cluster`` gives the discovered cluster's name."""
        self._cluster = cluster
        self.silent_after_secs = settings.silent_after_secs
        self._nodes = nodes
        self._now = now
        self._monotonic = monotonic
        self._speakers: dict[_Speaker, float] = {}
        self._reports: dict[_Speaker, _Report] = {}
        self._unknown: dict[_Speaker, tuple[float, _Report | None]] = {}
        self._entries: dict[str, _Entry] = {}
        self._resolved_at = float("-inf")
        self.known = False
        """Whether there is a list of nodes."""

    def saw(self, alert: Alert, peer: str) -> None:
        """Note that this Falco lives: for every alert, so in a fraction of a microsecond.

        Alerts of plugins do not count: a k8s_audit Falco may run on any node, whose own sensor it would hide.
        """
        source = alert.source
        if source not in PLUGIN_FREE_SOURCES or self._nodes is None:
            return
        hostname = alert.hostname
        speaker = (hostname if len(hostname) <= HOSTNAME_LENGTH_MAX else "", peer)
        speakers = self._speakers
        if len(speakers) >= SPEAKERS_MAX and speaker not in speakers:
            return
        if (source == "internal" or alert.rule.startswith(_INTERNAL)) and not self._heed(alert, speaker):
            return
        speakers[speaker] = self._monotonic()

    def _heed(self, alert: Alert, speaker: _Speaker) -> bool:
        """Read an internal message; False where it is no node's sensor that speaks."""
        if alert.rule not in {SNAPSHOT_RULE, DROP_RULE}:
            return True
        try:
            said = _snapshot.decode(alert.fields) or _Snapshot()
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return True  # it speaks, whatever it says
        if _text(said.source) not in {"", "syscall"}:
            return False
        report = self._reports.get(speaker)
        if report is None:
            report = self._reports[speaker] = _Report()
        if alert.rule == DROP_RULE:
            report.lost = min(report.lost + (_count(said.lost) or 0), COUNTER_MAX)
            return True
        version = _text(said.version)
        report.version = version if _VERSION.match(version) else report.version
        report.outputs_queue = _first(_count(said.outputs_queue), report.outputs_queue)
        report.syscall = _first(_count(said.syscall), report.syscall)
        return True

    def publish(self) -> None:
        """Follow the node list, and find the nodes of those who spoke: once a second, however often it is called."""
        now = self._monotonic()
        if self._nodes is None or now - self._resolved_at < RESOLVE_SECS:
            return
        self._resolved_at = now
        nodes = self._nodes.sensor_nodes()
        if nodes is not None:
            self.known = True
            self._follow(nodes, now)
        unknown, self._unknown = self._unknown, {}
        speakers, self._speakers = self._speakers, {}
        reports, self._reports = self._reports, {}
        for speaker, (at, report) in unknown.items():
            if now - at < UNKNOWN_SECS_MAX:
                self._resolve(self._nodes, speaker, at, report)
        for speaker, at in speakers.items():
            self._resolve(self._nodes, speaker, at, reports.get(speaker))

    def _follow(self, nodes: Mapping[str, str], now: float) -> None:
        entries = self._entries
        for name in entries.keys() - nodes.keys():
            del entries[name]
        for name, uid in nodes.items():
            entry = entries.get(name)
            if entry is None or entry.uid != uid:  # another machine may get the name of one that is gone
                entries[name] = _Entry(uid, now)

    def _resolve(self, nodes: NodeList, speaker: _Speaker, at: float, report: _Report | None) -> None:
        name = nodes.node_of(*speaker)
        entry = self._entries.get(name)
        if entry is not None:
            entry.heard = at if entry.heard is None else max(at, entry.heard)
            if report is not None:
                entry.take(report)
        elif not (name and self.known) and (
            len(self._unknown) < UNKNOWN_SPEAKERS_MAX or speaker in self._unknown
        ):
            self._unknown[speaker] = (at, report)

    # ---- what is asked ------------------------------------------------------------------------------

    def all(self) -> list[Sensor]:
        """Every node Falco should run on."""
        shift = self._now() - self._monotonic()
        return [
            Sensor(
                name,
                None if entry.heard is None else round(entry.heard + shift, 3),
                round(entry.listened + shift, 3),
                entry.version,
                entry.dropped,
            )
            for name, entry in self._entries.items()
        ]

    def is_silent(self, sensor: Sensor) -> bool:
        """As this replica hears it."""
        return self._now() - sensor.last_seen > self.silent_after_secs

    def heard(self) -> dict[str, dict[str, float]]:
        """The body of ``/sensors``, for the other replicas: nodes that were really heard here, and when."""
        return {"nodes": {sensor.node: sensor.heard for sensor in self.all() if sensor.heard is not None}}

    def list_is_current(self) -> bool:
        """Whether a node that is in the list is really there still."""
        return self.known and self._nodes is not None and self._nodes.nodes_are_current()

    def node_enrichment(self, name: str) -> bytes:
        """``"node":{...}``, and the discovered cluster, which is part of a finding's Id."""
        cluster = self._cluster()
        parts = [b'"cluster":' + encode(cluster)] if cluster else []
        node = self._nodes.node_enrichment(name) if self._nodes is not None else b""
        return b",".join([*parts, node] if node else parts)

    def status(self) -> dict[str, Any]:
        """For ``/status``."""
        silent = [sensor.node for sensor in self.all() if self.is_silent(sensor)]
        return {"node_list": self.known, "expected": len(self._entries), "silent_here": len(silent)}


def _first(value: int | None, otherwise: int | None) -> int | None:
    return otherwise if value is None else value


def _text(raw: Raw) -> str:
    if not bytes(raw).startswith(b'"'):
        return ""
    try:
        return msgspec.json.decode(raw, type=str)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""


def _count(raw: Raw) -> int | None:
    """A counter, as a number or as a text of digits; None for what is none."""
    data = bytes(raw).strip(b' "')
    if not data or len(data) > NUMBER_LENGTH_MAX:
        return None
    try:
        value = float(data)
    except ValueError:
        return None
    if not 0 <= value < COUNTER_MAX:  # NaN is neither
        return None
    return int(data) if data.isdigit() else int(value)
