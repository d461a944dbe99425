"""Shortening of an alert that is too big for one log event: longest values first. Pure.

Every value longer than a common length is cut to it, the length chosen so that the whole fits: short values stay as they
are, and no round looks at more than one encoding of the alert. ``forwarder.truncated`` names what was cut and ``sha256``
is that of the record's body before. Lengths are those of the JSON text in bytes, because that is what the service counts:
a control character is one character and six bytes.

What is left when keys are too many or too long: the well-known members, and ``truncated: ["*"]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec
from msgspec import Raw

from forwarder.alert import encode
from forwarder.record import UNPARSED, Record

ROUNDS_MAX = 8
PLACES_MAX = 5_000
"""With more members than that, looking at each would hold up the event loop."""
VALUE_BYTES_MIN = 64
WELL_KNOWN_BYTES_MAX = 4096
WELL_KNOWN = ("time", "rule", "priority", "source", "hostname", "uuid", "output")
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"

Compose = Callable[[bytes, bytes], bytes]
"""Body and notes in, the whole event out."""

_members = msgspec.json.Decoder(dict[str, Raw])


def unparsed_body(record: Record) -> bytes:
    """A body nobody could read, as a JSON object."""
    return encode({"unparsed": record.body.decode("utf-8", "replace")})


def shortened(record: Record, bytes_max: int, compose: Compose) -> bytes:
    """The event of ``record`` within ``bytes_max``."""
    body = unparsed_body(record) if record.kind == UNPARSED else record.body
    alert = _Values(body, record.notes)
    digest = hashlib.sha256(record.body).hexdigest()
    for _ in range(ROUNDS_MAX if alert.count() <= PLACES_MAX else 0):
        event = compose(alert.body(), alert.notes(digest))
        if len(event) <= bytes_max:
            return event
        if not alert.cut(len(event) - bytes_max):
            break
    alert.keep_well_known()
    return compose(alert.body(), alert.notes(digest))


class _Values:
    """Members of an alert by place: root, ``output_fields``, and what of the notes may be long."""

    def __init__(self, body: bytes, notes: bytes) -> None:
        self._root = dict(_members.decode(body))
        self._notes = dict(_members.decode(b"{%b}" % notes))
        self._names: list[str] = []
        try:
            self._fields: dict[str, Raw] | None = dict(_members.decode(self._root["output_fields"]))
        except (KeyError, msgspec.MsgspecError):
            self._fields = None

    def count(self) -> int:
        return len(self._root) + len(self._fields or ())

    def body(self) -> bytes:
        if self._fields is not None:
            self._root["output_fields"] = Raw(encode(self._fields))
        return encode(self._root)

    def notes(self, digest: str) -> bytes:
        told = {"truncated": sorted(set(self._names)), "sha256": digest}
        return encode(self._notes | told)[1:-1]

    def cut(self, excess: int) -> bool:
        """Shorten the longest values by ``excess`` bytes in all; False where nothing long is left."""
        places = [
            (name, self._root, name) for name in self._root if name != "output_fields" or self._fields is None
        ]
        if self._fields is not None:
            places += [(f"output_fields.{name}", self._fields, name) for name in self._fields]
        places += [(f"forwarder.{name}", self._notes, name) for name in self._notes]
        sizes = sorted((len(bytes(members[name])) for _, members, name in places), reverse=True)
        length = _common_length(sizes, excess)
        if length is None:
            return False
        for told, members, name in places:
            if len(bytes(members[name])) > length:
                members[name] = _cut_value(members[name], length)
                self._names.append(told)
        return True

    def keep_well_known(self) -> None:
        """Give up all but the members everybody looks for."""
        self._fields = None
        kept = {
            name: _cut_value(self._root[name], WELL_KNOWN_BYTES_MAX)
            for name in WELL_KNOWN
            if name in self._root
        }
        self._root = kept or {"output": Raw(encode(ELLIPSIS))}
        self._notes = {}
        self._names = ["*"]


def _common_length(sizes: list[int], excess: int) -> int | None:
    """The largest length to which cutting all longer values frees ``excess`` bytes; ``sizes`` descend."""
    above = 0
    for count, size in enumerate(sizes, 1):
        above += size
        below = sizes[count] if count < len(sizes) else 0
        length = (above - excess) // count
        if length >= below:
            return length if length >= VALUE_BYTES_MIN else None
    return None


def _cut_value(raw: Raw, length: int) -> Raw:
    """A text of at most ``length`` bytes of JSON; other values become the text of their JSON."""
    data = bytes(raw)
    if len(data) <= length:
        return raw
    text = msgspec.json.decode(data, type=str) if data[:1] == b'"' else data.decode("utf-8", "replace")
    size = len(encode(text))
    while True:
        text = text[: max(0, min(len(text) * (length - 5) // size, len(text) - 1))]
        encoded = encode(text + ELLIPSIS)
        if len(encoded) <= length or not text:
            return Raw(encoded)
        size = len(encoded)
