"""The small languages of CloudWatch Logs, Security Hub and EventBridge, read as their user guides have them.

Only what our templates use: anything else is an error, so that nothing is taken for checked that is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Event = Mapping[str, Any]

_TOKEN = re.compile(r'\s*(\$\.[\w.]+|&&|\|\||!=|=|\(|\)|"(?:[^"\\]|\\.)*")')
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"|/(?:[^/\\]|\\.)+/|\'[^\']*\'')
_WORD = re.compile(r"(?<![\w.@])@?[A-Za-z_][\w.]*(\s*\()?")
_KEYWORDS = frozenset(
    "as and asc bin by desc fields filter in like limit not or sort stats SOURCE 1h".split()  # noqa: SIM905 - words of the language
)
_FUNCTIONS = frozenset({"count_distinct", "latest", "ispresent", "bin"})
SYSTEM_FIELDS = frozenset({"@timestamp", "@message", "@ingestionTime", "@logStream", "@log"})


def names_in(event: Event, prefix: str = "") -> Iterator[str]:
    """Names as Logs Insights discovers them: members of members joined by dots."""
    for key, value in event.items():
        if isinstance(value, Mapping):
            yield from names_in(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def value_at(event: Event, path: str) -> Any:
    """A member of a member; None where there is none. `[0]` takes the first of a list."""
    found: Any = event
    for part in re.findall(r"[^.\[\]]+", path.removeprefix("$.")):
        if isinstance(found, list):
            found = found[int(part)] if int(part) < len(found) else None
        else:
            found = found.get(part) if isinstance(found, Mapping) else None
    return found


# ---- metric filters -----------------------------------------------------------------------------------


class MetricFilter:
    """A JSON filter pattern: comparisons of texts, with `*`, joined by && and ||."""

    def __init__(self, pattern: str) -> None:
        inner = re.fullmatch(r"\s*\{(.*)\}\s*", pattern, re.DOTALL)
        if inner is None:
            raise ValueError(f"no JSON pattern: {pattern}")
        self.selectors: set[str] = set()
        self._tokens = self._split(inner[1])
        self._tree = self._alternatives()
        if self._tokens:
            raise ValueError(f"cannot be read from {self._tokens[0]} on: {pattern}")

    def matches(self, event: Event) -> bool:
        return _true(self._tree, event)

    @staticmethod
    def _split(text: str) -> list[str]:
        tokens, at = [], 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if found is None:
                raise ValueError(f"cannot be read: {text[at:]}")
            tokens.append(found[1])
            at = found.end()
        return tokens

    def _take(self, *expected: str) -> str:
        token = self._tokens.pop(0) if self._tokens else ""
        if expected and token not in expected:
            raise ValueError(f"{token!r} where one of {expected} belongs")
        return token

    def _alternatives(self) -> Any:
        parts = [self._together()]
        while self._tokens[:1] == ["||"]:
            self._take()
            parts.append(self._together())
        return ("or", parts)

    def _together(self) -> Any:
        parts = [self._one()]
        while self._tokens[:1] == ["&&"]:
            self._take()
            parts.append(self._one())
        return ("and", parts)

    def _one(self) -> Any:
        token = self._take()
        if token == "(":
            inner = self._alternatives()
            self._take(")")
            return inner
        if not token.startswith("$."):
            raise ValueError(f"{token!r} where a selector belongs")
        operator, value = self._take("=", "!="), self._take()
        if not value.startswith('"'):
            raise ValueError(f"{value!r} where a text belongs")
        self.selectors.add(token.removeprefix("$."))
        return (operator, token, re.compile(".*".join(map(re.escape, value[1:-1].split("*"))), re.DOTALL))


def _true(node: Any, event: Event) -> bool:
    match node:
        case ("or", parts):
            return any(_true(part, event) for part in parts)
        case ("and", parts):
            return all(_true(part, event) for part in parts)
        case (operator, selector, pattern):
            text = value_at(event, selector)
            # A member that is not there is neither equal nor different.
            return isinstance(text, str) and (pattern.fullmatch(text) is not None) == (operator == "=")
        case _:
            raise AssertionError(node)


# ---- Logs Insights ------------------------------------------------------------------------------------


def fields_in(query: str) -> set[str]:
    """The fields a Logs Insights query names, without those it makes itself."""
    bare = _STRINGS.sub(" ", query)
    made = set(re.findall(r"\bas\s+(\w+)", bare))
    found: set[str] = set()
    for word in _WORD.finditer(bare):
        name = word[0].rstrip(" (")
        if word[1]:
            if name not in _FUNCTIONS | {"in"}:
                raise ValueError(f"{name} is no function that is known here")
        elif name not in _KEYWORDS | made:
            found.add(name)
    return found


# ---- Security Hub's filters -----------------------------------------------------------------------------

_FILTERED = {
    "AwsAccountId": "AwsAccountId",
    "GeneratorId": "GeneratorId",
    "ProductName": "ProductName",
    "RecordState": "RecordState",
    "SeverityLabel": "Severity.Label",
    "Title": "Title",
    "WorkflowStatus": "Workflow.Status",
}
_OF_RESOURCES = {
    "ResourceContainerImageName": "Details.Container.ImageName",
    "ResourceId": "Id",
    "ResourceType": "Type",
}


def attribute(finding: Event, name: str) -> list[str]:
    """The values of an attribute that insights group and filter by."""
    if name == "Type":
        return list(finding["Types"])
    if name in _OF_RESOURCES:
        found = [value_at(resource, _OF_RESOURCES[name]) for resource in finding["Resources"]]
    else:
        found = [value_at(finding, _FILTERED[name])]
    return [value for value in found if value is not None]


def passes(finding: Event, filters: Mapping[str, list[Mapping[str, str]]]) -> bool:
    """Values of one attribute are alternatives, attributes go together."""
    return all(
        any(
            _compare(one["Comparison"], value, one["Value"])
            for one in alternatives
            for value in attribute(finding, name)
        )
        for name, alternatives in filters.items()
    )


def _compare(comparison: str, value: str, wanted: str) -> bool:
    if comparison not in {"EQUALS", "PREFIX"}:
        raise ValueError(f"{comparison} is not read here")
    return value == wanted if comparison == "EQUALS" else value.startswith(wanted)


# ---- EventBridge ----------------------------------------------------------------------------------------


def event_matches(pattern: Mapping[str, Any], event: Any) -> bool:
    """Exact values only. A list of objects matches if one of them does."""
    if isinstance(event, list):
        return any(event_matches(pattern, one) for one in event)
    if not isinstance(event, Mapping):
        return False
    return all(
        event_matches(wanted, event.get(key))
        if isinstance(wanted, Mapping)
        else bool(set(wanted) & set(_values(event.get(key))))
        for key, wanted in pattern.items()
    )


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
