"""Who was heard when: hostile values, bounded tables, the node list, and what Prometheus gets of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, exposition, generate_latest

from forwarder.alert import decode
from forwarder.sensors import (
    SPEAKERS_MAX,
    UNKNOWN_SECS_MAX,
    UNKNOWN_SPEAKERS_MAX,
    Sensor,
    Sensors,
    SensorsSettings,
)
from forwarder.sensors_metrics import FAMILIES, SensorsCollector
from tests.samples import REAL_BODIES
from tests.sensing import WALL, Cluster, drop, message, snapshot


class Heard:
    """Sensors at a time the test sets."""

    def __init__(self, *names: str, **settings: Any) -> None:
        self.monotonic = 1000.0
        self.wall = WALL
        self.cluster = Cluster(*names)
        self.sensors = Sensors(
            SensorsSettings(**settings),
            nodes=self.cluster,
            now=lambda: self.wall,
            monotonic=lambda: self.monotonic,
        )
        self.registry = CollectorRegistry()
        self.registry.register(SensorsCollector(self.sensors))
        self.sensors.publish()

    def after(self, secs: float) -> None:
        self.monotonic += secs
        self.wall += secs
        self.sensors.publish()

    def of(self, node: str) -> Sensor:
        return next(sensor for sensor in self.sensors.all() if sensor.node == node)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"falco_forwarder_{name}", labels)


def test_any_message_of_a_nodes_own_falco_is_a_sign_of_life() -> None:
    heard = Heard("a", "b", "c", "d")
    heard.sensors.saw(message("a"), "192.0.2.1")
    heard.sensors.saw(message("falco-b"), "")
    heard.sensors.saw(message(""), "10.0.0.c")
    heard.after(1)
    times = {sensor.node: sensor.heard for sensor in heard.sensors.all()}
    assert times == {"a": WALL, "b": WALL, "c": WALL, "d": None}
    assert heard.sensors.heard() == {"nodes": {"a": WALL, "b": WALL, "c": WALL}}


def test_alerts_of_plugins_and_text_do_not_count() -> None:
    """A k8s_audit Falco may run on any node."""
    heard = Heard("a")
    heard.sensors.saw(message("a", source="k8s_audit"), "")
    heard.sensors.saw(snapshot("a", **{"evt.source": "k8s_audit", "falco.version": "0.44.1"}), "")
    (text,) = decode(b"13:44:05.478445995: Warning something").alerts
    heard.sensors.saw(text, "10.0.0.a")
    heard.after(1)
    assert heard.of("a").heard is None
    heard.sensors.saw(snapshot("a", **{"evt.source": "syscall"}), "")
    heard.after(1)
    assert heard.of("a").heard == WALL + 1


def test_a_node_never_heard_was_last_seen_when_listening_began() -> None:
    heard = Heard("a", silent_after_secs=100)
    assert heard.value("sensor_last_seen_seconds", node="a") == WALL
    heard.after(50)
    assert heard.cluster.uids is not None
    heard.cluster.uids["new"] = "1"
    heard.after(50.5)
    assert heard.value("sensor_last_seen_seconds", node="new") == WALL + 100.5
    assert (heard.value("sensors_expected"), heard.value("sensors_silent")) == (2, 1)
    heard.sensors.saw(message("a"), "")
    heard.after(1)
    assert heard.value("sensors_silent") == 0


def test_series_go_with_their_node() -> None:
    heard = Heard("a", "b")
    heard.sensors.saw(snapshot("a", **{"falco.version": "0.44.1", "scap.n_drops": 3}), "")
    heard.after(1)
    assert b'node="a"' in generate_latest(heard.registry)
    heard.cluster.uids = {"b": "uid-b"}
    heard.after(1)
    assert b'node="a"' not in generate_latest(heard.registry)
    assert heard.value("sensors_expected") == 1


def test_a_new_machine_with_an_old_name_begins_anew() -> None:
    heard = Heard("a")
    heard.sensors.saw(snapshot("a", **{"falco.version": "0.44.1", "scap.n_drops": 3}), "")
    heard.after(10)
    heard.cluster.uids = {"a": "another"}
    heard.after(10)
    assert heard.of("a") == Sensor("a", None, WALL + 20, "", {})


def test_real_snapshots_and_complaints() -> None:
    heard = Heard("vm", "host", "falco-vf54x", "test")
    for body in REAL_BODIES:
        for alert in decode(body).alerts:
            if alert.internal:
                heard.sensors.saw(alert, "")
    heard.after(1)
    assert heard.of("vm").version == "0.44.1"
    assert heard.of("vm").dropped == {"outputs_queue": 0, "syscall": 0}
    assert heard.of("host").dropped == {"syscall": 815508}
    assert heard.of("test").version == "0.41.0"
    assert heard.value("sensor_info", node="vm", version="0.44.1") == 1
    assert heard.value("sensor_dropped_total", node="host", reason="syscall") == 815508


def test_falcos_counters_are_passed_on_and_complaints_are_added_up() -> None:
    heard = Heard("a", "b")
    heard.sensors.saw(drop("a", "4"), "")
    heard.sensors.saw(drop("a", "5"), "")
    heard.after(1)
    heard.sensors.saw(drop("a", 6), "")
    heard.after(1)
    assert heard.of("a").dropped == {"syscall": 15}
    heard.sensors.saw(snapshot("a", **{"scap.n_drops": 100, "falco.outputs_queue_num_drops": 7}), "")
    heard.after(1)
    heard.sensors.saw(drop("a", "50"), "")
    heard.after(1)
    assert heard.of("a").dropped == {"syscall": 100, "outputs_queue": 7}  # the snapshots have it all
    heard.sensors.saw(snapshot("a", **{"scap.n_drops": 2, "falco.outputs_queue_num_drops": 0}), "")
    heard.after(1)
    assert heard.of("a").dropped == {"syscall": 2, "outputs_queue": 0}  # Falco began again
    # Snapshots without scap.n_drops (kernel counters off) do not stand in the way of complaints.
    heard.sensors.saw(snapshot("b", **{"falco.outputs_queue_num_drops": 1}), "")
    heard.sensors.saw(drop("b", "8"), "")
    heard.after(1)
    assert heard.of("b").dropped == {"syscall": 8, "outputs_queue": 1}


@pytest.mark.parametrize(
    "number",
    [
        "-1",
        -1,
        "NaN",
        "Infinity",
        1e300,
        2**63,
        "9" * 5000,
        None,
        True,
        [1],
        {"a": 1},
        "",
        "0x10",
        "1 2",
        '"',
    ],
    ids=repr,
)
def test_numbers_that_are_none_are_left_out(number: Any) -> None:
    heard = Heard("a")
    fields = {"falco.outputs_queue_num_drops": number, "scap.n_drops": number, "n_drops": number}
    heard.sensors.saw(snapshot("a", **fields), "")
    heard.sensors.saw(drop("a", number), "")
    heard.after(1)
    assert heard.of("a").heard == WALL
    assert heard.of("a").dropped == {}


def test_sums_stay_below_their_limit() -> None:
    heard = Heard("a")
    for _ in range(5):
        heard.sensors.saw(drop("a", 2**62), "")
    heard.after(1)
    heard.sensors.saw(drop("a", 2**62), "")
    heard.after(1)
    assert heard.of("a").dropped == {"syscall": 2**63}


@pytest.mark.parametrize(
    "version",
    [
        "",
        "x",
        "0.44.1\n",
        '0.1"} 1',
        "9" * 100,
        "1." * 50,
        "0.44.1-" + "a" * 100,
        0.44,
        None,
        f"{chr(0x660)}.{chr(0x661)}",
    ],
)
def test_odd_versions_are_left_out(version: Any) -> None:
    heard = Heard("a")
    heard.sensors.saw(snapshot("a", **{"falco.version": version}), "")
    heard.after(1)
    assert heard.of("a").version == ""


@pytest.mark.parametrize("fields", [None, 5, "text", [1, 2], {"evt.source": 7}])
def test_odd_fields_are_a_sign_of_life_all_the_same(fields: Any) -> None:
    heard = Heard("a")
    heard.sensors.saw(message("a", rule="Falco internal: metrics snapshot", output_fields=fields), "")
    heard.after(1)
    assert heard.of("a").heard == WALL


def test_versions_as_falco_has_them() -> None:
    heard = Heard("a")
    for version in ("0.44.1", "0.36.0-rc1", "0.38.0-15+7aa3e5b"):
        heard.sensors.saw(snapshot("a", **{"falco.version": version}), "")
        heard.after(1)
        assert heard.of("a").version == version


def test_a_flood_of_hostnames_stays_within_the_tables() -> None:
    heard = Heard("a")
    flood = message("x")
    for number in range(3 * SPEAKERS_MAX):
        heard.sensors.saw(msgspec.structs.replace(flood, hostname=f"evil-{number}"), "")
    assert len(heard.sensors._speakers) == SPEAKERS_MAX
    heard.after(1)
    assert len(heard.sensors._speakers) == 0
    assert len(heard.sensors._unknown) == UNKNOWN_SPEAKERS_MAX
    heard.sensors.saw(message("a"), "")
    heard.after(1)
    assert heard.of("a").heard == WALL + 1
    heard.after(UNKNOWN_SECS_MAX)
    assert not heard.sensors._unknown
    assert len(heard.sensors.all()) == 1


def test_who_is_not_selected_is_forgotten_at_once() -> None:
    heard = Heard("a")
    heard.sensors.saw(message("not-selected"), "")
    heard.after(1)
    assert not heard.sensors._unknown


def test_a_long_hostname_is_none() -> None:
    heard = Heard("a")
    heard.sensors.saw(message("x" * 100_000), "10.0.0.a")
    assert list(heard.sensors._speakers) == [("", "10.0.0.a")]
    heard.after(1)
    assert heard.of("a").heard == WALL


def test_a_message_before_its_node_counts_when_the_node_comes() -> None:
    """The watch, or the first list, may come a moment later."""
    heard = Heard()
    heard.cluster.uids = None
    heard.sensors.saw(snapshot("a", **{"falco.version": "0.44.1"}), "")
    heard.after(1)
    assert (heard.sensors.known, heard.sensors.all()) == (True, [])
    heard.cluster.uids = {"a": "1"}
    heard.after(5)
    sensor = heard.of("a")
    assert (sensor.heard, sensor.listened, sensor.last_seen) == (WALL, WALL + 6, WALL + 6)
    assert sensor.version == "0.44.1"


def test_an_older_message_does_not_outdate_a_newer_one() -> None:
    """One that waited for its Falco pod to be known."""
    heard = Heard("a")
    heard.sensors.saw(message("b"), "")
    heard.after(10)
    heard.sensors.saw(message("a"), "")
    heard.after(1)
    heard.cluster.node_of = lambda *_: "a"  # type: ignore[method-assign]
    heard.after(1)
    assert heard.of("a").heard == WALL + 10


def test_until_there_is_a_list_nobody_is_forgotten() -> None:
    """Pods may be listed before nodes are."""
    heard = Heard()
    heard.cluster.uids = None
    heard.sensors.known = False
    heard.sensors.saw(message("not-selected"), "")
    heard.after(1)
    assert len(heard.sensors._unknown) == 1


def test_nodes_are_looked_up_once_a_second_at_most() -> None:
    heard = Heard("a")
    for _ in range(10):
        heard.sensors.saw(message("a"), "")
        heard.after(0.1)
    assert heard.cluster.asked <= 2


def test_a_step_of_the_wall_clock_makes_nobody_silent() -> None:
    heard = Heard("a", silent_after_secs=100)
    heard.sensors.saw(message("a"), "")
    heard.after(1)
    for step in (1e6, -3e6):
        heard.wall += step
        assert heard.value("sensors_silent") == 0
        assert heard.of("a").last_seen == heard.wall - 1


def test_without_a_node_list_nothing_is_expected() -> None:
    for nodes in (None, Cluster()):
        if nodes is not None:
            nodes.uids = None
        sensors = Sensors(SensorsSettings(), nodes=nodes, now=lambda: WALL, monotonic=lambda: 5.0)
        sensors.saw(message("a"), "")
        sensors.publish()
        assert (sensors.known, sensors.all(), sensors.list_is_current()) == (False, [], False)
        samples = [sample for family in SensorsCollector(sensors).collect() for sample in family.samples]
        assert [(sample.name, sample.value) for sample in samples] == [
            ("falco_forwarder_sensors_expected", 0),
            ("falco_forwarder_sensors_silent", 0),
        ]
        assert sensors.status() == {"node_list": False, "expected": 0, "silent_here": 0}
        assert sensors.node_enrichment("a") == (b"" if nodes is None else nodes.node_enrichment("a"))


def test_the_version_goes_while_the_node_is_silent() -> None:
    heard = Heard("a", silent_after_secs=100)
    heard.sensors.saw(snapshot("a", **{"falco.version": "0.44.1"}), "")
    heard.after(100)
    assert heard.value("sensor_info", node="a", version="0.44.1") == 1
    heard.after(1)
    assert heard.value("sensor_info", node="a", version="0.44.1") is None


def test_families_are_what_is_collected() -> None:
    heard = Heard("a")
    heard.sensors.saw(
        snapshot("a", **{"falco.version": "0.44.1", "scap.n_drops": 1, "falco.outputs_queue_num_drops": 0}),
        "",
    )
    heard.after(1)
    collector = SensorsCollector(heard.sensors)
    for families in (collector.collect(), collector.describe()):
        found = {family.name + "_total" * (family.type == "counter"): family for family in families}
        assert found.keys() == {family.name for family in FAMILIES}
        for family in FAMILIES:
            assert (found[family.name].type, found[family.name].documentation) == (family.type, family.text)
            for sample in found[family.name].samples:
                assert tuple(sample.labels) == family.labels
    encoder, _ = exposition.choose_encoder("application/openmetrics-text; version=1.0.0")
    assert encoder(heard.registry).endswith(b"# EOF\n")
