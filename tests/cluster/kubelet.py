"""A stand-in for the kubelets of a cluster: every pod on their nodes becomes a real forwarder process on a loopback address.

Honest where a rolling restart depends on it: a pod is ready when ``/readyz`` of its process says so, probed as the pod asks for;
one that is deleted gets its preStop sleep, SIGTERM, what is left of its grace, and SIGKILL; its emptyDir goes with it, before the
API server hears that the pod is gone. What a stand-in cannot do is refused aloud, not left out: another kind of hook or probe, or
environment from elsewhere. There is one container, no image, no user of its own, no memory limit and no liveness probe: a
process that ends by itself is a failure of the test.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import yaml

from tests.cluster.api import RefusedError
from tests.cluster.control_plane import ControlPlane, Object
from tests.crash.harness import Program

SYNC_SECS = 0.1
"""How long the kubelet may not have heard of a change."""
POD_NETWORK, LOOPBACK = "10.246.0.", "127.0.2."
"""Pods have addresses of the first network, as a slice may not name a loopback address; their processes listen on the second."""


def loopback(address: str) -> str:
    """Where the process of a pod with this address listens."""
    assert address.startswith(POD_NETWORK), address
    return LOOPBACK + address.removeprefix(POD_NETWORK)


class Ended(NamedTuple):
    """How a pod went."""

    pod: str
    code: int
    secs: float
    """From its deletion to the end of its process."""
    killed: bool
    """The grace was over."""


class Life(threading.Thread):
    """One pod from its first sight to its last."""

    def __init__(
        self, plane: ControlPlane, pod: Object, address: str, directory: Path, environment: Mapping[str, str]
    ) -> None:
        super().__init__(daemon=True, name=str(pod["metadata"]["name"]))
        self._plane, self._pod = plane, pod
        self.address = address
        self._directory = directory
        self._spec: Object = pod["spec"]
        (self._container,) = self._spec["containers"]
        assert not self._spec.get("initContainers"), "no stand-in for init containers"
        self._started_at = stamp()
        self._going = threading.Event()
        self._grace_until = 0.0
        self.deleted_at = 0.0
        self.spool = directory / "spool"
        self.fault: Exception | None = None
        self.ended: Ended | None = None
        self.program = Program(self._command(), dict(environment) | self._environment(), directory / "log")

    @property
    def settings(self) -> Object:
        """The pod's own configuration."""
        loaded: Object = yaml.safe_load((self._directory / "forwarder.yaml").read_text())
        return loaded

    def delete(self, grace_secs: float) -> None:
        """The API server says that it shall go."""
        if not self._going.is_set():
            self.deleted_at = time.monotonic()
            self._grace_until = self.deleted_at + grace_secs
            self._going.set()

    def run(self) -> None:
        try:
            self._live()
        except Exception as error:  # noqa: BLE001 - told by Kubelet.check, in the test's own thread
            self.fault = error
        finally:
            self.program.kill()

    def _live(self) -> None:
        self.spool.mkdir()
        self.program.spawn()
        self._tell(ready=False)
        if self._begin():
            self._probe_until_going()
        self._end()

    def _begin(self) -> bool:
        """Wait for the startup probe; False where the pod is deleted before."""
        probe = self._container["startupProbe"]
        for _ in range(probe["failureThreshold"]):
            if self._going.wait(probe["periodSeconds"]):
                return False
            if self._ask(probe):
                return True
        raise AssertionError(f"startup probe failed\n{self.program.tail()}")

    def _probe_until_going(self) -> None:
        """Ready by the readiness probe; not ready after as many failures as the pod allows."""
        probe = self._container["readinessProbe"]
        ready, failures = False, 0
        while True:
            assert self.program.running, f"{self.name} ended by itself\n{self.program.tail()}"
            answered = self._ask(probe)
            failures = 0 if answered else failures + 1
            if answered != ready and (answered or failures >= probe["failureThreshold"]):
                ready = answered
                self._tell(ready=ready)
            if self._going.wait(probe["periodSeconds"]):
                return

    def _end(self) -> None:
        """preStop, SIGTERM, the rest of the grace, SIGKILL; then the emptyDir goes, then the pod."""
        pre_stop = (self._container.get("lifecycle") or {}).get("preStop") or {"sleep": {"seconds": 0}}
        process = self.program.process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(pre_stop["sleep"]["seconds"], max(0.0, self._grace_until - time.monotonic())))
        assert self.program.running, f"{self.name} ended before SIGTERM\n{self.program.tail()}"
        process.send_signal(signal.SIGTERM)
        killed = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(2.0, self._grace_until - time.monotonic()))  # the kubelet leaves 2 s in any case
        if self.program.running:
            killed = True
            self.program.kill()
        ended = Ended(self.name, process.wait(), time.monotonic() - self.deleted_at, killed)
        shutil.rmtree(self.spool)
        self._plane.admin.delete("pods", self.name, self._pod["metadata"]["namespace"])
        self.ended = ended

    def _ask(self, probe: Object) -> bool:
        assert probe["httpGet"].get("scheme", "HTTP") == "HTTP", "no stand-in for probes with TLS"
        return (
            200
            <= self.get(probe["httpGet"]["path"], probe["httpGet"]["port"], probe["timeoutSeconds"])[0]
            < 400
        )

    def get(self, path: str, port: str = "admin", secs: float = 10.0) -> tuple[int, bytes]:
        """Ask the process; status 0 where it does not answer."""
        number = next(it["containerPort"] for it in self._container["ports"] if it["name"] == port)
        caller = http.client.HTTPConnection(loopback(self.address), number, timeout=secs)
        try:
            caller.request("GET", path)
            response = caller.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            caller.close()

    def _tell(self, *, ready: bool) -> None:
        """The pod's status. Conditions of others (the scheduler's) stay."""
        now, metadata = stamp(), self._pod["metadata"]
        ours = {
            "PodReadyToStartContainers": True,
            "Initialized": True,
            "ContainersReady": ready,
            "Ready": ready,
        }
        others = [it for it in self._pod["status"].get("conditions", ()) if it["type"] not in ours]
        status = {
            "phase": "Running",
            "startTime": self._started_at,
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "conditions": [
                *others,
                *(
                    {"type": it, "status": str(value), "lastTransitionTime": now}
                    for it, value in ours.items()
                ),
            ],
            "containerStatuses": [
                {
                    "name": self._container["name"],
                    "image": self._container["image"],
                    "imageID": "",
                    "ready": ready,
                    "started": True,
                    "restartCount": 0,
                    "state": {"running": {"startedAt": self._started_at}},
                }
            ],
        }
        with contextlib.suppress(RefusedError):  # deleted meanwhile by somebody who gave it no grace
            self._plane.admin.patch("pods", self.name, {"status": status}, metadata["namespace"], "status")

    def _command(self) -> list[str]:
        """The container's arguments, with its configuration file out of the ConfigMap as it stands now."""
        arguments = [str(it) for it in self._container["args"]]
        path = Path(arguments[arguments.index("--config") + 1])
        mount = next(it for it in self._container["volumeMounts"] if it["mountPath"] == str(path.parent))
        volume = next(it for it in self._spec["volumes"] if it["name"] == mount["name"])
        source = self._plane.admin.get(
            "configmaps", volume["configMap"]["name"], self._pod["metadata"]["namespace"]
        )
        self._directory.mkdir()
        file = self._directory / path.name
        file.write_text(source["data"][path.name])
        return ["forwarder", *(str(file) if it == str(path) else it for it in arguments)]

    def _environment(self) -> dict[str, str]:
        """The container's own, and what puts the process on its address and its spool into the pod's emptyDir."""
        assert not self._container.get("envFrom"), "no stand-in for envFrom"
        found = {it["name"]: self._value(it) for it in self._container.get("env", ())}
        mounts = {it["mountPath"]: it["name"] for it in self._container["volumeMounts"]}
        volumes = {it["name"]: it for it in self._spec["volumes"]}
        assert "emptyDir" in volumes[mounts[self.settings["spool"]["directory"]]], (
            "the spool is in no emptyDir"
        )
        return found | {
            "FORWARDER__RECEIVER__HOST": loopback(self.address),
            "FORWARDER__ADMIN__HOST": loopback(self.address),
            "FORWARDER__SPOOL__DIRECTORY": str(self.spool),
        }

    def _value(self, variable: Object) -> str:
        source = variable.get("valueFrom")
        if source is None:
            return str(variable.get("value", ""))
        values = {
            "metadata.name": self.name,
            "metadata.namespace": self._pod["metadata"]["namespace"],
            "metadata.uid": self._pod["metadata"]["uid"],
            "spec.nodeName": self._spec["nodeName"],
            "status.podIP": self.address,
        }
        path = source.get("fieldRef", {}).get("fieldPath")
        assert path in values, f"no stand-in for {variable}"
        return str(values[path])


