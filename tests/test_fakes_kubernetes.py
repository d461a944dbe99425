"""The fake Kubernetes says yes and no as the real API server: driven with plain aiohttp.

The rules asserted here come from the API concepts page and the API server's own messages.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.fakes.kubernetes import FakeKubernetes
from tests.fakes.kubernetes_objects import (
    Container,
    Owner,
    hex64,
    job,
    namespace,
    node,
    pod,
    replicaset,
    uid_of,
)

META_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
META = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
USER = "system:serviceaccount:falco:forwarder"


class Client:
    """Asks the fake with a token."""

    def __init__(self, api: FakeKubernetes, session: aiohttp.ClientSession) -> None:
        self.api, self.session = api, session
        self.token: str | None = "t0ken"

    def headers(self, accept: str | None = None) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return headers | ({"Accept": accept} if accept else {})

    async def ask(
        self, path: str, *, accept: str | None = None, method: str = "GET", body: Any = None, **query: str
    ) -> tuple[int, dict[str, Any]]:
        url = self.api.url + path
        async with self.session.request(
            method, url, params=query, headers=self.headers(accept), json=body
        ) as answer:
            return answer.status, await answer.json()

    async def list(self, kind: str = "pods", **query: str) -> dict[str, Any]:
        status, body = await self.ask(f"/api/v1/{kind}", **query)
        assert status == 200, body
        return body

    @asynccontextmanager
    async def watch(
        self, path: str = "/api/v1/pods", *, accept: str | None = None, **query: str
    ) -> AsyncIterator[aiohttp.StreamReader]:
        async with self.session.get(
            self.api.url + path, params={"watch": "1", **query}, headers=self.headers(accept)
        ) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.headers["Transfer-Encoding"] == "chunked"
            assert answer.headers["Content-Type"] == "application/json"
            yield answer.content


async def event(stream: aiohttp.StreamReader) -> tuple[str, dict[str, Any]]:
    line = await asyncio.wait_for(stream.readline(), 5)
    assert line.endswith(b"\n"), line
    found = json.loads(line)
    return found["type"], found["object"]


async def names(stream: aiohttp.StreamReader, count: int) -> list[tuple[str, str]]:
    found = [await event(stream) for _ in range(count)]
    return [(kind, obj["metadata"].get("name", "-")) for kind, obj in found]


@pytest.fixture
async def api() -> AsyncIterator[FakeKubernetes]:
    async with FakeKubernetes() as fake:
        yield fake


@pytest.fixture
async def client(api: FakeKubernetes) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as session:
        yield Client(api, session)


# --- objects ---------------------------------------------------------------------------------------


def test_builders_have_the_shapes_of_a_real_cluster() -> None:
    owner = Owner("ReplicaSet", "shop-7d9f8b6c5", uid_of("rs"))
    made = pod(
        "shop-7d9f8b6c5-x2x4z",
        "shop",
        node="n1",
        ip="10.1.2.3",
        owner=owner,
        labels={"app": "shop"},
        service_account="shop",
        uid=uid_of("p"),
        created="2026-01-02T03:04:05Z",
        containers=[Container("app", image="repo/app:1", privileged=True), Container("side")],
    )
    assert 10_000 < len(json.dumps(made, separators=(",", ":"))) < 15_000
    app, side = made["status"]["containerStatuses"]
    assert re.fullmatch(r"containerd://[0-9a-f]{64}", app["containerID"])
    assert re.fullmatch(r"repo/app@sha256:[0-9a-f]{64}", app["imageID"])
    assert app["containerID"] != side["containerID"]
    assert made["spec"]["containers"][0]["securityContext"] == {"privileged": True}
    assert made["metadata"]["ownerReferences"][0]["controller"] is True
    assert made["metadata"]["managedFields"]
    assert made["spec"]["nodeName"] == "n1"
    assert made["status"]["podIP"] == "10.1.2.3"
    pending = pod("new", node="", containers=[Container(container_id="containerd://" + hex64("c"))])
    assert "nodeName" not in pending["spec"]
    assert "containerStatuses" not in pending["status"]
    waiting = pod("new", containers=[Container(waiting=True)])["status"]["containerStatuses"][0]
    assert waiting["imageID"] == ""
    assert "containerID" not in waiting
    assert node("n")["spec"]["providerID"] == "aws:///eu-west-1a/i-0123456789abcdef0"
    assert "providerID" not in node("n", provider_id="")["spec"]
    assert {item["type"] for item in node("n")["status"]["addresses"]} >= {"InternalIP", "Hostname"}
    assert replicaset("a-b", owner=Owner("Deployment", "a", "u"))["metadata"]["ownerReferences"][0][
        "apiVersion"
    ] == ("apps/v1")
    assert (
        job("j", owner=Owner("CronJob", "c", "u"))["metadata"]["ownerReferences"][0]["apiVersion"]
        == "batch/v1"
    )
    assert namespace("x")["metadata"]["labels"]["kubernetes.io/metadata.name"] == "x"


async def test_the_state_is_a_copy_and_versions_only_grow(api: FakeKubernetes) -> None:
    bare: dict[str, Any] = {"metadata": {"name": "a"}, "spec": {"nodeName": "n"}}
    made = api.create("pods", bare)
    assert made["kind"] == "Pod"
    assert made["metadata"]["namespace"] == "default"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", made["metadata"]["creationTimestamp"])
    assert bare == {"metadata": {"name": "a"}, "spec": {"nodeName": "n"}}
    made["spec"]["nodeName"] = "other"
    stored = api.get("pods", "default", "a")
    assert stored is not None
    assert stored["spec"]["nodeName"] == "n"
    changed = api.update("pods", made)
    assert int(changed["metadata"]["resourceVersion"]) == int(stored["metadata"]["resourceVersion"]) + 1
    assert api.objects("pods")[made["metadata"]["uid"]] == changed
    with pytest.raises(ValueError, match="already exists"):
        api.create("pods", bare)
    with pytest.raises(ValueError, match="UID"):
        api.update("pods", {"metadata": {"name": "a", "uid": "other"}})
    gone = api.delete("pods", "default", "a")
    assert gone["metadata"]["resourceVersion"] == str(api.version)
    assert gone["spec"] == changed["spec"]
    assert api.get("pods", "default", "a") is None
    with pytest.raises(ValueError, match="not found"):
        api.delete("pods", "default", "a")
    with pytest.raises(ValueError, match="not found"):
        api.update("pods", bare)
    with pytest.raises(ValueError, match="no namespace"):
        api.create("nodes", {"metadata": {"name": "n", "namespace": "x"}})
    with pytest.raises(ValueError, match="not a name"):
        api.create("pods", {"metadata": {"name": "Not_A_Name"}})
    with pytest.raises(ValueError, match="kind of pods"):
        api.create("pods", {"kind": "Node", "metadata": {"name": "n"}})
    again = api.create("pods", bare)
    assert again["metadata"]["uid"] != made["metadata"]["uid"]


# --- lists -----------------------------------------------------------------------------------------


async def test_a_list_has_gos_form(api: FakeKubernetes, client: Client) -> None:
    api.create("pods", {"status": {"phase": "Running"}, "metadata": {"name": "a-b"}, "spec": {}})
    api.update("pods", {"metadata": {"name": "a-b", "annotations": {"x": "<&>é"}}, "spec": {}, "status": {}})
    async with client.session.get(api.url + "/api/v1/pods", headers=client.headers()) as answer:
        raw = await answer.read()
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Cache-Control"] == "no-cache, private"
    assert raw.startswith(
        f'{{"kind":"PodList","apiVersion":"v1","metadata":{{"resourceVersion":"{api.version}"}},"items":[{{"metadata":{{"name":"a-b"'.encode()
    )
    assert "\\u003c\\u0026\\u003eé".encode() in raw
    assert raw.endswith(b'"spec":{},"status":{}}]}\n')
    status, body = await client.ask("/apis/apps/v1/replicasets")
    assert (status, body["kind"], body["apiVersion"], body["items"]) == (200, "ReplicaSetList", "apps/v1", [])


async def test_pages_show_one_moment(api: FakeKubernetes, client: Client) -> None:
    for name in "abcde":
        api.create("pods", pod(name))
    version = str(api.version)
    first = await client.list(limit="2")
    assert [item["metadata"]["name"] for item in first["items"]] == ["a", "b"]
    assert first["metadata"]["remainingItemCount"] == 3
    api.delete("pods", "default", "c")
    api.create("pods", pod("ca"))
    api.update("pods", pod("d", labels={"new": "1"}))
    second = await client.list(limit="2", **{"continue": first["metadata"]["continue"]})
    third = await client.list(limit="2", resourceVersion="0", **{"continue": second["metadata"]["continue"]})
    assert [item["metadata"]["name"] for page in (second, third) for item in page["items"]] == ["c", "d", "e"]
    assert "new" not in second["items"][1]["metadata"]["labels"]
    assert {page["metadata"]["resourceVersion"] for page in (first, second, third)} == {version}
    assert set(third["metadata"]) == {"resourceVersion"}
    rest = await client.list(**{"continue": first["metadata"]["continue"]})
    assert len(rest["items"]) == 3


async def test_continue_tokens_expire_and_offer_an_inconsistent_rest(
    api: FakeKubernetes, client: Client
) -> None:
    for name in "abc":
        api.create("pods", pod(name))
    first = await client.list(limit="1")
    api.compact()
    api.create("pods", pod("bb"))
    status, body = await client.ask("/api/v1/pods", limit="1", **{"continue": first["metadata"]["continue"]})
    assert (status, body["code"], body["reason"], body["kind"]) == (410, 410, "Expired", "Status")
    assert body["message"].startswith("The provided continue parameter is too old")
    rest = await client.list(**{"continue": body["metadata"]["continue"]})
    assert [item["metadata"]["name"] for item in rest["items"]] == ["b", "bb", "c"]
    assert rest["metadata"]["resourceVersion"] == str(api.version)
    for token in ("nonsense", "e30"):
        status, body = await client.ask("/api/v1/pods", **{"continue": token})
        assert status == 400
        assert "continue key is not valid" in body["message"]
    status, body = await client.ask(
        "/api/v1/pods", resourceVersion="7", **{"continue": first["metadata"]["continue"]}
    )
    assert status == 400
    assert body["message"] == "specifying resource version is not allowed when using continue"


async def test_the_watch_cache_ignores_limit() -> None:
    for honour, expected in ((False, 3), (True, 1)):
        async with (
            FakeKubernetes(honour_limit_at_zero=honour) as api,
            aiohttp.ClientSession() as session,
        ):
            for name in "abc":
                api.create("pods", pod(name))
            assert len((await Client(api, session).list(limit="1", resourceVersion="0"))["items"]) == expected


async def test_the_server_may_have_a_greatest_page() -> None:
    async with FakeKubernetes(page_max=2) as api, aiohttp.ClientSession() as session:
        for name in "abc":
            api.create("pods", pod(name))
        body = await Client(api, session).list(limit="500")
        assert len(body["items"]) == 2
        assert body["metadata"]["continue"]


async def test_what_resource_version_means_for_a_list(api: FakeKubernetes, client: Client) -> None:
    old = api.create("pods", pod("a"))["metadata"]["resourceVersion"]
    api.create("pods", pod("b"))

    async def found(**query: str) -> int:
        return len((await client.list(**query))["items"])

    assert await found(resourceVersion=old) == 2
    assert await found(resourceVersion=old, resourceVersionMatch="NotOlderThan", limit="5") == 2
    assert await found(resourceVersion=old, resourceVersionMatch="Exact") == 1
    assert await found(resourceVersion=old, limit="5") == 1  # with a limit and no match it is exact
    api.compact()
    assert await found(resourceVersion=old) == 2
    for query in ({"limit": "5"}, {"resourceVersionMatch": "Exact"}):
        status, body = await client.ask("/api/v1/pods", resourceVersion=old, **query)
        assert (status, body["reason"]) == (410, "Expired")
        assert body["message"] == "The resourceVersion for the provided list is too old."
    status, body = await client.ask("/api/v1/pods", resourceVersion="999999")
    assert (status, body["reason"], body["message"]) == (
        504,
        "Timeout",
        f"Timeout: Too large resource version: 999999, current: {api.version}",
    )
    assert body["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"
    assert body["details"]["retryAfterSeconds"] == 1
    status, body = await client.ask("/api/v1/pods", resourceVersion="x1")
    assert (status, body["reason"]) == (400, "BadRequest")
    assert 'Invalid value: "x1"' in body["message"]
    status, _ = await client.ask("/api/v1/namespaces/default/pods/a", resourceVersion="999999")
    assert status == 504


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"resourceVersionMatch": "Exact"}, "forbidden unless resourceVersion is provided"),
        ({"resourceVersionMatch": "Exact", "resourceVersion": "0"}, "is forbidden for resourceVersion"),
        ({"resourceVersionMatch": "Newest", "resourceVersion": "1"}, "supported values"),
        (
            {"resourceVersionMatch": "Exact", "resourceVersion": "1", "continue": "x"},
            "when continue is provided",
        ),
        ({"sendInitialEvents": "true"}, "sendInitialEvents is forbidden for list"),
        ({"watch": "1", "sendInitialEvents": "true"}, "unless the WatchList feature gate is enabled"),
        ({"watch": "1", "resourceVersionMatch": "NotOlderThan"}, "unless sendInitialEvents is provided"),
    ],
)
async def test_options_that_contradict_are_invalid(client: Client, query: dict[str, str], words: str) -> None:
    status, body = await client.ask("/api/v1/pods", **query)
    assert (status, body["reason"]) == (422, "Invalid")
    assert words in body["message"]


async def test_field_selectors(api: FakeKubernetes, client: Client) -> None:
    for index, where in enumerate(("n1", "n2", "n1", "n2")):
        api.create("pods", pod(f"p{index}", node=where))
    body = await client.list(fieldSelector="spec.nodeName=n1", limit="2")
    assert [item["metadata"]["name"] for item in body["items"]] == ["p0", "p2"]
    assert "remainingItemCount" not in body["metadata"]  # unknown with a selector
    rest = await client.list(
        fieldSelector="spec.nodeName=n1", limit="2", **{"continue": body["metadata"]["continue"]}
    )
    assert rest["items"] == []  # the last page may be empty
    assert len((await client.list(fieldSelector="metadata.name==p1,spec.nodeName!=n1"))["items"]) == 1
    status, body = await client.ask("/api/v1/pods", fieldSelector="spec.color=red")
    assert (status, body["message"]) == (400, "field label not supported: spec.color")
    status, body = await client.ask("/api/v1/pods", fieldSelector="what")
    assert (status, body["reason"]) == (400, "BadRequest")
    status, _ = await client.ask("/api/v1/pods", labelSelector="a=b")
    assert status == 501


async def test_namespaces_in_paths(api: FakeKubernetes, client: Client) -> None:
    api.create("pods", pod("a", "one"))
    api.create("pods", pod("a", "two"))
    api.create("nodes", node("n"))
    api.create("namespaces", namespace("one"))
    status, body = await client.ask("/api/v1/namespaces/two/pods")
    assert (status, [item["metadata"]["namespace"] for item in body["items"]]) == (200, ["two"])
    for path, kind in (
        ("/api/v1/namespaces/one/pods/a", "Pod"),
        ("/api/v1/nodes/n", "Node"),
        ("/api/v1/namespaces/one", "Namespace"),
    ):
        status, body = await client.ask(path)
        assert (status, body["kind"]) == (200, kind)
    status, body = await client.ask("/api/v1/namespaces/one/pods/b")
    assert (status, body["message"], body["details"]) == (
        404,
        'pods "b" not found',
        {"name": "b", "kind": "pods"},
    )


async def test_big_answers_are_compressed(api: FakeKubernetes, client: Client) -> None:
    for index in range(20):
        api.create("pods", pod(f"p{index}"))
    headers = client.headers()
    async with client.session.get(api.url + "/api/v1/pods", headers=headers) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert len((await answer.json())["items"]) == 20
    async with client.session.get(
        api.url + "/api/v1/pods", headers=headers | {"Accept-Encoding": "identity"}
    ) as answer:
        assert "Content-Encoding" not in answer.headers


# --- representations -------------------------------------------------------------------------------


async def test_metadata_only(api: FakeKubernetes, client: Client) -> None:
    owner = Owner("Deployment", "shop", uid_of("d"))
    made = api.create("replicasets", replicaset("shop-7d9f8b6c5", owner=owner))
    path = "/apis/apps/v1/replicasets"
    status, body = await client.ask(path, accept=META_LIST)
    assert (status, body["kind"], body["apiVersion"]) == (200, "PartialObjectMetadataList", "meta.k8s.io/v1")
    assert body["items"] == [
        {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": made["metadata"]}
    ]
    status, body = await client.ask(
        "/apis/apps/v1/namespaces/default/replicasets/shop-7d9f8b6c5", accept=META
    )
    assert (status, set(body)) == (200, {"kind", "apiVersion", "metadata"})
    version = body["metadata"]["resourceVersion"]
    async with client.watch(path, accept=META, resourceVersion=version, allowWatchBookmarks="true") as stream:
        api.update("replicasets", replicaset("shop-7d9f8b6c5", owner=owner))
        api.bookmark()
        kind, obj = await event(stream)
        assert (kind, obj["kind"], set(obj)) == (
            "MODIFIED",
            "PartialObjectMetadata",
            {"kind", "apiVersion", "metadata"},
        )
        kind, obj = await event(stream)
        assert (kind, obj["kind"], set(obj)) == (
            "BOOKMARK",
            "PartialObjectMetadata",
            {"kind", "apiVersion", "metadata"},
        )
    async with client.watch(path, accept=META_LIST) as stream:  # an object is not a list
        assert await stream.read() == b""


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        ("*/*", 200),
        ("application/*", 200),
        ("application/json;charset=utf-8", 200),
        (f"application/vnd.kubernetes.protobuf, {META_LIST};q=0.8, application/json;q=0.5", 200),
        ("text/html", 406),
        ("application/vnd.kubernetes.protobuf", 406),
        ("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v9", 406),
        ("application/json;as=Table;g=meta.k8s.io;v=v1", 406),
        (META, 406),
    ],
)
async def test_accept(client: Client, accept: str, status: int) -> None:
    found, body = await client.ask("/api/v1/pods", accept=accept)
    assert found == status
    if status == 406:
        assert body["reason"] == "NotAcceptable"
    elif "as=" in accept:
        assert body["kind"] == "PartialObjectMetadataList"


# --- watches ---------------------------------------------------------------------------------------


async def test_a_watch_replays_and_goes_on(api: FakeKubernetes, client: Client) -> None:
    version = (await client.list())["metadata"]["resourceVersion"]
    api.create("pods", pod("a"))
    api.create("nodes", node("elsewhere"))
    api.update("pods", pod("a", labels={"x": "y"}))
    async with client.watch(resourceVersion=version) as stream:
        assert await names(stream, 2) == [("ADDED", "a"), ("MODIFIED", "a")]
        gone = api.delete("pods", "default", "a")
        kind, obj = await event(stream)
        assert (kind, obj) == ("DELETED", gone)
        assert obj["metadata"]["resourceVersion"] == str(api.version)
        assert obj["metadata"]["labels"] == {"x": "y"}
        assert (obj["kind"], obj["apiVersion"]) == ("Pod", "v1")


async def test_a_watch_from_nowhere_begins_with_the_state(api: FakeKubernetes, client: Client) -> None:
    api.create("pods", pod("b"))
    api.create("pods", pod("a"))
    for query in ({}, {"resourceVersion": "0"}):
        async with client.watch(**query) as stream:
            found = [await event(stream) for _ in range(2)]
            assert [(kind, obj["metadata"]["name"]) for kind, obj in found] == [
                ("ADDED", "a"),
                ("ADDED", "b"),
            ]
            versions = [int(obj["metadata"]["resourceVersion"]) for _, obj in found]
            assert versions[0] > versions[1]  # those of the objects: they do not grow
            api.update("pods", pod("a"))
            assert await names(stream, 1) == [("MODIFIED", "a")]


async def test_an_old_version_is_an_error_event(api: FakeKubernetes, client: Client) -> None:
    version = str(api.version)
    async with client.watch(resourceVersion=version) as stream:
        api.compact()
        api.create("pods", pod("a"))
        assert await names(stream, 1) == [("ADDED", "a")]  # open watches go on
    async with client.watch(resourceVersion=version) as stream:
        kind, obj = await event(stream)
        assert (kind, obj["kind"], obj["code"], obj["reason"]) == ("ERROR", "Status", 410, "Expired")
        assert re.fullmatch(r"too old resource version: \d+ \(\d+\)", obj["message"])
        assert await stream.read() == b""
    api.watch_expired = "http"
    status, body = await client.ask("/api/v1/pods", watch="1", resourceVersion=version)
    assert (status, body["reason"]) == (410, "Expired")


async def test_a_watch_from_the_future_waits_for_it(api: FakeKubernetes, client: Client) -> None:
    async with client.watch(resourceVersion=str(api.version + 1)) as stream:
        api.create("pods", pod("a"))
        api.create("pods", pod("b"))
        assert await names(stream, 1) == [("ADDED", "b")]


async def test_a_selector_turns_changes_into_coming_and_going(api: FakeKubernetes, client: Client) -> None:
    version = str(api.version)
    async with client.watch(resourceVersion=version, fieldSelector="spec.nodeName=n1") as stream:
        api.create("pods", pod("other", node="n2"))
        api.create("pods", pod("a", node=""))
        api.update("pods", pod("a", node="n1"))
        api.update("pods", pod("a", node="n1", phase="Failed"))
        api.update("pods", pod("a", node="n2"))
        found = [await event(stream) for _ in range(3)]
        assert [kind for kind, _ in found] == ["ADDED", "MODIFIED", "DELETED"]
        assert found[2][1]["spec"]["nodeName"] == "n1"  # the last state that matched
        assert found[2][1]["metadata"]["resourceVersion"] == str(api.version)
    async with client.watch(
        "/api/v1/namespaces/two/pods", resourceVersion=version, fieldSelector="metadata.name=x"
    ) as stream:
        api.create("pods", pod("x", "one"))
        api.create("pods", pod("y", "two"))
        api.create("pods", pod("x", "two"))
        _, obj = await event(stream)
        assert (obj["metadata"]["namespace"], obj["metadata"]["name"]) == ("two", "x")


async def test_bookmarks_go_to_those_who_allowed_them(api: FakeKubernetes, client: Client) -> None:
    version = str(api.version)
    async with (
        client.watch(resourceVersion=version, allowWatchBookmarks="true") as asked,
        client.watch(resourceVersion=version, allowWatchBookmarks="false") as unasked,
    ):
        api.bookmark()
        kind, obj = await event(asked)
        assert kind == "BOOKMARK"
        assert obj == {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": {"resourceVersion": str(api.version), "creationTimestamp": None},
            "spec": {"containers": None},
            "status": {},
        }
        api.create("pods", pod("a"))
        assert await names(unasked, 1) == [("ADDED", "a")]
    for kind, path in (
        ("nodes", "/api/v1/nodes"),
        ("jobs", "/apis/batch/v1/jobs"),
        ("namespaces", "/api/v1/namespaces"),
        ("replicasets", "/apis/apps/v1/replicasets"),
    ):
        async with client.watch(path, allowWatchBookmarks="true") as stream:
            api.bookmark(kind)
            assert (await event(stream))[0] == "BOOKMARK"


async def test_bookmarks_also_come_by_themselves_and_the_watch_ends_in_time() -> None:
    async with FakeKubernetes(bookmark_secs=0.01) as api, aiohttp.ClientSession() as session:
        client = Client(api, session)
        async with client.watch(
            resourceVersion=str(api.version), allowWatchBookmarks="1", timeoutSeconds="60"
        ) as stream:
            api.advance()
            assert (await event(stream))[0] == "BOOKMARK"
        async with client.watch(resourceVersion=str(api.version), timeoutSeconds="1") as stream:
            assert await stream.read() == b""
        status, _ = await client.ask("/api/v1/pods", watch="1", timeoutSeconds="soon")
        assert status == 400


async def test_the_streaming_list() -> None:
    async with FakeKubernetes(watch_list=True) as api, aiohttp.ClientSession() as session:
        client = Client(api, session)
        api.create("pods", pod("a"))
        query = {"resourceVersionMatch": "NotOlderThan", "sendInitialEvents": "true"}
        async with client.watch(allowWatchBookmarks="true", **query) as stream:
            assert await names(stream, 1) == [("ADDED", "a")]
            kind, obj = await event(stream)
            assert (kind, obj["metadata"]["annotations"]) == (
                "BOOKMARK",
                {"k8s.io/initial-events-end": "true"},
            )
        async with client.watch(resourceVersion="999999", **query) as stream:
            kind, obj = await event(stream)
            assert (kind, obj["code"], obj["reason"]) == ("ERROR", 504, "Timeout")
        query["sendInitialEvents"] = "false"
        async with client.watch(resourceVersion="0", **query) as stream:
            api.create("pods", pod("b"))
            assert await names(stream, 1) == [("ADDED", "b")]
        status, body = await client.ask("/api/v1/pods", watch="1", sendInitialEvents="true")
        assert (status, body["reason"]) == (422, "Invalid")


async def test_watches_end_are_cut_or_fall_silent(api: FakeKubernetes, client: Client) -> None:
    version = str(api.version)
    async with client.watch(resourceVersion=version) as stream:
        assert len(await api.watching("pods")) == 1
        assert await api.end_watches("pods") == 1
        assert await stream.read() == b""
    for how, partial in (("reset", False), ("close", False), ("close", True)):
        async with client.watch(resourceVersion=version) as stream:
            assert await api.cut(how=how, partial=partial) == 1  # type: ignore[arg-type]
            if partial:
                assert (await stream.readany()).startswith(b'{"type":"MODIFIED"')
            with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientOSError)):
                await stream.read()
    async with client.watch(resourceVersion=version, timeoutSeconds="1") as stream:
        api.silence()
        api.create("pods", pod("a"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.readany(), 1.3)
    await api.watching("pods", 0)  # the client hung up
    api.fail.silent(kinds=("pods",))
    async with client.watch(resourceVersion=version) as stream:
        assert [watch.silent for watch in api.watches()] == [True]
    assert await api.cut() <= 1


async def test_poisoned_watches(api: FakeKubernetes, client: Client) -> None:
    with pytest.raises(LookupError):
        api.fail.garbage("pods")
    query = {"resourceVersion": str(api.version)}
    async with client.watch(**query) as stream:
        api.fail.garbage("pods")
        api.fail.unknown("pods")
        api.create("pods", pod("a"))
        with pytest.raises(json.JSONDecodeError):
            await event(stream)
        assert (await event(stream))[0] == "SURPRISE"
        assert (await event(stream))[0] == "ADDED"
        api.fail.event("pods", {"code": 429, "reason": "TooManyRequests"})
        kind, obj = await event(stream)
        assert (kind, obj["kind"], obj["code"], obj["status"]) == ("ERROR", "Status", 429, "Failure")
        assert await stream.read() == b""
    async with client.watch(**query) as stream:
        api.fail.truncated("pods")
        raw = await stream.read()
        assert raw.count(b"\n") == 1  # the pod from before
        assert not raw.endswith(b"\n")
    async with client.watch(resourceVersion=str(api.version)) as stream:
        api.fail.oversized("pods")
        size = 0
        while not (piece := await stream.readany()).endswith(b"\n"):
            size += len(piece)
        assert size + len(piece) > 4 * 1024 * 1024
        api.fail.oversized("pods", 1000, endless=True)
        await api.end_watches()
        assert b"\n" not in await stream.read()


async def test_lines_may_come_in_pieces(api: FakeKubernetes, client: Client) -> None:
    api.chop = 1000
    api.create("pods", pod("a", annotations={"é": "ö" * 2000}))
    async with client.watch() as stream:
        data = b""
        while not data.endswith(b"\n"):
            data += await stream.readany()
        assert json.loads(data)["object"]["metadata"]["name"] == "a"


# --- who may do what -------------------------------------------------------------------------------


async def test_tokens(api: FakeKubernetes, client: Client) -> None:
    unauthorized = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "Unauthorized",
        "reason": "Unauthorized",
        "code": 401,
    }
    for token in ("wrong", None):
        client.token = token
        assert await client.ask("/api/v1/pods") == (401, unauthorized)
    api.tokens = {"rotated"}
    client.token = "rotated"
    assert (await client.ask("/api/v1/pods"))[0] == 200
    api.anonymous = True
    client.token = None
    status, body = await client.ask("/api/v1/pods")
    assert (status, body["message"]) == (
        403,
        'pods is forbidden: User "system:anonymous" cannot list resource "pods" in API group "" at the cluster scope',
    )
    assert (await client.ask("/version"))[0] == 200
    async with client.session.get(api.url + "/livez") as answer:
        assert (answer.status, await answer.text()) == (200, "ok")


async def test_rules(api: FakeKubernetes, client: Client) -> None:
    api.allow -= {("", "pods", "list"), ("", "pods", "watch"), ("apps", "replicasets", "get")}
    forbidden = (
        f'pods is forbidden: User "{USER}" cannot list resource "pods" in API group "" at the cluster scope'
    )
    status, body = await client.ask("/api/v1/pods")
    assert (status, body["reason"], body["message"], body["details"]) == (
        403,
        "Forbidden",
        forbidden,
        {"kind": "pods"},
    )
    status, body = await client.ask("/api/v1/namespaces/x/pods", watch="true")
    assert (status, body["message"]) == (
        403,
        f'pods is forbidden: User "{USER}" cannot watch resource "pods" in API group "" in the namespace "x"',
    )
    status, body = await client.ask("/apis/apps/v1/namespaces/x/replicasets/r")
    assert status == 403
    assert body["message"] == (
        f'replicasets.apps "r" is forbidden: User "{USER}" cannot get resource "replicasets" in API group '
        '"apps" in the namespace "x"'
    )
    assert (await client.ask("/api/v1/namespaces/x/configmaps"))[0] == 403  # only get
    assert (await client.ask("/api/v1/secrets"))[0] == 403
    status, body = await client.ask("/metrics")
    assert (status, body["message"]) == (403, f'forbidden: User "{USER}" cannot get path "/metrics"')
    api.create("configmaps", {"metadata": {"name": "c", "namespace": "kube-system"}, "data": {"k": "v"}})
    status, body = await client.ask("/api/v1/namespaces/kube-system/configmaps/c")
    assert (status, body["data"]) == (200, {"k": "v"})


async def test_routes_that_are_not_there(api: FakeKubernetes, client: Client) -> None:
    api.allow |= {
        ("", "secrets", "list"),
        ("example.com", "things", "list"),
        ("", "pods", "create"),
        ("", "pods/log", "get"),
    }
    for path in (
        "/api/v1/secrets",
        "/api/v1/namespaces/a/pods/b/log",
        "/api/v1/namespaces/a/nodes",
        "/api/v1/pods/a",
    ):
        status, body = await client.ask(path)
        assert (status, body["reason"], body["message"]) == (
            404,
            "NotFound",
            "the server could not find the requested resource",
        ), path
    async with client.session.get(
        api.url + "/apis/example.com/v1/things", headers=client.headers()
    ) as answer:
        assert (answer.status, await answer.text()) == (404, "404 page not found\n")
    status, body = await client.ask("/api/v1/namespaces/a/pods", method="POST", body={})
    assert (status, body["reason"]) == (405, "MethodNotAllowed")
    status, body = await client.ask("/api/v1/namespaces/a/pods/x", method="DELETE")
    assert (status, body["reason"]) == (403, "Forbidden")
    status, body = await client.ask("/version")
    assert (status, body["major"]) == (200, "1")


async def test_access_reviews(api: FakeKubernetes, client: Client) -> None:
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    head = {"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1"}

    async def review(spec: Any, **kind: str) -> tuple[int, dict[str, Any]]:
        return await client.ask(path, method="POST", body={**head, **kind, "spec": spec})

    api.allow.discard(("batch", "jobs", "list"))
    for group, resource, allowed in (("", "pods", True), ("batch", "jobs", False), ("", "secrets", False)):
        wanted = {"group": group, "resource": resource, "verb": "list"}
        status, body = await review({"resourceAttributes": wanted})
        assert (status, body["status"]["allowed"], body["spec"]) == (
            201,
            allowed,
            {"resourceAttributes": wanted},
        )
    status, body = await review({"nonResourceAttributes": {"path": "/version", "verb": "get"}})
    assert body["status"]["allowed"] is True
    assert (await review({}))[0] == 422
    assert (await review({}, kind=""))[0] == 400
    assert (await review({}, apiVersion="v1"))[0] == 400
    assert (await client.ask(path))[0] == 403
    async with client.session.post(
        api.url + path, data=b"x", headers=client.headers() | {"Content-Type": "text/plain"}
    ) as answer:
        assert answer.status == 415


# --- misbehaviour ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (401, "Unauthorized", "Unauthorized"),
        (403, "Forbidden", "cannot list resource"),
        (404, "NotFound", "could not find the requested resource"),
        (410, "Expired", "too old resource version"),
        (429, "TooManyRequests", "storage is"),
        (500, "InternalError", "Internal error occurred"),
        (503, "ServiceUnavailable", "currently unable"),
        (504, "Timeout", "Too large resource version"),
    ],
)
async def test_planned_errors(
    api: FakeKubernetes, client: Client, code: int, reason: str, words: str
) -> None:
    api.fail.next("list", code, kinds=("pods",), retry_after=3 if code == 429 else None)
    assert (await client.ask("/api/v1/nodes"))[0] == 200
    async with client.session.get(api.url + "/api/v1/pods", headers=client.headers()) as answer:
        body = await answer.json()
        assert (answer.status, body["code"], body["reason"]) == (code, code, reason)
        assert words in body["message"]
        if code == 429:
            assert answer.headers["Retry-After"] == "3"
            assert body["details"]["retryAfterSeconds"] == 3
    assert (await client.ask("/api/v1/pods"))[0] == 200  # it wore off


async def test_errors_that_are_not_from_the_server_at_all(api: FakeKubernetes, client: Client) -> None:
    api.fail.next("get", 404, kinds=("pods",))
    status, body = await client.ask("/api/v1/namespaces/a/pods/x")
    assert (status, body["message"]) == (404, 'pods "x" not found')
    api.fail.next("*", 429, plain=True, retry_after=1)
    async with client.session.get(api.url + "/api/v1/pods", headers=client.headers()) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        assert answer.content_type == "text/plain"
        assert await answer.text() == "Too many requests, please try again later.\n"
    api.fail.body("list")
    async with client.session.get(api.url + "/api/v1/pods", headers=client.headers()) as answer:
        assert (answer.status, answer.content_type) == (200, "text/html")
    api.fail.reset("list", times=2)  # the client itself repeats a GET on a kept connection
    with pytest.raises(aiohttp.ClientConnectionError):
        await client.list()
    assert [request.status for request in api.requests[-2:]] == [0, 0]
    api.create("pods", pod("a"))
    api.fail.truncate("list")
    with pytest.raises(aiohttp.ClientPayloadError):
        await client.list()
    with pytest.raises(TypeError):
        api.fail.next("list", 500, kinds="pods")


async def test_slow_and_hanging_answers(api: FakeKubernetes, client: Client) -> None:
    api.slow(list_secs=0.1)
    before = asyncio.get_running_loop().time()
    await client.list()
    assert asyncio.get_running_loop().time() - before >= 0.1
    api.slow()
    fault = api.fail.hang("list", times=None)
    task = asyncio.create_task(client.list())
    await api.until(lambda: fault.hits)
    assert not task.done()
    fault.clear()
    assert (await task)["items"] == []
    api.fail.hang("list")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.list(), 0.1)


async def test_requests_are_remembered(api: FakeKubernetes, client: Client) -> None:
    before = asyncio.get_running_loop().time()
    await client.ask("/api/v1/namespaces/x/pods", accept=META_LIST, limit="500", resourceVersion="0")
    await client.ask("/api/v1/nodes/n")
    listed, got = api.requests
    assert (listed.verb, listed.resource, listed.namespace, listed.status) == ("list", "pods", "x", 200)
    assert listed.query == {"limit": "500", "resourceVersion": "0"}
    assert (listed.accept, listed.token) == (META_LIST, "t0ken")
    assert before <= listed.at <= got.at
    assert (got.verb, got.name, got.status) == ("get", "n", 404)
    assert listed.headers["User-Agent"].startswith("Python/")
    assert api.seen("list", "pods") == [listed]


async def test_the_server_stops_whatever_is_open_and_comes_back(client: Client, api: FakeKubernetes) -> None:
    api.create("pods", pod("a"))
    url = api.url
    hang = api.fail.hang("get")
    task = asyncio.create_task(client.ask("/api/v1/nodes/n"))
    await api.until(lambda: hang.hits)
    async with client.watch() as stream:
        await event(stream)
        await api.stop()
        await api.stop()
        with pytest.raises(aiohttp.ClientError):
            await stream.read()
    with pytest.raises(aiohttp.ClientError):
        await task
    with pytest.raises(aiohttp.ClientConnectionError):
        await client.list()
    assert api.watches() == []
    assert await api.start() == url
    with pytest.raises(RuntimeError):
        await api.start()
    assert len((await client.list())["items"]) == 1
    with pytest.raises(OSError, match="address"):
        await FakeKubernetes().start(int(url.rpartition(":")[2]))
