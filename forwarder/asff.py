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
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address
from typing import Any, Literal, NamedTuple

from forwarder.alert import encode as json_encode
from forwarder.alert import present
from forwarder.alert_fields import read
from forwarder.asff_schema import (
    FINDING_BYTES_MAX,
    PID_MAX,
    PRODUCT_FIELDS_MAX,
    PRODUCT_VALUE_MAX,
    alike_faults,
    product_field_keys,
    resources_faults,
    varying_faults,
)
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

PARTS_MAX, KEY_LENGTH_MAX = 2048, 2048
JOINT_BYTES = 32
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

    def __hash__(self) -> int:
        return id(self)  # there is one, and it lives as long as its sink

    @property
    def product_arn(self) -> str:
        return f"arn:{self.partition}:securityhub:{self.region}:{self.account}:product/{self.account}/default"


class UnmappableError(Exception):
    """The finding breaks a rule of the format in spite of all cutting; the message names it."""


def encode(record: Record, context: Context) -> bytes:
    """The finding of a record, as JSON, checked.

    Made of three parts: what all alerts of a rule have alike and the resources are remembered in their encoded and
    checked form; the rest is new each time.

    Raises:
        UnmappableError: it would not be accepted.

    """
    alert = read(record.body)
    fields = _fields(alert.output_fields)
    rule = present(alert.rule)
    output = present(alert.output) or present(alert.message)
    source = present(alert.source) or "syscall"
    hostname = present(alert.hostname)
    priority = present(alert.priority)
    tags = tuple(alert.tags) if alert.tags else ()
    container = _ContainerFields(*[fields.get(name, "") for name in _CONTAINER_NAMES])
    alike = _recall(
        _alike,
        context,
        rule,
        rule or output,
        priority,
        record.priority,
        tags,
        source,
        bool(container.identity),
    )
    resources = _recall(_resources, context, hostname, source, container)
    own = {
        "falco/source": source,
        "falco/priority": priority,
        "falco/time": present(alert.time),
        "falco/hostname": hostname,
        "falco/tags": ",".join(tags),
    }
    varying = _varying(record, context, output or rule, fields)
    room = FINDING_BYTES_MAX - len(alike) - len(resources) - JOINT_BYTES
    rest = _with_product_fields(varying, _product_fields(record, context, fields, own, PRODUCT_VALUE_MAX))
    for value_max in SHORTER_VALUES:
        if len(rest) <= room:
            break
        rest = _with_product_fields(varying, _product_fields(record, context, fields, own, value_max))
    return b'{%b,%b,"Resources":%b}' % (alike[1:-1], rest[1:-1], resources)


def _with_product_fields(varying: dict[str, Any], product: dict[str, str]) -> bytes:
    varying["ProductFields"] = product
    encoded = json_encode(varying)
    _check(varying_faults(encoded, product))
    return encoded


def _check(fault: str) -> None:
    if fault:
        raise UnmappableError(fault)


def _recall(part: Callable[..., bytes], context: Context, *key: Any) -> bytes:
    """A part from memory, where its key is not too long to be kept."""
    remembered = _MEMORIES[part]
    if len(str(key)) <= KEY_LENGTH_MAX:
        return remembered(context, *key)
    return part(context, *key)


def _alike(
    context: Context,
    rule: str,
    title: str,
    priority: str,
    rank: int,
    tags: tuple[str, ...],
    source: str,
    in_container: bool,
) -> bytes:
    """Members that all alerts of a rule share, encoded and checked."""
    members: dict[str, Any] = {
        "SchemaVersion": "2018-10-08",
        "ProductArn": context.product_arn,
        "ProductName": "Falco",
        "CompanyName": "Falco",
        "GeneratorId": cut(f"falco/{rule or 'unknown'}", 512),
        "AwsAccountId": context.account,
        "Title": cut(title, 256),
        "FindingProviderFields": {
            "Severity": {"Label": context.severities[rank], "Original": cut(priority or "unknown", 64)},
            "Types": finding_types(tags, source, in_container=in_container),
        },
        "RecordState": "ACTIVE",
    }
    advice = context.remediation.get(rule)
    if advice is not None:
        recommendation = {"Text": advice.text and cut(advice.text, 512), "Url": advice.url}
        members["Remediation"] = {"Recommendation": {k: v for k, v in recommendation.items() if v}}
    encoded = json_encode(members)
    _check(alike_faults(encoded))
    return encoded


