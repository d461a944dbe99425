"""One sender's connection, and what ends it.

aiohttp has no deadline for a header, and closes a connection only once everything was written: one that never reads what it is
answered would stay for ever. So each connection knows when a header began and when it was told to close, and ``overdue``
says what is to be done with it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from forwarder.receiver_answers import refuse

KEEP_ALIVE_SECS = 130.0
LINGER_SECS = 2.0
CLOSING_SECS_MAX = 10.0
LINE_BYTES_MAX, HEADERS_MAX = 4096, 64
"""Falco sends seven short headers. More of them than this, or longer ones, is 400; without a limit a header may have a megabyte."""
HEADER_END, CHUNKED_END = b"\r\n\r\n", b"0\r\n\r\n"


class Owner(Protocol):
    """The receiver, as a connection knows it."""

    server: web.Server

    def expiry(self, now: float) -> float: ...

    def opened(self, connection: Connection) -> None: ...

    def closed(self) -> None: ...

    def answered_badly(self, status: int) -> None: ...


class Connection(RequestHandler):
    """One sender. Knows what a deadline needs: when it was opened, when a header began, whether it is busy."""

    __slots__ = (
        "_owner",
        "_wire",
        "busy",
        "chunk",
        "closing_since",
        "expires_at",
        "heard_at",
        "peer",
        "served",
        "used_at",
        "useful",
    )

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            owner.server,
            loop=loop,
            keepalive_timeout=KEEP_ALIVE_SECS,
            lingering_time=LINGER_SECS,
            access_log=None,  # type: ignore[arg-type]  # its own type does not say that it takes none
            auto_decompress=False,
            max_line_size=LINE_BYTES_MAX,
            max_field_size=LINE_BYTES_MAX,
            max_headers=HEADERS_MAX,
        )
        self._owner = owner
        self._wire: Any = None
        self.heard_at: float | None = None
        self.busy = False
        self.served = 0
        self.useful = False
        """It has posted an alert that was stored: Falco, most likely."""
        self.used_at = 0.0
        self.expires_at = 0.0
        self.closing_since: float | None = None
        self.peer = ""
        """Address of the sender: Falco's pod, or its node."""
        self.chunk = b""
        """What arrived last, while its request is not answered."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        now = self._loop.time()
        self._wire = transport
        self.heard_at = self.used_at = now
        self.expires_at = self._owner.expiry(now)
        self.peer = address_of(transport)
        super().connection_made(transport)
        self._owner.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._owner.closed()

    def data_received(self, data: bytes) -> None:
        if self.heard_at is None:
            self.heard_at = self._loop.time()
        if data:  # aiohttp calls itself with nothing to parse what it kept
            self.chunk = data
        super().data_received(data)

    def answered(self, end: bytes) -> None:
        """A request is over that ended with these bytes. What came behind them is the beginning of the next header, whose time runs now."""
        rest = not (self.chunk.endswith(end) or end.endswith(self.chunk) or self.chunk.endswith(CHUNKED_END))
        self.used_at = self._loop.time()
        self.heard_at = self.used_at if rest else None
        self.chunk = b""
        self.busy = False
        self.served += 1

    def overdue(self, now: float, header_secs_max: float) -> bool:
        """Whether a header takes too long: it is closed then. What is told to close and does not is torn down."""
        if self._wire.is_closing():
            if self.closing_since is None:
                self.closing_since = now
            elif now - self.closing_since > CLOSING_SECS_MAX:
                self._wire.abort()
            return False
        if self.busy or self.heard_at is None or self.heard_at >= now - header_secs_max:
            return False
        self.force_close()
        return True

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002 - the signature is aiohttp's
        status: int = 500,
        exc: BaseException | None = None,  # noqa: ARG002
        message: str | None = None,
    ) -> web.StreamResponse:
        """Not HTTP, or too much of a header: one line of answer, none in the log."""
        response = refuse(status, " ".join((message or "bad request").split())[:200])
        response.force_close()
        self._owner.answered_badly(status)
        return response


def address_of(transport: asyncio.BaseTransport) -> str:
    """Address of the other side, as text."""
    address = transport.get_extra_info("peername")
    return str(address[0]).removeprefix("::ffff:") if address else ""
