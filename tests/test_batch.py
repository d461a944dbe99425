"""Packing: each invariant of the module, for any items and limits."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from forwarder.batch import Item, Limits, pack

LIMITS = st.builds(
    Limits, st.integers(1, 6), st.integers(1, 60), st.none() | st.integers(0, 30) | st.just(10**12)
)


def items_of(shapes: list[tuple[int, int, str]]) -> list[Item]:
    return [
        Item(index=index, data=b"x", size_bytes=size, order=order, partition=partition)
        for index, (size, order, partition) in enumerate(shapes)
    ]


ITEMS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(-20, 60), st.sampled_from(["a", "a", "b", "c"])), max_size=25
).map(items_of)


@given(ITEMS, LIMITS)
@example(items_of([(100, 0, "a")]), Limits(1, 1, 0))
@settings(max_examples=300, deadline=None)
def test_packing(items: list[Item], limits: Limits) -> None:
    batches = pack(items, limits)
    # Every item is in exactly one batch, and no batch is empty.
    assert sorted(item.index for batch in batches for item in batch) == list(range(len(items)))
    assert all(batches)
    for batch in batches:
        # No batch passes a limit; only an item that is too large itself does, alone.
        assert len(batch) <= limits.records_max
        assert len(batch) == 1 or sum(item.size_bytes for item in batch) <= limits.bytes_max
        assert limits.span_max is None or batch[-1].order - batch[0].order <= limits.span_max
        # Items of different partitions never share a batch; within one they ascend, stable for equal ones.
        assert len({item.partition for item in batch}) == 1
        for before, after in pairwise(batch):
            assert (before.order, before.index) < (after.order, after.index)


@given(ITEMS, LIMITS)
@settings(max_examples=100, deadline=None)
def test_order_holds_across_the_batches_of_a_partition(items: list[Item], limits: Limits) -> None:
    for partition in {item.partition for item in items}:
        flat = [item for batch in pack(items, limits) for item in batch if item.partition == partition]
        assert flat == sorted(flat, key=lambda item: item.order)
        assert [item.index for item in flat] == [
            item.index for item in sorted(flat, key=lambda item: (item.order, item.index))
        ]


@given(ITEMS, LIMITS)
@settings(max_examples=100, deadline=None)
def test_batches_are_as_full_as_they_may_be(items: list[Item], limits: Limits) -> None:
    """A batch ends only because the next item would pass a limit."""
    for before, after in pairwise(pack(items, limits)):
        first = after[0]
        if first.partition != before[0].partition:
            continue
        assert (
            len(before) == limits.records_max
            or sum(item.size_bytes for item in before) + first.size_bytes > limits.bytes_max
            or (limits.span_max is not None and first.order - before[0].order > limits.span_max)
        )


def test_nothing_to_pack() -> None:
    assert pack([], Limits(1, 1)) == []


def test_limits_are_inclusive() -> None:
    items = items_of([(5, 0, "a"), (5, 10, "a")])
    assert len(pack(items, Limits(2, 10, 10))) == 1
    assert len(pack(items, Limits(1, 10, 10))) == 2
    assert len(pack(items, Limits(2, 9, 10))) == 2
    assert len(pack(items, Limits(2, 10, 9))) == 2


def test_the_given_items_are_not_reordered() -> None:
    items = items_of([(1, 5, "a"), (1, 0, "a")])
    pack(items, Limits(5, 5))
    assert [item.index for item in items] == [0, 1]
