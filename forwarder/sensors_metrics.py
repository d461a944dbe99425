"""Metrics of the sensors: one series for each node of the node list, made when they are asked for.

A series of a node that left the list is not there any more; no label comes from an alert but the version Falco says it has, one for each
node. What the numbers mean where there are several replicas: ``docs/sensors.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from forwarder.metrics import PREFIX
from forwarder.sensors import Sensors


class Family(NamedTuple):
    """Name (as it is exposed), labels, help."""

    name: str
    labels: tuple[str, ...]
    text: str

    @property
    def type(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"


LAST_SEEN = Family(
    f"{PREFIX}_sensor_last_seen_seconds",
    ("node",),
    "Unix time of the last message of a node's Falco; where this replica never heard it, since when it has listened. "
    "Over replicas: max by (node)",
)
EXPECTED = Family(f"{PREFIX}_sensors_expected", (), "Nodes Falco should run on. Over replicas: max")
SILENT = Family(
    f"{PREFIX}_sensors_silent",
    (),
    "Of those, the ones this replica has not heard for sensors.silent_after_secs; others may hear them, so do not sum",
)
DROPPED = Family(
    f"{PREFIX}_sensor_dropped_total",
    ("node", "reason"),
    "What a node's Falco says it dropped: outputs_queue (alerts), syscall (events it never saw); starts again with Falco",
)
INFO = Family(
    f"{PREFIX}_sensor_info", ("node", "version"), "1, for each node whose Falco told its version lately"
)
FAMILIES = (LAST_SEEN, EXPECTED, SILENT, DROPPED, INFO)


class SensorsCollector(Collector):
    """Registered beside the other metrics."""

    def __init__(self, sensors: Sensors) -> None:
        self._sensors = sensors

    def collect(self) -> Iterable[Metric]:
        sensors = self._sensors.all()
        silent = [self._sensors.is_silent(sensor) for sensor in sensors]
        last_seen, info = _gauge(LAST_SEEN), _gauge(INFO)
        dropped = CounterMetricFamily(DROPPED.name, DROPPED.text, labels=DROPPED.labels)
        for sensor, is_silent in zip(sensors, silent, strict=True):
            last_seen.add_metric([sensor.node], sensor.last_seen)
            for reason, count in sensor.dropped.items():
                dropped.add_metric([sensor.node, reason], count)
            if sensor.version and not is_silent:
                info.add_metric([sensor.node, sensor.version], 1)
        return (
            GaugeMetricFamily(EXPECTED.name, EXPECTED.text, value=len(sensors)),
            GaugeMetricFamily(SILENT.name, SILENT.text, value=sum(silent)),
            last_seen,
            dropped,
            info,
        )

    def describe(self) -> Iterable[Metric]:
        """Names only: the registry asks for them when this is registered."""
        return [
            CounterMetricFamily(family.name, family.text, labels=family.labels)
            if family.type == "counter"
            else _gauge(family)
            for family in FAMILIES
        ]


def _gauge(family: Family) -> GaugeMetricFamily:
    return GaugeMetricFamily(family.name, family.text, labels=family.labels)
