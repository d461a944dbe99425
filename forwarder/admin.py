"""The second port: probes, metrics, and what a person wants to see at 3 a.m.

``/livez``         200 while the event loop and the spool's writer thread move.
``/readyz``        200 while a new alert can be stored durably. Never depends on AWS: an outage there must not
                   take all replicas out of the Service, which would lose alerts for real.
``/metrics``       Prometheus.
``/status``        JSON: the spool and every sink.
``/sensors``       JSON: which nodes' Falco this replica heard, and when; the other replicas ask it.
``/dead-letters``  JSON list, newest first; ``?limit=`` (1000 at most) and ``?before=`` (a ``number``) page on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Protocol

import msgspec
from aiohttp import web
from prometheus_client import exposition

from forwarder.alert import encode
from forwarder.config import setting
from forwarder.listening import everywhere
from forwarder.metrics import Metrics
from forwarder.record import DeadLetter
from forwarder.timestamp import iso_milliseconds

DEAD_LETTERS_DEFAULT = 100
DEAD_LETTER_BODY_BYTES_MAX = 65_536
SHUTDOWN_SECS_MAX = 1.0
BACKLOG = 128


class AdminSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the admin port."""

    host: Annotated[str, setting("Address to listen on; all, IPv4 and IPv6, where it is empty.")] = ""
    port: Annotated[
        int, setting("Port of probes, metrics and status; 0 takes a free one.", ge=0, le=65535)
    ] = 8080


class Inside(Protocol):
    """What the admin port may ask of the application."""

    metrics: Metrics

    def alive(self) -> str:
        """Why the process should be restarted, or nothing."""

    def ready(self) -> str:
        """Why no alert can be stored now, or nothing."""

    def status(self) -> dict[str, Any]:
        """The body of ``/status``."""

    def sensors_heard(self) -> dict[str, Any]:
        """The body of ``/sensors``."""

    def publish(self) -> None:
        """Bring gauges up to date."""

    async def dead_letters(self, before: int, limit: int) -> list[tuple[int, DeadLetter]]:
        """Newest first."""


class Admin:
    """Serves the admin port."""

    def __init__(self, settings: AdminSettings, inside: Inside) -> None:
        self._settings = settings
        self._inside = inside
        self.port = 0

    async def start(self) -> None:
        """Listen; raises ``OSError`` where the port is taken."""
        application = web.Application()
        for path, answer in (
            ("/livez", self._livez),
            ("/readyz", self._readyz),
            ("/metrics", self._metrics),
            ("/status", self._status),
            ("/sensors", self._sensors),
            ("/dead-letters", self._dead_letters),
        ):
            application.router.add_get(path, _answering(answer))
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_SECS_MAX)
        await self._runner.setup()
        host, port = self._settings.host, self._settings.port
        site: web.BaseSite
        if host:
            site = web.TCPSite(self._runner, host, port)
        else:
            site = web.SockSite(self._runner, everywhere(port, BACKLOG))
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _livez(self, _: web.Request) -> web.Response:
        return _probe(self._inside.alive())

    async def _readyz(self, _: web.Request) -> web.Response:
        return _probe(self._inside.ready())

    async def _metrics(self, request: web.Request) -> web.Response:
        self._inside.publish()
        encoder, content_type = exposition.choose_encoder(request.headers.get("Accept", ""))
        return web.Response(
            body=encoder(self._inside.metrics.registry), headers={"Content-Type": content_type}
        )

    async def _status(self, _: web.Request) -> web.Response:
        return _json(self._inside.status())

    async def _sensors(self, _: web.Request) -> web.Response:
        return _json(self._inside.sensors_heard())

    async def _dead_letters(self, request: web.Request) -> web.Response:
        try:
            limit = int(request.query.get("limit", DEAD_LETTERS_DEFAULT))
            before = int(request.query.get("before", 2**62))
        except ValueError:
            return _json({"error": "limit and before are integers"}, status=400)
        letters = await self._inside.dead_letters(min(max(before, 0), 2**62), min(max(limit, 1), 1000))
        return _json([_letter(number, letter) for number, letter in letters])


def _answering(answer: Callable[[web.Request], Awaitable[web.Response]]) -> Any:
    return answer


def _probe(trouble: str) -> web.Response:
    return web.Response(status=503 if trouble else 200, text=f"{trouble or 'ok'}\n")


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=encode(value) + b"\n", content_type="application/json")


def _letter(number: int, letter: DeadLetter) -> dict[str, Any]:
    body = letter.body[:DEAD_LETTER_BODY_BYTES_MAX]
    return {
        "number": number,
        "id": letter.id,
        "sink": letter.sink,
        "reason": letter.reason,
        "detail": letter.detail,
        "time": iso_milliseconds(int(letter.at * 1e9)),
        "body": body.decode("utf-8", "replace"),
        "body_bytes": len(letter.body),
    }
