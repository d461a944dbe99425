"""Silent sensors in simulated time: replicas that ask each other, restart, and share a cluster whose nodes come, go and move."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import pytest
from structlog.testing import capture_logs

from forwarder import alert_fields
from forwarder.alert import decode
from forwarder.notice import Notice
from forwarder.record import ALERT
from forwarder.sensors import FindingSettings, Sensors, SensorsSettings
from forwarder.sensors_watch import KEY, NOTICES_PER_ROUND_MAX, ROUND_SECS, Answers, Watch
from tests.sensing import WALL, Cluster, message

pytestmark = pytest.mark.looptime

SILENT_SECS = 2700.0
SNAPSHOT_SECS = 900.0


def monotonic() -> float:
    return asyncio.get_running_loop().time()


def wall() -> float:
    return WALL + monotonic()


class Findings:
    """What is stored of one replica's findings: it outlives the process."""

    def __init__(self) -> None:
        self.active: dict[str, Notice] = {}
        self.told: list[tuple[float, str, bool]] = []

    def keys(self) -> Collection[str]:
        return self.active.keys() | {"other/thing"}

    async def tell(self, notice: Notice) -> None:
        self.told.append((monotonic(), notice.key.removeprefix(KEY), notice.active))
        if notice.active:
            self.active[notice.key] = notice
        else:
            del self.active[notice.key]


class Replica:
    """One forwarder: what it hears is gone when it restarts, its findings are not."""

    def __init__(self, cluster: Cluster, findings: Findings | None = None, **settings: Any) -> None:
        self.findings = findings or Findings()
        usual: dict[str, Any] = {
            "silent_after_secs": SILENT_SECS,
            "finding": FindingSettings(enabled=True),
        }
        self.settings = SensorsSettings(**(usual | settings))
        self.cluster = cluster
        self.others: list[Replica] = []
        self.up = False
        self.start()

    def start(self) -> None:
        self.sensors = Sensors(self.settings, nodes=self.cluster, now=wall, monotonic=monotonic)
        ask: Callable[[], Awaitable[Answers]] | None = self.ask if self.settings.peers else None
        self.watch = Watch(
            self.settings,
            self.sensors,
            ask=ask,
            reported=self.findings.keys,
            tell=self.findings.tell,
            now=wall,
        )
        self.up = True
        self.tasks = [asyncio.create_task(self.watch.run()), asyncio.create_task(self.publish())]

    async def stop(self) -> None:
        self.up = False
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def publish(self) -> None:
        while True:
            self.sensors.publish()
            await asyncio.sleep(7)

    async def ask(self) -> Answers:
        heard: dict[str, float] = {}
        trouble = ""
        for other in self.others:
            if not other.up:
                trouble = "no answer"
                continue
            for node, at in other.sensors.heard()["nodes"].items():
                heard[node] = max(at, heard.get(node, at))
        return Answers(heard, trouble)

    def hears(self, *nodes: str) -> None:
        if self.up:
            for node in nodes:
                self.sensors.saw(message(node), "")


async def snapshots(links: dict[str, Replica], secs: float, pause: float = SNAPSHOT_SECS) -> None:
    """Each node's Falco speaks to its replica, every ``pause``, for ``secs``."""
    end = monotonic() + secs
    while monotonic() < end:
        for node, replica in links.items():
            replica.hears(node)
        await asyncio.sleep(min(pause, end - monotonic()))


def pair(cluster: Cluster) -> tuple[Replica, Replica]:
    one, two = Replica(cluster, peers=["f:1"]), Replica(cluster, peers=["f:1"])
    one.others, two.others = [one, two], [one, two]
    return one, two


async def test_a_silent_sensor_is_reported_within_its_threshold_and_cleared_on_return() -> None:
    replica = Replica(Cluster("a", "b"))
    await snapshots({"a": replica, "b": replica}, 3600)
    last_word = 2700.0
    await snapshots({"a": replica}, 2 * SILENT_SECS)
    ((at, node, active),) = replica.findings.told
    assert (node, active) == ("b", True)
    assert SILENT_SECS < at - last_word <= SILENT_SECS + 2 * ROUND_SECS
    back = monotonic()
    await snapshots({"a": replica, "b": replica}, 60)
    ((at, node, active),) = replica.findings.told[1:]
    assert (node, active) == ("b", False)
    assert back < at <= back + 2 * ROUND_SECS
    assert not replica.findings.active
    await replica.stop()


async def test_a_node_that_never_spoke_is_reported_too() -> None:
    replica = Replica(Cluster("a"))
    await asyncio.sleep(SILENT_SECS)
    assert not replica.findings.told
    await asyncio.sleep(2 * ROUND_SECS)
    (notice,) = replica.findings.active.values()
    assert "was never heard in 45 minutes" in alert_fields.read(notice.record.body).output  # type: ignore[operator]
    await replica.stop()


