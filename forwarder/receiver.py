"""The receiver: Falco's ``http_output`` target on port 2801.

How Falco behaves, and what follows (Falco 0.1 to 0.45, libcurl):

- It never looks at the status, so a 2xx is for people and other tools; but it is a promise: given only after
  the alert is durable. The body is empty: before 0.36 Falco prints it.
- One request at a time on one kept-alive connection, closed by libcurl after 118 s idle: ours stays open 130 s.
- A refused or reset connection loses the alert. So the listener stays up through the drain delay, and
  connections end by ``Connection: close`` on an answer: on drain, and at their age (a ClusterIP Service
  balances per connection, so an eternal one would never move to a new replica).
- Any POST path is an alert, as with falcosidekick, whose ``/ping``, ``/healthz`` and ``/test`` are here too.

Built on aiohttp's low-level server: no router, no middleware. aiohttp has no deadline for a half-sent header
nor for a slow body, and would unpack a compressed one: all three are set here. No line per request is logged.

With credentials configured, every POST must carry them; probes and pings need none. TLS is asyncio's (``receiver_tls``).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import aiohttp
import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from forwarder.ingest import STORED, Ingest
from forwarder.metrics import Metrics
from forwarder.receiver_answers import (
    Stored,
    alert_of_test,
    keeps,
    other_methods,
    refuse,
    response_to,
    too_many,
    unauthorised,
)
from forwarder.receiver_files import ReceiverFiles
from forwarder.receiver_settings import ReceiverSettings

KEEP_ALIVE_SECS = 130.0
LINGER_SECS = 2.0
SWEEP_SECS = 1.0
BACKLOG = 1024
STOP_SECS_MAX, FRESH_SECS_MAX, CLOSE_SECS_MAX = 2.0, 0.5, 0.5
STOP_POLL_SECS = 0.02
TLS_GOODBYE_SECS_MAX = 2.0
STRANGER_LOG_SECS = 60.0
HTTP_OK = 200

log = structlog.get_logger("receiver")


class _Connection(RequestHandler):
    """One sender. Knows what a deadline needs: when it was opened, when a header began, whether it is busy."""

    __slots__ = ("_receiver", "busy", "chunk", "expires_at", "heard_at", "peer", "served")

    def __init__(self, receiver: Receiver, **keys: Any) -> None:
        super().__init__(receiver.server, **keys)
        self._receiver = receiver
        self.heard_at: float | None = None
        self.busy = False
        self.served = 0
        self.expires_at = 0.0
        self.peer = ""
        """Address of the sender: Falco's pod, or its node."""
        self.chunk = b""
        """What arrived last, while its request is not answered."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        now = self._loop.time()
        self.heard_at = now
        self.expires_at = self._receiver.expiry(now)
        address = transport.get_extra_info("peername")
        self.peer = str(address[0]).removeprefix("::ffff:") if address else ""
        super().connection_made(transport)
        self._receiver.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._receiver.metrics.connections.dec()

    def data_received(self, data: bytes) -> None:
        if self.heard_at is None:
            self.heard_at = self._loop.time()
        if data:  # aiohttp calls itself with nothing to parse what it kept
            self.chunk = data
        super().data_received(data)

    def answered(self, body: bytes) -> None:
        """A request is over. What came behind its body is the beginning of the next header, whose time runs now."""
        rest = not (self.chunk.endswith(body) or body.endswith(self.chunk))
        self.heard_at = self._loop.time() if rest else None
        self.chunk = b""
        self.busy = False
        self.served += 1

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002 - the signature is aiohttp's
        status: int = 500,
        exc: BaseException | None = None,  # noqa: ARG002
        message: str | None = None,
    ) -> web.StreamResponse:
        """Not HTTP, or too much of a header: one line of answer, none in the log."""
        response = web.json_response(
            {"error": " ".join((message or "bad request").split())[:200]}, status=status
        )
        response.force_close()
        if status in self._receiver.metrics.requests:
            self._receiver.metrics.requests[status].inc()
        return response


class Receiver:
    """Listens, and turns ingest's outcome into an answer."""

    def __init__(
        self,
        settings: ReceiverSettings,
        *,
        files: ReceiverFiles,
        ingest: Ingest,
        metrics: Metrics,
        rng: random.Random,
        now_ns: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._ingest = ingest
        self._rng = rng
        self._now_ns = now_ns
        self._draining = False
        self._ok = 0
        self._stored = Stored(closing=False)
        self._stored_closing = Stored(closing=True)
        self._listener: asyncio.Server | None = None
        self._files = files
        self._stranger_at = 0.0
        self._bytes = 0
        """Of the bodies that arrive or wait for their answer."""
        self.metrics = metrics
        self.port = 0

    @property
    def listening(self) -> bool:
        return self._listener is not None and self._listener.is_serving()

    async def start(self) -> None:
        """Listen; raises ``OSError`` where the port is taken. The files of TLS must have been loaded."""
        self._loop = asyncio.get_running_loop()
        self.server = web.Server(self._serve)
        tls = self._files.tls
        self._listener = await self._loop.create_server(
            self._connection,
            self._settings.host,
            self._settings.port,
            backlog=BACKLOG,
            reuse_address=True,
            ssl=tls,
            ssl_handshake_timeout=self._settings.header_secs_max if tls else None,
            ssl_shutdown_timeout=TLS_GOODBYE_SECS_MAX if tls else None,
        )
        self.port = self._listener.sockets[0].getsockname()[1]
        self._sweeper = asyncio.create_task(self._sweep(), name="receiver deadlines")
        log.info(
            "receiver listens",
            host=self._settings.host,
            port=self.port,
            tls=bool(tls),
            auth=bool(self._files.credentials),
        )

    def publish(self) -> None:
        """Fold the answers counted since the last time into the metrics."""
        self.metrics.requests[HTTP_OK].inc(self._ok)
        self._ok = 0

    def drain(self) -> None:
        """Go on accepting, but end each connection with its next answer."""
        self._draining = True

    async def stop(self) -> None:
        """Close the listener, answer what is under way, close the rest.

        aiohttp throws away what arrives once it shuts a connection down, so requests that have begun, and connections
        just accepted, get their time first.
        """
        if self._listener is None:
            return
        self._listener.close()
        now = self._loop.time()
        begun, fresh = now + self._settings.hold_secs_max + STOP_SECS_MAX, now + FRESH_SECS_MAX
        while (now := self._loop.time()) < begun and self._under_way(count_fresh=now < fresh):  # noqa: ASYNC110 - bounded
            await asyncio.sleep(STOP_POLL_SECS)
        self.server.pre_shutdown()
        await self.server.shutdown(CLOSE_SECS_MAX)
        self._sweeper.cancel()

    def _under_way(self, *, count_fresh: bool) -> bool:
        """Whether a request is being answered, or a connection was opened and has not spoken yet."""
        if count_fresh and self._files.tls is not None and self._files.tls.handshakes:
            return True
        return any(
            connection.busy or (count_fresh and not connection.served)
            for connection in self.server.connections
            if isinstance(connection, _Connection)
        )

    def expiry(self, now: float) -> float:
        """Loop time at which a connection opened now has reached its age: 75 to 100 % of the maximum."""
        return now + self._settings.connection_age_secs_max * self._rng.uniform(0.75, 1.0)

    def opened(self, connection: _Connection) -> None:
        """Count a connection; at the limit, one that never sent a request makes room, or the new one goes."""
        self.metrics.connections.inc()
        everyone = self.server.connections
        if len(everyone) <= self._settings.connections_max:
            return
        idle = [
            other
            for other in everyone
            if isinstance(other, _Connection) and not other.served and not other.busy
        ]
        victim = min(idle, key=lambda other: other.heard_at or 0.0) if idle else connection
        self.metrics.connections_closed["connections"].inc()
        victim.force_close()

    def _connection(self) -> _Connection:
        return _Connection(
            self,
            loop=self._loop,
            keepalive_timeout=KEEP_ALIVE_SECS,
            lingering_time=LINGER_SECS,
            access_log=None,
            auto_decompress=False,
        )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECS)
            latest = self._loop.time() - self._settings.header_secs_max
            for connection in self.server.connections:
                if not isinstance(connection, _Connection) or connection.busy:
                    continue
                if connection.heard_at is not None and connection.heard_at < latest:
                    self.metrics.connections_closed["header_timeout"].inc()
                    connection.force_close()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, _Connection)  # noqa: S101 - for the type checker: made by _connection
        connection.busy = True
        body = b""
        response: web.Response
        try:
            if request.method == "POST" and self._is_stranger(request, connection.peer):
                response = unauthorised()
            elif self._bytes + (size := self._size(request)) > self._settings.bodies_bytes_max:
                self.metrics.connections_closed["bodies"].inc()
                response = too_many()
            else:
                self._bytes += size
                try:
                    body, refusal = await self._body(request)
                    response = refusal or await self._answer(request, body, connection.peer)
                finally:
                    self._bytes -= size
        except Exception:
            # The outer boundary: a fault of ours must not take the listener with it.
            log.exception("request failed")
            response = refuse(500, "internal error")
        finally:
            connection.answered(body)
        if self._draining or self._loop.time() >= connection.expires_at:
            if response is self._stored:
                response = self._stored_closing
            else:
                response.force_close()
            if not self._draining:
                self.metrics.connections_closed["age"].inc()
        if response.status == HTTP_OK:
            self._ok += 1
        else:
            self.metrics.requests[response.status].inc()
        return response

    def _size(self, request: web.BaseRequest) -> int:
        """What a request may take of the memory for bodies until it is answered; all it may where it does not say."""
        said = request.content_length
        most = self._settings.body_bytes_max
        return most if said is None and request.body_exists else min(said or 0, most)

    def _is_stranger(self, request: web.BaseRequest, peer: str) -> bool:
        """Whether credentials are asked for, and these are none of them. Falco does not look at a 401: it is told to people."""
        credentials = self._files.credentials
        reason = credentials.refuses(request.headers.get("Authorization")) if credentials else ""
        if reason:
            self.metrics.auth_failures[reason].inc()
            now = self._loop.time()
            if now >= self._stranger_at:
                self._stranger_at = now + STRANGER_LOG_SECS
                log.warning("sender without valid credentials", peer=peer, why=reason)
        return bool(reason)

    async def _answer(self, request: web.BaseRequest, body: bytes, peer: str) -> web.Response:
        if request.method != "POST":
            return other_methods(request)
        if request.path == "/test":
            body = alert_of_test(self._now_ns())
        answer = await self._ingest.take(body, peer)
        return self._stored if answer is STORED and keeps(request) else response_to(answer)

    async def _body(self, request: web.BaseRequest) -> tuple[bytes, web.Response | None]:
        """The whole body, or the refusal that ends the connection: the rest is not read."""
        content = request.content
        body = b""
        refusal: web.Response | None = None
        if request.headers.get("Content-Encoding", "identity") != "identity":
            refusal = refuse(415, "Content-Encoding is not accepted: Falco never compresses")
        elif content.is_eof():
            body = content.read_nowait()
        elif (request.content_length or 0) > self._settings.body_bytes_max:
            refusal = self._too_large()
        else:
            body, refusal = await self._receive(request, content)
        if refusal is None and len(body) > self._settings.body_bytes_max:
            refusal = self._too_large()
        if refusal is not None:
            refusal.force_close()
        return body, refusal

    def _too_large(self) -> web.Response:
        return refuse(413, f"body larger than {self._settings.body_bytes_max} bytes")

    async def _receive(self, request: web.BaseRequest, content: Any) -> tuple[bytes, web.Response | None]:
        """The body of a request that is still arriving, or why not."""
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        try:
            async with asyncio.timeout(self._settings.body_secs_max):
                return await self._read(content, self._settings.body_bytes_max), None
        except TimeoutError:
            return b"", refuse(408, f"body not complete within {self._settings.body_secs_max} s")
        except (web.RequestPayloadError, aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
            # Broken framing, or the sender left: nobody was promised anything.
            return b"", refuse(400, f"body cannot be read: {error}")

    @staticmethod
    async def _read(content: Any, size_max: int) -> bytes:
        """The whole body, or the first part of it that is too large."""
        parts: list[bytes] = []
        size = 0
        while not content.at_eof() and size <= size_max:
            part = await content.readany()
            size += len(part)
            parts.append(part)
        return b"".join(parts)
