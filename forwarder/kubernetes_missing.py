"""Pods nobody has heard of yet: remembered for a while, and fetched in the background, slowly.

An alert may be quicker than the watch, and anybody may post alerts about pods that never were. So a miss is remembered
(``MISSING_SECS``, at most ``MISSING_MAX``) and asked for once: at most ``FETCHES_PER_SEC``, at most ``WAITING_MAX`` at a time, and
only if it could be the name of a pod at all, because it becomes part of a path.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from forwarder.kubernetes_api import Api, ApiError

MISSING_SECS = 30.0
MISSING_MAX = 10_000
FRESH_SECS = 5.0
"""So long, a miss may be the watch's delay: it is worth looking again at delivery."""
FETCHES_PER_SEC = 10.0
WAITING_MAX = 100

_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_POD = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?\Z")
_NOT_FOUND = 404

log = structlog.get_logger("kubernetes")


class Missing:
    """The negative cache, and the fetcher."""

    def __init__(self, api: Api, found: Callable[[bytes], None], monotonic: Callable[[], float]) -> None:
        """``found`` gets the JSON of a fetched pod."""
        self._api = api
        self._found = found
        self._monotonic = monotonic
        self._since: dict[tuple[str, str], float] = {}
        self._queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue(WAITING_MAX)
        self.fetched = self.dropped = 0
        """Pods fetched; names that were not asked for because too many waited."""
        self.trouble = ""
        """Why the last fetch failed, other than that there is no such pod."""

    def remember(self, namespace: str, name: str) -> bool:
        """Nobody knows it. True while the watch may still bring it.

        ``namespace`` may be empty and ``name`` any identity: then it is remembered, and not fetched.
        """
        now = self._monotonic()
        key = (namespace, name)
        since = self._since.get(key)
        if since is not None and now - since < MISSING_SECS:
            return now - since < FRESH_SECS
        self._since.pop(key, None)
        if len(self._since) >= MISSING_MAX:
            del self._since[next(iter(self._since))]
        self._since[key] = now
        if namespace and _NAMESPACE.match(namespace) and _POD.match(name):
            try:
                self._queue.put_nowait(key)
            except asyncio.QueueFull:
                self.dropped += 1
        return True

    def __len__(self) -> int:
        return len(self._since)

    def state(self) -> dict[str, Any]:
        """For ``/status``."""
        return {
            "remembered": len(self._since),
            "waiting": self._queue.qsize(),
            "fetched": self.fetched,
            "dropped": self.dropped,
            "trouble": self.trouble or None,
        }

    def expire(self) -> None:
        """Forget what is old enough to be asked again (call it now and then)."""
        oldest = self._monotonic() - MISSING_SECS
        while self._since:
            key = next(iter(self._since))
            if self._since[key] > oldest:
                return
            del self._since[key]

    async def run(self) -> None:
        """Fetch what was missed, for ever."""
        while True:
            namespace, name = await self._queue.get()
            try:
                data = await self._api.ask(f"/api/v1/namespaces/{namespace}/pods/{name}")
                self._found(data)
                self.fetched += 1
                self.trouble = ""
            except ApiError as error:
                if error.status != _NOT_FOUND:
                    self.trouble = str(error)
                    log.debug("pod not fetched", namespace=namespace, pod=name, error=str(error))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                log.warning("pod not understood", namespace=namespace, pod=name, error=str(error))
            except Exception:
                # A fault of ours must not end the fetching for good.
                log.exception("pod not fetched", namespace=namespace, pod=name)
            await asyncio.sleep(1 / FETCHES_PER_SEC)
