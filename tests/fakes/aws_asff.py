"""Says what is wrong with a finding, in the words of Security Hub's own schema check.

Two sources are put together. The structure (members, types, required members, closed value sets) is
the service model that botocore ships, `AwsSecurityFinding`. The limits are the table below, copied from
the texts of the API reference and the ASFF chapters of the user guide, and from error messages of the
real service, which checks with a JSON schema ("data.Title should NOT be longer than 256 characters").
Lengths count code points. A finding with several faults gets them all named in one message.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from botocore.loaders import Loader

from tests.fakes.aws_asff_checks import (
    Check,
    Faults,
    array,
    boolean,
    finding_type,
    formatted,
    integer,
    is_ip,
    is_url,
    number,
    one_of,
    parse_timestamp,
    string_map,
    structure,
    tags,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT_ERROR = "Finding does not adhere to Amazon Finding Format."
_SHORT = text(1, 128)
_STAMP = formatted(parse_timestamp, "should match format date-time with a time zone")
_URL = formatted(is_url, 'should match format "uri"')
_IP4 = formatted(is_ip(ipaddress.IPv4Address), 'should match format "ipv4"')
_IP6 = formatted(is_ip(ipaddress.IPv6Address), 'should match format "ipv6"')
_PORT = integer(0, 65_535)
_SCALE = integer(0, 100)
_PID = integer(0, 2_147_483_647)
_FIELDS = string_map(value=2048, charset=True, reserved="aws/")
_DIRECTION = one_of("IN", "OUT")

# Limits by shape of the service model and member. They replace the model's own check of the member.
_MEMBERS: dict[str, dict[str, Check]] = {
    "AwsSecurityFinding": {
        "SchemaVersion": one_of("2018-10-08"),
        "Id": text(1, 512),
        "ProductArn": text(12, 2048),
        "GeneratorId": text(1, 512),
        "AwsAccountId": formatted(
            lambda v: re.fullmatch(r"[0-9]{12}", v), 'should match pattern "^[0-9]{12}$"'
        ),
        "CreatedAt": _STAMP,
        "UpdatedAt": _STAMP,
        "FirstObservedAt": _STAMP,
        "LastObservedAt": _STAMP,
        "ProcessedAt": _STAMP,
        "Title": text(1, 256),
        "Description": text(1, 1024),
        "ProductName": _SHORT,
        "CompanyName": _SHORT,
        "Region": text(1, 16),
        "AwsAccountName": text(1, 50),
        "SourceUrl": _URL,
        "Confidence": _SCALE,
        "Criticality": _SCALE,
        "ProductFields": _FIELDS,
        "UserDefinedFields": string_map(value=1024, charset=True),
        "VerificationState": one_of("UNKNOWN"),
    },
    "FindingProviderFields": {"Confidence": _SCALE, "Criticality": _SCALE},
    "FindingProviderSeverity": {"Original": text(1, 64)},
    "Severity": {"Original": text(1, 64), "Normalized": _SCALE},
    "Recommendation": {"Text": text(1, 512), "Url": _URL},
    "RelatedFinding": {"ProductArn": text(12, 2048), "Id": text(1, 512)},
    "Note": {"Text": text(1, 512), "UpdatedBy": text(1, 512), "UpdatedAt": _STAMP},
    "Resource": {
        "Type": text(1, 256),
        "Id": text(1, 512),
        "Region": text(1, 16),
        "ResourceRole": one_of("Actor", "Target"),
        "Tags": tags,
    },
    "ResourceDetails": {"Other": string_map(value=1024, key=127)},
    "ContainerDetails": {"Name": _SHORT, "ImageId": _SHORT, "ImageName": _SHORT, "LaunchedAt": _STAMP},
    "AwsEksClusterDetails": {
        "ClusterStatus": one_of("CREATING", "ACTIVE", "DELETING", "FAILED", "UPDATING", "PENDING"),
    },
    "AwsEc2InstanceDetails": {
        "Type": text(1, 16),
        "ImageId": text(1, 64),
        "KeyName": _SHORT,
        "VpcId": text(1, 32),
        "SubnetId": text(1, 32),
        "LaunchedAt": _STAMP,
    },
    "AwsEcsTaskDetails": {"CreatedAt": _STAMP, "StartedAt": _STAMP},
    "ProcessDetails": {
        "Name": text(1, 64),
        "Path": text(1, 512),
        "Pid": _PID,
        "ParentPid": _PID,
        "LaunchedAt": _STAMP,
        "TerminatedAt": _STAMP,
    },
    "Network": {
        "Protocol": text(1, 16),
        "SourceDomain": _SHORT,
        "DestinationDomain": _SHORT,
        "SourceIpV4": _IP4,
        "SourceIpV6": _IP6,
        "DestinationIpV4": _IP4,
        "DestinationIpV6": _IP6,
        "SourcePort": _PORT,
        "DestinationPort": _PORT,
    },
    "PortRange": {"Begin": _PORT, "End": _PORT},
    "Action": {"ActionType": one_of("NETWORK_CONNECTION", "AWS_API_CALL", "DNS_REQUEST", "PORT_PROBE")},
    "NetworkConnectionAction": {"ConnectionDirection": _DIRECTION, "Protocol": text(1, 64)},
    "DnsRequestAction": {"Domain": _SHORT, "Protocol": text(1, 64)},
    "AwsApiCallAction": {
        "Api": _SHORT,
        "ServiceName": _SHORT,
        "CallerType": one_of("remoteIp", "domain"),
        "FirstSeen": _STAMP,
        "LastSeen": _STAMP,
    },
    "AwsApiCallActionDomainDetails": {"Domain": _SHORT},
    "ActionRemoteIpDetails": {"IpAddressV4": _IP4},
    "ActionLocalIpDetails": {"IpAddressV4": _IP4},
    "ActionRemotePortDetails": {"Port": _PORT, "PortName": _SHORT},
    "ActionLocalPortDetails": {"Port": _PORT, "PortName": _SHORT},
    "Malware": {"Name": text(1, 64), "Path": text(1, 512)},
    "Threat": {"Name": _SHORT, "Severity": _SHORT},
    "FilePaths": dict.fromkeys(("FilePath", "FileName", "ResourceId", "Hash"), _SHORT),
    "ThreatIntelIndicator": {
        "Value": text(1, 512),
        "Source": text(1, 64),
        "LastObservedAt": _STAMP,
        "SourceUrl": _URL,
    },
}

# (shape, member) -> fewest and most items, and a check of the items where the model's is not enough.
_LISTS: dict[tuple[str, str], tuple[int, int, Check | None]] = {
    ("AwsSecurityFinding", "Resources"): (1, 32, None),
    ("AwsSecurityFinding", "Types"): (0, 50, finding_type),
    ("AwsSecurityFinding", "RelatedFindings"): (0, 10, None),
    ("AwsSecurityFinding", "Malware"): (0, 5, None),
    ("AwsSecurityFinding", "Threats"): (1, 32, None),
    ("AwsSecurityFinding", "ThreatIntelIndicators"): (1, 5, None),
    ("FindingProviderFields", "Types"): (0, 50, finding_type),
    ("FindingProviderFields", "RelatedFindings"): (0, 10, None),
    ("Threat", "FilePaths"): (1, 5, None),
    ("AwsEc2InstanceDetails", "IpV4Addresses"): (0, 10, _IP4),
    ("AwsEc2InstanceDetails", "IpV6Addresses"): (0, 10, _IP6),
    ("AwsEksClusterResourcesVpcConfigDetails", "SecurityGroupIds"): (0, 5, None),
    ("AwsEksClusterResourcesVpcConfigDetails", "SubnetIds"): (0, 5, None),
    ("AwsEksClusterLoggingDetails", "ClusterLogging"): (0, 25, None),
}


def _any_required(*names: str) -> Check:
    def check(value: Any, path: str, faults: Faults) -> None:
        if not any(name in value for name in names):
            shown = ", ".join(f"{path} should have required property '{name}'" for name in names)
            faults.append(f"{shown}, {path} should match some schema in anyOf")

    return check


def _whole_finding(value: Any, path: str, faults: Faults) -> None:
    provider = value.get("FindingProviderFields")
    provider = provider if isinstance(provider, dict) else {}
    for name in ("Severity", "Types"):
        if not value.get(name) and not provider.get(name):
            faults.append(
                f"{path} should have required property '{name}', "
                f"{path} should have required property 'FindingProviderFields', {path} should match some schema in anyOf"
            )


def _one_typed_object(value: Any, path: str, faults: Faults) -> None:
    if len(value.keys() - {"Other"}) > 1:
        faults.append(f"{path} should match exactly one schema in oneOf")


def _matching_action(value: Any, path: str, faults: Faults) -> None:
    objects = {
        "NETWORK_CONNECTION": "NetworkConnectionAction",
        "AWS_API_CALL": "AwsApiCallAction",
        "DNS_REQUEST": "DnsRequestAction",
        "PORT_PROBE": "PortProbeAction",
    }
    kind = value.get("ActionType")
    if kind is None:
        faults.append(f"{path} should have required property 'ActionType'")
    elif isinstance(kind, str) and kind in objects and set(value) - {"ActionType"} != {objects[kind]}:
        faults.append(f"{path} should have exactly the property '{objects[kind]}'")


_EXTRA: dict[str, Check] = {
    "AwsSecurityFinding": _whole_finding,
    "FindingProviderSeverity": _any_required("Label"),
    "Severity": _any_required("Label", "Normalized"),
    "Recommendation": _any_required("Text", "Url"),
    "ResourceDetails": _one_typed_object,
    "Action": _matching_action,
}
_SCALARS: dict[str, Check] = {
    "integer": integer(),
    "long": integer(),
    "double": number,
    "float": number,
    "boolean": boolean,
    "timestamp": _STAMP,
}


def _compile(shapes: Mapping[str, Any], name: str) -> Check:
    shape = shapes[name]
    kind: str = shape["type"]
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind == "string":
        return one_of(*shape["enum"]) if "enum" in shape else text()
    if kind == "list":
        return array(_compile(shapes, shape["member"]["shape"]))
    if kind == "map":
        return string_map(value=1024)
    limits = _MEMBERS.get(name, {})
    if unknown := set(limits) - set(shape["members"]):
        raise LookupError(f"the service model knows no {name}.{unknown}")
    members: dict[str, Check] = {}
    for member, target in shape["members"].items():
        if member in limits:
            members[member] = limits[member]
        elif (name, member) in _LISTS:
            least, most, items = _LISTS[name, member]
            item_shape = shapes[target["shape"]]["member"]["shape"]
            members[member] = array(items or _compile(shapes, item_shape), least, most)
        else:
            members[member] = _compile(shapes, target["shape"])
    return structure(members, shape.get("required", []), _EXTRA.get(name))


@lru_cache(maxsize=1)
def _finding_check() -> Check:
    shapes = Loader().load_service_model("securityhub", "service-2")["shapes"]
    if lost := (_MEMBERS.keys() | {shape for shape, _ in _LISTS}) - shapes.keys():
        raise LookupError(f"the service model knows no {lost}")
    return _compile(shapes, "AwsSecurityFinding")


def finding_faults(finding: Any) -> Faults:
    """Everything wrong with the form of one finding; empty when it is good."""
    faults: Faults = []
    _finding_check()(finding, "data", faults)
    return faults
