"""Objects of the Kubernetes API of any shape: taken, or refused with ``ValidationError`` and nothing else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forwarder.kubernetes_objects import Pod, decode_meta, decode_node, decode_pod
from tests.fakes import kubernetes_objects as made
from tests.test_kubernetes_objects import ALL, pod_of

DECODERS = (lambda data: decode_pod(data, ALL), decode_node, lambda data: decode_meta(data, ALL))


@pytest.mark.parametrize(
    "body",
    [
        b"null", b"[]", b"5", b'"pod"', b"{}", b'{"metadata":null}', b'{"metadata":[]}',
        b'{"metadata":{"name":5}}', b'{"metadata":{"labels":{"a":1}}}', b'{"metadata":{"labels":[]}}',
        b'{"metadata":{"ownerReferences":{}}}', b'{"metadata":{"ownerReferences":[null]}}',
        b'{"metadata":{"ownerReferences":[{"controller":"true"}]}}', b'{"metadata":{"creationTimestamp":5}}',
        b'{"metadata":{"uid":null}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("decode", DECODERS)
def test_odd_metadata_is_refused_in_one_way(decode: Any, body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(body)


@pytest.mark.parametrize("body", [b'{"metadata":{"name":"\xff"}}', b'{"metadata":{"labels":{"\xc0":"a"}}}'])
@pytest.mark.parametrize("decode", DECODERS)
def test_what_is_no_unicode_is_refused_in_the_same_way(decode: Any, body: bytes) -> None:
    """The splitter does not look into texts: one such object must not end the whole list."""
    with pytest.raises(msgspec.ValidationError):
        decode(body)


@pytest.mark.parametrize(
    "members",
    [
        {"spec": None},
        {"spec": []},
        {"spec": {"nodeName": 1}},
        {"spec": {"hostNetwork": "yes"}},
        {"spec": {"containers": {}}},
        {"spec": {"containers": [None]}},
        {"spec": {"containers": [{"name": "a", "securityContext": {"privileged": "true"}}]}},
        {"status": "Running"},
        {"status": {"podIP": ["10.0.0.1"]}},
        {"status": {"containerStatuses": [{"state": {"running": "yes"}}]}},
        {"status": {"initContainerStatuses": [{"lastState": {"terminated": {"containerID": 7}}}]}},
    ],
)
def test_an_odd_pod_is_refused_in_one_way(members: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        pod_of({"metadata": {"uid": "u"}} | members)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False)
)


def _paths(thing: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    members = (
        thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    )
    return [path, *[found for key, value in members for found in _paths(value, (*path, key))]]


POD = made.pod("a", owner=made.Owner("ReplicaSet", "r", "u"))
PATHS = [path for path in _paths(POD) if path and path[:2] != ("metadata", "managedFields")]


@given(st.sampled_from(PATHS), LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(st.text(), LEAVES))
@example(("spec",), None)
@settings(max_examples=250, deadline=None)
def test_a_pod_with_anything_anywhere_is_taken_or_refused(path: tuple[Any, ...], value: Any) -> None:
    thing: Any = json.loads(json.dumps(POD))
    place = thing
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with contextlib.suppress(msgspec.ValidationError):
        assert isinstance(pod_of(thing), Pod)
