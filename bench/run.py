"""``make bench``: what the forwarder costs beside a bare aiohttp handler, measured in the same run.

The server is pinned to one core; load and fake AWS share the other. Each figure is the median of interleaved rounds.
Prints a table and writes build/bench.json: ``ratios`` and the figures behind them. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.fake_kubernetes import api_server, kubeconfig, wait_synced
from bench.load import Alerts, Result, closed_loop, paced
from forwarder.record import Record
from forwarder.spool_store import Store
from forwarder.spool_values import Batch

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"
TARGETS = {
    "accepted_64": (">=", 0.55),
    "accepted_1": (">=", 0.40),
    "delivered_both": (">=", 0.38),
    "cpu_delivered_both": ("<=", 2.7),
    "new_connection": (">=", 0.60),
}
BACKLOG = 1_000_000
BLOCK = 64
SERVER_CORE, LOAD_CORE = 0, 1
next_number = 0


def numbers(amount: int = 50_000_000) -> int:
    """A range of alert numbers nobody else uses."""
    global next_number  # noqa: PLW0603 - one counter for the whole run
    next_number += amount
    return next_number


def pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A process under test: its CPU seconds, its memory, its last words."""

    def __init__(self, arguments: list[str], environment: dict[str, str], core: int) -> None:
        cores = sorted(os.sched_getaffinity(0)) if core < 0 else ALL_CORES
        self.process = subprocess.Popen(
            ["taskset", "-c", str(cores[core % len(cores)]), sys.executable, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=HERE.parent,
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line.strip() != "ready":
            raise SystemExit(f"{arguments} did not start: {line}")

    def cpu_secs(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self, name: str = "VmRSS") -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def stop(self) -> dict[str, Any]:
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        return dict(json.loads(out.strip().splitlines()[-1])) if out.strip() else {}


ALL_CORES = sorted(os.sched_getaffinity(0))


class Bench:
    """All scenarios, over one fake AWS."""

    def __init__(self, secs: float, rounds: int, folder: Path) -> None:
        self.secs, self.rounds, self.folder = secs, rounds, folder
        self.aws_port = free_port()
        self.environment = dict(os.environ) | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.aws_port}",
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_REGION": "eu-west-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.figures: dict[str, Any] = {}
        self.per_alert = False
        self.kubeconfig: Path | None = None
        """Set: every forwarder enriches from the API there."""
        self.fake = subprocess.Popen(
            [
                "taskset",
                "-c",
                str(ALL_CORES[LOAD_CORE % len(ALL_CORES)]),
                sys.executable,
                str(HERE / "fake.py"),
                str(self.aws_port),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.fake.stdout
        self.fake.stdout.readline()

    def close(self) -> None:
        self.fake.terminate()
        self.fake.wait()

    @contextlib.contextmanager
    def floor(self) -> Iterator[tuple[Server, int]]:
        port = free_port()
        server = Server([str(HERE / "serve.py"), "floor", str(port)], self.environment, SERVER_CORE)
        try:
            yield server, port
        finally:
            server.stop()

    @contextlib.contextmanager
    def forwarder(
        self,
        name: str,
        *,
        sync: str = "full",
        sinks: str = "both",
        sample: bool = False,
        spool: Path | None = None,
        aws: bool = True,
    ) -> Iterator[tuple[Server, int, int]]:
        port, admin = free_port(), free_port()
        directory = spool or Path(tempfile.mkdtemp(dir=self.folder))
        config = directory.with_suffix(".yaml")
        both = sinks == "both"
        config.write_text(
            f"cluster: {{name: bench}}\nspool: {{directory: {directory}, sync: {sync}, bytes_max: 2147483648}}\n"
            f"receiver: {{host: 127.0.0.1, port: {port}}}\nadmin: {{host: 127.0.0.1, port: {admin}}}\n"
            f"enrichment: {{{self._enrichment()}ec2: {{enabled: false}}, ecs: {{enabled: false}}}}\n"
            "log: {level: error}\ndelivery: {drain_secs_max: 5}\nsinks:\n"
            "  cloudwatch_logs: {enabled: true, log_group: /falco/bench, minimum_priority: "
            f"{'debug' if both else 'emergency'}, linger_secs: 0.1}}\n"
            f"  security_hub: {{enabled: {str(both).lower()}, rate_per_sec: 100000, burst: 100000, linger_secs: 0.1, "
            f"aggregation: {{enabled: {str(not self.per_alert).lower()}}}}}\n"
        )
        environment = (
            self.environment if aws else self.environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
        )
        arguments = [str(HERE / "serve.py"), "forwarder", str(config), *(["--sample"] if sample else [])]
        server = Server(arguments, environment, SERVER_CORE)
        try:
            if self.kubeconfig is not None:
                wait_synced(admin)
            yield server, port, admin
        finally:
            self.figures[f"_{name}_lags"] = server.stop().get("lags", [])
            if spool is None:
                shutil.rmtree(directory)

    def _enrichment(self) -> str:
        if self.kubeconfig is None:
            return "kubernetes: {enabled: false}, "
        return f"kubernetes: {{enabled: true, kubeconfig: {self.kubeconfig}}}, "

    def counts(self) -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.aws_port}/counts") as answer:
            return dict(json.loads(answer.read()))

    @staticmethod
    def pending(admin: int) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/status") as answer:
            return max(int(sink["pending"]) for sink in json.loads(answer.read())["sinks"].values())

    # ---- scenarios ----------------------------------------------------------------------------------

    def accept(self, port: int, connections: int, *, keep_alive: bool = True) -> Result:
        closed_loop(port, connections=connections, secs=0.5, start=numbers(), keep_alive=keep_alive)
        return closed_loop(
            port, connections=connections, secs=self.secs, start=numbers(), keep_alive=keep_alive
        )

    def compare(self, name: str, connections: int, *, sync: str, keep_alive: bool = True) -> None:
        """Accepted a second, against the floor."""
        floors, ours = [], []
        for _ in range(self.rounds):
            with self.floor() as (_, port):
                floors.append(self.accept(port, connections, keep_alive=keep_alive).rate)
            with self.forwarder(name, sync=sync, sinks="none") as (_, port, _):
                result = self.accept(port, connections, keep_alive=keep_alive)
                assert not result.refused, f"{result.refused} refused"
                ours.append(result.rate)
        self.note(name, statistics.median(floors), statistics.median(ours))

    def note(self, name: str, floor: float, ours: float) -> None:
        self.figures[name] = {
            "floor_per_sec": round(floor),
            "per_sec": round(ours),
            "ratio": round(ours / floor, 3),
        }
        print(f"{name:<20} {ours:>9,.0f}/s  floor {floor:>9,.0f}/s  ratio {ours / floor:.2f}", flush=True)

    def delivered(self) -> None:
        """From the first POST until everything is at both sinks; with aggregation, until it is counted and what is due is told."""
        floors, ours, cpus, floor_cpus, lags = [], [], [], [], []
        for _ in range(self.rounds):
            with self.floor() as (server, port):
                before = server.cpu_secs()
                result = closed_loop(port, connections=64, secs=self.secs, start=numbers())
                floors.append(result.rate)
                floor_cpus.append((server.cpu_secs() - before) / result.acknowledged * 1e6)
            with self.forwarder("delivered", sample=True) as (server, port, admin):
                closed_loop(port, connections=64, secs=0.5, start=numbers())
                self._settle()
                at, before = self.counts(), server.cpu_secs()
                started = time.perf_counter()
                result = closed_loop(port, connections=64, secs=self.secs, start=numbers())
                want = result.acknowledged
                while True:
                    now = self.counts()
                    found = (
                        now["findings"] - at["findings"] >= want
                        if self.per_alert
                        else not self.pending(admin)
                    )
                    if now["events"] - at["events"] >= want and found:
                        break
                    assert time.perf_counter() - started < self.secs * 10 + 30, "not delivered"
                    time.sleep(0.02)
                ours.append(want / (time.perf_counter() - started))
                cpus.append((server.cpu_secs() - before) / want * 1e6)
                events, batches = now["events"] - at["events"], now["batches"] - at["batches"]
                self.figures["events_per_call"] = round(events / max(1, batches))
                self.figures["rss_under_load_mib"] = round(server.rss_mib("VmHWM"), 1)
            lags.append(self.figures["_delivered_lags"])
        self.note("delivered_both", statistics.median(floors), statistics.median(ours))
        floor_cpu, cpu = statistics.median(floor_cpus), statistics.median(cpus)
        self.figures["cpu_delivered_both"] = {
            "floor_us": round(floor_cpu, 1),
            "us": round(cpu, 1),
            "ratio": round(cpu / floor_cpu, 2),
        }
        print(
            f"{'cpu_delivered_both':<20} {cpu:>8.1f} us  floor {floor_cpu:>8.1f} us  ratio {cpu / floor_cpu:.2f}"
        )
        middle = sorted(lags, key=lambda item: item[2])[len(lags) // 2]
        self.figures["loop_stall_ms"] = {
            q: round(v * 1000, 2) for q, v in zip(("p50", "p99", "p99.9"), middle, strict=True)
        }
        print(f"loop stall while delivering: {self.figures['loop_stall_ms']} ms")

    def _settle(self) -> None:
        """Wait until nothing comes in any more."""
        last = self.counts()
        while True:
            time.sleep(1.3)
            now = self.counts()
            if now == last | {"calls": now["calls"]}:
                return
            last = now

    def latency(self, sync: str) -> None:
        with self.forwarder("latency", sync=sync) as (_, port, _):
            paced(port, senders=100, rate=1000, secs=1, start=numbers())
            result = paced(port, senders=100, rate=1000, secs=max(self.secs, 5), start=numbers())
        ms = sorted(1000 * value for value in result.latencies)
        figures = {"p50": ms[len(ms) // 2], "p99": ms[int(len(ms) * 0.99)], "max": ms[-1]}
        self.figures[f"ack_latency_{sync}_ms"] = {key: round(value, 2) for key, value in figures.items()}
        print(
            f"ack latency at 1,000/s, sync {sync}: "
            + "  ".join(f"{k} {v:.2f} ms" for k, v in figures.items()),
            flush=True,
        )

    def backlog(self) -> None:
        """A million alerts on disk: memory with the services down, then the catch-up rate."""
        spool = self.folder / "backlog"
        fill(spool)
        with self.forwarder("idle") as (server, _, _):
            time.sleep(2)
            idle = server.rss_mib()
        with self.forwarder("down", spool=spool, aws=False) as (server, _, _):
            time.sleep(8)
            down = server.rss_mib()
        with self.forwarder("catch_up", spool=spool) as (server, _, admin):
            started = time.perf_counter()
            while self.pending(admin):
                assert time.perf_counter() - started < 600, "backlog not delivered"
                time.sleep(0.2)
            rate = BACKLOG / (time.perf_counter() - started)
            peak = server.rss_mib("VmHWM")
        live = self.figures["delivered_both"]["per_sec"]
        self.figures["rss_idle_mib"], self.figures["rss_backlog_mib"] = round(idle, 1), round(down, 1)
        self.figures["rss_catch_up_peak_mib"] = round(peak, 1)
        self.figures["catch_up"] = {"per_sec": round(rate), "times_live": round(rate / live, 2)}
        print(
            f"RSS idle {idle:.0f} MiB, with {BACKLOG:,} alerts waiting {down:.0f} MiB, peak of catch-up {peak:.0f} MiB"
        )
        print(f"catch-up {rate:,.0f}/s = {rate / live:.2f} x live")


def fill(directory: Path) -> None:
    """A spool with a million alerts, written the way the forwarder writes."""
    store = Store(
        directory, full_sync=False, bytes_max=2 << 30, dead_retention_secs=1e9, unparsed_bytes_max=1 << 30
    )
    store.open(["cloudwatch_logs", "security_hub"])
    alerts = Alerts(numbers())
    now = time.time()
    for first in range(0, BACKLOG, BLOCK):
        records = [
            Record(
                0,
                f"{first + index:032x}",
                4,
                int(now * 1e9),
                int(now * 1e9),
                False,
                alerts.next_body(),
                hostname="node",
            )
            for index in range(min(BLOCK, BACKLOG - first))
        ]
        written = store.write(Batch(records, {}, []), now)
        assert written.error is None
    store.close()


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--secs", type=float, default=5.0, help="length of one measurement")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument(
        "--enriched", action="store_true", help="with enrichment on and 10,000 pods cached"
    )
    arguments.add_argument(
        "--per-alert", action="store_true", help="one finding for each alert: without aggregation"
    )
    arguments.add_argument("--only", default="", help="comma-separated scenarios")
    options = arguments.parse_args()
    pin(LOAD_CORE)
    BUILD.mkdir(exist_ok=True)
    scenarios = (
        options.only.split(",")
        if options.only
        else ["accepted_64", "accepted_1", "new_connection", "delivered", "latency", "backlog"]
    )
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD))
        bench = Bench(options.secs, options.rounds, Path(folder))
        bench.per_alert = options.per_alert
        if options.enriched:
            port = free_port()
            stack.enter_context(api_server(port, ALL_CORES[LOAD_CORE % len(ALL_CORES)]))
            bench.kubeconfig = kubeconfig(Path(folder), port)
        try:
            print(
                f"alerts of {Alerts(0).body_bytes} bytes, {options.rounds} rounds of {options.secs:.0f} s, Python {sys.version.split()[0]}"
            )
            if "accepted_64" in scenarios:
                bench.compare("accepted_64", 64, sync="full")
            if "accepted_1" in scenarios:
                bench.compare("accepted_1", 1, sync="normal")
            if "new_connection" in scenarios:
                bench.compare("new_connection", 64, sync="full", keep_alive=False)
            if "delivered" in scenarios:
                bench.delivered()
            if "latency" in scenarios:
                bench.latency("full")
                bench.latency("normal")
            if "backlog" in scenarios:
                bench.backlog()
        finally:
            bench.close()
    return report(bench.figures)


def report(figures: dict[str, Any]) -> int:
    figures = {key: value for key, value in figures.items() if not key.startswith("_")}
    ratios = {name: figures[name]["ratio"] for name in TARGETS if name in figures}
    (BUILD / "bench.json").write_text(json.dumps({"ratios": ratios, "figures": figures}, indent=2) + "\n")
    print()
    for name, ratio in ratios.items():
        sign, target = TARGETS[name]
        met = ratio >= target if sign == ">=" else ratio <= target
        print(f"{name:<20} {ratio:>6.2f}   target {sign} {target:.2f}   {'met' if met else 'MISSED'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
