"""``make bench-enrichment``: what enrichment costs with 10,000 pods, each figure beside the same thing without it.

- memory and pauses: a process with the enricher, before and after its first list, and during a list of everything again
- CPU per alert: decoding and recording with and without enrichment, in one process, for hits and for misses
- acknowledgement with the API server running and stopped, over the whole service

Prints a table and writes build/bench-enrichment.json. See docs/benchmarks.md.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.fake_kubernetes import PODS, api_server, cluster, container_id, kubeconfig, wait_synced
from bench.load import closed_loop, paced
from bench.run import ALL_CORES, BUILD, LOAD_CORE, Bench, free_port, numbers
from forwarder.alert import decode
from forwarder.enricher import Enrichment
from forwarder.enrichment.kubernetes import Kubernetes, KubernetesSettings
from forwarder.ingest import Ingest
from forwarder.kubernetes_access import Access, Source
from forwarder.kubernetes_api import Api
from forwarder.kubernetes_missing import Missing
from forwarder.kubernetes_objects import decode_meta, decode_node, decode_pod
from forwarder.metrics import Metrics

HERE = Path(__file__).parent
ALERTS = 20_000
LOAD = ALL_CORES[LOAD_CORE % len(ALL_CORES)]
ROUNDS = 5
SAMPLE_SECS = 0.002


def enricher(config: str = "") -> Kubernetes:
    return Kubernetes(
        KubernetesSettings(kubeconfig=config),
        metrics=Metrics(["cloudwatch_logs"]),
        now=time.time,
        monotonic=time.monotonic,
        rng=random.Random(1),
        environment={},
    )


# ---- memory and pauses: a process of its own -------------------------------------------------------------


def rss_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def watch(config: str, port: int) -> dict[str, Any]:
    """Memory before and after the first list, and the longest pause of the loop during each list."""
    under_test = enricher(config)
    gc.collect()
    gc.freeze()
    before = rss_mib()
    lags: list[float] = []

    async def sample() -> None:
        loop = asyncio.get_running_loop()
        while True:
            at = loop.time()
            await asyncio.sleep(SAMPLE_SECS)
            lags.append(loop.time() - at - SAMPLE_SECS)

    sampler = asyncio.create_task(sample())
    cpu, at = time.process_time(), time.perf_counter()
    await under_test.start()
    while len(under_test.mirror.pods) < PODS or not all(  # noqa: ASYNC110 - seen from outside
        map(under_test.mirror.synced, ("pods", "replicasets"))
    ):
        await asyncio.sleep(0.01)
    figures: dict[str, Any] = {
        "first_list_secs": time.perf_counter() - at,
        "first_list_cpu_secs": time.process_time() - cpu,
        "first_list_pause_ms": 1000 * max(lags),
    }
    await asyncio.sleep(1)
    figures["rss_before_mib"], figures["rss_after_mib"] = before, rss_mib()
    lags.clear()
    urllib_request = urllib.request.Request(f"http://127.0.0.1:{port}/expire", method="POST")
    await asyncio.to_thread(urllib.request.urlopen, urllib_request)
    heard = under_test.mirror.reflectors["pods"].heard_at
    while under_test.mirror.reflectors["pods"].heard_at == heard:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    gc.collect()
    await asyncio.sleep(0.1)
    figures["list_again_pause_ms"] = 1000 * max(lags)
    figures["rss_after_list_again_mib"] = rss_mib()
    sampler.cancel()
    await under_test.stop()
    return figures


def memory(folder: Path) -> dict[str, Any]:
    port = free_port()
    with api_server(port, LOAD):
        out = subprocess.run(
            [sys.executable, __file__, "watch", str(kubeconfig(folder, port)), str(port)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    figures: dict[str, Any] = {
        key: round(value, 2) for key, value in json.loads(out.splitlines()[-1]).items()
    }
    figures["rss_growth_mib"] = round(figures["rss_after_mib"] - figures["rss_before_mib"], 1)
    print(f"memory for {PODS:,} pods: +{figures['rss_growth_mib']} MiB", json.dumps(figures))
    return figures


# ---- CPU per alert ---------------------------------------------------------------------------------------


def filled() -> Kubernetes:
    """An enricher with everything cached and no API server behind it."""
    made = enricher()
    made.api = Api(Access(Source(server="http://127.0.0.1:9"), time.monotonic))
    made._missing = Missing(made.api, made._offer, time.monotonic)
    made._stale = made._unsynced = False
    objects = cluster()
    for item in objects["nodes"]:
        made.mirror.nodes.put(decode_node(json.dumps(item).encode())[0])
    for item in objects["namespaces"]:
        made.mirror.namespaces.put(decode_meta(json.dumps(item).encode(), made._labels)[0])
    for item in objects["replicasets"]:
        made.mirror.replicasets.put(decode_meta(json.dumps(item).encode())[0])
    for item in objects["pods"]:
        made.mirror.pods.put(decode_pod(json.dumps(item).encode(), made._labels)[0])
    return made


def bodies(identities: list[str]) -> list[bytes]:
    """The benchmark's alert with these container ids."""
    sample = (HERE.parent / "forwarder" / "data" / "falco_alerts.ndjson").read_text().splitlines()
    told = next(
        json.loads(line) for line in sample if '"container.id":"3ad7b26ded6d' in line.replace(" ", "")
    )
    made = []
    for identity in identities:
        told["output_fields"]["container.id"] = identity[:12]
        made.append(json.dumps(told).encode())
    return made