async def test_what_a_notice_says() -> None:
    replica = Replica(Cluster("a"), finding=FindingSettings(enabled=True, severity="medium"))
    replica.hears("a")
    await asyncio.sleep(SILENT_SECS + 2 * ROUND_SECS)
    (notice,) = replica.findings.active.values()
    assert (notice.key, notice.title) == ("sensor/a", "Falco sensor silent on node a")
    assert (notice.severity, notice.active) == ("MEDIUM", True)
    record = notice.record
    assert (record.kind, record.priority, record.internal, record.hostname) == (ALERT, 4, False, "a")
    assert record.enrichment == b'"node":{"name":"a","instance_id":"i-0123456789abcdef0"}'
    (alert,) = decode(record.body).alerts
    assert (alert.rule, alert.source, alert.priority, alert.hostname) == (
        "Falco sensor silent",
        "forwarder",
        "Warning",
        "a",
    )
    assert alert.time_ns == pytest.approx(record.time_ns, abs=1_000_000)
    assert alert.output.startswith(
        "Falco on node a has not been heard since 2026-11-20T22:57:04.000Z (45 minutes). "
    )
    assert alert_fields.fields(alert.fields) == {
        "sensor.node": "a",
        "sensor.silent_since": "2026-11-20T22:57:04.000Z",
        "sensor.last_heard": "2026-11-20T22:57:04.000Z",
        "sensor.falco_version": None,
    }
    await replica.stop()


async def test_a_rolling_restart_accuses_nobody() -> None:
    """Two replicas, each with its own nodes; each restarts while the other runs, and nodes move in between."""
    one, two = pair(Cluster("a", "b", "c"))
    await snapshots({"a": one, "b": two, "c": two}, 3 * SILENT_SECS)
    for replica, other in ((one, two), (two, one)):
        await replica.stop()
        # The Falcos of a replica that restarts find the other one; some stay there.
        await snapshots({"a": other, "b": other, "c": other}, 60)
        replica.start()
        await snapshots({"a": replica, "b": other, "c": replica}, 600)
    await snapshots({"a": two, "b": one, "c": one}, 3 * SILENT_SECS)
    assert one.findings.told == two.findings.told == []
    await one.stop()
    await two.stop()


async def test_restarts_again_and_again_accuse_nobody() -> None:
    one, two = pair(Cluster("a", "b"))
    for step in range(30):
        replica = (one, two)[step % 2]
        await snapshots({"a": one, "b": two}, 400)
        await replica.stop()
        await asyncio.sleep(20)
        replica.start()
    assert one.findings.told == two.findings.told == []
    await one.stop()
    await two.stop()


async def test_silent_for_all_replicas() -> None:
    one, two = pair(Cluster("a", "b", "c"))
    await snapshots({"a": one, "b": two, "c": two}, SILENT_SECS)
    await snapshots({"a": one, "b": two}, 2 * SILENT_SECS)
    assert set(one.findings.active) == set(two.findings.active) == {"sensor/c"}
    two.hears("c")
    await asyncio.sleep(2 * ROUND_SECS)
    assert not one.findings.active
    assert not two.findings.active
    await one.stop()
    await two.stop()


async def test_nothing_new_is_said_while_a_peer_does_not_answer() -> None:
    """And the log says so once. What is over is still said."""
    one, two = pair(Cluster("a", "b"))
    await snapshots({"a": one}, 2 * SILENT_SECS)
    assert set(one.findings.active) == {"sensor/b"}
    with capture_logs() as logs:
        await two.stop()
        await asyncio.sleep(2 * SILENT_SECS)
        assert set(one.findings.active) == {"sensor/b"}
        assert one.watch.trouble == "no answer"
        one.hears("b")
        await asyncio.sleep(2 * ROUND_SECS)
        assert not one.findings.active
    assert [line["event"] for line in logs] == [
        "silent sensors cannot be told for sure: nothing new is reported"
    ]
    two.start()
    await asyncio.sleep(2 * ROUND_SECS)
    assert set(one.findings.active) == {"sensor/a"}
    await one.stop()
    await two.stop()


async def test_a_replica_that_is_taken_away_is_remembered() -> None:
    """Nobody else heard its nodes; they speak to the one that is left at their next snapshot."""
    one, two = pair(Cluster("a", "b"))
    await snapshots({"a": one, "b": two}, 4 * SILENT_SECS)
    await two.stop()
    one.others = [one]
    await asyncio.sleep(SNAPSHOT_SECS)
    assert not one.findings.told
    await asyncio.sleep(SILENT_SECS)
    assert set(one.findings.active) == {"sensor/a", "sensor/b"}
    await one.stop()


