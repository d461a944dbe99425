"""The CloudFormation templates, read as YAML and carried out on moto."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from botocore.session import Session
from moto import mock_aws

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "aws"
REGION = "eu-west-1"
NOT_IN_MOTO = {
    "AWS::CloudWatch::Alarm",
    "AWS::EKS::PodIdentityAssociation",
    "AWS::Logs::MetricFilter",
    "AWS::Logs::QueryDefinition",
    "AWS::SNS::TopicPolicy",
    "AWS::SecurityHub::Insight",
}
"""What moto's CloudFormation passes over, with a warning."""


class _Loader(yaml.SafeLoader):
    """Intrinsic functions become what they are applied to: enough to look at texts."""


def _plain(loader: _Loader, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.MappingNode)
    return loader.construct_mapping(node, deep=True)


_Loader.add_multi_constructor("!", _plain)


def resources(file: str, kind: str) -> dict[str, dict[str, Any]]:
    """Properties of all resources of a type, by logical id."""
    template = yaml.load((FOLDER / file).read_text(), _Loader)  # noqa: S506 - derived from SafeLoader
    found = {
        name: resource["Properties"]
        for name, resource in template["Resources"].items()
        if resource["Type"] == kind
    }
    assert found, f"no {kind} in {file}"
    return found


class Account:
    """An account in moto, with a stack in it."""

    def client(self, service: str) -> Any:
        return Session().create_client(
            service, region_name=REGION, aws_access_key_id="x", aws_secret_access_key="x"
        )

    def create(self, name: str, file: str, **parameters: str) -> dict[str, str]:
        """Make a stack: its outputs. Fails where moto passes over a type that it is not known to."""
        cloudformation = self.client("cloudformation")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            cloudformation.create_stack(
                StackName=name,
                TemplateBody=(FOLDER / file).read_text(),
                Capabilities=["CAPABILITY_IAM"],
                Parameters=[
                    {"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()
                ],
            )
        left_out = {str(one.message).split()[3] for one in said if "Tried to parse" in str(one.message)}
        assert left_out <= NOT_IN_MOTO, left_out
        (stack,) = cloudformation.describe_stacks(StackName=name)["Stacks"]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        return {one["OutputKey"]: one["OutputValue"] for one in stack.get("Outputs", ())}

    def types(self, name: str) -> set[str]:
        """Types of the resources that were made; moto warns again of those it passes over."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self.client("cloudformation").describe_stack_resources(StackName=name)["StackResources"]
        return {one["ResourceType"] for one in made if "ResourceType" in one}

    def policies(self, role_arn: str) -> list[dict[str, Any]]:
        """Documents of the policies a role has."""
        iam = self.client("iam")
        role = role_arn.rpartition("/")[2]
        documents = []
        for attached in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]:
            arn = attached["PolicyArn"]
            version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
            documents.append(
                iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"]
            )
        return documents

    def trust(self, role_arn: str) -> dict[str, Any]:
        role = self.client("iam").get_role(RoleName=role_arn.rpartition("/")[2])["Role"]
        document: dict[str, Any] = role["AssumeRolePolicyDocument"]
        return document


@contextlib.contextmanager
def account() -> Iterator[Account]:
    """An empty account."""
    with mock_aws():
        yield Account()
