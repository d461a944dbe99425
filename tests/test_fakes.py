"""The fake AWS says yes and no as the real one: driven by the real SDK, compared with moto where moto checks.

The rules asserted here come from the AWS API references and user guides. Bad requests are put on the wire
with the SDK's own `before-call` event, because the SDK would refuse to build some of them.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import gzip
import hashlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore import UNSIGNED
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, HTTPClientError
from moto.server import ThreadedMotoServer

from tests.fakes.aws import FakeAws

# The SDK hands bodies over 1 MiB to aiohttp as bytes, which aiohttp warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")

REPO = Path(__file__).resolve().parent.parent
NOW = 1_800_000_000.0
MS = int(NOW * 1000)
HOUR, DAY = 3_600_000, 86_400_000
ACCOUNT, REGION = "111122223333", "eu-west-1"
PRODUCT = f"arn:aws:securityhub:{REGION}:{ACCOUNT}:product/{ACCOUNT}/default"
_SESSION: list[Any] = []

Connect = Callable[..., Awaitable[Any]]


class Clock:
    """A clock a test may set."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
async def aws(clock: Clock) -> AsyncIterator[FakeAws]:
    """A fake at a fixed moment; real signing times are far away from it, so the skew is left aside."""
    async with FakeAws(clock=clock) as fake:
        fake.max_clock_skew = float("inf")
        yield fake


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes SDK clients for a fake, or for any endpoint with `url`."""
    if not _SESSION:
        _SESSION.append(get_session())  # one for all tests: it caches the service models
    async with AsyncExitStack() as stack:

        async def make(aws: FakeAws, service: str, **changes: Any) -> Any:
            config = AioConfig(
                parameter_validation=False,
                retries={"total_max_attempts": 1},
                read_timeout=changes.pop("read_timeout", 5),
                signature_version=changes.pop("signature_version", None),
            )
            options = {
                "endpoint_url": changes.pop("url", aws.url),
                "region_name": aws.region,
                "aws_access_key_id": aws.access_key,
                "aws_secret_access_key": aws.secret_key,
                **changes,
            }
            return await stack.enter_async_context(
                _SESSION[0].create_client(service, config=config, **options)
            )

        yield make


@pytest.fixture
async def logs(aws: FakeAws, connect: Connect) -> Any:
    return await connect(aws, "logs")


@pytest.fixture
async def hub(aws: FakeAws, connect: Connect) -> Any:
    return await connect(aws, "securityhub")


@pytest.fixture
async def stream(logs: Any) -> dict[str, str]:
    await logs.create_log_group(logGroupName="/falco/alerts")
    await logs.create_log_stream(logGroupName="/falco/alerts", logStreamName="a")
    return {"logGroupName": "/falco/alerts", "logStreamName": "a"}


async def send(client: Any, operation: str, body: Any) -> Any:
    """Call an operation with exactly this body, a JSON value or bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    def swap(params: dict[str, Any], **_: Any) -> None:
        params["body"] = raw
        params["headers"].setdefault("Content-Type", "application/json")

    event = f"before-call.*.{operation}"
    client.meta.events.register(event, swap)
    try:
        return await client._make_api_call(operation, {})
    finally:
        client.meta.events.unregister(event, swap)


async def refused(call: Awaitable[Any]) -> tuple[str, int, str]:
    """Code, HTTP status and text of the error a call ends with."""
    with pytest.raises(ClientError) as caught:
        await call
    answer: Any = caught.value.response
    return answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Message"]


def events(*offsets: int, message: str = "hello") -> list[dict[str, Any]]:
    return [{"timestamp": MS + offset, "message": message} for offset in offsets]


