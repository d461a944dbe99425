"""``falco-forwarder demo``: the main job on this machine, nothing faked on our side.

moto's server is the embedded AWS on 127.0.0.1, ``demo_kubernetes`` the API server of a made-up cluster; the real forwarder
runs as its own process with a real configuration file; real Falco alerts are posted one a request; what arrived is read back
with an ordinary SDK client and compared with what was acknowledged. Needs the extra ``demo``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
from aiobotocore.session import get_session

from forwarder.demo_kubernetes import TOKEN, kubeconfig
from forwarder.demo_report import Arrived, equal, show
from forwarder.replay import Bar, replay

REGION, ACCOUNT, CLUSTER = "eu-west-1", "123456789012", "demo"
LOG_GROUP = f"/falco/{CLUSTER}"
START_SECS_MAX, SYNC_SECS_MAX, DELIVER_SECS_MAX, STOP_SECS_MAX = 60.0, 30.0, 120.0, 30.0
SENDERS = 4
HTTP_OK = 200

CONFIGURATION = """\
cluster: {{name: {cluster}}}
spool: {{directory: {directory}/spool, bytes_max: 268435456, sync: full}}
receiver: {{host: 127.0.0.1, port: {ports.receiver}, drain_delay_secs: 0}}
admin: {{host: 127.0.0.1, port: {ports.admin}}}
aws: {{region: {region}}}
enrichment: {{kubernetes: {{enabled: true, kubeconfig: {directory}/kubeconfig}}, ec2: {{enabled: false}}, ecs: {{enabled: false}}}}
sinks:
  cloudwatch_logs: {{enabled: true, log_group: {group}, retention_days: 90, minimum_priority: debug}}
  security_hub: {{enabled: true, minimum_priority: notice, aggregation: {{flush_secs: [1]}}}}
