"""Checks AWS Signature Version 4 of a request the way the services do.

Follows the SigV4 description of the IAM user guide: the canonical request is rebuilt from the raw
request line, headers and body, so a client that signs something else than it sends is found out.
A request may be at most five minutes away from the service's clock. The codes differ by protocol:
JSON services say InvalidSignatureException, Query services SignatureDoesNotMatch.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from tests.fakes.aws_common import AwsError, Caller, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<credential>[^,\s]+),\s*SignedHeaders=(?P<headers>[^,\s]+),\s*"
    r"Signature=(?P<signature>[0-9a-f]{64})"
)
_DATE = "%Y%m%dT%H%M%SZ"
_MISMATCH = (
    "The request signature we calculated does not match the signature you provided. Check your AWS "
    "Secret Access Key and signing method. Consult the service documentation for details."
)


@dataclass(frozen=True, slots=True)
class Credential:
    """A key pair the fake knows; session credentials have a token and end."""

    secret: str
    caller: Caller
    token: str | None = None
    expires: float | None = None


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request as it came over the wire."""

    method: str
    target: str
    headers: Mapping[str, list[str]]
    body: bytes

    def header(self, name: str) -> str | None:
        values = self.headers.get(name)
        return ",".join(values) if values else None


def scope_of(request: RawRequest) -> list[str] | None:
    """[access key, date, region, service, "aws4_request"] of the Authorization header."""
    found = _AUTHORIZATION.fullmatch(request.header("authorization") or "")
    parts = found["credential"].split("/") if found else []
    return parts if len(parts) == 5 else None


def _error(protocol: Protocol, code: str, message: str) -> AwsError:
    query = {
        "InvalidSignatureException": "SignatureDoesNotMatch",
        "UnrecognizedClientException": "InvalidClientTokenId",
        "ExpiredTokenException": "ExpiredToken",
        "MissingAuthenticationTokenException": "MissingAuthenticationToken",
        "IncompleteSignatureException": "IncompleteSignature",
    }
    return AwsError(query[code] if protocol == "query" else code, message, 400 if protocol == "json" else 403)


def _canonical_query(query: str) -> str:
    pairs = []
    for part in query.split("&") if query else []:
        name, _, value = part.partition("=")
        pairs.append((quote(unquote(name), safe="-_.~"), quote(unquote(value), safe="-_.~")))
    return "&".join(f"{name}={value}" for name, value in sorted(pairs))


def _canonical_request(request: RawRequest, signed: list[str], payload_hash: str) -> str:
    path, _, query = request.target.partition("?")
    headers = "".join(
        f"{name}:{','.join(' '.join(value.split()) for value in request.headers[name])}\n" for name in signed
    )
    return "\n".join(
        (
            request.method,
            quote(path, safe="/-_.~"),
            _canonical_query(query),
            headers,
            ";".join(signed),
            payload_hash,
        )
    )


def _check_skew(stamp: str, now: float, max_skew: float, protocol: Protocol) -> None:
    try:
        signed_at = datetime.strptime(stamp, _DATE).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise _error(
            protocol,
            "IncompleteSignatureException",
            f"Date must be in ISO-8601 'basic format'. Got '{stamp}'.",
        ) from None

    def show(seconds: float) -> str:
        return datetime.fromtimestamp(seconds, UTC).strftime(_DATE)

    if signed_at < now - max_skew:
        text = f"Signature expired: {stamp} is now earlier than {show(now - max_skew)} ({show(now)} - 5 min.)"
        raise _error(protocol, "InvalidSignatureException", text)
    if signed_at > now + max_skew:
        text = f"Signature not yet current: {stamp} is still later than {show(now + max_skew)} ({show(now)} + 5 min.)"
        raise _error(protocol, "InvalidSignatureException", text)


def _check_signed_headers(request: RawRequest, signed: list[str], protocol: Protocol) -> None:
    if signed != sorted(signed) or any(name not in request.headers for name in signed):
        raise _error(protocol, "InvalidSignatureException", _MISMATCH)
    needed = {"host", *(name for name in request.headers if name.startswith("x-amz-"))}
    if missing := sorted(needed.difference(signed)):
        raise _error(
            protocol,
            "InvalidSignatureException",
            f"'{missing[0]}' must be a 'SignedHeader' in the AWS Authorization.",
        )


def _check_credential(
    request: RawRequest, credential: Credential | None, now: float, protocol: Protocol
) -> Credential:
    token = request.header("x-amz-security-token")
    if credential is None or credential.token != token:
        raise _error(
            protocol, "UnrecognizedClientException", "The security token included in the request is invalid."
        )
    if credential.expires is not None and now >= credential.expires:
        raise _error(
            protocol, "ExpiredTokenException", "The security token included in the request is expired"
        )
    return credential


def _payload_hash(request: RawRequest, protocol: Protocol) -> str:
    actual = hashlib.sha256(request.body).hexdigest()
    declared = request.header("x-amz-content-sha256")
    if declared is not None and declared != actual:
        raise _error(protocol, "InvalidSignatureException", _MISMATCH)
    return actual


def verify(
    request: RawRequest,
    *,
    service: str,
    region: str,
    credentials: Mapping[str, Credential],
    now: float,
    max_skew: float,
    protocol: Protocol,
) -> Caller:
    """Who signed the request; raises the error the service would answer."""
    header = request.header("authorization")
    if header is None:
        raise _error(protocol, "MissingAuthenticationTokenException", "Missing Authentication Token")
    found = _AUTHORIZATION.fullmatch(header)
    scope = scope_of(request)
    stamp = request.header("x-amz-date")
    if found is None or scope is None or stamp is None:
        raise _error(
            protocol, "IncompleteSignatureException", "Authorization header requires all of its parts."
        )
    access_key, day, scope_region, scope_service, ending = scope
    credential = _check_credential(request, credentials.get(access_key), now, protocol)
    if scope_region != region:
        raise _error(protocol, "InvalidSignatureException", "Credential should be scoped to a valid region.")
    if scope_service != service:
        raise _error(
            protocol,
            "InvalidSignatureException",
            f"Credential should be scoped to correct service: '{service}'.",
        )
    if ending != "aws4_request" or day != stamp[:8]:
        raise _error(
            protocol, "InvalidSignatureException", "Date in Credential scope does not match X-Amz-Date."
        )
    _check_skew(stamp, now, max_skew, protocol)
    signed = found["headers"].split(";")
    _check_signed_headers(request, signed, protocol)
    canonical = _canonical_request(request, signed, _payload_hash(request, protocol))
    to_sign = "\n".join(
        ("AWS4-HMAC-SHA256", stamp, "/".join(scope[1:]), hashlib.sha256(canonical.encode()).hexdigest())
    )
    key = b"AWS4" + credential.secret.encode()
    for part in (*scope[1:], to_sign):
        key = hmac.digest(key, part.encode(), "sha256")
    if not hmac.compare_digest(key.hex(), found["signature"]):
        raise _error(protocol, "InvalidSignatureException", _MISMATCH)
    return credential.caller
