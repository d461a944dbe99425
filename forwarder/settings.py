"""The whole configuration: one section per component, and what the sections must have in common.

The structs stand beside the code they configure; here they are put together. ``config`` knows the rules of reading.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from forwarder.admin import AdminSettings
from forwarder.aws import AwsSettings
from forwarder.config import load, setting
from forwarder.custom_members import faults_of
from forwarder.delivery_calls import DeliverySettings
from forwarder.enrichment import ENRICHERS, enricher_class
from forwarder.logs import LogSettings
from forwarder.receiver_settings import ReceiverSettings
from forwarder.rules_settings import RuleSettings, faults_among
from forwarder.sensors import SensorsSettings
from forwarder.sinks import SINKS, sink_class
from forwarder.spool_settings import SpoolSettings


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the cluster."""

    name: Annotated[
        str,
        setting(
            "Name of the (EKS) cluster the alerts come from: part of every event and finding Id.",
            pattern=r"^([0-9A-Za-z][A-Za-z0-9_-]{0,99})?\Z",
        ),
    ] = ""
    arn: Annotated[
        str,
        setting(
            "ARN of the EKS cluster; made of region, account and name where it is empty.",
            pattern=r"^(arn:[a-z-]+:eks:[a-z0-9-]+:[0-9]{12}:cluster/[0-9A-Za-z][A-Za-z0-9_-]{0,99})?\Z",
        ),
    ] = ""
    account_id: Annotated[
        str,
        setting(
            "Account of the cluster and its instances; the caller's where it is empty.",
            pattern=r"^([0-9]{12})?\Z",
        ),
    ] = ""


class ReplicaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of this replica."""

    name: Annotated[
        str, setting("Name of this replica, for its log stream; the host name where it is empty.")
    ] = ""


def _sections(title: str, names: Iterable[str], class_of: Callable[[str], Any]) -> Any:
    """A struct with one section per registered component."""
    types = [(name, class_of(name).settings_type) for name in names]
    members = [(name, kind, msgspec.field(default_factory=kind)) for name, kind in types]
    return msgspec.defstruct(title, members, frozen=True, kw_only=True)


_Sinks: Any = _sections("SinksSettings", SINKS, sink_class)
_Enrichment: Any = _sections("EnrichmentSettings", ENRICHERS, enricher_class)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration."""

    cluster: ClusterSettings = msgspec.field(default_factory=ClusterSettings)
    replica: ReplicaSettings = msgspec.field(default_factory=ReplicaSettings)
    spool: SpoolSettings = msgspec.field(default_factory=SpoolSettings)
    receiver: ReceiverSettings = msgspec.field(default_factory=ReceiverSettings)
    admin: AdminSettings = msgspec.field(default_factory=AdminSettings)
    delivery: DeliverySettings = msgspec.field(default_factory=DeliverySettings)
    aws: AwsSettings = msgspec.field(default_factory=AwsSettings)
    log: LogSettings = msgspec.field(default_factory=LogSettings)
    enrichment: _Enrichment = msgspec.field(default_factory=_Enrichment)
    customfields: Annotated[
        dict[str, str] | str,
        setting(
            "Fields for `output_fields` of every alert, as in falcosidekick: a mapping, or text like `key:value,key:value`; a value "
            "`%NAME` is that of an environment variable. What Falco sent itself stays, and so does the alert's `id`, which is that of the bytes as sent."
        ),
    ] = msgspec.field(default_factory=dict)
    customtags: Annotated[
        list[str] | str, setting("Tags for every alert, as in falcosidekick: a list, or text like `tag,tag`.")
    ] = msgspec.field(default_factory=list)
    sensors: SensorsSettings = msgspec.field(default_factory=SensorsSettings)
    sinks: _Sinks = msgspec.field(default_factory=_Sinks)
    rules: Annotated[
        list[RuleSettings],
        setting("What becomes of which alerts; the first that matches decides. See [rules.md](rules.md)."),
    ] = msgspec.field(default_factory=list)

    def faults(self) -> Iterator[tuple[str, str]]:
        if not enabled_sinks(self):
            yield "sinks", f"no sink is enabled (there are: {', '.join(SINKS)})"
        ports = {self.receiver.port, self.admin.port} - {0}
        if self.receiver.port == self.admin.port and ports:
            yield "admin.port", "is the receiver's port too"
        yield from faults_of(self.customfields, self.customtags, os.environ)
        kubernetes = self.enrichment.kubernetes
        kept = {"labels": kubernetes.labels, "namespace_labels": kubernetes.namespace_labels}
        yield from faults_among(self.rules, sinks=SINKS, kept=kept)


def enabled_sinks(settings: Settings) -> list[str]:
    """Names of the sinks that are on, in the order of the registry."""
    return [name for name in SINKS if getattr(settings.sinks, name).enabled]


def load_settings(path: Path | None, environment: Mapping[str, str] | None = None) -> Settings:
    """Read and check the configuration; raises ``ConfigError`` with every fault."""
    return load(Settings, path, environment)
