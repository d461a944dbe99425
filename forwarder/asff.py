"""Mapping of an alert to an AWS Security Hub finding (ASFF). Pure.

Invariants: the same record always gives the same bytes, ``UpdatedAt`` included, so that a retry or a delivery
after a crash is a no-op at the service (an equal ``UpdatedAt`` is ignored). Nothing is invented: what Falco
did not say is absent. Everything is cut to its limit at a character, with an ellipsis; the whole alert is in
the CloudWatch event that ``falco/log_group``, ``falco/log_stream`` and ``falco/id`` name. What leaves here has
passed ``asff_schema``.

Only ``FindingProviderFields`` carries severity and types, so that a customer's own changes survive updates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address
from typing import Any, Literal, NamedTuple

from forwarder.alert import encode as json_encode
from forwarder.alert import present
from forwarder.alert_fields import read
from forwarder.asff_schema import FINDING_BYTES_MAX, PID_MAX, PRODUCT_FIELDS_MAX, faults, product_field_keys
from forwarder.asff_types import finding_types
from forwarder.record import Record, stream_name
from forwarder.timestamp import iso_milliseconds

SeverityPreset = Literal["default", "guidance"]
SEVERITIES: dict[SeverityPreset, tuple[str, ...]] = {
    "default": (
        "CRITICAL",
        "CRITICAL",
        "CRITICAL",
        "HIGH",
        "MEDIUM",
        "LOW",
        "INFORMATIONAL",
        "INFORMATIONAL",
    ),
    "guidance": (
        "CRITICAL",
        "CRITICAL",
        "CRITICAL",
        "HIGH",
        "HIGH",
        "MEDIUM",
        "INFORMATIONAL",
        "INFORMATIONAL",
    ),
}
"""Severity label by syslog rank: ours, and that of the AWS guidance for Falco (2024)."""

PRODUCT_VALUE_MAX = 2048
SHORTER_VALUES = (1024, 512, 256)
"""Tried in turn where escapes and wide characters make a finding larger than the service takes."""
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_PARTITIONS = frozenset({"aws", "aws-cn", "aws-us-gov", "aws-us-iso", "aws-us-iso-b"})
"""What ``Resources[].Partition`` knows; elsewhere the member is left out."""

_DIRECTIONS = {"connect": "OUT", "sendto": "OUT", "sendmsg": "OUT", "accept": "IN", "accept4": "IN"}
_CONNECTION = re.compile(r"([\d.]{7,15}):(\d{1,5})->([\d.]{7,15}):(\d{1,5})\Z", re.ASCII)


class Advice(NamedTuple):
    """Remediation of a rule: a text, a URL, or both."""

    text: str | None
    url: str | None


class Context(NamedTuple):
    """What is the same for all findings of one forwarder."""

    partition: str
    region: str
    account: str
    cluster: str
    replica: str
    log_group: str
    log_stream: str
    """Template of the log stream; both are empty where CloudWatch Logs is off."""
    severities: tuple[str, ...]
    remediation: Mapping[str, Advice]

    @property
    def product_arn(self) -> str:
        return f"arn:{self.partition}:securityhub:{self.region}:{self.account}:product/{self.account}/default"


class UnmappableError(Exception):
    """The finding breaks a rule of the format in spite of all cutting; the message names it."""


def encode(record: Record, context: Context) -> bytes:
    """The finding of a record, as JSON, checked.

    Raises:
        UnmappableError: it would not be accepted.

    """
    encoded = json_encode(build(record, context))
    for value_max in SHORTER_VALUES:
        if len(encoded) <= FINDING_BYTES_MAX:
            break
        encoded = json_encode(build(record, context, value_max=value_max))
    fault = faults(encoded)
    if fault:
        raise UnmappableError(fault)
    return encoded


def build(record: Record, context: Context, *, value_max: int = PRODUCT_VALUE_MAX) -> dict[str, Any]:
    """The finding of a record, as a dictionary in the shape of ``asff_schema.Finding``."""
    alert = read(record.body)
    fields = _fields(alert.output_fields)
    rule = present(alert.rule)
    output = present(alert.output) or present(alert.message)
    source = present(alert.source) or "syscall"
    hostname = present(alert.hostname)
    priority = present(alert.priority)
    tags = tuple(alert.tags) if alert.tags else ()
    seen = iso_milliseconds(record.time_ns)
    taken = iso_milliseconds(record.received_ns)
    container = _container_id(fields)
    finding: dict[str, Any] = {
        "SchemaVersion": "2018-10-08",
        "Id": finding_id(record, context),
        "ProductArn": context.product_arn,
        "ProductName": "Falco",
        "CompanyName": "Falco",
        "GeneratorId": cut(f"falco/{rule or 'unknown'}", 512),
        "AwsAccountId": context.account,
        "CreatedAt": taken,
        "UpdatedAt": taken,
        "FirstObservedAt": seen,
        "LastObservedAt": seen,
        "Title": cut(rule or output, 256),
        "Description": cut(output or rule, 1024),
        "FindingProviderFields": {
            "Severity": {
                "Label": context.severities[record.priority],
                "Original": cut(priority or "unknown", 64),
            },
            "Types": finding_types(tags, source, bool(container)),
        },
        "Resources": _resources(hostname, source, fields, container, context),
        "ProductFields": _product_fields(
            record,
            context,
            fields,
            {
                "falco/source": source,
                "falco/priority": priority,
                "falco/time": present(alert.time),
                "falco/hostname": hostname,
                "falco/tags": ",".join(tags),
            },
            value_max,
        ),
        "RecordState": "ACTIVE",
    }
    process = _process(fields)
    if process:
        finding["Process"] = process
    connection = _connection(fields)
    if connection:
        finding["Action"] = {"ActionType": "NETWORK_CONNECTION", "NetworkConnectionAction": connection}
    advice = context.remediation.get(rule)
    if advice is not None:
        recommendation = {"Text": advice.text and cut(advice.text, 512), "Url": advice.url}
        finding["Remediation"] = {"Recommendation": {k: v for k, v in recommendation.items() if v}}
    return finding


def finding_id(record: Record, context: Context) -> str:
    """``falco/{region}/{account}/{cluster}/{alert id}``: the same alert always has the same finding."""
    return cut(f"falco/{context.region}/{context.account}/{context.cluster or '-'}/{record.id}", 512)


def cut(text: str, length_max: int) -> str:
    """``text`` within ``length_max`` UTF-16 units, cut at a character, with an ellipsis."""
    if len(text) * 2 <= length_max:
        return text
    if text.isascii():
        return text if len(text) <= length_max else text[: length_max - 1] + ELLIPSIS
    if len(text.encode("utf-16-le", "replace")) // 2 <= length_max:
        return text
    room = length_max - 1
    units = 0
    for index, character in enumerate(text):
        units += 2 if character > "\uffff" else 1
        if units > room:
            return text[:index] + ELLIPSIS
    return text


def _fields(members: dict[str, Any] | None) -> dict[str, str]:
    """Falco's output fields as texts, absent ones left out."""
    values: dict[str, str] = {}
    for key, value in (members or {}).items():
        if value.__class__ is str:
            if value and value != "<NA>" and not value.isspace():
                values[key] = value
        elif value.__class__ is int:
            values[key] = str(value)
        elif value is not None:
            values[key] = json_encode(value).decode()
    return values


