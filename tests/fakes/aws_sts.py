"""The security token service of the fake: who am I, and two ways to become somebody else.

Rules from the STS API reference. A role's external id is what its trust policy would demand; the fake
takes it from `roles` (role ARN -> external id or None). While `roles` is empty every role may be assumed.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from tests.fakes.aws_common import AwsError, Caller
from tests.fakes.aws_sigv4 import Credential

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_ROLE_ARN = re.compile(r"arn:[a-z-]+:iam::(\d{12}):role/(?:[\w+=,.@/-]*/)?([\w+=,.@-]{1,64})")
_SESSION_NAME = re.compile(r"[\w+=,.@-]{2,64}", re.ASCII)
_EXTERNAL_ID = re.compile(r"[\w+=,.@:/-]{2,1224}", re.ASCII)


class Sts:
    """Issues session credentials into the table of known credentials."""

    def __init__(self, *, partition: str, clock: Callable[[], float], known: dict[str, Credential]) -> None:
        self._partition = partition
        self._clock = clock
        self._known = known
        self.roles: dict[str, str | None] = {}
        self.operations: dict[str, Callable[[Mapping[str, str], Caller], str]] = {
            "GetCallerIdentity": self.get_caller_identity,
            "AssumeRole": self.assume_role,
        }

    def get_caller_identity(self, form: Mapping[str, str], caller: Caller) -> str:
        return f"<UserId>{caller.user_id}</UserId><Account>{caller.account}</Account><Arn>{escape(caller.arn)}</Arn>"

    def assume_role(self, form: Mapping[str, str], caller: Caller) -> str:
        role = _text(form, "RoleArn", 20, 2048)
        external_id = form.get("ExternalId")
        if external_id is not None and not _EXTERNAL_ID.fullmatch(external_id):
            raise _invalid(
                "externalId", external_id, r"Member must satisfy regular expression pattern: [\w+=,.@:\/-]*"
            )
        denied = self.roles and (
            role not in self.roles or (self.roles[role] is not None and self.roles[role] != external_id)
        )
        if denied or not _ROLE_ARN.fullmatch(role):
            raise AwsError(
                "AccessDenied",
                f"User: {caller.arn} is not authorized to perform: sts:AssumeRole on resource: {role}",
                403,
            )
        return self._session(form, role)

    def assume_role_with_web_identity(self, form: Mapping[str, str]) -> str:
        role = _text(form, "RoleArn", 20, 2048)
        token = _text(form, "WebIdentityToken", 4, 20000)
        expires, subject = _read_jwt(token)
        if expires is not None and expires <= self._clock():
            raise AwsError(
                "ExpiredTokenException", "Token expired: current date/time must be before the expiration"
            )
        if not _ROLE_ARN.fullmatch(role) or (self.roles and role not in self.roles):
            raise AwsError("AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity", 403)
        subject_xml = f"<SubjectFromWebIdentityToken>{escape(subject)}</SubjectFromWebIdentityToken>"
        return self._session(form, role) + subject_xml

    def _session(self, form: Mapping[str, str], role: str) -> str:
        name = _text(form, "RoleSessionName", 2, 64)
        if not _SESSION_NAME.fullmatch(name):
            raise _invalid(
                "roleSessionName", name, r"Member must satisfy regular expression pattern: [\w+=,.@-]*"
            )
        duration = form.get("DurationSeconds", "3600")
        if not duration.isdecimal() or not 900 <= int(duration) <= 43200:
            raise _invalid("durationSeconds", duration, "Member must have value between 900 and 43200")
        found = _ROLE_ARN.fullmatch(role)
        assert found
        account, role_name = found.groups()
        role_id = f"AROA{secrets.token_hex(8).upper()}:{name}"
        arn = f"arn:{self._partition}:sts::{account}:assumed-role/{role_name}/{name}"
        key = f"ASIA{secrets.token_hex(8).upper()}"
        secret, token = secrets.token_urlsafe(30), secrets.token_urlsafe(60)
        expires = self._clock() + int(duration)
        self._known[key] = Credential(secret, Caller(account, arn, role_id), token, expires)
        until = datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return (
            f"<AssumedRoleUser><AssumedRoleId>{role_id}</AssumedRoleId><Arn>{escape(arn)}</Arn></AssumedRoleUser>"
            f"<Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>"
            f"<SessionToken>{token}</SessionToken><Expiration>{until}</Expiration></Credentials>"
        )


def _invalid(member: str, value: str, rule: str) -> AwsError:
    text = f"1 validation error detected: Value '{value}' at '{member}' failed to satisfy constraint: {rule}"
    return AwsError("ValidationError", text)


def _text(form: Mapping[str, str], name: str, least: int, most: int) -> str:
    value = form.get(name)
    member = name[0].lower() + name[1:]
    if value is None:
        raise _invalid(member, "null", "Member must not be null")
    if not least <= len(value) <= most:
        raise _invalid(member, value, f"Member must have length between {least} and {most}")
    return value


def _read_jwt(token: str) -> tuple[float | None, str]:
    """Expiry and subject of a JSON web token; the fake does not know the issuer's keys."""
    parts = token.split(".")
    if len(parts) != 3 or not all(parts):
        raise AwsError(
            "InvalidIdentityToken",
            "The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)",
        )
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, binascii.Error):
        claims = {}  # an opaque test token; only its outer form is checked
    if not isinstance(claims, dict):
        claims = {}
    expires = claims.get("exp")
    return (expires if isinstance(expires, int) else None), str(claims.get("sub", "unknown"))
