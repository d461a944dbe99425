"""A demonstration: the API server of a small cluster that never was, around alerts that are real.

The sample alerts come from many clusters and machines. What they say is kept (container ids, images, names of pods, namespaces
and hosts); what they do not say is made up in ``PODS``: owners, labels, nodes, instances. Some have no pod here, on purpose: of
``de5850adb200`` the node is known, by its Falco pod, of ``16514a12c7ad`` nothing; Docker alone ran others.

It serves what the forwarder's reflectors ask for: lists, watches in which nothing ever happens, and one pod by its name. Strangers
are refused. Run as a module it takes the port, listens on 127.0.0.1, and ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import sys
import uuid
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import msgspec
from aiohttp import web

TOKEN = "demo"  # noqa: S105 - it opens nothing but this
CREATED = "2015-01-01T00:00:00Z"
"""Before the oldest alert."""
VERSION = "1"
"""Nothing ever changes."""
INSTANCE_TYPES = ("m6i.large", "m6i.xlarge", "c6i.large", "r6i.large")
BOOKMARK_SECS, WATCH_SECS_MAX = 60.0, 1800
SHORT_ID = 12

PODS = """
shop payments payments-api-7d4b9c6f58-x2x9k Deployment/payments-api vm 3ad7b26ded6d
shop payments orders-db-0 StatefulSet/orders-db vm 4a2771303b70
shop payments nightly-report-29412600-8kq5d CronJob/nightly-report vm ec6c622b2afa
web storefront nginx-5b6d8f9c74-hv4tz Deployment/nginx romanenko-worker-f05368e7-4m2dt-wkcj4 998306071edc
lab training lab9-target-6f9c4d7b85-q7w2m Deployment/lab9-target ip-10-0-1-17.eu-west-1.compute.internal 27e4b583e28a
lab training event-generator-84d6c9f7bb-m4zpl Deployment/event-generator ip-10-0-3-8.eu-west-1.compute.internal 84c0b936c919
lab training event-generator-84d6c9f7bb-r9kdn Deployment/event-generator ip-10-0-2-33.eu-west-1.compute.internal 9656db3bb358
default platform nginx - k8-worker-1 45dd76eff80f
default platform kubecon - ip-10-0-3-8.eu-west-1.compute.internal ee97d9c4186f
default platform alpine - ip-10-0-2-33.eu-west-1.compute.internal cbd3133ccac6
default platform falco-5tjrp DaemonSet/falco minikube fc8aefdf0c4e
kube-system platform storage-provisioner - minikube ee90b4bfa6d7
fission-function functions poolmgr-go-default-516098-5bdbf8c8f5-g8gvc Deployment/poolmgr-go-default-516098 vm 281c99ea33c2
falcoresponse security alpine - ip-10-0-1-17.eu-west-1.compute.internal 6ac7d190134e
falcoresponse security el-falco-listener-7c9b5d6684-tn8vg Deployment/el-falco-listener k8-worker-1 9c48dd873ab9
red-ns blog wordpress-66cd544579-cv29k Deployment/wordpress ip-10-0-2-33.eu-west-1.compute.internal 854d2f6f3c68
falco security falco-8lvvb DaemonSet/falco k8-worker-1 6c9b72f1c563
falco security falco-6htpw DaemonSet/falco romanenko-worker-f05368e7-4m2dt-wkcj4 5dea0c14015a
falco security falco-p6bds DaemonSet/falco ip-10-0-1-17.eu-west-1.compute.internal 96f3c8ebb841
falco security falco-zt4mx DaemonSet/falco ip-10-0-2-33.eu-west-1.compute.internal 76ebafc7e3a2
falco security falco-xczjd DaemonSet/falco ip-10-0-3-8.eu-west-1.compute.internal -
"""
"""Namespace, team, pod, owner, node, container. Falco's hostname may be its own pod or container: the last three tell the nodes of such."""
BARE_HOSTS = ("x86",)
"""Nodes of alerts that are about no container."""
KINDS = {
    "pods": ("Pod", "v1"),
    "nodes": ("Node", "v1"),
    "namespaces": ("Namespace", "v1"),
    "replicasets": ("ReplicaSet", "apps/v1"),
    "jobs": ("Job", "batch/v1"),
}
BETWEEN = {"Deployment": ("ReplicaSet", "replicasets"), "CronJob": ("Job", "jobs")}
"""What stands between a workload and its pods."""