def finding(**changes: Any) -> dict[str, Any]:
    """A good finding that uses most of the format."""
    good: dict[str, Any] = {
        "SchemaVersion": "2018-10-08",
        "Id": "falco/1",
        "ProductArn": PRODUCT,
        "ProductName": "Falco",
        "CompanyName": "Falco",
        "GeneratorId": "falco/Terminal shell in container",
        "AwsAccountId": ACCOUNT,
        "CreatedAt": "2027-01-15T08:00:00.123Z",
        "UpdatedAt": "2027-01-15T08:00:00.123Z",
        "FirstObservedAt": "2027-01-15T10:00:00.123456789+02:00",
        "LastObservedAt": "2027-01-15T08:00:00Z",
        "Title": "Terminal shell in container",
        "Description": "A shell was spawned \u00e4\U0001f600",
        "FindingProviderFields": {
            "Severity": {"Label": "MEDIUM", "Original": "Notice"},
            "Types": ["TTPs/Execution/T1059", "Unusual Behaviors"],
            "Confidence": 100,
            "Criticality": 0,
            "RelatedFindings": [{"ProductArn": PRODUCT, "Id": "falco/0"}],
        },
        "Remediation": {"Recommendation": {"Text": "Look at it", "Url": "https://falco.org/docs"}},
        "SourceUrl": "https://falco.org/",
        "ProductFields": {"falco/rule": "Terminal shell in container"},
        "Process": {
            "Name": "bash",
            "Path": "/bin/bash",
            "Pid": 12,
            "ParentPid": 0,
            "LaunchedAt": "2027-01-15T08:00:00Z",
        },
        "Network": {
            "Direction": "OUT",
            "Protocol": "TCP",
            "SourceIpV4": "10.0.0.1",
            "DestinationIpV6": "::1",
            "DestinationPort": 443,
        },
        "Action": {
            "ActionType": "NETWORK_CONNECTION",
            "NetworkConnectionAction": {
                "ConnectionDirection": "OUT",
                "Protocol": "TCP",
                "RemoteIpDetails": {"IpAddressV4": "1.2.3.4"},
                "RemotePortDetails": {"Port": 443, "PortName": "https"},
                "Blocked": False,
            },
        },
        "Malware": [{"Name": "x", "Type": "COIN_MINER", "State": "OBSERVED", "Path": "/opt/x"}],
        "Threats": [{"Name": "x", "Severity": "high", "ItemCount": 1, "FilePaths": [{"FilePath": "/opt/x"}]}],
        "ThreatIntelIndicators": [
            {"Type": "IPV4_ADDRESS", "Value": "1.2.3.4", "Category": "BACKDOOR", "Source": "x"}
        ],
        "RecordState": "ACTIVE",
        "Sample": True,
        "Resources": [
            {
                "Type": "Container",
                "Id": "abc",
                "Partition": "aws",
                "Region": REGION,
                "ResourceRole": "Target",
                "Tags": {"team": "a b"},
                "Details": {
                    "Container": {
                        "ContainerRuntime": "containerd",
                        "Name": "web",
                        "ImageName": "web:1",
                        "ImageId": "sha256:" + "a" * 64,
                        "LaunchedAt": "2027-01-15T08:00:00Z",
                        "VolumeMounts": [{"Name": "v", "MountPath": "/v"}],
                        "Privileged": False,
                    },
                    "Other": {"k8s.ns.name": "default"},
                },
            },
            {
                "Type": "AwsEksCluster",
                "Id": f"arn:aws:eks:{REGION}:{ACCOUNT}:cluster/c",
                "Details": {
                    "AwsEksCluster": {
                        "Name": "c",
                        "ClusterStatus": "ACTIVE",
                        "ResourcesVpcConfig": {"SecurityGroupIds": ["sg-1"], "SubnetIds": ["s-1"]},
                        "Logging": {"ClusterLogging": [{"Enabled": True, "Types": ["audit"]}]},
                    }
                },
            },
            {
                "Type": "AwsEc2Instance",
                "Id": f"arn:aws:ec2:{REGION}:{ACCOUNT}:instance/i-0123456789abcdef0",
                "Details": {
                    "AwsEc2Instance": {"Type": "m5.large", "IpV4Addresses": ["10.0.0.1"], "VpcId": "vpc-1"}
                },
            },
            {
                "Type": "AwsEcsTask",
                "Id": f"arn:aws:ecs:{REGION}:{ACCOUNT}:task/c/1",
                "Details": {
                    "AwsEcsTask": {"ClusterArn": "c", "Containers": [{"Name": "a", "Privileged": True}]}
                },
            },
        ],
    }
    good.update(changes)
    return good


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good finding with one place changed; `...` removes it."""
    found = finding()
    steps: list[Any] = [int(step) if step.isdigit() else step for step in path.split("|")]
    place: Any = found
    for step in steps[:-1]:
        place = place[step]
    if value is ...:
        del place[steps[-1]]
    elif isinstance(place, list) and steps[-1] == len(place):
        place.append(value)
    else:
        place[steps[-1]] = copy.deepcopy(value)
    return found


# --- Security Hub: the form of a finding ----------------------------------------------------------

C = "Resources|0|Details|Container"
LONG = {
    "Id": 512,
    "GeneratorId": 512,
    "Title": 256,
    "Description": 1024,
    "ProductName": 128,
    "CompanyName": 128,
    "AwsAccountName": 50,
    "Region": 16,
    "FindingProviderFields|Severity|Original": 64,
    "Remediation|Recommendation|Text": 512,
    "Resources|0|Type": 256,
    "Resources|0|Id": 512,
    "Resources|0|Region": 16,
    f"{C}|Name": 128,
    f"{C}|ImageId": 128,
    f"{C}|ImageName": 128,
    "Resources|0|Details|Other|k8s.ns.name": 1024,
    "Resources|2|Details|AwsEc2Instance|Type": 16,
    "Resources|2|Details|AwsEc2Instance|ImageId": 64,
    "Resources|2|Details|AwsEc2Instance|KeyName": 128,
    "Resources|2|Details|AwsEc2Instance|VpcId": 32,
    "Resources|2|Details|AwsEc2Instance|SubnetId": 32,
    "ProductFields|falco/rule": 2048,
    "Process|Name": 64,
    "Process|Path": 512,
    "Network|Protocol": 16,
    "Network|SourceDomain": 128,
    "Network|DestinationDomain": 128,
    "Action|NetworkConnectionAction|Protocol": 64,
    "Action|NetworkConnectionAction|RemotePortDetails|PortName": 128,
    "Malware|0|Name": 64,
    "Malware|0|Path": 512,
    "Threats|0|Name": 128,
    "Threats|0|Severity": 128,
    "Threats|0|FilePaths|0|FilePath": 128,
    "ThreatIntelIndicators|0|Value": 512,
    "ThreatIntelIndicators|0|Source": 64,
    "FindingProviderFields|RelatedFindings|0|Id": 512,
}
RES = finding()["Resources"][1]
TYPES = "FindingProviderFields|Types"
BAD: list[tuple[str, Any, str]] = [
    *(
        (path, "x" * (most + 1), f"should NOT be longer than {most} characters")
        for path, most in LONG.items()
    ),
    *((path, "", "should NOT be shorter than 1") for path in LONG),
    *((path, 5, "should be string") for path in LONG),
    *(
        (path, None, "should be string")
        for path in ("Title", "SourceUrl", f"{C}|Name", "ProductFields|falco/rule")
    ),
    *(
        (path, ..., "should have required property")
        for path in (
            "SchemaVersion",
            "Id",
            "ProductArn",
            "GeneratorId",
            "AwsAccountId",
            "CreatedAt",
            "UpdatedAt",
        )
    ),
    *((path, ..., "should have required property") for path in ("Title", "Description", "Resources")),
    *(
        (path, ..., "should have required property")
        for path in ("Resources|0|Id", "Resources|0|Type", "Malware|0|Name")
    ),
    (
        "FindingProviderFields",
        ...,
        "data should have required property 'FindingProviderFields', data should match",
    ),
    ("FindingProviderFields|Severity", ..., "should match some schema in anyOf"),
    (TYPES, ..., "should match some schema in anyOf"),
    ("FindingProviderFields|Severity|Label", ..., "data.FindingProviderFields.Severity should have required"),
    ("Remediation|Recommendation", {}, "should match some schema in anyOf"),
    ("FindingProviderFields|RelatedFindings|0|ProductArn", ..., "should have required property 'ProductArn'"),
    *(
        (f"{path}Bogus", "x", "should NOT have additional properties: 'Bogus'")
        for path in (
            "",
            "FindingProviderFields|",
            "FindingProviderFields|Severity|",
            "Remediation|",
            "Remediation|Recommendation|",
            "Resources|0|",
            "Resources|0|Details|",
            f"{C}|",
            f"{C}|VolumeMounts|0|",
            "Resources|1|Details|AwsEksCluster|",
            "Resources|1|Details|AwsEksCluster|Logging|",
            "Resources|2|Details|AwsEc2Instance|",
            "Resources|3|Details|AwsEcsTask|",
            "Resources|3|Details|AwsEcsTask|Containers|0|",
            "Process|",
            "Network|",
            "Action|NetworkConnectionAction|",
            "Action|NetworkConnectionAction|RemoteIpDetails|",
            "Malware|0|",
            "Threats|0|",
            "ThreatIntelIndicators|0|",
        )
    ),
    (
        "Action|NetworkConnectionAction|RemoteIpDetails|IpAddressV6",
        "::1",
        "should NOT have additional properties",
    ),
    ("SchemaVersion", "2018-10-09", "allowed values"),
    ("Title", " \n ", "should match pattern"),
    ("Title", "half \ud83d", "should be valid Unicode"),
    ("AwsAccountId", "1111", "should match pattern"),
    (
        "FindingProviderFields|Severity|Label",
        "BOGUS",
        "data.FindingProviderFields.Severity.Label should be equal to one",
    ),
    ("FindingProviderFields|Severity|Label", "medium", "allowed values"),
    ("FindingProviderFields|Severity|Normalized", 40, "additional properties"),
    ("FindingProviderFields|Confidence", 101, "should be <= 100"),
    ("FindingProviderFields|Criticality", -1, "should be >= 0"),
    ("FindingProviderFields|Confidence", True, "should be integer"),
    ("FindingProviderFields|Confidence", 1.5, "should be integer"),
    (TYPES, ["Effects"] * 51, "should NOT have more than 50 items"),
    *(
        (f"{TYPES}|0", value, 'should match pattern "^([^/]+)(/[^/]+){0,2}$"')
        for value in ("", "TTPs/", "/TTPs", "TTPs//x", "TTPs/a/b/c")
    ),
    (f"{TYPES}|0", "Falco/Execution", "namespaces"),
    (f"{TYPES}|0", "ttps/Execution", "namespaces"),
    (TYPES, "TTPs", "should be array"),
    *(
        ("UpdatedAt", value, "data.UpdatedAt should match format date-time")
        for value in (
            "2027-01-15T08:00:00",
            "2027-01-15 08:00:00Z",
            "2027-01-15",
            "2027-02-30T08:00:00Z",
            "2027-01-15T24:00:00Z",
            "2027-01-15T08:00:00.Z",
            "2027-01-15T08:00:00.1234567890Z",
            "2027-01-15T08:00:00+19:00",
            "2027-01-15T08:00:00UTC",
            "1800000000",
        )
    ),
    *(
        (path, "yesterday", "date-time")
        for path in (
            "CreatedAt",
            "FirstObservedAt",
            "LastObservedAt",
            "Process|LaunchedAt",
            f"{C}|LaunchedAt",
        )
    ),
    ("Resources", [], "data.Resources should NOT have fewer than 1 items"),
    ("Resources", [RES] * 33, "data.Resources should NOT have more than 32 items"),
    ("Resources|0|Partition", "aws-eusc", "allowed values"),
    ("Resources|0|ResourceRole", "Victim", "allowed values"),
    ("Resources|0|Tags", {}, "fewer than 1 properties"),
    ("Resources|0|Tags", {f"k{i}": "v" for i in range(51)}, "more than 50 properties"),
    ("Resources|0|Tags", {"k": "x" * 257}, "longer than 256"),
    ("Resources|0|Tags", {"k": ""}, "shorter than 1"),
    ("Resources|0|Tags", {"k": "a,b"}, "should match pattern"),
    ("Resources|0|Tags", {"k\u00e9": "a"}, "character not allowed"),
    ("Resources|0|Details|Other", {f"k{i}": "v" for i in range(51)}, "more than 50 properties"),
    ("Resources|0|Details|Other", {"k" * 128: "v"}, "property name"),
    ("Resources|0|Details|Other", {"": "v"}, "property name"),
    ("Resources|0|Details|Other", {"pid": 5}, "data.Resources[0].Details.Other['pid'] should be string"),
    ("Resources|0|Details|Other", {"tty": True}, "should be string"),
    ("Resources|0|Details|Other", {"tty": None}, "should be string"),
    ("Resources|0|Details|AwsEc2Instance", {"Type": "m5"}, "oneOf"),
    (f"{C}|Privileged", "false", "should be boolean"),
    (f"{C}|VolumeMounts", {}, "should be array"),
    ("Resources|1|Details|AwsEksCluster|ClusterStatus", "OK", "allowed values"),
    ("Resources|1|Details|AwsEksCluster|ResourcesVpcConfig|SubnetIds", ["s"] * 6, "more than 5 items"),
    ("Resources|1|Details|AwsEksCluster|ResourcesVpcConfig|SecurityGroupIds", ["s"] * 6, "more than 5 items"),
    (
        "Resources|1|Details|AwsEksCluster|Logging|ClusterLogging",
        [{"Enabled": True}] * 26,
        "more than 25 items",
    ),
    (
        "Resources|2|Details|AwsEc2Instance|IpV4Addresses",
        ["10.0.0.1"] * 11,
        "IpV4Addresses should NOT have more than 10",
    ),
    ("Resources|2|Details|AwsEc2Instance|IpV4Addresses", ["::1"], "ipv4"),
    ("Resources|2|Details|AwsEc2Instance|IpV6Addresses", ["::1"] * 11, "more than 10 items"),
    ("ProductFields", {f"k{i}": "v" for i in range(51)}, "more than 50 properties"),
    ("ProductFields", {"k" * 129: "v"}, "property name"),
    ("ProductFields", {"a[0]": "v"}, "character not allowed"),
    ("ProductFields", {"aws/x": "v"}, "reserved"),
    ("ProductFields", {"k": 1}, "should be string"),
    ("ProductFields", {"k": ["v"]}, "should be string"),
    ("ProductFields", [], "should be object"),
    ("UserDefinedFields", {"k": "x" * 1025}, "longer than 1024"),
    ("SourceUrl", "not a url", "uri"),
    ("Remediation|Recommendation|Url", "falco.org/docs", "uri"),
    ("Process|Pid", "12", "should be integer"),
    ("Process|Pid", -1, "should be >= 0"),
    ("Process|ParentPid", 2_147_483_648, "should be <= 2147483647"),
    ("Network|Direction", "out", "allowed values"),
    ("Network|SourceIpV4", "10.0.0.256", "ipv4"),
    ("Network|DestinationIpV6", "1.2.3.4", "ipv6"),
    ("Network|DestinationPort", "443", "should be integer"),
    ("Network|DestinationPort", 65_536, "should be <= 65535"),
    ("Action|ActionType", "EXEC", "allowed values"),
    ("Action|ActionType", ..., "should have required property 'ActionType'"),
    ("Action|ActionType", "AWS_API_CALL", "AwsApiCallAction"),
    ("Action|NetworkConnectionAction|ConnectionDirection", "INBOUND", "allowed values"),
    ("Action|NetworkConnectionAction|Blocked", 0, "should be boolean"),
    ("Action|NetworkConnectionAction|RemoteIpDetails|IpAddressV4", "::1", "ipv4"),
    ("Action", {"ActionType": "AWS_API_CALL", "AwsApiCallAction": {"CallerType": "user"}}, "allowed values"),
    ("Action", {"ActionType": "AWS_API_CALL", "AwsApiCallAction": {"Api": "x" * 129}}, "longer than 128"),
    ("Malware", [{"Name": "x"}] * 6, "more than 5 items"),
    ("Malware|0|Type", "BAD", "allowed values"),
    ("Malware|0|State", "GONE", "allowed values"),
    ("Threats", [], "fewer than 1 items"),
    ("Threats", [{"Name": "x"}] * 33, "more than 32 items"),
    ("Threats|0|FilePaths", [{"FilePath": "x"}] * 6, "more than 5 items"),
    ("ThreatIntelIndicators", [{"Value": "x"}] * 6, "more than 5 items"),
    ("ThreatIntelIndicators|0|Type", "IP", "allowed values"),
    ("ThreatIntelIndicators|0|Category", "X", "allowed values"),
    (
        "FindingProviderFields|RelatedFindings",
        [{"ProductArn": PRODUCT, "Id": "x"}] * 11,
        "more than 10 items",
    ),
    ("Note", {"Text": "x", "UpdatedBy": "me"}, "should have required property 'UpdatedAt'"),
    ("VerificationState", "TRUE_POSITIVE", "allowed values"),
    ("RecordState", "CLOSED", "allowed values"),
    ("ProductArn", "default", "shorter than 12"),
    ("ProductArn", PRODUCT.replace("arn:aws:", "arn:aws-cn:"), "data.ProductArn should be equal to constant"),
    ("ProductArn", PRODUCT.replace(REGION, "us-east-1"), "data.ProductArn should be equal to constant"),
    ("ProductArn", PRODUCT.replace("/default", "/falco"), "data.ProductArn should be equal to constant"),
]


@pytest.mark.parametrize(
    ("path", "value", "text"),
    BAD,
    ids=[f"{i}-{path.rpartition('|')[2] or path}" for i, (path, _, _) in enumerate(BAD)],
)
async def test_bad_finding_fails_alone_with_the_reason(
    aws: FakeAws, hub: Any, path: str, value: Any, text: str
) -> None:
    """A bad finding is reported with HTTP 200, and its good neighbour is stored."""
    answer = await send(hub, "BatchImportFindings", {"Findings": [changed(path, value), finding(Id="good")]})
    assert (answer["SuccessCount"], answer["FailedCount"]) == (1, 1)
    failure = answer["FailedFindings"][0]
    assert failure["ErrorCode"] == "InvalidInput"
    assert failure["ErrorMessage"].startswith("Finding does not adhere to Amazon Finding Format. data")
    assert text in failure["ErrorMessage"]
    assert set(aws.findings) == {"good"}
    assert len(aws.validation_errors) == 1
    assert text in aws.validation_errors[0]


@pytest.mark.parametrize(("path", "most"), LONG.items())
async def test_longest_texts_are_counted_in_characters(aws: FakeAws, hub: Any, path: str, most: int) -> None:
    """The limit itself is allowed, and a character is one whatever its bytes."""
    answer = await send(hub, "BatchImportFindings", {"Findings": [changed(path, "\U0001f600" * most)]})
    assert answer["FailedFindings"] == []


@pytest.mark.parametrize(
    "moment",
    [
        "2027-01-15T08:00:00Z",
        "2027-01-15t08:00:00z",
        "2027-01-15T08:00:00.123456789Z",
        "2027-01-15T08:00:00+05:30",
        "2027-01-15T08:00:00-0800",
        "2027-01-15T08:00:00+18:00",
        "2027-01-15T23:59:60Z",
    ],
)
async def test_timestamps_of_the_format_pass(hub: Any, moment: str) -> None:
    answer = await send(hub, "BatchImportFindings", {"Findings": [finding(UpdatedAt=moment)]})
    assert answer["FailedFindings"] == []


async def test_top_level_severity_and_types_do_without_provider_fields(aws: FakeAws, hub: Any) -> None:
    """The older form is filled up to the newer one."""
    old = finding(Severity={"Normalized": 75}, Types=["Effects"])
    del old["FindingProviderFields"]
    await hub.batch_import_findings(Findings=[old])
    assert aws.validation_errors == []
    assert aws.findings["falco/1"]["FindingProviderFields"] == {
        "Severity": {"Label": "HIGH"},
        "Types": ["Effects"],
    }


async def test_every_other_details_object_is_checked_against_the_service_model(hub: Any) -> None:
    details = {"AwsIamAccessKey": {"UserName": "eve", "Bogus": 1}}
    answer = await send(hub, "BatchImportFindings", {"Findings": [changed("Resources|0|Details", details)]})
    assert (
        "AwsIamAccessKey should NOT have additional properties" in answer["FailedFindings"][0]["ErrorMessage"]
    )


@pytest.mark.parametrize("bad", [None, 5, "x", []])
async def test_finding_that_is_no_object_fails_alone(aws: FakeAws, hub: Any, bad: Any) -> None:
    answer = await send(hub, "BatchImportFindings", {"Findings": [bad, finding()]})
    assert answer["FailedFindings"][0]["ErrorMessage"].endswith("data should be object")
    assert answer["SuccessCount"] == 1


async def test_all_faults_of_a_finding_are_named_at_once(hub: Any) -> None:
    answer = await send(hub, "BatchImportFindings", {"Findings": [finding(Title="", Description=5)]})
    text = answer["FailedFindings"][0]["ErrorMessage"]
    assert "data.Title should NOT be shorter" in text
    assert "data.Description should be string" in text


async def test_finding_over_240_kilobytes_fails_alone(hub: Any) -> None:
    big = finding(Id="big", UserDefinedFields={"k": "x" * 240_000})
    answer = await hub.batch_import_findings(Findings=[big, finding()])
    assert [(f["Id"], f["ErrorCode"]) for f in answer["FailedFindings"]] == [("big", "FindingSizeExceeded")]


async def test_second_finding_with_the_same_id_in_a_call_is_flagged(aws: FakeAws, hub: Any) -> None:
    answer = await hub.batch_import_findings(Findings=[finding(), finding()])
    assert answer["FailedFindings"][0]["ErrorCode"] == "DuplicatedFindingIdentifier"
    assert aws.validation_errors


async def test_partner_product_that_is_not_enabled_is_invalid_access(hub: Any) -> None:
    arn = f"arn:aws:securityhub:{REGION}::product/falco/falco"
    answer = await hub.batch_import_findings(Findings=[finding(ProductArn=arn)])
    assert answer["FailedFindings"][0]["ErrorCode"] == "InvalidAccess"


# --- Security Hub: whole calls and stored findings --------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"Findings": []}, "InvalidInputException"),
        ({"Findings": [finding()] * 101}, "InvalidInputException"),
        ({"Findings": {}}, "InvalidInputException"),
        ({}, "InvalidInputException"),
        ({"Findings": [finding()], "Extra": 1}, "InvalidInputException"),
        (
            {"Findings": [finding(Id=str(i), Description="x" * 70_000) for i in range(90)]},
            "InvalidInputException",
        ),
        (b'{"Findings": [{"Id": NaN}]}', "SerializationException"),
        (b"\xff", "SerializationException"),
        (b"[]", "SerializationException"),
    ],
    ids=[
        "none",
        "101",
        "no-list",
        "no-member",
        "unknown-member",
        "6-megabytes",
        "nan",
        "no-utf8",
        "no-object",
    ],
)
async def test_bad_call_is_refused_as_a_whole(aws: FakeAws, hub: Any, body: Any, code: str) -> None:
    assert (await refused(send(hub, "BatchImportFindings", body)))[:2] == (code, 400)
    assert not aws.findings
    assert aws.validation_errors


@pytest.mark.parametrize(
    "changes",
    [{"AwsAccountId": "999999999999"}, {"ProductArn": PRODUCT.replace(ACCOUNT, "999999999999")}],
    ids=["account", "product"],
)
async def test_one_foreign_account_denies_the_whole_call(
    aws: FakeAws, hub: Any, changes: dict[str, str]
) -> None:
    answer = await refused(hub.batch_import_findings(Findings=[finding(), finding(Id="2", **changes)]))
    assert answer[:2] == ("AccessDeniedException", 403)
    assert "securityhub:BatchImportFindings on resource: arn:aws:securityhub" in answer[2]
    assert not aws.findings


async def test_hundred_findings_are_taken_and_read_back_in_pages(aws: FakeAws, hub: Any) -> None:
    batch = [finding(Id=f"falco/{i:03}") for i in range(100)]
    answer = await hub.batch_import_findings(Findings=batch)
    assert (answer["SuccessCount"], answer["FailedCount"], answer["FailedFindings"]) == (100, 0, [])
    assert aws.finding_writes == 100
    first = await hub.get_findings(MaxResults=60)
    rest = await hub.get_findings(MaxResults=60, NextToken=first["NextToken"])
    assert [f["Id"] for f in first["Findings"] + rest["Findings"]] == [f["Id"] for f in batch]
    assert "NextToken" not in rest
    one = await hub.get_findings(Filters={"Id": [{"Value": "falco/007", "Comparison": "EQUALS"}]})
    assert [f["Id"] for f in one["Findings"]] == ["falco/007"]
    assert aws.validation_errors == []


async def test_hundred_findings_are_validated_quickly(aws: FakeAws) -> None:
    """Under 50 ms on an idle machine; here only a gross slowdown fails."""
    caller = aws.credentials[aws.access_key].caller
    batch = [finding(Id=str(i)) for i in range(100)]
    aws._hub.batch_import_findings({"Findings": batch[:1]}, caller, 0)
    start = time.perf_counter()
    aws._hub.batch_import_findings({"Findings": batch}, caller, 0)
    assert time.perf_counter() - start < 0.25


async def test_update_is_ignored_unless_updated_at_is_newer(aws: FakeAws, hub: Any) -> None:
    """Equal after rounding to milliseconds, in another zone, or older: counted as success, not stored."""
    await hub.batch_import_findings(Findings=[finding()])
    for moment in (
        "2027-01-15T08:00:00.123Z",
        "2027-01-15T08:00:00.1232Z",
        "2027-01-15T09:00:00.123+01:00",
        "2026-12-31T23:59:59Z",
    ):
        answer = await hub.batch_import_findings(Findings=[finding(UpdatedAt=moment, Title="other")])
        assert answer["SuccessCount"] == 1
    assert (aws.finding_writes, aws.finding_ignored) == (1, 4)
    assert aws.findings["falco/1"]["Title"] == "Terminal shell in container"
    await hub.batch_import_findings(Findings=[finding(UpdatedAt="2027-01-15T08:00:00.124Z", Title="other")])
    assert aws.finding_writes == 2
    assert aws.findings["falco/1"]["Title"] == "other"


async def test_provider_fields_are_copied_to_the_top_level(aws: FakeAws, hub: Any) -> None:
    await hub.batch_import_findings(Findings=[finding()])
    stored = aws.findings["falco/1"]
    assert stored["Severity"] == {"Label": "MEDIUM", "Original": "Notice", "Normalized": 40}
    assert stored["Types"] == ["TTPs/Execution/T1059", "Unusual Behaviors"]
    assert stored["Workflow"] == {"Status": "NEW"}
    assert stored["Region"] == REGION


async def test_customer_fields_are_frozen_after_creation(aws: FakeAws, hub: Any) -> None:
    note = {"Text": "first", "UpdatedBy": "falco", "UpdatedAt": "2027-01-15T08:00:00Z"}
    await hub.batch_import_findings(Findings=[finding(Note=note, UserDefinedFields={"k": "first"})])
    later: dict[str, Any] = {"UpdatedAt": "2027-01-16T08:00:00Z", "Workflow": {"Status": "RESOLVED"}}
    later |= {
        "Note": note | {"Text": "second"},
        "UserDefinedFields": {"k": "second"},
        "VerificationState": "UNKNOWN",
    }
    await hub.batch_import_findings(Findings=[finding(**later)])
    stored = aws.findings["falco/1"]
    assert aws.finding_writes == 2
    assert stored["Note"]["Text"] == stored["UserDefinedFields"]["k"] == "first"
    assert stored["Workflow"] == {"Status": "NEW"}
    assert "VerificationState" not in stored


async def test_reopening_an_archived_finding_resets_its_workflow(aws: FakeAws, hub: Any) -> None:
    await hub.batch_import_findings(Findings=[finding(RecordState="ARCHIVED")])
    aws.findings["falco/1"]["Workflow"] = {"Status": "RESOLVED"}
    await hub.batch_import_findings(Findings=[finding(UpdatedAt="2027-01-16T08:00:00Z")])
    assert aws.findings["falco/1"]["Workflow"] == {"Status": "NEW"}


async def test_disabled_hub_refuses_in_either_shape(aws: FakeAws, hub: Any) -> None:
    aws.hub_enabled = False
    code, status, text = await refused(hub.batch_import_findings(Findings=[finding()]))
    assert (code, status) == ("InvalidAccessException", 401)
    assert "not subscribed" in text
    aws.hub_disabled_shape = "finding"
    answer = await hub.batch_import_findings(Findings=[finding(), finding(Id="2")])
    assert [f["ErrorCode"] for f in answer["FailedFindings"]] == ["InvalidAccess"] * 2
    assert (await refused(hub.describe_hub()))[0] == "InvalidAccessException"
    await hub.enable_security_hub()
    assert (await hub.describe_hub())["HubArn"] == f"arn:aws:securityhub:{REGION}:{ACCOUNT}:hub/default"
    assert (await refused(hub.enable_security_hub()))[:2] == ("ResourceConflictException", 409)
    assert (await hub.list_enabled_products_for_import())["ProductSubscriptions"] == []
    await hub.disable_security_hub()
    assert not aws.hub_enabled
    assert not aws.findings
    assert aws.validation_errors == []


async def test_import_is_throttled_at_ten_a_second_after_a_burst_of_thirty(
    aws: FakeAws, hub: Any, clock: Clock
) -> None:
    for _ in range(30):
        await hub.batch_import_findings(Findings=[finding()])
    assert (await refused(hub.batch_import_findings(Findings=[finding()])))[:2] == (
        "TooManyRequestsException",
        429,
    )
    clock.now += 0.25
    for _ in range(2):
        await hub.batch_import_findings(Findings=[finding()])
    assert (await refused(hub.batch_import_findings(Findings=[finding()])))[0] == "TooManyRequestsException"
    aws.rate_limits = False
    await hub.batch_import_findings(Findings=[finding()])


async def test_chosen_findings_can_be_made_to_fail(aws: FakeAws, hub: Any) -> None:
    fault = aws.fail_findings(lambda f: f["Id"] == "2", code="InternalFailure", times=1)
    batch = [finding(), finding(Id="2")]
    answer = await hub.batch_import_findings(Findings=batch)
    assert answer["FailedFindings"] == [
        {"Id": "2", "ErrorCode": "InternalFailure", "ErrorMessage": "injected"}
    ]
    answer = await hub.batch_import_findings(Findings=batch)
    assert answer["FailedCount"] == 0
    assert fault.hits == 1
    assert set(aws.findings) == {"falco/1", "2"}
    assert aws.validation_errors == []


# --- CloudWatch Logs --------------------------------------------------------------------------------

GOOD = {"logGroupName": "/falco/alerts", "logStreamName": "a", "logEvents": events(0)}
BAD_LOGS: list[tuple[str, dict[str, Any], str, str]] = [
    ("CreateLogGroup", {}, "InvalidParameterException", "'logGroupName'"),
    ("CreateLogGroup", {"logGroupName": ""}, "InvalidParameterException", "greater than or equal to 1"),
    ("CreateLogGroup", {"logGroupName": "a" * 513}, "InvalidParameterException", "less than or equal to 512"),
    ("CreateLogGroup", {"logGroupName": "a b"}, "InvalidParameterException", "regular expression pattern"),
    (
        "CreateLogGroup",
        {"logGroupName": "gr\u00f6up"},
        "InvalidParameterException",
        "regular expression pattern",
    ),
    ("CreateLogGroup", {"logGroupName": "aws/x"}, "InvalidParameterException", "reserved"),
    ("CreateLogGroup", {"logGroupName": 5}, "SerializationException", "String"),
    ("CreateLogGroup", {"logGroupName": "g", "logGroupClass": "CHEAP"}, "InvalidParameterException", "enum"),
    ("CreateLogGroup", {"logGroupName": "g", "kmsKeyId": "alias/x"}, "InvalidParameterException", "KMS"),
    ("CreateLogGroup", {"logGroupName": "g", "tags": {}}, "InvalidParameterException", "tags"),
    ("CreateLogGroup", {"logGroupName": "g", "tags": {"aws:x": "y"}}, "InvalidParameterException", "tags"),
    ("CreateLogGroup", {"logGroupName": "g", "tags": {"k": "a,b"}}, "InvalidParameterException", "tags"),
    ("CreateLogGroup", {"logGroupName": "g", "retention": 1}, "InvalidParameterException", "Unknown"),
    (
        "CreateLogGroup",
        {"logGroupName": "/falco/alerts"},
        "ResourceAlreadyExistsException",
        "log group already",
    ),
    ("CreateLogStream", {**GOOD, "logStreamName": "a"}, "InvalidParameterException", "Unknown"),
    *(
        ("CreateLogStream", {"logGroupName": "/falco/alerts", "logStreamName": name}, code, text)
        for name, code, text in (
            ("", "InvalidParameterException", "greater"),
            ("s" * 513, "InvalidParameterException", "less"),
            ("a:b", "InvalidParameterException", "[^:*]*"),
            ("a*", "InvalidParameterException", "[^:*]*"),
            ("a", "ResourceAlreadyExistsException", "log stream already"),
        )
    ),
    (
        "CreateLogStream",
        {"logGroupName": "g", "logStreamName": "s"},
        "ResourceNotFoundException",
        "log group",
    ),
    ("PutRetentionPolicy", {"logGroupName": "/falco/alerts"}, "InvalidParameterException", "null"),
    (
        "PutRetentionPolicy",
        {"logGroupName": "g", "retentionInDays": 7},
        "ResourceNotFoundException",
        "log group",
    ),
    *(
        (
            "PutRetentionPolicy",
            {"logGroupName": "/falco/alerts", "retentionInDays": d},
            "InvalidParameterException",
            "enum",
        )
        for d in (0, 2, 31, 364, 3654, -1)
    ),
    ("DescribeLogGroups", {"limit": 51}, "InvalidParameterException", "50"),
    ("DescribeLogGroups", {"nextToken": "x"}, "InvalidParameterException", "nextToken"),
    (
        "DescribeLogGroups",
        {"logGroupNamePrefix": "a", "logGroupNamePattern": "a"},
        "InvalidParameterException",
        "exclusive",
    ),
    ("DescribeLogStreams", {"logGroupName": "g"}, "ResourceNotFoundException", "log group"),
    (
        "DescribeLogStreams",
        {"logGroupName": "/falco/alerts", "logStreamNamePrefix": "a", "orderBy": "LastEventTime"},
        "InvalidParameterException",
        "LastEventTime",
    ),
    ("FilterLogEvents", {"logGroupName": "g"}, "ResourceNotFoundException", "log group"),
    (
        "FilterLogEvents",
        {"logGroupName": "/falco/alerts", "logStreamNames": ["b"]},
        "ResourceNotFoundException",
        "stream",
    ),
    (
        "FilterLogEvents",
        {"logGroupName": "/falco/alerts", "limit": 10_001},
        "InvalidParameterException",
        "10000",
    ),
    (
        "FilterLogEvents",
        {"logGroupName": "/falco/alerts", "startTime": 2, "endTime": 1},
        "InvalidParameterException",
        "less",
    ),
    (
        "GetLogEvents",
        {"logGroupName": "/falco/alerts", "logStreamName": "b"},
        "ResourceNotFoundException",
        "stream",
    ),
    ("PutLogEvents", {**GOOD, "logGroupName": "g"}, "ResourceNotFoundException", "log group does not exist"),
    (
        "PutLogEvents",
        {**GOOD, "logStreamName": "b"},
        "ResourceNotFoundException",
        "log stream does not exist",
    ),
    ("PutLogEvents", {**GOOD, "logStreamName": "a:b"}, "InvalidParameterException", "logStreamName"),
    ("PutLogEvents", {**GOOD, "bogus": 1}, "InvalidParameterException", "Unknown"),
    *(
        ("PutLogEvents", {**GOOD, "logEvents": bad}, code, text)
        for bad, code, text in (
            (None, "InvalidParameterException", "logEvents"),
            ([], "InvalidParameterException", "greater than or equal to 1"),
            ({}, "SerializationException", "List"),
            (events(*[0] * 10_001, message="x"), "InvalidParameterException", "less than or equal to 10000"),
            ([{"timestamp": MS}], "InvalidParameterException", "logEvents.1.member.message"),
            ([{"message": "x"}], "InvalidParameterException", "logEvents.1.member.timestamp"),
            ([{"timestamp": MS, "message": ""}], "InvalidParameterException", "logEvents.1.member.message"),
            (
                [{"timestamp": -1, "message": "x"}],
                "InvalidParameterException",
                "logEvents.1.member.timestamp",
            ),
            ([{"timestamp": str(MS), "message": "x"}], "SerializationException", "wrong type"),
            ([{"timestamp": MS + 0.5, "message": "x"}], "SerializationException", "wrong type"),
            ([{"timestamp": MS, "message": {"a": 1}}], "SerializationException", "wrong type"),
            ([{"timestamp": MS, "message": "x", "id": 1}], "InvalidParameterException", "Unknown"),
            ([{"timestamp": MS, "message": "\ud83d"}], "SerializationException", "Unicode"),
            (["x"], "SerializationException", "InputLogEvent"),
            (events(1, 0), "InvalidParameterException", "must be in chronological order"),
            (events(-25 * HOUR - 1, -HOUR), "InvalidParameterException", "cannot span more than 24 hours"),
            (
                events(0, message="x" * 1_048_551),
                "InvalidParameterException",
                "Log event too large: 1048577 bytes",
            ),
            (
                events(0, 0, message="x" * 524_263),
                "InvalidParameterException",
                "Upload too large: 1048578 bytes",
            ),
            (
                events(0, message="\u20ac" * 349_517),
                "InvalidParameterException",
                "Log event too large: 1048577 bytes",
            ),
        )
    ),
    (
        "PutLogEvents",
        {**GOOD, "entity": {"keyAttributes": {"Type": "Service"}}},
        "InvalidParameterException",
        "keyAttributes",
    ),
    ("PutBogus", {}, "UnknownOperationException", "PutBogus"),
]


@pytest.mark.parametrize(
    ("operation", "body", "code", "text"),
    BAD_LOGS,
    ids=[f"{i}-{o}" for i, (o, _, _, _) in enumerate(BAD_LOGS)],
)
async def test_bad_logs_request_is_refused(
    aws: FakeAws, stream: dict[str, str], operation: str, body: dict[str, Any], code: str, text: str
) -> None:
    """HTTP 400 with code and text in JSON 1.1 form, and nothing is stored."""
    answer = await signed(aws, "logs", body, target=operation)
    error = json.loads(answer.text)
    assert (answer.status, error["__type"]) == (400, code)
    assert answer.headers["Content-Type"] == "application/x-amz-json-1.1"
    assert text in error["message"]
    assert aws.events() == []
    assert bool(aws.validation_errors) is not code.startswith("Resource")


async def test_largest_batches_pass(aws: FakeAws, logs: Any, stream: dict[str, str]) -> None:
    """10,000 events, 1,048,576 bytes with 26 for each event, and a message of 1,048,550 bytes."""
    size = (1_048_576 - 26 * 10_000) // 10_000
    await logs.put_log_events(**stream, logEvents=events(*range(10_000), message="x" * size))
    await logs.put_log_events(**stream, logEvents=events(0, message="x" * 1_048_550))
    await logs.put_log_events(**stream, logEvents=events(0, 0, message="x" * 524_262))
    await logs.put_log_events(**stream, logEvents=events(-24 * HOUR, 0))
    assert [call.count for call in aws.calls if call.operation == "PutLogEvents"] == [10_000, 1, 2, 2]
    assert len(aws.events()) == 10_005


async def test_ten_thousand_events_are_served_quickly(aws: FakeAws, stream: dict[str, str]) -> None:
    """Under 100 ms on an idle machine; here only a gross slowdown fails."""
    body = {**stream, "logEvents": events(*range(10_000))}
    start = time.process_time()
    aws._logs.put_log_events(body)
    assert time.process_time() - start < 1.0


OLD, NEW = -14 * DAY, 2 * HOUR


@pytest.mark.parametrize(
    ("retention", "offsets", "rejected", "stored"),
    [
        (None, [OLD], {}, 1),
        (None, [NEW], {}, 1),
        (None, [OLD - 1, 0, 1], {"tooOldLogEventEndIndex": 1}, 2),
        (None, [OLD - 9, OLD - 1, 0], {"tooOldLogEventEndIndex": 2}, 1),
        (None, [0, NEW + 1, NEW + 9], {"tooNewLogEventStartIndex": 1}, 1),
        (None, [OLD - 1, 0, NEW + 1], {"tooOldLogEventEndIndex": 1, "tooNewLogEventStartIndex": 2}, 1),
        (None, [OLD - 2, OLD - 1], {"tooOldLogEventEndIndex": 2}, 0),
        (None, [NEW + 1, NEW + 2], {"tooNewLogEventStartIndex": 0}, 0),
        (None, [OLD - 1, NEW + 1], {"tooOldLogEventEndIndex": 1, "tooNewLogEventStartIndex": 1}, 0),
        (3, [-3 * DAY - 1, -3 * DAY, -3 * DAY + 5], {"expiredLogEventEndIndex": 1}, 2),
        (3, [OLD - 1, -4 * DAY, 0], {"tooOldLogEventEndIndex": 1, "expiredLogEventEndIndex": 2}, 1),
        (30, [OLD - 1, 0], {"tooOldLogEventEndIndex": 1}, 1),
    ],
)
async def test_events_outside_the_window_are_rejected_by_index(
    aws: FakeAws,
    logs: Any,
    stream: dict[str, str],
    retention: int | None,
    offsets: list[int],
    rejected: dict[str, int],
    stored: int,
) -> None:
    """The old end indexes are exclusive, the new start index inclusive; rejected events stretch no span."""
    if retention is not None:
        await logs.put_retention_policy(logGroupName="/falco/alerts", retentionInDays=retention)
    answer = await logs.put_log_events(**stream, logEvents=events(*offsets))
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert answer.get("rejectedLogEventsInfo", {}) == rejected
    assert len(aws.events()) == stored


async def test_window_moves_with_the_clock(
    aws: FakeAws, logs: Any, stream: dict[str, str], clock: Clock
) -> None:
    clock.now += 14 * 86_400 + 1
    answer = await logs.put_log_events(**stream, logEvents=events(0))
    assert answer["rejectedLogEventsInfo"] == {"tooOldLogEventEndIndex": 1}


async def test_sequence_tokens_are_ignored_and_retries_duplicate(
    aws: FakeAws, logs: Any, stream: dict[str, str]
) -> None:
    for _ in range(2):
        await logs.put_log_events(**stream, logEvents=events(0), sequenceToken="old")
    assert [event.message for event in aws.events()] == ["hello", "hello"]


async def test_gzip_bodies_are_accepted(aws: FakeAws, stream: dict[str, str]) -> None:
    body = gzip.compress(json.dumps({**stream, "logEvents": events(0)}).encode())
    answer = await signed(aws, "logs", body, target="PutLogEvents", headers={"Content-Encoding": "gzip"})
    assert answer.status == 200
    assert aws.calls[-1].body_bytes == len(body)
    assert len(aws.events()) == 1
    broken = await signed(aws, "logs", body[:-9], target="PutLogEvents", headers={"Content-Encoding": "gzip"})
    assert (broken.status, json.loads(broken.text)["__type"]) == (400, "SerializationException")


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"Type": "Service", "Name": "falco"}, None),
        ({"Type": "Service", "Nickname": "falco"}, "InvalidKeyAttributes"),
        ({"Environment": "eks", "Name": "falco"}, "MissingRequiredFields"),
    ],
)
async def test_bad_entity_is_reported_but_events_are_stored(
    aws: FakeAws, logs: Any, stream: dict[str, str], keys: dict[str, str], error: str | None
) -> None:
    answer = await logs.put_log_events(**stream, logEvents=events(0), entity={"keyAttributes": keys})
    assert answer.get("rejectedEntityInfo", {}).get("errorType") == error
    assert len(aws.events()) == 1


async def test_group_settings_are_kept_and_shown(aws: FakeAws, logs: Any) -> None:
    key = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1"
    await logs.create_log_group(
        logGroupName="g", kmsKeyId=key, logGroupClass="INFREQUENT_ACCESS", tags={"a": "b"}
    )
    await logs.put_retention_policy(logGroupName="g", retentionInDays=3653)
    group = aws.groups["g"]
    assert (group.retention_days, group.kms_key_id, group.group_class) == (3653, key, "INFREQUENT_ACCESS")
    assert group.tags == {"a": "b"}
    shown = (await logs.describe_log_groups(logGroupNamePrefix="g"))["logGroups"][0]
    assert (shown["retentionInDays"], shown["logGroupClass"], shown["kmsKeyId"]) == (
        3653,
        "INFREQUENT_ACCESS",
        key,
    )
    await logs.delete_retention_policy(logGroupName="g")
    assert group.retention_days is None
    await logs.delete_log_group(logGroupName="g")
    assert aws.groups == {}


async def test_groups_and_streams_are_listed_in_pages(aws: FakeAws, logs: Any) -> None:
    aws.rate_limits = False
    for name in ("b", "a2", "a1", "a3"):
        await logs.create_log_group(logGroupName=name)
        await logs.create_log_stream(logGroupName="b", logStreamName=name)
    first = await logs.describe_log_groups(logGroupNamePrefix="a", limit=2)
    rest = await logs.describe_log_groups(logGroupNamePrefix="a", nextToken=first["nextToken"])
    assert [g["logGroupName"] for g in first["logGroups"] + rest["logGroups"]] == ["a1", "a2", "a3"]
    assert "nextToken" not in rest
    streams = await logs.describe_log_streams(logGroupName="b", logStreamNamePrefix="a", descending=True)
    assert [s["logStreamName"] for s in streams["logStreams"]] == ["a3", "a2", "a1"]
    await logs.delete_log_stream(logGroupName="b", logStreamName="a1")
    assert "a1" not in aws.groups["b"].streams


async def test_events_are_filtered_by_time_stream_and_words_in_pages(
    aws: FakeAws, logs: Any, stream: dict[str, str]
) -> None:
    """Both ends of the time range belong to it, streams are merged by time, each event has its own id."""
    await logs.create_log_stream(logGroupName="/falco/alerts", logStreamName="b")
    await logs.put_log_events(**stream, logEvents=events(0, 2, 4, message="shell in a"))
    await logs.put_log_events(
        **stream | {"logStreamName": "b"}, logEvents=events(1, 3, 5, message="write in b")
    )
    seen: list[dict[str, Any]] = []
    token: dict[str, str] = {}
    while True:
        page = await logs.filter_log_events(
            logGroupName="/falco/alerts", startTime=MS + 1, endTime=MS + 4, limit=3, **token
        )
        seen += page["events"]
        if "nextToken" not in page:
            break
        token = {"nextToken": page["nextToken"]}
    assert [(e["timestamp"] - MS, e["logStreamName"]) for e in seen] == [
        (1, "b"),
        (2, "a"),
        (3, "b"),
        (4, "a"),
    ]
    assert len({e["eventId"] for e in seen}) == 4
    found = await logs.filter_log_events(logGroupName="/falco/alerts", filterPattern='"in a" shell')
    assert len(found["events"]) == 3
    tail = await logs.get_log_events(**stream, limit=2)
    assert [e["timestamp"] - MS for e in tail["events"]] == [2, 4]
    again = await logs.get_log_events(**stream, nextToken=tail["nextForwardToken"])
    assert again["nextForwardToken"] == tail["nextForwardToken"]
    head = await logs.get_log_events(**stream, nextToken=tail["nextBackwardToken"])
    assert [e["timestamp"] - MS for e in head["events"]] == [0]


@pytest.mark.parametrize(
    ("operation", "rate"), [("DescribeLogGroups", 10), ("CreateLogGroup", 10), ("CreateLogStream", 50)]
)
async def test_logs_throttle_with_http_400(
    aws: FakeAws, logs: Any, clock: Clock, operation: str, rate: int
) -> None:
    for number in range(rate):
        body = {"logGroupName": f"g{number}", "logStreamName": "s"}
        if operation == "CreateLogStream":
            aws._logs.create_log_group({"logGroupName": f"g{number}"})
        names = {"CreateLogGroup": 1, "CreateLogStream": 2}.get(operation, 0)
        await send(logs, operation, dict(list(body.items())[:names]))
    assert await refused(send(logs, operation, {})) == ("ThrottlingException", 400, "Rate exceeded")
    clock.now += 1
    code = (await refused(send(logs, operation, {"limit": 0})))[0]
    assert code == "InvalidParameterException"


# --- signatures -------------------------------------------------------------------------------------


class Answer:
    """What came back over plain HTTP."""

    def __init__(self, status: int, headers: Any, text: str) -> None:
        self.status, self.headers, self.text = status, headers, text


async def signed(
    aws: FakeAws,
    service: str,
    body: Any,
    *,
    target: str | None = None,
    path: str = "/",
    region: str = REGION,
    secret: str | None = None,
    headers: dict[str, str] | None = None,
    late: dict[str, str] | None = None,
    late_body: bytes | None = None,
) -> Answer:
    """Sign with botocore, send with aiohttp; the `late` things are slipped in after signing."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    if target is not None:
        sent |= {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": f"Logs_20140328.{target}"}
    request = AWSRequest(method="POST", url=aws.url + path, data=raw, headers=sent)
    SigV4Auth(Credentials(aws.access_key, secret or aws.secret_key), service, region).add_auth(request)
    sent = {**dict(request.headers.items()), **(late or {})}
    async with (
        aiohttp.ClientSession() as session,
        session.post(aws.url + path, data=late_body or raw, headers=sent) as answer,
    ):
        return Answer(answer.status, answer.headers, await answer.text())


SERVICES = [
    ("logs", "describe_log_groups", 400, "InvalidSignatureException", "UnrecognizedClientException"),
    ("securityhub", "describe_hub", 403, "InvalidSignatureException", "UnrecognizedClientException"),
    ("sts", "get_caller_identity", 403, "SignatureDoesNotMatch", "InvalidClientTokenId"),
]


@pytest.mark.parametrize(("service", "method", "status", "mismatch", "unknown"), SERVICES)
async def test_signature_of_each_service_is_verified(
    aws: FakeAws, connect: Connect, service: str, method: str, status: int, mismatch: str, unknown: str
) -> None:
    """Right key yes; wrong secret, wrong Region, unknown key, stray token and no signature no."""
    await getattr(await connect(aws, service), method)()
    for changes, code in (
        ({"aws_secret_access_key": "wrong"}, mismatch),
        ({"region_name": "us-east-1"}, mismatch),
        ({"aws_access_key_id": "AKIAUNKNOWN"}, unknown),
        ({"aws_session_token": "stray"}, unknown),
    ):
        client = await connect(aws, service, **changes)
        assert (await refused(getattr(client, method)()))[:2] == (code, status), changes
    client = await connect(aws, service, signature_version=UNSIGNED)
    code, got, _ = await refused(getattr(client, method)())
    assert got == status
    assert code.startswith("MissingAuthenticationToken")


@pytest.mark.parametrize(("service", "method", "status", "mismatch", "unknown"), SERVICES)
async def test_signatures_expire_after_five_minutes(
    connect: Connect, service: str, method: str, status: int, mismatch: str, unknown: str
) -> None:
    clock = Clock(time.time())
    async with FakeAws(clock=clock) as aws:
        client = await connect(aws, service)
        for skew, text in ((330, "Signature expired"), (-330, "Signature not yet current")):
            clock.now = time.time() + skew
            code, got, message = await refused(getattr(client, method)())
            assert (code, got) == (mismatch, status)
            assert text in message
        for skew in (270, -270):
            clock.now = time.time() + skew
            await getattr(client, method)()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"late_body": b'{"limit": 2}'}, "does not match"),
        ({"late": {"X-Amz-Target": "Logs_20140328.DescribeLogStreams"}}, "does not match"),
        ({"late": {"X-Amz-New": "1"}}, "must be a 'SignedHeader'"),
        ({"service": "securityhub"}, "correct service: 'logs'"),
        ({"region": "eu-west-2"}, "valid region"),
        ({"headers": {"X-Amz-Content-SHA256": hashlib.sha256(b"x").hexdigest()}}, "does not match"),
    ],
)
async def test_what_was_signed_must_be_what_is_sent(aws: FakeAws, changes: dict[str, Any], text: str) -> None:
    options = {"service": "logs", "body": b'{"limit": 1}', "target": "DescribeLogGroups", **changes}
    answer = await signed(aws, **options)
    assert answer.status == 400
    assert json.loads(answer.text)["__type"] == "InvalidSignatureException"
    assert text in json.loads(answer.text)["message"]


