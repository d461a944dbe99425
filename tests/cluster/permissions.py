"""What an account may do, asked of the API server: its own list of rules, and every verb on every resource one by one."""

from __future__ import annotations

from typing import NamedTuple

import yaml

from tests.cluster.api import path_of
from tests.cluster.control_plane import ControlPlane, Object
from tests.cluster.releases import CHART, resources

RULES = CHART / "files" / "cluster-role-rules.yaml"
VERBS = (
    "get",
    "list",
    "watch",
    "create",
    "update",
    "patch",
    "delete",
    "deletecollection",
    "impersonate",
    "bind",
    "escalate",
)
NEEDED = {
    ("get", "pods"),
    ("list", "pods"),
    ("watch", "pods"),
    ("list", "namespaces"),
    ("watch", "namespaces"),
    ("list", "nodes"),
    ("watch", "nodes"),
    ("list", "replicasets.apps"),
    ("watch", "replicasets.apps"),
    ("list", "jobs.batch"),
    ("watch", "jobs.batch"),
}
"""Written out, so that a change of the chart's rules has to be meant."""
EVERYBODY = {
    ("create", "selfsubjectaccessreviews.authorization.k8s.io"),
    ("create", "selfsubjectrulesreviews.authorization.k8s.io"),
    ("create", "selfsubjectreviews.authentication.k8s.io"),
}
"""What ``system:basic-user`` gives every account that has a name."""


class Allowed(NamedTuple):
    """The answer of a SelfSubjectRulesReview: what ``kubectl auth can-i --list`` shows."""

    resources: set[tuple[str, str]]
    """Verb and resource with its group."""
    paths: set[tuple[str, str]]
    """Verb and path of what is no resource."""


def in_the_chart() -> set[tuple[str, str]]:
    """The chart's rules as pairs of verb and resource with its group."""
    return pairs(yaml.safe_load(RULES.read_text()))


def pairs(rules: list[Object]) -> set[tuple[str, str]]:
    found = set()
    for rule in rules:
        assert not rule.get("resourceNames"), rule
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                name = f"{resource}.{group}" if group else resource
                found |= {(verb, name) for verb in rule["verbs"]}
    return found


def listed(plane: ControlPlane, namespace: str, account: str) -> Allowed:
    """Asked with a token of the account itself."""
    path = path_of("serviceaccounts", namespace, account, "token")
    token = plane.admin.call("POST", path, {"spec": {"expirationSeconds": 600}})["status"]["token"]
    mine = plane.admin.as_user(str(token))
    status = mine.create("selfsubjectrulesreviews", {"spec": {"namespace": namespace}})["status"]
    assert not status["incomplete"], status
    paths = {
        (verb, path)
        for rule in status["nonResourceRules"]
        for verb in rule["verbs"]
        for path in rule["nonResourceURLs"]
    }
    return Allowed(pairs(status["resourceRules"]), paths)


def tried(plane: ControlPlane, user: str, groups: list[str], namespace: str) -> set[tuple[str, str]]:
    """Every verb on every resource and subresource of the server, in one namespace (everywhere where it is empty)."""
    allowed = set()
    for prefix, resource in resources(plane):
        group = prefix.split("/")[2] if prefix.startswith("/apis/") else ""
        name, _, subresource = resource["name"].partition("/")
        for verb in VERBS:
            attributes = {"verb": verb, "group": group, "resource": name, "subresource": subresource}
            if resource["namespaced"]:
                attributes["namespace"] = namespace
            review = {"spec": {"user": user, "groups": groups, "resourceAttributes": attributes}}
            status = plane.admin.call("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)[
                "status"
            ]
            if status["allowed"]:
                allowed.add((verb, f"{resource['name']}.{group}" if group else str(resource["name"])))
    return allowed
