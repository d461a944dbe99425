"""How 100 rules are tried in the time of a few look-ups: by what they look at, not one after the other. Pure.

Every rule is a bit. A column is one thing rules look at (the namespace, a label, an output field); for a value it knows the bits of all
rules that hold, or do not look at it. An alert starts with all bits, every column it needs takes some away, and the lowest that is left
is the first rule that matches. A column that no remaining rule looks at is not read.

The bits of a value are remembered while there is room. A new value costs a look-up for the literals of its column, one for each length
of what stands before a wildcard, and the globs that begin with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from forwarder.alert import PRIORITIES
from forwarder.facts import Facts
from forwarder.rules_glob import TEXT_LENGTH_MAX, WILDCARD, Matches, glob, is_literal
from forwarder.rules_settings import PATTERN_MATCHERS, MatchSettings, field_text, patterns_of, ranks_of

TAGS_MAX = 256
"""Tags of one alert that are looked at; Falco's rules have less than 20."""
_TAGS_USUAL, _TEXT_USUAL = 16, 256
"""What is remembered is no larger: an attacker chooses the values."""

Read = Callable[[Facts], Any]
Forms = Callable[[Any], Iterable[str]]
"""The texts of a value, where it is not one itself: one of them has to match."""


def _workload_forms(value: str) -> Iterable[str]:
    return (value, value.partition("/")[2])


class Column:
    """One thing that rules look at, and what they want of it."""

    __slots__ = ("_forms", "_globs", "_headed", "_headless", "_literals", "memo", "name", "read", "used")

    def __init__(self, name: str, read: Read, forms: Forms | None = None) -> None:
        self.name = name
        self.read = read
        self.used = 0
        """Bits of the rules that look at it."""
        self.memo: dict[Any, int] = {}
        self._forms = forms
        self._literals: dict[str, int] = {}
        self._globs: dict[str, tuple[Matches, int]] = {}
        self._headed: list[tuple[int, dict[str, list[tuple[Matches, int]]]]] = []
        """Globs by what stands before their first wildcard, by its length."""
        self._headless: list[tuple[Matches, int]] = []

    def want(self, bit: int, *, literals: Iterable[str] = (), globs: Iterable[str] = ()) -> None:
        """A rule wants one of these."""
        self.used |= bit
        for text in literals:
            self._literals[text] = self._literals.get(text, 0) | bit
        for pattern in globs:
            if is_literal(pattern):
                self.want(bit, literals=[pattern])
            else:
                matches, bits = self._globs.get(pattern) or (glob(pattern), 0)
                self._globs[pattern] = (matches, bits | bit)

    def seal(self) -> None:
        """Nothing more will be wanted: sort the globs."""
        lengths: dict[int, dict[str, list[tuple[Matches, int]]]] = {}
        for pattern, found in self._globs.items():
            head = WILDCARD.split(pattern, maxsplit=1)[0]
            if head:
                lengths.setdefault(len(head), {}).setdefault(head, []).append(found)
            else:
                self._headless.append(found)
        self._headed = list(lengths.items())

    def holding(self, value: Any) -> int:
        """Bits of the rules that hold for the value, or do not look at this column. What is absent matches nothing."""
        found = 0
        for text in (value,) if self._forms is None else self._forms(value):
            if text:
                text = text[:TEXT_LENGTH_MAX]  # noqa: PLW2901 - the rest does not exist
                found |= self._literals.get(text, 0)
                for length, headed in self._headed:
                    for matches, bits in headed.get(text[:length], ()):
                        if matches(text):
                            found |= bits
                for matches, bits in self._headless:
                    if matches(text):
                        found |= bits
        return found | ~self.used

    def is_usual(self, value: Any) -> bool:
        """Small enough to be remembered."""
        if value.__class__ is str:
            return len(value) <= _TEXT_USUAL
        return len(value) <= _TAGS_USUAL and sum(map(len, value)) <= _TEXT_USUAL


class Columns:
    """The columns of a set of rules, in the order in which they are read: the cheapest and most telling first."""

    def __init__(self, rules: Sequence[MatchSettings], cluster: str) -> None:
        """``cluster`` is the configured one, which no alert carries."""
        self._reads: dict[str, tuple[Any, ...]] = {
            name: (itemgetter(Facts._fields.index(name)),) for name in PATTERN_MATCHERS
        }
        self._reads["priority"] = (_priority,)
        self._reads["tags"] = (_tags, tuple)
        self._reads["workload"] = (attrgetter("workload"), _workload_forms)
        self._reads["cluster"] = (lambda facts: facts.cluster or cluster,)
        self._by_name: dict[str, Column] = {}
        for place, match in enumerate(rules):
            self._add(match, 1 << place)
        for column in self._by_name.values():
            column.seal()
        order = {name: place for place, name in enumerate(["rule", "priority", *PATTERN_MATCHERS])}
        self.all = sorted(self._by_name.values(), key=lambda column: order.get(column.name, len(order)))

    def _add(self, match: MatchSettings, bit: int) -> None:
        for name in PATTERN_MATCHERS:
            if patterns := patterns_of(getattr(match, name)):
                self._column(name, *self._reads[name]).want(bit, globs=patterns)
        if match.priority:
            ranks = ranks_of(match.priority)
            self._column("priority", *self._reads["priority"]).want(
                bit, literals=[PRIORITIES[rank] for rank in ranks]
            )
        for name in ("labels", "namespace_labels"):
            for label, patterns in (getattr(match, name) or {}).items():
                column = self._column(f"{name}.{label}", _label(name, label))
                column.want(bit, globs=patterns_of(patterns))
        for name, wanted in (match.fields or {}).items():
            literals, globs = _wanted(wanted)
            self._column(f"fields.{name}", _field(name)).want(bit, literals=literals, globs=globs)

    def _column(self, name: str, read: Read, forms: Forms | None = None) -> Column:
        if name not in self._by_name:
            self._by_name[name] = Column(name, read, forms)
        return self._by_name[name]

    def failing(self, facts: Facts, bit: int) -> Iterator[tuple[str, Any]]:
        """Names and values of what keeps a rule from matching."""
        for column in self.all:
            value = column.read(facts)
            if column.used & bit and not column.holding(value) & bit:
                yield column.name, value


def _priority(facts: Facts) -> str:
    return PRIORITIES[facts.rank]


def _tags(facts: Facts) -> tuple[str, ...]:
    return tuple(facts.tags[:TAGS_MAX])


def _label(kind: str, label: str) -> Read:
    labels: Callable[[Facts], Mapping[str, str]] = itemgetter(Facts._fields.index(kind))
    return lambda facts: labels(facts).get(label, "")


def _field(name: str) -> Read:
    def text(facts: Facts) -> str:
        value = facts.fields.get(name)  # the usual cases without a call
        if value is None or value.__class__ is str:
            return value if value and value != "<NA>" else ""
        return facts.text(name)

    return text


def _wanted(wanted: Any) -> tuple[list[str], list[str]]:
    """Literals and globs of a matcher of an output field."""
    if not isinstance(wanted, dict):
        return [field_text(wanted)], []
    return [field_text(value) for value in wanted.get("one_of", ())], patterns_of(wanted.get("glob", []))
