"""What a mapping reads of a spooled alert: its members in one typed decode, odd ones one by one. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from forwarder.alert import decode

_members = msgspec.json.Decoder(dict[str, Raw])
_values = msgspec.json.Decoder(float_hook=str)


class Spooled(msgspec.Struct, frozen=True):
    """What a mapping needs of a spooled alert. Absent values are ``""`` or empty."""

    rule: str | None = None
    priority: str | None = None
    time: str | None = None
    source: str | None = None
    hostname: str | None = None
    output: str | None = None
    message: str | None = None
    tags: list[str] | None = None
    output_fields: dict[str, Any] | None = None
    """Integers exact, floats as the text they were sent as."""


_spooled = msgspec.json.Decoder(Spooled, float_hook=str)


def read(body: bytes) -> Spooled:
    """The alert of a spooled body, which ``alert.decode`` let pass once."""
    try:
        return _spooled.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        (alert,) = decode(body).alerts
        return Spooled(
            rule=alert.rule,
            priority=alert.priority,
            time=alert.time,
            source=alert.source,
            hostname=alert.hostname,
            output=alert.output,
            tags=list(alert.tags),
            output_fields=fields(alert.fields),
        )


def fields(raw: Raw) -> dict[str, Any]:
    """Members of ``output_fields`` that does not decode at once: what can be read of it, odd values as sent."""
    try:
        members = _members.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        return {}
    values: dict[str, Any] = {}
    for key, member in members.items():
        try:
            values[key] = _values.decode(member)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            values[key] = bytes(member).decode("utf-8", "replace")
    return values
