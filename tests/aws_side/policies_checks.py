"""The policies of docs/aws/policies: what the code calls, nothing else, on nothing else.

Run by `make aws-test`; not named test_*, because a full set of what is checked here takes more than `make test` should.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from forwarder.live_check import live_check
from forwarder.settings import load_settings
from tests.aws_side.iam import actions, allows, resource_of, statements
from tests.aws_side.operations import PERMITTED_TO_ALL, clients, operations
from tests.fakes.aws import FakeAws
from tests.running import Start, settings_of
from tests.samples import REAL_BODIES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "aws" / "policies"
TRUSTS = {"cross-account-trust", "trust-irsa", "trust-pod-identity"}
POLICIES: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text()) for file in FOLDER.glob("*.json")
}
REGION, ACCOUNT, SECURITY = "eu-west-1", "111122223333", "444455556666"
GROUP = "/falco/shop-prod"
ROLE = f"arn:aws:iam::{SECURITY}:role/falco-findings"
EXTERNAL_ID = "shop-prod-3f9c"
MEMBERS = {
    "both": {"cloudwatch-logs", "security-hub"},
    "everything": {"both", "cross-account-base", "cluster-name", "ecs-tasks"},
}
CALLS = (
    "CreateLogGroup",
    "CreateLogStream",
    "PutLogEvents",
    "PutRetentionPolicy",
    "BatchImportFindings",
    "DescribeHub",
)

pytestmark = pytest.mark.timeout(120)


def enforce(aws: FakeAws, policy: Mapping[str, Any], account: str = ACCOUNT) -> None:
    """From here on the fake refuses what the policy does not allow, with the words of IAM."""
    for operation in CALLS:
        service = "securityhub" if operation in {"BatchImportFindings", "DescribeHub"} else "logs"

        def denied(body: dict[str, Any], operation: str = operation, service: str = service) -> bool:
            resource = resource_of(operation, body, region=REGION, account=account)
            return not allows(policy, f"{service}:{operation}", resource)

        aws.fail(
            operation,
            times=None,
            status=403 if service == "securityhub" else 400,
            code="AccessDeniedException",
            message=f"User: x is not authorized to perform: {service}:{operation}",
            when=denied,
        )


def both_sinks(**more: Any) -> dict[str, Any]:
    return {"sinks.cloudwatch_logs": {"log_group": GROUP, "retention_days": 90}} | more


def test_all_policies_are_known() -> None:
    assert set(POLICIES) == TRUSTS | {
        "both",
        "cloudwatch-logs",
        "cluster-name",
        "cross-account-base",
        "cross-account-role",
        "ecs-tasks",
        "security-hub",
    }


def test_the_policies_together_are_what_the_code_calls() -> None:
    """None missing, none too many; sts:TagSession is no call, but needed to hand on the tags of Pod Identity."""
    assert clients() == {"ec2", "eks"}
    given = actions(*(POLICIES[name] for name in MEMBERS["everything"]))
    assert given - {"sts:TagSession"} == operations() - PERMITTED_TO_ALL


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cloudwatch-logs", {"logs:"}),
        ("security-hub", {"securityhub:"}),
        ("both", {"logs:", "securityhub:"}),
        ("cross-account-role", {"securityhub:"}),
        ("cross-account-base", {"sts:AssumeRole"}),
        ("cluster-name", {"ec2:", "eks:"}),
        ("ecs-tasks", {"ecs:"}),
    ],
)
def test_each_policy_has_all_of_its_services_and_no_other(name: str, expected: set[str]) -> None:
    wanted = {operation for operation in operations() if operation.startswith(tuple(expected))}
    assert actions(POLICIES[name]) - {"sts:TagSession"} == wanted


def test_both_is_the_sum_of_the_two() -> None:
    assert statements(POLICIES["both"]) == [
        statement for name in ("cloudwatch-logs", "security-hub") for statement in statements(POLICIES[name])
    ]


def test_a_star_stands_only_where_the_service_knows_no_resource() -> None:
    """ec2:DescribeTags and eks:ListClusters; ecs:* has the cluster as a condition instead."""
    free = {
        action
        for policy in POLICIES.values()
        for statement in statements(policy)
        if statement.get("Resource") == "*"
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
        if statement["Condition"]
    }
    assert free == {"ec2:DescribeTags", "eks:ListClusters", "ecs:ListTasks", "ecs:DescribeTasks"}


@pytest.mark.parametrize("name", sorted(set(POLICIES) - TRUSTS))
def test_cfn_lint_finds_nothing_in_it(name: str, tmp_path: Path) -> None:
    """It knows every action, and which kind of resource belongs to it."""
    file = tmp_path / "template.json"
    resource = {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": POLICIES[name]}}
    file.write_text(json.dumps({"AWSTemplateFormatVersion": "2010-09-09", "Resources": {"Policy": resource}}))
    lint(file)


@pytest.mark.parametrize("name", sorted(TRUSTS))
def test_cfn_lint_finds_nothing_in_the_trust(name: str, tmp_path: Path) -> None:
    file = tmp_path / "template.json"
    resource = {"Type": "AWS::IAM::Role", "Properties": {"AssumeRolePolicyDocument": POLICIES[name]}}
    file.write_text(json.dumps({"AWSTemplateFormatVersion": "2010-09-09", "Resources": {"Role": resource}}))
    lint(file)


def lint(*files: Path) -> None:
    """cfn-lint with everything it has to say, hints too."""
    done = subprocess.run(
        [Path(sys.executable).parent / "cfn-lint", "--include-checks", "I", "--", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_would_have_found_something(tmp_path: Path) -> None:
    """An action that is none, and a resource that is not of its action's kind."""
    wrong = json.loads(
        json.dumps(POLICIES["both"]).replace("PutLogEvents", "PutLogEvent").replace(":product/", ":hub/")
    )
    POLICIES["wrong"] = wrong
    try:
        with pytest.raises(AssertionError, match=r"(?s)putlogevent.*product|product.*putlogevent"):
            test_cfn_lint_finds_nothing_in_it("wrong", tmp_path)
    finally:
        del POLICIES["wrong"]