async def test_declared_body_hash_and_query_are_part_of_the_signature(aws: FakeAws) -> None:
    body = b'{"MaxResults": 1}'
    digest = {"X-Amz-Content-SHA256": hashlib.sha256(body).hexdigest()}
    answer = await signed(aws, "securityhub", body, path="/findings?b=%20x&a=1", headers=digest)
    assert (answer.status, json.loads(answer.text)) == (200, {"Findings": []})


async def test_errors_of_each_protocol_have_their_shape(aws: FakeAws) -> None:
    hub = await signed(aws, "securityhub", {"Findings": []}, path="/findings/import")
    assert hub.headers["x-amzn-ErrorType"] == "InvalidInputException"
    assert set(json.loads(hub.text)) == {"Message", "Code"}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    sts = await signed(aws, "sts", b"Action=Bogus&Version=2011-06-15", headers=form)
    assert sts.status == 404
    assert "<Code>UnknownOperationException</Code>" in sts.text
    assert (await signed(aws, "securityhub", {}, path="/nowhere")).status == 404
    wrong_type = await signed(
        aws, "securityhub", {}, path="/findings", headers={"Content-Type": "text/plain"}
    )
    assert wrong_type.status == 415


async def test_signatures_need_not_be_verified(connect: Connect) -> None:
    async with FakeAws(verify_signatures=False, clock=Clock(NOW)) as aws:
        sts = await connect(aws, "sts", aws_access_key_id="any", aws_secret_access_key="thing")
        assert (await sts.get_caller_identity())["Account"] == ACCOUNT


