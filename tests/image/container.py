"""Containers of the image under test, held as Kubernetes would hold them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.crash.harness import POLL_SECS, get

IMAGE = "localhost/falco-aws-forwarder:test"
BASE = "localhost/falco-forwarder-test-base"
SPOOL = "/var/lib/falco-forwarder"
CONFIG = "/etc/falco-forwarder/config.yaml"
PYTHON = "/opt/falco-forwarder/bin/python"
MEMORY_BYTES = 256 << 20
START_SECS_MAX, STOP_SECS_MAX = 60.0, 60.0
RUN = (
    *("podman", "--runtime", "/usr/sbin/runc", "run", "--pull", "never", "--network", "host"),
    # Without CAP_SYS_RESOURCE the runtime may not raise limits, and podman would ask it to.
    *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"),
    # As in a pod: podman's own habit is a writable /tmp and /run in a root that is read only.
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--memory", str(MEMORY_BYTES)),
)


def podman(*arguments: str) -> str:
    """What it prints; fails the test where it fails."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def inspect_image(name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(podman("image", "inspect", name))
    return found[0]


def once(*arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """A container that ends by itself."""
    return subprocess.run(
        [*RUN, "--rm", *options, IMAGE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=START_SECS_MAX,
    )


class Container:
    """The service in a container, by the image's own user and entry point."""

    def __init__(self, name: str, options: Sequence[str], admin_port: int, output: Path) -> None:
        self.name = name
        self._options = options
        self._admin_port = admin_port
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start and wait until ready; returns the seconds from ``podman run`` on."""
        started = time.monotonic()
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [*RUN, "--rm", "--name", self.name, *self._options, IMAGE, "run", "--config", CONFIG],
                stdout=output,
                stderr=output,
            )
        while get(self._admin_port, "/readyz")[0] != 200:
            assert self._process.poll() is None, f"ended while starting\n{self.text()}"
            assert time.monotonic() - started < START_SECS_MAX, f"not ready\n{self.text()}"
            time.sleep(POLL_SECS / 4)
        return time.monotonic() - started

    @property
    def pid(self) -> int:
        return int(podman("inspect", "--format", "{{.State.Pid}}", self.name))

    def terminate(self) -> tuple[int, float]:
        """SIGTERM as the kubelet sends it; returns the exit code and how long it took."""
        assert self._process is not None
        started = time.monotonic()
        podman("kill", "--signal", "TERM", self.name)
        code = self._process.wait(STOP_SECS_MAX)
        return code, time.monotonic() - started

    def remove(self) -> None:
        """End it, however the test ended."""
        if self._process is not None and self._process.poll() is None:
            podman("rm", "--force", "--time", "0", self.name)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECS_MAX)

    def text(self) -> str:
        return self._output.read_text(errors="replace")


def process_status(pid: int) -> dict[str, str]:
    """``/proc/PID/status``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def memory_limit(pid: int) -> int:
    """What its control group allows, of whichever version."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for file in (
            Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"),
            Path(f"/sys/fs/cgroup{path}/memory.max"),
        ):
            if (
                controllers in {"memory", ""}
                and file.exists()
                and (text := file.read_text().strip()) != "max"
            ):
                return int(text)
    raise AssertionError(f"no memory limit is set for process {pid}")
