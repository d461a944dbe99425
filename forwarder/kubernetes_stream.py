"""Lists and watches while they arrive: bytes in, whole objects and whole lines out, nothing larger kept than has to be.

A list at ``resourceVersion=0`` may be 120 MB in one answer, whatever page size was asked for; kept whole, it would be the largest thing
in the process by far.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import AsyncIterator, Iterator

import aiohttp
import msgspec
from msgspec import Raw

from forwarder.kubernetes_api import ApiError

LINE_BYTES_MAX = 4 << 20
"""An object in etcd has 1.5 MB at most."""
REST_BYTES_MAX = 64 << 20
"""What one answer may keep in memory where its objects cannot be told apart while it arrives."""

_NEXT_ITEM = re.compile(rb'\},\{"(?:metadata|kind|apiVersion)":')
_ITEMS = b'"items":['
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*(")?|[{}\[\]]', re.DOTALL)
_QUOTE = ord('"')
DOUBTS_MAX = 16
"""So many false beginnings within one object, and brackets are counted: each costs a look at the whole object."""


class ListMeta(msgspec.Struct, frozen=True, gc=False, rename="camel"):
    """``metadata`` of a list."""

    resource_version: str = ""
    continue_token: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct, frozen=True, gc=False):
    metadata: ListMeta = ListMeta()
    items: list[Raw] | None = None


_list = msgspec.json.Decoder(_List)
_raw = msgspec.json.Decoder(Raw)


class ItemSplitter:
    """Objects of a list while it arrives: bytes in, the JSON of whole objects out.

    An object ends where the next one seems to begin; that it really does is known when it decodes, because no part of a JSON object
    is one. Where no beginning is recognised, everything is kept to the end, and decoded then.
    """

    def __init__(self) -> None:
        self._head = b""
        self._rest = bytearray()
        self._looked = self._depth = self._doubts = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Raises ``ApiError`` where too much would have to be kept."""
        rest = self._rest
        rest += chunk
        if not self._head:
            if not self._begin():
                self._check_size()
                return
            self._looked = 0
        while (end := self._end()) is not None:
            yield bytes(rest[:end])
            del rest[: end + 1]
            self._looked = self._depth = self._doubts = 0
        self._check_size()

    def _end(self) -> int | None:
        """Where the first object ends, if it does here; always right, and quick for what an API server sends."""
        while self._doubts < DOUBTS_MAX:
            match = _NEXT_ITEM.search(self._rest, self._looked)
            if match is None:
                self._looked = max(self._looked, len(self._rest) - 2 * len(_ITEMS))
                return None
            end = match.start() + 1
            self._looked = match.end()
            with contextlib.suppress(msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
                _raw.decode(memoryview(self._rest)[:end])
                return end
            self._doubts += 1  # it only looked like the beginning of the next one
            if self._doubts == DOUBTS_MAX:
                self._looked = self._depth = 0
        return self._counted_end()

    def _counted_end(self) -> int | None:
        """The same by counting brackets: slower, but no object can make it slower still."""
        for token in _TOKEN.finditer(self._rest, self._looked):
            kind, end = self._rest[token.start()], token.end()
            if kind == _QUOTE:
                if not token[1]:
                    self._looked = token.start()  # a text that goes on in the next chunk
                    return None
                self._looked = end
                continue
            step = 1 if kind in b"{[" else -1
            if self._depth + step == 0:
                after = self._rest[end : end + 1]
                if after == b",":
                    return end
                if not after:
                    self._looked = token.start()  # looked at again, when it is known what follows
                    return None
            self._depth += step
            self._looked = end
            if self._depth < 0:  # the list is over; what follows is no object of it
                self._looked = sys.maxsize
                return None
        return None

    def _begin(self) -> bool:
        """Find the list's own ``items``: where it may be closed at once, and is empty then."""
        rest = self._rest
        while (place := rest.find(_ITEMS, self._looked)) >= 0:
            end = place + len(_ITEMS)
            head = bytes(rest[:end])
            with contextlib.suppress(msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
                if _list.decode(head + b"]}").items == []:
                    self._head = head
                    del rest[:end]
                    return True
            self._looked = end
        self._looked = max(self._looked, len(rest) - len(_ITEMS))
        return False

    def finish(self) -> tuple[ListMeta, list[bytes]]:
        """The list's own metadata, and the objects that are left. Raises ``ApiError`` for a list that is cut off."""
        try:
            whole = _list.decode(self._head + bytes(self._rest))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ApiError("decode", f"not a list: {error}") from error
        return whole.metadata, [bytes(item) for item in whole.items or ()]

    def _check_size(self) -> None:
        if len(self._rest) > REST_BYTES_MAX:
            raise ApiError("decode", f"more than {REST_BYTES_MAX} bytes of a list without an end")


async def lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of a watch while they arrive. Raises ``ApiError`` for one that is too long, or cut off at the end."""
    rest = bytearray()
    async for chunk in content.iter_any():
        looked = len(rest)
        rest += chunk
        end = rest.find(b"\n", looked)
        start = 0
        while end >= 0:
            if end > start:
                yield bytes(rest[start:end])
            start = end + 1
            end = rest.find(b"\n", start)
        del rest[:start]
        if len(rest) > LINE_BYTES_MAX:
            raise ApiError("decode", f"an event of more than {LINE_BYTES_MAX} bytes")
    if rest.strip():
        raise ApiError("network", "the watch was cut off within an event")
