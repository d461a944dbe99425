"""Any history of the pods' cache against a naive model: a table of all that is known, searched from end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from forwarder.kubernetes_cache import PROVISIONAL_SECS, SKEW_SECS
from forwarder.kubernetes_objects import Pod
from tests.fakes.kubernetes_objects import hex64
from tests.test_kubernetes_cache import WALL, Clock, container, indexes, pod, uid_of, uids

TOMBSTONES, LIFE = 3, 600.0
ADDRESSES = ("", "10.0.0.1", "10.0.0.2")
NAMES = {f"u{number}": (("one", "x"), ("one", "y"), ("two", "x"))[number % 3] for number in range(7)}
"""Few names and many UIDs: everything was made anew some time."""
BORN = {uid: 20.0 * number for number, uid in enumerate(NAMES)}
IDS = {uid: [hex64(f"{uid}/{number}") for number in range(3)] for uid in NAMES}
UIDS = st.sampled_from(list(NAMES))


@st.composite
def pods_of_any_state(draw: Any) -> Pod:
    """What never changes follows from the UID; the rest does change."""
    uid = draw(UIDS)
    namespace, name = NAMES[uid]
    now, before = draw(st.permutations(["", *IDS[uid]]))[:2]
    return pod(
        uid,
        name,
        BORN[uid],
        at=namespace,
        ip=draw(st.sampled_from(ADDRESSES)),
        ip_is_its_own=draw(st.booleans()),
        containers=(container("c", now, before),) if draw(st.booleans()) else (),
    )


@dataclass
class Known:
    """One pod of the model."""

    pod: Pod
    deleted: float | None = None
    forget: float = 0.0
    believed: float | None = None
    """Until when, where it was fetched by hand."""

    def lived(self, at: float, slack: float) -> bool:
        return self.pod.created - slack <= at and (self.deleted is None or at <= self.deleted + slack)


class History(RuleBasedStateMachine):
    """Does everything to both, and asks both everything."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.pods = self.clock.pods(tombstones_max=TOMBSTONES, tombstone_secs=LIFE)
        self.known: dict[str, Known] = {}

    # ---- the model

    def bury(self, uid: str) -> None:
        found = self.known.get(uid)
        if found is not None and found.deleted is None:
            found.deleted, found.forget, found.believed = self.clock.wall, self.clock.steady + LIFE, None
            self.tidy()

    def tidy(self) -> None:
        dead = sorted((item for item in self.known.values() if item.deleted is not None), key=_end)
        for number, item in enumerate(dead):
            if item.forget <= self.clock.steady or len(dead) - number > TOMBSTONES:
                del self.known[item.pod.uid]

    def take(self, thing: Pod) -> None:
        found = self.known.setdefault(thing.uid, Known(thing))
        found.pod, found.deleted, found.believed = thing, None, None
        for other in list(self.known.values()):
            if other is not found and _place(other.pod) == _place(thing):
                self.bury(other.pod.uid)

    def choose(self, found: list[Known], at: float) -> str | None:
        there = [item for item in found if item.lived(at, 0.0)]
        if there:
            return max(there, key=_age).pod.uid
        nearly = [item for item in found if item.lived(at, SKEW_SECS)]
        return min(nearly, key=_age).pod.uid if nearly else None

    # ---- what happens

    def pass_time(self, secs: float = 0.001) -> None:
        """Nothing happens at the very same instant."""
        self.clock.sleep(secs)

    @rule(thing=pods_of_any_state())
    def put(self, thing: Pod) -> None:
        self.pass_time()
        self.pods.put(thing)
        self.take(thing)

    @rule(thing=pods_of_any_state())
    def offer(self, thing: Pod) -> None:
        self.pass_time()
        rivals = [item for item in self.known.values() if _place(item.pod) == _place(thing)]
        welcome = thing.uid not in self.known and all(item.pod.created < thing.created for item in rivals)
        assert self.pods.offer(thing) is welcome
        if welcome:
            self.take(thing)
            self.known[thing.uid].believed = self.clock.steady + PROVISIONAL_SECS

    @rule(uid=UIDS)
    def delete(self, uid: str) -> None:
        self.pass_time()
        self.pods.delete(uid)
        self.bury(uid)

    @rule(listed=st.sets(UIDS))
    def keep_only(self, listed: set[str]) -> None:
        self.pass_time()
        gone = [uid for uid, item in self.known.items() if item.deleted is None and uid not in listed]
        assert self.pods.keep_only(listed) == len(gone)
        for uid in gone:
            self.bury(uid)

    @rule(secs=st.sampled_from([1.0, 4.0, 19.0, 60.0, 300.0, 601.0]))
    def wait(self, secs: float) -> None:
        self.clock.sleep(secs)

    @rule()
    def expire(self) -> None:
        self.pass_time()
        self.pods.expire()
        for item in list(self.known.values()):
            if item.believed is not None and item.believed <= self.clock.steady:
                self.bury(item.pod.uid)
        self.tidy()

    @rule(secs=st.sampled_from([-3600.0, -30.0, -2.0, 2.0, 30.0, 3600.0]))
    def set_the_clock(self, secs: float) -> None:
        self.clock.wall += secs

    # ---- what is asked

    @invariant()
    def the_same_pods_are_known(self) -> None:
        alive = {uid for uid, item in self.known.items() if item.deleted is None}
        assert uids(self.pods.live()) == alive
        assert (len(self.pods), self.pods.tombstones) == (len(alive), len(self.known) - len(alive))
        assert self.pods.tombstones <= TOMBSTONES
        for uid in NAMES:
            item, found = self.known.get(uid), self.pods.by_uid(uid)
            assert found == (item and item.pod)
            assert found is None or self.pods.is_live(found) is (uid in alive)

    @invariant()
    def names_and_addresses_lead_to_the_same(self) -> None:
        known = list(self.known.values())
        ends = [item.deleted for item in known if item.deleted is not None]
        moments = [WALL + born + near for born in list(BORN.values())[::2] for near in (-6.0, -4.0, 0.0)]
        for at in (*moments, self.clock.wall, *ends, *(end + SKEW_SECS for end in ends)):
            for namespace, name in set(NAMES.values()):
                there = [item for item in known if _place(item.pod) == (namespace, name)]
                assert uid_of(self.pods.by_place(namespace, name, at)) == self.choose(there, at)
            for address in ADDRESSES:
                there = [
                    item for item in known if address and address == item.pod.ip and item.pod.ip_is_its_own
                ]
                assert uid_of(self.pods.by_address(address, at)) == self.choose(there, at)
        for name in ("x", "y"):
            named = [item for item in known if item.pod.name == name]
            if len(named) > 1:
                named = [item for item in named if item.deleted is None]
            assert uid_of(self.pods.by_bare_name(name)) == (named[0].pod.uid if len(named) == 1 else None)

    @invariant()
    def containers_lead_to_the_same(self) -> None:
        for uid, ids in IDS.items():
            item = self.known.get(uid)
            has = (
                {text for one in item.pod.containers for text in (one.id, one.previous_id)} if item else set()
            )
            for identity in ids:
                owner = uid if identity in has else None
                assert uid_of(self.pods.by_container(identity)) == owner
                assert uid_of(self.pods.by_container(identity[:12])) == owner

    def teardown(self) -> None:
        """When everything is forgotten, nothing is left anywhere."""
        self.pods.keep_only(set())
        self.clock.steady += LIFE
        self.pods.expire()
        assert indexes(self.pods) == [0] * 9


def _place(thing: Pod) -> tuple[str, str]:
    return thing.namespace, thing.name


def _age(item: Known) -> float:
    return item.pod.created


def _end(item: Known) -> float:
    return item.forget


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, report_multiple_bugs=False
)
