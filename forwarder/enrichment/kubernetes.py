"""Enrichment from the Kubernetes API: which pod, which workload, whose namespace, which node.

Reflectors keep pods, nodes, namespaces, ReplicaSets and Jobs in memory (``kubernetes_reflector``, ``kubernetes_cache``); an alert
costs a few dictionary look-ups. Steps, in this order, each named in ``kubernetes.resolved_by``:

=============  ==========================================================================================
pod_uid        ``k8s.pod.uid``, if asked for in Falco
name           namespace and name: the pod of that name that lived at the alert's time
container_id   12 or 64 digits; also the container's instance before its last restart
pod_ip         ``k8s.pod.ip``, the pod that had the address at the alert's time
=============  ==========================================================================================

The node: the pod's; else by Falco's hostname (a node, one of its addresses, a Falco pod, a container id); else by the address the
alert came from. Alerts of plugins happened elsewhere: k8s_audit gets the target's namespace and the user, others nothing.

The API server may be away, slow, or forbid everything: what is cached stays in service, marked ``stale``; nothing here waits.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
import structlog

from forwarder.alert import present
from forwarder.config import setting
from forwarder.enricher import PLUGIN_FREE_SOURCES, Subject
from forwarder.kubernetes_access import Access, AccessError, find_source
from forwarder.kubernetes_api import Api
from forwarder.kubernetes_members import (
    cluster_of,
    kubernetes_member,
    node_member,
    told_member,
    workload_of,
)
from forwarder.kubernetes_mirror import Mirror
from forwarder.kubernetes_missing import Missing
from forwarder.kubernetes_objects import Labels, Node, Pod, decode_pod
from forwarder.kubernetes_told import Told, container_told, find_pod, runs_falco, told_of
from forwarder.metrics import Metrics

REMEMBERED_MAX = 12_288
"""About 1.1 KB each."""
START_AGAIN_SECS = 30.0
_WHOLE = b'"provider_id":'
"""In ``node`` where the Node object was there."""

_OWNERS = {"ReplicaSet": "replicasets", "Job": "jobs"}
DEFAULT_LABELS = ["app.kubernetes.io/*", "app", "team"]

log = structlog.get_logger("kubernetes")


class KubernetesSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Section ``enrichment.kubernetes``."""

    enabled: Annotated[
        bool | Literal["auto"],
        setting(
            "Ask the Kubernetes API; `auto`: where the forwarder runs in a pod, or a kubeconfig is named."
        ),
    ] = "auto"
    kubeconfig: Annotated[
        str, setting("Kubeconfig to use instead of the pod's service account; KUBECONFIG where it is empty.")
    ] = ""
    node_name: Annotated[
        str,
        setting("Watch the pods of this node only (daemonset mode).", pattern=r"^[0-9a-z.-]{0,253}\Z"),
    ] = ""
    trust_peer: Annotated[
        bool,
        setting(
            "Falco posts to the forwarder itself, so the address an alert comes from tells its node where the hostname does not; "
            "false behind falcosidekick, an ingress, or anything else that hands alerts on."
        ),
    ] = True
    labels: Annotated[list[str], setting("Labels of pods to keep: keys, or prefixes that end in `*`.")] = (
        msgspec.field(default_factory=lambda: list(DEFAULT_LABELS))
    )
    namespace_labels: Annotated[
        list[str], setting("Labels of namespaces to keep: keys, or prefixes that end in `*`.")
    ] = msgspec.field(default_factory=lambda: list(DEFAULT_LABELS))
    labels_bytes_max: Annotated[
        int,
        setting("Most of the labels of one object, keys and values, to keep.", unit="bytes", ge=0, le=65_536),
    ] = 2048


