"""Lists and watches while they arrive: bytes in, whole objects and whole lines out, nothing larger kept than has to be.

A list at ``resourceVersion=0`` may be 120 MB in one answer, whatever page size was asked for; kept whole, it would be the largest thing
in the process by far.
"""

from __future__ import annotations

import contextlib
import re
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
        self._looked = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Raises ``ApiError`` where too much would have to be kept."""
        rest = self._rest
        rest += chunk
        if not self._head:
            if not self._begin():
                self._check_size()
                return
            self._looked = 0
        start = 0
        for end in [match.start() + 1 for match in _NEXT_ITEM.finditer(rest, self._looked)]:
            item = bytes(rest[start:end])
            try:
                _raw.decode(item)
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
                continue  # it only looks like the beginning of the next one
            yield item
            start = end + 1
        del rest[:start]
        self._looked = max(0, len(rest) - 2 * len(_ITEMS))
        self._check_size()

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
