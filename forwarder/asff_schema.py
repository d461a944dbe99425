"""The AWS Security Finding Format, as far as the forwarder uses it, as types that check themselves.

The SDK checks neither maximum lengths nor patterns nor enums, and the service answers HTTP 200 with the
finding refused; so every finding is decoded into these types before it is sent. Sources: API reference of
BatchImportFindings and AwsSecurityFinding, the ASFF guide, and error texts of the real validator (which counts
characters, not bytes). Unknown members are an error: a typing slip must not reach the service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

FINDING_BYTES_MAX = 240_000
"""Documented as 240 KB for one finding."""
PRODUCT_FIELDS_MAX = 50
PRODUCT_VALUE_MAX = 2048
OTHER_MAX = 50
OTHER_KEY_MAX = 127
INSTANCE_TYPE_MAX = 16
RESOURCES_MAX = 32
TYPES_MAX = 50
PID_MAX = 2_147_483_647
KEYS_MAX = 4096
KEY_NAME_MAX = 122

_NAMESPACES = (
    "Software and Configuration Checks|TTPs|Effects|Unusual Behaviors|Sensitive Data Identifications"
)
Timestamp = Annotated[datetime, Meta(tz=True)]
"""RFC 3339 with a zone, checked in C; the service asks for the same."""
Url = Annotated[str, Meta(pattern=r"^https?://\S+\Z", max_length=2048)]
Text16 = Annotated[str, Meta(min_length=1, max_length=16)]
Text64 = Annotated[str, Meta(min_length=1, max_length=64)]
Text128 = Annotated[str, Meta(min_length=1, max_length=128)]
Text256 = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"\S")]
Text512 = Annotated[str, Meta(min_length=1, max_length=512, pattern=r"\S")]
Text1024 = Annotated[str, Meta(min_length=1, max_length=1024, pattern=r"\S")]
ProductFieldKey = Annotated[str, Meta(min_length=1, max_length=128)]
"""Characters are checked once per key by ``product_field_keys``: keys repeat, patterns are slow."""
ProductFieldValue = Annotated[str, Meta(min_length=1, max_length=PRODUCT_VALUE_MAX)]
OtherKey = Annotated[str, Meta(min_length=1, max_length=OTHER_KEY_MAX)]
OtherValue = Annotated[str, Meta(min_length=1, max_length=1023)]
FindingType = Annotated[str, Meta(pattern=rf"^(?:{_NAMESPACES})(?:/[^/]+){{0,2}}\Z")]
PortNumber = Annotated[int, Meta(ge=0, le=65535)]
ProcessId = Annotated[int, Meta(ge=0, le=PID_MAX)]


class _Asff(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Severity(_Asff, frozen=True):
    """Of FindingProviderFields: the service copies it to the top level unless a customer changed it."""

    Label: Literal["INFORMATIONAL", "LOW", "MEDIUM", "HIGH", "CRITICAL"]
    Original: Text64 | None = None


class ProviderFields(_Asff, frozen=True):
    """The only place for severity and types: top-level ones belong to the customer."""

    Severity: Severity
    Types: Annotated[list[FindingType], Meta(min_length=1, max_length=TYPES_MAX)]


class Recommendation(_Asff, frozen=True):
    """At least one of both."""

    Text: Text512 | None = None
    Url: Url | None = None


class Remediation(_Asff, frozen=True):
    """What to do about it."""

    Recommendation: Recommendation


class Container(_Asff, frozen=True):
    """Details of a Container resource."""

    Name: Text128 | None = None
    ImageName: Text128 | None = None
    ImageId: Text128 | None = None
    LaunchedAt: Timestamp | None = None
    Privileged: bool | None = None


class EksCluster(_Asff, frozen=True):
    """Details of an AwsEksCluster resource."""

    Name: Text128
    Arn: Annotated[str, Meta(min_length=20, max_length=512)]


class Ec2Instance(_Asff, frozen=True):
    """Details of an AwsEc2Instance resource."""

    Type: Annotated[str, Meta(min_length=1, max_length=INSTANCE_TYPE_MAX)] | None = None
    LaunchedAt: Timestamp | None = None


class EcsContainer(_Asff, frozen=True):
    """Details of an AwsEcsContainer resource."""

    Name: Text512 | None = None
    Image: Text512 | None = None


class EcsTask(_Asff, frozen=True):
    """Details of an AwsEcsTask resource."""

    ClusterArn: Text512 | None = None
    TaskDefinitionArn: Text512 | None = None
    Group: Text512 | None = None


class Details(_Asff, frozen=True):
    """One typed object at most, and what has no type."""

    Container: Container | None = None
    AwsEc2Instance: Ec2Instance | None = None
    AwsEksCluster: EksCluster | None = None
    AwsEcsContainer: EcsContainer | None = None
    AwsEcsTask: EcsTask | None = None
    Other: Annotated[dict[OtherKey, OtherValue], Meta(min_length=1, max_length=OTHER_MAX)] | None = None


class Resource(_Asff, frozen=True):
    """What the finding is about."""

    Type: Literal["Container", "AwsEc2Instance", "AwsEksCluster", "AwsEcsContainer", "AwsEcsTask", "Other"]
    Id: Annotated[str, Meta(min_length=1, max_length=512)]
    Region: Text16 | None = None
    Partition: Literal["aws", "aws-cn", "aws-us-gov", "aws-us-iso", "aws-us-iso-b"] | None = None
    ResourceRole: Literal["Actor", "Target"] | None = None
    Details: Details | None = None


class Process(_Asff, frozen=True):
    """The process that triggered the rule."""

    Name: Text64 | None = None
    Path: Text512 | None = None
    Pid: ProcessId | None = None
    ParentPid: ProcessId | None = None


class IpDetails(_Asff, frozen=True):
    """The model has no member for IPv6."""

    IpAddressV4: Annotated[str, Meta(pattern=r"^(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?!\Z)|\Z)){4}\Z")]


class PortDetails(_Asff, frozen=True):
    """One end of a connection."""

    Port: PortNumber


class NetworkConnection(_Asff, frozen=True):
    """Details of Action NETWORK_CONNECTION."""

    ConnectionDirection: Literal["IN", "OUT"] | None = None
    Protocol: Text64 | None = None
    RemoteIpDetails: IpDetails | None = None
    RemotePortDetails: PortDetails | None = None
    LocalPortDetails: PortDetails | None = None


class Action(_Asff, frozen=True):
    """What happened on the network."""

    ActionType: Literal["NETWORK_CONNECTION"]
    NetworkConnectionAction: NetworkConnection


class Finding(_Asff, frozen=True):
    """One finding as BatchImportFindings takes it."""

    SchemaVersion: Literal["2018-10-08"]
    Id: Text512
    ProductArn: Annotated[
        str,
        Meta(pattern=r"^arn:[a-z-]+:securityhub:[a-z0-9-]+:(\d{12}):product/\1/default\Z", max_length=2048),
    ]
    ProductName: Text128
    CompanyName: Text128
    GeneratorId: Text512
    AwsAccountId: Annotated[str, Meta(min_length=12, max_length=12)]
    CreatedAt: Timestamp
    UpdatedAt: Timestamp
    FirstObservedAt: Timestamp
    LastObservedAt: Timestamp
    Title: Text256
    Description: Text1024
    FindingProviderFields: ProviderFields
    Resources: Annotated[list[Resource], Meta(min_length=1, max_length=RESOURCES_MAX)]
    ProductFields: Annotated[
        dict[ProductFieldKey, ProductFieldValue], Meta(min_length=1, max_length=PRODUCT_FIELDS_MAX)
    ]
    RecordState: Literal["ACTIVE", "ARCHIVED"]
    Process: Process | None = None
    Action: Action | None = None
    Remediation: Remediation | None = None


_decoder = msgspec.json.Decoder(Finding)


ALIKE = frozenset(
    {
        "SchemaVersion", "ProductArn", "ProductName", "CompanyName", "GeneratorId", "AwsAccountId", "Title",
        "FindingProviderFields", "RecordState", "Remediation",
    }
)  # fmt: skip
"""Members that are the same for all alerts of a rule (with the same priority and tags)."""


def _part(names: frozenset[str], **changed: Any) -> Any:
    """A struct of some of Finding's members, as a decoder."""
    members = [
        (field.name, changed.get(field.name, field.type), None)
        if field.default is None
        else (field.name, changed.get(field.name, field.type))
        for field in msgspec.structs.fields(Finding)
        if field.name in names
    ]
    return msgspec.json.Decoder(
        msgspec.defstruct("Part", members, frozen=True, kw_only=True, forbid_unknown_fields=True)
    )


