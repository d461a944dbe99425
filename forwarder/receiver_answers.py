"""What the receiver answers. Falco never looks; people, probes and other senders do."""

from __future__ import annotations

import socket
import time
from email.utils import formatdate

from aiohttp import HttpVersion11, web

from forwarder.alert import encode
from forwarder.ingest import Answer, Outcome
from forwarder.timestamp import iso_milliseconds

RETRY_AFTER_SECS = 5
UNREAD_BYTES_MAX = 64 << 10
"""Of answers that nobody reads."""


class Stored(web.Response):
    """The usual answer: always the same bytes but for the date, so they are not put together for every alert.

    Empty, because before 0.36 Falco prints the body. ``prepare`` and ``write_eof`` are all aiohttp asks of a response.
    """

    def __init__(self, *, closing: bool) -> None:
        super().__init__()
        self._closing = b"Connection: close\r\n" if closing else b""
        self._second = 0
        self._bytes = b""

    @property
    def keep_alive(self) -> bool:
        return not self._closing

    async def prepare(self, request: web.BaseRequest) -> None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the sender left")
        if transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            transport.abort()
            raise ConnectionResetError("the sender reads no answers")
        second = int(time.time())
        if second != self._second:
            date = formatdate(second, usegmt=True).encode()
            self._second = second
            self._bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nDate: %b\r\n%b\r\n" % (
                date,
                self._closing,
            )
        transport.write(self._bytes)

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing follows."""


def other_methods(request: web.BaseRequest) -> web.Response:
    """``GET /ping``, ``GET /healthz`` as falcosidekick has them; nothing else is no POST."""
    if request.body_exists:
        answer = refuse(
            405, "only alerts have a body, and they are posted: POST / with one Falco alert as JSON"
        )
        answer.headers["Allow"] = "POST"
        answer.force_close()
        return answer
    if request.method in {"GET", "HEAD"}:
        if request.path == "/ping":
            return web.Response(text="pong\n")
        if request.path == "/healthz":
            return web.json_response({"status": "ok"})
    answer = refuse(405, "alerts are posted: POST / with one Falco alert as JSON")
    answer.headers["Allow"] = "POST"
    return answer


def keeps(request: web.BaseRequest) -> bool:
    """HTTP/1.1 and no wish to close: the connection stays, and says nothing about it."""
    return request.keep_alive and request.version == HttpVersion11


def response_to(answer: Answer) -> web.Response:
    """What ingest did with a body, as HTTP."""
    if answer.outcome is Outcome.STORED:
        return web.Response()
    if answer.outcome is Outcome.UNPARSED:
        return refuse(400, answer.fault)
    return _later(answer.fault or "no room")


def refuse(status: int, fault: str) -> web.Response:
    """One line of JSON for a person."""
    return web.Response(status=status, body=encode({"error": fault}) + b"\n", content_type="application/json")


def too_many() -> web.Response:
    """The memory for bodies is in use; this one is not read, so the connection ends."""
    answer = _later("too many bytes of bodies at a time")
    answer.force_close()
    return answer


def _later(fault: str) -> web.Response:
    answer = refuse(503, fault)
    answer.headers["Retry-After"] = str(RETRY_AFTER_SECS)
    return answer


def unauthorised() -> web.Response:
    """Whoever has no credentials may not make us read a body: the connection ends."""
    answer = refuse(401, "credentials are missing or wrong: http://USER:PASSWORD@...")
    answer.headers["WWW-Authenticate"] = 'Basic realm="falco-aws-forwarder", charset="UTF-8"'
    answer.force_close()
    return answer


def alert_of_test(now_ns: int) -> bytes:
    """What falcosidekick makes of POST /test: a Debug alert of the rule "Test rule"."""
    return encode(
        {
            "hostname": socket.gethostname(),
            "output": "This is a test from falco-aws-forwarder",
            "output_fields": {"proc.name": "falco-forwarder", "proc.tty": 1234},
            "priority": "Debug",
            "rule": "Test rule",
            "source": "internal",
            "tags": ["test"],
            "time": iso_milliseconds(now_ns)[:-4] + f"{now_ns % 1_000_000_000:09d}Z",
        }
    )
