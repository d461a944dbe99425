"""Decoding of what Falco posts, tolerant of every version since 2017.

Job: bytes of one HTTP body in; decoded alerts, text alerts, or one named fault out. Pure: no I/O, no clock.

Facts it is built on (Falco 0.1 to 0.45, falcosidekick's webhook):

- Only ``output``, ``priority``, ``rule`` and ``time`` ever were in all versions, and options remove ``output``.
- ``null``, ``""`` and ``"<NA>"`` all mean absent.
- Integers in ``output_fields`` are nanoseconds beyond 2^53: no value ever passes through a float here.
- ``json_output: false`` posts ``13:44:05.478445995: Critical text``, up to 0.30 with a JSON Content-Type.

Ways through: a body goes through one typed decode in C. Whatever does not fit the types (a number as rule,
a string as tags, a key we own) goes the tolerant way, member by member. What is no JSON object at all is
text mode, NDJSON, an array, or a fault. The sender's bytes are kept as they are; only invalid UTF-8, a byte
order mark and root keys that are ours make a new body.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from forwarder.timestamp import time_ns

PRIORITIES = ("Emergency", "Alert", "Critical", "Error", "Warning", "Notice", "Informational", "Debug")
"""Falco's priorities by syslog rank, most severe first."""
UNKNOWN_PRIORITY_RANK = 4
"""An unknown priority is kept as it is and treated as Warning."""

RESERVED_KEYS = frozenset(
    {"id", "cluster", "account", "region", "kubernetes", "node", "ecs", "forwarder", "unparsed", "_aws"}
)
"""Root keys that are ours in a CloudWatch event. ``_aws`` would turn an event into paid custom metrics."""

ALERTS_PER_BODY_MAX = 10_000
UUID_LENGTH_MAX = 128

_RANK_BY_NAME = {name.lower(): rank for rank, name in enumerate(PRIORITIES)} | {"info": 6}
_ABSENT = frozenset({"", "<NA>"})
_TEXT_MODE = re.compile(
    r"(?:\d{4}-\d\d-\d\dT)?\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?: ("
    + "|".join(PRIORITIES)
    + r"|Info)\b",
    re.IGNORECASE,
)
_TEXT_MODE_LINE = re.compile(r"\n(?=" + _TEXT_MODE.pattern + ")", re.IGNORECASE)
_WHITE_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


class Unparsable(Exception):  # noqa: N818 - a verdict on a body, not a failure of ours
    """The body is no alert; the message names the fault in one line."""


class Alert(msgspec.Struct, frozen=True):
    """One decoded alert. Absent values are ``""`` (texts) or empty."""

    id: str
    """The sender's uuid, or nothing."""
    rule: str
    priority: str
    """As sent."""
    rank: int
    priority_known: bool
    time: str
    time_ns: int | None
    source: str
    hostname: str
    output: str
    tags: tuple[str, ...]
    fields: Raw
    """``output_fields`` as JSON, unread."""
    body: bytes
    """The JSON object as sent, cleaned of reserved keys."""
    sender_keys: bytes = b""
    """Reserved root keys the sender used, as a JSON object, or nothing."""
    text: bool = False

    @property
    def internal(self) -> bool:
        return self.source == "internal" or self.rule.startswith("Falco internal: ")


class Decoded(NamedTuple):
    """What a body held."""

    alerts: list[Alert]
    utf8_replaced: bool


class _Wire(msgspec.Struct, frozen=True):
    """The typed fast way: shapes that Falco itself sends."""

    rule: str | None = None
    priority: str | None = None
    time: str | None = None
    source: str | None = None
    hostname: str | None = None
    output: str | None = None
    message: str | None = None
    tags: list[str] | None = None
    uuid: str | None = None
    output_fields: Raw = Raw(b"null")
    id: Raw | UnsetType = UNSET
    cluster: Raw | UnsetType = UNSET
    account: Raw | UnsetType = UNSET
    region: Raw | UnsetType = UNSET
    kubernetes: Raw | UnsetType = UNSET
    node: Raw | UnsetType = UNSET
    ecs: Raw | UnsetType = UNSET
    forwarder: Raw | UnsetType = UNSET
    unparsed: Raw | UnsetType = UNSET
    aws_metrics: Raw | UnsetType = msgspec.field(name="_aws", default=UNSET)

    def uses_reserved_keys(self) -> bool:
        return not (
            self.id
            is self.cluster
            is self.account
            is self.region
            is self.kubernetes
            is self.node
            is self.ecs
            is self.forwarder
            is self.unparsed
            is self.aws_metrics
            is UNSET
        )


_wire = msgspec.json.Decoder(_Wire)
_members = msgspec.json.Decoder(dict[str, Raw])
_elements = msgspec.json.Decoder(list[Raw])
encode = msgspec.json.Encoder().encode


def rank(priority: str) -> int | None:
    """Syslog rank of a priority in any case (``info`` included), or None for an unknown one."""
    return _RANK_BY_NAME.get(priority.strip().lower())


def decode(body: bytes) -> Decoded:
    """Decode one HTTP body: an alert, an array, NDJSON or Falco's text form.

    Raises:
        Unparsable: nothing of it can be used; an array or NDJSON is all or nothing.

    """
    replaced = False
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError:
            body = body.decode("utf-8", "replace").encode()
            replaced = True
        body = body.removeprefix(_BOM)
    body = body.strip(_WHITE_SPACE)
    if not body:
        raise Unparsable("the body is empty")
    first = body[:1]
    if first == b"{":
        return Decoded(_object_or_lines(body), replaced)
    if first == b"[":
        return Decoded(_array(body), replaced)
    return Decoded(_text(body), replaced)


