"""The templates of docs/aws: what cfn-lint says of them, and what they make on moto."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.aws_side.iam import actions, statements
from tests.aws_side.policies_checks import POLICIES, lint
from tests.aws_side.templates import FOLDER, Account, account, resources
from tests.fakes.aws import FakeAws
from tests.running import Start
from tests.samples import REAL_BODIES

TEMPLATES = ["template.yaml", "watching.yaml", "findings.yaml"]
GROUP = "/falco/shop-prod"
ISSUER = "oidc.eks.eu-west-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE"
ROLE = "arn:aws:iam::444455556666:role/falco-findings"
ACCOUNT = "123456789012"
"""moto's."""

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def empty() -> Iterator[Account]:
    with account() as found:
        yield found


def as_in_the_docs(policy: dict[str, Any]) -> dict[str, Any]:
    """The docs' account for moto's."""
    found: dict[str, Any] = json.loads(json.dumps(policy).replace(ACCOUNT, "111122223333"))
    return found


def test_cfn_lint_finds_nothing() -> None:
    assert {file.name for file in FOLDER.glob("*.yaml")} == set(TEMPLATES)
    lint(*(FOLDER / file for file in TEMPLATES))


def test_pod_identity_with_a_key(empty: Account) -> None:
    outputs = empty.create(
        "a", "template.yaml", ClusterName="shop-prod", LogGroupName=GROUP, EncryptLogs="true"
    )
    assert empty.types("a") == {
        "AWS::IAM::Role",
        "AWS::IAM::ManagedPolicy",
        "AWS::Logs::LogGroup",
        "AWS::KMS::Key",
    }
    assert as_in_the_docs(empty.trust(outputs["RoleArn"])) == POLICIES["trust-pod-identity"]
    (group,) = empty.client("logs").describe_log_groups()["logGroups"]
    assert (group["logGroupName"], group["retentionInDays"]) == (GROUP, 90)
    kms = empty.client("kms")
    (key,) = kms.list_keys()["Keys"]
    assert "kmsKeyId" not in group  # moto's CloudFormation leaves it out, so look at the template itself
    assert resources("template.yaml", "AWS::Logs::LogGroup")["LogGroup"]["KmsKeyId"][:2] == [
        "HasKey",
        "LogKey.Arn",
    ]
    policy = kms.get_key_policy(KeyId=key["KeyId"], PolicyName="default")["Policy"]
    (logs,) = [one for one in statements(policy) if one["Sid"] == "CloudWatchLogs"]
    assert logs["Principal"] == {"Service": "logs.eu-west-1.amazonaws.com"}
    assert logs["Condition"] == {
        "ArnEquals": {"kms:EncryptionContext:aws:logs:arn": group["arn"].removesuffix(":*")}
    }


def test_irsa(empty: Account) -> None:
    outputs = empty.create(
        "a",
        "template.yaml",
        ClusterName="shop-prod",
        LogGroupName=GROUP,
        Identity="IRSA",
        OidcProvider=ISSUER,
    )
    assert as_in_the_docs(empty.trust(outputs["RoleArn"])) == POLICIES["trust-irsa"]
    assert "AWS::KMS::Key" not in empty.types("a")


def test_the_role_has_what_the_docs_say_but_for_making_groups(empty: Account) -> None:
    outputs = empty.create("a", "template.yaml", ClusterName="shop-prod", LogGroupName=GROUP)
    given = [as_in_the_docs(policy) for policy in empty.policies(outputs["RoleArn"])]
    expected = [one for one in statements(POLICIES["both"]) if one["Sid"] != "LogGroup"]
    assert sorted((one for policy in given for one in statements(policy)), key=str) == sorted(
        expected, key=str
    )


def test_findings_of_the_security_account(empty: Account) -> None:
    outputs = empty.create(
        "a", "template.yaml", ClusterName="shop-prod", Findings="SecurityAccount", SecurityRoleArn=ROLE
    )
    (given,) = empty.policies(outputs["RoleArn"])
    assert given == POLICIES["cross-account-base"]
    assert "LogGroupArn" not in outputs


