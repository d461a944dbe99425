"""The built image, looked into and run as Kubernetes would run it, with the demo's alerts through it.

Run by `make image-test`, which builds the image and its bill of materials before; never by `make test`, as the name of
this file is no test's. What was measured is written to build/image.json.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import statistics
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from forwarder import __version__, alert
from forwarder.replay import replay
from forwarder.sinks import SINKS, sink_class
from tests.crash.harness import START_SECS_MAX, Ports, Program, free_ports, get, say, wait_until
from tests.fakes.aws import FakeAws
from tests.image.container import (
    BASE,
    CONFIG,
    IMAGE,
    MEMORY_BYTES,
    PYTHON,
    SPOOL,
    Container,
    inspect_image,
    memory_limit,
    once,
    process_status,
)

ROOT = Path(__file__).resolve().parents[2]
USER = 65532
STARTS = 5
MINIMUM_RANK = 5
"""Notice."""
CONFIGURATION = """\
cluster: {{name: image}}
spool: {{directory: {spool}, bytes_max: 67108864, sync: full}}
receiver: {{host: 127.0.0.1, port: {ports.receiver}, drain_delay_secs: 0}}
admin: {{host: 127.0.0.1, port: {ports.admin}}}
enrichment: {{kubernetes: {{enabled: false}}, ec2: {{enabled: false}}, ecs: {{enabled: false}}}}
sinks:
  cloudwatch_logs: {{enabled: true, log_group: /falco/image, minimum_priority: debug}}
  security_hub: {{enabled: true, minimum_priority: notice, aggregation: {{flush_secs: [1]}}}}
"""


class Stage:
    """The strict fake AWS as a process, and containers that are led to it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ports: Ports = free_ports()
        self._journal = directory / "aws.ndjson"
        arguments = ["tests.fakes.aws", "--port", str(self.ports.aws), "--state", str(self._journal)]
        self.aws = Program(arguments, {}, directory / "aws.log")
        self.containers: list[Container] = []
        config = directory / "config.yaml"
        config.write_text(CONFIGURATION.format(spool=SPOOL, ports=self.ports))
        config.chmod(0o444)
        self._config = config

    def start_aws(self) -> None:
        self.aws.spawn()
        wait_until(
            lambda: get(self.ports.aws, "/")[0] != 0,
            START_SECS_MAX,
            lambda: f"the fake AWS is up\n{self.aws.tail()}",
        )

    def container(self) -> Container:
        """One with a spool of its own, and with no shell it could execute."""
        number = len(self.containers)
        spool = self._directory / f"spool-{number}"
        spool.mkdir(mode=0o700)
        os.chown(spool, USER, USER)
        nothing = self._directory / "nothing"
        nothing.touch(mode=0o644)
        environment = FakeAws().environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports.aws}"}
        options = [
            *(word for key, value in environment.items() for word in ("--env", f"{key}={value}")),
            *("--volume", f"{self._config}:{CONFIG}:ro", "--volume", f"{spool}:{SPOOL}"),
            *("--volume", f"{nothing}:/usr/bin/dash:ro", "--volume", f"{nothing}:/usr/bin/bash:ro"),
        ]
        name = f"falco-forwarder-image-test-{os.getpid()}-{number}"
        made = Container(name, options, self.ports.admin, self._directory / f"forwarder-{number}.log")
        self.containers.append(made)
        return made

    def journal(self, kind: str) -> list[dict[str, Any]]:
        """What the fake has accepted, in order."""
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        return [line for line in map(json.loads, lines) if line["kind"] == kind]

    def end(self) -> None:
        for container in self.containers:
            container.remove()
        self.aws.kill()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    try:
        made.start_aws()
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def inside() -> dict[str, Any]:
    """What tests/image/probe.py finds in the image."""
    probe = Path(__file__).parent / "probe.py"
    done = once("/probe.py", options=["--entrypoint", PYTHON, "--volume", f"{probe}:/probe.py:ro"])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def numbers() -> Iterator[dict[str, Any]]:
    """What was measured, written to build/image.json in the end."""
    measured: dict[str, Any] = {}
    yield measured
    (ROOT / "build" / "image.json").write_text(json.dumps(measured, indent=2) + "\n")
    say(json.dumps(measured, indent=2))


