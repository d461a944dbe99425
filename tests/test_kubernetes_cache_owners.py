"""Namespaces and owners in the cache: kept for a while after their end, and chains of owners up to their top."""

from __future__ import annotations

import pytest

from forwarder.kubernetes_cache import OWNER_STEPS_MAX, TOMBSTONE_SECS, Metas, top_owner
from forwarder.kubernetes_objects import Meta, Owner
from tests.test_kubernetes_cache import Clock, uid_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_namespace_that_was_made_anew(clock: Clock) -> None:
    changes: list[int] = []
    metas = Metas(
        now=lambda: clock.wall,
        monotonic=lambda: clock.steady,
        by_name=True,
        changed=lambda: changes.append(1),
    )
    metas.put(Meta("u1", "shop", ("team", "red"), None))
    assert len(changes) == 1, "an answer may have been made without it"
    metas.put(Meta("u1", "shop", ("team", "red"), None))
    assert len(changes) == 1
    metas.put(Meta("u1", "shop", ("team", "blue"), None))
    assert len(changes) == 2
    metas.put(Meta("u2", "shop", (), None))
    assert len(changes) == 3
    assert (uid_of(metas.named("shop")), len(metas), [item.uid for item in metas.live()]) == ("u2", 1, ["u2"])
    clock.sleep(TOMBSTONE_SECS)
    metas.expire()
    assert uid_of(metas.named("shop")) == "u2"
    assert metas.by_uid("u1") is None
    metas.delete("u2")
    assert uid_of(metas.named("shop")) == "u2"  # alerts arrive after it is gone
    assert metas.keep_only(set()) == 0
    clock.sleep(TOMBSTONE_SECS)
    metas.expire()
    assert metas.named("shop") is None
    assert (len(metas), metas._by_uid, metas._by_name) == (0, {}, {})


def test_owners_stay_for_a_while_and_have_no_names(clock: Clock) -> None:
    metas = clock.metas(by_name=False)
    metas.put(Meta("u1", "web", (), None))
    metas.put(Meta("u2", "web", (), None))
    assert metas.named("web") is None
    assert metas.keep_only({"u2"}) == 1
    assert (len(metas), uid_of(metas.by_uid("u1"))) == (1, "u1")
    metas.put(Meta("u1", "web", (), None))
    clock.sleep(2 * TOMBSTONE_SECS)
    metas.expire()
    assert len(metas) == 2


def test_the_top_of_a_chain_of_owners(clock: Clock) -> None:
    replicasets, jobs = clock.metas(by_name=False), clock.metas(by_name=False)
    owners = {"ReplicaSet": replicasets, "Job": jobs}
    replicasets.put(Meta("u-rs", "web-1", (), Owner("Deployment", "web", "u-d"), "shop"))
    replicasets.put(Meta("u-bare", "bare", (), None, "shop"))
    jobs.put(Meta("u-j", "nightly-1", (), Owner("CronJob", "nightly", "u-c"), "shop"))
    jobs.put(Meta("u-loop", "loop", (), Owner("Job", "loop", "u-loop"), "shop"))
    jobs.put(Meta("u-lost", "lost", (), Owner("ReplicaSet", "never-seen", "u-x"), "shop"))
    for owner, top, sure in (
        (Owner("ReplicaSet", "web-1", "u-rs"), "Deployment/web", True),
        (Owner("Job", "nightly-1", "u-j"), "CronJob/nightly", True),
        (Owner("ReplicaSet", "bare", "u-bare"), "ReplicaSet/bare", True),
        (Owner("ReplicaSet", "web-1", "another-uid"), "ReplicaSet/web-1", False),
        (Owner("Job", "lost", "u-lost"), "ReplicaSet/never-seen", False),
        (Owner("DaemonSet", "agent", "u-a"), "DaemonSet/agent", True),
        (Owner("Job", "loop", "u-loop"), "Job/loop", True),
        (Owner("ReplicaSet", "forged", "u-rs"), "ReplicaSet/forged", True),
    ):
        found, known = top_owner(owner, "shop", owners)
        assert (f"{found.kind}/{found.name}", known) == (top, sure)
    assert OWNER_STEPS_MAX >= 2
    other, _ = top_owner(Owner("ReplicaSet", "web-1", "u-rs"), "evil", owners)
    assert other.kind == "ReplicaSet", "an owner of another namespace is none"
