"""A Kubernetes API for benchmarks: 10,000 realistic pods, listed and watched as cheaply as Python can.

Not strict (the strict fake is in tests/fakes): here only the forwarder's cost matters. It answers a list at once, whatever page was asked
for, as the real one does at resourceVersion 0. ``POST /expire`` ends all watches of pods with 410, so that everything is listed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fakes import kubernetes_objects as objects

PODS, PODS_PER_NODE = 10_000, 50
KNOWN_CONTAINER = "3ad7b26ded6d8e7b23da7d48fe889434573036c27ae5a74837233de441c3601e"
EXPIRED = b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired","message":"too old"}}\n'
SEND_BYTES = 1 << 18


def cluster() -> dict[str, list[dict[str, Any]]]:
    """Objects by kind: Deployments of ten pods, fifty pods on a node, and the pod of the benchmark's alerts."""
    made: dict[str, list[dict[str, Any]]] = {
        "nodes": [],
        "namespaces": [],
        "replicasets": [],
        "jobs": [],
        "pods": [],
    }
    for number in range(PODS // PODS_PER_NODE):
        made["nodes"].append(
            objects.node(
                node_name(number),
                provider_id=f"aws:///eu-west-1a/i-{number:017x}",
                internal_ip=f"10.1.{number // 250}.{number % 250}",
            )
        )
    for number in range(100):
        made["namespaces"].append(objects.namespace(f"team-{number}", labels={"team": f"team-{number}"}))
    for number in range(PODS // 10):
        owner = objects.Owner("Deployment", f"app-{number}", f"deployment-{number}")
        made["replicasets"].append(
            objects.replicaset(f"app-{number}-5d4f8", f"team-{number % 100}", owner=owner)
        )
    for number in range(PODS):
        made["pods"].append(pod(number, made["replicasets"][number // 10]))
    return made


def node_name(number: int) -> str:
    return f"ip-10-1-{number // 250}-{number % 250}.eu-west-1.compute.internal"


def container_id(number: int) -> str:
    return KNOWN_CONTAINER if number == 0 else objects.hex64(f"container-{number}")


def pod(number: int, owner: dict[str, Any]) -> dict[str, Any]:
    meta = owner["metadata"]
    containers = [objects.Container("app", container_id=container_id(number))]
    if number % 2:
        containers.append(objects.Container("proxy", container_id=objects.hex64(f"proxy-{number}")))
    return objects.pod(
        f"{meta['name']}-{number:05x}",
        meta["namespace"],
        node=node_name(number // PODS_PER_NODE),
        ip=f"10.{2 + number // 62_500}.{number // 250 % 250}.{number % 250}",
        containers=containers,
        owner=objects.Owner("ReplicaSet", meta["name"], meta["uid"]),
        created="2016-01-01T00:00:00Z",
    )


def encoded(items: list[dict[str, Any]]) -> bytes:
    bare = [
        {key: value for key, value in item.items() if key not in {"kind", "apiVersion"}} for item in items
    ]
    listed = {"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1000"}, "items": bare}
    return json.dumps(listed, separators=(",", ":")).encode()


async def serve(port: int) -> None:
    lists = {kind: encoded(items) for kind, items in cluster().items()}
    watches: set[asyncio.Queue[bytes]] = set()

    async def answer(request: web.Request) -> web.StreamResponse:
        kind = request.path.rpartition("/")[2]
        if kind not in lists:
            return web.Response(status=404)
        response = web.StreamResponse()
        response.content_type = "application/json"
        await response.prepare(request)
        if "watch" not in request.query:
            for start in range(0, len(lists[kind]), SEND_BYTES):
                await response.write(lists[kind][start : start + SEND_BYTES])
            return response
        events: asyncio.Queue[bytes] = asyncio.Queue()
        if kind == "pods":
            watches.add(events)
        try:
            await response.write(await events.get())
        finally:
            watches.discard(events)
        return response

    async def expire(_: web.Request) -> web.Response:
        for events in watches:
            events.put_nowait(EXPIRED)
        return web.Response()

    application = web.Application()
    application.router.add_post("/expire", expire)
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def kubeconfig(folder: Path, port: int) -> Path:
    file = folder / "kubeconfig"
    named = {
        "current-context": "bench",
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        "clusters": [{"name": "bench", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "bench", "user": {"token": "bench"}}],
    }
    file.write_text(json.dumps(named))
    return file


@contextlib.contextmanager
def api_server(port: int, core: int) -> Iterator[subprocess.Popen[str]]:
    """The process of this file, on one core."""
    process = subprocess.Popen(
        ["taskset", "-c", str(core), sys.executable, __file__, str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.readline()
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_synced(admin: int, secs: float = 60) -> None:
    until = time.monotonic() + secs
    while time.monotonic() < until:
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/status") as answer:
            kinds = json.loads(answer.read())["enrichment"]["kubernetes"].get("kinds", {})
        if kinds and all(kind["synced"] for kind in kinds.values()):
            return
        time.sleep(0.1)
    raise SystemExit("not synced")


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
