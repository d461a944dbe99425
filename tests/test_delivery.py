"""The delivery worker in simulated time, over a real spool and a scripted service."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forwarder.batch import Limits
from forwarder.contract import Again, Blocked, Permanent, Permission, Reject, TooLarge, Transient
from forwarder.delivery import Worker
from forwarder.delivery_calls import (
    BACKOFF_MAX_SECS,
    PROBE_SECS,
    REFUSALS_IN_A_ROW_MAX,
    SUSPECTS_MAX,
    DeliverySettings,
)
from forwarder.delivery_round import LIMITED_ATTEMPTS_MAX
from forwarder.metrics import Metrics
from forwarder.record import TEXT, UNPARSED, Record
from forwarder.spool import Spool
from forwarder.spool_settings import SpoolSettings
from tests.scripted import Answer, ScriptedSink, inline
from tests.test_spool_store import flip_block

NAME = "cloudwatch_logs"
pytestmark = pytest.mark.looptime


def alert(
    number: int, *, priority: int = 4, kind: int = 0, internal: bool = False, size: int = 100
) -> Record:
    return Record(kind, f"{number:06d}", priority, 1, 1, internal=internal, body=b"x" * size)


@pytest.fixture(autouse=True)
def nothing_blocks() -> None:
    """Replaces the check for blocking calls: in simulated time the spool writes on the loop."""


class Bench:
    """A spool, a worker, and the numbers a test asks for."""

    def __init__(self, spool: Spool, sink: ScriptedSink, metrics: Metrics) -> None:
        self.spool, self.sink, self.metrics = spool, sink, metrics
        self.worker = Worker(
            sink,
            spool=spool,
            settings=DeliverySettings(call_secs_max=30.0),
            metrics=metrics,
            now=lambda: asyncio.get_event_loop().time(),
            rng=random.Random(7),
        )
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self.worker.run())

    async def store(self, *records: Record) -> None:
        await self.spool.append(records)

    async def settled(self, secs: float = 4000) -> None:
        """Until nothing is pending, in simulated time."""
        async with asyncio.timeout(secs):
            while self.spool.pending(NAME):  # noqa: ASYNC110 - simulated time
                await asyncio.sleep(0.05)

    async def dead(self) -> dict[str, tuple[str, str]]:
        return {
            item.id: (item.reason, item.detail) for _, item in await self.spool.dead_letters(1 << 60, 1000)
        }

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"falco_forwarder_{name}", {"sink": NAME} | labels)
        assert value is not None, name
        return value

    async def stop(self) -> None:
        if self.task:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    metrics = Metrics([NAME])
    settings = SpoolSettings(directory=str(tmp_path), sync="normal")
    spool = inline(Spool(settings, sinks=[NAME], metrics=metrics, now=lambda: 1.0))
    await spool.open()
    bench = Bench(spool, ScriptedSink(), metrics)
    yield bench
    await bench.stop()
    await spool.close()


def scripted(bench: Bench, *answers: Answer) -> None:
    """Answer the next calls with these, then accept everything."""
    left = list(answers)
    bench.sink.script = lambda _ids: left.pop(0) if left else None


async def test_everything_arrives_in_order_and_is_settled(bench: Bench) -> None:
    bench.start()
    await bench.store(*(alert(i) for i in range(50)))
    await bench.settled()
    assert bench.sink.accepted == [f"{i:06d}" for i in range(50)]
    assert bench.value("sent_events_total") == 50
    status = bench.worker.status()
    assert (status.state, status.pending, status.delivered, status.last_error) == ("delivering", 0, 50, None)


async def test_a_lone_alert_waits_no_longer_than_the_linger(bench: Bench) -> None:
    bench.start()
    await asyncio.sleep(10)
    await bench.store(alert(1))
    before = asyncio.get_running_loop().time()
    await bench.settled()
    assert asyncio.get_running_loop().time() - before < 1.5


async def test_a_full_batch_does_not_linger(bench: Bench) -> None:
    bench.sink.limits = Limits(10, 1_000_000)
    bench.sink.linger_secs = 60
    bench.start()
    await asyncio.sleep(1)
    before = asyncio.get_running_loop().time()
    await bench.store(*(alert(i) for i in range(10)))
    await bench.settled()
    assert asyncio.get_running_loop().time() - before < 5


async def test_filtered_alerts_pass_without_a_call(bench: Bench) -> None:
    bench.sink.minimum_rank = 5
    bench.start()
    await bench.store(alert(1, priority=6), alert(2, priority=5), alert(3, priority=7))
    await bench.settled()
    assert bench.sink.accepted == ["000002"]
    assert bench.value("filtered_events_total", reason="minimum_priority") == 2


async def test_findings_take_neither_text_nor_internal_nor_unparsed(bench: Bench) -> None:
    bench.sink.findings_only = True
    bench.start()
    await bench.store(alert(1, kind=TEXT), alert(2, internal=True), alert(3, kind=UNPARSED), alert(4))
    await bench.settled()
    assert bench.sink.accepted == ["000004"]
    assert bench.value("filtered_events_total", reason="not_a_finding") == 2, "an unparsable body is no alert"


async def test_unparsed_bodies_go_to_log_sinks_and_count_apart(bench: Bench) -> None:
    bench.start()
    await bench.store(alert(1, kind=UNPARSED), alert(2))
    await bench.settled()
    assert bench.sink.accepted == ["000001", "000002"]
    assert bench.value("sent_events_total") == 1
    assert bench.value("unparsed_forwarded_events_total") == 1


async def test_transient_failures_are_retried_for_ever_within_thirty_seconds_of_each_other(
    bench: Bench,
) -> None:
    """Ten simulated minutes of throttling: no drop, one call at a time, jittered back-off."""
    bench.sink.pace = type(bench.sink.pace)(concurrency_max=4)
    loop = asyncio.get_running_loop()

    def script(_ids: list[str]) -> Answer:
        down = loop.time() < bench.sink.calls[0][0] + 600
        return Transient("slow down", code="throttled") if down else None

    bench.sink.script = script
    bench.start()
    await bench.store(*(alert(i) for i in range(20)))
    await bench.settled()
    assert len(bench.sink.accepted) == 20
    gaps = [
        later - earlier
        for (earlier, _), (later, _) in zip(bench.sink.calls, bench.sink.calls[1:], strict=False)
    ]
    assert max(gaps) <= BACKOFF_MAX_SECS + 1
    assert len({round(gap, 2) for gap in gaps}) > 5, "jitter"
    assert 20 < len(gaps) < 300
    assert bench.value("retries_total") == len(gaps)
    assert bench.value("send_failed_total", error_code="throttled") == len(gaps)
    assert bench.value("dead_lettered_events_total", reason="unknown") == 0
    assert bench.worker.status().last_error is None, "it delivers again"


async def test_a_wish_for_delay_is_a_lower_bound(bench: Bench) -> None:
    scripted(bench, Transient("wait", delay_secs=20))
    bench.start()
    await bench.store(alert(1))
    await bench.settled()
    assert bench.sink.calls[1][0] - bench.sink.calls[0][0] >= 20


async def test_a_call_without_answer_is_given_up_and_repeated(bench: Bench) -> None:
    bench.sink.call_secs = 1e6
    bench.start()
    await bench.store(alert(1))
    await asyncio.sleep(45)
    bench.sink.call_secs = 0.05
    await bench.settled()
    assert bench.value("send_failed_total", error_code="timeout") >= 1


async def test_one_poison_record_in_ten_thousand_is_found_by_bisection(bench: Bench) -> None:
    """At most 2 log2(n) calls after the first; 9,999 delivered, one dead letter with the service's words."""
    bench.sink.script = lambda ids: Permanent("InvalidParameter: poison") if "007777" in ids else None
    await bench.store(*(alert(i, size=10) for i in range(10_000)))
    bench.start()
    await bench.settled()
    assert len(set(bench.sink.accepted)) == len(bench.sink.accepted) == 9999
    assert await bench.dead() == {"007777": ("invalid", "InvalidParameter: poison")}
    assert len(bench.sink.calls) <= 2 * math.ceil(math.log2(10_000)) + 1
    assert bench.value("dead_lettered_events_total", reason="invalid") == 1


