"""Which AWS operations the forwarder calls, read from its source with the SDK's own list of operations.

Three ways lead to AWS: `Aws.call(client, "operation")`, the helper `_create("operation")` of the log sink, and `signed(...)`, whose
operation is in the form (EC2) or in the path (EKS). A fourth, AssumeRole, is the SDK's own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from botocore import xform_name
from botocore.session import Session

FORWARDER = Path(__file__).resolve().parents[2] / "forwarder"
DEMO = re.compile(r"demo.*\.py")
SERVICES = ("logs", "securityhub", "sts", "ecs", "ec2", "eks")
CALLERS = {"call", "_create"}
PERMITTED_TO_ALL = {"sts:GetCallerIdentity"}
"""IAM never denies it."""


def operations() -> set[str]:
    """As `service:Operation`."""
    models = {name: Session().get_service_model(name) for name in SERVICES}
    by_method = {
        xform_name(operation): f"{service}:{operation}"
        for service in ("logs", "securityhub", "sts", "ecs")
        for operation in models[service].operation_names
    }
    found: set[str] = set()
    for file in FORWARDER.rglob("*.py"):
        if DEMO.fullmatch(file.name):
            continue
        tree = ast.parse(file.read_text())
        for name in _names_called(tree):
            if name not in by_method:
                raise LookupError(
                    f"{file.name} calls {name}, which is in none of {SERVICES}: name its service here"
                )
            found.add(by_method[name])
        found |= {f"ec2:{action}" for action in _form_actions(tree)}
        if any(
            isinstance(node, ast.Name) and node.id == "AioAssumeRoleCredentialFetcher"
            for node in ast.walk(tree)
        ):
            found.add("sts:AssumeRole")
    signed = ast.parse((FORWARDER / "cluster_identity.py").read_text())
    return found | set(_eks(signed, models["eks"]))


def clients() -> set[str]:
    """Services of `signed(aws, "service", ...)`: one that is new has to be read here too."""
    return {
        argument.value
        for file in FORWARDER.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "signed"
        for argument in node.args
        if isinstance(argument, ast.Constant)
        and isinstance(argument.value, str)
        and not argument.value.startswith("/")
    }


def _names_called(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLERS
        ):
            continue
        for argument in node.args[:2]:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value


def _form_actions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and key.value == "Action"
                    and isinstance(value, ast.Constant)
                ):
                    yield str(value.value)


def _eks(tree: ast.Module, model: Any) -> Iterator[str]:
    """GET paths, as far as they are written out, matched with those of the service's model."""
    paths = {
        re.sub(r"\{[^}]*\}", "", operation.http["requestUri"]): name
        for name in model.operation_names
        if (operation := model.operation_model(name)).http["method"] == "GET"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            path = str(node.values[0].value).partition("?")[0]
            if path.startswith("/clusters"):
                yield f"eks:{paths[path]}"
