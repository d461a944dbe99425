"""Lists and watches while they arrive: whatever the chunks, exactly the objects and lines that were sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from forwarder import kubernetes_stream
from forwarder.kubernetes_api import ApiError
from forwarder.kubernetes_stream import DOUBTS_MAX, ItemSplitter, lines
from tests.fakes import kubernetes_objects as made

LOOKALIKES = [
    '},{"metadata":', '"items":[', '{"items":[{"metadata":{}},{"metadata":{}}]}', "]}", "\\", '\\"', '"', "},{", "\u2028",
    '{"kind":"Pod"},{"kind":"Pod"}', '"items":[{"metadata":1},{"metadata":2}],',
]  # fmt: skip
TEXTS = st.text(max_size=6) | st.sampled_from(LOOKALIKES)
NAMES = st.sampled_from(["metadata", "kind", "apiVersion", "spec", "items", "f:items"]) | TEXTS
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
ITEMS = st.fixed_dictionaries(
    {"metadata": st.dictionaries(NAMES, VALUES, max_size=2)},
    optional={"spec": VALUES, "kind": VALUES, "items": VALUES},
)
META = st.fixed_dictionaries(
    {}, optional={"resourceVersion": st.text("0123456789", max_size=4), "continue": TEXTS, "selfLink": VALUES}
)
STYLES = st.sampled_from([(",", ":"), (", ", ": "), (",\n ", ":"), (" ,", " : ")])
CUTS = st.lists(st.integers(1, 60), max_size=30)


def chunks(body: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The body in pieces of these lengths, and the rest."""
    pieces = []
    for length in cuts:
        pieces.append(body[:length])
        body = body[length:]
    return [*pieces, body]


def split(pieces: Iterable[bytes]) -> tuple[Any, list[bytes]]:
    splitter = ItemSplitter()
    found = [item for piece in pieces for item in splitter.feed(piece)]
    meta, rest = splitter.finish()
    return meta, found + rest


def check(thing: dict[str, Any], pieces: list[bytes]) -> None:
    meta, found = split(pieces)
    assert [json.loads(item) for item in found] == (thing.get("items") or [])
    told = thing.get("metadata", {})
    assert (meta.resource_version, meta.continue_token) == (
        told.get("resourceVersion", ""),
        told.get("continue", ""),
    )


@st.composite
def bodies(draw: Any, items: st.SearchStrategy[Any] = ITEMS) -> tuple[dict[str, Any], bytes]:
    """A list as an API server might send it: any order of members, compact or not, and its bytes."""
    members: dict[str, Any] = {"kind": "PodList", "apiVersion": "v1", "metadata": draw(META)}
    if draw(st.integers(0, 9)):
        members["items"] = draw(st.lists(items, max_size=5) | st.none())
    if draw(st.booleans()):
        members["extra"] = draw(VALUES)
    thing = dict(draw(st.permutations(list(members.items()))))
    return thing, json.dumps(thing, separators=draw(STYLES), ensure_ascii=draw(st.booleans())).encode()


# ---- lists ------------------------------------------------------------------------------------------


@given(bodies(), CUTS)
@settings(max_examples=500, deadline=None)
def test_any_list_in_any_chunks(made_list: tuple[dict[str, Any], bytes], cuts: list[int]) -> None:
    thing, body = made_list
    check(thing, chunks(body, cuts))


@given(bodies(VALUES), CUTS)
@settings(max_examples=150, deadline=None)
def test_lists_of_anything(made_list: tuple[dict[str, Any], bytes], cuts: list[int]) -> None:
    thing, body = made_list
    check(thing, chunks(body, cuts))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 15, 16, 17, 18, 19, 64, 10_000])
def test_every_seam_of_a_real_list(length: int) -> None:
    pods = [made.pod(f"web-{number}", containers=[made.Container("a")]) for number in range(3)]
    trimmed = [{"metadata": item["metadata"], "status": item["status"]} for item in pods]
    thing = {
        "kind": "PodList",
        "apiVersion": "v1",
        "metadata": {"resourceVersion": "5"},
        "items": pods + trimmed,
    }
    body = json.dumps(thing, separators=(",", ":")).encode()
    check(thing, [body[start : start + length] for start in range(0, len(body), length)])