def present(value: str | None) -> str:
    """``null``, ``""`` and ``"<NA>"`` all mean absent."""
    return "" if value is None or value in _ABSENT else value.strip()


def _object_or_lines(body: bytes) -> list[Alert]:
    try:
        return [_alert(body)]
    except Unparsable as fault:
        if b"\n" not in body:
            raise
        lines = [line.strip(_WHITE_SPACE) for line in body.split(b"\n")]
        whole_first_line = _is_object(lines[0])
        if not whole_first_line:
            raise
        return _all([line for line in lines if line], "line", fault)


def _is_object(line: bytes) -> bool:
    try:
        _members.decode(line)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def _array(body: bytes) -> list[Alert]:
    try:
        elements = _elements.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Unparsable(_words(error)) from None
    if not elements:
        raise Unparsable("the array is empty")
    _not_too_many(len(elements))
    return _all([bytes(element) for element in elements], "element", None)


def _all(parts: list[bytes], what: str, cause: Unparsable | None) -> list[Alert]:
    _not_too_many(len(parts))
    alerts = []
    for number, part in enumerate(parts, 1):
        try:
            alerts.append(_alert(part.strip(_WHITE_SPACE)))
        except Unparsable as fault:
            raise Unparsable(f"{what} {number}: {fault}") from cause
    return alerts


def _not_too_many(count: int) -> None:
    if count > ALERTS_PER_BODY_MAX:
        raise Unparsable(f"more than {ALERTS_PER_BODY_MAX} alerts in one body")


def _alert(body: bytes) -> Alert:
    try:
        wire = _wire.decode(body)
    except msgspec.ValidationError:
        return _tolerant(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Unparsable(_words(error)) from None
    if wire.uses_reserved_keys():
        return _tolerant(body)
    tags = wire.tags
    return _build(
        body,
        wire.rule,
        wire.priority,
        wire.time,
        wire.source,
        wire.hostname,
        present(wire.output) or wire.message,
        tuple(tags) if tags else (),
        wire.uuid,
        wire.output_fields,
    )


def _tolerant(body: bytes) -> Alert:
    try:
        members = _members.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Unparsable("not a JSON object" if body[:1] != b"{" else _words(error)) from None
    reserved = {key: members.pop(key) for key in RESERVED_KEYS & members.keys()}
    reserved.pop("_aws", None)
    if len(members) < _members.decode(body).__len__():
        body = encode(members)
    read = {
        key: _scalar(members.get(key))
        for key in ("rule", "priority", "time", "source", "hostname", "output", "uuid")
    }
    return _build(
        body,
        read["rule"],
        read["priority"],
        read["time"],
        read["source"],
        read["hostname"],
        present(read["output"]) or _scalar(members.get("message")),
        _tags(members.get("tags")),
        read["uuid"],
        members.get("output_fields", Raw(b"null")),
        encode(reserved) if reserved else b"",
    )


def _build(  # noqa: PLR0917 - positional is a third faster, and this runs for every alert
    body: bytes,
    rule: str | None,
    priority: str | None,
    time: str | None,
    source: str | None,
    hostname: str | None,
    output: str | None,
    tags: tuple[str, ...],
    uuid: str | None,
    fields: Raw,
    sender_keys: bytes = b"",
) -> Alert:
    """Positional and flat: this runs once for every alert."""
    rule = present(rule)
    output = present(output)
    if not rule and not output:
        raise Unparsable("neither rule nor output: not a Falco alert")
    priority = present(priority)
    known = _RANK_BY_NAME.get(priority.lower())
    time = present(time)
    if uuid is not None:
        uuid = present(uuid)
        if len(uuid) > UUID_LENGTH_MAX or not uuid.isprintable():
            uuid = ""
    return Alert(
        uuid or "",
        rule,
        priority,
        UNKNOWN_PRIORITY_RANK if known is None else known,
        known is not None,
        time,
        time_ns(time),
        present(source) or "syscall",
        present(hostname),
        output,
        tags,
        fields,
        body,
        sender_keys,
    )


def _text(body: bytes) -> list[Alert]:
    text = body.decode()
    if not _TEXT_MODE.match(text):
        raise Unparsable("neither a JSON object nor Falco's text form")
    parts = _TEXT_MODE_LINE.split(text)[::2]
    if len(parts) > ALERTS_PER_BODY_MAX:
        raise Unparsable(f"more than {ALERTS_PER_BODY_MAX} alerts in one body")
    return [_text_alert(part.strip()) for part in parts]


def _text_alert(line: str) -> Alert:
    match = _TEXT_MODE.match(line)
    priority = match.group(1) if match else ""
    known = rank(priority)
    return Alert(
        id="",
        rule="",
        priority=priority,
        rank=UNKNOWN_PRIORITY_RANK if known is None else known,
        priority_known=known is not None,
        time="",
        time_ns=None,
        source="",
        hostname="",
        output=line,
        tags=(),
        fields=Raw(b"null"),
        body=encode({"output": line, "priority": priority}),
        sender_keys=b"",
        text=True,
    )


def _scalar(raw: Raw | None) -> str | None:
    """Text of a member that should be text; numbers and booleans as sent, other shapes as JSON."""
    if raw is None or bytes(raw) == b"null":
        return None
    try:
        return msgspec.json.decode(raw, type=str)
    except (msgspec.MsgspecError, RecursionError):
        return bytes(raw).decode("utf-8", "replace")


def _tags(raw: Raw | None) -> tuple[str, ...]:
    text = _scalar(raw)
    if raw is None or text is None:
        return ()
    try:
        return tuple(_scalar(item) or "" for item in _elements.decode(raw))
    except (msgspec.MsgspecError, RecursionError):
        return tuple(part.strip() for part in text.split(",") if part.strip())


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())[:200] or "not valid JSON"
