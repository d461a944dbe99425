"""The cache: whose lifetime covers an alert, what is forgotten when, and any history against a naive model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from forwarder.kubernetes_cache import (
    PROVISIONAL_SECS,
    SKEW_SECS,
    TOMBSTONE_SECS,
    TOMBSTONES_MAX,
    Metas,
    Nodes,
    Pods,
    container_named,
    container_of,
)
from forwarder.kubernetes_objects import Container, Meta, Node, Pod
from tests.fakes.kubernetes_objects import hex64

WALL = 1_800_000_000.0


class Clock:
    """A wall clock that may be set, and one that only runs."""

    def __init__(self) -> None:
        self.wall, self.steady = WALL, 50.0

    def sleep(self, secs: float) -> None:
        self.wall += secs
        self.steady += secs

    def pods(self, **limits: Any) -> Pods:
        return Pods(now=lambda: self.wall, monotonic=lambda: self.steady, **limits)

    def metas(self, *, by_name: bool) -> Metas:
        return Metas(now=lambda: self.wall, monotonic=lambda: self.steady, by_name=by_name)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pods(clock: Clock) -> Pods:
    return clock.pods()


def container(name: str, identity: str = "", previous: str = "") -> Container:
    return Container(name, identity, previous, "repo/app:1", "", "", None)


def pod(uid: str, name: str = "web-0", created: float = 0.0, *, at: str = "shop", **more: Any) -> Pod:
    """``created`` in seconds from the beginning of the test's time."""
    values: dict[str, Any] = {
        "node": "n1", "service_account": "", "ip": "", "ip_is_its_own": True, "labels": (), "owner": None,
        "containers": (),
    }  # fmt: skip
    return Pod(uid=uid, namespace=at, name=name, created=WALL + created, **values | more)


def node(uid: str, name: str, *addresses: str) -> Node:
    return Node(uid, name, "", "", "", "", "", "", "", "", addresses)


def uid_of(found: Pod | Node | Meta | None) -> str | None:
    return found.uid if found else None


def uids(found: Iterable[Pod]) -> set[str]:
    return {item.uid for item in found}


def indexes(pods: Pods) -> list[int]:
    """How much each of the inner tables holds."""
    return [
        len(pods._by_uid), len(pods._by_place._of), len(pods._by_name._of), len(pods._by_address._of),
        len(pods._by_container), len(pods._provisional), len(pods._graves.deleted_at), len(pods._graves._until),
        len(pods._graves._queue),
    ]  # fmt: skip


# ---- lifetimes --------------------------------------------------------------------------------------


def test_a_pod_that_was_made_anew_is_not_its_predecessor(clock: Clock, pods: Pods) -> None:
    """A StatefulSet's pod: one name, two lives, and alerts that come late or early."""
    pods.put(pod("old", created=-3600))
    clock.sleep(10)
    pods.delete("old")
    clock.sleep(10)
    pods.put(pod("new", created=20))
    seen = {secs: uid_of(pods.by_place("shop", "web-0", WALL + secs)) for secs in range(-3700, 100)}
    assert seen[-3606] is None
    assert {seen[secs] for secs in range(-3600, 11)} == {"old"}
    assert {seen[secs] for secs in range(20, 100)} == {"new"}
    # Between the two nobody lived; a clock that is a little wrong explains it for the nearer one.
    assert {seen[secs] for secs in range(11, 15)} == {"old"}
    assert {seen[secs] for secs in range(16, 20)} == {"new"}
    assert uid_of(pods.by_place("shop", "web-0", WALL - 3605)) == "old"
    assert pods.by_place("other", "web-0", WALL) is None


def test_a_life_ends_after_the_skew(clock: Clock, pods: Pods) -> None:
    pods.put(pod("a", created=-100))
    pods.delete("a")
    assert uid_of(pods.by_place("shop", "web-0", WALL + SKEW_SECS)) == "a"
    assert pods.by_place("shop", "web-0", WALL + SKEW_SECS + 0.001) is None
    assert pods.by_place("shop", "web-0", WALL - 100 - SKEW_SECS - 0.001) is None


