"""What can be wrong with one value in a rule of the house: pairs of key and text, as ``config`` wants them. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from forwarder.alert import rank
from forwarder.rules_glob import PATTERN_LENGTH_MAX, STARS_MAX

PATTERNS_MAX = 100
"""In one list."""
NAMES_MAX = 32
"""Labels, or fields, that one rule looks at."""
TEXT_LENGTH_MAX = 512
PRIORITY_NAMES = ("emergency", "alert", "critical", "error", "warning", "notice", "informational", "debug")

Patterns = str | list[str] | UnsetType
"""One glob, or several of which one has to match."""
Faults = Iterator[tuple[str, str]]


def fits(value: str, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def list_faults(where: str, value: Any, length_max: int = PATTERNS_MAX) -> Faults:
    if isinstance(value, list) and not value:
        yield where, "is an empty list: leave it out, or name something"
    elif isinstance(value, list) and len(value) > length_max:
        yield where, f"has {len(value)} elements, more than {length_max}"


def pattern_faults(where: str, value: Patterns) -> Faults:
    if isinstance(value, str):
        if fault := _pattern_fault(value):
            yield where, fault
        return
    yield from list_faults(where, value)
    for place, pattern in enumerate(value or ()):
        if fault := _pattern_fault(pattern):
            yield f"{where}[{place}]", fault


def _pattern_fault(pattern: str) -> str:
    if not pattern:
        return "is empty: what is absent matches nothing"
    if len(pattern) > PATTERN_LENGTH_MAX:
        return f"has {len(pattern)} characters, more than {PATTERN_LENGTH_MAX}"
    if pattern.count("*") > STARS_MAX:
        return f"has {pattern.count('*')} stars, more than {STARS_MAX}"
    return ""


def names_faults(where: str, value: Any, length_max: int) -> Faults:
    if value is UNSET:
        return
    if not value:
        yield where, "is empty: leave it out, or name something"
    if len(value) > NAMES_MAX:
        yield where, f"has {len(value)} names, more than {NAMES_MAX}"
    for name in value:
        if not 0 < len(name) <= length_max:
            yield f"{where}.{name}", f"a name has 1 to {length_max} characters"


def no_priority(name: Any) -> str:
    return f"{name!r} is not one of {', '.join(PRIORITY_NAMES)}"[:160]


def priority_faults(value: Any) -> Faults:
    if isinstance(value, dict):
        yield from _unknown_keys("priority", value, ["at_least"])
        if not value:
            yield "priority", "needs at_least, or is one priority or a list of them"
        elif "at_least" in value and not _is_priority(value["at_least"]):
            yield "priority.at_least", no_priority(value["at_least"])
    elif isinstance(value, list):
        yield from list_faults("priority", value)
        for place, name in enumerate(value):
            if not _is_priority(name):
                yield f"priority[{place}]", no_priority(name)
    elif not _is_priority(value):
        yield "priority", no_priority(value)


def _is_priority(name: Any) -> bool:
    return isinstance(name, str) and rank(name) is not None


def field_faults(where: str, wanted: Any) -> Faults:
    if isinstance(wanted, dict):
        yield from _unknown_keys(where, wanted, ["glob", "one_of"])
        if not wanted or {"glob", "one_of"} <= wanted.keys():
            yield where, "needs either glob or one_of"
        if "glob" in wanted:
            if fits(wanted["glob"], str | list[str]):
                yield from pattern_faults(f"{where}.glob", wanted["glob"])
            else:
                yield f"{where}.glob", f"must be a text or a list of texts, not {wanted['glob']!r}"[:120]
        if "one_of" in wanted:
            yield from _one_of_faults(f"{where}.one_of", wanted["one_of"])
    elif isinstance(wanted, list):
        yield where, f"is a list: write {{one_of: {wanted!r}}}"[:120]
    elif fault := _scalar_fault(wanted):
        yield where, fault


def _one_of_faults(where: str, values: Any) -> Faults:
    if not isinstance(values, list):
        yield where, f"must be a list, not {values!r}"[:120]
        return
    yield from list_faults(where, values)
    for place, value in enumerate(values):
        if fault := _scalar_fault(value):
            yield f"{where}[{place}]", fault


def _scalar_fault(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "is no number that an alert can have"
    if isinstance(value, bool | int | float):
        return ""
    if not isinstance(value, str):
        return f"must be a text, a number or a boolean, not {value!r}"[:120]
    return _pattern_fault(value.replace("*", "."))  # a star is a star here


def text_faults(where: str, text: str) -> Faults:
    if not text.strip():
        yield where, "is required"
    elif len(text) > TEXT_LENGTH_MAX:
        yield where, f"has {len(text)} characters, more than {TEXT_LENGTH_MAX}"


def _unknown_keys(where: str, value: dict[str, Any], known: list[str]) -> Faults:
    for name in value:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            yield f"{where}.{name}", "unknown key" + (f", did you mean {close[0]}?" if close else "")