def test_the_image_says_what_it_is() -> None:
    """User, entry point and labels; no health check, no volume that a container would get unasked."""
    found = inspect_image(IMAGE)
    config, labels = found["Config"], found["Config"]["Labels"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["/opt/falco-forwarder/bin/falco-forwarder"]
    assert config["Cmd"] == ["run"]
    assert set(config["ExposedPorts"]) == {"2801/tcp", "8080/tcp"}
    assert not found.get("Healthcheck")
    assert not config.get("Healthcheck")
    assert not config.get("Volumes")
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == __version__
    assert labels[f"{prefix}licenses"] == "Apache-2.0"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels[f"{prefix}revision"])
    assert re.match(r"20\d\d-\d\d-\d\dT", labels[f"{prefix}created"])
    assert re.fullmatch(rf"{BASE}@sha256:[0-9a-f]{{64}}", labels[f"{prefix}base.name"])


def test_nothing_in_it_can_be_changed(inside: dict[str, Any]) -> None:
    """By the user it runs as; and the working directory, which may be writable, is not where modules are looked for."""
    assert inside["user"] == [USER, USER, [USER]]
    assert inside["writable"] == []
    assert inside["loose"] == []
    assert SPOOL not in inside["path"]
    assert "" not in inside["path"]


def test_bytecode_is_there_and_pip_is_not(inside: dict[str, Any]) -> None:
    assert inside["without_bytecode"] == []
    assert inside["library_without_bytecode"] == []
    assert not inside["pip"]


def test_it_trusts_the_authorities_of_its_base(inside: dict[str, Any]) -> None:
    """The SDK brings its own; EC2, EKS and a receiver of heartbeats are asked without it."""
    assert inside["authorities"] > 50


def test_the_models_are_those_of_the_services_used(inside: dict[str, Any]) -> None:
    """A service that code asks for and the Dockerfile prunes would fail in production only."""
    assert set(inside["services"]) == _services_used()
    assert set(inside["clients"]) == _services_used()


def _services_used() -> set[str]:
    """Of the sinks and the identity, and what ``wanted_services`` returns anywhere."""
    used = {"sts", *(sink_class(name).service for name in SINKS)}
    for file in (ROOT / "forwarder").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "wanted_services":
                used |= {
                    element.elts[0].value
                    for element in ast.walk(node)
                    if isinstance(element, ast.Tuple)
                    and element.elts
                    and isinstance(element.elts[0], ast.Constant)
                    and isinstance(element.elts[0].value, str)
                }
    return used


