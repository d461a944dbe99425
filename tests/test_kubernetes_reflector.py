"""The reflector against a strict fake of the API server: every rule of the Go client, and every way a watch can break."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from forwarder import kubernetes_reflector
from forwarder.kubernetes_access import Access, Source
from forwarder.kubernetes_api import Api
from forwarder.kubernetes_objects import NO_LABELS, decode_meta, decode_node, decode_pod
from forwarder.kubernetes_reflector import (
    BACKOFF_BASE_SECS,
    BACKOFF_MAX_SECS,
    HEALTHY_SECS,
    Backoff,
    Reflector,
    Resource,
)
from tests.fakes import kubernetes_objects as objects
from tests.fakes.kubernetes import FakeKubernetes, KubeRequest

PODS = Resource("pods", "", metadata_only=False)
NODES = Resource("nodes", "", metadata_only=False)
REPLICASETS = Resource("replicasets", "apps", metadata_only=True)


class Known:
    """A store that keeps names by UID."""

    def __init__(self, kind: str) -> None:
        self.names: dict[str, str] = {}
        self.versions: list[str] = []
        self._decode: Callable[[bytes], Any] = {
            "pods": lambda data: decode_pod(data, NO_LABELS),
            "nodes": lambda data: decode_node(data, {}),
        }.get(kind, lambda data: decode_meta(data, NO_LABELS))

    def put(self, data: bytes) -> tuple[str, str]:
        item, version = self._decode(data)
        self.names[item.uid] = item.name
        self.versions.append(version)
        return item.uid, version

    def delete(self, uid: str) -> None:
        self.names.pop(uid, None)

    def __len__(self) -> int:
        return len(self.names)

    def keep_only(self, uids: set[str]) -> int:
        gone = self.names.keys() - uids
        for uid in gone:
            del self.names[uid]
        return len(gone)


class Watching:
    """A running reflector, its store, and what it counted."""

    def __init__(self, api: FakeKubernetes, resource: Resource, page_objects: int) -> None:
        self.fake = api
        self.store = Known(resource.kind)
        self.restarts: Counter[str] = Counter()
        self.client = Api(Access(Source(server=api.url, token="t0ken"), asyncio.get_running_loop().time))
        self.reflector = Reflector(
            self.client,
            resource,
            self.store,
            rng=random.Random(1),
            monotonic=asyncio.get_running_loop().time,
            restarted=lambda _kind, reason: self.restarts.update([reason]),
            page_objects=page_objects,
        )
        self.kind = resource.kind

    def equal(self) -> bool:
        """The store has exactly what the API server has."""
        return self.store.names == {
            uid: item["metadata"]["name"] for uid, item in self.fake.objects(self.kind).items()
        }

    async def settled(self, secs: float = 10.0) -> None:
        """Wait until store and API server are equal with the watch open."""
        try:
            async with asyncio.timeout(secs):
                while not (self.fake.watches(self.kind) and self.equal() and self.reflector.connected):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError((self.store.names, self.restarts, self.reflector.trouble)) from None

    async def until(self, condition: Callable[[], object], secs: float = 10.0) -> None:
        async with asyncio.timeout(secs):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def broken(self, reason: str, count: int = 1) -> None:
        await self.until(lambda: self.restarts[reason] >= count)

    def lists(self) -> list[KubeRequest]:
        return self.fake.seen("list", self.kind)

    def watched(self) -> list[KubeRequest]:
        return self.fake.seen("watch", self.kind)


Watch = Callable[..., Any]


@pytest.fixture
def impatient_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_BASE_SECS", 0.01)
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_MAX_SECS", 0.05)


@contextlib.asynccontextmanager
async def running(
    api: FakeKubernetes, resource: Resource = PODS, page_objects: int = 500
) -> AsyncIterator[Watching]:
    watching = Watching(api, resource, page_objects)
    task = asyncio.create_task(watching.reflector.run())
    try:
        yield watching
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await watching.client.close()


@pytest.fixture
async def api(impatient_watch: None) -> AsyncIterator[FakeKubernetes]:
    async with FakeKubernetes() as fake:
        for number in range(5):
            fake.create("pods", objects.pod(f"web-{number}"))
        yield fake


# ---- rule 1: lists ---------------------------------------------------------------------------------------


async def test_the_first_list_asks_the_servers_cache_and_the_watch_goes_on_from_it(
    api: FakeKubernetes,
) -> None:
    async with running(api) as watching:
        await watching.settled()
        (first,) = watching.lists()
        assert first.query["resourceVersion"] == "0"
        assert first.query["limit"] == "500"
        (watch,) = watching.watched()
        assert watch.query["resourceVersion"] == str(api.version)
        assert watching.reflector.synced.is_set()


async def test_pages_are_followed_to_the_end(impatient_watch: None) -> None:
    async with FakeKubernetes(honour_limit_at_zero=True) as api:
        for number in range(7):
            api.create("pods", objects.pod(f"web-{number}"))
        async with running(api, page_objects=3) as watching:
            await watching.settled()
            lists = watching.lists()
            assert ["continue" in request.query for request in lists] == [False, True, True]
            assert all("resourceVersion" not in request.query for request in lists[1:])


async def test_an_expired_page_starts_the_list_again(impatient_watch: None) -> None:
    async with FakeKubernetes(honour_limit_at_zero=True) as api:
        for number in range(7):
            api.create("pods", objects.pod(f"web-{number}"))
        api.slow(list_secs=0.05)
        async with running(api, page_objects=3) as watching:
            await api.until(lambda: len(watching.lists()) == 2)
            api.compact()
            await watching.settled()
            restarted = watching.lists()[-3:]
            assert "resourceVersion" not in restarted[0].query
            assert "continue" not in restarted[0].query
            assert watching.restarts["expired"] >= 1


async def test_after_a_break_the_last_version_is_listed_and_after_expiry_the_freshest(
    api: FakeKubernetes,
) -> None:
    async with running(api) as watching:
        await watching.settled()
        before = str(api.version)
        api.fail.unknown("pods")
        await watching.broken("decode")
        await watching.settled()
        assert watching.lists()[-1].query["resourceVersion"] == before
        assert "limit" not in watching.lists()[-1].query, "with a limit, the version would be exact"
        api.create("pods", objects.pod("late"))
        api.fail.event("pods", {"code": 410})
        await watching.broken("expired")
        await watching.settled()
        assert "resourceVersion" not in watching.lists()[-1].query


async def test_a_version_the_server_does_not_have_yet_is_given_up(api: FakeKubernetes) -> None:
    """A second API server may be behind the first: 504 "Too large resource version"."""
    async with running(api) as watching:
        await watching.settled()
        watching.reflector._version = str(api.version + 1000)
        api.fail.unknown("pods")
        await watching.broken("too_new")
        await watching.settled()
        assert "resourceVersion" not in watching.lists()[-1].query


async def test_a_relist_deletes_what_is_not_in_it_by_uid(api: FakeKubernetes) -> None:
    """Deleted unseen, and recreated unseen under the same name: the old UID goes."""
    async with running(api) as watching:
        await watching.settled()
        old = api.get("pods", "default", "web-0")
        assert old is not None
        await api.stop()
        await watching.broken("network")
        api.delete("pods", "default", "web-1")
        api.delete("pods", "default", "web-0")
        api.create("pods", objects.pod("web-0", uid="another"))
        api.compact()
        await api.start()
        await watching.settled()
        assert old["metadata"]["uid"] not in watching.store.names
        assert watching.store.names["another"] == "web-0"


# ---- rule 2: watches -------------------------------------------------------------------------------------


async def test_a_watch_allows_bookmarks_and_ends_after_five_to_ten_minutes(api: FakeKubernetes) -> None:
    async with running(api) as watching:
        for count in range(1, 6):
            await watching.settled()
            api.update("pods", {**api.objects("pods")[next(iter(api.objects("pods")))]})
            await watching.settled()
            await api.end_watches("pods")
            await api.until(lambda count=count: len(watching.watched()) > count)  # type: ignore[misc]
        seconds = {int(request.query["timeoutSeconds"]) for request in watching.watched()}
        assert all(300 <= secs <= 600 for secs in seconds)
        assert len(seconds) > 1
        assert {request.query["allowWatchBookmarks"] for request in watching.watched()} == {"true"}
        assert len(watching.lists()) == 1


async def test_every_event_and_bookmark_moves_the_version(api: FakeKubernetes) -> None:
    async with running(api) as watching:
        await watching.settled()
        api.create("pods", objects.pod("another"))
        await watching.settled()
        await api.end_watches("pods")
        await api.watching("pods")
        assert watching.watched()[-1].query["resourceVersion"] == str(api.version)
        api.bookmark()
        told = str(api.version)
        heard = watching.reflector.heard_at
        await watching.until(lambda: watching.reflector.heard_at > heard)
        await api.end_watches("pods")
        await api.watching("pods")
        assert watching.watched()[-1].query["resourceVersion"] == told


async def test_metadata_is_all_that_is_asked_for_where_it_is_enough(api: FakeKubernetes) -> None:
    api.create("replicasets", objects.replicaset("web-1"))
    async with running(api, REPLICASETS) as watching:
        await watching.settled()
        assert (
            watching.lists()[0].accept == "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
        )
        assert watching.watched()[0].accept == "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
        api.create("replicasets", objects.replicaset("web-2"))
        api.delete("replicasets", "default", "web-1")
        await watching.settled()


async def test_a_field_selector_goes_with_every_request(impatient_watch: None) -> None:
    async with FakeKubernetes(honour_limit_at_zero=True) as api:
        for number in range(4):
            api.create("pods", objects.pod(f"here-{number}", node="here"))
        api.create("pods", objects.pod("there", node="there"))
        here = PODS._replace(field_selector="spec.nodeName=here")
        async with running(api, here, page_objects=2) as watching:
            await api.watching("pods")
            assert set(watching.store.names.values()) == {f"here-{number}" for number in range(4)}
            assert {request.query.get("fieldSelector") for request in api.requests} == {"spec.nodeName=here"}


# ---- rule 3: errors inside a watch -----------------------------------------------------------------------


@pytest.mark.parametrize(("code", "reason"), [(429, "throttled"), (500, "unavailable"), (503, "unavailable")])
async def test_throttles_and_server_errors_go_on_from_the_same_version(
    api: FakeKubernetes, code: int, reason: str
) -> None:
    async with running(api) as watching:
        await watching.settled()
        version = watching.reflector._version
        api.fail.event("pods", {"code": code})
        await watching.broken(reason)
        await watching.settled()
        assert len(watching.lists()) == 1
        assert watching.watched()[-1].query["resourceVersion"] == version


@pytest.mark.parametrize(("code", "reason"), [(410, "expired"), (400, "refused"), (404, "refused")])
async def test_other_errors_list_again(api: FakeKubernetes, code: int, reason: str) -> None:
    async with running(api) as watching:
        await watching.settled()
        api.fail.event("pods", {"code": code})
        await watching.broken(reason)
        await watching.settled()
        assert len(watching.lists()) == 2


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
@pytest.mark.parametrize("verb", ["list", "watch"])
async def test_refused_requests_are_tried_again(api: FakeKubernetes, verb: Any, status: int) -> None:
    api.fail.next(verb, status, times=2)
    async with running(api) as watching:
        await watching.settled()
        assert watching.equal()
        assert sum(watching.restarts.values()) == 2


async def test_a_watch_too_old_for_the_server_lists_again(impatient_watch: None) -> None:
    for how in ("event", "http"):
        async with FakeKubernetes(watch_expired=how) as api:
            api.create("pods", objects.pod("web"))
            async with running(api) as watching:
                await watching.settled()
                await api.stop()
                await watching.broken("network")
                api.create("pods", objects.pod("unseen"))
                api.compact()
                await api.start()
                await watching.settled()
                assert watching.restarts["expired"] >= 1


# ---- broken connections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_cut_watch_goes_on_from_the_same_version(
    api: FakeKubernetes, how: Any, partial: bool
) -> None:
    async with running(api) as watching:
        await watching.settled()
        await api.cut("pods", partial=partial, how=how)
        api.create("pods", objects.pod("meanwhile"))
        await watching.settled()
        assert len(watching.lists()) == 1


async def test_what_is_known_stays_while_nobody_answers(api: FakeKubernetes) -> None:
    async with running(api) as watching:
        await watching.settled()
        known = dict(watching.store.names)
        await api.stop()
        await watching.broken("network", 3)
        assert watching.store.names == known
        assert not watching.reflector.connected
        assert watching.reflector.trouble
        await api.start()
        await watching.settled()


async def test_a_server_that_is_not_there_yet_is_waited_for(impatient_watch: None) -> None:
    api = FakeKubernetes()
    await api.start()
    api.create("pods", objects.pod("web"))
    await api.stop()
    async with running(api) as watching:
        await watching.broken("network", 2)
        assert not watching.reflector.synced.is_set()
        await api.start()
        await watching.settled()
    await api.stop()


async def test_odd_lines_list_again(api: FakeKubernetes) -> None:
    async with running(api) as watching:
        for plan in (api.fail.garbage, api.fail.oversized, api.fail.unknown):
            await watching.settled()
            before = len(watching.lists())
            plan("pods")
            await api.until(lambda before=before: len(watching.lists()) > before)  # type: ignore[misc]
        await watching.settled()
        assert watching.restarts["decode"] == 3


async def test_a_list_that_is_cut_off_or_no_list_deletes_nothing(api: FakeKubernetes) -> None:
    async with running(api) as watching:
        await watching.settled()
        known = dict(watching.store.names)
        api.fail.truncate("list")
        api.fail.body("list")
        api.fail.event("pods", {"code": 410})
        await watching.broken("expired")
        async with asyncio.timeout(10):
            while len(watching.lists()) < 3:
                assert watching.store.names == known
                await asyncio.sleep(0.001)
        await watching.settled()


async def test_one_object_of_an_odd_shape_does_not_hide_the_others(api: FakeKubernetes) -> None:
    odd = objects.pod("odd")
    odd["spec"]["nodeName"] = 17
    async with running(api) as watching:
        await watching.settled()
        api.create("pods", odd)
        api.create("pods", objects.pod("even"))
        await watching.until(lambda: "even" in watching.store.names.values())
        assert "odd" not in watching.store.names.values()
        assert watching.reflector._version == str(api.version)
        assert not watching.restarts


async def test_a_watch_that_ends_at_once_is_not_asked_again_at_once(
    api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that closes every watch must not be flooded."""
    monkeypatch.setattr(kubernetes_reflector, "BACKOFF_BASE_SECS", 30.0)
    async with running(api) as watching:
        await watching.settled()
        await api.end_watches("pods")
        await watching.broken("short")
        assert len(watching.watched()) == 1