def test_objects_leave_as_soon_as_the_next_one_begins() -> None:
    """That is the point of it: ten thousand pods are never in memory at once."""
    splitter, item = ItemSplitter(), b'{"metadata":{"uid":"u"},"x":"%s"}' % (b"y" * 1000)
    assert list(splitter.feed(b'{"kind":"PodList","metadata":{},"items":[' + item)) == []
    for _ in range(200):
        assert list(splitter.feed(b"," + item)) == [item]
        assert len(splitter._rest) < 2 * len(item)
    assert list(splitter.feed(b"," + item + b"," + item + b"]}")) == [item, item]
    assert splitter.finish()[1] == [item]


@pytest.mark.parametrize(
    "body",
    [
        '{"items":[]}', '{"items":null}', "{}", '{"metadata":{}}', '{"items":[{}]}', '{"items":[{},{},{}]}',
        '{"items":[{"metadata":{}}],"metadata":{"continue":"c"}}', ' {"items" : [ {"metadata":{}} ] } \n',
        '{"items":[{"metadata":{"a":"}"}},{"metadata":{"b":"{"}}]}', '{"items":[[{"metadata":1},{"metadata":2}]]}',
        '{"items":[{"metadata":{}, "l":[{"metadata":1},{"metadata":2}]},{"kind":"x"},{"apiVersion":"y"}]}',
        '{"items":[{"metadata":{},"items":[{"metadata":1},{"metadata":2}]},{"metadata":3}]}',
        r'{"items":[{"metadata":{"a":"\"},{\"metadata\":"}},{"metadata":{}}]}', '{"items":[1,{"metadata":1},{"metadata":2}]}',
        r'{"items":[{"metadata":{"a":"\\"}},{"metadata":{"b":"\\\""}}]}', '{"items":[{"metadata":{}},{"metadata":{}}],"x":[1]}',
        '{"metadata":{"note":{"items":[{"metadata":{}},{"metadata":{}}]}},"items":[{"kind":"x"}]}',
        r'{"a\"items":[{"metadata":1},{"metadata":2}],"items":[{"kind":"x"}]}',
        '{"extra":{"items":[{"metadata":1},{"metadata":2}]}}',
    ],
)  # fmt: skip
def test_odd_but_whole(body: str) -> None:
    thing = json.loads(body)
    data = body.encode()
    check(thing, [data])
    check(thing, [data[place : place + 1] for place in range(len(data))])


@given(bodies(), CUTS, st.data())
@settings(max_examples=150, deadline=None)
def test_a_list_that_was_cut_off_is_none(
    made_list: tuple[dict[str, Any], bytes], cuts: list[int], data: st.DataObject
) -> None:
    """Objects may have left before; that the list is not whole is always told, so nothing is deleted for it."""
    _, body = made_list
    end = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(ApiError) as caught:
        split(chunks(body[:end], cuts))
    assert caught.value.reason == "decode"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"<html>", b'{"items":5}', b'{"items":{}}', b'{"metadata":null}', b'{"metadata":[]}',
        b'{"metadata":{"resourceVersion":5}}', b'{"items":[}', b'{"items":[{"metadata":{}},]}', b'{"items":[]}x',
        b'{"items":[{"metadata":{}}{"metadata":{}}]}', b'{"items":[' + b"[" * 100_000, b'{"x":' * 100_000,
        b'{"items":[{"metadata":{}},{"metadata":{}}', b'{"items":[{"metadata":{}},{"metadata":{}}}',
    ],
    ids=lambda body: repr(body[:40]),
)  # fmt: skip
def test_what_is_no_list(body: bytes) -> None:
    for pieces in ([body], [body[place : place + 999] for place in range(0, len(body), 999)]):
        with pytest.raises(ApiError):
            split(pieces)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kubernetes_stream.REST_BYTES_MAX <= 64 << 20
    monkeypatch.setattr(kubernetes_stream, "REST_BYTES_MAX", 1000)
    item = b'{"metadata":{"x":"%s"}}' % (b"y" * 900)
    splitter = ItemSplitter()
    assert list(splitter.feed(b'{"items":[')) == []
    assert len([one for _ in range(50) for one in splitter.feed(item + b",")]) == 49
    for endless in (b'{"items":[{"metadata":{"x":"', b'{"items" : [ ', b" ", b'{"x":"', b'{"items":["a",'):
        splitter = ItemSplitter()
        list(splitter.feed(endless))
        for _ in range(9):
            list(splitter.feed(b"z" * 100))
        with pytest.raises(ApiError) as caught:
            list(splitter.feed(b"z" * 120))
        assert caught.value.reason == "decode"


