"""Bodies of requests: read with a limit in size, in time, and in memory for all of them together.

aiohttp has no deadline for a body, and would unpack a compressed one. Memory is counted as it arrives and until the answer is
given: what a sender only announces costs nobody anything. One address may have half of it with bodies that arrive in pieces, so that
a sender that is not Falco cannot keep every Falco out by itself. A body that came with its header, as Falco's does, is small.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from forwarder.receiver_answers import refuse, too_many
from forwarder.receiver_settings import ReceiverSettings


class Claim:
    """What one request has of the memory for bodies, for the length of a ``with`` block."""

    __slots__ = ("_bodies", "_bytes", "_peer")

    def __init__(self, bodies: Bodies, peer: str) -> None:
        self._bodies = bodies
        self._peer = peer
        self._bytes = 0

    def grow(self, size: int) -> bool:
        """Whether there is room for so many bytes more; they are counted either way, because they are there."""
        self._bytes += size
        return self._bodies.take(self._peer, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bodies.give(self._peer, self._bytes)


class Bodies:
    """Reads them, and knows what they take."""

    def __init__(self, settings: ReceiverSettings, turned_away: Callable[[str], object]) -> None:
        """``turned_away`` hears the address of a sender for whom there was no room."""
        self._settings = settings
        self._turned_away = turned_away
        self._peers: dict[str, int] = {}
        self._peer_bytes_max = max(settings.body_bytes_max, settings.bodies_bytes_max // 2)
        self.bytes = 0
        """Of the bodies that arrive or wait for their answer."""

    def claim(self, peer: str) -> Claim:
        return Claim(self, peer)

    def take(self, peer: str, size: int) -> bool:
        self.bytes += size
        used = self._peers[peer] = self._peers.get(peer, 0) + size
        if self.bytes <= self._settings.bodies_bytes_max and used <= self._peer_bytes_max:
            return True
        self._turned_away(peer)
        return False

    def give(self, peer: str, size: int) -> None:
        self.bytes -= size
        left = self._peers.get(peer, 0) - size
        if left > 0:
            self._peers[peer] = left
        else:
            self._peers.pop(peer, None)

    def whole(self, request: web.BaseRequest, peer: str) -> tuple[bytes, web.Response | None]:
        """A body that has arrived, which is Falco's case; or the refusal. The caller counts its bytes while they wait."""
        body = request.content.read_nowait()
        refusal: web.Response | None = None
        if request.headers.get("Content-Encoding", "identity") != "identity":
            refusal = self._compressed()
        elif len(body) > self._settings.body_bytes_max:
            refusal = self._too_large()
        elif self.bytes + len(body) > self._settings.bodies_bytes_max:
            self._turned_away(peer)
            refusal = too_many()
        if refusal is not None:
            refusal.force_close()
        return body, refusal

    async def read(self, request: web.BaseRequest, claim: Claim) -> tuple[bytes, web.Response | None]:
        """A body that is still arriving, or the refusal that ends the connection: the rest is not read."""
        body = b""
        refusal: web.Response | None = None
        if request.headers.get("Content-Encoding", "identity") != "identity":
            refusal = self._compressed()
        elif (request.content_length or 0) > self._settings.body_bytes_max:
            refusal = self._too_large()
        else:
            body, refusal = await self._receive(request, request.content, claim)
        if refusal is None and len(body) > self._settings.body_bytes_max:
            refusal = self._too_large()
        if refusal is not None:
            refusal.force_close()
        return body, refusal

    @staticmethod
    def _compressed() -> web.Response:
        return refuse(415, "Content-Encoding is not accepted: Falco never compresses")

    def _too_large(self) -> web.Response:
        return refuse(413, f"body larger than {self._settings.body_bytes_max} bytes")

    async def _receive(
        self, request: web.BaseRequest, content: Any, claim: Claim
    ) -> tuple[bytes, web.Response | None]:
        """The body of a request that is still arriving, or why not."""
        try:
            if request.headers.get("Expect", "").lower() == "100-continue":
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0
            async with asyncio.timeout(self._settings.body_secs_max):
                body = await self._read(content, claim)
        except TimeoutError:
            return b"", refuse(408, f"body not complete within {self._settings.body_secs_max} s")
        except (web.RequestPayloadError, aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
            # Broken framing, or the sender left: nobody was promised anything.
            return b"", refuse(400, f"body cannot be read: {error}")
        return (b"", too_many()) if body is None else (body, None)

    async def _read(self, content: Any, claim: Claim) -> bytes | None:
        """The whole body, or the first part of it that is too large; None where there is no room."""
        parts: list[bytes] = []
        size = 0
        while not content.at_eof() and size <= self._settings.body_bytes_max:
            part = await content.readany()
            size += len(part)
            parts.append(part)
            if not claim.grow(len(part)):
                return None
        return b"".join(parts)