async def test_a_silent_connection_is_given_up(api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer forgets connections without a word; no read lasts for ever."""
    monkeypatch.setattr(kubernetes_reflector, "WATCH_SECS_MIN", 0.2)
    monkeypatch.setattr(kubernetes_reflector, "WATCH_SECS_MAX", 0.2)
    monkeypatch.setattr(kubernetes_reflector, "READ_MARGIN_SECS", 0.1)
    async with running(api) as watching:
        await watching.settled()
        api.silence("pods")
        await watching.broken("timeout")
        await watching.settled()


async def test_a_list_that_drips_is_given_up(api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte a minute keeps every single read in time."""
    monkeypatch.setattr(kubernetes_reflector, "LIST_SECS_MAX", 0.2)
    hanging = api.fail.hang("list")
    async with running(api) as watching:
        await watching.broken("timeout")
        assert "not over within" in watching.reflector.trouble
        hanging.clear()
        await watching.settled()


async def test_the_token_is_not_repeated_to_the_world(api: FakeKubernetes) -> None:
    """A proxy's error page may quote the request; what it says goes to the log and to /status."""
    api.fail.body("list", b"<pre>GET / Authorization: Bearer t0ken</pre>", code=502)
    async with running(api) as watching:
        await watching.broken("unavailable")
        assert "Authorization: Bearer ***" in watching.reflector.trouble
        await watching.settled()


# ---- rule 4: back-off ------------------------------------------------------------------------------------


def test_back_off_doubles_to_its_cap_with_as_much_jitter_and_forgets_after_health() -> None:
    now = 0.0
    backoff = Backoff(random.Random(3), lambda: now)
    expected = BACKOFF_BASE_SECS
    for _ in range(10):
        delay = backoff.next_secs()
        assert expected <= delay <= 2 * expected
        now += delay
        expected = min(BACKOFF_MAX_SECS, 2 * expected)
    now += HEALTHY_SECS + 0.1
    assert backoff.next_secs() <= 2 * BACKOFF_BASE_SECS


async def test_the_servers_own_wish_is_heeded(api: FakeKubernetes) -> None:
    api.fail.next("list", 429, retry_after=1)
    async with running(api) as watching:
        await watching.settled()
        refused, listed = watching.lists()
        assert listed.at - refused.at >= 1.0
