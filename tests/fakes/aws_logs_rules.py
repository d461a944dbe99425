"""Parameter rules of CloudWatch Logs: names, numbers, tags, and the events of one PutLogEvents call.

From the CloudWatch Logs API reference and its service model; texts as the service writes them.
"""

from __future__ import annotations

import re
from typing import Any

from tests.fakes.aws_common import AwsError, is_utf8

MAX_BATCH_BYTES = 1_048_576
EVENT_OVERHEAD = 26
MAX_EVENTS = 10_000
_GROUP_NAME = re.compile(r"[.\-_/#A-Za-z0-9]+")
_STREAM_NAME = re.compile(r"[^:*]*")
_TAG = re.compile(r"[\w\s.:/=+\-@]*")
_ENTITY_KEYS = frozenset(("Type", "ResourceType", "Identifier", "Name", "Environment"))


def invalid(text: str) -> AwsError:
    return AwsError("InvalidParameterException", text)


def constraint(member: str, value: Any, rule: str) -> AwsError:
    shown = "null" if value is None else str(value)[:600]
    return invalid(
        f"1 validation error detected: Value '{shown}' at '{member}' failed to satisfy constraint: {rule}"
    )


def only_members(body: dict[str, Any], allowed: str) -> None:
    if unknown := sorted(set(body).difference(allowed.split())):
        raise invalid(f"Unknown parameter in input: {unknown}")


def string(body: dict[str, Any], member: str, least: int, most: int) -> str:
    value = body.get(member)
    if value is None:
        raise constraint(member, None, "Member must not be null")
    if not isinstance(value, str) or not is_utf8(value):
        raise AwsError("SerializationException", f"{member} can not be converted to a String")
    if len(value) < least:
        raise constraint(member, value, f"Member must have length greater than or equal to {least}")
    if len(value) > most:
        raise constraint(member, value, f"Member must have length less than or equal to {most}")
    return value


def number(body: dict[str, Any], member: str, least: int, most: int, default: int) -> int:
    value = body.get(member)
    if value is None:
        return default
    if type(value) is not int:
        raise AwsError("SerializationException", f"{member} can not be converted to a Number")
    if value < least:
        raise constraint(member, value, f"Member must have value greater than or equal to {least}")
    if value > most:
        raise constraint(member, value, f"Member must have value less than or equal to {most}")
    return value


def choice(body: dict[str, Any], member: str, allowed: tuple[str, ...]) -> str:
    value = body.get(member, allowed[0])
    if value not in allowed:
        raise constraint(member, value, f"Member must satisfy enum value set: [{', '.join(allowed)}]")
    return str(value)


def group_name(body: dict[str, Any], member: str = "logGroupName") -> str:
    name = string(body, member, 1, 512)
    if not _GROUP_NAME.fullmatch(name):
        raise constraint(member, name, r"Member must satisfy regular expression pattern: [\.\-_/#A-Za-z0-9]+")
    return name


def stream_name(body: dict[str, Any], member: str = "logStreamName") -> str:
    name = string(body, member, 1, 512)
    if not _STREAM_NAME.fullmatch(name):
        raise constraint(member, name, "Member must satisfy regular expression pattern: [^:*]*")
    return name


def checked_tags(body: dict[str, Any]) -> dict[str, str]:
    tags = body.get("tags")
    if tags is None:
        return {}
    if not isinstance(tags, dict) or not all(isinstance(value, str) for value in tags.values()):
        raise AwsError("SerializationException", "tags can not be converted to a map of strings")
    if not 1 <= len(tags) <= 50:
        raise constraint("tags", tags, "Member must have between 1 and 50 entries")
    for key, value in tags.items():
        good = 1 <= len(key) <= 128 and len(value) <= 256 and _TAG.fullmatch(key) and _TAG.fullmatch(value)
        if not good or key.lower().startswith("aws:"):
            raise constraint("tags", {key: value}, "Map key or value must satisfy its constraint")
    return dict(tags)


def checked_events(events: Any) -> list[tuple[int, str]]:
    """The events of a call that keeps the limits; anything else fails the call."""
    if events is None:
        raise constraint("logEvents", None, "Member must not be null")
    if not isinstance(events, list):
        raise AwsError("SerializationException", "logEvents can not be converted to a List")
    if not events:
        raise constraint("logEvents", "[]", "Member must have length greater than or equal to 1")
    if len(events) > MAX_EVENTS:
        raise constraint("logEvents", "[...]", f"Member must have length less than or equal to {MAX_EVENTS}")
    checked = []
    total, last, ordered = 0, 0, True
    for number, event in enumerate(events, 1):
        where = f"logEvents.{number}.member"
        if type(event) is not dict:
            raise AwsError("SerializationException", f"{where} can not be converted to an InputLogEvent")
        timestamp, message = event.get("timestamp"), event.get("message")
        if type(timestamp) is not int or type(message) is not str or len(event) != 2:
            raise _bad_event(where, event)
        if timestamp < 0:
            raise constraint(
                f"{where}.timestamp", timestamp, "Member must have value greater than or equal to 0"
            )
        if not message:
            raise constraint(f"{where}.message", "", "Member must have length greater than or equal to 1")
        try:
            size = EVENT_OVERHEAD + (len(message) if message.isascii() else len(message.encode()))
        except UnicodeEncodeError:
            raise AwsError("SerializationException", f"{where}.message is not valid Unicode") from None
        if size > MAX_BATCH_BYTES:
            raise invalid(f"Log event too large: {size} bytes exceeds limit of {MAX_BATCH_BYTES}")
        total += size
        ordered = ordered and timestamp >= last
        last = timestamp
        checked.append((timestamp, message))
    if total > MAX_BATCH_BYTES:
        raise invalid(f"Upload too large: {total} bytes exceeds limit of {MAX_BATCH_BYTES}")
    if not ordered:
        raise invalid("Log events in a single PutLogEvents request must be in chronological order.")
    return checked


def _bad_event(where: str, event: dict[str, Any]) -> AwsError:
    for member in ("timestamp", "message"):
        if event.get(member) is None:
            return constraint(f"{where}.{member}", None, "Member must not be null")
    if unknown := sorted(set(event) - {"timestamp", "message"}):
        return invalid(f"Unknown parameter in {where}: {unknown}")
    return AwsError("SerializationException", f"{where} has a member of the wrong type")


def entity_error(entity: Any) -> str | None:
    """The `errorType` of rejectedEntityInfo; the events are stored all the same."""
    if entity is None:
        return None
    if not isinstance(entity, dict):
        raise AwsError("SerializationException", "entity can not be converted to an Entity")
    only_members(entity, "keyAttributes attributes")
    keys, attributes = entity.get("keyAttributes", {}), entity.get("attributes", {})
    if not _fits(keys, 4, 32) or (keys and len(keys) < 2):
        raise constraint("entity.keyAttributes", keys, "Map must have 2 to 4 short entries")
    if not _fits(attributes, 10, 256):
        raise constraint("entity.attributes", attributes, "Map must have at most 10 short entries")
    if not _ENTITY_KEYS.issuperset(keys):
        return "InvalidKeyAttributes"
    return None if "Type" in keys else "MissingRequiredFields"


def _fits(value: Any, entries: int, key_length: int) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= entries
        and all(isinstance(v, str) and 1 <= len(v) <= 512 for v in value.values())
        and all(1 <= len(k) <= key_length for k in value)
    )