def _container_id(fields: Mapping[str, str]) -> str:
    identity = fields.get("container.full_id") or fields.get("container.id") or ""
    return "" if identity == "host" else identity


def _resources(
    hostname: str, source: str, fields: Mapping[str, str], container: str, context: Context
) -> list[dict[str, Any]]:
    resources: list[dict[str, Any]] = []
    if container:
        resources.append(_container(fields, container))
    if hostname:
        resources.append(
            {
                "Type": "Other",
                "Id": cut(hostname, 512),
                "Details": {"Other": {"hostname": cut(hostname, 1023)}},
            }
        )
    if context.cluster:
        resources.append(dict(_cluster(context.partition, context.region, context.account, context.cluster)))
    if not resources:
        resources.append({"Type": "Other", "Id": cut(f"falco/{source}", 512)})
    for resource in resources:
        resource["Region"] = context.region
        if context.partition in _PARTITIONS:
            resource["Partition"] = context.partition
    resources[0]["ResourceRole"] = "Target"
    return resources


@lru_cache(maxsize=8)
def _cluster(partition: str, region: str, account: str, name: str) -> dict[str, Any]:
    arn = f"arn:{partition}:eks:{region}:{account}:cluster/{name}"
    return {"Type": "AwsEksCluster", "Id": arn, "Details": {"AwsEksCluster": {"Name": name, "Arn": arn}}}


