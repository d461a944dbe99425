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
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import structlog

from forwarder.alert import present
from forwarder.config import setting
from forwarder.enricher import PLUGIN_FREE_SOURCES, Fields, Subject
from forwarder.kubernetes_access import Access, AccessError, find_source
from forwarder.kubernetes_api import Api
from forwarder.kubernetes_cache import container_named, container_of
from forwarder.kubernetes_members import (
    cluster_of,
    kubernetes_member,
    node_member,
    told_member,
    workload_of,
)
from forwarder.kubernetes_mirror import Mirror
from forwarder.kubernetes_missing import Missing
from forwarder.kubernetes_objects import Container, Labels, Node, Pod, decode_pod
from forwarder.metrics import Metrics

REMEMBERED_MAX = 12_288
"""About 1.1 KB each."""
START_AGAIN_SECS = 30.0
ABSENT = "<NA>"
_NO_CONTAINER = frozenset({"host", ABSENT})
"""Falco's ``container.id`` outside of containers, and where it does not know."""
DOCKER_PARTS = 6

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
        **_: Any,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
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
        )
        self.api: Api | None = None
        self.trouble = ""
        """Why the API cannot be asked at all."""
        self._missing: Missing | None = None
        self._task: asyncio.Task[None] | None = None
        self._results: Counter[str] = Counter()
        self._unsynced = self._stale = True
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
                    log.info("no Kubernetes API here: alerts go without pods and nodes")
                    return
                raise AccessError("neither a service account nor a kubeconfig is there")
            except AccessError as error:
                self.trouble = str(error)
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
        self._unsynced, self._stale = not mirror.synced("pods"), mirror.stale("pods")
        for kind, size in mirror.sizes().items():
            metrics.kubernetes_objects[kind].set(size)
        for kind, reflector in mirror.reflectors.items():
            metrics.kubernetes_synced[kind].set(reflector.synced.is_set())
            metrics.kubernetes_stale[kind].set(mirror.stale(kind))
            if reflector.synced.is_set():
                metrics.kubernetes_event_age[kind].set(mirror.age_secs(kind))

    def status(self) -> dict[str, Any]:
        if self.api is None:
            return {"state": "off", "trouble": self.trouble or None}
        return {"state": "on", "server": self.api.server, "kinds": self.mirror.state()}

    # ---- one alert ----------------------------------------------------------------------------------

    def enrich(self, subject: Subject, members: dict[str, bytes]) -> bool:
        """``kubernetes`` and ``node``, from memory."""
        fields = subject.fields
        if subject.source == "k8s_audit":
            return self._audited(subject, members)
        if self.api is None or subject.source not in PLUGIN_FREE_SOURCES:
            return self._count(subject, "not_applicable")
        told = _told(fields)
        if not (told.container_id or told.pod or told.uid or told.ip):
            node = self._host_node(subject)
            self._count(subject, "node" if node else "not_applicable")
            if node:
                members.setdefault("node", node)
            return bool(node) or not self._unsynced
        pod, step = self._find(told, subject.time_ns / 1e9)
        if pod is None:
            return self._missed(subject, told, members)
        self._count(subject, step)
        member, sure = self._member(pod, told, step)
        members.setdefault("kubernetes", member)
        if pod.node:
            members.setdefault("node", self._node(pod.node))
        return sure

    def _find(self, told: _Told, at: float) -> tuple[Pod | None, str]:
        pods = self.mirror.pods
        if told.uid:
            pod = pods.by_uid(told.uid)
            if pod is not None:
                return pod, "pod_uid"
        if told.namespace and told.pod:
            pod = pods.by_place(told.namespace, told.pod, at)
            if pod is not None:
                return pod, "name"
        if told.container_id:
            pod = pods.by_container(told.container_id)
            if pod is not None:
                return pod, "container_id"
        if told.ip:
            pod = pods.by_address(told.ip, at)
            if pod is not None:
                return pod, "pod_ip"
        return None, ""

    def _missed(self, subject: Subject, told: _Told, members: dict[str, bytes]) -> bool:
        """Only what Falco said; True where there is no hope that more will be known in a moment."""
        said = told_member(namespace=told.namespace, pod=told.pod, pod_uid=told.uid, pod_ip=told.ip)
        if said:
            members.setdefault("kubernetes", said)
        node = self._host_node(subject)
        if node:
            members.setdefault("node", node)
        self._count(subject, "unsynced" if self._unsynced else "miss")
        if self._missing is None:
            return True
        name = told.pod if told.namespace and told.pod else told.uid or told.container_id or told.ip
        fresh = self._missing.miss(told.namespace if told.pod else "", name)
        return not fresh and not self._unsynced

    def _audited(self, subject: Subject, members: dict[str, bytes]) -> bool:
        """k8s_audit: the target's namespace and the user, wherever Falco runs."""
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

    def _member(self, pod: Pod, told: _Told, step: str) -> tuple[bytes, bool]:
        """``kubernetes`` of a known pod, and whether it is all there is; remembered, because alerts come in swarms."""
        key = (pod.uid, told.container_id, told.container, step)
        known = self._remembered.get(key)
        if known is not None and known[0] is pod and known[1] is self._stale:
            return known[2], True
        container = _container(pod, told)
        workload, sure = workload_of(pod, self.mirror.owners)
        namespace = self.mirror.namespaces.named(pod.namespace)
        member = kubernetes_member(
            pod,
            container,
            workload=workload,
            namespace_labels=namespace.labels if namespace else (),
            resolved_by=step,
            stale=self._stale,
        )
        # Where a kind is forbidden or away for good, there is nothing to wait for.
        hopeless = self.mirror.stale("replicasets") or self.mirror.stale("namespaces")
        if container is None and told.container_id and self._hopes_for(told.container_id):
            return member, False  # the runtime was quicker than the watch
        if not hopeless and not (sure and namespace is not None):
            return member, False
        _remember(self._remembered, key, (pod, self._stale, member))
        return member, True

    def _hopes_for(self, container_id: str) -> bool:
        return self._missing is not None and self._missing.miss("", container_id)

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
        nodes, pods = self.mirror.nodes, self.mirror.pods
        host, peer = subject.hostname, subject.peer
        for name in (host, peer):
            node = nodes.find(name) if name else None
            if node is not None:
                return self._node(node.name)
            pod = None
            if name and name is host:
                pod = pods.by_bare_name(host) or pods.by_container(host)
            elif name:
                pod = pods.by_address(peer, subject.time_ns / 1e9)
            if pod is not None and pod.node:
                return self._node(pod.node)
        return b""


