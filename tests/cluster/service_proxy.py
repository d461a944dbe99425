"""A stand-in for kube-proxy: TCP to a Service, as its iptables rules would have it.

The choice is made for each new connection among the ready endpoints of the Service's EndpointSlices (those that serve and
terminate where none is ready), by session affinity where the Service asks for it; what is connected stays connected. Rules follow
the slices once a second, as kube-proxy does by default (``--iptables-min-sync-period``). Where no endpoint is left, and where a
chosen one does not listen any more, the connection is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from tests.cluster.control_plane import ControlPlane, Object
from tests.cluster.kubelet import loopback
from tests.crash.harness import wait_until

SYNC_SECS = 1.0
CHUNK_BYTES = 65536


class ServiceProxy:
    """Listens on 127.0.0.1 for one port of one Service, in a thread of its own."""

    def __init__(self, plane: ControlPlane, namespace: str, service: str, rng: random.Random) -> None:
        self._plane, self._namespace, self._name = plane, namespace, service
        self._rng = rng
        self._service: Object = plane.admin.get("services", service, namespace)
        self._backends: list[tuple[str, int]] = []
        self._sticky: dict[str, tuple[tuple[str, int], float]] = {}
        self._stop = threading.Event()
        self._port: Future[int] = Future()
        self._carried: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._threads = [threading.Thread(target=it, daemon=True) for it in (self._follow, self._serve)]
        self._fault: Exception | None = None
        self.chosen: Counter[str] = Counter()
        """Connections by endpoint."""

    @property
    def port(self) -> int:
        return self._port.result(10.0)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        try:
            wait_until(self._has_backends, 10.0, lambda: "the Service has endpoints")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def check(self) -> None:
        """Fail with what went wrong."""
        if self._fault is not None:
            raise self._fault

    def _has_backends(self) -> bool:
        self.check()
        return bool(self._backends)

    def _end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10.0)

    def _follow(self) -> None:
        try:
            while True:
                self._backends = self._read()
                if self._stop.wait(SYNC_SECS):
                    return
        except Exception as error:  # noqa: BLE001 - told by ``check``, in the test's own thread
            self._fault = error

    def _read(self) -> list[tuple[str, int]]:
        selector = f"kubernetes.io/service-name={self._name}"
        slices = self._plane.admin.list("endpointslices", self._namespace, labelSelector=selector)["items"]
        ready, serving = [], []
        for piece in slices:
            port = next((it["port"] for it in piece["ports"] or () if it["name"] == "http"), None)
            for endpoint in piece["endpoints"] or ():
                conditions = endpoint["conditions"]
                backends = [(str(it), int(port)) for it in endpoint["addresses"] if port is not None]
                if conditions["ready"]:
                    ready += backends
                elif conditions["serving"] and conditions["terminating"]:
                    serving += backends
        return ready or serving

    def _choose(self, client: str) -> tuple[str, int] | None:
        backends = self._backends
        if not backends:
            return None
        backend, seen = self._sticky.get(client, (("", 0), 0.0))
        now = time.monotonic()
        if self._service["spec"]["sessionAffinity"] == "ClientIP":
            age = self._service["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"]
            fresh = backend in backends and now - seen < age
        else:
            fresh = False
        if not fresh:
            backend = self._rng.choice(backends)
        self._sticky[client] = (backend, now)
        self.chosen[backend[0]] += 1
        return backend

    def _serve(self) -> None:
        try:
            asyncio.run(self._listen())
        except Exception as error:  # noqa: BLE001 - as above
            self._fault = error

    async def _listen(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port.set_result(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(self._stop.wait)
        server.close()
        for writer in self._carried.values():
            writer.transport.abort()
        if self._carried:
            await asyncio.wait(self._carried)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._carried[task] = writer
        task.add_done_callback(self._carried.pop)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: cut for both as soon as one side has ended and the other was told, or where one is broken."""
        backend = self._choose(writer.get_extra_info("peername")[0])
        back: asyncio.StreamWriter | None = None
        try:
            if backend is not None:
                there, back = await asyncio.open_connection(loopback(backend[0]), backend[1])
                await asyncio.gather(_pump(reader, back), _pump(there, writer))
        except OSError:
            writer.transport.abort()
        finally:
            for end in filter(None, (back, writer)):
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof() and not writer.is_closing():
        writer.write_eof()
