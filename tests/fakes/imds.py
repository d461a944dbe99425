"""A strict fake of the EC2 instance metadata service, version 2 only, for tests.

Written from the EC2 user guide ("Use IMDSv2", "Retrieve instance metadata", "Instance identity documents") and shares no code
with the client. Rules: PUT /latest/api/token with a TTL of 1 to 21,600 seconds, or 400; a PUT that came through a proxy
(X-Forwarded-For) is refused with 403, as is one to a versioned path; every GET needs a token that has not ended, or 401;
switched off, everything is 403. ``hop_limit_1`` never answers a PUT, as a pod sees it: the packet's time to live ends on
the way. The clock decides about tokens.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER = "X-aws-ec2-metadata-token"
TTL_SECS_MAX = 21_600


class FakeImds:
    """The service, its state, and the handles a test pulls."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.url = ""
        self.enabled = True
        self.hop_limit_1 = False
        self.status = 0
        """Answer everything with it."""
        self.document_body: bytes | None = None
        """Instead of the document."""
        self.token_body: bytes | None = None
        self.truncate = False
        """Hang up after half of a document."""
        self.tokens: dict[str, float] = {}
        """Token -> when it ends. A test may empty it: they are all invalid then."""
        self.issued: list[int] = []
        """The TTLs of all tokens there were, seconds."""
        self.requests: Counter[str] = Counter()
        """``PUT 200``, ``GET 401`` ..."""
        self.document: dict[str, Any] = {
            "accountId": "111122223333",
            "architecture": "x86_64",
            "availabilityZone": "eu-west-1b",
            "billingProducts": None,
            "devpayProductCodes": None,
            "marketplaceProductCodes": None,
            "imageId": "ami-0abcdef1234567890",
            "instanceId": "i-0123456789abcdef0",
            "instanceType": "m7i.large",
            "kernelId": None,
            "pendingTime": "2026-11-19T16:32:11Z",
            "privateIp": "10.0.7.9",
            "ramdiskId": None,
            "region": "eu-west-1",
            "version": "2017-09-30",
        }
        self._runner: web.AppRunner | None = None
        self._stopping = asyncio.Event()

    def environment(self) -> dict[str, str]:
        """The environment that leads a client here."""
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url}

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "PUT" and self.hop_limit_1:
            self.requests["PUT hang"] += 1
            await self._stopping.wait()
        status, body, headers = self._answer(request)
        self.requests[f"{request.method} {status}"] += 1
        if self.truncate and request.method == "GET" and status == 200:
            return await _cut(request, body)
        return web.Response(status=status, body=body, headers={"Content-Type": "text/plain"} | headers)

    def _answer(self, request: web.Request) -> tuple[int, bytes, dict[str, str]]:
        if self.status:
            return self.status, b"", {}
        if not self.enabled:
            return 403, b"", {}
        if request.method == "PUT":
            return self._token(request)
        if request.method != "GET":
            return 405, b"", {}
        token = request.headers.get(TOKEN_HEADER)
        if token is None or self.tokens.get(token, 0.0) <= self.clock():
            return 401, b"", {}
        found = self._data().get(request.path)
        return (404, b"", {}) if found is None else (200, found, {})

    def _token(self, request: web.Request) -> tuple[int, bytes, dict[str, str]]:
        if "X-Forwarded-For" in request.headers or request.path != "/latest/api/token":
            return 403, b"", {}
        ttl = request.headers.get(TTL_HEADER, "")
        if not (ttl.isascii() and ttl.isdecimal() and 1 <= int(ttl) <= TTL_SECS_MAX):
            return 400, b"", {}
        token = secrets.token_urlsafe(40) + "=="
        self.tokens[token] = self.clock() + int(ttl)
        self.issued.append(int(ttl))
        return 200, token.encode() if self.token_body is None else self.token_body, {TTL_HEADER: ttl}

    def _data(self) -> dict[str, bytes]:
        document = self.document_body
        if document is None:
            document = json.dumps(self.document, indent=2).encode()
        return {
            "/latest/dynamic/instance-identity/document": document,
            "/latest/meta-data/instance-id": str(self.document["instanceId"]).encode(),
            "/latest/meta-data/instance-type": str(self.document["instanceType"]).encode(),
            "/latest/meta-data/placement/availability-zone": str(self.document["availabilityZone"]).encode(),
            "/latest/meta-data/placement/region": str(self.document["region"]).encode(),
        }


async def _cut(request: web.Request, body: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(body))})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.close()
    return response