def _varying(record: Record, context: Context, description: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """Members that differ from alert to alert, but for the product fields."""
    seen = iso_milliseconds(record.time_ns)
    taken = iso_milliseconds(record.received_ns)
    varying: dict[str, Any] = {
        "Id": finding_id(record, context),
        "CreatedAt": taken,
        "UpdatedAt": taken,
        "FirstObservedAt": seen,
        "LastObservedAt": seen,
        "Description": cut(description, 1024),
    }
    process = _process(fields)
    if process:
        varying["Process"] = process
    connection = _connection(fields)
    if connection:
        varying["Action"] = {"ActionType": "NETWORK_CONNECTION", "NetworkConnectionAction": connection}
    return varying


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


class _ContainerFields(NamedTuple):
    """What Falco says of a container, absent values empty, in the order of ``_CONTAINER_NAMES``."""

    full_id: str
    short_id: str
    repository: str
    image: str
    tag: str
    digest: str
    image_id: str
    name: str
    privileged: str
    pod: str
    pod_by_plugin: str
    namespace: str
    namespace_by_plugin: str

    @property
    def identity(self) -> str:
        identity = self.full_id or self.short_id
        return "" if identity == "host" else identity


_CONTAINER_NAMES = (
    "container.full_id",
    "container.id",
    "container.image.repository",
    "container.image",
    "container.image.tag",
    "container.image.digest",
    "container.image.id",
    "container.name",
    "container.privileged",
    "k8s.pod.name",
    "k8smeta.pod.name",
    "k8s.ns.name",
    "k8smeta.ns.name",
)


def _resources(context: Context, hostname: str, source: str, container: _ContainerFields) -> bytes:
    """``Resources``, encoded and checked: container, host, cluster."""
    resources: list[dict[str, Any]] = []
    if container.identity:
        resources.append(_container(container))
    if hostname:
        other = {"hostname": cut(hostname, 1023)}
        resources.append({"Type": "Other", "Id": cut(hostname, 512), "Details": {"Other": other}})
    if context.cluster:
        arn = f"arn:{context.partition}:eks:{context.region}:{context.account}:cluster/{context.cluster}"
        details = {"AwsEksCluster": {"Name": context.cluster, "Arn": arn}}
        resources.append({"Type": "AwsEksCluster", "Id": arn, "Details": details})
    if not resources:
        resources.append({"Type": "Other", "Id": cut(f"falco/{source}", 512)})
    for resource in resources:
        resource["Region"] = context.region
        if context.partition in _PARTITIONS:
            resource["Partition"] = context.partition
    resources[0]["ResourceRole"] = "Target"
    encoded = json_encode(resources)
    _check(resources_faults(encoded))
    return encoded


def _container(fields: _ContainerFields) -> dict[str, Any]:
    repository = fields.repository or fields.image
    image = f"{repository}:{fields.tag}" if repository and fields.tag else repository
    typed: dict[str, Any] = {
        member: cut(value, 128)
        for member, value in (
            ("Name", fields.name),
            ("ImageName", image),
            ("ImageId", fields.digest or fields.image_id),
        )
        if value
    }
    if fields.privileged:
        typed["Privileged"] = fields.privileged == "true"
    other = {
        name: cut(value, 1023)
        for name, value in (
            ("pod", fields.pod or fields.pod_by_plugin),
            ("namespace", fields.namespace or fields.namespace_by_plugin),
        )
        if value
    }
    details = {name: part for name, part in (("Container", typed), ("Other", other)) if part}
    resource: dict[str, Any] = {"Type": "Container", "Id": cut(fields.identity, 512)}
    if details:
        resource["Details"] = details
    return resource


_MEMORIES: dict[Callable[..., bytes], Callable[..., bytes]] = {
    part: lru_cache(maxsize=PARTS_MAX)(part) for part in (_alike, _resources)
}


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
