"""What every part of the fake AWS shares: service errors, caller identities, token buckets and faults.

The error shapes of the three wire protocols come from the protocol descriptions of the AWS service
models: JSON 1.1 (CloudWatch Logs), REST JSON (Security Hub) and Query (STS).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Callable

Protocol = Literal["json", "rest-json", "query"]
JSON_1_1 = "application/x-amz-json-1.1"
CONTENT_TYPES: dict[Protocol, str] = {"json": JSON_1_1, "rest-json": "application/json", "query": "text/xml"}


class AwsError(Exception):
    """A refusal as the service words it: error code, HTTP status and text."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status

    def body(self, protocol: Protocol, request_id: str) -> bytes:
        if protocol == "query":
            fault = "Sender" if self.status < 500 else "Receiver"
            return (
                '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error>'
                f"<Type>{fault}</Type><Code>{escape(self.code)}</Code>"
                f"<Message>{escape(self.message)}</Message></Error>"
                f"<RequestId>{request_id}</RequestId></ErrorResponse>"
            ).encode()
        if protocol == "json":
            return json.dumps({"__type": self.code, "message": self.message}).encode()
        if self.code in ("TooManyRequestsException", "MissingAuthenticationTokenException"):
            # The API gateway in front of the service answers these and has its own shape.
            return json.dumps({"message": self.message}).encode()
        return json.dumps({"Message": self.message, "Code": self.code}).encode()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who signed a request."""

    account: str
    arn: str
    user_id: str


@dataclass(frozen=True, slots=True)
class LogEvent:
    """A stored log event; `ingested` is the fake's clock in seconds."""

    timestamp: int
    message: str
    ingested: float


@dataclass(slots=True)
class LogGroup:
    """A log group with its streams; the events of a stream are in order of arrival."""

    name: str
    retention_days: int | None = None
    kms_key_id: str | None = None
    group_class: str = "STANDARD"
    tags: dict[str, str] = field(default_factory=dict)
    streams: dict[str, list[LogEvent]] = field(default_factory=dict)
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """One finished request. `status` is 0 when the connection was closed without an answer."""

    service: str
    operation: str
    status: int
    error: str | None
    count: int
    body_bytes: int
    at: float


class TokenBucket:
    """Requests per second with a burst, on a clock that tests may set."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._tokens = burst
        self._seen = clock()

    def take(self) -> bool:
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + max(0.0, now - self._seen) * self.rate)
        self._seen = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def is_utf8(text: str) -> bool:
    """Whether a string decoded from JSON can be written as UTF-8 (no half of a surrogate pair)."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_json(raw: bytes) -> dict[str, Any]:
    """The request object; what is not strict JSON in UTF-8 is refused."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        value = json.loads(raw.decode() or "{}", parse_constant=refuse)
    except ValueError as error:
        raise AwsError("SerializationException", f"The request body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AwsError("SerializationException", "Unexpected token: the request must be an object")
    return value