def test_what_is_installed_is_what_was_locked(inside: dict[str, Any]) -> None:
    """And the bill of materials lists it, no more and no less."""
    installed = {_normal(name): version for name, version in inside["distributions"].items()}
    locked = {
        _normal(name): version
        for name, version in re.findall(
            r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements" / "runtime.txt").read_text(), re.MULTILINE
        )
    }
    own = {"falco-aws-forwarder": __version__}
    assert installed == {name: version for name, version in locked.items() if name in installed} | own
    assert set(locked) - set(installed) <= {"typing-extensions"}
    bill = json.loads((ROOT / "build" / "sbom.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    subject = bill["metadata"]["component"]
    parts = {_normal(part["name"]): part["version"] for part in bill["components"]}
    assert (subject["name"], subject["version"]) == ("falco-aws-forwarder", __version__)
    assert parts | own == installed
    assert all(part.get("licenses") for part in bill["components"]), "a component without a licence"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_without_a_configuration_it_says_what_is_missing() -> None:
    done = once()
    assert done.returncode == 2, done.stderr
    assert "in the configuration" in done.stderr


def test_without_a_spool_it_says_why_it_cannot_start(stage: Stage) -> None:
    """A root that is read only and no volume: the commonest mistake of an installation."""
    options = ["--env", "AWS_REGION=eu-west-1", "--volume", f"{stage._config}:{CONFIG}:ro"]
    done = once("run", "--config", CONFIG, options=options)
    assert done.returncode == 1, done.stderr
    assert "falco-forwarder: cannot start:" in done.stderr
    assert SPOOL in done.stderr


def test_the_main_job(stage: Stage, numbers: dict[str, Any]) -> None:
    """Read only, no capabilities, no shell, 256 MB: every alert of the demo arrives, and SIGTERM ends it with 0."""
    bodies = _sample()
    container = stage.container()
    container.start()
    pid = container.pid
    status = process_status(pid)
    assert status["Uid"].split() == [str(USER)] * 4
    assert status["Gid"].split() == [str(USER)] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert memory_limit(pid) == MEMORY_BYTES

    report = asyncio.run(replay(bodies, f"http://127.0.0.1:{stage.ports.receiver}/", senders=4))
    assert report.acknowledged == report.sent == len(bodies), report.refused
    wait_until(lambda: _delivered(stage), 60, lambda: f"all is delivered\n{container.text()}")

    sinks = json.loads(get(stage.ports.admin, "/status")[1])["sinks"]
    assert {name: sink["dead_letters"] for name, sink in sinks.items()} == dict.fromkeys(SINKS, 0)
    ids = [json.loads(event["message"])["id"] for event in stage.journal("event")]
    assert len(ids) == len(set(ids)) == len(bodies)
    findings = {item["Id"]: int(item["ProductFields"]["falco/count"]) for item in stage.journal("finding")}
    decoded = [alert.decode(body).alerts[0] for body in bodies]
    assert sum(findings.values()) == sum(
        item.rank <= MINIMUM_RANK and not item.internal for item in decoded
    ), findings
    numbers["memory_peak_kb"] = int(process_status(pid)["VmHWM"].split()[0])
    numbers["alerts"], numbers["findings"] = len(ids), len(findings)

    code, secs = container.terminate()
    assert code == 0, container.text()
    numbers["stop_secs"] = round(secs, 3)
    assert "Traceback" not in container.text()


def _sample() -> list[bytes]:
    text = resources.files("forwarder").joinpath("data/falco_alerts.ndjson").read_bytes()
    return [line for line in text.splitlines() if line]


def _delivered(stage: Stage) -> bool:
    code, body = get(stage.ports.admin, "/status")
    return code == 200 and not any(
        sink["pending"] + sink["aggregating"] for sink in json.loads(body)["sinks"].values()
    )


def test_size_and_start_are_measured(stage: Stage, inside: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Numbers for docs/image.md. The bounds are wide: they catch a whole SDK or a compiler, not a slow machine."""
    commands, processes = [], []
    for _ in range(STARTS):
        container = stage.container()
        commands.append(container.start())
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        processes.append(now - _started(container.pid))
        assert container.terminate()[0] == 0
    numbers |= {
        "python": inside["python"],
        "image_bytes": inspect_image(IMAGE)["Size"],
        "base_bytes": inspect_image(BASE)["Size"],
        "ours_bytes": inside["bytes"],
        "bytecode_bytes": inside["bytecode_bytes"],
        "botocore_data_bytes": inside["botocore_data_bytes"],
        "podman_run_to_ready_secs": [round(secs, 3) for secs in commands],
        "process_to_ready_secs": [round(secs, 3) for secs in processes],
        "process_to_ready_median_secs": round(statistics.median(processes), 3),
    }
    assert numbers["image_bytes"] - numbers["base_bytes"] < 60 << 20
    assert inside["botocore_data_bytes"] < 4 << 20


def _started(pid: int) -> float:
    """When a process began, in seconds since the machine did."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
