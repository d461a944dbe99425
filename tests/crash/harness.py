"""The stage of every crash test: the fake AWS and the forwarder as real processes on 127.0.0.1.

Ports are chosen once, so that a restarted process is found where its senders and clients expect it; they lie
below the range of ephemeral ports, where an outgoing connection could sit on one while its owner is down.
Everything is ended by its own process id, also when a test fails.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.crash.oracle import Verdict, judge
from tests.crash.senders import Ledger
from tests.fakes.aws import FakeAws

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECS_MAX, STOP_SECS_MAX, DRAIN_SECS_MAX = 60.0, 60.0, 60.0
POLL_SECS = 0.02
MIB = 1 << 20

CONFIGURATION = """\
cluster: {{name: crash}}
spool: {{directory: {spool}, bytes_max: {bytes_max}, sync: {sync}}}
receiver: {{host: 127.0.0.1, port: {receiver}, drain_delay_secs: {drain_delay_secs}, hold_secs_max: {hold_secs_max}}}
admin: {{host: 127.0.0.1, port: {admin}}}
delivery: {{drain_secs_max: {drain_secs_max}}}
aws: {{region: eu-west-1}}
sinks:
  cloudwatch_logs: {{enabled: true, log_group: /falco/crash, linger_secs: 0}}
  security_hub: {{enabled: true, linger_secs: 0, rate_per_sec: 1000, burst: 1000, aggregation: {aggregation}}}
"""


def seeded() -> random.Random:
    """Randomness with a printed seed; ``CRASH_SEED`` repeats a run."""
    seed = int(os.environ.get("CRASH_SEED") or random.SystemRandom().getrandbits(32))
    say(f"CRASH_SEED={seed}")
    return random.Random(seed)


def say(text: str) -> None:
    """A line of the test's report (shown by ``pytest -rP``, and with a failure)."""
    print(text, flush=True)  # noqa: T201 - for the person who runs the test


