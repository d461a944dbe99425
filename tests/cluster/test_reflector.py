"""The mirror against a real API server: after everything that can happen to it, it equals the server, object by object."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from forwarder import __version__, kubernetes_reflector
from forwarder.kubernetes_access import Source, find_source
from tests.cluster import objects
from tests.cluster.account import InCluster, ServiceAccount
from tests.cluster.api import Api
from tests.cluster.changes import STEPS, clear, populate, unseen
from tests.cluster.churn import Churn
from tests.cluster.harness import Call, Cluster
from tests.cluster.mirrored import KINDS, Mirrored, assert_reads_only, mirrored
from tests.cluster.wire import Wire
from tests.crash.harness import say

pytestmark = pytest.mark.cluster

PODS, CREATORS = 5000, 6
OPERATIONS = 10_000
EXPIRED_AFTER_SECS = 4


@pytest.fixture
def impatient_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_BASE_SECS", 0.05)
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_MAX_SECS", 0.2)


@pytest.fixture
def files(account: ServiceAccount, tmp_path: Path) -> InCluster:
    return account.write_in_cluster(tmp_path / "serviceaccount", account.token())


@pytest.fixture
async def wire(cluster: Cluster, impatient_watch: None) -> AsyncIterator[Wire]:
    async with Wire(cluster.port) as made:
        yield made


@pytest.fixture
async def populated(cluster: Cluster, namespace: str) -> AsyncIterator[str]:
    """A namespace with something of every kind, and nodes and a second namespace beside it."""
    await asks(populate, cluster.admin, namespace)
    yield namespace
    await asks(clear, cluster, namespace)


@pytest.fixture
async def mirror(cluster: Cluster, populated: str, files: InCluster, wire: Wire) -> AsyncIterator[Mirrored]:
    """A mirror that has listed everything, behind a wire that can be cut."""
    async with mirrored(cluster, await source_of(files, wire)) as made:
        await made.equal()
        yield made


async def source_of(files: InCluster, wire: Wire) -> Source:
    """As the enricher finds it in a pod."""
    environment = files.environment | {"KUBERNETES_SERVICE_PORT": str(wire.port)}
    source: Source | None = await asks(find_source, "", environment, files.directory)
    assert source is not None
    return source


async def asks(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A blocking call, in a thread."""
    return await asyncio.to_thread(call, *arguments, **options)


def calls(cluster: Cluster, account: ServiceAccount) -> list[Call]:
    """What the forwarder asked for (the harness uses the account, too, to see whether it may)."""
    agent = f"falco-aws-forwarder/{__version__}"
    found = [call for call in cluster.calls() if call.user_agent == agent and call.user in {"", account.user}]
    assert_reads_only(found)
    return found


def lists(made: list[Call]) -> int:
    return sum(call.verb == "list" for call in made)


async def test_everything_that_is_done_to_objects_is_followed(
    cluster: Cluster, account: ServiceAccount, populated: str, mirror: Mirrored
) -> None:
    """Create, label, bind, restart, finish, move, delete, recreate under the same name, of all kinds."""
    for step in STEPS:
        uids = {kind: set(items) for kind, items in mirror.held().items()}
        await asks(step, cluster.admin, populated)
        state = await mirror.equal()
        if step.__name__.startswith("recreate"):
            kind = step.__name__.split("_")[1]
            assert len(uids[kind] - set(state[kind])) == len(set(state[kind]) - uids[kind]) == 1, kind
    made = calls(cluster, account)
    assert {call.code for call in made} == {200}
    assert lists(made) == len(KINDS)


async def test_five_thousand_pods(
    cluster: Cluster, account: ServiceAccount, files: InCluster, populated: str, mirror: Mirrored, wire: Wire
) -> None:
    """Followed while they are made; listed in one answer from the server's cache; listed again, page by page."""
    started = time.monotonic()
    with ThreadPoolExecutor(CREATORS) as creators:
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *[
                loop.run_in_executor(
                    creators, create_many, cluster.admin, populated, range(part, PODS, CREATORS)
                )
                for part in range(CREATORS)
            ]
        )
    made = time.monotonic() - started
    state = await mirror.equal()
    assert len(state["pods"]) >= PODS
    say(
        f"{PODS} pods with status: made in {made:.1f} s, followed {time.monotonic() - started - made:.1f} s later"
    )
    started = time.monotonic()
    async with mirrored(cluster, await source_of(files, wire)) as second:
        await second.until(lambda: not second.stale())
        say(f"listed at once in {time.monotonic() - started:.1f} s")
        await second.equal()
    wire.unplug()
    await asks(delete_many, cluster.admin, populated, range(0, PODS, 50))
    await asks(cluster.restart, kill=True)
    before = lists(calls(cluster, account))
    wire.plug()
    started = time.monotonic()
    await mirror.until(lambda: not mirror.stale())
    say(f"listed again in {time.monotonic() - started:.1f} s")
    await mirror.equal()
    assert mirror.restarts("expired", "pods") >= 1
    again = [call for call in calls(cluster, account) if call.verb == "list"][before:]
    assert sum("continue=" in call.uri for call in again) >= PODS // kubernetes_reflector.PAGE_OBJECTS - 1