# --- STS --------------------------------------------------------------------------------------------

ROLE = f"arn:aws:iam::{ACCOUNT}:role/forwarder"
OTHER_ROLE = "arn:aws:iam::444455556666:role/path/lake"


def session_of(answer: dict[str, Any]) -> dict[str, str]:
    keys = answer["Credentials"]
    return {
        "aws_access_key_id": keys["AccessKeyId"],
        "aws_secret_access_key": keys["SecretAccessKey"],
        "aws_session_token": keys["SessionToken"],
    }


async def test_assumed_role_acts_for_its_account_until_it_expires(
    aws: FakeAws, connect: Connect, clock: Clock
) -> None:
    sts = await connect(aws, "sts")
    keys = session_of(await sts.assume_role(RoleArn=OTHER_ROLE, RoleSessionName="me", DurationSeconds=900))
    identity = await (await connect(aws, "sts", **keys)).get_caller_identity()
    assert identity["Account"] == "444455556666"
    assert identity["Arn"] == "arn:aws:sts::444455556666:assumed-role/lake/me"
    hub = await connect(aws, "securityhub", **keys)
    assert (await refused(hub.batch_import_findings(Findings=[finding()])))[0] == "AccessDeniedException"
    half = await connect(aws, "securityhub", **{**keys, "aws_session_token": "wrong"})
    assert (await refused(half.describe_hub()))[0] == "UnrecognizedClientException"
    clock.now += 900
    for service, method, code in (
        ("logs", "describe_log_groups", "ExpiredTokenException"),
        ("securityhub", "describe_hub", "ExpiredTokenException"),
        ("sts", "get_caller_identity", "ExpiredToken"),
    ):
        client = await connect(aws, service, **keys)
        assert (await refused(getattr(client, method)()))[0] == code


