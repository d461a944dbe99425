"""The pace of a sink, in simulated time: never too fast, never stuck, back to full speed after a throttle."""

from __future__ import annotations

import asyncio

import pytest

from forwarder.pace import RATE_FLOOR, Pace

pytestmark = pytest.mark.looptime


def now() -> float:
    return asyncio.get_running_loop().time()


async def call(pace: Pace, starts: list[float], secs: float = 0.0) -> None:
    async with pace.slot():
        starts.append(now())
        await asyncio.sleep(secs)


async def burst_of(pace: Pace, count: int, secs: float = 0.0) -> list[float]:
    """So many calls asked for at once; when each began, counted from the asking."""
    begun = now()
    starts: list[float] = []
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(call(pace, starts, secs))
    return [start - begun for start in starts]


def fastest(starts: list[float], window: float) -> int:
    """Most calls that began within any window of that length."""
    return max(sum(first <= start <= first + window for start in starts) for first in starts)


# ---- rate -------------------------------------------------------------------------------------------


async def test_after_the_burst_one_call_every_tenth_of_a_second() -> None:
    starts = await burst_of(Pace(concurrency_max=1000, rate_per_sec=10, burst=30), 100)
    assert starts[:30] == [0.0] * 30
    assert starts[30:] == pytest.approx([0.1 * (number + 1) for number in range(70)])


@pytest.mark.parametrize("burst", [1, 3, 30])
@pytest.mark.parametrize("rate", [0.5, 10.0, 333.0])
async def test_never_more_than_rate_times_time_plus_burst(rate: float, burst: int) -> None:
    """Whatever the pauses between the calls are, and whoever throttles or succeeds meanwhile."""
    pace = Pace(concurrency_max=8, rate_per_sec=rate, burst=burst)
    begun, starts = now(), list[float]()
    for round_ in range(40):
        starts += [now() - begun + start for start in await burst_of(pace, round_ % 7, secs=0.01)]
        if round_ % 9 == 5:
            pace.throttled()
        else:
            pace.succeeded()
        await asyncio.sleep((round_ % 5) / rate)
    starts.sort()
    for window in (0.0, 1 / rate, 10 / rate, 100 / rate):
        assert fastest(starts, window) <= burst + rate * window + 1e-6


async def test_without_a_rate_there_is_no_wait() -> None:
    pace = Pace(concurrency_max=1)
    assert await burst_of(pace, 200) == [0.0] * 200
    pace.throttled()
    pace.succeeded()
    assert pace.rate == 0.0


async def test_a_long_pause_saves_no_more_than_the_burst() -> None:
    pace = Pace(concurrency_max=100, rate_per_sec=1, burst=5)
    await burst_of(pace, 5)
    await asyncio.sleep(86_400)
    assert (await burst_of(pace, 7)) == pytest.approx([0.0] * 5 + [1.0, 2.0])


# ---- throttles and recovery -------------------------------------------------------------------------


async def test_a_throttle_halves_down_to_a_floor() -> None:
    pace = Pace(concurrency_max=16, rate_per_sec=10, burst=30)
    assert (pace.limit, pace.rate) == (16.0, 10.0)
    pace.throttled()
    assert (pace.limit, pace.rate) == (8.0, 5.0)
    for _ in range(20):
        pace.throttled()
    assert (pace.limit, pace.rate) == (1.0, 10 * RATE_FLOOR)


async def test_a_throttle_empties_the_bucket() -> None:
    pace = Pace(concurrency_max=16, rate_per_sec=10, burst=30)
    await burst_of(pace, 1)
    pace.throttled()
    assert await burst_of(pace, 2) == pytest.approx([0.2, 0.4])


async def test_a_throttle_after_a_long_call_empties_the_bucket_too() -> None:
    """What ran in before the throttle is gone, also where nobody asked for a token in between."""
    pace = Pace(concurrency_max=16, rate_per_sec=10, burst=30)
    async with pace.slot():
        await asyncio.sleep(20)
        pace.throttled()
    assert await burst_of(pace, 2) == pytest.approx([0.2, 0.4])


async def test_at_the_floor_calls_still_go_out() -> None:
    pace = Pace(concurrency_max=4, rate_per_sec=10, burst=1)
    for _ in range(50):
        pace.throttled()
    starts = await burst_of(pace, 3)
    assert starts == pytest.approx([2.0, 4.0, 6.0])


async def test_success_wins_everything_back() -> None:
    pace = Pace(concurrency_max=4, rate_per_sec=10, burst=1)
    for _ in range(50):
        pace.throttled()
    for number in range(100):
        pace.succeeded()
        assert pace.limit <= 4
        assert pace.rate <= 10
        if number < 5:
            assert pace.rate < 10
    assert (pace.limit, pace.rate) == (4.0, 10.0)
    starts = await burst_of(pace, 21)
    assert starts[20] - starts[10] == pytest.approx(1.0)