@pytest.mark.parametrize("told", [False, True])
def test_the_younger_of_two_that_lived_at_once_is_taken(clock: Clock, pods: Pods, told: bool) -> None:
    """The deletion is seen late, or never: the new pod has been there since it was made."""
    pods.put(pod("old", created=-100))
    clock.sleep(10)
    if told:
        pods.delete("old")
    pods.put(pod("new", created=5))
    assert uid_of(pods.by_place("shop", "web-0", WALL + 7)) == "new"
    assert uid_of(pods.by_place("shop", "web-0", WALL + 4)) == "old"
    assert uids(pods.live()) == {"new"}
    assert (len(pods), pods.tombstones) == (1, 1)


def test_who_comes_back_takes_the_name_again(clock: Clock, pods: Pods) -> None:
    """A list of a replica of the API server that is behind: whoever was put last lives, and nobody else of that name."""
    pods.put(pod("a"))
    pods.put(pod("b", created=1))
    pods.put(pod("a"))
    assert uids(pods.live()) == {"a"}


# ---- tombstones -------------------------------------------------------------------------------------


def test_a_deleted_pod_is_found_for_ten_minutes(clock: Clock, pods: Pods) -> None:
    pods.put(pod("a", ip="10.0.0.1", containers=(container("c", hex64("c"), hex64("p")),)))
    pods.delete("a")
    assert TOMBSTONE_SECS == 600
    clock.sleep(599)
    pods.expire()
    pods.delete("a")  # once more does not make it last longer
    assert (len(pods), pods.tombstones) == (0, 1)
    for found in (
        pods.by_uid("a"), pods.by_place("shop", "web-0", WALL), pods.by_address("10.0.0.1", WALL),
        pods.by_container(hex64("c")), pods.by_container(hex64("p")[:12]), pods.by_bare_name("web-0"),
    ):  # fmt: skip
        assert uid_of(found) == "a"
    clock.sleep(1)
    pods.expire()
    assert indexes(pods) == [0] * 9


def test_tombstones_are_bounded_and_the_oldest_go_first(clock: Clock) -> None:
    assert TOMBSTONES_MAX == 20_000
    pods = clock.pods(tombstones_max=3)
    for number in range(10):
        pods.put(pod(f"u{number}", f"p{number}"))
    pods.put(pod("stays", "stays"))
    for number in range(10):
        pods.delete(f"u{number}")
        assert pods.tombstones == min(number + 1, 3)
    assert [number for number in range(10) if pods.by_uid(f"u{number}")] == [7, 8, 9]
    assert uids(pods.live()) == {"stays"}


def test_who_lives_after_all_is_not_forgotten(clock: Clock, pods: Pods) -> None:
    pods.put(pod("a"))
    pods.delete("a")
    clock.sleep(300)
    pods.put(pod("a"))
    assert uid_of(pods.by_place("shop", "web-0", WALL + 300)) == "a"
    clock.sleep(400)
    pods.expire()
    assert uids(pods.live()) == {"a"}
    pods.delete("a")
    clock.sleep(599)
    pods.expire()
    assert pods.tombstones == 1
    clock.sleep(1)
    pods.expire()
    assert indexes(pods) == [0] * 9


def test_setting_the_wall_clock_does_not_keep_tombstones(clock: Clock, pods: Pods) -> None:
    pods.put(pod("a"))
    pods.delete("a")
    clock.wall -= 86_400
    clock.steady += 600
    pods.expire()
    assert indexes(pods) == [0] * 9


# ---- container ids, addresses, bare names -----------------------------------------------------------


