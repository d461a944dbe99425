"""The state of the fake Kubernetes: objects, one growing version for all, and the history since compaction."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from tests.fakes.kubernetes_common import RESOURCES, Resource, View, go_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_NAME: Final = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_METADATA_ORDER: Final = (
    "name",
    "generateName",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "labels",
    "annotations",
    "ownerReferences",
    "finalizers",
    "managedFields",
)
_ORDER: Final = ("metadata", "spec", "data", "binaryData", "status")


def _ordered(value: dict[str, Any], order: tuple[str, ...]) -> dict[str, Any]:
    known = {key: value[key] for key in order if key in value}
    return known | {key: item for key, item in value.items() if key not in known}


def _field(obj: dict[str, Any], path: str) -> str:
    value: Any = obj
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Stored:
    """One object at one version, as bytes, so that nobody can change the past."""

    resource: Resource
    namespace: str
    name: str
    uid: str
    version: int
    body: bytes
    metadata: bytes
    fields: Mapping[str, str]

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    def decode(self) -> dict[str, Any]:
        """A fresh copy of the full object."""
        obj: dict[str, Any] = json.loads(self.encode(View()))
        return obj

    def encode(self, view: View, *, in_list: bool = False) -> bytes:
        """The object as sent; full objects in a list have neither kind nor apiVersion, partial ones have."""
        if view.partial:
            head = f'{{"kind":"PartialObjectMetadata","apiVersion":"{view.api_version}",'
            return head.encode() + self.metadata[1:]
        if in_list:
            return self.body
        head = f'{{"kind":"{self.resource.kind}","apiVersion":"{self.resource.api_version}",'
        return head.encode() + self.body[1:]

    def at(self, version: int) -> Stored:
        """The same object with another version, as in a DELETED event."""
        return freeze(self.resource, self.decode(), version)


def freeze(resource: Resource, obj: dict[str, Any], version: int) -> Stored:
    metadata = _ordered(obj["metadata"] | {"resourceVersion": str(version)}, _METADATA_ORDER)
    full = _ordered({key: value for key, value in obj.items() if key not in ("kind", "apiVersion")}, _ORDER)
    full["metadata"] = metadata
    return Stored(
        resource=resource,
        namespace=metadata.get("namespace", ""),
        name=metadata["name"],
        uid=metadata["uid"],
        version=version,
        body=go_json(full),
        metadata=go_json({"metadata": metadata}),
        fields={path: _field(full, path) for path in (*resource.selectable, *resource.fields)},
    )


@dataclass(frozen=True, slots=True)
class Change:
    """A write: what was there before and what is there now."""

    version: int
    old: Stored | None
    new: Stored | None

    @property
    def key(self) -> str:
        stored = self.new or self.old
        assert stored is not None
        return stored.key


class Store:
    """All objects and the changes since the last compaction."""

    def __init__(self, clock: Callable[[], float], on_change: Callable[[Resource, Change], None]) -> None:
        self.version = 1000
        self.compacted = 1000
        self._clock = clock
        self._on_change = on_change
        self._tables: dict[str, dict[str, Stored]] = {plural: {} for plural in RESOURCES}
        self._history: dict[str, list[Change]] = {plural: [] for plural in RESOURCES}

    def create(self, kind: str, obj: dict[str, Any]) -> Stored:
        resource, copy = self._checked(kind, obj)
        metadata = copy["metadata"]
        metadata.setdefault("uid", str(uuid4()))
        if not metadata.get("creationTimestamp"):
            metadata["creationTimestamp"] = datetime.fromtimestamp(self._clock(), UTC).strftime(
                "%Y-%m-%dT%H:%M:%SZ"
            )
        stored = freeze(resource, copy, self.version + 1)
        if stored.key in self._tables[kind]:
            raise ValueError(f'{kind} "{stored.name}" already exists')
        self._write(resource, None, stored)
        return stored

    def update(self, kind: str, obj: dict[str, Any]) -> Stored:
        resource, copy = self._checked(kind, obj)
        metadata = copy["metadata"]
        old = self.find(kind, metadata.get("namespace", ""), metadata["name"])
        if old is None:
            raise ValueError(f'{kind} "{metadata["name"]}" not found')
        if metadata.setdefault("uid", old.uid) != old.uid:
            raise ValueError("the UID of an object never changes: delete it and create another")
        before = old.decode()["metadata"]
        if metadata.setdefault("creationTimestamp", before["creationTimestamp"]) is None:
            metadata["creationTimestamp"] = before["creationTimestamp"]
        stored = freeze(resource, copy, self.version + 1)
        self._write(resource, old, stored)
        return stored

    def delete(self, kind: str, namespace: str, name: str) -> Stored:
        """The last state, with the version of the deletion."""
        old = self.find(kind, namespace, name)
        if old is None:
            raise ValueError(f'{kind} "{name}" not found')
        self._write(old.resource, old, None)
        return old.at(self.version)

    def advance(self, by: int = 1) -> None:
        """As if something that nobody here looks at had been written."""
        self.version += by

    def compact(self) -> None:
        """Forget the past: every version handed out so far is too old now."""
        self.advance()
        self.compacted = self.version
        for changes in self._history.values():
            changes.clear()

    def find(self, kind: str, namespace: str, name: str) -> Stored | None:
        return self._tables[kind].get(f"{namespace}/{name}" if RESOURCES[kind].namespaced else name)

    def at(self, resource: Resource, version: int | None = None) -> list[Stored]:
        """All objects in the order of their keys, now or at a version that is not compacted."""
        table = dict(self._tables[resource.plural])
        if version is not None:
            for change in reversed(self._history[resource.plural]):
                if change.version <= version:
                    break
                if change.old is None:
                    del table[change.key]
                else:
                    table[change.key] = change.old
        return [table[key] for key in sorted(table)]

    def since(self, resource: Resource, version: int) -> list[Change]:
        return [change for change in self._history[resource.plural] if change.version > version]

    def _checked(self, kind: str, obj: dict[str, Any]) -> tuple[Resource, dict[str, Any]]:
        resource = RESOURCES[kind]
        copy = dict(obj) | {"metadata": dict(obj["metadata"])}
        metadata = copy["metadata"]
        if resource.namespaced:
            metadata.setdefault("namespace", "default")
        elif "namespace" in metadata:
            raise ValueError(f"{kind} have no namespace")
        if not _NAME.fullmatch(metadata["name"]):
            raise ValueError(f"not a name: {metadata['name']!r}")
        for key, expected in (("kind", resource.kind), ("apiVersion", resource.api_version)):
            if obj.get(key, expected) != expected:
                raise ValueError(f"{key} of {kind} is {expected!r}, not {obj[key]!r}")
        return resource, copy

    def _write(self, resource: Resource, old: Stored | None, new: Stored | None) -> None:
        self.version += 1
        change = Change(self.version, old, new)
        if new is None:
            del self._tables[resource.plural][change.key]
        else:
            self._tables[resource.plural][change.key] = new
        self._history[resource.plural].append(change)
        self._on_change(resource, change)
