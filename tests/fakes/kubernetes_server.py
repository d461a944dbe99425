"""The HTTP side of the fake Kubernetes: from a request to an answer, an open watch or a broken connection.

A request passes these stations: hang or reset, token, planned errors, RBAC, route, media type, operation.
"""

from __future__ import annotations

import asyncio
import gzip
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal
from uuid import uuid4

from aiohttp import web

from tests.fakes import kubernetes_access as access
from tests.fakes.kubernetes_common import (
    GROUPS,
    RESOURCES,
    KubeError,
    Resource,
    View,
    expired,
    go_json,
    negotiate,
    no_such_method,
    not_found,
    too_large,
)
from tests.fakes.kubernetes_faults import Faults, KubeFault, refusal
from tests.fakes.kubernetes_lists import (
    ListRules,
    check_options,
    list_objects,
    number_in,
    select,
    true_in,
    version_of,
)
from tests.fakes.kubernetes_store import Change, Store
from tests.fakes.kubernetes_watch import Watch, reset

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_GZIP_FROM_BYTES: Final = 128 * 1024
_MIN_WATCH_SECS: Final = 1800.0
_VERSION: Final = {
    "major": "1",
    "minor": "34",
    "gitVersion": "v1.34.1-eks-113cf36",
    "gitCommit": "5b7a2f1ea2c5bd2fa7c0b1f0e6b2f7c4b9d0a4e1",
    "gitTreeState": "clean",
    "buildDate": "2026-01-15T10:20:30Z",
    "goVersion": "go1.24.6",
    "compiler": "gc",
    "platform": "linux/amd64",
}


@dataclass(slots=True)
class KubeRequest:
    """A request that came in, as the client made it; `status` is 0 while unanswered or if cut off."""

    verb: str
    resource: str
    path: str
    query: dict[str, str]
    accept: str | None
    token: str | None
    at: float
    method: str
    namespace: str = ""
    name: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 0


