"""A rolling restart of the chart's two replicas under 300 alerts a second loses nothing. Run by `make chart-install-test`.

Real: Helm and the chart with its own values for everything that matters to a restart (set are the sinks, ports that are free, and
where to look for the other replica); API server with Pod Security enforcing `restricted`, scheduler, the StatefulSet controller
that deletes and makes the pods one by one, the EndpointSlice controller that withdraws and admits them; the forwarder's processes
with the configuration of the ConfigMap.
Stand in: processes for containers and a kubelet that runs them, asks their probes, ends them and drops their emptyDir
(``kubelet``), with loopback addresses for pods; a TCP proxy for kube-proxy (``service_proxy``); the fake AWS; and eight senders that
behave as Falco's do, each with a connection and an address of its own, one request at a time, no retry, no look at the status
(``tests.crash.senders``).
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple, Self, cast

import pytest

from tests.cluster.api import Answer, RefusedError
from tests.cluster.control_plane import ControlPlane, Object
from tests.cluster.harness import free_ports
from tests.cluster.kubelet import Ended, Kubelet, Life, alive_node
from tests.cluster.releases import RELEASE, Helm
from tests.cluster.service_proxy import ServiceProxy
from tests.crash.harness import Aws, say, seeded, wait_until
from tests.crash.oracle import Verdict, judge
from tests.crash.senders import ANSWER_SECS_MAX, Attempt, Connection, Ledger, post_one
from tests.fakes.aws import FakeAws

NAME = f"{RELEASE}-falco-aws-forwarder"
SENDERS, RATE = 8, 300.0
ROLLED_SECS_MAX = 150.0
FLOW_SECS = 4.0
RESTARTED = "kubectl.kubernetes.io/restartedAt"


class Node(Connection):
    """A sender with an address of its own, as each node has one."""

    def __init__(self, port: int, address: str) -> None:
        super().__init__(port)
        self._address = address

    def _exchange(self, body: bytes) -> int:
        if self._socket is None:
            made = socket.create_connection(("127.0.0.1", self._port), ANSWER_SECS_MAX, (self._address, 0))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = made
        return super()._exchange(body)


class Falcos:
    """All senders, for the length of a ``with`` block."""

    def __init__(self, ledger: Ledger, port: int) -> None:
        self._ledger, self._port = ledger, port
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(it,), daemon=True) for it in range(SENDERS)]
        self.secs = 0.0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * ANSWER_SECS_MAX)
        self.secs = time.monotonic() - self._started

    def _run(self, index: int) -> None:
        connection = Node(self._port, f"127.0.3.{index + 1}")
        due = time.monotonic() + index / RATE
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            attempt = post_one(self._ledger, connection)
            # One that fell behind catches up, but only by a second.
            due = max(due + SENDERS / RATE, attempt.ended - 1.0)
        connection.close()


class Outcome(NamedTuple):
    """A restart under load, judged after everything that could be delivered was."""

    verdict: Verdict
    failed: list[Attempt]
    rate: float
    ended: list[Ended]
    moved: int
    """Connections to the new replicas."""


@pytest.fixture
def rng() -> random.Random:
    return seeded()


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[Aws]:
    made = Aws(tmp_path, free_ports(1)[0])
    try:
        made.start()
        yield made
    finally:
        made.kill()


def test_loses_nothing(plane: ControlPlane, aws: Aws, tmp_path: Path, rng: random.Random) -> None:
    """With the chart's values: no connection fails, each acknowledged alert arrives exactly once, no replica is killed."""
    outcome = restart(plane, aws, tmp_path, rng, {})
    assert not outcome.failed, [it._replace(body=b"") for it in outcome.failed[:5]]
    assert outcome.rate > 0.9 * RATE, "the senders were too slow for the test to mean anything"
    assert not outcome.verdict.lost, outcome.verdict
    assert not outcome.verdict.altered, outcome.verdict
    assert outcome.verdict.redelivered == outcome.verdict.dead == 0, outcome.verdict
    assert outcome.verdict.acknowledged == outcome.verdict.attempted
    assert [it.code for it in outcome.ended] == [0, 0]
    assert not any(it.killed for it in outcome.ended)
    assert sorted(it.pod for it in outcome.ended) == [f"{NAME}-0", f"{NAME}-1"]
    assert outcome.moved >= SENDERS, "in the end every sender is with a new replica"


def test_would_see_a_loss(plane: ControlPlane, aws: Aws, tmp_path: Path, rng: random.Random) -> None:
    """The control: without preStop and drain delay connections fail, and with AWS away what is in the emptyDir is lost."""
    hasty = {
        "preStopSleepSeconds": 0,
        "config": {"receiver": {"drain_delay_secs": 0}, "delivery": {"drain_secs_max": 1}},
    }
    outcome = restart(plane, aws, tmp_path, rng, hasty, aws_away=True)
    assert outcome.failed, "nobody was sent to a pod that had gone"
    assert outcome.verdict.lost, outcome.verdict