def test_container_ids_of_twelve_or_64_digits(pods: Pods) -> None:
    ids = [hex64(str(number)) for number in range(4)]
    thing = pod("a", containers=(container("x", ids[0], ids[1]), container("y", ids[2])))
    pods.put(thing)
    for identity in ids[:3]:
        assert pods.by_container(identity[:12]) is pods.by_container(identity) is pods.by_uid("a")
    other_end = ids[0][:12] + ids[3][12:]
    for unknown in (ids[3], ids[3][:12], other_end, ids[0][:11], "", ids[0].upper(), "host", ids[0] + "0"):
        assert pods.by_container(unknown) is None
    assert [getattr(container_of(thing, item), "name", None) for item in ids] == ["x", "x", "y", None]
    assert (
        container_of(thing, ids[0][:11]) is container_of(thing, "") is container_of(thing, other_end) is None
    )
    assert container_named(thing, "y") is thing.containers[1]
    assert container_named(thing, "z") is None


def test_an_id_that_a_pod_no_longer_has_is_nobodys(pods: Pods) -> None:
    one, two, three = hex64("1"), hex64("2"), hex64("3")
    pods.put(pod("a", containers=(container("x", one),)))
    pods.put(pod("a", containers=(container("x", two, one),)))
    assert [uid_of(pods.by_container(item)) for item in (one, two, three)] == ["a", "a", None]
    pods.put(pod("a", containers=(container("x", three, two),)))
    assert [uid_of(pods.by_container(item)) for item in (one, two, three)] == [None, "a", "a"]
    found = pods.by_container(three)
    assert found is pods.by_uid("a")


def test_an_address_that_was_used_again(clock: Clock, pods: Pods) -> None:
    pods.put(pod("a", "one", created=-100, ip="10.0.0.1"))
    clock.sleep(10)
    pods.delete("a")
    clock.sleep(30)
    pods.put(pod("b", "two", created=40, ip="10.0.0.1"))
    assert [uid_of(pods.by_address("10.0.0.1", WALL + secs)) for secs in (-101, 0, 25, 40, 500)] == [
        "a", "a", None, "b", "b",
    ]  # fmt: skip
    clock.sleep(600)
    pods.expire()
    assert uid_of(pods.by_address("10.0.0.1", WALL)) is None
    assert uid_of(pods.by_address("10.0.0.1", WALL + 600)) == "b"


@pytest.mark.parametrize("change", [{"ip_is_its_own": False}, {"ip": ""}, {"ip": "10.0.0.2"}])
def test_an_address_that_was_given_back_or_is_the_nodes(pods: Pods, change: dict[str, Any]) -> None:
    pods.put(pod("a", ip="10.0.0.1"))
    pods.put(pod("a", **{"ip": "10.0.0.1"} | change))
    assert pods.by_address("10.0.0.1", WALL) is None
    assert uid_of(pods.by_address("10.0.0.2", WALL)) == ("a" if change.get("ip") == "10.0.0.2" else None)


def test_pods_of_the_hosts_network_do_not_own_its_address(pods: Pods) -> None:
    pods.put(pod("a", ip="10.0.0.1", ip_is_its_own=False))
    assert pods.by_address("10.0.0.1", WALL) is None
    assert pods.by_address("", WALL) is None


def test_a_bare_name_that_two_pods_have_is_nobodys(pods: Pods) -> None:
    pods.put(pod("a", at="one"))
    assert uid_of(pods.by_bare_name("web-0")) == "a"
    pods.put(pod("b", at="two"))
    assert pods.by_bare_name("web-0") is None
    pods.delete("a")
    assert uid_of(pods.by_bare_name("web-0")) == "b"
    pods.delete("b")
    assert pods.by_bare_name("web-0") is None
    assert pods.by_bare_name("") is pods.by_bare_name("web-1") is None


# ---- pods fetched by hand ---------------------------------------------------------------------------


def test_a_fetched_pod_is_believed_for_a_while(clock: Clock, pods: Pods) -> None:
    assert pods.offer(pod("a"))
    assert uids(pods.live()) == {"a"}
    clock.sleep(PROVISIONAL_SECS)
    pods.expire()
    assert (len(pods), pods.tombstones) == (0, 1)


