"""A strict fake of the Kubernetes API server, for tests of what lists and watches it.

It is written from the API concepts page and the API server's documented behaviour, shares no code with the
client, and says no wherever the real server does: bearer tokens, RBAC, contradicting list options, expired
versions and continue tokens, unknown routes and media types.

The test writes through `create`, `update` and `delete`, spoils things through `fail`, `slow`, `silence` and
`cut`, and sees every request in `requests`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Literal

from tests.fakes.kubernetes_common import RESOURCES
from tests.fakes.kubernetes_faults import KubeFault
from tests.fakes.kubernetes_lists import ListRules
from tests.fakes.kubernetes_server import KubeRequest, Server
from tests.fakes.kubernetes_watch import End, Watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

__all__ = ["FakeKubernetes", "KubeFault", "KubeRequest"]


class FakeKubernetes(Server):
    """The server, its state, and the handles a test pulls."""

    def __init__(
        self,
        *,
        token: str = "t0ken",
        page_max: int | None = None,
        honour_limit_at_zero: bool = False,
        watch_expired: Literal["event", "http"] = "event",
        watch_list: bool = False,
        anonymous: bool = False,
        bookmark_secs: float = 60.0,
        user: str = "system:serviceaccount:falco:forwarder",
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(rules=ListRules(page_max, honour_limit_at_zero), clock=clock)
        self.tokens = {token}
        self.user = user
        self.watch_expired = watch_expired
        self.watch_list = watch_list
        self.anonymous = anonymous
        self.bookmark_secs = bookmark_secs

    # --- state -------------------------------------------------------------------------------------

    def create(self, kind: str, obj: dict[str, Any]) -> dict[str, Any]:
        """Store a new object and return it as the server would; ValueError if it exists."""
        return self._store.create(kind, obj).decode()

    def update(self, kind: str, obj: dict[str, Any]) -> dict[str, Any]:
        """Replace an object, whatever resourceVersion the given one has."""
        return self._store.update(kind, obj).decode()

    def delete(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        """Delete at once; the last state as told to watches. Cluster-scoped kinds ignore the namespace."""
        return self._store.delete(kind, namespace, name).decode()

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        stored = self._store.find(kind, namespace, name)
        return stored.decode() if stored else None

    def objects(self, kind: str) -> dict[str, dict[str, Any]]:
        """Copies of all objects by uid."""
        return {stored.uid: stored.decode() for stored in self._store.at(RESOURCES[kind])}

    def advance(self, by: int = 1) -> None:
        """Let the version grow, as writes to other resources do."""
        self._store.advance(by)

    def compact(self) -> None:
        """All versions and continue tokens given out so far are too old from now on; open watches go on."""
        self._store.compact()

    # --- watches -----------------------------------------------------------------------------------

    def bookmark(self, kind: str | None = None) -> None:
        """A bookmark to all who allowed them; something else was written before, as always in a cluster."""
        self.advance()
        for watch in self.watches(kind):
            watch.bookmark(self.version)

    def silence(self, kind: str | None = None) -> None:
        """Open watches never say anything again and never end: a dead connection, seen from the client."""
        for watch in self.watches(kind):
            watch.silent = True
            watch.raw(b"")  # wakes it, so that its deadline no longer counts

    async def cut(
        self, kind: str | None = None, *, partial: bool = False, how: Literal["reset", "close"] = "reset"
    ) -> int:
        """Break open watches, `partial`ly in the middle of a line; returns how many, once they are gone."""
        half = b'{"type":"MODIFIED","object":{"kind":"Pod","apiVersion":"v1","metadata":{"name":"ha'
        return await self._end(kind, End(how, half if partial else b""))

    async def end_watches(self, kind: str | None = None) -> int:
        """End open watches as at their timeout; returns how many, once they are gone."""
        return await self._end(kind, End())

    async def _end(self, kind: str | None, end: End) -> int:
        watches = self.watches(kind)
        for watch in watches:
            watch.end(end)
        for watch in watches:
            await watch.gone.wait()
        return len(watches)

    # --- misbehaviour and waiting ------------------------------------------------------------------

    def slow(self, *, list_secs: float = 0.0, get_secs: float = 0.0, watch_secs: float = 0.0) -> None:
        """Wait before serving; no argument makes the server fast again."""
        self._delays = {"list": list_secs, "get": get_secs, "watch": watch_secs}

    def seen(self, verb: str | None = None, resource: str | None = None) -> list[KubeRequest]:
        """The requests of a verb and a resource."""
        return [
            request
            for request in self.requests
            if verb in (None, request.verb) and resource in (None, request.resource)
        ]

    async def until(self, condition: Callable[[], object], *, secs: float = 10.0) -> None:
        """Wait until something holds; looked at whenever a request comes, is answered or a watch opens or ends."""
        async with asyncio.timeout(secs):
            while not condition():
                self._moved.clear()
                await self._moved.wait()

    async def watching(self, kind: str, count: int = 1) -> list[Watch]:
        """Wait until so many watches of a kind are open."""
        await self.until(lambda: len(self.watches(kind)) == count)
        return self.watches(kind)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: object, *exc_info: object) -> None:
        await self.stop()
        if kind is None:
            assert not self.bugs, self.bugs