# ---- watches ----------------------------------------------------------------------------------------


class Content:
    """A body that arrives in these pieces."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = list(pieces)

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


def read(pieces: Iterable[bytes]) -> list[bytes]:
    async def all_of_it() -> list[bytes]:
        return [line async for line in lines(Content(pieces))]  # type: ignore[arg-type]

    return asyncio.run(all_of_it())


@given(
    st.lists(VALUES.map(lambda value: {"type": "ADDED", "object": value}), max_size=6), CUTS, st.booleans()
)
@example([{"type": "ADDED", "object": "\n\r\n\u2028\x0b\x85"}], [1] * 30, True)
@settings(max_examples=200, deadline=None)
def test_any_lines_in_any_chunks(events: list[Any], cuts: list[int], blank: bool) -> None:
    body = b"".join(
        json.dumps(item, ensure_ascii=False).encode() + b"\n" * (1 + blank * (number % 3))
        for number, item in enumerate(events)
    )
    assert [json.loads(line) for line in read(chunks(body, cuts))] == events


@pytest.mark.parametrize(
    ("body", "expected"), [(b"", []), (b"\n\n", []), (b"a\n \n", [b"a", b" "]), (b"a\n ", [b"a"])]
)
def test_ends_of_a_watch(body: bytes, expected: list[bytes]) -> None:
    assert read([body]) == expected
    assert read([body[place : place + 1] for place in range(len(body))]) == expected


@given(CUTS, st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_a_watch_that_was_cut_off_within_a_line(cuts: list[int], lost: int) -> None:
    """What was whole is given; the rest is a broken connection, not an event."""
    line = b'{"type":"ADDED","object":{"metadata":{}}}'
    seen: list[bytes] = []

    async def follow() -> None:
        async for found in lines(Content(chunks(line + b"\n" + line[:-lost], cuts))):  # type: ignore[arg-type]
            seen.append(found)  # noqa: PERF401 - up to the failure

    with pytest.raises(ApiError) as caught:
        asyncio.run(follow())
    assert (caught.value.reason, seen) == ("network", [line])


def test_lines_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kubernetes_stream.LINE_BYTES_MAX <= 4 << 20
    monkeypatch.setattr(kubernetes_stream, "LINE_BYTES_MAX", 1000)
    assert len(read([b"x" * 1000, b"\n" + b"x" * 1000, b"\n"])) == 2
    content = Content([b"x" * 100] * 1000)
    with pytest.raises(ApiError) as caught:
        read(content.pieces)
    assert caught.value.reason == "decode"


def test_a_long_line_in_many_pieces_is_searched_once() -> None:
    """An event of 4 MB in pieces of a kilobyte: quadratic work would hold up the receiver."""
    piece = b"x" * 1024
    (line,) = read([*[piece] * 4000, b"\n"])
    assert len(line) == 4000 * 1024


# ---- objects that look like many --------------------------------------------------------------------


@given(bodies(), CUTS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counting_brackets_comes_to_the_same(
    monkeypatch: pytest.MonkeyPatch, made_list: tuple[dict[str, Any], bytes], cuts: list[int]
) -> None:
    """The way for objects that look like many, taken for all of them."""
    monkeypatch.setattr(kubernetes_stream, "DOUBTS_MAX", 0)
    thing, body = made_list
    check(thing, chunks(body, cuts))


def test_no_object_makes_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of references in one pod, each of which looks like the beginning of the next pod."""
    looks: list[int] = []

    class Counting:
        @staticmethod
        def decode(data: bytes) -> None:
            looks.append(len(data))
            raw.decode(data)

    raw = kubernetes_stream._raw
    monkeypatch.setattr(kubernetes_stream, "_raw", Counting)
    owners = [{"apiVersion": "v1", "kind": "X", "name": "a}],[{", "uid": str(n)} for n in range(8000)]
    items = [{"metadata": {"name": "a", "ownerReferences": owners}}, {"metadata": {"name": 'b"\\\\"'}}]
    thing = {"metadata": {}, "items": [*items, *items]}
    body = json.dumps(thing, separators=(",", ":")).encode()
    check(thing, [body[start : start + 65_536] for start in range(0, len(body), 65_536)])
    assert len(looks) <= 4 * (DOUBTS_MAX + 1)
