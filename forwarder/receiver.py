"""The receiver: Falco's ``http_output`` target on port 2801.

How Falco behaves, and what follows (Falco 0.1 to 0.45, libcurl):

- It never looks at the status, so a 2xx is for people and other tools; but it is a promise: given only after
  the alert is durable. The body is empty: before 0.36 Falco prints it.
- One request at a time on one kept-alive connection, closed by libcurl after 118 s idle: ours stays open 130 s.
- A refused or reset connection loses the alert. So the listener stays up through the drain delay, and
  connections end by ``Connection: close`` on an answer: on drain, and at their age (a ClusterIP Service
  balances per connection, so an eternal one would never move to a new replica).
- Any POST path is an alert, as with falcosidekick, whose ``/ping``, ``/healthz`` and ``/test`` are here too.

Built on aiohttp's low-level server: no router, no middleware. What it lacks in limits is in ``receiver_connection`` (headers,
connections that never end), ``receiver_bodies`` (size, time, memory) and ``receiver_tls`` (handshakes). No line per request is logged.

With credentials configured, every POST must carry them; probes and pings need none, and no other request's body is read.
"""

from __future__ import annotations

import asyncio
import random
import resource
from collections.abc import Callable

import structlog
from aiohttp import web

from forwarder.ingest import STORED, Ingest
from forwarder.listening import everywhere
from forwarder.metrics import Metrics
from forwarder.receiver_answers import (
    Stored,
    alert_of_test,
    keeps,
    other_methods,
    refuse,
    response_to,
    unauthorised,
)
from forwarder.receiver_bodies import Bodies
from forwarder.receiver_connection import HEADER_END, Connection
from forwarder.receiver_files import ReceiverFiles
from forwarder.receiver_settings import ReceiverSettings
from forwarder.receiver_tls import Handshake

SWEEP_SECS = 1.0
BACKLOG = 1024
DESCRIPTORS_KEPT = 512
"""File descriptors for everything but senders: the spool, AWS, the Kubernetes API, handshakes."""
STOP_SECS_MAX, FRESH_SECS_MAX, CLOSE_SECS_MAX = 2.0, 0.5, 0.5
STOP_POLL_SECS = 0.02
TELL_SECS = 60.0
HTTP_OK = 200