Object = dict[str, Any]


# ---- the cluster ----------------------------------------------------------------------------------------


def cluster() -> dict[str, dict[str, Object]]:
    """All objects: kind -> ``namespace/name`` -> object."""
    said = _said()
    found: dict[str, dict[str, Object]] = {kind: {} for kind in KINDS}
    for line in PODS.strip().splitlines():
        namespace, team, name, owner, node, container = line.split()
        found["nodes"].setdefault(node, _node(node))
        labels = {"team": team, "kubernetes.io/metadata.name": namespace}
        found["namespaces"][namespace] = {"metadata": _meta("Namespace", namespace, labels=labels)}
        kind, _, app = owner.partition("/")
        labels = {"app": app or name, "team": team}
        above = None if owner == "-" else (kind, app)
        if kind in BETWEEN:
            between, plural = BETWEEN[kind]
            meta = _meta(between, name.rpartition("-")[0], namespace, labels, above)
            found[plural][f"{namespace}/{meta['name']}"] = {"metadata": meta}
            above = between, meta["name"]
        meta = _meta("Pod", name, namespace, labels, above)
        found["pods"][f"{namespace}/{name}"] = _pod(meta, node, container, said.get(container, {}))
    return found | {"nodes": found["nodes"] | {name: _node(name) for name in BARE_HOSTS}}


def _said() -> dict[str, Object]:
    """What the alerts say of a container, by its short id."""
    alerts = resources.files("forwarder").joinpath("data/falco_alerts.ndjson").read_bytes().splitlines()
    fields = [msgspec.json.decode(body).get("output_fields") or {} for body in alerts]
    return {item["container.id"][:SHORT_ID]: item for item in fields if item.get("container.id")}


def _pod(meta: Object, node: str, container: str, said: Object) -> Object:
    app = meta["labels"]["app"]
    name, repository = said.get("container.name") or app, said.get("container.image.repository")
    if name.startswith("k8s_"):  # Docker's: k8s_<container>_<pod>_<namespace>_<uid>_<attempt>
        name, meta["uid"] = name.split("_")[1], name.split("_")[4]
    image = f"{repository or 'registry.example/' + app}:{said.get('container.image.tag') or 'latest'}"
    told = str(said.get("container.id", "" if container == "-" else container))
    status = {
        "name": name,
        "image": image,
        "containerID": f"containerd://{(told + _digits(meta['name'], 64))[:64]}",
        "state": {"running": {"startedAt": CREATED}},
    }
    spec = {"nodeName": node, "serviceAccountName": app, "containers": [{"name": name, "image": image}]}
    return {"metadata": meta, "spec": spec, "status": {"phase": "Running", "containerStatuses": [status]}}


def _node(name: str) -> Object:
    number = int(_digits(name, 8), 16)
    zone = f"eu-west-1{'abc'[number % 3]}"
    labels = {
        "kubernetes.io/hostname": name,
        "node.kubernetes.io/instance-type": INSTANCE_TYPES[number % len(INSTANCE_TYPES)],
        "topology.kubernetes.io/region": "eu-west-1",
        "topology.kubernetes.io/zone": zone,
    }
    return {
        "metadata": _meta("Node", name, labels=labels),
        "spec": {"providerID": f"aws:///{zone}/i-{_digits(name, 17)}"},
    }


