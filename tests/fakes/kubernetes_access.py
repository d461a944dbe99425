"""Who may do what in the fake Kubernetes: the path's meaning, bearer tokens, rules, and access reviews."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.fakes.kubernetes_common import (
    RESOURCES,
    KubeError,
    bad_request,
    details_of,
    go_json,
    no_such_route,
    qualified,
)
from tests.fakes.kubernetes_lists import true_in

if TYPE_CHECKING:
    from collections.abc import Mapping

Rule = tuple[str, str, str]

EVERYTHING_NEEDED: Final[frozenset[Rule]] = frozenset(
    [
        (resource.group, resource.plural, verb)
        for resource in RESOURCES.values()
        if resource.plural != "configmaps"
        for verb in ("get", "list", "watch")
    ]
    + [("", "configmaps", "get")]
)
ANONYMOUS: Final = "system:anonymous"
REVIEWS: Final = "selfsubjectaccessreviews"
_REVIEW_GROUP: Final = "authorization.k8s.io"
_PUBLIC: Final = ("/version", "/livez", "/readyz", "/healthz")
_VERBS: Final = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch"}


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a request asks for; without `resource` it is a plain path."""

    verb: str
    path: str
    group: str = ""
    version: str = ""
    resource: str = ""
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def kind(self) -> str:
        """What faults and records call it: the resource, or the path's last part."""
        return self.resource or self.path.rpartition("/")[2]


def meaning_of(method: str, path: str, query: Mapping[str, str]) -> Meaning:
    """As the real server's request info: a GET without a name is a list, or a watch."""
    parts = [part for part in path.split("/") if part]
    if len(parts) >= 3 and parts[0] == "api":
        group, version, rest = "", parts[1], parts[2:]
    elif len(parts) >= 4 and parts[0] == "apis":
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return Meaning(method.lower(), path)
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 1:
        namespace = rest[1]
        if len(rest) > 2 and rest[2] not in ("status", "finalize"):
            rest = rest[2:]
    resource, name, subresource = (*rest, "", "")[:3]
    verb = _VERBS.get(method, method.lower())
    if method == "DELETE" and not name:
        verb = "deletecollection"
    if verb == "get" and not name:
        verb = "watch" if true_in(query, "watch") else "list"
        for term in query.get("fieldSelector", "").split(","):
            if term.startswith("metadata.name="):
                name = term.removeprefix("metadata.name=").removeprefix("=")
    return Meaning(verb, path, group, version, resource, namespace, name, subresource)


def bearer(header: str | None) -> str | None:
    """The token of an Authorization header; None where there is none, so that the caller is anonymous."""
    scheme, _, token = (header or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def unauthorized() -> KubeError:
    return KubeError(401, "Unauthorized", "Unauthorized")


def forbidden(meaning: Meaning, user: str) -> KubeError:
    if not meaning.resource:
        message = f'forbidden: User "{user}" cannot {meaning.verb} path "{meaning.path}"'
        return KubeError(403, "Forbidden", message, details={})
    resource = meaning.resource + (f"/{meaning.subresource}" if meaning.subresource else "")
    where = f'in the namespace "{meaning.namespace}"' if meaning.namespace else "at the cluster scope"
    quoted = f' "{meaning.name}"' if meaning.name else ""
    message = (
        f"{qualified(meaning.group, meaning.resource)}{quoted} is forbidden: "
        f'User "{user}" cannot {meaning.verb} resource "{resource}" in API group "{meaning.group}" {where}'
    )
    details = details_of(meaning.group, meaning.resource, meaning.name)
    return KubeError(403, "Forbidden", message, details=details)


def may(meaning: Meaning, user: str, allow: set[Rule]) -> bool:
    if not meaning.resource:
        return meaning.verb in ("get", "head") and meaning.path in _PUBLIC
    if user == ANONYMOUS:
        return False
    if (meaning.group, meaning.resource) == (_REVIEW_GROUP, REVIEWS):
        return meaning.verb == "create"
    resource = meaning.resource + (f"/{meaning.subresource}" if meaning.subresource else "")
    return (meaning.group, resource, meaning.verb) in allow


def review(content_type: str, body: bytes, allow: set[Rule]) -> bytes:
    """The answer to a SelfSubjectAccessReview."""
    if content_type not in ("", "application/json", "application/octet-stream"):
        raise KubeError(
            415,
            "UnsupportedMediaType",
            "the body of the request was in an unknown format - accepted media types include: "
            "application/json, application/yaml, application/vnd.kubernetes.protobuf",
        )
    try:
        asked: Any = json.loads(body)
    except ValueError as error:
        raise bad_request(f"couldn't get version/kind; json parse error: {error}") from error
    if not isinstance(asked, dict) or not asked.get("kind"):
        raise bad_request(f"Object 'Kind' is missing in '{body.decode(errors='replace')}'")
    if (asked["kind"], asked.get("apiVersion")) != ("SelfSubjectAccessReview", f"{_REVIEW_GROUP}/v1"):
        raise bad_request(
            f"{asked['kind']} in version {asked.get('apiVersion')!r} cannot be handled as a SelfSubjectAccessReview"
        )
    spec = asked.get("spec") or {}
    wanted = spec.get("resourceAttributes")
    if (wanted is None) == (spec.get("nonResourceAttributes") is None):
        raise KubeError(
            422,
            "Invalid",
            'SelfSubjectAccessReview.authorization.k8s.io "" is invalid: spec.resourceAttributes: Invalid '
            'value: "null": exactly one of nonResourceAttributes or resourceAttributes must be specified',
            details={"group": _REVIEW_GROUP, "kind": "SelfSubjectAccessReview"},
        )
    if wanted is None:
        path = spec["nonResourceAttributes"]
        allowed = path.get("verb") == "get" and path.get("path") in _PUBLIC
    else:
        resource = wanted.get("resource", "")
        if wanted.get("subresource"):
            resource += f"/{wanted['subresource']}"
        allowed = (wanted.get("group", ""), resource, wanted.get("verb", "")) in allow
    status: dict[str, Any] = {"allowed": allowed}
    if allowed:
        status["reason"] = (
            'RBAC: allowed by ClusterRoleBinding "falco-forwarder" of ClusterRole "falco-forwarder"'
        )
    answer = {
        "kind": "SelfSubjectAccessReview",
        "apiVersion": f"{_REVIEW_GROUP}/v1",
        "metadata": {"creationTimestamp": None},
        "spec": spec,
        "status": status,
    }
    return go_json(answer) + b"\n"


def check_route(meaning: Meaning, groups: frozenset[str]) -> None:
    """Whether the server has such a path at all; it says so only to those who may ask."""
    if not meaning.resource or meaning.group not in groups or meaning.version != "v1":
        raise KubeError(404, "", "404 page not found", plain=True)
    known = RESOURCES.get(meaning.resource)
    itself = meaning.resource == "namespaces" and meaning.namespace == meaning.name
    own_namespace = bool(meaning.namespace) and not itself
    cluster_named = bool(meaning.name) and not meaning.namespace and meaning.verb not in ("list", "watch")
    if (meaning.group, meaning.resource) == (_REVIEW_GROUP, REVIEWS):
        if meaning.namespace or meaning.name or meaning.subresource:
            raise no_such_route()
        return
    if (
        known is None
        or known.group != meaning.group
        or meaning.subresource
        or (known.namespaced and cluster_named)
        or (not known.namespaced and own_namespace)
    ):
        raise no_such_route()