def _container(fields: Mapping[str, str], identity: str) -> dict[str, Any]:
    repository = fields.get("container.image.repository") or fields.get("container.image") or ""
    tag = fields.get("container.image.tag", "")
    image = f"{repository}:{tag}" if repository and tag else repository
    typed: dict[str, Any] = {}
    for member, value in (
        ("Name", fields.get("container.name", "")),
        ("ImageName", image),
        ("ImageId", fields.get("container.image.digest") or fields.get("container.image.id") or ""),
    ):
        if value:
            typed[member] = cut(value, 128)
    if "container.privileged" in fields:
        typed["Privileged"] = fields["container.privileged"] == "true"
    details: dict[str, Any] = {}
    if typed:
        details["Container"] = typed
    other = {
        name: cut(value, 1023)
        for name, value in (
            ("pod", fields.get("k8s.pod.name") or fields.get("k8smeta.pod.name") or ""),
            ("namespace", fields.get("k8s.ns.name") or fields.get("k8smeta.ns.name") or ""),
        )
        if value
    }
    if other:
        details["Other"] = other
    resource: dict[str, Any] = {"Type": "Container", "Id": cut(identity, 512)}
    if details:
        resource["Details"] = details
    return resource


def _product_fields(
    record: Record, context: Context, fields: dict[str, str], own: dict[str, str], value_max: int
) -> dict[str, str]:
    """Our own names win; Falco's fields fill what is left of the 50, the longest dropped first."""
    ours = {"falco/id": record.id} | {
        name: cut(text, value_max) for name, text in own.items() if text and not text.isspace()
    }
    if context.cluster:
        ours["falco/cluster"] = context.cluster
    if context.log_group:
        ours["falco/log_group"] = context.log_group
        ours["falco/log_stream"] = _stream(record, context)
    room = PRODUCT_FIELDS_MAX - len(ours)
    if len(fields) > room:
        fields = dict(sorted(fields.items(), key=lambda field: len(field[1]))[:room])
    keys = product_field_keys
    product = {
        keys[name]: text if len(text) <= value_max // 2 else cut(text, value_max)
        for name, text in fields.items()
    }
    product.update(ours)
    return product


def _stream(record: Record, context: Context) -> str:
    """Name of the log stream that has the whole alert."""
    if context.log_stream == "{replica}":
        return stream_name(context.replica, replica="", cluster="", hostname="", day="")
    return stream_name(
        context.log_stream,
        replica=context.replica,
        cluster=context.cluster,
        hostname=record.hostname,
        day=iso_milliseconds(record.time_ns)[:10],
    )


def _process(fields: Mapping[str, str]) -> dict[str, Any]:
    process: dict[str, Any] = {}
    name = fields.get("proc.name")
    if name:
        process["Name"] = cut(name, 64)
    path = fields.get("proc.exepath")
    if path:
        process["Path"] = cut(path, 512)
    for member, key in (("Pid", "proc.pid"), ("ParentPid", "proc.ppid")):
        number = _number(fields.get(key), PID_MAX)
        if number is not None:
            process[member] = number
    return process


def _connection(fields: Mapping[str, str]) -> dict[str, Any]:
    """NetworkConnectionAction from the connection's two ends; nothing unless it is known which one is remote.

    ``fd.name`` reads ``client:port->server:port``. Falco's ``fd.lport`` and ``fd.rport`` are not used: on an
    outgoing connection real alerts have them the wrong way round.
    """
    ends = _CONNECTION.match(fields.get("fd.name", ""))
    direction = _DIRECTIONS.get(fields.get("evt.type", ""))
    if ends is None or direction is None:
        return {}
    client, server = (ends[1], ends[2]), (ends[3], ends[4])
    (address, port), (_, local_port) = (server, client) if direction == "OUT" else (client, server)
    remote, remote_port = _ipv4(address), _number(port, 65535)
    if remote is None or remote_port is None:
        return {}
    connection: dict[str, Any] = {
        "ConnectionDirection": direction,
        "RemoteIpDetails": {"IpAddressV4": remote},
        "RemotePortDetails": {"Port": remote_port},
    }
    own_port = _number(local_port, 65535)
    if own_port is not None:
        connection["LocalPortDetails"] = {"Port": own_port}
    protocol = fields.get("fd.l4proto")
    if protocol:
        connection["Protocol"] = cut(protocol.upper(), 64)
    return connection


def _number(text: str | None, largest: int) -> int | None:
    if text is None or not text.isdecimal() or len(text) > len(str(largest)):
        return None
    number = int(text)
    return number if number <= largest else None


def _ipv4(text: str) -> str | None:
    try:
        return str(IPv4Address(text))
    except AddressValueError:
        return None
