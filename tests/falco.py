"""A client that posts as Falco's libcurl does, byte for byte, and one that posts whatever it is told.

Falco keeps one connection, has one request in flight on it, and looks at no status. A kept-alive connection that
turns out to be closed before a byte of an answer came is replaced, and the very same bytes are sent again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from types import TracebackType
from typing import NamedTuple, Self

ANSWER_SECS_MAX = 20.0
EXPECT_BYTES_MIN = (1 << 20) + 1
"""From this size on libcurl 8 asks first (``Expect: 100-continue``)."""
CONTINUE_SECS_MAX = 1.0


class Answer(NamedTuple):
    """One answer, read to its end. Header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class _NoAnswerError(ConnectionError):
    """Closed before the first byte of an answer."""


class Falco:
    """One sender."""

    def __init__(
        self,
        port: int,
        *,
        path: str = "/",
        content_type: str = "application/json",
        compress_uploads: bool = False,
        expect: bool | None = None,
        reuse: bool = True,
        tls: ssl.SSLContext | None = None,
        userinfo: str = "",
    ) -> None:
        """``reuse`` False is Falco up to 0.35: a connection for every alert. ``expect`` None asks as libcurl does.

        ``userinfo`` is the ``user:password`` of an URL: libcurl sends it with the first request, no 401 is waited for.
        """
        self._tls = tls
        self._userinfo = userinfo
        self._port = port
        self._path = path
        self._content_type = content_type
        self._compress_uploads = compress_uploads
        self._expect = expect
        self._reuse = reuse
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.connections = 0
        """How many were opened."""
        self.continued = 0
        """How often the server said 100 Continue."""
        self.resent = 0

    async def post(self, body: bytes) -> Answer:
        """Send one alert, wait for its answer."""
        reused = self._streams is not None
        try:
            async with asyncio.timeout(ANSWER_SECS_MAX):
                return await self._exchange(body)
        except (_NoAnswerError, ConnectionResetError, BrokenPipeError):
            if not reused:
                raise
        self.resent += 1
        await self.close()
        async with asyncio.timeout(ANSWER_SECS_MAX):
            return await self._exchange(body)

    async def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            await close(streams[1])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def head(self, body: bytes) -> bytes:
        """The request's header, as Falco 0.44 sends it."""
        lines = [
            f"POST {self._path} HTTP/1.1",
            f"Host: 127.0.0.1:{self._port}",
            "User-Agent: falcosecurity/falco",
            "Accept: */*",
        ]
        if self._userinfo:
            lines.insert(2, f"Authorization: Basic {base64.b64encode(self._userinfo.encode()).decode()}")
        if self._compress_uploads:
            lines += ["Connection: TE", "TE: gzip"]
        lines += [f"Content-Type: {self._content_type}", f"Content-Length: {len(body)}"]
        if self._asks_first(body):
            lines.append("Expect: 100-continue")
        return "\r\n".join([*lines, "", ""]).encode()

    def _asks_first(self, body: bytes) -> bool:
        return len(body) >= EXPECT_BYTES_MIN if self._expect is None else self._expect

    async def _exchange(self, body: bytes) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._tls)
            self.connections += 1
        reader, writer = self._streams
        writer.write(self.head(body))
        answer: Answer | None = None
        if self._asks_first(body):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONTINUE_SECS_MAX):
                    answer = await read_answer(reader)
            if answer is not None and answer.status == 100:
                self.continued += 1
                answer = None
        if answer is None:
            writer.write(body)
            await writer.drain()
            answer = await read_answer(reader)
        if not self._reuse or answer.headers.get("connection", "").lower() == "close":
            await self.close()
        return answer


async def close(writer: asyncio.StreamWriter) -> None:
    """Close a connection, whatever state it is in."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next answer; raises ``ConnectionError`` where there is none."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        raise _NoAnswerError(f"closed after {error.partial!r}") from error
    status, *lines = head.decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(status.split()[1]), headers, body)


async def send_raw(port: int, *parts: bytes, pause_secs: float = 0.0) -> Answer:
    """Send these bytes on a connection of their own and read one answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def write() -> None:
        with contextlib.suppress(ConnectionError):  # the answer may come before the last byte
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_secs)

    writing = asyncio.create_task(write())
    try:
        async with asyncio.timeout(ANSWER_SECS_MAX):
            return await read_answer(reader)
    finally:
        writing.cancel()
        await asyncio.wait([writing])
        await close(writer)


async def get(port: int, path: str, *headers: str, method: str = "GET") -> Answer:
    """A request without a body."""
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""])
    return await send_raw(port, head.encode())


def request(body: bytes, *headers: str, path: str = "/", length: int | str | None = None) -> bytes:
    """A POST as bytes; ``length`` is what Content-Length claims, nothing at all where it is empty."""
    claimed = len(body) if length is None else length
    lines = [f"POST {path} HTTP/1.1", "Host: x", *headers]
    if claimed != "":
        lines.append(f"Content-Length: {claimed}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def is_one_line_error(answer: Answer) -> bool:
    """Whether the body is the JSON object of a refusal: one line for a person to read."""
    error = json.loads(answer.body)
    return list(error) == ["error"] and bool(error["error"]) and b"\n" not in answer.body.rstrip(b"\n")
