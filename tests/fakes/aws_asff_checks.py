"""Small checks of single values, with the texts of a JSON schema validator.

The building blocks of the finding check: strings, numbers, time stamps, maps, arrays and objects. Rules
from the ASFF chapters of the Security Hub user guide and from error messages of the real service.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tests.fakes.aws_common import is_utf8

if TYPE_CHECKING:
    from collections.abc import Mapping

# A check appends the faults of a value at a path ("data.Title") to a list.
Faults = list[str]
Check = Callable[[Any, str, Faults], None]

NAMESPACES = (
    "Software and Configuration Checks",
    "TTPs",
    "Effects",
    "Unusual Behaviors",
    "Sensitive Data Identifications",
)
_TIMESTAMP = re.compile(
    r"\d{4}-[01]\d-[0-3]\d[Tt](?:[0-2]\d:[0-5]\d:[0-5]\d|23:59:60)(?P<fraction>\.\d{1,9})?"
    r"(?P<offset>[Zz]|[+-]\d\d(?::?\d\d)?)",
    re.ASCII,
)
_TYPE = re.compile(r"[^/]+(?:/[^/]+){0,2}")
_MAP_CHARS = re.compile(r"[A-Za-z0-9 .:+=@_/-]+")
_TYPE_PATTERN = r"^([^/]+)(/[^/]+){0,2}$"


def parse_timestamp(text: str) -> datetime | None:
    """The moment, rounded to milliseconds as the service does; None when the text is not a timestamp."""
    found = _TIMESTAMP.fullmatch(text)
    if not found:
        return None
    base, offset = text[:19].upper(), found["offset"]
    try:
        leap = base.endswith("T23:59:60")
        moment = datetime.fromisoformat(base.replace("T23:59:60", "T23:59:59") + "+00:00")
        shift = timedelta(0)
        if offset not in "Zz":
            digits = offset[1:].replace(":", "").ljust(4, "0")
            shift = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
            if shift > timedelta(hours=18) or int(digits[2:]) > 59:
                return None
            shift = -shift if offset[0] == "-" else shift
        fraction = round(float(found["fraction"] or 0) * 1000)
        return moment + timedelta(seconds=leap, milliseconds=fraction) - shift
    except (ValueError, OverflowError):
        return None


def text(least: int = 1, most: int | None = None) -> Check:
    def check(value: Any, path: str, faults: Faults) -> None:
        if type(value) is not str:
            faults.append(f"{path} should be string")
        elif len(value) < least:
            faults.append(f"{path} should NOT be shorter than {least} characters")
        elif most is not None and len(value) > most:
            faults.append(f"{path} should NOT be longer than {most} characters")
        elif not value.strip():
            faults.append(f'{path} should match pattern ".*\\S.*"')
        elif not is_utf8(value):
            faults.append(f"{path} should be valid Unicode")

    return check


def one_of(*allowed: str) -> Check:
    def check(value: Any, path: str, faults: Faults) -> None:
        if type(value) is not str:
            faults.append(f"{path} should be string")
        elif value not in allowed:
            faults.append(f"{path} should be equal to one of the allowed values")

    return check


def integer(least: int | None = None, most: int | None = None) -> Check:
    def check(value: Any, path: str, faults: Faults) -> None:
        if type(value) is not int:
            faults.append(f"{path} should be integer")
        elif least is not None and value < least:
            faults.append(f"{path} should be >= {least}")
        elif most is not None and value > most:
            faults.append(f"{path} should be <= {most}")

    return check


def boolean(value: Any, path: str, faults: Faults) -> None:
    if type(value) is not bool:
        faults.append(f"{path} should be boolean")


def number(value: Any, path: str, faults: Faults) -> None:
    if type(value) not in (int, float):
        faults.append(f"{path} should be number")


def formatted(test: Callable[[str], Any], problem: str) -> Check:
    is_text = text()

    def check(value: Any, path: str, faults: Faults) -> None:
        before = len(faults)
        is_text(value, path, faults)
        if len(faults) == before and not test(value):
            faults.append(f"{path} {problem}")

    return check


def is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
    except ValueError:
        return False
    return bool(parts.scheme and parts.netloc) and not re.search(r"[\s\x00-\x1f]", value)


def is_ip(version: type[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> Callable[[str], bool]:
    def test(value: str) -> bool:
        try:
            version(value)
        except ValueError:
            return False
        return True

    return test


def string_map(
    *,
    entries: int = 50,
    key: int = 128,
    value: int,
    charset: bool = False,
    least: int = 0,
    reserved: str = "",
) -> Check:
    is_value = text(1, value)

    def check(found: Any, path: str, faults: Faults) -> None:
        if type(found) is not dict:
            faults.append(f"{path} should be object")
            return
        if len(found) > entries:
            faults.append(f"{path} should NOT have more than {entries} properties")
        if len(found) < least:
            faults.append(f"{path} should NOT have fewer than {least} properties")
        for name, content in found.items():
            if not 1 <= len(name) <= key or not name.strip() or not is_utf8(name):
                faults.append(f"{path} property name {name[:200]!r} is invalid: 1 to {key} characters")
            elif charset and not _MAP_CHARS.fullmatch(name):
                faults.append(f"{path} property name {name!r} is invalid: character not allowed")
            elif reserved and name.lower().startswith(reserved):
                faults.append(f"{path} property name {name!r} is invalid: prefix {reserved} is reserved")
            is_value(content, f"{path}['{name[:200]}']", faults)

    return check


def tags(value: Any, path: str, faults: Faults) -> None:
    before = len(faults)
    string_map(value=256, charset=True, least=1)(value, path, faults)
    if len(faults) == before:
        faults.extend(
            f"{path}['{key}'] should match pattern"
            for key, text in value.items()
            if not _MAP_CHARS.fullmatch(text)
        )


def finding_type(value: Any, path: str, faults: Faults) -> None:
    if type(value) is not str:
        faults.append(f"{path} should be string")
    elif not _TYPE.fullmatch(value) or not is_utf8(value):
        faults.append(f'{path} should match pattern "{_TYPE_PATTERN}"')
    elif value.split("/", 1)[0] not in NAMESPACES:
        faults.append(f"{path} should begin with one of the namespaces {', '.join(NAMESPACES)}")


def array(items: Check, least: int = 0, most: int | None = None) -> Check:
    def check(value: Any, path: str, faults: Faults) -> None:
        if type(value) is not list:
            faults.append(f"{path} should be array")
            return
        if len(value) < least:
            faults.append(f"{path} should NOT have fewer than {least} items")
        if most is not None and len(value) > most:
            faults.append(f"{path} should NOT have more than {most} items")
        for index, item in enumerate(value):
            items(item, f"{path}[{index}]", faults)

    return check


def structure(members: Mapping[str, Check], required: list[str], extra: Check | None) -> Check:
    def check(value: Any, path: str, faults: Faults) -> None:
        if type(value) is not dict:
            faults.append(f"{path} should be object")
            return
        for name, content in value.items():
            member = members.get(name)
            if member is None:
                faults.append(f"{path} should NOT have additional properties: '{name[:200]}'")
            else:
                member(content, f"{path}.{name}", faults)
        faults.extend(
            f"{path} should have required property '{name}'" for name in required if name not in value
        )
        if extra is not None:
            extra(value, path, faults)

    return check