def record_us(ingest: Ingest, alerts: list[bytes]) -> float:
    """CPU microseconds to decode and record one alert, the digest left out."""
    started = time.process_time()
    for body in alerts:
        ingest._record(decode(body).alerts[0], b"0" * 16, "10.1.0.9", utf8_replaced=False)
    return (time.process_time() - started) / len(alerts) * 1e6


def cpu() -> dict[str, Any]:
    under_test = filled()
    gc.collect()
    gc.freeze()
    rng = random.Random(2)
    kinds = {
        "swarm": [container_id(rng.randrange(100)) for _ in range(ALERTS)],
        "all_pods": [container_id(rng.randrange(PODS)) for _ in range(ALERTS)],
        "miss": [f"{rng.getrandbits(256):064x}" for _ in range(ALERTS)],
    }
    figures: dict[str, Any] = {}
    plain = _ingest(None)
    enriched = _ingest(Enrichment([under_test], now=time.monotonic))
    for name, identities in kinds.items():
        alerts = bodies(identities)
        without, with_ = [], []
        for _ in range(ROUNDS):
            without.append(record_us(plain, alerts))
            with_.append(record_us(enriched, alerts))
        base, ours = statistics.median(without), statistics.median(with_)
        figures[name] = {
            "us": round(ours - base, 2),
            "without_us": round(base, 2),
            "ratio": round(ours / base, 2),
        }
        print(
            f"enrichment, {name:<9} {ours - base:5.2f} us an alert ({base:.2f} without, ratio {ours / base:.2f})"
        )
    return figures


def _ingest(enrichment: Enrichment | None) -> Ingest:
    spool: Any = None  # nothing is stored here
    return Ingest(
        spool=spool,
        metrics=Metrics(["cloudwatch_logs"]),
        hold_secs_max=0,
        now_ns=time.time_ns,
        now_monotonic=time.monotonic,
        enrichment=enrichment,
    )


# ---- the whole service -----------------------------------------------------------------------------------


def acknowledged(folder: Path, secs: float, rounds: int) -> dict[str, Any]:
    """Alerts acknowledged a second, and how long an answer takes, with the API server running, frozen and gone."""
    bench = Bench(secs, rounds, folder)
    port = free_port()
    bench.kubeconfig = kubeconfig(folder, port)
    rates: dict[str, list[float]] = {"running": [], "frozen": [], "gone": []}
    waits: dict[str, list[float]] = {"running": [], "frozen": [], "gone": []}

    def measure(state: str, receiver: int) -> None:
        rates[state].append(closed_loop(receiver, connections=64, secs=secs, start=numbers()).rate)
        result = paced(receiver, senders=100, rate=1000, secs=secs, start=numbers())
        waits[state].append(1000 * statistics.median(result.latencies))

    try:
        for _ in range(rounds):
            with (
                api_server(port, LOAD) as api,
                bench.forwarder("enriched", sinks="none") as (_, receiver, admin),
            ):
                wait_synced(admin)
                closed_loop(receiver, connections=64, secs=1.0, start=numbers())
                measure("running", receiver)
                api.send_signal(signal.SIGSTOP)
                measure("frozen", receiver)
                api.send_signal(signal.SIGCONT)
                measure("running", receiver)
                api.kill()
                measure("gone", receiver)
    finally:
        bench.close()
    rate = {state: statistics.median(values) for state, values in rates.items()}
    wait = {state: statistics.median(values) for state, values in waits.items()}
    figures = {
        state: {
            "per_sec": round(rate[state]),
            "ratio": round(rate[state] / rate["running"], 3),
            "ack_p50_ms": round(wait[state], 3),
            "ack_ratio": round(wait[state] / wait["running"], 3),
        }
        for state in rates
    }
    for state, figure in figures.items():
        print(f"acknowledged, API server {state:<8}", json.dumps(figure))
    return figures


def main() -> int:
    only = set(sys.argv[1].split(",")) if len(sys.argv) > 1 else {"memory", "cpu", "ack"}
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "memory" in only:
            figures["memory"] = memory(folder)
        if "cpu" in only:
            figures["cpu"] = cpu()
        if "ack" in only:
            figures["ack"] = acknowledged(folder, secs=3.0, rounds=3)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "bench-enrichment.json").write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        print(json.dumps(asyncio.run(watch(sys.argv[2], int(sys.argv[3])))))
    else:
        sys.exit(main())
