"""The harness itself, and what our list/watch relies on of a real API server."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.cluster import harness
from tests.cluster.account import TOKEN_CACHE_SECS, ServiceAccount
from tests.cluster.api import METADATA, METADATA_LIST, Answer, Api, RefusedError, path_of
from tests.cluster.harness import COMPACTION_SECS_MAX, Call, Cluster
from tests.crash.harness import say, wait_until

pytestmark = pytest.mark.cluster

NODE = {
    "metadata": {"name": "ip-10-0-0-1"},
    "spec": {"providerID": "aws:///eu-west-1a/i-0123456789abcdef0"},
    "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]},
}


def pod(name: str) -> dict[str, Any]:
    container = {
        "name": "app",
        "image": "app:1",
        "imageID": "app@sha256:" + "0" * 64,
        "containerID": "containerd://" + "a" * 64,
        "ready": True,
        "restartCount": 0,
        "state": {"running": {}},
    }
    return {
        "metadata": {"name": name, "labels": {"app": "a"}},
        "spec": {"nodeName": "ip-10-0-0-1", "containers": [{"name": "app", "image": "app:1"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.9", "containerStatuses": [container]},
    }


def relabel(api: Api, namespace: str, name: str, value: str) -> str:
    """Change a pod; returns the resource version of the change."""
    changed = api.patch("pods", name, {"metadata": {"labels": {"step": value}}}, namespace)
    return str(changed["metadata"]["resourceVersion"])


def events(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.lines()]


def until(condition: Callable[[], bool], secs: float = 10.0) -> float:
    return wait_until(condition, secs, lambda: "the server follows")


def test_objects_have_the_status_they_were_given(cluster: Cluster, namespace: str) -> None:
    made = cluster.admin.create("pods", pod("one"), namespace)
    assert made["status"]["podIP"] == "10.0.0.9"
    made["status"]["podIP"] = "10.0.0.10"
    cluster.admin.update("pods", made, namespace, "status")
    status = cluster.admin.get("pods", "one", namespace)["status"]
    assert status["podIP"] == "10.0.0.10"
    assert status["containerStatuses"][0]["containerID"].startswith("containerd://aaaa")
    node = cluster.admin.create("nodes", NODE)
    cluster.admin.delete("nodes", "ip-10-0-0-1")
    assert node["status"]["addresses"][0]["address"] == "10.0.0.1"
    owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "uid": "1", "controller": True}
    template = {"metadata": {"labels": {"app": "a"}}, "spec": pod("x")["spec"]}
    spec = {"selector": {"matchLabels": {"app": "a"}}, "template": template}
    body = {"metadata": {"name": "web-1", "ownerReferences": [owner]}, "spec": spec}
    assert cluster.admin.create("replicasets", body, namespace)["metadata"]["uid"]


def test_a_pod_is_deleted_at_once_or_stays_through_its_grace(cluster: Cluster, namespace: str) -> None:
    for name in ("now", "later"):
        cluster.admin.create("pods", pod(name), namespace)
    cluster.admin.delete("pods", "now", namespace)
    cluster.admin.delete("pods", "later", namespace, grace_secs=30)
    with pytest.raises(RefusedError) as gone:
        cluster.admin.get("pods", "now", namespace)
    assert gone.value.status == 404
    assert cluster.admin.get("pods", "later", namespace)["metadata"]["deletionTimestamp"]


def test_our_rules_are_enough_and_no_more(cluster: Cluster, namespace: str, account: ServiceAccount) -> None:
    api = cluster.admin.as_user(account.token())
    cluster.admin.create("pods", pod("one"), namespace)
    for resource in ("pods", "namespaces", "nodes", "replicasets", "jobs"):
        assert api.request("GET", path_of(resource), accept=METADATA_LIST).status == 200, resource
        assert api.watch(resource, "0").status == 200, resource
    assert api.get("pods", "one", namespace)["metadata"]["name"] == "one"
    forbidden = [
        api.request("GET", path_of("secrets")),
        api.request("GET", path_of("configmaps")),
        api.request("GET", path_of("secrets", namespace, "any")),
        api.request("GET", path_of("nodes", "", "any")),
        api.request("GET", path_of("pods", namespace, "one", "log")),
        api.request("POST", path_of("pods", namespace), pod("two")),
        api.request("DELETE", path_of("pods", namespace, "one")),
    ]
    say(f"403: {forbidden[0].body!r}")
    assert [answer.status for answer in forbidden] == [403] * len(forbidden)


def test_rules_can_be_taken_and_given_back(cluster: Cluster, account: ServiceAccount) -> None:
    api = cluster.admin.as_user(account.token())
    for change, status in ((account.revoke, 403), (account.grant, 200)):
        change()
        assert api.request("GET", path_of("pods")).status == status


def test_a_token_ends_while_a_watch_goes_on(
    cluster: Cluster, namespace: str, account: ServiceAccount
) -> None:
    expired = cluster.admin.as_user(account.short_token(0)).request("GET", path_of("pods"))
    say(f"401: {expired.body!r}")
    assert expired.status == 401
    assert expired.json()["reason"] == "Unauthorized"
    api = cluster.admin.as_user(account.short_token(2))
    assert api.request("GET", path_of("pods")).status == 200
    since = cluster.admin.list("pods")["metadata"]["resourceVersion"]
    answer = api.watch("pods", since, secs=TOKEN_CACHE_SECS + 4)
    assert answer.status == 200, "a watch is not ended with the token it was opened with"
    assert api.request("GET", path_of("pods")).status == 401
    no_token = cluster.admin.as_user(None).request("GET", path_of("pods"))
    assert no_token.status == 403, "without a token one is system:anonymous"
    with pytest.raises(RefusedError):
        account.token(599)


def test_a_list_from_the_cache_ignores_the_limit(cluster: Cluster, namespace: str) -> None:
    for number in range(5):
        cluster.admin.create("pods", pod(f"p{number}"), namespace)
    cached = cluster.admin.list("pods", namespace, limit="2", resourceVersion="0")
    assert len(cached["items"]) == 5
    assert "continue" not in cached["metadata"]
    page = cluster.admin.list("pods", namespace, limit="2")
    assert len(page["items"]) == 2
    assert page["metadata"]["continue"]
    assert page["metadata"]["remainingItemCount"] == 3


def test_the_shape_of_lists_and_events(cluster: Cluster, namespace: str) -> None:
    made = cluster.admin.create("pods", pod("one"), namespace)
    path = path_of("pods", namespace)
    full = cluster.admin.request("GET", path).body
    assert full.startswith(b'{"kind":"PodList","apiVersion":"v1","metadata":{')
    assert b'"items":[{"metadata":{"name":"one","namespace":' in full
    partial = cluster.admin.request("GET", path, accept=METADATA_LIST).body
    item = b'"items":[{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{"name":"one",'
    assert item in partial
    empty = cluster.admin.request("GET", path_of("jobs", namespace), accept=METADATA_LIST)
    assert empty.json()["items"] is None, "no items are null for metadata"
    assert cluster.admin.list("jobs", namespace)["items"] == []
    # While the watch is on: only what is newer than the events a watch begins with is worth a bookmark.
    deletion = threading.Timer(1, cluster.admin.delete, ("pods", "one", namespace))
    deletion.start()
    since = made["metadata"]["resourceVersion"]
    lines = cluster.admin.watch("pods", since, secs=7, namespace=namespace, accept=METADATA).lines()
    deletion.join()
    say("\n".join(line.decode() for line in lines))
    prefix = b'"object":{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":{'
    assert [line.partition(b',"object"')[0] for line in lines[:3]] == [
        b'{"type":"MODIFIED"',  # marked for deletion
        b'{"type":"DELETED"',
        b'{"type":"BOOKMARK"',
    ]
    assert b"," + prefix + b'"name":"one"' in lines[1]
    assert lines[2].startswith(b'{"type":"BOOKMARK",' + prefix + b'"resourceVersion":"')
    assert set(lines[3:]) <= {lines[2]}, "the same bookmark may come twice"


def test_restart_keeps_objects_and_ends_old_watches(cluster: Cluster, namespace: str) -> None:
    old = cluster.admin.create("pods", pod("one"), namespace)["metadata"]["resourceVersion"]
    relabel(cluster.admin, namespace, "one", "1")
    relabel(cluster.admin, namespace, "one", "2")
    cluster.compact()
    types = [event["type"] for event in events(cluster.admin.watch("pods", old, namespace=namespace))]
    assert types[:2] == ["MODIFIED", "MODIFIED"], "the watch cache hides the compaction"
    stopped = cluster.stop()
    with pytest.raises(OSError, match="refused"):
        cluster.admin.request("GET", path_of("pods"))
    say(f"stop {stopped:.1f} s, start {cluster.start():.1f} s")
    assert cluster.admin.get("pods", "one", namespace)["metadata"]["labels"]["step"] == "2"
    answer = cluster.admin.watch("pods", old, namespace=namespace)
    say(f"watch from {old}: {answer.status} {answer.body!r}")
    (event,) = events(answer)
    assert (answer.status, event["type"], event["object"]["code"]) == (200, "ERROR", 410)


def test_a_continue_token_ends_with_a_compaction(cluster: Cluster, namespace: str) -> None:
    for number in range(3):
        cluster.admin.create("pods", pod(f"p{number}"), namespace)
    token = cluster.admin.list("pods", namespace, limit="1")["metadata"]["continue"]
    relabel(cluster.admin, namespace, "p0", "1")
    path = f"{path_of('pods', namespace)}?limit=1&continue="
    assert cluster.admin.request("GET", path + token).status == 200
    cluster.compact()
    secs = until(lambda: cluster.admin.request("GET", path + token).status != 200, COMPACTION_SECS_MAX)
    answer = cluster.admin.request("GET", path + token)
    say(f"continue after {secs:.1f} s: {answer.status} {answer.body!r}")
    assert (answer.status, answer.json()["reason"]) == (410, "Expired")


def test_the_audit_log_tells_our_calls(cluster: Cluster, namespace: str, account: ServiceAccount) -> None:
    api = cluster.admin.as_user(account.token())
    api.request("GET", path_of("pods"))
    api.request("GET", path_of("secrets", namespace))
    api.watch("pods", "0")
    expected = {("list", "pods", 200), ("list", "secrets", 403), ("watch", "pods", 200)}

    def told() -> set[tuple[str, str, int]]:
        return {(call.verb, call.resource, call.code) for call in cluster.calls(account.user)}

    until(lambda: expected <= told())
    cluster.admin.as_user("nobody").request("GET", path_of("pods"))
    until(lambda: any(call.code == 401 for call in cluster.calls("")))
    assert isinstance(cluster.calls()[0], Call)


async def test_both_ways_to_configure_a_client(
    cluster: Cluster, account: ServiceAccount, tmp_path: Path
) -> None:
    files = account.write_in_cluster(tmp_path / "serviceaccount", account.token())
    assert (files.directory / "namespace").read_text() == account.namespace
    user = yaml.safe_load(files.kubeconfig.read_text())
    target = user["clusters"][0]["cluster"]
    mounted = "https://{KUBERNETES_SERVICE_HOST}:{KUBERNETES_SERVICE_PORT}".format(**files.environment)
    for url, authority, token in (
        (mounted, files.directory / "ca.crt", (files.directory / "token").read_text()),
        (target["server"], target["certificate-authority"], user["users"][0]["user"]["token"]),
    ):
        context = ssl.create_default_context(cafile=authority)
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(url + path_of("pods"), ssl=context) as answer,
        ):
            assert answer.status == 200


def test_a_missing_program_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "TOOLS", harness.REPOSITORY / ".tools" / "nowhere")
    with pytest.raises(FileNotFoundError, match="make cluster-tools"):
        Cluster(tmp_path)


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.apiserver._command.append("--no-such-flag")
    started = time.monotonic()
    with pytest.raises(AssertionError, match="no-such-flag"), cluster:
        pass
    assert time.monotonic() - started < 20
    assert not cluster.etcd.running
