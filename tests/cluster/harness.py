"""A real kube-apiserver and its etcd on 127.0.0.1, for tests of the list/watch. Blocking: from a coroutine, use a thread.

There are no controllers and no kubelet: nothing creates the pods of a ReplicaSet, a pod on a node that is deleted with
a grace stays, and a namespace goes only because ``drop_namespace`` finalizes it. Everything is ended by its own handle.

How to provoke a 410 (measured with Kubernetes 1.36, ``test_harness.py`` holds us to it):

- For a watch from an old resource version, as an ERROR event in a 200 answer: ``restart()`` after a change of anything.
  The watch cache of the new process begins at the revision it listed at; all that is older is 410, compacted or not.
  ``compact()`` alone never does it: the watch cache still has the events and does not ask etcd.
- For a continue token, as the status: ``compact()`` after a change. The server answers from snapshots of its cache
  until it has noticed, which it looks for every 15 s (COMPACTION_SECS_MAX); or ``compact()`` and ``restart()``.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.cluster.api import Api, path_of
from tests.cluster.certificates import make_certificates
from tests.crash.harness import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / ".tools" / "bin"
START_SECS_MAX, STOP_SECS_MAX = 60.0, 30.0
ISSUER = "https://kubernetes.default.svc"
ADMIN_TOKEN, ADMIN_LINE = "admin-of-the-test", 'admin-of-the-test,admin,admin,"system:masters"\n'
COMPACTION_SECS_MAX = 20
"""The API server notices a compaction within this time."""
LOG_LINES = 25

AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
"""


class Call(NamedTuple):
    """A request as the API server's audit log tells it. A running watch has its code already."""

    user: str
    """Empty where the token was refused."""
    verb: str
    resource: str
    code: int
    uri: str
    user_agent: str


