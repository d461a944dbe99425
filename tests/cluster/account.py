"""The forwarder's ServiceAccount in a test cluster: its rules, its tokens, and the files that lead a client there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.cluster.api import path_of
from tests.cluster.certificates import sign_token
from tests.cluster.harness import ISSUER, REPOSITORY, Cluster
from tests.crash.harness import wait_until

RULES = REPOSITORY / "helm" / "falco-aws-forwarder" / "files" / "cluster-role-rules.yaml"
TOKEN_LEEWAY_SECS = 60
"""The API server takes a token for one minute beyond its ``exp``."""
TOKEN_CACHE_SECS = 10
"""The API server remembers for this long that a token was good."""


class InCluster(NamedTuple):
    """What the product is configured with: as in a pod, or with a kubeconfig."""

    directory: Path
    """``ca.crt``, ``token`` and ``namespace``, as mounted into a pod."""
    kubeconfig: Path
    environment: dict[str, str]
    """How a pod is told of the API server."""


class ServiceAccount:
    """A ServiceAccount of the forwarder, with the rules of the chart."""

    def __init__(self, cluster: Cluster, namespace: str, name: str = "falco-aws-forwarder") -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name
        self.user = f"system:serviceaccount:{namespace}:{name}"
        self._role = f"{name}-{namespace}"
        account = cluster.admin.create("serviceaccounts", {"metadata": {"name": name}}, namespace)
        self.uid = str(account["metadata"]["uid"])
        metadata = {"metadata": {"name": self._role}}
        cluster.admin.create("clusterroles", metadata | {"rules": yaml.safe_load(RULES.read_text())})
        self.grant()

    def grant(self) -> None:
        """Give it the rules (it has them from the start); the server notices within moments."""
        subject = {"kind": "ServiceAccount", "name": self.name, "namespace": self.namespace}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": self._role}
        body = {"metadata": {"name": self._role}, "subjects": [subject], "roleRef": role}
        self.cluster.admin.create("clusterrolebindings", body)
        self._wait_allowed(True)

    def revoke(self) -> None:
        """Take the rules away; ``grant`` gives them back."""
        self.cluster.admin.delete("clusterrolebindings", self._role)
        self._wait_allowed(False)

    def remove(self) -> None:
        """Remove the role and its binding; the account itself goes with its namespace."""
        with contextlib.suppress(Exception):
            self.cluster.admin.delete("clusterrolebindings", self._role)
        self.cluster.admin.delete("clusterroles", self._role)

    def token(self, expiration_secs: int = 3600) -> str:
        """A bound token from the TokenRequest API, which gives none for less than 600 seconds."""
        path = path_of("serviceaccounts", self.namespace, self.name, "token")
        body = {"spec": {"expirationSeconds": expiration_secs}}
        return str(self.cluster.admin.call("POST", path, body)["status"]["token"])

    def short_token(self, secs: float) -> str:
        """A token the server takes for ``secs`` (plus TOKEN_CACHE_SECS where it is in use); 0 is an expired one.

        Signed here with the server's key: TokenRequest has a minimum of ten minutes.
        """
        now = time.time()
        return sign_token(
            self.cluster.certificates.token_key,
            {
                "iss": ISSUER,
                "aud": [ISSUER],
                "sub": self.user,
                "iat": int(now) - 3600,
                "nbf": int(now) - 3600,
                "exp": int(now + secs) - TOKEN_LEEWAY_SECS,
                "kubernetes.io": {
                    "namespace": self.namespace,
                    "serviceaccount": {"name": self.name, "uid": self.uid},
                },
            },
        )

    def write_in_cluster(self, directory: Path, token: str) -> InCluster:
        """Write, or renew, what a pod finds, and a kubeconfig; each file is replaced at once."""
        directory.mkdir(parents=True, exist_ok=True)
        authority = directory / "ca.crt"
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {"server": self.cluster.url, "certificate-authority": str(authority)},
                }
            ],
            "users": [{"name": "forwarder", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "forwarder"}}],
            "current-context": "test",
        }
        contents = {
            "ca.crt": self.cluster.certificates.authority.read_text(),
            "token": token,
            "namespace": self.namespace,
            "kubeconfig": yaml.safe_dump(kubeconfig),
        }
        for name, text in contents.items():
            fresh = directory / f".{name}"
            fresh.write_text(text)
            fresh.replace(directory / name)
        environment = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self.cluster.port),
        }
        return InCluster(directory, directory / "kubeconfig", environment)

    def _wait_allowed(self, allowed: bool) -> None:
        """Wait until the server's authorizer has seen a change of rules."""
        api = self.cluster.admin.as_user(self.token())
        with contextlib.closing(api):
            path = f"{path_of('pods')}?limit=1"
            wait_until(lambda: (api.request("GET", path).status == 200) is allowed, 10, lambda: f"{allowed=}")


@contextlib.contextmanager
def service_account(cluster: Cluster, namespace: str) -> Iterator[ServiceAccount]:
    """A ServiceAccount with our rules, whose role is removed in the end."""
    account = ServiceAccount(cluster, namespace)
    try:
        yield account
    finally:
        account.remove()