log = structlog.get_logger("receiver")


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
        self._turned_away_at = 0.0
        self._bodies = Bodies(settings, self._turned_away)
        self._connections_max = settings.connections_max
        self.metrics = metrics
        self.port = 0

    @property
    def listening(self) -> bool:
        return self._listener is not None and self._listener.is_serving()

    async def start(self) -> None:
        """Listen; raises ``OSError`` where the port is taken. The files of TLS must have been loaded."""
        self._loop = asyncio.get_running_loop()
        self.server = web.Server(self._serve)
        self._connections_max = self._affordable()
        tls = self._files.tls
        makes = self._handshake if tls else self._connection
        host, port = self._settings.host, self._settings.port
        if host:
            self._listener = await self._loop.create_server(
                makes, host, port, backlog=BACKLOG, reuse_address=True
            )
        else:
            sock = everywhere(port, BACKLOG)
            self._listener = await self._loop.create_server(makes, sock=sock, backlog=BACKLOG)
        self.port = self._listener.sockets[0].getsockname()[1]
        self._sweeper = asyncio.create_task(self._sweep(), name="receiver deadlines")
        log.info(
            "receiver listens",
            host=self._settings.host,
            port=self.port,
            tls=bool(tls),
            auth=bool(self._files.credentials),
        )

    def _affordable(self) -> int:
        """As many connections as are configured, or as there are file descriptors for."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self._settings.connections_max + DESCRIPTORS_KEPT
        if soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        most = max(1, min(self._settings.connections_max, soft - DESCRIPTORS_KEPT))
        if most < self._settings.connections_max:
            log.warning(
                "fewer connections than configured: the limit of open files",
                connections_max=most,
                open_files=soft,
            )
        return most

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
        for handshake in list(self._files.tls.handshakes) if self._files.tls else ():
            handshake.give_up()
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
            if isinstance(connection, Connection)
        )

    def expiry(self, now: float) -> float:
        """Loop time at which a connection opened now has reached its age: 75 to 100 % of the maximum."""
        return now + self._settings.connection_age_secs_max * self._rng.uniform(0.75, 1.0)

    def opened(self, connection: Connection) -> None:
        """Count a connection; at the limit, the one that was longest of no use makes room, or the new one goes."""
        self.metrics.connections.inc()
        everyone = self.server.connections
        if len(everyone) <= self._connections_max:
            return
        idle = [
            other
            for other in everyone
            if isinstance(other, Connection) and not (other.useful or other.busy or other is connection)
        ]
        victim = min(idle, key=lambda other: other.used_at) if idle else connection
        if victim is connection:
            self._turned_away(connection.peer, "connections")
        else:
            self.metrics.connections_closed["idle"].inc()
        victim.force_close()

    def closed(self) -> None:
        """A connection is gone."""
        self.metrics.connections.dec()

    def answered_badly(self, status: int) -> None:
        """What came was not HTTP."""
        if status in self.metrics.requests:
            self.metrics.requests[status].inc()

    def _connection(self) -> Connection:
        return Connection(self, self._loop)

    def _handshake(self) -> Handshake:
        assert self._files.tls is not None  # noqa: S101 - for the type checker: only with TLS
        return Handshake(self._files.tls, secs_max=self._settings.header_secs_max, becomes=self._connection)

    def _turned_away(self, peer: str, limit: str = "bodies") -> None:
        self.metrics.connections_closed[limit].inc()
        now = self._loop.time()
        if now >= self._turned_away_at:
            self._turned_away_at = now + TELL_SECS
            log.error("sender turned away, what it had is lost", peer=peer, limit=limit)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECS)
            now = self._loop.time()
            for connection in self.server.connections:
                if isinstance(connection, Connection) and connection.overdue(
                    now, self._settings.header_secs_max
                ):
                    self.metrics.connections_closed["header_timeout"].inc()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)  # noqa: S101 - for the type checker: made by _connection
        connection.busy = True
        body = b""
        response: web.Response
        try:
            if request.method != "POST":
                response = other_methods(request)
            elif self._files.credentials is not None and self._is_stranger(request, connection.peer):
                response = unauthorised()
            elif request.content.is_eof():  # Falco's: header and body came at once
                body, refusal = self._bodies.whole(request, connection.peer)
                self._bodies.bytes += len(body)
                try:
                    response = refusal or await self._answer(request, body, connection)
                finally:
                    self._bodies.bytes -= len(body)
            else:
                with self._bodies.claim(connection.peer) as claim:
                    body, refusal = await self._bodies.read(request, claim)
                    response = refusal or await self._answer(request, body, connection)
        except Exception:
            # The outer boundary: a fault of ours must not take the listener with it.
            log.exception("request failed")
            response = refuse(500, "internal error")
        finally:
            connection.answered(body or HEADER_END)
        if self._draining or self._loop.time() >= connection.expires_at:
            response = self._last(response)
        if response.status == HTTP_OK:
            self._ok += 1
        else:
            self.metrics.requests[response.status].inc()
        return response

    def _last(self, response: web.Response) -> web.Response:
        """The answer that ends its connection: on drain, or because of its age."""
        if not self._draining:
            self.metrics.connections_closed["age"].inc()
        if response is self._stored:
            return self._stored_closing
        response.force_close()
        return response

    def _is_stranger(self, request: web.BaseRequest, peer: str) -> bool:
        """Whether credentials are asked for, and these are none of them. Falco does not look at a 401: it is told to people."""
        credentials = self._files.credentials
        reason = credentials.refuses(request.headers.get("Authorization")) if credentials else ""
        if reason:
            self.metrics.auth_failures[reason].inc()
            now = self._loop.time()
            if now >= self._stranger_at:
                self._stranger_at = now + TELL_SECS
                log.warning("sender without valid credentials", peer=peer, why=reason)
        return bool(reason)

    async def _answer(self, request: web.BaseRequest, body: bytes, connection: Connection) -> web.Response:
        if request.path == "/test":
            body = alert_of_test(self._now_ns())
        answer = await self._ingest.take(body, connection.peer)
        connection.useful = connection.useful or answer is STORED
        return self._stored if answer is STORED and keeps(request) else response_to(answer)