def _meta(
    kind: str,
    name: str,
    namespace: str = "",
    labels: Object | None = None,
    owner: tuple[str, str] | None = None,
) -> Object:
    meta: Object = {"name": name, "uid": _uid(kind, namespace, name), "resourceVersion": VERSION}
    meta |= {"creationTimestamp": CREATED, "labels": labels or {}}
    meta |= {"namespace": namespace} if namespace else {}
    if owner:
        uid = _uid(owner[0], namespace, owner[1])
        meta["ownerReferences"] = [{"kind": owner[0], "name": owner[1], "uid": uid, "controller": True}]
    return meta


def _uid(kind: str, namespace: str, name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind}/{namespace}/{name}"))


def _digits(text: str, count: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:count]


# ---- the server -----------------------------------------------------------------------------------------


def kubeconfig(url: str) -> str:
    """The way to the server; JSON is YAML."""
    members = {
        "current-context": "demo",
        "contexts": [{"name": "demo", "context": {"cluster": "demo", "user": "demo"}}],
        "clusters": [{"name": "demo", "cluster": {"server": url}}],
        "users": [{"name": "demo", "user": {"token": TOKEN}}],
    }
    return msgspec.json.encode(members).decode()


def application() -> web.Application:
    """The API server; ``/readyz`` needs no token."""
    objects = cluster()
    ended = asyncio.Event()
    app = web.Application(middlewares=[_known])
    for plural, kind in KINDS.items():
        path = f"/{'apis' if '/' in kind[1] else 'api'}/{kind[1]}/{plural}"
        app.router.add_get(path, functools.partial(_answer, kind, list(objects[plural].values()), ended))

    async def one_pod(request: web.Request) -> web.Response:
        pod = objects["pods"].get("{namespace}/{name}".format(**request.match_info))
        return _json({"kind": "Pod", "apiVersion": "v1"} | pod) if pod else _status(404, "NotFound")

    async def ready(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def end(_: web.Application) -> None:
        ended.set()

    app.router.add_get("/api/v1/namespaces/{namespace}/pods/{name}", one_pod)
    app.router.add_get("/readyz", ready)
    app.on_shutdown.append(end)
    return app


@web.middleware
async def _known(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    if request.path != "/readyz" and request.headers.get("Authorization") != f"Bearer {TOKEN}":
        return _status(401, "Unauthorized")
    return await handler(request)


async def _answer(
    kind: tuple[str, str], objects: list[Object], ended: asyncio.Event, request: web.Request
) -> web.StreamResponse:
    """A list, or a watch from its version on."""
    name, version = kind
    if "as=PartialObjectMetadata" in request.headers.get("Accept", ""):
        name, version = "PartialObjectMetadata", "meta.k8s.io/v1"
        objects = [{"metadata": item["metadata"]} for item in objects]
    meta = {"resourceVersion": VERSION}
    if request.query.get("watch") in {"1", "true"}:
        bookmark = {"kind": name, "apiVersion": version, "metadata": meta}
        return await _watch(request, ended, {"type": "BOOKMARK", "object": bookmark})
    return _json({"kind": f"{name}List", "apiVersion": version, "metadata": meta, "items": objects})


async def _watch(request: web.Request, ended: asyncio.Event, bookmark: Object) -> web.StreamResponse:
    """Open until its time is over, or the server's."""
    asked = request.query.get("timeoutSeconds", "")
    loop = asyncio.get_running_loop()
    until = loop.time() + (min(int(asked), WATCH_SECS_MAX) if asked.isdecimal() else WATCH_SECS_MAX)
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while not ended.is_set() and (left := until - loop.time()) > 0:
        try:
            await asyncio.wait_for(ended.wait(), min(left, BOOKMARK_SECS))
        except TimeoutError:
            await response.write(msgspec.json.encode(bookmark) + b"\n")
    await response.write_eof()
    return response


def _json(members: Object, code: int = 200) -> web.Response:
    return web.Response(status=code, body=msgspec.json.encode(members), content_type="application/json")


def _status(code: int, reason: str) -> web.Response:
    return _json({"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason}, code)


if __name__ == "__main__":
    web.run_app(application(), host="127.0.0.1", port=int(sys.argv[1]), print=None, handler_cancellation=True)