@pytest.mark.parametrize("change", [{}, {"node": "n2"}])
def test_a_fetched_pod_the_watch_brought_stays(clock: Clock, pods: Pods, change: dict[str, Any]) -> None:
    pods.offer(pod("a"))
    pods.put(pod("a", **change))
    clock.sleep(10 * PROVISIONAL_SECS)
    pods.expire()
    assert uids(pods.live()) == {"a"}


def test_a_late_answer_changes_nothing_that_is_known(clock: Clock, pods: Pods) -> None:
    pods.put(pod("a", node="n1"))
    assert not pods.offer(pod("a", node=""))
    assert pods.by_uid("a") == pod("a", node="n1")
    clock.sleep(10 * PROVISIONAL_SECS)
    pods.expire()
    assert uids(pods.live()) == {"a"}
    pods.delete("a")
    assert not pods.offer(pod("a"))
    assert (len(pods), pods.tombstones) == (0, 1)


@pytest.mark.parametrize("created", [-50, 0])
def test_a_late_answer_never_displaces_a_successor(pods: Pods, created: float) -> None:
    pods.put(pod("new", created=0))
    assert not pods.offer(pod("old", created=created))
    assert uids(pods.live()) == {"new"}


def test_a_late_answer_never_raises_who_has_had_a_successor(pods: Pods) -> None:
    """Nobody of that name lives any more, and the answer is older than the last who did."""
    pods.put(pod("new", created=0))
    pods.delete("new")
    assert not pods.offer(pod("old", created=-50))
    assert uids(pods.live()) == set()
    assert pods.offer(pod("next", created=1))


def test_a_fetched_successor_ends_its_predecessor(clock: Clock, pods: Pods) -> None:
    pods.put(pod("old", created=-50))
    assert pods.offer(pod("new", created=0))
    assert uids(pods.live()) == {"new"}
    assert pods.keep_only(set()) == 1
    assert pods._provisional == {}
    assert pods.tombstones == 2


def test_the_end_of_a_list(pods: Pods) -> None:
    for name in "abc":
        pods.put(pod(name, name))
    assert pods.keep_only({"a", "b", "never-heard-of"}) == 1
    assert pods.keep_only({"a", "b"}) == 0
    assert uids(pods.live()) == {"a", "b"}
    assert uid_of(pods.by_uid("c")) == "c"


# ---- nodes -------------------------------------------------------------------------------------------


def test_nodes_by_name_and_address() -> None:
    nodes = Nodes()
    nodes.put(node("u1", "n1", "10.0.0.1", "host-1"))
    nodes.put(node("u2", "n2", "10.0.0.2"))
    assert [uid_of(nodes.find(name)) for name in ("n1", "10.0.0.1", "host-1", "n2", "x", "")] == [
        "u1", "u1", "u1", "u2", None, None,
    ]  # fmt: skip
    assert nodes.named("10.0.0.1") is None
    nodes.put(node("u1", "n1", "10.0.0.9"))
    assert uid_of(nodes.find("host-1")) is None
    nodes.put(node("u3", "n1", "10.0.0.3"))  # the machine was replaced
    assert [uid_of(nodes.find(name)) for name in ("n1", "10.0.0.9", "10.0.0.3")] == ["u3", None, "u3"]
    assert nodes.keep_only({"u2", "u1"}) == 1
    assert [item.uid for item in nodes.live()] == ["u2"]
    nodes.delete("u2")
    nodes.delete("u2")
    assert (len(nodes), nodes._by_name, nodes._by_address) == (0, {}, {})


def test_an_address_two_nodes_say_they_have_is_the_others_when_one_is_gone() -> None:
    """The old machine's object is still there, and changes (its health), while the new one has the address."""
    nodes = Nodes()
    nodes.put(node("old", "n1", "10.0.0.1"))
    nodes.put(node("new", "n2", "10.0.0.1"))
    nodes.put(node("old", "n1", "10.0.0.1", "changed"))
    nodes.delete("old")
    assert uid_of(nodes.find("10.0.0.1")) == "new"