def create_many(api: Api, namespace: str, numbers: range) -> None:
    for number in numbers:
        made = objects.pod(
            f"many-{number}",
            node=f"node-{number % 50}",
            ip=f"10.{100 + number // 60_000}.{number // 250 % 250}.{number % 250}",
            ids={"app": objects.digits(f"{namespace}/{number}")},
            labels={"app": "many"},
        )
        api.create("pods", made, namespace)


def delete_many(api: Api, namespace: str, numbers: range) -> None:
    for number in numbers:
        api.delete("pods", f"many-{number}", namespace)


async def test_a_killed_server_is_waited_for(
    cluster: Cluster, account: ServiceAccount, populated: str, mirror: Mirrored
) -> None:
    known = mirror.held()
    await asks(cluster.stop, kill=True)
    await mirror.until(lambda: mirror.stale() == set(KINDS))
    await mirror.until(lambda: all(mirror.restarts("network", kind) > 1 for kind in KINDS))
    assert mirror.held() == known, "what is known stays in service"
    say(f"started in {await asks(cluster.start):.1f} s")
    await asks(unseen, cluster.admin, populated)
    say(f"fresh {await mirror.until(lambda: not mirror.stale()):.1f} s later")
    await mirror.equal()
    calls(cluster, account)


async def test_a_cut_watch_goes_on_from_its_version(
    cluster: Cluster, account: ServiceAccount, populated: str, mirror: Mirrored, wire: Wire
) -> None:
    """The server has not forgotten anything: nothing is listed again, and nothing is missed."""
    wire.unplug()
    await mirror.until(lambda: mirror.stale() == set(KINDS))
    await asks(unseen, cluster.admin, populated)
    await asks(cluster.compact)  # the server answers from its watch cache
    wire.plug()
    await mirror.equal()
    writing = asyncio.create_task(asks(create_many, cluster.admin, populated, range(500)))
    while not writing.done():
        wire.cut()
        await asyncio.sleep(0.05)
    await writing
    await mirror.equal()
    say(f"{wire.cuts} connections cut")
    made = calls(cluster, account)
    assert {call.code for call in made} == {200}
    assert lists(made) == len(KINDS)


async def test_after_a_compaction_and_a_restart_everything_is_listed_again(
    cluster: Cluster, account: ServiceAccount, populated: str, mirror: Mirrored, wire: Wire
) -> None:
    """410: deleted and recreated unseen, of all kinds."""
    wire.unplug()
    await asks(unseen, cluster.admin, populated)
    await asks(cluster.compact)
    await asks(cluster.restart)
    before = lists(calls(cluster, account))
    wire.plug()
    await mirror.equal()
    for kind in KINDS:
        assert mirror.restarts("expired", kind) >= 1, kind
    again = [call for call in calls(cluster, account) if call.verb == "list"][before:]
    assert {call.resource for call in again if "resourceVersion=" not in call.uri} == set(KINDS)


async def test_an_expired_token_is_read_again_from_its_file(
    cluster: Cluster, account: ServiceAccount, populated: str, wire: Wire, tmp_path: Path
) -> None:
    """Expired at the start; later, while watches go on, which only shows when they break."""
    directory = tmp_path / "serviceaccount"
    files = account.write_in_cluster(directory, account.short_token(0))
    async with mirrored(cluster, await source_of(files, wire)) as mirror:
        await mirror.until(lambda: all(mirror.restarts("credentials", kind) > 1 for kind in KINDS))
        assert mirror.stale() == set(KINDS)
        assert not any(mirror.mirror.synced(kind) for kind in KINDS)
        assert all("401" in trouble for trouble in mirror.troubles().values())
        short = await asks(account.short_token, EXPIRED_AFTER_SECS)
        expired_at = time.monotonic() + EXPIRED_AFTER_SECS
        await asks(account.write_in_cluster, directory, short)
        await mirror.equal()
        before = mirror.restarts("credentials")
        await asyncio.sleep(max(0.0, expired_at - time.monotonic()))
        await asks(unseen, cluster.admin, populated)
        await mirror.equal()
        assert mirror.restarts("credentials") == before, "open watches go on"
        await asks(cluster.restart)
        await mirror.until(lambda: mirror.restarts("credentials") > before + len(KINDS))
        assert mirror.stale() == set(KINDS)
        await asks(account.write_in_cluster, directory, await asks(account.token))
        await mirror.equal()
    made = calls(cluster, account)
    assert 401 in {call.code for call in made}