_members = frozenset(field.name for field in msgspec.structs.fields(Finding))
_alike = _part(ALIKE)
_varying = _part(_members - ALIKE - {"Resources"}, ProductFields=msgspec.Raw)
_resources = msgspec.json.Decoder(Annotated[list[Resource], Meta(min_length=1, max_length=RESOURCES_MAX)])
_key_character = re.compile(r"[^A-Za-z0-9 .:+=@_/-]")


class _ProductFieldKeys(dict[str, str]):
    """Falco field -> key of ProductFields: 1 to 128 of ``A-Za-z0-9 .:+=@_/-``, clear of ``aws/``.

    A dictionary that fills itself: the same few hundred names come over and over.
    """

    def __missing__(self, name: str) -> str:
        key = "falco/" + _key_character.sub("_", name[:KEY_NAME_MAX])
        if len(name) <= KEY_NAME_MAX:
            if len(self) >= KEYS_MAX:
                self.clear()
            self[name] = key
        return key


product_field_keys = _ProductFieldKeys()


def faults(encoded: bytes) -> str:
    """What is wrong with an encoded finding, in the words of the first rule it breaks, or nothing."""
    if len(encoded) > FINDING_BYTES_MAX:
        return f"finding of {len(encoded)} bytes exceeds {FINDING_BYTES_MAX}"
    return _fault(_decoder, encoded)


# The same rules by parts, so that what many findings share is looked at once, not with each of them.


def alike_faults(encoded: bytes) -> str:
    """As ``faults``, of an object with the members ``ALIKE``."""
    return _fault(_alike, encoded)


def resources_faults(encoded: bytes) -> str:
    """As ``faults``, of the array ``Resources``."""
    return _fault(_resources, encoded)


def varying_faults(encoded: bytes, product_fields: Mapping[str, str]) -> str:
    """As ``faults``, of an object with all other members.

    ``product_fields`` are those it was encoded from, with keys of ``product_field_keys``: decoding fifty of them again
    would cost more than all the rest.
    """
    return _fault(_varying, encoded) or _product_fault(product_fields)


def _fault(decoder: Any, encoded: bytes) -> str:
    try:
        decoder.decode(encoded)
    except msgspec.MsgspecError as error:
        return str(error)
    return ""


def _product_fault(fields: Mapping[str, str]) -> str:
    if not 1 <= len(fields) <= PRODUCT_FIELDS_MAX:
        return f"{len(fields)} product fields, 1 to {PRODUCT_FIELDS_MAX} are allowed"
    if not all(fields.values()) or max(map(len, fields.values())) > PRODUCT_VALUE_MAX:
        return f"a product field is empty or longer than {PRODUCT_VALUE_MAX}"
    return ""
