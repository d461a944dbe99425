"""What all parts of the finding mapping share: the context of a forwarder, cutting, the verdict on a part. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"


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
    """The configured one; a discovered one comes with the record."""
    cluster_arn: str
    """The configured one, or nothing."""
    cluster_account: str
    """Account of cluster and instances, or nothing: the caller's."""
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


class Occurrences(NamedTuple):
    """What aggregation and the rules of the house know beyond the latest alert."""

    identity: str
    """End of the finding's Id, after the cluster."""
    first_ns: int
    last_ns: int
    created_ms: int
    updated_ms: int
    severity: str
    """Label."""
    priority: str
    """Falco's highest so far, as sent."""
    alerts: int = 0
    """0: this finding is of one alert, and says nothing of counts."""
    alert_ids: tuple[str, ...] = ()
    pods: tuple[str, ...] = ()
    archived: bool = False
    title: str = ""
    """Instead of the rule."""
    types: tuple[str, ...] = ()
    """Instead of those that follow from tags and source."""
    remediation: Advice | None = None
    """Instead of the configured one of the rule."""
    cluster: str | None = None
    """The discovered cluster in the Id; None: that of the alert."""


class UnmappableError(Exception):
    """The finding breaks a rule of the format in spite of all cutting; the message names it."""


def check(fault: str) -> None:
    if fault:
        raise UnmappableError(fault)


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