async def test_external_id_of_a_role_must_match(aws: FakeAws, connect: Connect) -> None:
    aws.roles[ROLE] = "secret-id"
    sts = await connect(aws, "sts")
    await sts.assume_role(RoleArn=ROLE, RoleSessionName="me", ExternalId="secret-id")
    for changes in ({}, {"ExternalId": "other"}, {"RoleArn": OTHER_ROLE, "ExternalId": "secret-id"}):
        request: dict[str, Any] = {"RoleArn": ROLE, "RoleSessionName": "me", **changes}
        code, status, text = await refused(sts.assume_role(**request))
        assert (code, status) == ("AccessDenied", 403)
        assert "sts:AssumeRole" in text
    for bad in (
        {"RoleSessionName": "a b"},
        {"RoleSessionName": "x"},
        {"DurationSeconds": 60},
        {"ExternalId": "?x"},
    ):
        request = {"RoleArn": ROLE, "RoleSessionName": "me", "ExternalId": "secret-id", **bad}
        assert (await refused(sts.assume_role(**request)))[:2] == ("ValidationError", 400)


def token(**claims: Any) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.c2ln"


async def test_web_identity_needs_a_token_and_no_signature(aws: FakeAws, connect: Connect) -> None:
    sts = await connect(aws, "sts", signature_version=UNSIGNED)
    request = {"RoleArn": ROLE, "RoleSessionName": "me"}
    answer = await sts.assume_role_with_web_identity(**request, WebIdentityToken=token(sub="sa", exp=NOW + 9))
    assert answer["SubjectFromWebIdentityToken"] == "sa"
    identity = await (await connect(aws, "sts", **session_of(answer))).get_caller_identity()
    assert identity["Arn"] == f"arn:aws:sts::{ACCOUNT}:assumed-role/forwarder/me"
    for bad, code in (
        ("nonsense", "InvalidIdentityToken"),
        (token(exp=int(NOW)), "ExpiredTokenException"),
        ("x", "ValidationError"),
    ):
        call = sts.assume_role_with_web_identity(**request, WebIdentityToken=bad)
        assert (await refused(call))[:2] == (code, 400)