def wait_until(condition: Callable[[], bool], secs: float, what: Callable[[], str]) -> float:
    """Wait for a condition; returns how long that took, fails the test after ``secs`` saying ``what``."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > secs:
            raise AssertionError(f"not within {secs:.0f} s: {what()}")
        time.sleep(POLL_SECS)
    return time.monotonic() - started


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body of a GET; status 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


class Ports(NamedTuple):
    """Where everything listens."""

    aws: int
    receiver: int
    admin: int


def free_ports() -> Ports:
    """Three free ports of 127.0.0.1."""
    found: list[int] = []
    candidates = random.SystemRandom()
    while len(found) < len(Ports._fields):
        port = candidates.randrange(18_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return Ports(*found) if len(set(found)) == len(found) else free_ports()


class Program:
    """A module of this repository as a process that can be started again and again."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], output: Path) -> None:
        self._command = [sys.executable, "-m", *arguments]
        self._environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "FORWARDER_"))
        } | dict(environment)
        self.output = output
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def spawn(self) -> None:
        """Start the process without waiting for anything."""
        assert not self.running, "already running"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, cwd=REPOSITORY, env=self._environment, stdout=output, stderr=output
            )
        self.starts += 1

    def kill(self) -> None:
        """SIGKILL, at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_SECS_MAX)

    def terminate(self, secs: float = STOP_SECS_MAX) -> tuple[int, float]:
        """SIGTERM; returns the exit code and how long the process took to end."""
        assert self.process is not None
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(secs)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running {secs:.0f} s after SIGTERM\n{self.tail()}") from None
        return code, time.monotonic() - started

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def tail(self, lines: int = 15) -> str:
        """The end of its output, without the line written for every refused alert."""
        kept = [line for line in self.text().splitlines() if "alerts refused" not in line]
        return "\n".join(kept[-lines:])


class Aws(Program):
    """The fake AWS. Its state ends with it, its journal does not."""

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self.journal = directory / "aws.ndjson"
        arguments = ["tests.fakes.aws", "--port", str(port), "--state", str(self.journal), "--no-rate-limits"]
        super().__init__(arguments, {}, directory / "aws.log")

    def start(self) -> None:
        self.spawn()
        wait_until(
            lambda: get(self.port, "/")[0] != 0, START_SECS_MAX, lambda: f"the fake AWS is up\n{self.tail()}"
        )


class Forwarder(Program):
    """The forwarder with a configuration file of its own."""

    def __init__(
        self,
        directory: Path,
        ports: Ports,
        *,
        spool: Path,
        environment: Mapping[str, str],
        **settings: Any,
    ) -> None:
        self.ports = ports
        config = directory / "config.yaml"
        values = {
            "sync": "full",
            "bytes_max": 256 * MIB,
            "drain_delay_secs": 0,
            "drain_secs_max": 20,
            "hold_secs_max": 1.5,
            "aggregation": "{enabled: false}",
        }
        config.write_text(CONFIGURATION.format(**values | settings, spool=spool, **ports._asdict()))
        super().__init__(
            ["forwarder", "run", "--config", str(config)], environment, directory / "forwarder.log"
        )

    def start(self) -> float:
        """Start and wait until ready; returns how long that took."""
        self.spawn()
        return self.wait_ready()

    def wait_ready(self) -> float:
        return self._wait_for("/readyz")

    def wait_alive(self) -> float:
        """Wait until it runs, ready or not; fails the test where it ends instead."""
        return self._wait_for("/livez")

    def _wait_for(self, probe: str) -> float:
        def answers() -> bool:
            assert self.running, f"ended while starting\n{self.tail()}"
            return get(self.ports.admin, probe)[0] == 200

        return wait_until(answers, START_SECS_MAX, lambda: f"{probe} answers 200\n{self.tail()}")

    @property
    def ready(self) -> bool:
        return get(self.ports.admin, "/readyz")[0] == 200

    def status(self) -> dict[str, Any]:
        """``/status``, or nothing while it does not answer."""
        code, body = get(self.ports.admin, "/status")
        answer: dict[str, Any] = json.loads(body) if code == 200 else {}
        return answer

    @property
    def fill(self) -> float:
        """Share of the quota in use."""
        spool = self.status()["spool"]
        return float(spool["bytes"] / spool["bytes_max"])

    @property
    def pending(self) -> int:
        """Alerts some sink has yet to settle, or has counted and not told; -1 while nobody answers."""
        sinks = self.status().get("sinks")
        return max(int(sink["pending"] + sink["aggregating"]) for sink in sinks.values()) if sinks else -1

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        text = get(self.ports.admin, "/metrics")[1].decode()
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, values))

    def drain(self, secs: float = DRAIN_SECS_MAX) -> float:
        """Wait until every sink has settled everything; returns how long that took."""
        return wait_until(
            lambda: self.pending == 0, secs, lambda: f"all is delivered: {self.status()}\n{self.tail()}"
        )


class Stage:
    """Fake AWS, forwarder and ledger of one test; ends both processes whatever happens."""

    def __init__(
        self,
        directory: Path,
        rng: random.Random,
        *,
        spool: Path | None = None,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """``settings`` are the words in braces of ``CONFIGURATION``."""
        self.rng = rng
        self.ports = free_ports()
        self.spool = spool or directory.resolve() / "spool"
        self.ledger = Ledger(rng)
        self.aws = Aws(directory, self.ports.aws)
        leads_to_aws = FakeAws().environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports.aws}"}
        self.forwarder = Forwarder(
            directory,
            self.ports,
            spool=self.spool,
            environment=leads_to_aws | dict(environment or {}),
            **settings,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.forwarder.kill()
        self.aws.kill()
        if kind is not None:
            say(f"--- end of the forwarder's log ---\n{self.forwarder.tail(40)}")

    def judge(self) -> Verdict:
        """End the forwarder and judge the run: nothing lost, nothing altered, no fault of ours in the log."""
        self.forwarder.kill()
        verdict = judge(self.ledger, self.aws.journal, self.spool)
        say(str(verdict))
        assert verdict.acknowledged > 0, "nothing was acknowledged: the test proves nothing"
        assert not verdict.lost, verdict
        assert not verdict.altered, verdict
        assert "Traceback" not in self.forwarder.text(), self.forwarder.tail(40)
        assert not list(self.spool.glob("*.broken-*")), "the database was found broken"
        return verdict