class Kubelet:
    """Looks after the pods of one namespace on the nodes it is given."""

    def __init__(
        self,
        plane: ControlPlane,
        namespace: str,
        nodes: list[str],
        directory: Path,
        environment: Mapping[str, str],
    ) -> None:
        """``environment`` is what leads a forwarder to its AWS."""
        self._plane, self._namespace, self._nodes = plane, namespace, frozenset(nodes)
        self._directory, self._environment = directory, environment
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="kubelet")
        self._fault: Exception | None = None
        self.lives: dict[str, Life] = {}
        """By uid, in the order they came; also those that have ended."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(30.0)
        for life in self.lives.values():
            life.program.kill()

    @property
    def present(self) -> list[Life]:
        """Those that have not ended."""
        return [it for it in self.lives.values() if it.ended is None]

    def check(self) -> None:
        """Fail with the first thing that went wrong."""
        for fault in (self._fault, *(it.fault for it in self.lives.values())):
            if fault is not None:
                raise fault

    def _run(self) -> None:
        try:
            while not self._stop.wait(SYNC_SECS):
                self._sync()
        except Exception as error:  # noqa: BLE001 - told by ``check``, in the test's own thread
            self._fault = error

    def _sync(self) -> None:
        for pod in self._plane.admin.list("pods", self._namespace)["items"]:
            metadata = pod["metadata"]
            life = self.lives.get(metadata["uid"])
            if (
                life is None
                and pod["spec"].get("nodeName") in self._nodes
                and "deletionTimestamp" not in metadata
            ):
                number = len(self.lives) + 1
                directory = self._directory / f"{metadata['name']}-{number}"
                life = Life(self._plane, pod, f"{POD_NETWORK}{number}", directory, self._environment)
                self.lives[metadata["uid"]] = life
                life.start()
            elif life is not None and "deletionTimestamp" in metadata:
                life.delete(metadata["deletionGracePeriodSeconds"])


def stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def alive_node() -> dict[str, Any]:
    """Status of a node that takes pods."""
    room = {"cpu": "4", "memory": "16Gi", "pods": "110"}
    return {
        "conditions": [{"type": "Ready", "status": "True", "reason": "test", "lastTransitionTime": stamp()}],
        "capacity": room,
        "allocatable": room,
    }
