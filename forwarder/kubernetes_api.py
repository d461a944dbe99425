"""The Kubernetes API over plain aiohttp: one request, an answer to read piece by piece, and errors by what they mean.

No client library: none of those for Python has what matters here (a watch that never goes stale unnoticed), and each costs
40 MB (see docs/decisions). What this module knows of the protocol: the bearer token, content negotiation for metadata only,
``Status`` bodies of errors, and that a connection may die without a word, so every read has a limit and the socket is probed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import msgspec

from forwarder import __version__
from forwarder.alert import encode
from forwarder.kubernetes_access import Access, AccessError

CONNECT_SECS_MAX = 10.0
ANSWER_SECS_MAX = 30.0
"""For requests that are no lists or watches."""
CONNECTIONS_MAX = 16
ERROR_BYTES_MAX = 65_536
ANSWER_BYTES_MAX = 4 << 20
KEEP_ALIVE_SECS, KEEP_ALIVE_EVERY_SECS, KEEP_ALIVE_COUNT = 30, 10, 3
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"

_UNAUTHORIZED, _FORBIDDEN, _GONE, _THROTTLED, _ERRORS = 401, 403, 410, 429, 400
_SERVER_ERRORS = 500


class ApiError(Exception):
    """The API server says no, or does not say anything. ``reason`` is one of ``metrics.WATCH_RESTARTS``."""

    def __init__(self, reason: str, message: str, *, status: int = 0, delay_secs: float = 0.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status
        self.delay_secs = delay_secs
        """The server's own wish (Retry-After), a lower bound for the back-off."""


class _Cause(msgspec.Struct, frozen=True):
    reason: str = ""


class _Details(msgspec.Struct, frozen=True):
    causes: list[_Cause] | None = None


class Status(msgspec.Struct, frozen=True):
    """The API's own word for what went wrong (``kind: Status``)."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: _Details | None = None


_status = msgspec.json.Decoder(Status)


class Api:
    """Requests to one API server."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._session: aiohttp.ClientSession | None = None

    @property
    def server(self) -> str:
        return self.access.source.server

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @contextlib.asynccontextmanager
    async def stream(
        self,
        path: str,
        parameters: Mapping[str, str],
        *,
        accept: str = "application/json",
        read_secs: float = ANSWER_SECS_MAX,
        body: bytes | None = None,
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """The body of a good answer, to be read while it arrives; no single read takes longer than ``read_secs``.

        Raises:
            ApiError: the answer is an error, or there is none; also out of reads within the block.

        """
        try:
            credentials = await self.access.credentials()
            # Not compressed: the network is near, and a compressed page would arrive in one indigestible piece.
            headers = {"Accept": accept, "Accept-Encoding": "identity"}
            if credentials.token:
                headers["Authorization"] = f"Bearer {credentials.token}"
            if body is not None:
                headers["Content-Type"] = "application/json"
            async with self._opened().request(
                "GET" if body is None else "POST",
                self.server + path,
                params=parameters,
                headers=headers,
                data=body,
                ssl=credentials.tls,
                server_hostname=self.access.source.server_name,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECS_MAX, sock_read=read_secs),
            ) as response:
                if response.status >= _ERRORS:
                    raise await self._refused(response, credentials.token)
                yield response.content
        except ApiError:
            raise
        except AccessError as error:
            raise ApiError("credentials", str(error)) from error
        except TimeoutError as error:
            raise ApiError("timeout", f"no answer from {self.server} in time") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise ApiError("network", f"{self.server}: {text}") from error

    async def ask(self, path: str, body: bytes | None = None) -> bytes:
        """A whole small answer. Raises ``ApiError``."""
        data = bytearray()
        async with limited(ANSWER_SECS_MAX), self.stream(path, {}, body=body) as content:
            async for chunk in content.iter_any():
                data += chunk
                if len(data) > ANSWER_BYTES_MAX:
                    raise ApiError("decode", f"answer to {path} is larger than {ANSWER_BYTES_MAX} bytes")
        return bytes(data)

    async def may(self, verb: str, group: str, resource: str) -> bool:
        """SelfSubjectAccessReview: whether we may do that in all namespaces. Raises ``ApiError``."""
        attributes = {"verb": verb, "group": group, "resource": resource}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        try:
            answer = msgspec.json.decode(await self.ask(REVIEWS, encode(review)))
            return answer["status"]["allowed"] is True
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise ApiError("decode", f"not a review: {error}") from error

    async def _refused(self, response: aiohttp.ClientResponse, token: str) -> ApiError:
        if response.status == _UNAUTHORIZED:
            self.access.refused()
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > ERROR_BYTES_MAX:
                break
        status = status_of(bytes(data))
        try:
            delay = float(response.headers.get("Retry-After", 0))
        except ValueError:
            delay = 0.0
        message = (status.message if status else "") or data[:200].decode("utf-8", "replace")
        if token:
            message = message.replace(token, "***")  # a proxy may repeat what it was asked
        return ApiError(
            reason_of(response.status, status),
            f"{response.status}: {' '.join(message.split())[:500]}",
            status=response.status,
            delay_secs=delay,
        )

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, socket_factory=_probed_socket),
                headers={"User-Agent": f"falco-aws-forwarder/{__version__}"},
                trust_env=False,
            )
        return self._session


@contextlib.asynccontextmanager
async def limited(secs: float) -> AsyncIterator[None]:
    """All of it within ``secs``, however slowly it comes; raises ``ApiError``."""
    try:
        async with asyncio.timeout(secs):
            yield
    except TimeoutError as error:
        raise ApiError("timeout", f"not over within {secs:.0f} s") from error


def status_of(data: bytes) -> Status | None:
    """A ``Status`` object, if it is one."""
    try:
        return _status.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def reason_of(code: int, status: Status | None) -> str:
    """What an error means for the reflector, as one of ``metrics.WATCH_RESTARTS``."""
    causes = status.details.causes if status and status.details and status.details.causes else ()
    if any(cause.reason == "ResourceVersionTooLarge" for cause in causes):
        return "too_new"
    named = {
        _UNAUTHORIZED: "credentials",
        _FORBIDDEN: "permission",
        _GONE: "expired",
        _THROTTLED: "throttled",
    }
    if code in named:
        return named[code]
    return "unavailable" if code >= _SERVER_ERRORS else "refused"


def _probed_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket that notices when the other side is gone without a word, as behind a load balancer."""
    family, kind, protocol, *_ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEP_ALIVE_SECS),
        ("TCP_KEEPINTVL", KEEP_ALIVE_EVERY_SECS),
        ("TCP_KEEPCNT", KEEP_ALIVE_COUNT),
    ):
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made