@pytest.mark.parametrize("poison", [{0}, {99}, {3, 50, 51}, {10, 11, 12, 13}])
async def test_bisection_finds_every_poison_record_wherever_it_is(bench: Bench, poison: set[int]) -> None:
    names = {f"{i:06d}" for i in poison}
    bench.sink.script = lambda ids: Permanent("no") if names & set(ids) else None
    await bench.store(*(alert(i) for i in range(100)))
    bench.start()
    await bench.settled()
    assert set(await bench.dead()) == names
    assert sorted(bench.sink.accepted) == sorted({f"{i:06d}" for i in range(100)} - names)


async def test_too_large_a_call_is_split_until_it_fits(bench: Bench) -> None:
    bench.sink.script = lambda ids: TooLarge("413") if len(ids) > 7 else None
    await bench.store(*(alert(i) for i in range(50)))
    bench.start()
    await bench.settled()
    assert sorted(bench.sink.accepted) == [f"{i:06d}" for i in range(50)]
    assert not await bench.dead()


async def test_a_record_too_large_by_itself_becomes_a_dead_letter(bench: Bench) -> None:
    bench.sink.script = lambda ids: TooLarge("413") if "000003" in ids else None
    await bench.store(*(alert(i) for i in range(5)))
    bench.start()
    await bench.settled()
    assert await bench.dead() == {"000003": ("too_large", "413")}