def test_resources_are_ours_alone() -> None:
    both = POLICIES["both"]
    group = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:{GROUP}"
    assert allows(both, "logs:PutLogEvents", f"{group}:log-stream:falco-aws-forwarder-0")
    assert not allows(both, "logs:PutLogEvents", f"{group}-other:log-stream:x")
    assert not allows(both, "logs:DeleteLogGroup", f"{group}:log-stream:")
    product = f"arn:aws:securityhub:{REGION}:{ACCOUNT}:product/{ACCOUNT}/default"
    assert allows(both, "securityhub:BatchImportFindings", product)
    assert not allows(both, "securityhub:BatchImportFindings", product.replace(ACCOUNT, SECURITY))
    base = POLICIES["cross-account-base"]
    assert allows(base, "sts:AssumeRole", ROLE)
    assert not allows(base, "sts:AssumeRole", ROLE + "-other")


async def test_a_forwarder_with_both_delivers_everything(aws: FakeAws, forwarder: Start) -> None:
    """An empty account: group, stream and retention are made, every alert arrives."""
    enforce(aws, POLICIES["both"])
    running = await forwarder(both_sinks())
    await running.post(*REAL_BODIES)
    await running.at_rest()
    assert len(aws.messages()) == len(REAL_BODIES)
    assert len(aws.findings) > 0
    assert aws.groups[GROUP].retention_days == 90
    assert "AccessDeniedException" not in {call.error for call in aws.calls}


@pytest.mark.parametrize(
    "missing", ["logs:CreateLogStream", "logs:PutLogEvents", "securityhub:BatchImportFindings"]
)
async def test_without_one_of_them_something_waits(aws: FakeAws, forwarder: Start, missing: str) -> None:
    """So the check above would notice. Nothing is lost: the sink is blocked."""
    less = json.loads(json.dumps(POLICIES["both"]).replace(missing, "sts:TagSession"))
    enforce(aws, less)
    running = await forwarder(both_sinks())
    await running.post(*REAL_BODIES[:5])
    sink = "security_hub" if missing.startswith("securityhub") else "cloudwatch_logs"
    await running.until(lambda: running.app.status()["sinks"][sink]["state"] == "blocked")
    assert running.app.status()["sinks"][sink]["dead_letters"] == 0


async def test_the_live_check_is_content(aws: FakeAws, tmp_path: Path) -> None:
    """`check --live` makes the same calls, and DescribeHub."""
    enforce(aws, POLICIES["both"])
    steps = await live_check(settings_of(tmp_path, both_sinks()))
    assert all(step.ok for step in steps), steps
    done = {f"{call.service}:{call.operation}" for call in aws.calls}
    assert done == (actions(POLICIES["both"]) | PERMITTED_TO_ALL) - {"logs:PutRetentionPolicy"}


def test_the_values_on_the_page_are_a_configuration(tmp_path: Path) -> None:
    """What multi-account.md gives the chart as `config:` is read by the forwarder, and names the role of the policies."""
    page = (FOLDER.parent / "multi-account.md").read_text()
    (block,) = re.findall(r"^```yaml\n(config:.*?)^```", page, re.MULTILINE | re.DOTALL)
    values = yaml.safe_load(block)["config"] | {
        "aws": {"region": REGION},
        "spool": {"directory": str(tmp_path)},
    }
    file = tmp_path / "forwarder.yaml"
    file.write_text(yaml.safe_dump(values))
    settings = load_settings(file, {})
    hub = settings.sinks.security_hub
    assert (hub.role_arn, hub.external_id) == (ROLE, EXTERNAL_ID)
    assert settings.cluster.account_id == ACCOUNT


async def test_the_role_of_another_account(aws: FakeAws, forwarder: Start) -> None:
    """The base role's credentials may only assume; what is imported belongs to the security account."""
    trust = statements(POLICIES["cross-account-trust"])[0]
    assert trust["Condition"] == {"StringEquals": {"sts:ExternalId": EXTERNAL_ID}}
    aws.roles[ROLE] = EXTERNAL_ID
    enforce(aws, POLICIES["cross-account-role"], SECURITY)
    running = await forwarder(
        {
            "sinks.cloudwatch_logs": {"enabled": False},
            "sinks.security_hub": {"role_arn": ROLE, "external_id": EXTERNAL_ID},
            "cluster.account_id": ACCOUNT,
        }
    )
    await running.post(*REAL_BODIES)
    await running.at_rest()
    assert {finding["AwsAccountId"] for finding in aws.findings.values()} == {SECURITY}
    made = {f"{call.service}:{call.operation}" for call in aws.calls}
    assert made <= {"sts:AssumeRole", "sts:GetCallerIdentity", "securityhub:BatchImportFindings"}
    clusters = {
        resource["Id"].split(":")[4]
        for finding in aws.findings.values()
        for resource in finding["Resources"]
        if resource["Type"] == "AwsEksCluster"
    }
    assert clusters == {ACCOUNT}