def test_no_findings(empty: Account) -> None:
    outputs = empty.create("a", "template.yaml", ClusterName="shop-prod", LogGroupName=GROUP, Findings="None")
    (given,) = empty.policies(outputs["RoleArn"])
    assert actions(given) == {"logs:CreateLogStream", "logs:PutLogEvents"}


async def test_a_forwarder_with_the_stacks_role_delivers(aws: FakeAws, forwarder: Start) -> None:
    """It may not make groups; the stack has made it. One warning, and everything arrives."""
    first = await forwarder({"sinks.cloudwatch_logs": {"log_group": GROUP}})
    await first.stop()
    assert GROUP in aws.groups
    for operation in ("CreateLogGroup", "PutRetentionPolicy"):
        aws.fail(operation, times=None, status=400, code="AccessDeniedException", message="not authorized")
    running = await forwarder({"sinks.cloudwatch_logs": {"log_group": GROUP}})
    await running.post(*REAL_BODIES)
    await running.at_rest()
    assert len(aws.messages()) == len(REAL_BODIES)


def test_watching(empty: Account) -> None:
    empty.client("logs").create_log_group(logGroupName=GROUP)
    outputs = empty.create(
        "a", "watching.yaml", ClusterName="shop-prod", LogGroupName=GROUP, AlarmEmail="ana@example.com"
    )
    assert empty.types("a") == {"AWS::SNS::Topic", "AWS::CloudWatch::Dashboard"}
    sns = empty.client("sns")
    (subscription,) = sns.list_subscriptions_by_topic(TopicArn=outputs["AlarmTopic"])["Subscriptions"]
    assert subscription["Endpoint"] == "ana@example.com"
    body = empty.client("cloudwatch").get_dashboard(DashboardName="falco-shop-prod")["DashboardBody"]
    assert "${" not in body
    assert len(json.loads(body)["widgets"]) == 6


def test_what_moto_does_not_make_its_services_take(empty: Account) -> None:
    """Metric filters and alarms are passed over by moto's CloudFormation: given to the services' own calls."""
    logs, cloudwatch = empty.client("logs"), empty.client("cloudwatch")
    logs.create_log_group(logGroupName=GROUP)
    filters = resources("watching.yaml", "AWS::Logs::MetricFilter")
    for properties in filters.values():
        logs.put_metric_filter(
            logGroupName=GROUP,
            filterName=properties["FilterName"],
            filterPattern=properties["FilterPattern"],
            metricTransformations=[
                {
                    "metricNamespace": one["MetricNamespace"].replace("${ClusterName}", "shop-prod"),
                    "metricName": one["MetricName"],
                    "metricValue": one["MetricValue"],
                    "defaultValue": one["DefaultValue"],
                    "unit": one["Unit"],
                }
                for one in properties["MetricTransformations"]
            ],
        )
    assert len(logs.describe_metric_filters(logGroupName=GROUP)["metricFilters"]) == len(filters)
    alarms = resources("watching.yaml", "AWS::CloudWatch::Alarm")
    for properties in alarms.values():
        values = {"Threshold": 30000} if properties["Threshold"] == "FloodEvents" else {}
        cloudwatch.put_metric_alarm(**properties | values | {"AlarmActions": []})
    assert len(cloudwatch.describe_alarms()["MetricAlarms"]) == len(alarms)


@pytest.mark.parametrize("targets", [0, 1])
def test_findings(empty: Account, targets: int) -> None:
    parameters = {"NotifyEmail": "ana@example.com"} if targets else {}
    outputs = empty.create("a", "findings.yaml", **parameters)
    rule = outputs["RuleArn"].rpartition("/")[2]
    events = empty.client("events")
    (own,) = resources("findings.yaml", "AWS::Events::Rule").values()
    assert json.loads(events.describe_rule(Name=rule)["EventPattern"]) == own["EventPattern"]
    assert len(events.list_targets_by_rule(Rule=rule)["Targets"]) == targets
