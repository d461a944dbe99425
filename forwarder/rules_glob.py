"""Globs over texts that an attacker may have written: ``*`` any run, ``?`` one character, the rest literal. Pure.

Linear: a pattern is cut at its stars, and every segment but the last is taken at the first place where it fits, which is never worse
than a later one. Nothing is ever tried twice, so there is no pattern and no text that explodes. A segment without ``?`` is found by
``str.find``; one with ``?`` by shift-and: one machine step for each character, whatever the segment's length.
"""

from __future__ import annotations

import re
from collections.abc import Callable

PATTERN_LENGTH_MAX = 512
STARS_MAX = 16
TEXT_LENGTH_MAX = 8192
"""Characters of a text that are looked at; what comes behind them is as if it were not there."""

WILDCARD = re.compile(r"[*?]")

Matches = Callable[[str], bool]


def is_literal(pattern: str) -> bool:
    """Without a wildcard: it is equal, or it does not match."""
    return WILDCARD.search(pattern) is None


def glob(pattern: str) -> Matches:
    """The quickest function that tells whether a whole text matches; a text is cut by the caller."""
    first, *rest = pattern.split("*")
    if not rest:
        return _fixed(_Segment(pattern))
    middle = [segment for segment in rest[:-1] if segment]
    if "?" in pattern:
        return _general(_Segment(first), [_Segment(segment) for segment in middle], _Segment(rest[-1]))
    if not first and not rest[-1] and len(middle) == 1:
        return _contains(middle[0])
    return _literals(first, middle, rest[-1])


def _fixed(one: _Segment) -> Matches:
    return lambda text: len(text) == one.length and one.fits(text, 0)


def _contains(inner: str) -> Matches:
    return lambda text: inner in text


def _literals(head: str, middle: list[str], tail: str) -> Matches:
    """Without a question mark: all of it is done in C."""
    if not middle and not tail:
        return lambda text: text.startswith(head)

    def matches(text: str) -> bool:
        end = len(text) - len(tail)
        if end < len(head) or not text.startswith(head) or not text.endswith(tail):
            return False
        place = len(head)
        for segment in middle:
            place = text.find(segment, place, end)
            if place < 0:
                return False
            place += len(segment)
        return True

    return matches


def _general(head: _Segment, middle: list[_Segment], tail: _Segment) -> Matches:
    def matches(text: str) -> bool:
        end = len(text) - tail.length
        if end < head.length or not head.fits(text, 0) or not tail.fits(text, end):
            return False
        place = head.length
        for segment in middle:
            place = segment.find(text, place, end)
            if place < 0:
                return False
            place += segment.length
        return True

    return matches


class _Segment:
    """What stands between two stars."""

    __slots__ = ("_any", "_bits", "_literal", "length")

    def __init__(self, text: str) -> None:
        self.length = len(text)
        self._literal = None if "?" in text else text
        self._any = sum(1 << place for place, character in enumerate(text) if character == "?")
        """Bit of each place where every character does."""
        self._bits = {
            wanted: self._any | sum(1 << place for place, character in enumerate(text) if character == wanted)
            for wanted in set(text) - {"?"}
        }

    def fits(self, text: str, place: int) -> bool:
        """It stands in ``text`` at this place."""
        if self._literal is not None:
            return text.startswith(self._literal, place)
        return self.find(text, place, place + self.length) == place

    def find(self, text: str, start: int, end: int) -> int:
        """First place within ``text[start:end]`` where it stands; -1 if there is none."""
        if self._literal is not None:
            return text.find(self._literal, start, end)
        last = 1 << (self.length - 1)
        state = 0
        for place in range(start, min(end, len(text))):
            state = (state << 1 | 1) & self._bits.get(text[place], self._any)
            if state & last:
                return place + 1 - self.length
        return -1