# --- faults, life and the program -------------------------------------------------------------------


async def test_failures_hit_as_often_as_planned_and_only_what_they_match(
    aws: FakeAws, logs: Any, stream: dict[str, str]
) -> None:
    poison = aws.fail(
        "PutLogEvents",
        times=None,
        status=400,
        code="InvalidParameterException",
        when=lambda body: any("poison" in e["message"] for e in body["logEvents"]),
    )
    for _ in range(2):
        call = logs.put_log_events(**stream, logEvents=events(0, message="poison"))
        assert await refused(call) == ("InvalidParameterException", 400, "injected")
    await logs.put_log_events(**stream, logEvents=events(0))
    assert poison.hits == 2
    poison.clear()
    await logs.put_log_events(**stream, logEvents=events(0, message="poison"))
    aws.fail("*", code="ServiceUnavailableException", status=503)
    assert (await refused(logs.describe_log_groups()))[:2] == ("ServiceUnavailableException", 503)
    await logs.describe_log_groups()
    assert aws.validation_errors == []
    assert [c.error for c in aws.calls].count("InvalidParameterException") == 2


async def test_reset_loses_the_answer_and_on_demand_only_the_answer(
    aws: FakeAws, logs: Any, stream: dict[str, str]
) -> None:
    for after_processing, stored in ((False, 0), (True, 1)):
        aws.reset("PutLogEvents", after_processing=after_processing)
        with pytest.raises((ConnectionClosedError, EndpointConnectionError, HTTPClientError)):
            await logs.put_log_events(**stream, logEvents=events(0))
        assert len(aws.events()) == stored
        assert (aws.calls[-1].status, aws.calls[-1].error) == (0, "reset")
    await logs.put_log_events(**stream, logEvents=events(0))