async def test_permissions_taken_and_given_back(
    cluster: Cluster, account: ServiceAccount, populated: str, mirror: Mirrored, wire: Wire
) -> None:
    await asks(account.revoke)
    await asks(cluster.restart)
    await mirror.until(lambda: all(mirror.restarts("permission", kind) > 1 for kind in KINDS))
    assert mirror.stale() == set(KINDS)
    assert all("forbidden" in trouble for trouble in mirror.troubles().values())
    known = mirror.held()
    await asks(unseen, cluster.admin, populated)
    assert mirror.held() == known, "what is known stays in service"
    await asks(account.grant)
    await mirror.equal()
    before = len(calls(cluster, account))
    wire.cut()
    await asks(create_many, cluster.admin, populated, range(10))
    await mirror.equal()
    assert {call.code for call in calls(cluster, account)[before:]} == {200}


async def test_ten_thousand_random_changes_with_every_kind_of_break(
    cluster: Cluster,
    account: ServiceAccount,
    populated: str,
    mirror: Mirrored,
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``CLUSTER_SEED`` repeats the changes, though not their order among the threads."""
    monkeypatch.setattr(kubernetes_reflector, "WATCH_SECS_MIN", 1.0)
    monkeypatch.setattr(kubernetes_reflector, "WATCH_SECS_MAX", 3.0)
    wire.cut()  # the next watches are short ones
    seed = int(os.environ.get("CLUSTER_SEED") or random.SystemRandom().getrandbits(32))
    say(f"CLUSTER_SEED={seed}")
    churn = Churn(cluster.admin, populated, random.Random(seed), OPERATIONS)
    started = time.monotonic()
    async with churn.running():
        for share, disturb in DISTURBANCES:
            await churn.reached(share)
            await disturb(cluster, churn, wire)
            say(f"{disturb.__name__} at {share:.0%}: {churn.done} done, {time.monotonic() - started:.1f} s")
        await churn.reached(1.0)
    say(f"{churn.counts} in {time.monotonic() - started:.1f} s")
    assert sum(churn.counts.values()) == OPERATIONS
    settled = time.monotonic()
    state = await mirror.equal(60.0)
    sizes = {kind: len(items) for kind, items in state.items()}
    say(f"equal {time.monotonic() - settled:.1f} s later: {sizes}")
    made = calls(cluster, account)
    say(f"lists: {lists(made)}, watches: {len(made) - lists(made)}, connections cut: {wire.cuts}")
    assert mirror.restarts("ended") > 0
    for kind in KINDS:
        assert mirror.restarts("expired", kind) >= 3, kind
        assert mirror.restarts("decode", kind) == 0, kind


async def cut(cluster: Cluster, churn: Churn, wire: Wire) -> None:
    wire.cut()


async def cut_often(cluster: Cluster, churn: Churn, wire: Wire) -> None:
    for _ in range(20):
        wire.cut()
        await asyncio.sleep(0.05)


async def kill(cluster: Cluster, churn: Churn, wire: Wire) -> None:
    await asks(cluster.restart, kill=True)


async def compact(cluster: Cluster, churn: Churn, wire: Wire) -> None:
    with contextlib.suppress(ConnectionError):  # etcd refuses a revision that was compacted in the meantime
        await asks(cluster.compact)


async def forget(cluster: Cluster, churn: Churn, wire: Wire) -> None:
    """Away for a twentieth of all changes, which the server has forgotten when we are back."""
    wire.unplug()
    await churn.reached(min(1.0, churn.done / OPERATIONS + 0.05))
    await asks(cluster.compact)
    await asks(cluster.restart, kill=True)
    wire.plug()


DISTURBANCES: tuple[tuple[float, Callable[[Cluster, Churn, Wire], Any]], ...] = (
    (0.05, cut_often),
    (0.15, kill),
    (0.25, compact),
    (0.3, forget),
    (0.45, cut_often),
    (0.55, kill),
    (0.6, compact),
    (0.65, kill),
    (0.75, forget),
    (0.88, compact),
    (0.9, cut),
    (0.95, kill),
)