"""


class _Ports(NamedTuple):
    aws: int
    kubernetes: int
    receiver: int
    admin: int


def demo(*, keep: bool) -> int:
    """Run it; 0 only if everything acknowledged has arrived."""
    if importlib.util.find_spec("moto") is None:
        print("The demo needs moto: pip install 'falco-aws-forwarder[demo]'", file=sys.stderr)
        return 1
    ports = _Ports(_port(5555), _port(6443), _port(2801), _port(8080))
    environment = dict(os.environ) | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports.aws}",
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name in [name for name in environment if name.startswith(("FORWARDER__", "AWS_PROFILE", "AWS_ROLE"))]:
        del environment[name]
    os.environ.update({key: value for key, value in environment.items() if key.startswith("AWS_")})
    with tempfile.TemporaryDirectory(prefix="falco-forwarder-demo-") as folder:
        directory = Path(folder)
        config = _configured(directory, ports)
        with contextlib.ExitStack() as stack:

            def start(name: str, log: str, *arguments: str) -> None:
                stack.enter_context(_process(name, directory / log, environment, *arguments))

            try:
                start(
                    "embedded AWS (moto)", "aws.log", "moto.server", "-H", "127.0.0.1", "-p", str(ports.aws)
                )
                start(
                    "made-up Kubernetes cluster",
                    "api.log",
                    "forwarder.demo_kubernetes",
                    str(ports.kubernetes),
                )
                asyncio.run(_up(f"http://127.0.0.1:{ports.aws}/moto-api/", "embedded AWS"))
                asyncio.run(_up(f"http://127.0.0.1:{ports.kubernetes}/readyz", "Kubernetes API"))
                asyncio.run(_enable_hub())
                start("falco-forwarder", "forwarder.log", "forwarder", "run", "--config", str(config))
                asyncio.run(_up(f"http://127.0.0.1:{ports.admin}/readyz", "falco-forwarder"))
                good = asyncio.run(_main_job(ports))
            except (TimeoutError, OSError, aiohttp.ClientError) as error:
                print(f"demo failed: {error}", file=sys.stderr)
                print(_tail(directory / "forwarder.log"), file=sys.stderr)
                return 1
            if keep:
                _look_around(ports)
    return 0 if good else 1


def _configured(directory: Path, ports: _Ports) -> Path:
    """Write the configuration, and the kubeconfig it names."""
    (directory / "kubeconfig").write_text(kubeconfig(f"http://127.0.0.1:{ports.kubernetes}"))
    config = directory / "config.yaml"
    config.write_text(
        CONFIGURATION.format(
            cluster=CLUSTER, directory=directory, ports=ports, region=REGION, group=LOG_GROUP
        )
    )
    return config


async def _main_job(ports: _Ports) -> bool:
    bodies = _sample()
    await _synced(f"http://127.0.0.1:{ports.admin}")
    print(f"posting {len(bodies)} real Falco alerts to http://127.0.0.1:{ports.receiver}/ ...", flush=True)
    report = await replay(
        bodies,
        f"http://127.0.0.1:{ports.receiver}/",
        senders=SENDERS,
        progress=Bar(len(bodies), "posted"),
    )
    status = await _delivered(f"http://127.0.0.1:{ports.admin}/status")
    arrived = await _read_back(sum(sink["dead_letters"] for sink in status["sinks"].values()))
    show(report, arrived)
    return equal(bodies, report, arrived)


def _sample() -> list[bytes]:
    text = resources.files("forwarder").joinpath("data/falco_alerts.ndjson").read_bytes()
    return [line for line in text.splitlines() if line]


async def _synced(url: str) -> None:
    """Wait until the forwarder knows the cluster."""
    deadline = time.monotonic() + SYNC_SECS_MAX
    kinds: dict[str, Any] = {}
    async with aiohttp.ClientSession() as session:
        while not kinds or any(kind["stale"] or not kind["synced"] for kind in kinds.values()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cluster is not known within {SYNC_SECS_MAX:.0f} s: {kinds}")
            await asyncio.sleep(0.1)
            async with session.get(f"{url}/status") as answer:
                kinds = (await answer.json())["enrichment"]["kubernetes"].get("kinds", {})
        async with session.get(f"{url}/metrics") as answer:
            await answer.read()  # a scrape brings up to date what enrichment takes for stale
    print(f"the cluster is known: {', '.join(kinds)}", flush=True)


async def _delivered(url: str) -> dict[str, Any]:
    """Wait until no sink has anything pending; says how it goes."""
    deadline = time.monotonic() + DELIVER_SECS_MAX
    shown = ""
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(url) as answer:
                status: dict[str, Any] = await answer.json()
            pending = {name: sink["pending"] + sink["aggregating"] for name, sink in status["sinks"].items()}
            line = "delivering: " + ", ".join(f"{name} {count} pending" for name, count in pending.items())
            if line != shown:
                print(line, flush=True)
                shown = line
            if not any(pending.values()):
                return status
            if time.monotonic() > deadline:
                raise TimeoutError(f"not delivered within {DELIVER_SECS_MAX:.0f} s: {pending}")
            await asyncio.sleep(0.2)


async def _enable_hub() -> None:
    async with get_session().create_client("securityhub") as hub:
        await hub.enable_security_hub()


async def _read_back(dead_letters: int) -> Arrived:
    """What an ordinary SDK client finds at AWS."""
    ids: list[str] = []
    findings: list[dict[str, Any]] = []
    async with get_session().create_client("logs") as logs:
        async for page in logs.get_paginator("filter_log_events").paginate(logGroupName=LOG_GROUP):
            ids += [msgspec.json.decode(event["message"])["id"] for event in page["events"]]
    async with get_session().create_client("securityhub") as hub:
        token: dict[str, str] = {}
        while True:
            answer: dict[str, Any] = dict(await hub.get_findings(MaxResults=100, **token))  # type: ignore[arg-type]
            findings += answer["Findings"]
            if not answer.get("NextToken"):
                break
            token = {"NextToken": answer["NextToken"]}
    return Arrived(ids, findings, dead_letters)


def _look_around(ports: _Ports) -> None:
    endpoint = f"http://127.0.0.1:{ports.aws}"
    print(
        f"""
Everything stays up until Ctrl-C. To look around, in another terminal:

  curl -d '{{"rule":"Hello","priority":"Critical","output":"It works"}}' http://127.0.0.1:{ports.receiver}/
  curl http://127.0.0.1:{ports.admin}/status
  curl http://127.0.0.1:{ports.admin}/metrics
  curl -H 'Authorization: Bearer {TOKEN}' http://127.0.0.1:{ports.kubernetes}/api/v1/pods

  export AWS_ACCESS_KEY_ID=demo AWS_SECRET_ACCESS_KEY=demo
  export AWS_REGION={REGION} AWS_DEFAULT_REGION={REGION}
  aws --endpoint-url {endpoint} securityhub get-findings --max-results 5
  aws --endpoint-url {endpoint} logs filter-log-events --log-group-name {LOG_GROUP}
""",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pause()


def _port(wanted: int) -> int:
    """The usual port, or a free one where it is taken."""
    for candidate in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", candidate))
            return int(probe.getsockname()[1])
    raise OSError("no free port")


async def _up(url: str, name: str) -> None:
    deadline = time.monotonic() + START_SECS_MAX
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as answer:
                    if answer.status == HTTP_OK:
                        return
            await asyncio.sleep(0.1)
    raise TimeoutError(f"{name} did not come up within {START_SECS_MAX:.0f} s")


@contextlib.contextmanager
def _process(name: str, log: Path, environment: dict[str, str], *arguments: str) -> Iterator[None]:
    """One module run as a process of its own, ended with SIGTERM."""
    print(f"starting {name} ...", flush=True)
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - this interpreter, our arguments
            [sys.executable, "-m", *arguments], env=environment, stdout=output, stderr=output
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-20:]) if path.exists() else ""