class Kubernetes:
    """The enricher ``kubernetes``."""

    settings_type = KubernetesSettings
    name = "kubernetes"

    def __init__(
        self,
        settings: KubernetesSettings,
        *,
        metrics: Metrics,
        now: Callable[[], float],
        monotonic: Callable[[], float],
        rng: random.Random,
        environment: Mapping[str, str],
        sensor_labels: Mapping[str, str] = MappingProxyType({}),
        **_: Any,
    ) -> None:
        """``sensor_labels`` are those of the nodes Falco should run on (``sensors.node_selector``)."""
        self._settings = settings
        self._metrics = metrics
        self._now = now
        self._monotonic = monotonic
        self._rng = rng
        self._environment = environment
        self._labels = Labels(settings.labels, settings.labels_bytes_max)
        self._remembered: dict[tuple[str, str, str, str], tuple[Pod, bool, bytes]] = {}
        self.mirror = Mirror(
            pod_labels=self._labels,
            namespace_labels=Labels(settings.namespace_labels, settings.labels_bytes_max),
            now=now,
            monotonic=monotonic,
            changed=self._remembered.clear,
            sensor_labels=sensor_labels,
        )
        self.api: Api | None = None
        self.trouble = ""
        """Why the API cannot be asked at all."""
        self._state = "starting"
        self._missing: Missing | None = None
        self._task: asyncio.Task[None] | None = None
        self._results: Counter[str] = Counter()
        self._unsynced = self._stale = True
        self._nodes_settled = False
        self._remembered_nodes: dict[str, tuple[Node, bytes]] = {}

    # ---- life ---------------------------------------------------------------------------------------

    def wanted_services(self) -> list[tuple[str, Any]]:
        return []

    async def start(self) -> None:
        if self._settings.enabled is not False:
            self._task = asyncio.create_task(self._connect(), name="kubernetes")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _connect(self) -> None:
        """Find the API and begin to watch; where there is none, that is all, unless there has to be one."""
        while True:
            try:
                source = await asyncio.to_thread(find_source, self._settings.kubeconfig, self._environment)
                if source is not None:
                    await self._watch(Api(Access(source, self._monotonic)))
                if self._settings.enabled == "auto":
                    self._state = "none here"
                    log.info("no Kubernetes API here: alerts go without pods and nodes")
                    return
                raise AccessError("neither a service account nor a kubeconfig is there")
            except AccessError as error:
                self.trouble, self._state = str(error), "broken"
                log.error("the Kubernetes API cannot be asked", error=self.trouble)
                await asyncio.sleep(START_AGAIN_SECS)

    async def _watch(self, api: Api) -> None:
        """Until cancelled."""
        self.api, self.trouble = api, ""
        self._missing = Missing(api, self._offer, self._monotonic)
        self.mirror.start(api, node_name=self._settings.node_name, rng=self._rng, metrics=self._metrics)
        try:
            await self._missing.run()
        finally:
            await self.mirror.stop()
            await api.close()

    def _offer(self, data: bytes) -> None:
        pod, _ = decode_pod(data, self._labels)
        self.mirror.pods.offer(pod)

    # ---- what is asked from outside -----------------------------------------------------------------

    def cluster(self) -> str:
        """Name of the cluster as its nodes tell it, or nothing."""
        return cluster_of(self.mirror.nodes)

    def an_instance(self) -> str:
        """Id of any EC2 instance that is a node, or nothing."""
        return next((node.instance_id for node in self.mirror.nodes.live() if node.instance_id), "")

    def region(self) -> str:
        """Region of the nodes, or nothing where they are in several."""
        regions = {node.region for node in self.mirror.nodes.live() if node.region}
        return regions.pop() if len(regions) == 1 else ""

    def node_of(self, hostname: str, peer: str, at: float | None = None) -> str:
        """Name of the node a message of Falco's came from (at ``at``, or just now), or nothing."""
        name = self._node_of_host(hostname) if hostname else ""
        if not name and self._settings.trust_peer and peer:
            name = self._node_of_peer(peer, self._now() if at is None else at)
        return name

    def sensor_nodes(self) -> dict[str, str] | None:
        """Names (and UIDs) of the live nodes Falco should run on; None as long as nobody told us."""
        if not self.mirror.synced("nodes"):
            return None
        return {node.name: node.uid for node in self.mirror.nodes.live() if node.wants_sensor}

    def nodes_are_current(self) -> bool:
        """Whether the list of nodes is what the API server would say now."""
        return not self.mirror.stale("nodes")

    def node_enrichment(self, name: str) -> bytes:
        """``"node":{...}`` for a record about this node."""
        return b'"node":' + self._node(name)

    def publish(self) -> None:
        for result, count in self._results.items():
            self._metrics.enrichment[result].inc(count)
        self._results.clear()
        if self.api is None:
            return
        mirror, metrics = self.mirror, self._metrics
        mirror.expire()
        if self._missing is not None:
            self._missing.expire()
        self._unsynced, self._stale = not mirror.synced("pods"), mirror.behind()
        self._nodes_settled = mirror.synced("nodes") or mirror.forbidden("nodes")
        for kind, size in mirror.sizes().items():
            metrics.kubernetes_objects[kind].set(size)
        for kind, reflector in mirror.reflectors.items():
            metrics.kubernetes_synced[kind].set(reflector.synced.is_set())
            metrics.kubernetes_stale[kind].set(mirror.stale(kind))
            if reflector.synced.is_set():
                metrics.kubernetes_event_age[kind].set(mirror.age_secs(kind))

    def status(self) -> dict[str, Any]:
        if self.api is None:
            return {"state": self._state, "trouble": self.trouble or None}
        missing = self._missing
        return {
            "state": "on",
            "server": self.api.server,
            "kinds": self.mirror.state(),
            "unknown_pods": missing.state() if missing is not None else None,
        }

    # ---- one alert ----------------------------------------------------------------------------------

    def enrich(self, subject: Subject, members: dict[str, bytes]) -> bool:
        """``kubernetes`` and ``node``, from memory."""
        if subject.source not in PLUGIN_FREE_SOURCES:
            return self._audited(subject, members)
        if self.api is None:
            return self._count(subject, "no_api")
        told = told_of(subject.fields)
        if not (told.container_id or told.pod or told.uid or told.ip or told.docker):
            node = self._host_node(subject)
            self._count(subject, "node" if node else "node_unknown")
            return self._add_node(members, node)
        pod, step = find_pod(self.mirror.pods, told, subject.time_ns / 1e9)
        if pod is None:
            return self._missed(subject, told, members)
        self._count(subject, step)
        member, sure = self._member(pod, told, step)
        members.setdefault("kubernetes", member)
        if pod.node:
            return self._add_node(members, self._node(pod.node)) and sure
        self._add_node(members, self._host_node(subject))
        return False  # it runs, so it has a node: the watch is behind

    def _add_node(self, members: dict[str, bytes], node: bytes) -> bool:
        """Put it in; False where the node list, when it comes, may know more of it."""
        if node:
            members.setdefault("node", node)
        return _WHOLE in node or self._nodes_settled

    def _missed(self, subject: Subject, told: Told, members: dict[str, bytes]) -> bool:
        """Only what Falco said; True where there is no hope that more will be known in a moment."""
        _, name, namespace, uid = told.docker or ("", "", "", "")
        pod, namespace = told.pod or name, told.namespace or namespace
        said = told_member(namespace=namespace, pod=pod, pod_uid=told.uid or uid, pod_ip=told.ip)
        if said:
            members.setdefault("kubernetes", said)
        self._add_node(members, self._host_node(subject))
        self._count(subject, "unsynced" if self._unsynced else "miss")
        if self._missing is None:
            return True
        identity = pod if namespace and pod else told.uid or told.container_id or told.ip
        fresh = self._missing.remember(namespace if pod else "", identity)
        return not fresh and not self._unsynced

    def _audited(self, subject: Subject, members: dict[str, bytes]) -> bool:
        """Of plugins' alerts, those of k8s_audit: the target's namespace and the user, wherever Falco runs."""
        if subject.source != "k8s_audit":
            return self._count(subject, "not_applicable")
        fields = subject.fields
        namespace = present(fields.audit_namespace)
        member = told_member(namespace=namespace, user=present(fields.audit_user))
        if member:
            members.setdefault("kubernetes", member)
        return self._count(subject, "audit" if member else "not_applicable")

    def _count(self, subject: Subject, result: str) -> Literal[True]:
        if not subject.again:
            self._results[result] += 1
        return True

    def _member(self, pod: Pod, told: Told, step: str) -> tuple[bytes, bool]:
        """``kubernetes`` of a known pod, and whether it is all there is; remembered, because alerts come in swarms."""
        key = (pod.uid, told.container_id, told.container, step)
        known = self._remembered.get(key)
        if known is not None and known[0] is pod and known[1] is self._stale:
            return known[2], True
        container, certain = container_told(pod, told)
        mirror = self.mirror
        workload, sure = workload_of(pod, mirror.owners)
        namespace = mirror.namespaces.named(pod.namespace)
        member = kubernetes_member(
            pod,
            container,
            workload=workload,
            namespace_labels=namespace.labels if namespace else (),
            resolved_by=step,
            stale=self._stale,
        )
        if not certain and self._missing is not None and self._missing.remember("", told.container_id):
            return member, False  # the runtime was quicker than the watch
        # Of what is forbidden there is nothing to wait for; where the chain stopped is what was missing.
        sure = sure or mirror.forbidden(_OWNERS.get(workload.kind, ""))
        if not sure or (namespace is None and not mirror.forbidden("namespaces")):
            return member, False
        _remember(self._remembered, key, (pod, self._stale, member))
        return member, True

    def _node(self, name: str) -> bytes:
        node = self.mirror.nodes.named(name)
        if node is None:
            return told_member(name=name)
        known = self._remembered_nodes.get(name)
        if known is None or known[0] is not node:
            known = (node, node_member(node))
            _remember(self._remembered_nodes, name, known)
        return known[1]

    def _host_node(self, subject: Subject) -> bytes:
        """The node the alert came from, or nothing."""
        name = self.node_of(subject.hostname, subject.peer, subject.time_ns / 1e9)
        return self._node(name) if name else b""

    def _node_of_host(self, host: str) -> str:
        """By a node's name or address, by the name of a Falco pod, by the container Falco runs in."""
        node = self.mirror.nodes.find(host)
        if node is not None:
            return node.name
        pods = self.mirror.pods
        pod = pods.by_bare_name(host)
        if pod is None or not runs_falco(pod):  # any pod may be called like somebody's machine
            pod = pods.by_container(host)
        return pod.node if pod is not None else ""

    def _node_of_peer(self, peer: str, at: float) -> str:
        """By a node's address, or that of a Falco pod; what others hand on came from elsewhere."""
        node = self.mirror.nodes.find(peer)
        if node is not None:
            return node.name
        pod = self.mirror.pods.by_address(peer, at)
        return pod.node if pod is not None and runs_falco(pod) else ""


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= REMEMBERED_MAX:
        del memory[next(iter(memory))]
    memory[key] = value
