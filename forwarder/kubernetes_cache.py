"""What is known of the cluster, in memory: live objects, indexes, and for a while those that are gone. Pure, no I/O.

Invariants:

- After a relist is over, what is live is exactly what the API server listed, by UID.
- A deleted pod stays findable for ``TOMBSTONE_SECS`` (alerts arrive after their pod is gone), at most ``TOMBSTONES_MAX`` of them.
- One name may have had several pods; ``pick`` takes the one whose lifetime covers the alert's time. A new pod is never
  taken for its predecessor, nor the other way round.
- A pod fetched outside the watch (``offer``) is only believed until the watch had time to bring it: a stale answer must
  not make a pod live for ever.

Nothing survives the process: a restart lists everything again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from forwarder.kubernetes_index import Graves, Many
from forwarder.kubernetes_objects import Container, Meta, Node, Owner, Pod

TOMBSTONE_SECS = 600.0
TOMBSTONES_MAX = 20_000
OWNER_TOMBSTONE_SECS = 2 * TOMBSTONE_SECS
"""An owner may be deleted some time before its pods are."""
SKEW_SECS = 5.0
"""Clocks of nodes and API server may differ by so much."""
PROVISIONAL_SECS = 60.0
SHORT_ID = 12
"""Falco gives twelve digits of a container id, or all 64."""
OWNER_STEPS_MAX = 4


class Pods:
    """Pods by UID, by namespace and name, by name alone, by container id, by address."""

    def __init__(
        self,
        *,
        now: Callable[[], float],
        monotonic: Callable[[], float],
        tombstone_secs: float = TOMBSTONE_SECS,
        tombstones_max: int = TOMBSTONES_MAX,
    ) -> None:
        self._now = now
        self._monotonic = monotonic
        self._graves = Graves(monotonic, tombstone_secs, tombstones_max)
        self._provisional: dict[str, float] = {}
        self._by_uid: dict[str, Pod] = {}
        self._by_place: Many[tuple[str, str]] = Many()
        self._by_name: Many[str] = Many()
        self._by_address: Many[str] = Many()
        self._by_container: dict[str, Pod] = {}

    def __len__(self) -> int:
        """How many are live."""
        return len(self._by_uid) - len(self._graves.deleted_at)

    @property
    def tombstones(self) -> int:
        return len(self._graves.deleted_at)

    def live(self) -> Iterator[Pod]:
        return (pod for uid, pod in self._by_uid.items() if uid not in self._graves.deleted_at)

    def is_live(self, pod: Pod) -> bool:
        return pod.uid not in self._graves.deleted_at

    # ---- what the watch says ------------------------------------------------------------------------

    def put(self, pod: Pod) -> None:
        """New, or changed. A live pod with its name and another UID is gone, whether anybody said so or not."""
        self._provisional.pop(pod.uid, None)
        self._put(pod)

    def offer(self, pod: Pod) -> bool:
        """Fetched by hand: taken where nothing is known of it, until the watch has spoken."""
        rivals = self._by_place.get((pod.namespace, pod.name))
        if pod.uid in self._by_uid or any(rival.created >= pod.created for rival in rivals):
            return False
        self._put(pod)
        self._provisional[pod.uid] = self._monotonic() + PROVISIONAL_SECS
        return True

    def delete(self, uid: str) -> None:
        """Gone: kept as a tombstone."""
        self._provisional.pop(uid, None)
        if uid in self._by_uid and uid not in self._graves.deleted_at:
            self._graves.dig(uid, self._now())
            self._forget()

    def keep_only(self, uids: set[str]) -> int:
        """The end of a relist: what is not in ``uids`` was deleted unseen. How many those were."""
        gone = [uid for uid in self._by_uid if uid not in uids and uid not in self._graves.deleted_at]
        for uid in gone:
            self.delete(uid)
        return len(gone)

    def expire(self) -> None:
        """Forget what is long gone, and fetched pods the watch never brought (call it now and then)."""
        now = self._monotonic()
        for uid in [uid for uid, until in self._provisional.items() if until <= now]:
            self.delete(uid)
        self._forget()

    # ---- what alerts ask ----------------------------------------------------------------------------

    def by_uid(self, uid: str) -> Pod | None:
        return self._by_uid.get(uid)

    def by_place(self, namespace: str, name: str, at: float) -> Pod | None:
        """The pod of that name that lived at ``at`` (seconds since 1970)."""
        return self._pick(self._by_place.get((namespace, name)), at)

    def by_container(self, container_id: str) -> Pod | None:
        """By the first twelve digits, or by all of them."""
        pod = self._by_container.get(container_id[:SHORT_ID])
        if pod is None or len(container_id) == SHORT_ID or container_of(pod, container_id) is not None:
            return pod
        return None

    def by_address(self, address: str, at: float) -> Pod | None:
        """The pod that had this address at ``at``."""
        return self._pick(self._by_address.get(address), at)

    def by_bare_name(self, name: str) -> Pod | None:
        """By name without a namespace; nothing where two live pods have it."""
        found = self._by_name.get(name)
        if len(found) > 1:
            found = tuple(pod for pod in found if self.is_live(pod))
        return found[0] if len(found) == 1 else None

    def _pick(self, candidates: tuple[Pod, ...], at: float) -> Pod | None:
        """The youngest that was there at that time; clocks may differ a little at both ends of a life."""
        best: Pod | None = None
        for pod in candidates:
            if self._lived(pod, at, 0.0) and (best is None or pod.created > best.created):
                best = pod
        if best is None:
            for pod in candidates:
                if self._lived(pod, at, SKEW_SECS) and (best is None or pod.created < best.created):
                    best = pod
        return best

    def _lived(self, pod: Pod, at: float, slack: float) -> bool:
        deleted = self._graves.deleted_at.get(pod.uid)
        return pod.created - slack <= at and (deleted is None or at <= deleted + slack)

    # ---- indexes ------------------------------------------------------------------------------------

    def _put(self, pod: Pod) -> None:
        self._graves.rise(pod.uid)
        for other in self._by_place.get((pod.namespace, pod.name)):
            if other.uid != pod.uid:
                self.delete(other.uid)
        before = self._by_uid.get(pod.uid)
        if before == pod:
            return
        if before is not None:
            self._drop_moving_keys(before, pod)
        self._by_uid[pod.uid] = pod
        self._by_place.add((pod.namespace, pod.name), pod)
        self._by_name.add(pod.name, pod)
        if pod.ip and pod.ip_is_its_own:
            self._by_address.add(pod.ip, pod)
        for short in _short_ids(pod):
            self._by_container[short] = pod

    def _drop_moving_keys(self, before: Pod, now: Pod | None) -> None:
        """Take out what the next state does not have. Without a next state: all of it."""
        if before.ip and (now is None or now.ip != before.ip or not now.ip_is_its_own):
            self._by_address.remove(before.ip, before.uid)
        kept = _short_ids(now) if now is not None else ()
        for short in _short_ids(before):
            if short not in kept and self._by_container.get(short) is before:
                del self._by_container[short]

    def _forget(self) -> None:
        for uid in self._graves.forgotten():
            pod = self._by_uid.pop(uid)
            self._drop_moving_keys(pod, None)
            self._by_place.remove((pod.namespace, pod.name), uid)
            self._by_name.remove(pod.name, uid)


class Nodes:
    """Nodes by name and by address."""

    def __init__(self) -> None:
        self._by_uid: dict[str, Node] = {}
        self._by_name: dict[str, Node] = {}
        self._by_address: dict[str, Node] = {}

    def __len__(self) -> int:
        return len(self._by_uid)

    def live(self) -> Iterator[Node]:
        return iter(self._by_uid.values())

    def put(self, node: Node) -> None:
        if self._by_uid.get(node.uid) == node:
            return  # a heartbeat
        named = self._by_name.get(node.name)
        if named is not None and named.uid != node.uid:
            self.delete(named.uid)
        is_new = node.uid not in self._by_uid
        self.delete(node.uid)
        self._by_uid[node.uid] = node
        self._by_name[node.name] = node
        for address in node.addresses:
            # An address that was given to a new machine is not won back by a change of the old one.
            if is_new or address not in self._by_address:
                self._by_address[address] = node

    def delete(self, uid: str) -> None:
        node = self._by_uid.pop(uid, None)
        if node is None:
            return
        if self._by_name.get(node.name) is node:
            del self._by_name[node.name]
        for address in node.addresses:
            if self._by_address.get(address) is node:
                del self._by_address[address]
                for other in self._by_uid.values():
                    if address in other.addresses:
                        self._by_address[address] = other

    def keep_only(self, uids: set[str]) -> int:
        gone = self._by_uid.keys() - uids
        for uid in gone:
            self.delete(uid)
        return len(gone)

    def named(self, name: str) -> Node | None:
        """By its name only."""
        return self._by_name.get(name)

    def find(self, name: str) -> Node | None:
        """By name, host name or address."""
        return self._by_name.get(name) or self._by_address.get(name)


class Metas:
    """Namespaces by name, or ReplicaSets and Jobs by UID; deleted owners stay as long as their pods do."""

    def __init__(
        self,
        *,
        now: Callable[[], float],
        monotonic: Callable[[], float],
        by_name: bool,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        """``changed`` is called when something is new, or different now."""
        self._now = now
        self._changed = changed
        self._graves = Graves(monotonic, TOMBSTONE_SECS if by_name else OWNER_TOMBSTONE_SECS, TOMBSTONES_MAX)
        self._by_uid: dict[str, Meta] = {}
        self._by_name: dict[str, Meta] | None = {} if by_name else None

    def __len__(self) -> int:
        return len(self._by_uid) - len(self._graves.deleted_at)

    def live(self) -> Iterator[Meta]:
        return (meta for uid, meta in self._by_uid.items() if uid not in self._graves.deleted_at)

    def put(self, meta: Meta) -> None:
        self._graves.rise(meta.uid)
        before = self._by_uid.get(meta.uid)
        named = self._by_name.get(meta.name) if self._by_name is not None else None
        if before == meta and (named is None or named.uid == meta.uid):
            return
        self._changed()
        self._by_uid[meta.uid] = meta
        if self._by_name is not None:
            if named is not None and named.uid != meta.uid:
                self.delete(named.uid)
            self._by_name[meta.name] = meta

    def delete(self, uid: str) -> None:
        if uid in self._by_uid and uid not in self._graves.deleted_at:
            self._graves.dig(uid, self._now())
            self.expire()

    def keep_only(self, uids: set[str]) -> int:
        gone = [uid for uid in self._by_uid if uid not in uids and uid not in self._graves.deleted_at]
        for uid in gone:
            self.delete(uid)
        return len(gone)

    def expire(self) -> None:
        for uid in self._graves.forgotten():
            meta = self._by_uid.pop(uid)
            if self._by_name is not None and self._by_name.get(meta.name) is meta:
                del self._by_name[meta.name]

    def by_uid(self, uid: str) -> Meta | None:
        return self._by_uid.get(uid)

    def named(self, name: str) -> Meta | None:
        return self._by_name.get(name) if self._by_name is not None else None


def container_of(pod: Pod, container_id: str) -> Container | None:
    """The container with this id (12 or 64 digits), now or before its last restart."""
    if len(container_id) < SHORT_ID:
        return None
    for container in pod.containers:
        if container.id.startswith(container_id) or container.previous_id.startswith(container_id):
            return container
    return None


def container_named(pod: Pod, name: str) -> Container | None:
    return next((container for container in pod.containers if container.name == name), None)


def top_owner(owner: Owner, namespace: str, owners: dict[str, Metas]) -> tuple[Owner, bool]:
    """Who is at the top of a chain of controllers, and whether the way there is known to its end.

    ``owners`` has the kinds that are watched: a Deployment is found through its ReplicaSet, a CronJob through its Job. An owner is only
    believed where name and namespace fit too: whoever makes a pod writes any UID into it.
    """
    for _ in range(OWNER_STEPS_MAX):
        watched = owners.get(owner.kind)
        if watched is None:
            return owner, True
        meta = watched.by_uid(owner.uid)
        if meta is None:
            return owner, False
        if meta.owner is None or (meta.name, meta.namespace) != (owner.name, namespace):
            return owner, True
        owner = meta.owner
    return owner, True


def _short_ids(pod: Pod) -> tuple[str, ...]:
    ids = [item for container in pod.containers for item in (container.id, container.previous_id)]
    return tuple([item[:SHORT_ID] for item in ids if len(item) >= SHORT_ID])
