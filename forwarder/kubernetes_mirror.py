"""The part of the cluster's state that enrichment needs, kept in memory by one reflector per kind.

Knows whether what it holds is complete (``synced``) and still true (``stale``). Its tasks go on through every outage; stopping ends
them. What the API server forbids stays empty, and the other kinds work.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from forwarder.kubernetes_api import Api
from forwarder.kubernetes_cache import Metas, Nodes, Pods
from forwarder.kubernetes_objects import (
    NO_LABELS,
    Labels,
    Meta,
    Node,
    Pod,
    decode_meta,
    decode_node,
    decode_pod,
)
from forwarder.kubernetes_reflector import Reflector, Resource
from forwarder.metrics import Metrics

STALE_SECS = 180.0
"""A healthy watch says something every minute (bookmarks); three of them missed."""

RESOURCES = {
    "pods": Resource("pods", "", metadata_only=False),
    "nodes": Resource("nodes", "", metadata_only=False),
    "namespaces": Resource("namespaces", "", metadata_only=True),
    "replicasets": Resource("replicasets", "apps", metadata_only=True),
    "jobs": Resource("jobs", "batch", metadata_only=True),
}
PERMISSIONS = (
    ("get", "", "pods"),
    *((verb, resource.group, kind) for kind, resource in RESOURCES.items() for verb in ("list", "watch")),
)
"""Verb, API group and resource of everything that is asked: the chart's ClusterRole has the same."""

T = TypeVar("T", bound=Pod | Node | Meta)
Item_contra = TypeVar("Item_contra", contravariant=True)


class _Cache(Protocol[Item_contra]):
    def put(self, item: Item_contra, /) -> None: ...
    def delete(self, uid: str) -> None: ...
    def keep_only(self, uids: set[str]) -> int: ...
    def __len__(self) -> int: ...


class _Store(Generic[T]):
    """Objects as the API sends them, into a cache."""

    def __init__(self, cache: _Cache[T], decode: Callable[[bytes], tuple[T, str]]) -> None:
        self._put = cache.put
        self._decode = decode
        self._cache = cache
        self.delete = cache.delete
        self.keep_only = cache.keep_only

    def __len__(self) -> int:
        return len(self._cache)

    def put(self, data: bytes) -> tuple[str, str]:
        item, version = self._decode(data)
        self._put(item)
        return item.uid, version


class Mirror:
    """Caches, and the reflectors that keep them."""

    def __init__(
        self,
        *,
        pod_labels: Labels,
        namespace_labels: Labels,
        now: Callable[[], float],
        monotonic: Callable[[], float],
        changed: Callable[[], object],
        sensor_labels: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``changed`` is called when owners or labels are new, or different now."""
        self._sensor_labels = sensor_labels
        self._pod_labels = pod_labels
        self._namespace_labels = namespace_labels
        self._monotonic = monotonic
        self.pods = Pods(now=now, monotonic=monotonic)
        self.nodes = Nodes()
        self.namespaces = Metas(now=now, monotonic=monotonic, by_name=True, changed=changed)
        self.replicasets = Metas(now=now, monotonic=monotonic, by_name=False, changed=changed)
        self.jobs = Metas(now=now, monotonic=monotonic, by_name=False, changed=changed)
        self.owners = {"ReplicaSet": self.replicasets, "Job": self.jobs}
        self.reflectors: dict[str, Reflector] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, api: Api, *, node_name: str, rng: random.Random, metrics: Metrics) -> None:
        """Begin to list and watch."""
        stores: dict[str, Any] = {
            "pods": _Store(self.pods, lambda data: decode_pod(data, self._pod_labels)),
            "nodes": _Store(self.nodes, lambda data: decode_node(data, self._sensor_labels)),
            "namespaces": _Store(self.namespaces, lambda data: decode_meta(data, self._namespace_labels)),
            "replicasets": _Store(self.replicasets, lambda data: decode_meta(data, NO_LABELS)),
            "jobs": _Store(self.jobs, lambda data: decode_meta(data, NO_LABELS)),
        }
        selectors = (
            {"pods": f"spec.nodeName={node_name}", "nodes": f"metadata.name={node_name}"} if node_name else {}
        )
        for kind, resource in RESOURCES.items():
            self.reflectors[kind] = Reflector(
                api,
                resource._replace(field_selector=selectors.get(kind, "")),
                stores[kind],
                rng=rng,
                monotonic=self._monotonic,
                restarted=lambda kind, reason: metrics.watch_restarts[kind, reason].inc(),
            )
        self._tasks = [
            asyncio.create_task(reflector.run(), name=f"reflector {kind}")
            for kind, reflector in self.reflectors.items()
        ]
        self._tasks.append(asyncio.create_task(self._freeze(), name="freeze caches"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def synced(self, kind: str) -> bool:
        """Whether this kind was listed once."""
        reflector = self.reflectors.get(kind)
        return reflector is not None and reflector.synced.is_set()

    def stale(self, kind: str) -> bool:
        """Whether what we hold may be behind: not listed yet, not watched now, or silent for too long."""
        reflector = self.reflectors.get(kind)
        if reflector is None or not reflector.connected or not reflector.synced.is_set():
            return True
        return self._monotonic() - reflector.heard_at > STALE_SECS

    def forbidden(self, kind: str) -> bool:
        """Whether the API server never gave us this kind, for lack of permission: there is nothing to wait for."""
        reflector = self.reflectors.get(kind)
        return reflector is not None and reflector.reason == "permission" and not reflector.synced.is_set()

    def behind(self) -> bool:
        """Whether anything an answer is made of may be stale; what was always forbidden is missing, not stale."""
        return any(self.stale(kind) and not self.forbidden(kind) for kind in RESOURCES)

    def expire(self) -> None:
        self.pods.expire()
        for metas in (self.namespaces, self.replicasets, self.jobs):
            metas.expire()

    def sizes(self) -> dict[str, int]:
        """Live objects by kind, and pods that are gone but not forgotten."""
        return {
            "pods": len(self.pods),
            "nodes": len(self.nodes),
            "namespaces": len(self.namespaces),
            "replicasets": len(self.replicasets),
            "jobs": len(self.jobs),
            "tombstones": self.pods.tombstones,
        }

    def age_secs(self, kind: str) -> float:
        """Since this kind's last list, event or bookmark; infinite before the first."""
        return self._monotonic() - self.reflectors[kind].heard_at

    def state(self) -> dict[str, Any]:
        """For ``/status``."""
        return {
            kind: {
                "synced": reflector.synced.is_set(),
                "stale": self.stale(kind),
                "objects": len(reflector.store),
                "trouble": reflector.trouble or None,
            }
            for kind, reflector in self.reflectors.items()
        }

    async def _freeze(self) -> None:
        """What was listed first stays: the garbage collector need not look at it again and again."""
        await self.reflectors["pods"].synced.wait()
        if gc.get_freeze_count():  # only where the application tuned the collector
            gc.freeze()