async def test_what_was_reported_stays_so_over_a_restart_until_it_is_heard() -> None:
    replica = Replica(Cluster("a"))
    await asyncio.sleep(2 * SILENT_SECS)
    await replica.stop()
    replica.start()
    with capture_logs() as logs:
        await asyncio.sleep(2 * SILENT_SECS)
    assert not logs
    assert [active for _, _, active in replica.findings.told] == [True]
    replica.hears("a")
    await asyncio.sleep(2 * ROUND_SECS)
    assert [active for _, _, active in replica.findings.told] == [True, False]
    await replica.stop()


async def test_a_node_that_leaves_the_list_is_silent_no_more() -> None:
    cluster = Cluster("a", "b")
    replica = Replica(cluster)
    await asyncio.sleep(SILENT_SECS + 2 * ROUND_SECS)
    assert set(replica.findings.active) == {"sensor/a", "sensor/b"}
    assert cluster.uids is not None
    del cluster.uids["a"]
    await asyncio.sleep(2 * ROUND_SECS)
    assert set(replica.findings.active) == {"sensor/b"}
    await replica.stop()


async def test_a_new_node_has_its_own_time() -> None:
    cluster = Cluster("a")
    replica = Replica(cluster)
    await snapshots({"a": replica}, 2 * SILENT_SECS)
    assert cluster.uids is not None
    cluster.uids["new"] = "1"
    await snapshots({"a": replica}, SILENT_SECS)
    assert not replica.findings.told
    await snapshots({"a": replica}, 2 * ROUND_SECS)
    assert set(replica.findings.active) == {"sensor/new"}
    await replica.stop()


async def test_nothing_new_is_said_while_the_node_list_may_be_out_of_date() -> None:
    cluster = Cluster("a")
    replica = Replica(cluster)
    cluster.current = False
    await asyncio.sleep(2 * SILENT_SECS)
    assert not replica.findings.told
    assert replica.watch.trouble == "the list of nodes may be out of date"
    cluster.current = True
    await asyncio.sleep(2 * ROUND_SECS)
    assert set(replica.findings.active) == {"sensor/a"}
    await replica.stop()


async def test_without_a_node_list_nothing_is_said() -> None:
    cluster = Cluster()
    cluster.uids = None
    replica = Replica(cluster)
    await replica.findings.tell(Notice("sensor/a", "", "LOW", True, None))  # type: ignore[arg-type]
    await asyncio.sleep(2 * SILENT_SECS)
    assert len(replica.findings.told) == 1
    await replica.stop()


async def test_off_archives_what_was_on() -> None:
    replica = Replica(Cluster("a"), finding=FindingSettings(enabled=False))
    await asyncio.sleep(2 * SILENT_SECS)
    assert not replica.findings.told
    await replica.findings.tell(Notice("sensor/a", "", "LOW", True, None))  # type: ignore[arg-type]
    await asyncio.sleep(2 * ROUND_SECS)
    assert not replica.findings.active
    await replica.stop()


@pytest.mark.parametrize("at", [1e300, WALL * 2, -1e300])
async def test_a_peers_nonsense_hides_nothing(at: float) -> None:
    replica = Replica(Cluster("a"), peers=["f:1"])

    async def nonsense() -> Answers:
        return Answers({"a": at, "b": at})

    replica.watch._ask = nonsense
    await asyncio.sleep(SILENT_SECS + 2 * ROUND_SECS)
    assert set(replica.findings.active) == {"sensor/a"}
    assert replica.watch._elsewhere.keys() <= {"a"}
    await replica.stop()


async def test_a_peers_clock_may_be_ahead_a_little() -> None:
    replica = Replica(Cluster("a"), peers=["f:1"])

    async def ahead() -> Answers:
        return Answers({"a": wall() + 200})

    replica.watch._ask = ahead
    await asyncio.sleep(2 * SILENT_SECS)
    assert not replica.findings.told
    assert replica.watch._elsewhere["a"] <= wall()
    await replica.stop()


async def test_a_whole_cluster_that_is_silent_is_told_in_portions() -> None:
    replica = Replica(Cluster(*(f"n{number}" for number in range(250))))
    await asyncio.sleep(SILENT_SECS + ROUND_SECS)
    told = [at for at, _, _ in replica.findings.told]
    assert len(told) <= NOTICES_PER_ROUND_MAX
    await asyncio.sleep(3 * ROUND_SECS)
    assert len(replica.findings.active) == len(replica.findings.told) == 250
    await replica.stop()


async def test_a_fault_costs_one_round() -> None:
    replica = Replica(Cluster("a"))
    tell, calls = replica.findings.tell, 0

    async def broken(notice: Notice) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError
        await tell(notice)

    replica.watch._tell = broken
    with capture_logs() as logs:
        await asyncio.sleep(SILENT_SECS + 3 * ROUND_SECS)
    assert set(replica.findings.active) == {"sensor/a"}
    assert [line["log_level"] for line in logs] == ["error"]
    await replica.stop()
