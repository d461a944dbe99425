"""A whole control plane on 127.0.0.1: etcd, API server, controller-manager and scheduler; and kwok, where nodes shall act.

Unlike ``harness.Cluster`` alone it does what a cluster does by itself: it makes pods for a StatefulSet, schedules them, keeps
EndpointSlices and disruption budgets, binds volumes, and takes a namespace down with all that is in it. Admission is the API
server's own, Pod Security and ServiceAccount included. There is no kubelet: kwok's pods are ready because kwok says so, and go the
moment they are deleted. ``kubelet.Kubelet`` is the honest one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import yaml

from tests.cluster.api import RefusedError, path_of
from tests.cluster.harness import ADMIN_TOKEN, Cluster, Server, tool
from tests.crash.harness import wait_until

Object = dict[str, Any]

KWOK_ANNOTATION = "kwok.x-k8s.io/node"
STAGES = Path(__file__).parent / "kwok.yaml"
POD_SECURITY = "pod-security.kubernetes.io/enforce"
SETTLE_SECS_MAX = 60.0
NODE_MONITOR_SECS = 3600
"""For so long a node counts as alive without a word of its own: nobody renews the lease of a node that kwok does not keep."""


class ControlPlane(Cluster):
    """``Cluster`` with its controllers, scheduler and kwok."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.kubeconfig = self.directory / "admin.kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self._kubeconfig()))
        commands = {
            "kube-controller-manager": self._controllers_command(),
            "kube-scheduler": self._client_command("kube-scheduler"),
            "kwok": self._kwok_command(),
        }
        self.servers = [Server(command, self.directory / f"{it}.log") for it, command in commands.items()]
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            for server in self.servers:
                server.spawn()
            self.until(lambda: self._has_account("default"), "the controllers work")
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        for server in self.servers:
            server.stop(kill=True)
        super().close()

    def until(self, condition: Any, what: str | Callable[[], str], secs: float = SETTLE_SECS_MAX) -> float:
        """Wait for something the control plane has to bring about; fails at once where a part of it has ended."""

        def met() -> bool:
            for server in self.servers:
                assert server.running, f"ended\n{server.tail()}"
            return bool(condition())

        def report() -> str:
            return "\n".join([what if isinstance(what, str) else what(), *(it.tail() for it in self.servers)])

        return wait_until(met, secs, report)

    @contextlib.contextmanager
    def place(self, level: str = "restricted") -> Iterator[str]:
        """A namespace in which Pod Security admission enforces ``level``; it goes, with all it has, after the test."""
        name = f"{level}-{next(self._numbers)}"
        try:
            self.make_place(name, level)
            yield name
        finally:
            self.drop_place(name)

    def make_place(self, name: str, level: str) -> None:
        metadata = {"name": name, "labels": {POD_SECURITY: level, f"{POD_SECURITY}-version": "latest"}}
        self.admin.create("namespaces", {"metadata": metadata})
        self.until(lambda: self._has_account(name), "the namespace has its default account")

    def drop_place(self, name: str) -> None:
        """Begin to remove a namespace; its controller takes 5 to 10 seconds for that."""
        self.admin.call("DELETE", path_of("namespaces", "", name))

    def gone(self, name: str) -> None:
        """Wait until a namespace is removed."""
        self.until(lambda: not self.exists("namespaces", name), f"namespace {name} is gone")

    def exists(self, resource: str, name: str, namespace: str = "") -> bool:
        return self.admin.request("GET", path_of(resource, namespace, name)).status == 200

    def pods(self, namespace: str) -> list[Object]:
        """Pods by name, without those that are going."""
        found: list[Object] = self.admin.list("pods", namespace)["items"]
        here = [it for it in found if "deletionTimestamp" not in it["metadata"]]
        return sorted(here, key=lambda it: str(it["metadata"]["name"]))

    @contextlib.contextmanager
    def nodes(
        self, count: int, *, annotations: dict[str, str] | None = None, **status: Any
    ) -> Iterator[list[str]]:
        """Nodes, each in a zone of its own, that go in the end. kwok keeps them, unless other annotations are given."""
        kept = {KWOK_ANNOTATION: "fake"} if annotations is None else annotations
        names = [f"node-{next(self._numbers)}" for _ in range(count)]
        with contextlib.ExitStack() as made:
            made.callback(self._without, names)
            for index, name in enumerate(names):
                self.admin.create("nodes", _node(name, index, kept, status))
                made.callback(self.admin.call, "DELETE", path_of("nodes", "", name))
            self.until(
                lambda: all(self._usable(name) for name in names), "the nodes are ready and free of taints"
            )
            yield names

    def _without(self, names: list[str]) -> None:
        self.until(lambda: not any(self.exists("nodes", it) for it in names), "the nodes are gone")

    def _usable(self, name: str) -> bool:
        node = self.admin.get("nodes", name)
        conditions = {it["type"]: it["status"] for it in node.get("status", {}).get("conditions", ())}
        return conditions.get("Ready") == "True" and not node["spec"].get("taints")

    def _has_account(self, namespace: str) -> bool:
        with contextlib.suppress(RefusedError):
            return self.exists("serviceaccounts", "default", namespace) and self.exists(
                "configmaps", "kube-root-ca.crt", namespace
            )
        return False

    def _kubeconfig(self) -> Object:
        server = {"server": self.url, "certificate-authority": str(self.certificates.authority)}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": "admin", "user": {"token": ADMIN_TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }

    def _client_command(self, name: str) -> list[str]:
        """A client of the API server that serves nobody."""
        return [
            str(tool(name)),
            f"--kubeconfig={self.kubeconfig}",
            "--leader-elect=false",
            "--secure-port=0",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
        ]

    def _controllers_command(self) -> list[str]:
        return [
            *self._client_command("kube-controller-manager"),
            f"--service-account-private-key-file={self.certificates.token_key}",
            f"--root-ca-file={self.certificates.authority}",
            f"--node-monitor-grace-period={NODE_MONITOR_SECS}s",
        ]

    def _kwok_command(self) -> list[str]:
        return [
            str(tool("kwok")),
            f"--config={STAGES}",
            "--v=WARN",
            f"--kubeconfig={self.kubeconfig}",
            f"--manage-nodes-with-annotation-selector={KWOK_ANNOTATION}=fake",
            "--cidr=10.245.0.0/16",
            "--node-ip=10.245.255.1",
        ]

    def _apiserver_command(self) -> list[str]:
        """As in ``Cluster``, but accounts are asked for, as their controller is here; and Services of both IP families are had."""
        changed = ("--disable-admission-plugins", "--service-cluster-ip-range")
        command = [it for it in super()._apiserver_command() if not it.startswith(changed)]
        return [*command, "--service-cluster-ip-range=10.0.0.0/24,fd00:1::/112"]


def _node(name: str, index: int, annotations: dict[str, str], status: Object) -> Object:
    """In the zone of its index."""
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "topology.kubernetes.io/zone": f"zone-{'abc'[index % 3]}",
    }
    body: Object = {"metadata": {"name": name, "labels": labels, "annotations": annotations}}
    return body | ({"status": status} if status else {})