def test_says_what_went_wrong_with_the_proxy(rng: random.Random) -> None:
    """A proxy that cannot follow the slices any more fails the test, with its reason."""
    reads = iter([[("127.0.0.1", 1)]])

    class Broken(ServiceProxy):
        def _read(self) -> list[tuple[str, int]]:
            try:
                return next(reads)
            except StopIteration:
                raise RefusedError("GET /slices", Answer(500, {}, b"broken")) from None

    admin = SimpleNamespace(get=lambda *_: {})
    stub = cast("ControlPlane", SimpleNamespace(admin=admin))
    with Broken(stub, "x", "y", rng) as proxy:

        def told() -> bool:
            proxy.check()
            return False

        with pytest.raises(RefusedError, match="broken"):
            wait_until(told, 10.0, lambda: "the fault is told")
    with pytest.raises(RefusedError, match="broken"), Broken(stub, "x", "y", rng):
        pytest.fail("it has no endpoints")


def restart(
    plane: ControlPlane,
    aws: Aws,
    directory: Path,
    rng: random.Random,
    changes: Mapping[str, Any],
    *,
    aws_away: bool = False,
) -> Outcome:
    """Install, send, restart as `kubectl rollout restart` does, send on, deliver what waits, judge."""
    environment = FakeAws().environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{aws.port}"}
    ledger = Ledger(rng)
    with (
        plane.nodes(2, annotations={}, **alive_node()) as nodes,
        plane.place() as namespace,
        Kubelet(plane, namespace, nodes, directory, environment) as kubelet,
    ):
        Helm(plane, namespace, directory).install(values(changes))
        kubelet.check()
        with ServiceProxy(plane, namespace, NAME, rng) as proxy, Falcos(ledger, proxy.port) as falcos:
            flow(ledger, kubelet, proxy)
            first = list(kubelet.lives.values())
            if aws_away:
                aws.kill()
            patch = {"template": {"metadata": {"annotations": {RESTARTED: datetime.now(UTC).isoformat()}}}}
            plane.admin.patch("statefulsets", NAME, {"spec": patch}, namespace)
            took = rolled_out(plane, namespace, kubelet)
            flow(ledger, kubelet, proxy)
        if aws_away:
            aws.start()
        replaced = [it.ended for it in first if it.ended is not None]
        assert len(replaced) == len(first) == len(kubelet.present) == 2, "not every replica was replaced"
        drained(kubelet)
        nothing = directory / "no-spool"
        outcome = Outcome(
            judge(ledger, aws.journal, nothing),  # all is delivered: a spool has nothing to add
            [it for it in ledger.attempts if it.status != 200],
            len(ledger.attempts) / falcos.secs,
            replaced,
            proxy.chosen.total() - sum(proxy.chosen[it.address] for it in first),
        )
        for life in kubelet.lives.values():
            assert "Traceback" not in life.program.text(), life.program.tail(40)
    say(
        f"rolled out in {took:.1f} s, {outcome.rate:.0f} alerts/s, {len(outcome.failed)} failed, {outcome.verdict}"
    )
    say(f"{[it._asdict() for it in replaced]}, connections {dict(proxy.chosen)}")
    return outcome


def values(changes: Mapping[str, Any]) -> Object:
    """Both sinks as fast as they go; ports that nobody else on this machine has; no asking of names there are none of."""
    receiver, admin = free_ports(2)
    config: Object = {
        "cluster": {"name": "rolling"},
        "receiver": {"port": receiver},
        "admin": {"port": admin},
        "sensors": {"peers": [f"127.0.0.1:{admin}"]},
        "sinks": {
            "cloudwatch_logs": {"enabled": True, "log_group": "/falco/rolling"},
            "security_hub": {
                "enabled": True,
                "rate_per_sec": 1000,
                "burst": 1000,
                "aggregation": {"enabled": False},
            },
        },
    }
    for section, settings in changes.get("config", {}).items():
        config[section] = config.get(section, {}) | settings
    return {**changes, "config": config}


def flow(ledger: Ledger, kubelet: Kubelet, proxy: ServiceProxy) -> None:
    """Let alerts come for a while."""
    wanted = len(ledger.attempts) + int(FLOW_SECS * RATE)

    def reached() -> bool:
        kubelet.check()
        proxy.check()
        return len(ledger.attempts) >= wanted

    wait_until(reached, 10 * FLOW_SECS, lambda: f"{wanted} alerts: {ledger.statuses}")


def rolled_out(plane: ControlPlane, namespace: str, kubelet: Kubelet) -> float:
    """Wait as `kubectl rollout status` does."""

    def done() -> bool:
        kubelet.check()
        item = plane.admin.get("statefulsets", NAME, namespace)
        status, replicas = item["status"], item["spec"]["replicas"]
        return bool(
            status["observedGeneration"] == item["metadata"]["generation"]
            and status.get("updateRevision") == status.get("currentRevision")
            and status.get("updatedReplicas") == status.get("availableReplicas") == replicas
        )

    return wait_until(
        done, ROLLED_SECS_MAX, lambda: f"rolled out: {plane.admin.get('statefulsets', NAME, namespace)}"
    )


def drained(kubelet: Kubelet) -> None:
    """Wait until every sink of every replica has settled everything."""

    def pending(life: Life) -> int:
        code, body = life.get("/status")
        return (
            sum(int(it["pending"] + it["aggregating"]) for it in json.loads(body)["sinks"].values())
            if code == 200
            else -1
        )

    def idle() -> bool:
        kubelet.check()
        return all(pending(it) == 0 for it in kubelet.present)

    wait_until(idle, 60.0, lambda: f"all is delivered: {[pending(it) for it in kubelet.present]}")
