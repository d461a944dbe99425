"""A running mirror of the test cluster, and whether it equals what the API server has, object by object."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from forwarder.kubernetes_access import Access, Source
from forwarder.kubernetes_api import Api
from forwarder.kubernetes_cache import SHORT_ID
from forwarder.kubernetes_mirror import RESOURCES, Mirror
from forwarder.kubernetes_objects import NO_LABELS, Labels, Pod, decode_meta, decode_node, decode_pod
from forwarder.metrics import WATCH_RESTARTS, Metrics
from tests.cluster.harness import Call, Cluster
from tests.crash.harness import say

KINDS = tuple(RESOURCES)
LABELS = Labels(["app", "step", "team"], 2048)
EQUAL_SECS_MAX = 30.0
FAULTS_SHOWN = 10

State = Mapping[str, Mapping[str, Any]]
"""Records by UID, by kind."""

_DECODERS: dict[str, Callable[[bytes], tuple[Any, str]]] = {
    "pods": lambda data: decode_pod(data, LABELS),
    "nodes": decode_node,
    "namespaces": lambda data: decode_meta(data, LABELS),
    "replicasets": lambda data: decode_meta(data, NO_LABELS),
    "jobs": lambda data: decode_meta(data, NO_LABELS),
}


def state_of(cluster: Cluster) -> State:
    """What the API server has now, as the administrator sees it: the newest, whole objects."""
    return {
        kind: {
            item["metadata"]["uid"]: _DECODERS[kind](json.dumps(item).encode())[0]
            for item in cluster.admin.list(kind)["items"]
        }
        for kind in KINDS
    }


class Mirrored:
    """A mirror at work."""

    def __init__(self, cluster: Cluster, source: Source) -> None:
        self.cluster = cluster
        self.metrics = Metrics([])
        self.api = Api(Access(source, time.monotonic))
        self.mirror = Mirror(
            pod_labels=LABELS,
            namespace_labels=LABELS,
            now=time.time,
            monotonic=time.monotonic,
            changed=lambda: None,
        )
        self.mirror.start(self.api, node_name="", rng=random.Random(1), metrics=self.metrics)

    async def close(self) -> None:
        await self.mirror.stop()
        await self.api.close()

    # ---- what it says of itself ---------------------------------------------------------------------

    def restarts(self, reason: str, *kinds: str) -> int:
        """How often watches of these kinds (of all, where none is named) broke for this reason."""
        return sum(int(self.metrics.watch_restarts[kind, reason]._value.get()) for kind in kinds or KINDS)

    def told(self) -> dict[str, int]:
        """All breaks by reason, as far as there were any."""
        counts = {reason: self.restarts(reason) for reason in WATCH_RESTARTS}
        return {reason: count for reason, count in counts.items() if count}

    def stale(self) -> set[str]:
        return {kind for kind in KINDS if self.mirror.stale(kind)}

    def troubles(self) -> dict[str, str]:
        return {kind: reflector.trouble for kind, reflector in self.mirror.reflectors.items()}

    def held(self) -> State:
        return {kind: {item.uid: item for item in getattr(self.mirror, kind).live()} for kind in KINDS}

    # ---- waiting ------------------------------------------------------------------------------------

    async def until(
        self, condition: Callable[[], object], secs: float = EQUAL_SECS_MAX, what: object = ""
    ) -> float:
        """Wait for something to become true; returns how long that took."""
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > secs:
                raise AssertionError(
                    f"not within {secs} s: {what} {self.told()} {self.troubles()} stale: {self.stale()}"
                )
            await asyncio.sleep(0.01)
        return time.monotonic() - started

    async def equal(self, secs: float = EQUAL_SECS_MAX) -> State:
        """Wait until everything is watched and equal to the API server's state, which must not change meanwhile."""
        await self.until(lambda: not self.stale(), secs, "fresh")
        expected = await asyncio.to_thread(state_of, self.cluster)
        started = time.monotonic()
        while (faults := list(self.faults(expected))) or self.stale():
            if time.monotonic() - started > secs:
                raise AssertionError("\n".join([f"{len(faults)} faults", *faults[:FAULTS_SHOWN]]))
            await asyncio.sleep(0.05)
        return expected

    # ---- comparing ----------------------------------------------------------------------------------

    def faults(self, expected: State) -> Iterator[str]:
        """Every difference to that state, and every index that does not lead where it should."""
        held = self.held()
        for kind in KINDS:
            for uid in expected[kind].keys() - held[kind].keys():
                yield f"{kind}: missing {expected[kind][uid]}"
            for uid in held[kind].keys() - expected[kind].keys():
                yield f"{kind}: stale {held[kind][uid]}"
            for uid in held[kind].keys() & expected[kind].keys():
                if held[kind][uid] != expected[kind][uid]:
                    yield f"{kind}: {held[kind][uid]} is not {expected[kind][uid]}"
        if {kind: len(items) for kind, items in expected.items()} | {
            "tombstones": self.mirror.pods.tombstones
        } != self.mirror.sizes():
            yield f"sizes: {self.mirror.sizes()}"
        yield from self._lost_pods()
        yield from self._ghosts()
        yield from self._lost_others()

    def _lost_pods(self) -> Iterator[str]:
        """Live pods that an index does not lead to. Addresses in tests are a pod's own."""
        pods, now = self.mirror.pods, time.time()
        for pod in pods.live():
            if pods.by_uid(pod.uid) is not pod:
                yield f"not by uid: {pod}"
            if pods.by_place(pod.namespace, pod.name, now) is not pod:
                yield f"not by name: {pod}"
            if pod.ip and pod.ip_is_its_own and pods.by_address(pod.ip, now) is not pod:
                yield f"not by address: {pod}"
            if pods.by_bare_name(pod.name) not in {pod, None}:
                yield f"not by its bare name: {pod}"
            for identity in _identities(pod):
                if not (pods.by_container(identity) is pods.by_container(identity[:SHORT_ID]) is pod):
                    yield f"not by container {identity}: {pod}"

    def _ghosts(self) -> Iterator[str]:
        """What an index leads to, and what is neither live nor a tombstone."""
        pods = self.mirror.pods
        for short, pod in pods._by_container.items():
            known = pods.by_uid(pod.uid)
            if known is not pod or short not in {identity[:SHORT_ID] for identity in _identities(pod)}:
                yield f"ghost by container {short}: {pod}"
        for index, key_of in (
            (pods._by_place, lambda pod: (pod.namespace, pod.name)),
            (pods._by_name, lambda pod: pod.name),
            (pods._by_address, lambda pod: pod.ip),
        ):
            keys: Any = index._of
            for key in keys:
                for pod in index.get(key):
                    if pods.by_uid(pod.uid) is not pod or key_of(pod) != key:
                        yield f"ghost by {key}: {pod}"

    def _lost_others(self) -> Iterator[str]:
        mirror = self.mirror
        for node in mirror.nodes.live():
            if mirror.nodes.named(node.name) is not node:
                yield f"not by name: {node}"
            for address in node.addresses:
                if mirror.nodes.find(address) is not node:
                    yield f"not by address {address}: {node}"
        for address, node in mirror.nodes._by_address.items():
            if mirror.nodes.named(node.name) is not node or address not in node.addresses:
                yield f"ghost by {address}: {node}"
        for namespace in mirror.namespaces.live():
            if mirror.namespaces.named(namespace.name) is not namespace:
                yield f"not by name: {namespace}"
        for metas in (mirror.replicasets, mirror.jobs):
            for meta in metas.live():
                if metas.by_uid(meta.uid) is not meta:
                    yield f"not by uid: {meta}"


def _identities(pod: Pod) -> list[str]:
    return [text for item in pod.containers for text in (item.id, item.previous_id) if text]


@contextlib.asynccontextmanager
async def mirrored(cluster: Cluster, source: Source) -> AsyncIterator[Mirrored]:
    made = Mirrored(cluster, source)
    try:
        yield made
    finally:
        await made.close()
        say(f"breaks: {made.told()}, tombstones: {made.mirror.pods.tombstones}")


def assert_reads_only(calls: list[Call]) -> None:
    """Our user lists and watches the five kinds, gets pods, and does nothing else."""
    assert calls
    assert {call.verb for call in calls} <= {"get", "list", "watch"}
    assert {call.resource for call in calls} <= set(KINDS)
    assert {call.resource for call in calls if call.verb == "get"} <= {"pods"}
