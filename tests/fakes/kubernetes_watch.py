"""Open watches of the fake Kubernetes: what each of them is told, and how it ends, well or badly."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from tests.fakes.kubernetes_common import go_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.fakes.kubernetes_common import Resource, View
    from tests.fakes.kubernetes_lists import Selector
    from tests.fakes.kubernetes_store import Change, Stored

_BOOKMARK_BEFORE_END_SECS = 2.0


class Host(Protocol):
    """What a watch asks its server."""

    chop: int | None

    @property
    def version(self) -> int: ...


@dataclass(frozen=True, slots=True)
class End:
    """An end of a watch: `rest` is still written, then the stream closes in the given way."""

    how: str = "normal"  # or "close": FIN without the last chunk, or "reset": RST
    rest: bytes = b""


def line(kind: str, obj: bytes) -> bytes:
    return b'{"type":"' + kind.encode() + b'","object":' + obj + b"}\n"


def reset(request: web.Request, *, hard: bool = True) -> None:
    """Break the connection of a request, with RST or with FIN."""
    transport = request.transport
    if not isinstance(transport, asyncio.WriteTransport):
        return
    connection = transport.get_extra_info("socket")
    if hard and connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


class Watch:
    """One open watch; what it will be told waits in its queue."""

    def __init__(
        self,
        resource: Resource,
        selector: Selector,
        view: View,
        *,
        started: int,
        bookmarks: bool,
    ) -> None:
        self.resource, self.selector, self.view = resource, selector, view
        self.started = started
        self.bookmarks = bookmarks
        self.silent = False
        self.gone = asyncio.Event()
        self._queue: asyncio.Queue[bytes | End] = asyncio.Queue()

    # --- what it is told ---------------------------------------------------------------------------

    def initial(self, stored: Stored) -> None:
        self._tell("ADDED", stored)

    def change(self, change: Change) -> None:
        """With a selector, beginning to match is ADDED, and no longer matching DELETED in the old shape."""
        if change.version <= self.started:
            return
        now = self.selector.matches(change.new)
        before = self.selector.matches(change.old)
        if now:
            assert change.new is not None
            self._tell("MODIFIED" if before else "ADDED", change.new)
        elif before:
            assert change.old is not None
            self._tell("DELETED", change.old.at(change.version))

    def bookmark(self, version: int, *, initial_end: bool = False) -> None:
        """Go's zero object with a version; as in the real one, never the version the watch began at."""
        if not self.bookmarks or (version <= self.started and not initial_end):
            return
        metadata: dict[str, Any] = {"resourceVersion": str(version), "creationTimestamp": None}
        if initial_end:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        partial = self.view.partial
        head = {
            "kind": "PartialObjectMetadata" if partial else self.resource.kind,
            "apiVersion": self.view.api_version if partial else self.resource.api_version,
            "metadata": metadata,
        }
        tail = "" if partial else self.resource.zero
        self.raw(line("BOOKMARK", go_json(head)[:-1] + tail.encode() + b"}"))

    def raw(self, data: bytes) -> None:
        self._queue.put_nowait(data)

    def fail(self, status: dict[str, Any]) -> None:
        """An ERROR event, and then a normal end."""
        self.raw(line("ERROR", go_json(status)))
        self.end(End())

    def end(self, end: End) -> None:
        self._queue.put_nowait(end)

    def _tell(self, kind: str, stored: Stored) -> None:
        if self.view.kind == "PartialObjectMetadataList":
            self.end(End())  # an object is no list: the real one fails to encode it and hangs up
            return
        self.raw(line(kind, stored.encode(self.view)))

    # --- telling it --------------------------------------------------------------------------------

    async def serve(
        self,
        request: web.Request,
        headers: Mapping[str, str],
        *,
        timeout_secs: float,
        bookmark_secs: float,
        host: Host,
    ) -> web.StreamResponse:
        """Write the stream until it ends."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_secs
        response = web.StreamResponse(headers={"Content-Type": "application/json", **headers})
        response.enable_chunked_encoding()
        try:
            await response.prepare(request)
            due = self._next_bookmark(loop.time(), deadline, bookmark_secs)
            while True:
                try:
                    async with asyncio.timeout_at(None if self.silent else min(deadline, due)):
                        item = await self._queue.get()
                except TimeoutError:
                    now = loop.time()
                    if now >= deadline:
                        item = End()
                    else:
                        self.bookmark(host.version)
                        due = self._next_bookmark(now, deadline, bookmark_secs)
                        continue
                data, end = self._gather(item)
                if not self.silent:
                    await self._write(response, data, host.chop)
                if end is not None:
                    return await self._finish(request, response, end)
        finally:
            self.gone.set()

    def _next_bookmark(self, now: float, deadline: float, secs: float) -> float:
        if not self.bookmarks:
            return deadline
        early = deadline - _BOOKMARK_BEFORE_END_SECS
        return min(now + secs, early) if early > now else deadline

    def _gather(self, item: bytes | End) -> tuple[bytes, End | None]:
        """All that waits, as one write: the real server flushes when nothing more is queued."""
        parts: list[bytes] = []
        while True:
            if isinstance(item, End):
                return b"".join(parts), item
            parts.append(item)
            if self._queue.empty():
                return b"".join(parts), None
            item = self._queue.get_nowait()

    async def _write(self, response: web.StreamResponse, data: bytes, chop: int | None) -> None:
        step = chop or max(len(data), 1)
        for start in range(0, len(data), step):
            await response.write(data[start : start + step])
            if chop:
                await asyncio.sleep(0)

    async def _finish(
        self, request: web.Request, response: web.StreamResponse, end: End
    ) -> web.StreamResponse:
        if end.rest and not self.silent:
            await response.write(end.rest)
        if end.how == "normal":
            await response.write_eof()
        else:
            reset(request, hard=end.how == "reset")
        return response
