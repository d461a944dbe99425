"""Custom fields and tags: what the operator wants in every alert, as falcosidekick's ``customfields`` and ``customtags`` put it there. Pure.

Fields go into ``output_fields``, tags to the end of ``tags``, before the alert is stored: rules, log events and findings all see them. What
Falco sent itself is never changed: a custom field cannot forge evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
from msgspec import Raw

from forwarder.alert import encode

FIELDS_MAX, TAGS_MAX, KEY_LENGTH_MAX, VALUE_LENGTH_MAX = 32, 32, 128, 1024
ENVIRONMENT_MARK = "%"

_members = msgspec.json.Decoder(dict[str, Raw])
_tags = msgspec.json.Decoder(list[str])


class CustomMembers:
    """Adds the same members to every alert."""

    def __init__(self, fields: Mapping[str, str], tags: Sequence[str]) -> None:
        self._fields = {key: Raw(encode(value)) for key, value in fields.items()}
        self._new = tuple(dict.fromkeys(tags))

    def __bool__(self) -> bool:
        return bool(self._fields or self._new)

    def added_to(self, body: bytes) -> bytes:
        """The alert's JSON object with them; a member that has not the shape Falco gives it stays as it is."""
        members = _members.decode(body)
        if self._fields:
            members["output_fields"] = self._with_fields(members.get("output_fields"))
        if self._new:
            members["tags"] = self._with_tags(members.get("tags"))
        return encode(members)

    def _with_fields(self, sent: Raw | None) -> Raw:
        if _is_absent(sent):
            return Raw(encode(self._fields))
        try:
            return Raw(encode(self._fields | _members.decode(sent)))  # type: ignore[arg-type]
        except (msgspec.MsgspecError, RecursionError):
            return sent  # type: ignore[return-value]

    def _with_tags(self, sent: Raw | None) -> Raw:
        if _is_absent(sent):
            return Raw(encode(self._new))
        try:
            tags = _tags.decode(sent)  # type: ignore[arg-type]
        except (msgspec.MsgspecError, RecursionError):
            return sent  # type: ignore[return-value]
        return Raw(encode([*tags, *(tag for tag in self._new if tag not in tags)]))


def fields_of(given: Mapping[str, str] | str, environment: Mapping[str, str]) -> dict[str, str]:
    """A mapping, or ``key:value,key:value``; a value ``%NAME`` is that of an environment variable.

    Raises:
        KeyError: the variable is not set; its argument is the name.

    """
    pairs = given.items() if isinstance(given, Mapping) else map(_pair, _parts(given))
    return {
        key: environment[value[1:]] if value.startswith(ENVIRONMENT_MARK) else value for key, value in pairs
    }


def tags_of(given: Sequence[str] | str) -> list[str]:
    """A list, or ``tag,tag``."""
    return _parts(given) if isinstance(given, str) else list(given)


def faults_of(
    fields: Mapping[str, str] | str, tags: Sequence[str] | str, environment: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """What is wrong with them, by key of the configuration."""
    if isinstance(fields, str) and not all(":" in part for part in _parts(fields)):
        yield "customfields", "must be a mapping, or text like key:value,key:value"
        return
    try:
        known = fields_of(fields, environment)
    except KeyError as error:
        yield "customfields", f"the environment variable {error.args[0]} is not set"
        return
    if len(known) > FIELDS_MAX:
        yield "customfields", f"more than {FIELDS_MAX} fields"
    for key, value in known.items():
        if not 0 < len(key) <= KEY_LENGTH_MAX or len(value) > VALUE_LENGTH_MAX:
            yield (
                f"customfields.{key}",
                f"longer than {KEY_LENGTH_MAX} (key) or {VALUE_LENGTH_MAX} (value) characters, or without a key",
            )
    wrong = [tag for tag in tags_of(tags) if not 0 < len(tag) <= KEY_LENGTH_MAX]
    if wrong or len(tags_of(tags)) > TAGS_MAX:
        yield "customtags", f"at most {TAGS_MAX} tags of 1 to {KEY_LENGTH_MAX} characters"


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition(":")
    return key.strip(), value.strip()


def _is_absent(sent: Raw | None) -> bool:
    return sent is None or bytes(sent) == b"null"
