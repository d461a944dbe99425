"""Mapping of an alert to an AWS Security Hub finding (ASFF). Pure.

Invariants: the same record and occurrences always give the same bytes; ``UpdatedAt`` is decided by whoever counts, before
anything is sent (an equal or older one is ignored by the service). Nothing is invented: what Falco
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
from typing import Any, Literal

from forwarder.alert import encode as json_encode
from forwarder.alert import present
from forwarder.alert_fields import read
from forwarder.asff_context import Advice, Context, Occurrences, check, cut
from forwarder.asff_resources import CONTAINER_NAMES, ContainerFields, cluster_of
from forwarder.asff_resources import resources as asff_resources
from forwarder.asff_schema import (
    FINDING_BYTES_MAX,
    PID_MAX,
    PRODUCT_FIELDS_MAX,
    PRODUCT_VALUE_MAX,
    alike_faults,
    product_field_keys,
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
NANOSECONDS = 1_000_000
SHORTER_VALUES = (1024, 512, 256)
"""Tried in turn where escapes and wide characters make a finding larger than the service takes."""

_DIRECTIONS = {"connect": "OUT", "sendto": "OUT", "sendmsg": "OUT", "accept": "IN", "accept4": "IN"}
_CONNECTION = re.compile(r"([\d.]{7,15}):(\d{1,5})->([\d.]{7,15}):(\d{1,5})\Z", re.ASCII)


def of_one_alert(record: Record, context: Context) -> Occurrences:
    """Of an alert that has a finding of its own: delivered again, it changes nothing."""
    received_ms = record.received_ns // NANOSECONDS
    return Occurrences(
        record.id,
        record.time_ns,
        record.time_ns,
        received_ms,
        received_ms,
        context.severities[record.priority],
        "",
    )


def encode(record: Record, context: Context, seen: Occurrences | None = None) -> bytes:
    """The finding of a record and of what was counted with it, as JSON, checked.

    Made of three parts: what all alerts of a rule have alike and the resources are remembered in their encoded and
    checked form; the rest is new each time.

    Raises:
        UnmappableError: it would not be accepted.

    """
    seen = seen or of_one_alert(record, context)
    alert = read(record.body)
    fields = _fields(alert.output_fields)
    rule = present(alert.rule)
    output = present(alert.output) or present(alert.message)
    source = present(alert.source) or "syscall"
    hostname = present(alert.hostname)
    priority = present(alert.priority)
    tags = tuple(alert.tags) if alert.tags else ()
    container = ContainerFields(*[fields.get(name, "") for name in CONTAINER_NAMES])
    alike_key = (
        context,
        (rule, seen.title or rule or output),
        (seen.severity, seen.priority or priority, "ARCHIVED" if seen.archived else "ACTIVE"),
        seen.types,
        seen.remediation,
        tags,
        source,
        bool(container.identity),
    )
    usual = (
        len(rule or output) + len(priority) + sum(map(len, seen.types)) + len(source) + sum(map(len, tags))
        <= KEY_LENGTH_MAX
    )
    alike = _remembered_alike(*alike_key) if usual else _alike(*alike_key)
    enrichment = record.enrichment
    usual = len(hostname) + len(source) + sum(map(len, container)) + len(enrichment) // 2 <= KEY_LENGTH_MAX
    resources = (_remembered_resources if usual else asff_resources)(
        context, hostname, source, container, enrichment
    )
    own = {
        "falco/source": source,
        "falco/priority": priority,
        "falco/time": present(alert.time),
        "falco/hostname": hostname,
        "falco/tags": ",".join(tags),
    }
    own |= _counts(seen)
    varying = _varying(seen, output or rule, fields)
    varying["Id"] = finding_id(record, context, seen)
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
    check(varying_faults(encoded, product))
    return encoded


def _alike(
    context: Context,
    names: tuple[str, str],
    state: tuple[str, str, str],
    types: tuple[str, ...],
    remediation: Advice | None,
    tags: tuple[str, ...],
    source: str,
    in_container: bool,
) -> bytes:
    """Members that all alerts of a rule share, encoded and checked.

    ``names`` are rule and title, ``state`` severity, priority and record state.
    """
    rule, title = names
    severity, priority, record_state = state
    members: dict[str, Any] = {
        "SchemaVersion": "2018-10-08",
        "ProductArn": context.product_arn,
        "ProductName": "Falco",
        "CompanyName": "Falco",
        "GeneratorId": cut(f"falco/{rule or 'unknown'}", 512),
        "AwsAccountId": context.account,
        "Title": cut(title, 256),
        "FindingProviderFields": {
            "Severity": {"Label": severity, "Original": cut(priority or "unknown", 64)},
            "Types": list(types) or finding_types(tags, source, in_container=in_container),
        },
        "RecordState": record_state,
    }
    advice = remediation or context.remediation.get(rule)
    if advice is not None:
        recommendation = {"Text": advice.text and cut(advice.text, 512), "Url": advice.url}
        members["Remediation"] = {"Recommendation": {k: v for k, v in recommendation.items() if v}}
    encoded = json_encode(members)
    check(alike_faults(encoded))
    return encoded


def _varying(seen: Occurrences, description: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """Members that differ from alert to alert, but for the Id and the product fields."""
    varying: dict[str, Any] = {
        "CreatedAt": iso_milliseconds(seen.created_ms * NANOSECONDS),
        "UpdatedAt": iso_milliseconds(seen.updated_ms * NANOSECONDS),
        "FirstObservedAt": iso_milliseconds(seen.first_ns),
        "LastObservedAt": iso_milliseconds(seen.last_ns),
        "Description": cut(description, 1024),
    }
    process = _process(fields)
    if process:
        varying["Process"] = process
    connection = _connection(fields)
    if connection:
        varying["Action"] = {"ActionType": "NETWORK_CONNECTION", "NetworkConnectionAction": connection}
    return varying


def finding_id(record: Record, context: Context, seen: Occurrences) -> str:
    """``falco/{region}/{account}/{cluster}/`` and what identifies the issue, or the alert."""
    cluster = context.cluster or (
        cluster_of(context, record.enrichment) if seen.cluster is None else seen.cluster
    )
    return cut(f"falco/{context.region}/{context.account}/{cluster or '-'}/{seen.identity}", 512)


def _counts(seen: Occurrences) -> dict[str, str]:
    """Product fields of an issue."""
    if not seen.alerts:
        return {}
    return {
        "falco/count": str(seen.alerts),
        "falco/alert_ids": ",".join(seen.alert_ids),
        "falco/pods": ",".join(seen.pods),
    }


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


_remembered_alike = lru_cache(maxsize=PARTS_MAX)(_alike)
_remembered_resources = lru_cache(maxsize=PARTS_MAX)(asff_resources)


def _product_fields(
    record: Record, context: Context, fields: dict[str, str], own: dict[str, str], value_max: int
) -> dict[str, str]:
    """Our own names win; Falco's fields fill what is left of the 50, the longest dropped first."""
    ours = {"falco/id": record.id} | {
        name: cut(text, value_max) for name, text in own.items() if text and not text.isspace()
    }
    cluster = cluster_of(context, record.enrichment)
    if cluster:
        ours["falco/cluster"] = cluster
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
