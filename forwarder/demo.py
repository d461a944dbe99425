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
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
from aiobotocore.session import get_session

from forwarder import alert
from forwarder.demo_kubernetes import TOKEN, kubeconfig
from forwarder.replay import Bar, Report, replay

REGION, ACCOUNT, CLUSTER = "eu-west-1", "123456789012", "demo"
LOG_GROUP = f"/falco/{CLUSTER}"
START_SECS_MAX, SYNC_SECS_MAX, DELIVER_SECS_MAX, STOP_SECS_MAX = 60.0, 30.0, 120.0, 30.0
SENDERS = 4
SEVERITIES = ("CRITICAL", "HIGH", "MEDIUM", "LOW", "INFORMATIONAL")
FINDINGS_SHOWN = 12
COLUMNS_USUAL, RULE_COLUMNS_MIN = 100, 20
MINIMUM_RANK = 5
HTTP_OK = 200

UNKNOWN_POD = "(unknown pod)"

CONFIGURATION = """\
cluster: {{name: {cluster}}}
spool: {{directory: {directory}/spool, bytes_max: 268435456, sync: full}}
receiver: {{host: 127.0.0.1, port: {ports.receiver}, drain_delay_secs: 0}}
admin: {{host: 127.0.0.1, port: {ports.admin}}}
aws: {{region: {region}}}
enrichment: {{kubernetes: {{enabled: true, kubeconfig: {directory}/kubeconfig}}, ec2: {{enabled: false}}, ecs: {{enabled: false}}}}
sinks:
  cloudwatch_logs: {{enabled: true, log_group: {group}, retention_days: 90, minimum_priority: debug}}
  security_hub: {{enabled: true, minimum_priority: notice}}
"""


class _Ports(NamedTuple):
    aws: int
    kubernetes: int
    receiver: int
    admin: int


class _Arrived(NamedTuple):
    event_ids: list[str]
    findings: list[dict[str, Any]]
    dead_letters: int


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
    _show(report, arrived)
    return _equal(bodies, report, arrived)


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
            pending = {name: sink["pending"] for name, sink in status["sinks"].items()}
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


async def _read_back(dead_letters: int) -> _Arrived:
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
    return _Arrived(ids, findings, dead_letters)


def _severity(finding: dict[str, Any]) -> str:
    # The service copies it to the top level, the embedded one does not.
    return str(finding.get("FindingProviderFields", finding)["Severity"]["Label"])


def _show(report: Report, arrived: _Arrived) -> None:
    severities = Counter(_severity(finding) for finding in arrived.findings)
    rows = {
        "sent": report.sent,
        "acknowledged": report.acknowledged,
        "log events": len(arrived.event_ids),
        "findings": len(arrived.findings),
        "dead letters": arrived.dead_letters,
    } | {label: severities[label] for label in SEVERITIES}
    print()
    for name, number in rows.items():
        print(f"{name:<14} {number:>6}")
    newest = sorted(arrived.findings, key=lambda finding: str(finding["LastObservedAt"]), reverse=True)
    width = min(max(shutil.get_terminal_size((COLUMNS_USUAL, 24)).columns, 60), 160)
    shown = _various(newest)
    print(f"\n{len(shown)} of the newest findings, each of another workload or host:\n")
    _show_table(shown, width)
    print("\nThe alerts are real, the cluster is made up. What it does not know stays unknown.")
    if shown:
        print("\nThe first of them in full:")
        _show_finding(shown[0], width)


def _place(finding: dict[str, Any]) -> tuple[str, str]:
    """Workload and instance; what nobody knows stays unknown."""
    workload = instance = "-"
    for item in finding["Resources"]:
        if item["Type"] == "AwsEc2Instance":
            instance = item["Id"].rpartition("/")[2]
        elif item["Type"] == "Container":
            workload = item.get("Details", {}).get("Other", {}).get("workload", UNKNOWN_POD)
    return workload, instance


def _various(newest: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest of each workload and host, of a rule that is not shown yet where there is one."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for finding in newest:
        groups.setdefault(_place(finding), []).append(finding)
    shown: list[dict[str, Any]] = []
    for group in list(groups.values())[:FINDINGS_SHOWN]:
        rules = {finding["Title"] for finding in shown}
        shown.append(next((finding for finding in group if finding["Title"] not in rules), group[0]))
    return shown


def _show_table(findings: list[dict[str, Any]], width: int) -> None:
    rows = [(_severity(finding), finding["Title"], *_place(finding)) for finding in findings]
    rows.insert(0, ("severity", "rule", "workload", "instance"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    widths[1] = min(widths[1], max(RULE_COLUMNS_MIN, width - widths[0] - widths[2] - widths[3] - 6))
    for severity, rule, workload, instance in rows:
        first, *more = textwrap.wrap(rule, widths[1], break_long_words=False)
        print(f"{severity:<{widths[0]}}  {first:<{widths[1]}}  {workload:<{widths[2]}}  {instance}".rstrip())
        for line in more:
            print(f"{'':<{widths[0]}}  {line}")


def _show_finding(finding: dict[str, Any], width: int) -> None:
    print(f"\n{_severity(finding):<13} {finding['Title']}")
    first = finding["Resources"][0].get("Details", {}).get("Other", {})
    for label, text in (
        ("observed", str(finding["LastObservedAt"])),
        ("what", finding["Description"]),
        ("where", ", ".join(f"{key}={value}" for key, value in first.items())),
        ("types", ", ".join(finding["FindingProviderFields"]["Types"])),
        ("resources", ", ".join(f"{item['Type']} {item['Id']}" for item in finding["Resources"])),
        (
            "log event",
            "{falco/log_group} {falco/log_stream} id={falco/id}".format(**finding["ProductFields"]),
        ),
        ("id", finding["Id"]),
    ):
        lines = textwrap.wrap(text, width - 11, break_long_words=False, break_on_hyphens=False)
        print(f" {label:<9} " + f"\n{'':<11}".join(lines))


def _equal(bodies: list[bytes], report: Report, arrived: _Arrived) -> bool:
    """Compare what arrived with what was acknowledged; says what differs."""
    decoded = [alert.decode(body).alerts[0] for body in bodies]
    expected = sum(item.rank <= MINIMUM_RANK and not item.internal for item in decoded)
    places = [_place(finding) for finding in arrived.findings]
    named = sum(workload not in {"-", UNKNOWN_POD} for workload, _ in places)
    hosts = sum(instance != "-" for _, instance in places)
    print(f"\nenriched: {named} of {len(places)} findings name a workload, {hosts} name an instance")
    differences = [
        text
        for wrong, text in (
            (report.acknowledged != report.sent, f"not acknowledged: {dict(report.refused)}"),
            (
                len(arrived.event_ids) != report.acknowledged
                or len(set(arrived.event_ids)) != len(arrived.event_ids),
                f"{report.acknowledged} acknowledged, {len(arrived.event_ids)} log events",
            ),
            (
                len(arrived.findings) != expected,
                f"{expected} findings expected, {len(arrived.findings)} found",
            ),
            (arrived.dead_letters > 0, f"{arrived.dead_letters} dead letters"),
            (not named, "no finding names a workload"),
        )
        if wrong
    ]
    for text in differences:
        print(f"WRONG: {text}")
    if not differences:
        print(
            f"ok: all {report.acknowledged} acknowledged alerts are in CloudWatch Logs;\n"
            f"    the {expected} of priority Notice and higher are findings in Security Hub"
        )
    return not differences


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