def free_ports(count: int) -> list[int]:
    """Free ports of 127.0.0.1 below the ephemeral ones, so that a restarted server finds its port free."""
    found: set[int] = set()
    candidates = random.SystemRandom()
    while len(found) < count:
        port = candidates.randrange(18_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def tool(name: str) -> Path:
    """A program that ``make cluster-tools`` builds."""
    program = TOOLS / name
    if not program.is_file():
        raise FileNotFoundError(f"{program.relative_to(REPOSITORY)} is missing: run `make cluster-tools`")
    return program


class Server:
    """A process that can be started again and again, and what it wrote."""

    def __init__(self, command: list[str], output: Path) -> None:
        self._command = command
        self._environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("ETCD_", "KUBE"))
        }
        self.output = output
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def spawn(self) -> None:
        assert not self.running, "already running"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, cwd=self.output.parent, env=self._environment, stdout=output, stderr=output
            )

    def stop(self, *, kill: bool = False) -> None:
        """End it with SIGTERM, or with SIGKILL at once (also where SIGTERM does not help in time)."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            self.process.wait(STOP_SECS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_SECS_MAX)
        self.process = None

    def tail(self) -> str:
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        lines = [line[:400] for line in text.splitlines()[-LOG_LINES:]]
        return "\n".join([f"--- {self.output.name} ---", *lines])


class Cluster:
    """etcd and kube-apiserver; ``admin`` may do everything."""

    def __init__(self, directory: Path) -> None:
        """``directory`` takes data, certificates and logs; it should be new."""
        self.directory = directory.resolve()
        self.certificates = make_certificates(self.directory)
        self.audit_log = self.directory / "audit.log"
        self.etcd_port, peer_port, self.port = free_ports(3)
        self.url = f"https://127.0.0.1:{self.port}"
        self.admin = Api(self.port, self.certificates.authority, ADMIN_TOKEN)
        self.etcd = Server(self._etcd_command(peer_port), self.directory / "etcd.log")
        self.apiserver = Server(self._apiserver_command(), self.directory / "kube-apiserver.log")

    def __enter__(self) -> Self:
        try:
            self.etcd.spawn()
            self._wait(self._etcd_healthy, self.etcd)
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End both; they have nothing to save."""
        self.stop(kill=True)  # closes the connections of all users
        self.etcd.stop(kill=True)

    def start(self) -> float:
        """Start the API server (etcd runs already) and wait until ready; returns how long that took."""
        started = time.monotonic()
        self.apiserver.spawn()
        self._wait(self._ready, self.apiserver)
        return time.monotonic() - started

    def stop(self, *, kill: bool = False) -> float:
        """Stop the API server alone; returns how long that took. Its port stays its own."""
        started = time.monotonic()
        self.admin.close()
        self.apiserver.stop(kill=kill)
        return time.monotonic() - started

    def restart(self, *, kill: bool = False) -> None:
        """Stop and start the API server: its watch cache begins anew, at the current revision."""
        self.stop(kill=kill)
        self.start()

    def compact(self) -> int:
        """Compact etcd at its current revision, which is returned, as another API server would (etcd3/compact.go).

        Without the key that tells of it, this server would answer old continue tokens from its cache for ever.
        """
        key = base64.b64encode(b"compact_rev_key").decode()
        revision = int(self._etcd("/v3/kv/range", {"key": key})["header"]["revision"])
        value = base64.b64encode(str(revision).encode()).decode()
        self._etcd("/v3/kv/put", {"key": key, "value": value})
        self._etcd("/v3/kv/compaction", {"revision": str(revision), "physical": True})
        return revision

    def calls(self, user: str | None = None) -> list[Call]:
        """Requests from the audit log in the order they came, of one user or of all (the server's own too)."""
        found: dict[str, Call] = {}
        text = self.audit_log.read_text() if self.audit_log.exists() else ""
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # being written
            event = json.loads(line)
            name = event["user"].get("username", "")
            if user is None or name == user:
                target = event.get("objectRef", {})
                found[event["auditID"]] = Call(
                    name,
                    event["verb"],
                    "/".join(filter(None, (target.get("resource", ""), target.get("subresource", "")))),
                    event.get("responseStatus", {}).get("code", 0),
                    event["requestURI"],
                    event.get("userAgent", ""),
                )
        return list(found.values())

    def make_namespace(self, name: str) -> str:
        self.admin.create("namespaces", {"metadata": {"name": name}})
        return name

    def drop_namespace(self, name: str) -> None:
        """Delete a namespace with its pods, replica sets, jobs and service accounts: nobody else would."""
        for resource in ("pods", "replicasets", "jobs", "serviceaccounts"):
            self.admin.delete_all(resource, name)
        self.admin.delete("namespaces", name)
        body = {"metadata": {"name": name}, "spec": {"finalizers": []}}
        self.admin.call("PUT", path_of("namespaces", "", name, "finalize"), body)

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self.admin.request("GET", "/readyz").status == 200
        return False

    def _wait(self, condition: Callable[[], bool], server: Server) -> None:
        def up() -> bool:
            assert server.running, f"ended while starting\n{server.tail()}"
            return condition()

        wait_until(up, START_SECS_MAX, lambda: f"it answers\n{self.etcd.tail()}\n{self.apiserver.tail()}")

    def _etcd_healthy(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self._etcd("/v3/maintenance/status", {}).get("leader", "0") != "0")
        return False

    def _etcd(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A call of etcd's JSON gateway."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.etcd_port, timeout=30)
        ) as caller:
            caller.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = caller.getresponse()
            text = response.read()
        if response.status != 200:
            raise ConnectionError(f"etcd {path}: {response.status} {text!r}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _etcd_command(self, peer_port: int) -> list[str]:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self.etcd_port, peer_port))
        return [
            str(tool("etcd")),
            "--name=test",
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=test={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def _apiserver_command(self) -> list[str]:
        tokens, policy = self.directory / "tokens.csv", self.directory / "audit-policy.yaml"
        tokens.write_text(ADMIN_LINE)
        policy.write_text(AUDIT_POLICY)
        certificates = self.certificates
        return [
            str(tool("kube-apiserver")),
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            "--etcd-compaction-interval=24h",  # with 0 it would not watch for compactions at all
            "--shutdown-watch-termination-grace-period=1s",  # or SIGTERM waits a minute for open watches
            "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=10.0.0.0/24",
            f"--cert-dir={self.directory}",
            f"--tls-cert-file={certificates.server}",
            f"--tls-private-key-file={certificates.server_key}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            f"--service-account-issuer={ISSUER}",
            f"--api-audiences={ISSUER}",
            f"--service-account-signing-key-file={certificates.token_key}",
            f"--service-account-key-file={certificates.token_public_key}",
            "--disable-admission-plugins=ServiceAccount",
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.audit_log}",
            "--audit-log-mode=blocking",
            "--audit-log-maxsize=0",
            "--event-ttl=10m",
        ]