class _Told(NamedTuple):
    """What Falco says of the pod, absent values empty."""

    uid: str
    namespace: str
    pod: str
    container: str
    container_id: str
    ip: str


def _told(fields: Fields) -> _Told:
    """Written out: this runs for every alert, and most values are absent."""
    uid = fields.pod_uid or fields.plugin_pod_uid
    namespace = fields.namespace or fields.plugin_namespace
    pod = fields.pod_name or fields.plugin_pod_name
    container = fields.container_name
    container_id = fields.container_full_id or fields.container_id
    ip = fields.pod_ip or fields.plugin_pod_ip
    if container and container.startswith("k8s_"):
        # Docker's name for a pod's container: k8s_<container>_<pod>_<namespace>_<uid>_<attempt>
        parts = container.split("_")
        if len(parts) == DOCKER_PARTS:
            container = parts[1]
            pod, namespace, uid = pod or parts[2], namespace or parts[3], uid or parts[4]
    return _Told(
        "" if uid is None or uid == ABSENT else uid,
        "" if namespace is None or namespace == ABSENT else namespace,
        "" if pod is None or pod == ABSENT else pod,
        "" if container is None or container == ABSENT else container,
        "" if container_id is None or container_id in _NO_CONTAINER else container_id,
        "" if ip is None or ip == ABSENT else ip,
    )


def _container(pod: Pod, told: _Told) -> Container | None:
    """The container the alert is about, as far as that is certain."""
    if told.container_id:
        container = container_of(pod, told.container_id)
        if container is not None and not container.id.startswith(told.container_id):
            # The instance before the restart: its start is not known.
            return msgspec.structs.replace(container, id=container.previous_id, started="")
        if container is not None:
            return container
    elif len(pod.containers) == 1:
        return pod.containers[0]
    return container_named(pod, told.container) if told.container else None


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= REMEMBERED_MAX:
        del memory[next(iter(memory))]
    memory[key] = value
