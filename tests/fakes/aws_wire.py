"""From HTTP to an operation of the fake AWS and back, in the three wire protocols.

CloudWatch Logs speaks JSON 1.1 (operation in X-Amz-Target, gzip bodies accepted), Security Hub REST JSON
(operation by method and path), STS the Query protocol (form with `Action`, answers in XML). Also the
broken answers: `drop` resets the connection, `cut_short` sends half of a body and hangs up.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl
from uuid import uuid4

from aiohttp import web

from tests.fakes.aws_common import CONTENT_TYPES, JSON_1_1, AwsError, Protocol, load_json

if TYPE_CHECKING:
    from tests.fakes.aws_sigv4 import RawRequest

LOGS_TARGET = "Logs_20140328."
_HUB_ROUTES = {
    ("POST", "/findings/import"): "BatchImportFindings",
    ("POST", "/findings"): "GetFindings",
    ("GET", "/accounts"): "DescribeHub",
    ("POST", "/accounts"): "EnableSecurityHub",
    ("DELETE", "/accounts"): "DisableSecurityHub",
    ("GET", "/productSubscriptions"): "ListEnabledProductsForImport",
}


@dataclass(frozen=True, slots=True)
class Route:
    """The service, operation and protocol a request is meant for."""

    service: Literal["logs", "securityhub", "sts"]
    operation: str
    protocol: Protocol


def _is_form(wire: RawRequest) -> bool:
    return (wire.header("content-type") or "").startswith("application/x-www-form-urlencoded")


def _form(wire: RawRequest) -> dict[str, str]:
    return dict(parse_qsl(wire.body.decode(errors="replace"), keep_blank_values=True))


def identify(wire: RawRequest) -> Route:
    """Which operation a request means; the operation is "unknown" when it names none."""
    target = wire.header("x-amz-target")
    if target is not None:
        return Route("logs", target.removeprefix(LOGS_TARGET), "json")
    if _is_form(wire):
        return Route("sts", _form(wire).get("Action", "unknown"), "query")
    path = wire.target.partition("?")[0]
    return Route("securityhub", _HUB_ROUTES.get((wire.method, path), "unknown"), "rest-json")


def parse(wire: RawRequest, route: Route) -> dict[str, Any]:
    """The parameters of the request."""
    if route.protocol == "query":
        form = _form(wire)
        if wire.method != "POST" or form.pop("Version", None) != "2011-06-15":
            raise AwsError("InvalidAction", f"Could not find operation {route.operation}")
        form.pop("Action", None)
        return dict(form)
    media_type = (wire.header("content-type") or "").partition(";")[0].strip()
    body = wire.body
    if route.protocol == "json":
        target = wire.header("x-amz-target") or ""
        if wire.method != "POST" or media_type != JSON_1_1 or not target.startswith(LOGS_TARGET):
            raise AwsError("UnknownOperationException", "Logs take JSON 1.1 by POST")
        if (wire.header("content-encoding") or "").lower() == "gzip":
            try:
                body = gzip.decompress(body)
            except (OSError, EOFError, zlib.error) as error:
                raise AwsError("SerializationException", f"The body is not gzip: {error}") from error
    elif body and media_type != "application/json":
        raise AwsError("UnsupportedMediaTypeException", f"Unsupported media type {media_type!r}", 415)
    return load_json(body)


def count_of(body: dict[str, Any]) -> int:
    """How many events or findings a request carries."""
    items = body.get("logEvents", body.get("Findings"))
    return len(items) if isinstance(items, list) else 0


def respond(route: Route, answer: dict[str, Any] | str, error: AwsError | None) -> web.Response:
    request_id = str(uuid4())
    headers = {"x-amzn-RequestId": request_id, "Content-Type": CONTENT_TYPES[route.protocol]}
    if error is not None:
        if route.protocol == "rest-json":
            headers["x-amzn-ErrorType"] = error.code
        return web.Response(status=error.status, body=error.body(route.protocol, request_id), headers=headers)
    if isinstance(answer, str):
        name = route.operation
        body = (
            f'<{name}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{name}Result>{answer}'
            f"</{name}Result><ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata>"
            f"</{name}Response>"
        ).encode()
    else:
        body = json.dumps(answer).encode()
    return web.Response(body=body, headers=headers)


def drop(request: web.Request) -> web.Response:
    """Reset the connection; the returned response goes nowhere."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if isinstance(request.transport, asyncio.WriteTransport):
            request.transport.abort()
    return web.Response(status=500)


def cut_short(request: web.Request, response: web.Response) -> web.Response:
    """Send the answer with half of its body and hang up; the returned response goes nowhere."""
    body = response.body
    if isinstance(body, bytes) and isinstance(request.transport, asyncio.WriteTransport):
        head = f"HTTP/1.1 {response.status} {response.reason}\r\nContent-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
        request.transport.write(head.encode() + b"\r\n" + body[: len(body) // 2])
        request.transport.close()
    return response
