"""What the parts of the fake Kubernetes share: its resources, its Status errors, its JSON, and `Accept`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

_TEMPLATE_ZERO: Final = '{"metadata":{"creationTimestamp":null},"spec":{"containers":null}}'
_NODE_INFO_ZERO: Final = ",".join(
    f'"{name}":""'
    for name in (
        "machineID",
        "systemUUID",
        "bootID",
        "kernelVersion",
        "osImage",
        "containerRuntimeVersion",
        "kubeletVersion",
        "kubeProxyVersion",
        "operatingSystem",
        "architecture",
    )
)


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource the server has; `zero` is what Go writes after the metadata of an empty object."""

    plural: str
    kind: str
    group: str = ""
    namespaced: bool = True
    fields: tuple[str, ...] = ()
    zero: str = ""

    @property
    def api_version(self) -> str:
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def selectable(self) -> tuple[str, ...]:
        """The fields a fieldSelector may name."""
        return ("metadata.name", "metadata.namespace") if self.namespaced else ("metadata.name",)


RESOURCES: Final = {
    resource.plural: resource
    for resource in (
        Resource(
            "pods",
            "Pod",
            fields=(
                "spec.nodeName",
                "spec.restartPolicy",
                "spec.schedulerName",
                "spec.serviceAccountName",
                "status.phase",
                "status.podIP",
                "status.nominatedNodeName",
            ),
            zero=',"spec":{"containers":null},"status":{}',
        ),
        Resource(
            "nodes",
            "Node",
            namespaced=False,
            zero=(
                ',"spec":{},"status":{"daemonEndpoints":{"kubeletEndpoint":{"Port":0}},'
                f'"nodeInfo":{{{_NODE_INFO_ZERO}}}}}'
            ),
        ),
        Resource(
            "namespaces",
            "Namespace",
            namespaced=False,
            fields=("status.phase",),
            zero=',"spec":{},"status":{}',
        ),
        Resource("configmaps", "ConfigMap"),
        Resource(
            "replicasets",
            "ReplicaSet",
            group="apps",
            fields=("status.replicas",),
            zero=f',"spec":{{"selector":null,"template":{_TEMPLATE_ZERO}}},"status":{{"replicas":0}}',
        ),
        Resource(
            "jobs",
            "Job",
            group="batch",
            fields=("status.successful",),
            zero=f',"spec":{{"template":{_TEMPLATE_ZERO}}},"status":{{}}',
        ),
    )
}
GROUPS: Final = frozenset(("", "apps", "batch", "authorization.k8s.io"))

CONTINUE_EXPIRED: Final = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new "
    "list without the continue parameter, or use the continue token in this response to retrieve the "
    "remainder of the results. Continuing with the provided token results in an inconsistent list - objects "
    "that were created, modified, or deleted between the time the first chunk was returned and now may show "
    "up in the list."
)


def go_json(value: Any) -> bytes:
    """JSON as Go's encoder writes it: compact, UTF-8, and with < > & escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode()


class KubeError(Exception):
    """A refusal: an HTTP status with a Status object, or with plain text where the real server has that."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        plain: bool = False,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message
        self.metadata = metadata or {}
        self.plain = plain
        self.details = dict(details) if details is not None else None
        self.retry_after = retry_after
        if retry_after is not None and not plain:
            self.details = {**(self.details or {}), "retryAfterSeconds": retry_after}

    def status(self) -> dict[str, Any]:
        """The Status object, keys in Go's order."""
        status: dict[str, Any] = {"kind": "Status", "apiVersion": "v1", "metadata": self.metadata}
        status |= {"status": "Failure", "message": self.message}
        if self.reason:
            status["reason"] = self.reason
        if self.details is not None:
            status["details"] = self.details
        status["code"] = self.code
        return status


def bad_request(message: str) -> KubeError:
    return KubeError(400, "BadRequest", message)


def invalid_options(field: str, problem: str) -> KubeError:
    """The refusal of list options that contradict each other."""
    return KubeError(
        422,
        "Invalid",
        f'ListOptions.meta.k8s.io "" is invalid: {field}: {problem}',
        details={
            "group": "meta.k8s.io",
            "kind": "ListOptions",
            "causes": [
                {
                    "reason": "FieldValueForbidden"
                    if problem.startswith("Forbidden")
                    else "FieldValueNotSupported",
                    "message": problem,
                    "field": field,
                }
            ],
        },
    )


def expired(message: str, *, metadata: dict[str, Any] | None = None) -> KubeError:
    return KubeError(410, "Expired", message, metadata=metadata)


def too_large(wanted: int, current: int) -> KubeError:
    return KubeError(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {wanted}, current: {current}",
        details={
            "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        },
        retry_after=1,
    )


def no_such_route() -> KubeError:
    return KubeError(404, "NotFound", "the server could not find the requested resource", details={})


def no_such_method() -> KubeError:
    message = "the server does not allow this method on the requested resource"
    return KubeError(405, "MethodNotAllowed", message, details={})


def qualified(group: str, plural: str) -> str:
    return f"{plural}.{group}" if group else plural


def details_of(group: str, plural: str, name: str = "") -> dict[str, Any]:
    details = {"name": name} if name else {}
    if group:
        details["group"] = group
    return {**details, "kind": plural} if plural else details


def not_found(resource: Resource, name: str) -> KubeError:
    return KubeError(
        404,
        "NotFound",
        f'{qualified(resource.group, resource.plural)} "{name}" not found',
        details=details_of(resource.group, resource.plural, name),
    )


@dataclass(frozen=True, slots=True)
class View:
    """In which shape the client wants objects; without `kind` the full ones."""

    kind: str = ""
    version: str = ""

    @property
    def partial(self) -> bool:
        return bool(self.kind)

    @property
    def api_version(self) -> str:
        return f"meta.k8s.io/{self.version}"


def negotiate(accept: str | None) -> View:
    """The first shape in `Accept`, by quality, that the server can give; else 406."""
    clauses: list[tuple[float, str, dict[str, str]]] = []
    for clause in (accept or "*/*").split(","):
        media_type, *pairs = (part.strip() for part in clause.split(";"))
        params = {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs)}
        try:
            quality = float(params.pop("q", "1"))
        except ValueError:
            quality = 1.0
        clauses.append((quality, media_type, params))
    for _, media_type, params in sorted(clauses, key=lambda item: -item[0]):
        if media_type not in ("application/json", "application/*", "*/*"):
            continue
        kind, group, version = (params.get(name, "") for name in ("as", "g", "v"))
        if not (kind or group or version):
            return View()
        if (
            kind in ("PartialObjectMetadata", "PartialObjectMetadataList")
            and group == "meta.k8s.io"
            and version in ("v1", "v1beta1")
        ):
            return View(kind, version)
    raise KubeError(
        406,
        "NotAcceptable",
        "only the following media types are accepted: "
        "application/json, application/yaml, application/vnd.kubernetes.protobuf",
    )
