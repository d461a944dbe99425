"""What the cache is made of: an index whose keys may have several pods, and the memory of when objects were deleted. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from forwarder.kubernetes_objects import Pod

K = TypeVar("K")


class Many(Generic[K]):
    """Key -> pods, lean where there is one, which is nearly always."""

    __slots__ = ("_of",)

    def __init__(self) -> None:
        self._of: dict[K, Any] = {}

    def add(self, key: K, pod: Pod) -> None:
        known = self._of.get(key)
        if known is None:
            self._of[key] = pod
        elif isinstance(known, tuple):
            self._of[key] = (*[other for other in known if other.uid != pod.uid], pod)
        else:
            self._of[key] = pod if known.uid == pod.uid else (known, pod)

    def remove(self, key: K, uid: str) -> None:
        known = self._of.get(key)
        if known is None:
            return
        rest = tuple(pod for pod in (known if isinstance(known, tuple) else (known,)) if pod.uid != uid)
        if not rest:
            del self._of[key]
        else:
            self._of[key] = rest if len(rest) > 1 else rest[0]

    def get(self, key: K) -> tuple[Pod, ...]:
        known = self._of.get(key)
        if known is None:
            return ()
        return known if isinstance(known, tuple) else (known,)


class Graves:
    """When what was deleted, oldest first, until it is forgotten."""

    def __init__(self, monotonic: Callable[[], float], secs: float, count_max: int) -> None:
        self._monotonic = monotonic
        self._secs = secs
        self._count_max = count_max
        self._queue: deque[tuple[float, str]] = deque()
        self._until: dict[str, float] = {}
        self.deleted_at: dict[str, float] = {}
        """Wall clock of the deletion, by UID."""

    def dig(self, uid: str, at: float) -> None:
        """Somebody died."""
        until = self._monotonic() + self._secs
        self.deleted_at[uid] = at
        self._until[uid] = until
        self._queue.append((until, uid))

    def rise(self, uid: str) -> None:
        """It lives after all."""
        if self.deleted_at.pop(uid, None) is not None:
            del self._until[uid]

    def forgotten(self) -> Iterator[str]:
        """UIDs whose time is over, or which are too many."""
        now = self._monotonic()
        while self._queue and (self._queue[0][0] <= now or len(self.deleted_at) > self._count_max):
            until, uid = self._queue.popleft()
            if self._until.get(uid) == until:  # else it rose, and perhaps died again later
                self.rise(uid)
                yield uid