async def test_a_throttle_while_others_wait_slows_them_down() -> None:
    pace = Pace(concurrency_max=100, rate_per_sec=10, burst=1)
    starts: list[float] = []
    begun = now()
    async with asyncio.TaskGroup() as group:
        for _ in range(11):
            group.create_task(call(pace, starts))
        await asyncio.sleep(0.05)
        pace.throttled()
    assert starts[-1] - begun >= 1.9


# ---- calls at a time --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_never_more_calls_at_a_time_than_allowed(limit: int) -> None:
    pace = Pace(concurrency_max=limit)
    running = most = 0

    async def watched() -> None:
        nonlocal running, most
        async with pace.slot():
            running += 1
            most = max(most, running)
            assert running <= pace.in_flight <= limit
            await asyncio.sleep(1)
            running -= 1

    begun = now()
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(watched())
    assert (most, pace.in_flight) == (limit, 0)
    assert now() - begun == pytest.approx(20 / limit, abs=0.01)


async def test_after_a_throttle_fewer_calls_at_a_time() -> None:
    pace = Pace(concurrency_max=4)
    pace.throttled()
    starts = await burst_of(pace, 6, secs=1)
    assert starts == pytest.approx([0, 0, 1, 1, 2, 2])


async def test_calls_begin_in_the_order_of_asking() -> None:
    pace = Pace(concurrency_max=2, rate_per_sec=10, burst=1)
    order: list[int] = []

    async def numbered(number: int) -> None:
        async with pace.slot():
            order.append(number)
            await asyncio.sleep(0.35)

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(numbered(number))
    assert order == list(range(10))


async def test_nobody_starves_beside_one_that_calls_again_and_again() -> None:
    """As in a bisect: one task makes many calls in a row, and another one waits for its only call."""
    pace = Pace(concurrency_max=1)
    greedy_calls = 0
    waited = asyncio.Event()

    async def greedy() -> None:
        nonlocal greedy_calls
        while not waited.is_set() and greedy_calls < 100:
            async with pace.slot():
                greedy_calls += 1
                await asyncio.sleep(1)

    async def modest() -> None:
        await asyncio.sleep(0.5)
        async with pace.slot():
            waited.set()

    await asyncio.gather(greedy(), modest())
    assert greedy_calls <= 2


# ---- cancellation and errors ------------------------------------------------------------------------


async def test_a_failed_call_frees_its_slot() -> None:
    pace = Pace(concurrency_max=1)

    async def failing() -> None:
        async with pace.slot():
            raise RuntimeError("no")

    for _ in range(3):
        with pytest.raises(RuntimeError):
            await failing()
    assert pace.in_flight == 0
    assert await burst_of(pace, 1) == [0.0]


@pytest.mark.parametrize("held_secs", [0.0, 5.0])
async def test_cancelling_a_call_that_waits_for_a_slot_loses_nothing(held_secs: float) -> None:
    pace = Pace(concurrency_max=1)
    starts: list[float] = []
    async with asyncio.TaskGroup() as group:
        group.create_task(call(pace, starts, 10))
        await asyncio.sleep(0)
        waiting = [group.create_task(call(pace, starts)) for _ in range(3)]
        await asyncio.sleep(held_secs)
        waiting[0].cancel()
        waiting[1].cancel()
    assert len(starts) == 2
    assert pace.in_flight == 0


async def test_cancelling_a_call_in_the_moment_of_its_turn_passes_the_turn_on() -> None:
    pace = Pace(concurrency_max=1)
    starts: list[float] = []
    async with pace.slot():
        unlucky = asyncio.create_task(call(pace, starts))
        last = asyncio.create_task(call(pace, starts))
        await asyncio.sleep(0)
    unlucky.cancel()  # its turn has come, but it has not run yet
    async with asyncio.timeout(1):
        await last
    assert unlucky.cancelled()
    assert (len(starts), pace.in_flight) == (1, 0)


async def test_cancelling_a_call_that_waits_for_a_token_frees_its_slot() -> None:
    pace = Pace(concurrency_max=2, rate_per_sec=1, burst=1)
    starts: list[float] = []
    await burst_of(pace, 1)
    begun = now()
    tasks = [asyncio.create_task(call(pace, starts)) for _ in range(4)]
    await asyncio.sleep(0.5)
    tasks[0].cancel()
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert pace.in_flight == 0
    assert [start - begun for start in starts] == pytest.approx([1.0, 2.0])


async def test_cancelling_a_running_call_lets_the_next_one_in() -> None:
    pace = Pace(concurrency_max=1)
    starts: list[float] = []
    begun = now()
    first = asyncio.create_task(call(pace, starts, 3600))
    await asyncio.sleep(1)
    second = asyncio.create_task(call(pace, starts))
    await asyncio.sleep(1)
    first.cancel()
    await second
    assert [start - begun for start in starts] == pytest.approx([0.0, 2.0])
    assert pace.in_flight == 0