class Server:
    """Listens, answers, and keeps the record of requests and open watches."""

    def __init__(self, *, rules: ListRules, clock: Callable[[], float]) -> None:
        self.url = ""
        self.user = ""
        self.tokens: set[str] = set()
        self.allow: set[access.Rule] = set(access.EVERYTHING_NEEDED)
        self.anonymous = False
        self.requests: list[KubeRequest] = []
        self.bugs: list[str] = []
        self.list_rules = rules
        self.watch_expired: Literal["event", "http"] = "event"
        self.watch_list = False
        self.bookmark_secs = 60.0
        self.chop: int | None = None  # write watches in pieces of so many bytes
        self.fail = Faults(self.watches)
        self._delays: dict[str, float] = {}
        self._store = Store(lambda: clock(), self._on_change)  # noqa: PLW0108 - a test may patch its clock
        self._watches: list[Watch] = []
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._stopping = asyncio.Event()
        self._moved = asyncio.Event()

    @property
    def version(self) -> int:
        """The newest resourceVersion."""
        return self._store.version

    def watches(self, kind: str | None = None) -> list[Watch]:
        """The open watches."""
        return [watch for watch in self._watches if kind in (None, watch.resource.plural)]

    def _on_change(self, resource: Resource, change: Change) -> None:
        for watch in self.watches(resource.plural):
            watch.change(change)

    # --- life --------------------------------------------------------------------------------------

    async def start(self, port: int | None = None) -> str:
        """Listen on 127.0.0.1, again on the former port unless another is given; state survives."""
        if self._runner is not None:
            raise RuntimeError("already started")
        self._stopping = asyncio.Event()
        app = web.Application(client_max_size=1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self._port if port is None else port).start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._port = int(runner.addresses[0][1])
        self.url = f"http://127.0.0.1:{self._port}"
        return self.url

    async def stop(self) -> None:
        """Close the listener and every connection, also those with a request in the works."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        self._stopping.set()
        for site in list(runner.sites):
            await site.stop()
        for connection in runner.server.connections if runner.server else ():
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    # --- requests ----------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        query = dict(reversed(list(request.query.items())))  # of a repeated parameter the first counts
        meaning = access.meaning_of(request.method, request.path, query)
        token = access.bearer(request.headers.get("Authorization"))
        record = KubeRequest(
            verb=meaning.verb,
            resource=meaning.kind,
            path=request.path,
            query=query,
            accept=request.headers.get("Accept"),
            token=token,
            at=asyncio.get_running_loop().time(),
            method=request.method,
            namespace=meaning.namespace,
            name=meaning.name,
            headers=request.headers.copy(),
        )
        self.requests.append(record)
        self._moved.set()
        try:
            try:
                response = await self._serve(request, meaning, token, query, record)
            except KubeError as error:
                response = self._refuse(error)
            if not (response.prepared or request.transport is None or request.transport.is_closing()):
                record.status = response.status
        except Exception as bug:
            if not isinstance(bug, ConnectionError):
                self.bugs.append(f"the fake itself is broken: {bug!r}")
            raise
        else:
            return response
        finally:
            self._moved.set()

    async def _serve(
        self,
        request: web.Request,
        meaning: access.Meaning,
        token: str | None,
        query: dict[str, str],
        record: KubeRequest,
    ) -> web.StreamResponse:
        verb, kind = meaning.verb, meaning.kind
        if not await self._answers(verb, kind):
            reset(request)
            return web.Response(status=500)  # goes nowhere
        user = self._user(token)
        refused = access.forbidden(meaning, user)
        fault = self.fail.take(verb, kind, "status", "body")
        if fault is not None and fault.mode == "body":
            return web.Response(status=fault.code, body=fault.body, content_type="text/html")
        if fault is not None:
            raise refusal(fault, forbidden=refused, name=meaning.name, kind=kind, version=self.version)
        if not access.may(meaning, user, self.allow):
            raise refused
        if not meaning.resource:
            return self._plain(meaning)
        access.check_route(meaning, GROUPS)
        review = meaning.resource == access.REVIEWS
        if verb not in ("get", "list", "watch") and not (review and verb == "create"):
            raise no_such_method()
        view = negotiate(record.accept)
        if review:
            body = access.review(request.content_type, await request.read(), self.allow)
            return web.Response(status=201, body=body, headers=self._headers())
        resource = RESOURCES[meaning.resource]
        if verb == "watch":
            return await self._watch(request, resource, meaning, view, query, record)
        body = (self._get if verb == "get" else self._list)(resource, meaning, view, query)
        return await self._send(request, body, self.fail.take(verb, kind, "truncate"))

    async def _answers(self, verb: str, kind: str) -> bool:
        """Whether there will be an answer, after the wait that is planned before it."""
        fault = self.fail.take(verb, kind, "hang", "reset")
        if fault is not None and (fault.mode == "reset" or not await self._pause(None, fault.released)):
            return False
        return await self._pause(self._delays.get(verb, 0.0))

    def _user(self, token: str | None) -> str:
        if token in self.tokens:
            return self.user
        if token is None and self.anonymous:
            return access.ANONYMOUS
        raise access.unauthorized()

    async def _pause(self, secs: float | None, released: asyncio.Event | None = None) -> bool:
        """Wait for the time or the release; False when the server stops meanwhile."""
        if secs == 0.0:
            return True
        ends = [asyncio.ensure_future(end.wait()) for end in (released, self._stopping) if end is not None]
        try:
            await asyncio.wait(ends, timeout=secs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        return not self._stopping.is_set()

    def _headers(self) -> dict[str, str]:
        return {
            "Audit-Id": str(uuid4()),
            "Cache-Control": "no-cache, private",
            "Content-Type": "application/json",
        }

    def _refuse(self, error: KubeError) -> web.Response:
        headers = self._headers()
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if error.plain:
            headers["Content-Type"] = "text/plain; charset=utf-8"
            return web.Response(status=error.code, body=error.message.encode() + b"\n", headers=headers)
        return web.Response(status=error.code, body=go_json(error.status()) + b"\n", headers=headers)

    def _plain(self, meaning: access.Meaning) -> web.Response:
        if meaning.path == "/version":
            return web.Response(body=go_json(_VERSION), headers=self._headers())
        return web.Response(text="ok")

    def _get(
        self, resource: Resource, meaning: access.Meaning, view: View, query: Mapping[str, str]
    ) -> bytes:
        wanted = version_of(query.get("resourceVersion", ""))
        if wanted is not None and wanted > self.version:
            raise too_large(wanted, self.version)
        stored = self._store.find(resource.plural, meaning.namespace, meaning.name)
        if stored is None:
            raise not_found(resource, meaning.name)
        if view.kind == "PartialObjectMetadataList":
            raise KubeError(
                406,
                "NotAcceptable",
                "you requested PartialObjectMetadataList, but the requested object is not a list "
                f"(*core.{resource.kind})",
            )
        return stored.encode(view) + b"\n"

    def _list(
        self, resource: Resource, meaning: access.Meaning, view: View, query: Mapping[str, str]
    ) -> bytes:
        check_options(query, watch=False, watch_list=self.watch_list)
        selector = select(resource, meaning.namespace, query.get("fieldSelector", ""))
        body = list_objects(self._store, resource, selector, query, view, self.list_rules)
        if view.kind == "PartialObjectMetadata":
            raise KubeError(
                406,
                "NotAcceptable",
                f"you requested PartialObjectMetadata, but the requested object is a list (*core.{resource.kind}List)",
            )
        return body

    async def _send(self, request: web.Request, body: bytes, fault: KubeFault | None) -> web.StreamResponse:
        headers = self._headers()
        if len(body) > _GZIP_FROM_BYTES and "gzip" in request.headers.get("Accept-Encoding", ""):
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        if fault is None:
            return web.Response(body=body, headers=headers)
        response = web.StreamResponse(headers=headers | {"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        reset(request, hard=False)
        return response

    async def _watch(
        self,
        request: web.Request,
        resource: Resource,
        meaning: access.Meaning,
        view: View,
        query: Mapping[str, str],
        record: KubeRequest,
    ) -> web.StreamResponse:
        check_options(query, watch=True, watch_list=self.watch_list)
        selector = select(resource, meaning.namespace, query.get("fieldSelector", ""))
        timeout = float(number_in(query, "timeoutSeconds")) or _MIN_WATCH_SECS * (1 + random.random())
        wanted = version_of(query.get("resourceVersion", ""))
        streamed = true_in(query, "sendInitialEvents")
        from_state = streamed or (not wanted and "sendInitialEvents" not in query)
        watch = Watch(
            resource,
            selector,
            view,
            started=wanted if wanted and not from_state else self.version,
            bookmarks=true_in(query, "allowWatchBookmarks"),
        )
        if streamed and wanted is not None and wanted > self.version:
            watch.fail(too_large(wanted, self.version).status())
        elif from_state:
            for stored in self._store.at(resource):
                if selector.matches(stored):
                    watch.initial(stored)
            if streamed:
                watch.bookmark(self.version, initial_end=True)
        elif wanted and wanted < self._store.compacted:
            error = expired(f"too old resource version: {wanted} ({self._store.compacted})")
            if self.watch_expired == "http":
                raise error
            watch.fail(error.status())
        else:
            for change in self._store.since(resource, watch.started):
                watch.change(change)
        watch.silent = self.fail.take("watch", resource.plural, "silent") is not None
        self._watches.append(watch)
        record.status = 200
        self._moved.set()
        try:
            return await watch.serve(
                request,
                self._headers(),
                timeout_secs=max(timeout, 0.0),
                bookmark_secs=self.bookmark_secs,
                host=self,
            )
        finally:
            self._watches.remove(watch)
