"""A small reading of IAM: what a policy allows, as the IAM user guide has it (Allow statements only; ours have no others).

Which resource a call is weighed against comes from the service authorisation reference; group operations of CloudWatch Logs are
weighed against an ARN that ends in `:log-stream:`, as the service's own AccessDenied texts show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

OPERATORS = {"StringEquals", "ArnEquals"}


def statements(policy: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = policy["Statement"]
    return found if isinstance(found, list) else [found]


def listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def actions(*policies: Mapping[str, Any]) -> set[str]:
    """Every action that is named."""
    return {
        action
        for policy in policies
        for statement in statements(policy)
        for action in listed(statement["Action"])
    }


def allows(
    policy: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str] | None = None
) -> bool:
    """Whether a statement allows the action on the resource."""
    return any(
        statement["Effect"] == "Allow"
        and any(_like(pattern, action) for pattern in listed(statement["Action"]))
        and any(_like(pattern, resource) for pattern in listed(statement["Resource"]))
        and all(_holds(*condition, context or {}) for condition in _conditions(statement))
        for statement in statements(policy)
    )


def resource_of(operation: str, body: Mapping[str, Any], *, region: str, account: str) -> str:
    """What IAM weighs a call of ours against."""
    if "logGroupName" in body:
        stream = body.get("logStreamName", "")
        return f"arn:aws:logs:{region}:{account}:log-group:{body['logGroupName']}:log-stream:{stream}"
    return {
        "BatchImportFindings": f"arn:aws:securityhub:{region}:{account}:product/{account}/default",
        "DescribeHub": f"arn:aws:securityhub:{region}:{account}:hub/default",
        "AssumeRole": str(body.get("RoleArn")),
    }[operation]


def _conditions(statement: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    for operator, keys in statement.get("Condition", {}).items():
        for key, values in keys.items():
            yield operator, key, listed(values)


def _holds(operator: str, key: str, values: list[str], context: Mapping[str, str]) -> bool:
    if operator not in OPERATORS:
        raise ValueError(f"{operator} is not read here")
    return context.get(key) in values


def _like(pattern: str, text: str) -> bool:
    parts = ("." if part == "?" else ".*" if part == "*" else re.escape(part) for part in pattern)
    return re.fullmatch("".join(parts), text) is not None