@pytest.mark.parametrize("position", [0, 57, 99])
async def test_permission_refused_for_one_record_is_its_own_fault(bench: Bench, position: int) -> None:
    """One foreign finding fails the whole call: it becomes a dead letter, the others go through."""
    name = f"{position:06d}"
    bench.sink.script = lambda ids: Permission("AccessDenied") if name in ids else None
    await bench.store(*(alert(i) for i in range(100)))
    bench.start()
    await bench.settled()
    assert await bench.dead() == {name: ("permission", "AccessDenied")}
    assert len(bench.sink.accepted) == 99


async def test_permission_refused_for_everything_blocks_and_loses_nothing(bench: Bench) -> None:
    allowed = False
    bench.sink.script = lambda _ids: None if allowed else Permission("AccessDenied")
    await bench.store(*(alert(i) for i in range(100)))
    bench.start()
    await asyncio.sleep(30)
    assert bench.worker.status().state == "blocked"
    assert len(bench.sink.calls) < 4 * SUSPECTS_MAX + 10
    await asyncio.sleep(1000)
    allowed = True
    await bench.settled()
    assert len(set(bench.sink.accepted)) == 100
    assert not await bench.dead()
    assert bench.worker.status().state == "delivering"


async def test_a_blocked_sink_probes_once_a_minute_and_goes_on(bench: Bench) -> None:
    loop = asyncio.get_running_loop()

    def script(_ids: list[str]) -> Answer:
        return Blocked("not subscribed") if loop.time() < bench.sink.calls[0][0] + 600 else None

    bench.sink.script = script
    bench.start()
    await bench.store(alert(1))
    await asyncio.sleep(300)
    assert bench.value("sink_state", state="blocked") == 1
    await bench.settled()
    assert 600 / PROBE_SECS - 2 <= len(bench.sink.calls) <= 600 / PROBE_SECS + 3
    assert bench.sink.accepted == ["000001"]


async def test_a_flood_of_refusals_is_slowed_down(bench: Bench) -> None:
    """Every single alert refused looks like a fault of ours: dead letters, but few a minute."""
    bench.sink.script = lambda _ids: Permanent("bad group name")
    await bench.store(*(alert(i) for i in range(200)))
    bench.start()
    await asyncio.sleep(50)
    assert len(await bench.dead()) <= REFUSALS_IN_A_ROW_MAX
    await asyncio.sleep(2 * PROBE_SECS)
    assert REFUSALS_IN_A_ROW_MAX < len(await bench.dead()) <= 5 * REFUSALS_IN_A_ROW_MAX


async def test_rejects_by_index_are_buried_retried_or_given_up(bench: Bench) -> None:
    """NEVER: dead at once. ALWAYS: again until it works. LIMITED: a few times, then dead."""
    rounds = 0

    def script(ids: list[str]) -> dict[int, Reject]:
        nonlocal rounds
        rounds += 1
        answer: dict[int, Reject] = {}
        for place, identity in enumerate(ids):
            if identity == "000001":
                answer[place] = Reject("invalid", "InvalidInput: title")
            elif identity == "000002" and rounds < 12:
                answer[place] = Reject("unknown", "InternalError", Again.ALWAYS)
            elif identity == "000003":
                answer[place] = Reject("rejected", "tooOld", Again.LIMITED)
        return answer

    bench.sink.script = script
    await bench.store(*(alert(i) for i in range(5)))
    bench.start()
    await bench.settled()
    assert sorted(bench.sink.accepted) == ["000000", "000002", "000004"]
    assert await bench.dead() == {
        "000001": ("invalid", "InvalidInput: title"),
        "000003": ("rejected", "tooOld"),
    }
    assert bench.sink.encoded >= 5 + LIMITED_ATTEMPTS_MAX - 1, "encoded anew for each try: restamped"


async def test_a_service_that_is_off_by_index_blocks(bench: Bench) -> None:
    off = True
    bench.sink.script = lambda ids: (
        {place: Reject("permission", "InvalidAccess", Again.BLOCKED) for place in range(len(ids))}
        if off
        else None
    )
    await bench.store(*(alert(i) for i in range(5)))
    bench.start()
    await asyncio.sleep(10)
    assert bench.worker.status().state == "blocked"
    off = False
    await bench.settled()
    assert sorted(bench.sink.accepted) == [f"{i:06d}" for i in range(5)]