async def test_truncated_answer_ends_half_way(aws: FakeAws, hub: Any) -> None:
    aws.truncate("BatchImportFindings")
    with pytest.raises((ConnectionClosedError, EndpointConnectionError, HTTPClientError)):
        await hub.batch_import_findings(Findings=[finding()])
    assert aws.finding_writes == 1
    await hub.batch_import_findings(Findings=[finding()])


async def test_hanging_request_runs_into_the_timeout_without_effect(
    aws: FakeAws, connect: Connect, stream: dict[str, str]
) -> None:
    client = await connect(aws, "logs", read_timeout=0.2)
    fault = aws.hang("PutLogEvents")
    with pytest.raises(HTTPClientError):
        await client.put_log_events(**stream, logEvents=events(0))
    fault.clear()
    await client.put_log_events(**stream, logEvents=events(1))
    assert [event.timestamp - MS for event in aws.events()] == [1]
    assert fault.hits == 1


async def test_cleared_hang_serves_the_waiting_request(aws: FakeAws, logs: Any) -> None:
    fault = aws.hang("DescribeLogGroups")
    waiting = asyncio.create_task(logs.describe_log_groups())
    while not fault.hits:  # noqa: ASYNC110 - the fake has no event for it
        await asyncio.sleep(0.01)
    fault.clear()
    assert (await waiting)["logGroups"] == []


