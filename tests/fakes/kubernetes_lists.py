"""Lists of the fake Kubernetes: options, selectors, pages and what `resourceVersion` means for them.

The table of resourceVersion, resourceVersionMatch, limit and continue is the one of the API concepts page.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.fakes.kubernetes_common import (
    CONTINUE_EXPIRED,
    KubeError,
    Resource,
    View,
    bad_request,
    expired,
    go_json,
    invalid_options,
    too_large,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.fakes.kubernetes_store import Store, Stored

_TERM: Final = re.compile(r"([^=!]+)(==|!=|=)(.*)")
_MAX_VERSION: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Selector:
    """Namespace of the path, and fieldSelector."""

    namespace: str
    terms: tuple[tuple[str, bool, str], ...]

    def matches(self, stored: Stored | None) -> bool:
        return (
            stored is not None
            and self.namespace in ("", stored.namespace)
            and all((stored.fields[field] == value) is equal for field, equal, value in self.terms)
        )


def select(resource: Resource, namespace: str, text: str) -> Selector:
    terms = []
    for term in filter(None, text.split(",")):
        found = _TERM.fullmatch(term)
        if found is None:
            raise bad_request(f"invalid selector: '{text}'; can't understand '{term}'")
        field, operator, value = found.groups()
        if field not in (*resource.selectable, *resource.fields):
            raise bad_request(f"field label not supported: {field}")
        terms.append((field, operator != "!=", value))
    return Selector(namespace, tuple(terms))


def version_of(text: str) -> int | None:
    """The number in a resourceVersion; None for the empty one."""
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) > _MAX_VERSION:
        raise bad_request(
            f'invalid resource version: resourceVersion: Invalid value: "{text}": '
            f'strconv.ParseUint: parsing "{text}": invalid syntax'
        )
    return int(text)


def true_in(query: Mapping[str, str], name: str) -> bool:
    """As Go's conversion has it: anything but 0 and false is true."""
    return name in query and query[name].lower() not in ("0", "false")


def number_in(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "") or "0"
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise bad_request(f'strconv.ParseInt: parsing "{text}": invalid syntax')
    return int(text)


def check_options(query: Mapping[str, str], *, watch: bool, watch_list: bool) -> None:
    """Refuse options that contradict each other, before anything else looks at them."""
    version, match, token = (
        query.get(key, "") for key in ("resourceVersion", "resourceVersionMatch", "continue")
    )
    initial = "sendInitialEvents" in query
    field = "resourceVersionMatch"
    if query.get("labelSelector"):
        raise KubeError(501, "", "this fake has no labelSelector: teach it")
    if watch:
        if initial and not watch_list:
            raise invalid_options(
                "sendInitialEvents",
                "Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            )
        if initial and not match:
            raise invalid_options(
                field, "Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
            )
        if match and not initial:
            raise invalid_options(
                field,
                "Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            )
        if match and match != "NotOlderThan":
            raise invalid_options(field, f'Unsupported value: "{match}": supported values: "NotOlderThan"')
        return
    if initial:
        raise invalid_options("sendInitialEvents", "Forbidden: sendInitialEvents is forbidden for list")
    if match and not version:
        raise invalid_options(
            field, "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided"
        )
    if match and token:
        raise invalid_options(field, "Forbidden: resourceVersionMatch is forbidden when continue is provided")
    if match not in ("", "Exact", "NotOlderThan"):
        raise invalid_options(
            field, f'Unsupported value: "{match}": supported values: "Exact", "NotOlderThan", ""'
        )
    if match == "Exact" and version == "0":
        raise invalid_options(
            field, 'Forbidden: resourceVersionMatch "exact" is forbidden for resourceVersion "0"'
        )


def _token(version: int, start: str) -> str:
    raw = go_json({"v": "meta.k8s.io/v1", "rv": version, "start": start})
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _untoken(token: str) -> tuple[int, str]:
    try:
        raw = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        version, start = raw["rv"], raw["start"]
        if raw["v"] != "meta.k8s.io/v1" or not isinstance(version, int) or not version or not start:
            raise ValueError("no version or start")
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise bad_request(f"invalid continue token: continue key is not valid: {error}") from error
    return version, str(start)


@dataclass(frozen=True, slots=True)
class ListRules:
    """What servers differ in: their greatest page, and whether `limit` counts at resourceVersion=0."""

    page_max: int | None
    honour_limit_at_zero: bool


def list_objects(
    store: Store,
    resource: Resource,
    selector: Selector,
    query: Mapping[str, str],
    view: View,
    rules: ListRules,
) -> bytes:
    """The body of a list."""
    limit = number_in(query, "limit")
    if limit < 0:
        raise bad_request("limit must not be negative")
    token = query.get("continue", "")
    start, at, in_cache = "", None, False
    if token:
        if query.get("resourceVersion", "") not in ("", "0"):
            raise bad_request("specifying resource version is not allowed when using continue")
        version, start = _untoken(token)
        if 0 < version < store.compacted:
            raise expired(CONTINUE_EXPIRED, metadata={"continue": _token(-1, start)})
        at = version if version > 0 else None
    else:
        wanted = version_of(query.get("resourceVersion", ""))
        match = query.get("resourceVersionMatch", "")
        if wanted is not None and wanted > store.version:
            raise too_large(wanted, store.version)
        if wanted and (match == "Exact" or (not match and limit)):  # with a limit, no match means Exact
            if wanted < store.compacted:
                raise expired("The resourceVersion for the provided list is too old.")
            at = wanted
        in_cache = wanted == 0 and not rules.honour_limit_at_zero
    if in_cache:
        limit = 0
    if limit and rules.page_max is not None:
        limit = min(limit, rules.page_max)
    shown = at if at is not None else store.version
    rest = [
        stored
        for stored in store.at(resource, at)
        if stored.key >= start and selector.namespace in ("", stored.namespace)
    ]
    return _page(resource, selector, view, rest, limit, shown)


def _page(
    resource: Resource, selector: Selector, view: View, rest: list[Stored], limit: int, shown: int
) -> bytes:
    """Up to `limit` matching objects. Like the real one it looks only at what it passes: the last page may be empty."""
    page: list[Stored] = []
    passed = 0
    for passed, stored in enumerate(rest, 1):  # noqa: B007 - used below
        if selector.matches(stored):
            page.append(stored)
            if limit and len(page) == limit:
                break
    metadata: dict[str, Any] = {"resourceVersion": str(shown)}
    if passed < len(rest):
        metadata["continue"] = _token(shown, rest[passed - 1].key + "\0")
        if not selector.terms:
            metadata["remainingItemCount"] = len(rest) - passed
    kind = "PartialObjectMetadataList" if view.partial else f"{resource.kind}List"
    api_version = view.api_version if view.partial else resource.api_version
    head = go_json({"kind": kind, "apiVersion": api_version, "metadata": metadata})
    items = b",".join(stored.encode(view, in_list=True) for stored in page)
    return head[:-1] + b',"items":[' + items + b"]}\n"