async def test_what_was_accepted_beside_a_blocked_batch_is_not_sent_twice(bench: Bench) -> None:
    bench.sink.limits = Limits(10, 1_000_000)
    bench.sink.pace = type(bench.sink.pace)(concurrency_max=4)
    off = True
    bench.sink.script = lambda ids: Blocked("off") if off and "000000" in ids else None
    await bench.store(*(alert(i) for i in range(40)))
    bench.start()
    await asyncio.sleep(200)
    off = False
    await bench.settled()
    assert len(bench.sink.accepted) == len(set(bench.sink.accepted)) == 40


async def test_concurrency_is_bounded_and_used(bench: Bench) -> None:
    bench.sink.limits = Limits(10, 1_000_000)
    bench.sink.pace = type(bench.sink.pace)(concurrency_max=3)
    await bench.store(*(alert(i) for i in range(200)))
    bench.start()
    await bench.settled()
    assert bench.sink.most_at_once == 3


async def test_an_alert_that_cannot_be_mapped_becomes_a_dead_letter(bench: Bench) -> None:
    """A reject of the mapping and a fault of ours alike: the sink goes on."""
    problems = {"000001": Reject("unmappable", "no title"), "000002": ZeroDivisionError("ours")}
    bench.sink.refuse_encoding = lambda record: problems.get(record.id)
    bench.start()
    await bench.store(*(alert(i) for i in range(4)))
    await bench.settled()
    assert bench.sink.accepted == ["000000", "000003"]
    assert await bench.dead() == {
        "000001": ("unmappable", "no title"),
        "000002": ("unmappable", "ZeroDivisionError: ours"),
    }


async def test_opening_is_retried_and_blocks_like_delivery(bench: Bench) -> None:
    bench.sink.open_errors = [Transient("sts down"), TimeoutError(), Blocked("off"), Permission("no")]
    bench.start()
    await bench.store(alert(1))
    await bench.settled()
    assert bench.sink.accepted == ["000001"]


async def test_drain_delivers_what_waits_at_once_and_ends(bench: Bench) -> None:
    bench.sink.linger_secs = 1e9
    bench.start()
    await asyncio.sleep(1)
    await bench.store(*(alert(i) for i in range(5)))
    bench.worker.drain()
    assert bench.task is not None
    await asyncio.wait_for(bench.task, 1e6)
    assert len(bench.sink.accepted) == 5
    assert bench.spool.pending(NAME) == 0
    assert bench.worker.status().state == "stopped"


async def test_drain_of_a_failing_sink_gives_up_at_once_and_keeps_everything(bench: Bench) -> None:
    bench.sink.script = lambda _ids: Transient("down")
    bench.start()
    await bench.store(alert(1))
    await asyncio.sleep(100)
    bench.worker.drain()
    assert bench.task is not None
    before = asyncio.get_running_loop().time()
    await asyncio.wait_for(bench.task, 1e6)
    assert asyncio.get_running_loop().time() - before < BACKOFF_MAX_SECS
    assert bench.spool.pending(NAME) == 1


async def test_a_cancelled_worker_settles_what_was_accepted(bench: Bench) -> None:
    bench.sink.limits = Limits(10, 1_000_000)
    bench.sink.pace = type(bench.sink.pace)(concurrency_max=2)
    bench.sink.script = lambda ids: Transient("down") if "000010" in ids else None
    await bench.store(*(alert(i) for i in range(20)))
    bench.start()
    await asyncio.sleep(20)
    await bench.stop()
    assert bench.spool.pending(NAME) == 10


async def test_a_broken_block_is_counted_and_passed(tmp_path: Path) -> None:
    """Its alerts are dead letters for the sink; what follows is delivered."""
    metrics = Metrics([NAME])
    settings = SpoolSettings(directory=str(tmp_path / "s"), sync="normal")
    spool = inline(Spool(settings, sinks=[NAME], metrics=metrics, now=lambda: 1.0))
    await spool.open()
    for first in (0, 3, 6):
        await spool.append([alert(first + i) for i in range(3)])
    await spool.close()
    flip_block(tmp_path / "s", 3)
    spool = inline(Spool(settings, sinks=[NAME], metrics=metrics, now=lambda: 1.0))
    await spool.open()
    bench = Bench(spool, ScriptedSink(), metrics)
    bench.start()
    await bench.settled()
    await bench.stop()
    await spool.close()
    assert bench.sink.accepted == [f"{i:06d}" for i in (0, 1, 2, 6, 7, 8)]
    assert bench.value("dead_lettered_events_total", reason="broken_block") == 3
    assert bench.worker.status().recovered == 9


async def test_gauges_are_published(bench: Bench) -> None:
    await bench.store(alert(1), alert(2))
    bench.worker.publish()
    assert bench.value("sink_pending") == 2
    assert bench.value("adaptive_concurrency_limit") == 1