async def test_outage_refuses_connections_and_state_survives_it(
    aws: FakeAws, logs: Any, stream: dict[str, str]
) -> None:
    port = urlsplit(aws.url).port
    assert port is not None
    aws.hang("DescribeLogGroups")
    waiting = asyncio.create_task(logs.describe_log_groups())
    await asyncio.sleep(0.05)
    await aws.stop()
    await aws.stop()
    with pytest.raises((ConnectionClosedError, EndpointConnectionError, HTTPClientError)):
        await waiting
    with pytest.raises(EndpointConnectionError):
        await logs.describe_log_groups()
    url = aws.url
    assert await aws.start(port) == url
    await logs.put_log_events(**stream, logEvents=events(0))
    with pytest.raises(RuntimeError, match="already started"):
        await aws.start()
    second = FakeAws()
    with pytest.raises(OSError, match="address already in use"):
        await second.start(port)
    await second.start()
    await second.stop()


async def test_stored_messages_and_environment_can_be_read(
    aws: FakeAws, logs: Any, stream: dict[str, str]
) -> None:
    await logs.put_log_events(**stream, logEvents=events(0, message='{"a": 1}'))
    assert aws.messages() == [{"a": 1}]
    assert len(aws.events("/falco/alerts", "a")) == 1
    assert aws.events("/other") == aws.events(stream="b") == []
    assert aws.events()[0].ingested == NOW
    environment = aws.environment()
    assert environment["AWS_ENDPOINT_URL"] == aws.url
    assert environment["AWS_REGION"] == environment["AWS_DEFAULT_REGION"] == REGION


async def test_program_writes_what_it_stores_before_it_answers(connect: Connect, tmp_path: Path) -> None:
    state = tmp_path / "state.ndjson"
    arguments = ("-m", "tests.fakes.aws", "--port", "0", "--state", str(state), "--no-rate-limits")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=REPO, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        ready, url = (await asyncio.wait_for(process.stdout.readline(), 20)).decode().split()
        assert ready == "ready"
        away = FakeAws()
        logs = await connect(away, "logs", url=url)
        hub = await connect(away, "securityhub", url=url)
        await logs.create_log_group(logGroupName="g")
        await logs.create_log_stream(logGroupName="g", logStreamName="s")
        event = {"timestamp": int(time.time() * 1000), "message": "hello"}
        await logs.put_log_events(logGroupName="g", logStreamName="s", logEvents=[event])
        for _ in range(40):
            await hub.batch_import_findings(Findings=[finding()])
        lines = [json.loads(line) for line in state.read_text().splitlines()]
        assert [(line["kind"], line.get("message", line.get("Id"))) for line in lines] == [
            ("event", "hello"),
            ("finding", "falco/1"),
            *[("ignored", "falco/1")] * 39,
        ]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# --- the same story told to moto --------------------------------------------------------------------


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.mark.parametrize("backend", ["fake", "moto"])
async def test_fake_and_moto_agree_where_moto_checks(moto: str, connect: Connect, backend: str) -> None:
    """Groups, streams, order of events, reading back and findings: one scenario, the same answers."""
    async with FakeAws() as aws:
        url = aws.url if backend == "fake" else moto
        logs = await connect(aws, "logs", url=url)
        hub = await connect(aws, "securityhub", url=url)
        sts = await connect(aws, "sts", url=url)
        place = {"logGroupName": "/falco/alerts", "logStreamName": "a"}
        now = int(time.time() * 1000)

        assert (await sts.get_caller_identity())["Account"].isdecimal()
        missing = await refused(logs.create_log_stream(**place))
        assert missing == ("ResourceNotFoundException", 400, "The specified log group does not exist.")
        await logs.create_log_group(logGroupName="/falco/alerts", tags={"a": "b"})
        assert (await refused(logs.create_log_group(logGroupName="/falco/alerts")))[:2] == (
            "ResourceAlreadyExistsException",
            400,
        )
        assert (await refused(logs.create_log_group(logGroupName="a" * 513)))[
            0
        ] == "InvalidParameterException"
        await logs.put_retention_policy(logGroupName="/falco/alerts", retentionInDays=30)
        group = (await logs.describe_log_groups(logGroupNamePrefix="/falco"))["logGroups"][0]
        assert (group["logGroupName"], group["retentionInDays"]) == ("/falco/alerts", 30)
        assert group["arn"].endswith(":log-group:/falco/alerts:*")

        first = [{"timestamp": now, "message": "x"}]
        stray = await refused(logs.put_log_events(**place, logEvents=first))
        assert stray[:2] == ("ResourceNotFoundException", 400)
        await logs.create_log_stream(**place)
        assert (await refused(logs.create_log_stream(**place)))[:2] == ("ResourceAlreadyExistsException", 400)
        listed = await logs.describe_log_streams(logGroupName="/falco/alerts", logStreamNamePrefix="a")
        assert [s["logStreamName"] for s in listed["logStreams"]] == ["a"]

        unordered = [{"timestamp": now, "message": "x"}, {"timestamp": now - 1, "message": "y"}]
        order = await refused(logs.put_log_events(**place, logEvents=unordered))
        assert order[:2] == ("InvalidParameterException", 400)
        assert "chronological order" in order[2]
        batch = [{"timestamp": now + i, "message": f"m{i}"} for i in range(3)]
        answer = await logs.put_log_events(**place, logEvents=batch)
        assert "rejectedLogEventsInfo" not in answer
        found = await logs.filter_log_events(logGroupName="/falco/alerts", startTime=now + 1)
        assert [e["message"] for e in found["events"]] == ["m1", "m2"]
        got = await logs.get_log_events(**place, startFromHead=True)
        assert [e["message"] for e in got["events"]] == ["m0", "m1", "m2"]

        answer = await hub.batch_import_findings(Findings=[finding(), finding(Id="falco/2")])
        assert (answer["SuccessCount"], answer["FailedCount"], answer["FailedFindings"]) == (2, 0, [])
        newer = finding(UpdatedAt="2027-01-16T08:00:00Z", Title="newer")
        await hub.batch_import_findings(Findings=[newer])
        stored = (await hub.get_findings())["Findings"]
        assert {f["Id"]: f["Title"] for f in stored} == {
            "falco/1": "newer",
            "falco/2": "Terminal shell in container",
        }
