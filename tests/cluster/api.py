"""REST calls of the Kubernetes API for tests: blocking, for any thread. Resources are named by their plural."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlencode

REQUEST_SECS_MAX = 60.0
MERGE_PATCH = "application/merge-patch+json"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
GROUPS = {
    "deployments": "apps/v1",
    "replicasets": "apps/v1",
    "jobs": "batch/v1",
    "cronjobs": "batch/v1",
    "clusterroles": "rbac.authorization.k8s.io/v1",
    "clusterrolebindings": "rbac.authorization.k8s.io/v1",
    "selfsubjectaccessreviews": "authorization.k8s.io/v1",
    "selfsubjectrulesreviews": "authorization.k8s.io/v1",
    "statefulsets": "apps/v1",
    "daemonsets": "apps/v1",
    "poddisruptionbudgets": "policy/v1",
    "endpointslices": "discovery.k8s.io/v1",
    "storageclasses": "storage.k8s.io/v1",
    "runtimeclasses": "node.k8s.io/v1",
    "customresourcedefinitions": "apiextensions.k8s.io/v1",
}
"""Group and version of what is not in the core group."""


def path_of(resource: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """Path of a collection, an object or a subresource of it."""
    group = GROUPS.get(resource)
    parts = [f"/apis/{group}" if group else "/api/v1"]
    if namespace:
        parts += ["namespaces", namespace]
    return "/".join([*parts, *(part for part in (resource, name, subresource) if part)])


class Answer(NamedTuple):
    """An answer of the API server, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.body)
        return value

    def lines(self) -> list[bytes]:
        """Events of a watch."""
        return self.body.splitlines()


class RefusedError(Exception):
    """The API server refused a call."""

    def __init__(self, call: str, answer: Answer) -> None:
        super().__init__(f"{call}: {answer.status} {answer.body.decode(errors='replace')}")
        self.status = answer.status
        self.body = answer.body


class Api:
    """The API server as one user sees it."""

    def __init__(self, port: int, authority: Path, token: str | None) -> None:
        """``token`` None is a request without credentials."""
        self.port = port
        self.token = token
        self._tls = ssl.create_default_context(cafile=str(authority))
        self._idle: list[http.client.HTTPSConnection] = []

    def as_user(self, token: str | None) -> Self:
        """The same server with other credentials. Connections are shared: each request brings its token."""
        other = copy.copy(self)
        other.token = token
        return other

    def close(self) -> None:
        """Close what is kept open between calls."""
        while self._idle:
            self._idle.pop().close()

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        accept: str = "application/json",
        content_type: str = "application/json",
    ) -> Answer:
        """Any request; a refusal is an answer too, only a server that does not answer raises ``OSError``.

        With ``watch=1&timeoutSeconds=N`` in the path the body is every event of N seconds.
        """
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": "cluster-tests"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        text = None if body is None else json.dumps(body)
        with contextlib.suppress(IndexError, http.client.RemoteDisconnected, BrokenPipeError):
            return self._exchange(self._idle.pop(), method, path, text, headers)
        # None was kept open, or the server has closed it since.
        fresh = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=REQUEST_SECS_MAX, context=self._tls
        )
        return self._exchange(fresh, method, path, text, headers)

    def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, **options: str
    ) -> dict[str, Any]:
        """A request that must succeed; ``options`` as in ``request``."""
        answer = self.request(method, path, body, **options)
        if answer.status >= 400:
            raise RefusedError(f"{method} {path}", answer)
        return answer.json()

    def _exchange(
        self,
        connection: http.client.HTTPSConnection,
        method: str,
        path: str,
        text: str | None,
        headers: Mapping[str, str],
    ) -> Answer:
        try:
            connection.request(method, path, text, headers)
            response = connection.getresponse()
            answer = Answer(response.status, dict(response.headers), response.read())
        except BaseException as error:
            connection.close()
            if isinstance(error, http.client.IncompleteRead):
                raise ConnectionError(f"{method} {path}: cut off: {error!r}") from error
            raise
        if response.will_close:
            connection.close()
        else:
            self._idle.append(connection)
        return answer

    def create(self, resource: str, body: Mapping[str, Any], namespace: str = "") -> dict[str, Any]:
        """Create an object; a ``status`` in the body is written with a second call, as the kubelet does."""
        made = self.call("POST", path_of(resource, namespace), body)
        if "status" in body and resource in {"pods", "nodes"}:
            return self.patch(
                resource, made["metadata"]["name"], {"status": body["status"]}, namespace, "status"
            )
        return made

    def get(self, resource: str, name: str, namespace: str = "") -> dict[str, Any]:
        return self.call("GET", path_of(resource, namespace, name))

    def list(self, resource: str, namespace: str = "", **parameters: str) -> dict[str, Any]:
        """A list; ``parameters`` such as ``limit``, ``resourceVersion``, ``fieldSelector``."""
        return self.call("GET", f"{path_of(resource, namespace)}?{urlencode(parameters)}")

    def update(
        self, resource: str, body: Mapping[str, Any], namespace: str = "", subresource: str = ""
    ) -> dict[str, Any]:
        """Replace an object (or its ``status``) with ``body``, which names it."""
        return self.call("PUT", path_of(resource, namespace, body["metadata"]["name"], subresource), body)

    def patch(
        self, resource: str, name: str, body: Mapping[str, Any], namespace: str = "", subresource: str = ""
    ) -> dict[str, Any]:
        """Merge ``body`` into an object; the status only changes with ``subresource="status"``."""
        path = path_of(resource, namespace, name, subresource)
        return self.call("PATCH", path, body, content_type=MERGE_PATCH)

    def delete(self, resource: str, name: str, namespace: str = "", *, grace_secs: int = 0) -> dict[str, Any]:
        """Delete an object at once; with a grace a pod on a node stays, marked, as there is no kubelet."""
        return self.call("DELETE", path_of(resource, namespace, name), {"gracePeriodSeconds": grace_secs})

    def delete_all(self, resource: str, namespace: str) -> None:
        """Delete every object of a kind in a namespace, at once."""
        self.call("DELETE", path_of(resource, namespace), {"gracePeriodSeconds": 0})

    def watch(
        self,
        resource: str,
        since: str,
        *,
        secs: int = 1,
        namespace: str = "",
        accept: str = "application/json",
    ) -> Answer:
        """Watch for some seconds from a resource version on, with bookmarks.

        A bookmark comes 2 s before the end, and only where something newer than the first events is known.
        """
        parameters = {
            "watch": "1",
            "resourceVersion": since,
            "timeoutSeconds": str(secs),
            "allowWatchBookmarks": "true",
        }
        return self.request("GET", f"{path_of(resource, namespace)}?{urlencode(parameters)}", accept=accept)
