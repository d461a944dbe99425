"""The reflector: one kind of Kubernetes object, listed, then watched, so that a store equals the API server's state.

The rules are those of the Go client (client-go ``tools/cache/reflector.go``), because every short cut leaves stale objects behind:

- List first with ``resourceVersion=0`` (from the server's cache), after a break with the last version known, and with none (the
  freshest there is) after "expired" or "too new". Pages of ``PAGE_OBJECTS``; an expired ``continue`` starts the list again.
- The end of a list deletes what was not in it, by UID.
- Watch from the list's version with bookmarks, for 5 to 10 minutes; each event and bookmark moves the version.
- Throttles, server errors and broken connections: the same version again. Expired, and everything odd: list again.
- Between failures 0.8 s, doubled up to 30 s, plus up to as much at random; from the start again after two healthy minutes.
  A watch that ends within a second without an event is a failure.

A list is decoded object by object while it arrives: a server may answer ten thousand pods at once, 120 MB, whatever page size was
asked for. What was listed before stays in service during a list and during any outage. On a crash nothing is lost: there is nothing
on disk.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import structlog
from msgspec import Raw

from forwarder.kubernetes_api import Api, ApiError, limited, reason_of, status_of
from forwarder.kubernetes_stream import ItemSplitter, ListMeta, lines
from forwarder.kubernetes_wire import Metadata

PAGE_OBJECTS = 500
PAGES_MAX = 10_000
WATCH_SECS_MIN, WATCH_SECS_MAX = 300.0, 600.0
READ_MARGIN_SECS = 30.0
LIST_READ_SECS, LIST_SECS_MAX = 60.0, 600.0
"""For one read of a page, and for all of it."""
BACKOFF_BASE_SECS, BACKOFF_MAX_SECS, HEALTHY_SECS = 0.8, 30.0, 120.0
WISH_SECS_MAX = 60.0
"""A Retry-After is heeded up to this."""
SHORT_WATCH_SECS = 1.0
LOG_SECS = 60.0

_RELIST = frozenset({"expired", "too_new", "refused", "decode"})
_FRESHEST = frozenset({"expired", "too_new"})

log = structlog.get_logger("kubernetes")


class Resource(NamedTuple):
    """What to watch."""

    kind: str
    """Plural name, also the metric label: ``pods``."""
    group: str
    """API group, empty for the core."""
    metadata_only: bool
    field_selector: str = ""

    @property
    def path(self) -> str:
        return f"/apis/{self.group}/v1/{self.kind}" if self.group else f"/api/v1/{self.kind}"

    def accept(self, *, listing: bool) -> str:
        """Where metadata is enough, the server is asked to send nothing else."""
        if not self.metadata_only:
            return "application/json"
        kind = "PartialObjectMetadataList" if listing else "PartialObjectMetadata"
        return f"application/json;as={kind};g=meta.k8s.io;v=v1"


class Store(Protocol):
    """Where objects go. Methods raise ``msgspec.ValidationError`` for an object of a strange shape."""

    def put(self, data: bytes) -> tuple[str, str]:
        """New or changed; returns its UID and resource version."""

    def delete(self, uid: str) -> None:
        """Gone."""

    def keep_only(self, uids: set[str]) -> int:
        """The end of a list; returns how many were gone."""

    def __len__(self) -> int:
        """How many are live."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """One line of a watch."""

    type: str
    object: Raw


class _Bare(msgspec.Struct, frozen=True, gc=False):
    metadata: Metadata = Metadata()


_event = msgspec.json.Decoder(Event)
_bare = msgspec.json.Decoder(_Bare)


class Backoff:
    """0.8 s, doubled up to 30 s, each plus up to as much at random; forgotten after two quiet minutes."""

    def __init__(self, rng: random.Random, monotonic: Callable[[], float]) -> None:
        self._rng = rng
        self._monotonic = monotonic
        self._secs = BACKOFF_BASE_SECS
        self._last = float("-inf")

    def next_secs(self) -> float:
        now = self._monotonic()
        if now - self._last > HEALTHY_SECS:
            self._secs = BACKOFF_BASE_SECS
        secs = self._secs
        self._secs = min(BACKOFF_MAX_SECS, 2 * secs)
        delay = secs + self._rng.uniform(0, secs)
        self._last = now + delay
        return delay


class Reflector:
    """Keeps one store equal to the API server's state. ``run`` never returns."""

    def __init__(
        self,
        api: Api,
        resource: Resource,
        store: Store,
        *,
        rng: random.Random,
        monotonic: Callable[[], float],
        restarted: Callable[[str, str], None] = lambda _kind, _reason: None,
        page_objects: int = PAGE_OBJECTS,
    ) -> None:
        """``restarted`` counts breaks by kind and reason."""
        self.resource = resource
        self.synced = asyncio.Event()
        """A list has been finished once."""
        self.connected = False
        """The watch is on, or was ended in good order a moment ago."""
        self.heard_at = float("-inf")
        """Monotonic time of the last list, event or bookmark."""
        self.trouble = ""
        """Why not connected, in one line."""
        self.reason = ""
        """The same as one of ``metrics.WATCH_RESTARTS``; nothing while connected."""
        self.store = store
        self._api = api
        self._rng = rng
        self._monotonic = monotonic
        self._restarted = restarted
        self._page_objects = page_objects
        self._backoff = Backoff(rng, monotonic)
        self._version = "0"
        self._listed = False
        self._said_at = self._odd_said_at = float("-inf")

    async def run(self) -> None:
        """List and watch for ever."""
        while True:
            try:
                if not self._listed:
                    await self._list()
                await self._watch()
            except ApiError as error:
                if error.reason in _RELIST:
                    self._listed = False
                if error.reason in _FRESHEST:
                    self._version = ""
                await self._wait(error)
            except Exception:
                # A fault of ours must not end the watch for good.
                log.exception("reflector failed, starting again", kind=self.resource.kind)
                self._listed = False
                await self._wait(ApiError("decode", "internal error, see the log"))

    async def _wait(self, error: ApiError) -> None:
        self.connected = False
        self.trouble, self.reason = str(error), error.reason
        self._restarted(self.resource.kind, error.reason)
        now = self._monotonic()
        if now - self._said_at >= LOG_SECS:
            self._said_at = now
            log.warning("watch broken", kind=self.resource.kind, reason=error.reason, error=str(error))
        await asyncio.sleep(max(self._backoff.next_secs(), min(error.delay_secs, WISH_SECS_MAX)))

    # ---- listing ------------------------------------------------------------------------------------

    async def _list(self) -> None:
        try:
            version, uids = await self._pages(self._version)
        except ApiError as error:
            if error.reason not in _FRESHEST or not self._version:
                raise
            self._restarted(self.resource.kind, error.reason)
            version, uids = await self._pages("")
        gone = self.store.keep_only(uids)
        self._version = version
        self._listed = True
        self._heard()
        self.synced.set()
        log.info("listed", kind=self.resource.kind, objects=len(uids), deleted=gone, version=version)

    async def _pages(self, version: str) -> tuple[str, set[str]]:
        """All pages; the version of the list, and the UIDs that are in it."""
        uids: set[str] = set()
        parameters = {"limit": str(self._page_objects)}
        if version:
            parameters["resourceVersion"] = version
        if version not in {"", "0"}:
            # With a limit, the server would take the version for exact, and it is soon too old; without, for "not older".
            del parameters["limit"]
        for _ in range(PAGES_MAX):
            if self.resource.field_selector:
                parameters["fieldSelector"] = self.resource.field_selector
            meta = await self._page(parameters, uids)
            if not meta.continue_token:
                return meta.resource_version, uids
            parameters = {"limit": str(self._page_objects), "continue": meta.continue_token}
        raise ApiError("decode", f"a list of more than {PAGES_MAX} pages")

    async def _page(self, parameters: dict[str, str], uids: set[str]) -> ListMeta:
        splitter = ItemSplitter()
        async with (
            limited(LIST_SECS_MAX),
            self._api.stream(
                self.resource.path,
                parameters,
                accept=self.resource.accept(listing=True),
                read_secs=LIST_READ_SECS,
            ) as content,
        ):
            async for chunk in content.iter_any():
                for item in splitter.feed(chunk):
                    self._keep(item, uids)
                await asyncio.sleep(0)  # what arrives as fast as it is decoded must not hold up the receiver
        meta, rest = splitter.finish()
        for item in rest:
            self._keep(item, uids)
        return meta

    def _keep(self, item: bytes, uids: set[str]) -> None:
        try:
            uid, _ = self.store.put(item)
        except msgspec.ValidationError as error:
            self._odd(error)
        else:
            uids.add(uid)

    # ---- watching -----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        secs = self._rng.uniform(WATCH_SECS_MIN, WATCH_SECS_MAX)
        parameters = {
            "watch": "1",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(int(secs)),
        }
        if self.resource.field_selector:
            parameters["fieldSelector"] = self.resource.field_selector
        began, events = self._monotonic(), 0
        async with (
            limited(secs + 2 * READ_MARGIN_SECS),
            self._api.stream(
                self.resource.path,
                parameters,
                accept=self.resource.accept(listing=False),
                read_secs=secs + READ_MARGIN_SECS,
            ) as content,
        ):
            self.connected = True
            self.trouble = self.reason = ""
            async for line in lines(content):
                events += 1
                self._take(line)
        if not events and self._monotonic() - began < SHORT_WATCH_SECS:
            raise ApiError("short", "the watch ended at once")
        self._restarted(self.resource.kind, "ended")

    def _take(self, line: bytes) -> None:
        """One event; raises ``ApiError`` where the watch cannot go on."""
        try:
            event = _event.decode(line)
            if event.type == "ERROR":
                status = status_of(bytes(event.object))
                code, message = (status.code, status.message) if status else (0, "an error without a status")
                raise ApiError(reason_of(code, status), f"{code}: {message}", status=code)
            version = self._apply(event.type, bytes(event.object))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ApiError("decode", f"not an event: {error}") from error
        if version:
            self._version = version
        self._heard()

    def _apply(self, kind: str, data: bytes) -> str:
        """Bring the store up to date; the version this event stands for."""
        if kind not in {"ADDED", "MODIFIED", "DELETED", "BOOKMARK"}:
            raise ApiError("decode", f"unknown event type {kind[:40]!r}")
        if kind in {"DELETED", "BOOKMARK"}:
            metadata = _bare.decode(data).metadata
            if kind == "DELETED":
                self.store.delete(metadata.uid)
            return metadata.resource_version
        try:
            _, version = self.store.put(data)
        except msgspec.ValidationError as error:
            self._odd(error)
            return _bare.decode(data).metadata.resource_version
        return version

    def _heard(self) -> None:
        self.heard_at = self._monotonic()

    def _odd(self, error: Exception) -> None:
        """One object is not of the shape it should be: the others are."""
        now = self._monotonic()
        if now - self._odd_said_at < LOG_SECS:
            return
        self._odd_said_at = now
        log.warning("object skipped: unknown shape", kind=self.resource.kind, error=str(error)[:200])
