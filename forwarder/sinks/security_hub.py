"""AWS Security Hub (CSPM): alerts as ASFF findings, by BatchImportFindings.

Contract of the service (API reference, guide, error texts): 1 to 100 findings, 240 KB each, 6 MB a call; 10
calls a second with a burst of 30 for a whole account and region; HTTP 200 also when every finding failed; a
finding is matched on ``Id`` and an update whose ``UpdatedAt`` is not newer is ignored, so a repeated call is
harmless. Which alerts make one finding, and when it is told again, is delivery's (``delivery_findings``). A disabled hub shows as a call-level InvalidAccessException or as InvalidAccess of every finding.
One finding of a foreign account fails the whole call with AccessDenied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from forwarder import asff
from forwarder.alert import rank
from forwarder.asff import SEVERITIES, SeverityPreset
from forwarder.asff_context import Advice, Context, Occurrences, UnmappableError
from forwarder.aws import Aws, role_of
from forwarder.batch import Item, Limits
from forwarder.config import PriorityName, setting
from forwarder.contract import Again, Reject, Transient
from forwarder.issues_settings import AggregationSettings
from forwarder.pace import Pace
from forwarder.record import Record

FINDINGS_MAX = 100
CALL_BYTES_MAX = 5_500_000
"""Of the 6 MB documented."""


class RemediationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to do about the findings of a rule."""

    text: str | None = None
    url: str | None = None


class SecurityHubSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Section ``sinks.security_hub``."""

    enabled: Annotated[bool, setting("Send alerts to Security Hub as findings.")] = False
    minimum_priority: Annotated[PriorityName, setting("Alerts below it are filtered.")] = "notice"
    severity: Annotated[
        SeverityPreset,
        setting("Severity labels by priority: ours, or those of the AWS guidance (Warning is HIGH)."),
    ] = "default"
    remediation: Annotated[
        dict[str, RemediationSettings],
        setting("By rule name: `{text: ..., url: ...}` shown with the finding."),
    ] = msgspec.field(default_factory=dict)
    rate_per_sec: Annotated[
        float,
        setting(
            "Calls each second; the quota is 10 for the whole account and region: divide it by the replicas.",
            unit="calls per second",
            gt=0,
            le=100_000,
        ),
    ] = 10.0
    burst: Annotated[int, setting("Calls at once after a pause.", unit="calls", ge=1, le=100_000)] = 30
    aggregation: AggregationSettings = msgspec.field(default_factory=AggregationSettings)
    aging_secs: Annotated[
        float,
        setting(
            "Behind its quota, the sink sends the most severe findings first. From half of this time on, a quarter of every call is "
            "kept for those that have waited longest.",
            unit="seconds",
            ge=1,
            le=86_400,
        ),
    ] = 300.0
    linger_secs: Annotated[
        float, setting("Longest wait for a fuller batch.", unit="seconds", ge=0, le=60)
    ] = 1.0
    concurrency_max: Annotated[int, setting("Calls at a time; adapts below it.", ge=1, le=16)] = 4
    role_arn: Annotated[
        str,
        setting(
            "Role to assume for this sink, as in a central security account: findings then belong to the role's account.",
            pattern=r"^(arn:[a-z-]+:iam::[0-9]{12}:role/[^\s]+)?\Z",
        ),
    ] = ""
    external_id: Annotated[str, setting("External id for that role.")] = ""

    def faults(self) -> Iterator[tuple[str, str]]:
        for rule, advice in self.remediation.items():
            if not (advice.text or "").strip() and not advice.url:
                yield f"remediation.{rule}", "needs a text or a url"
            if advice.url and not re.match(r"https?://\S+\Z", advice.url):
                yield f"remediation.{rule}.url", "must be a URL that begins with https:// or http://"


class SecurityHub:
    """The sink ``security_hub``."""

    settings_type = SecurityHubSettings
    service = "securityhub"
    name = "security_hub"
    findings_only = True
    limits = Limits(FINDINGS_MAX, CALL_BYTES_MAX)

    def __init__(
        self,
        settings: SecurityHubSettings,
        *,
        aws: Aws,
        cluster: str,
        replica: str,
        log_group: str,
        log_stream: str,
        cluster_arn: str = "",
        cluster_account: str = "",
        **_: Any,
    ) -> None:
        self._settings = settings
        self._aws = aws
        self._cluster = (cluster, cluster_arn, cluster_account)
        self._replica = replica
        self._log_group = log_group
        self._log_stream = log_stream
        self._context: Context | None = None
        self.role = role_of(settings)
        self.linger_secs = settings.linger_secs
        self.minimum_rank = rank(settings.minimum_priority) or 0
        self.aggregation = settings.aggregation
        self.aging_secs = settings.aging_secs
        self.severities = SEVERITIES[settings.severity]
        self.pace = Pace(
            concurrency_max=settings.concurrency_max,
            rate_per_sec=settings.rate_per_sec,
            burst=settings.burst,
        )

    async def open(self) -> None:
        """Learn the account: a finding must carry that of the caller."""
        _, arn, account = self._cluster
        account = account or (arn.split(":")[4] if arn else "")
        if not account and self.role is not None:
            account = (
                await self._aws.account()
            )  # the role is the findings' account, not that of what they are about
        self._context = Context(
            partition=self._aws.partition(),
            region=self._aws.region,
            account=await self._aws.account(self.role),
            cluster=self._cluster[0],
            cluster_arn=self._cluster[1],
            cluster_account=account,
            replica=self._replica,
            log_group=self._log_group,
            log_stream=self._log_stream,
            severities=self.severities,
            remediation={
                rule: Advice(advice.text, advice.url) for rule, advice in self._settings.remediation.items()
            },
        )

    def encode(self, record: Record, index: int, seen: Occurrences | None = None) -> Item:
        """One finding, checked against the format: of this alert alone, or of all that was ``seen`` with it."""
        if self._context is None:
            raise RuntimeError("encode before open")
        seen = seen or asff.of_one_alert(record, self._context)
        try:
            data = asff.encode(record, self._context, seen)
        except UnmappableError as error:
            raise Reject("unmappable", str(error)) from error
        key = asff.finding_id(record, self._context, seen)
        return Item(index=index, data=data, size_bytes=len(data) + 1, key=key)

    async def deliver(self, items: Sequence[Item]) -> dict[int, Reject]:
        """BatchImportFindings; refused findings by position."""
        positions = _by_id(items)
        latest = sorted(places[-1] for places in positions.values())
        body = b'{"Findings":[%b]}' % b",".join([items[place].data for place in latest])
        client = self._aws.client("securityhub", self.role)
        answer = await self._aws.call(client, "batch_import_findings", body)
        rejects: dict[int, Reject] = {}
        named = 0
        for failed in answer.get("FailedFindings") or ():
            places = positions.get(failed.get("Id", ""), ())
            named += bool(places)
            for place in places:
                rejects[place] = _classify(failed)
        if named < answer.get("FailedCount", 0):
            # Sending all of them again is harmless; taking a failure for success would not be.
            raise Transient("findings failed, but the answer does not say which", code="unknown")
        return rejects


def _by_id(items: Sequence[Item]) -> dict[str, list[int]]:
    """Positions of each finding Id. Two alerts of one sender uuid in one call: the later one stands for both."""
    positions: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        positions.setdefault(item.key, []).append(place)
    return positions


def _classify(failed: Mapping[str, str]) -> Reject:
    """The service does not list its codes; these were seen, or are those of its sister API."""
    code = failed.get("ErrorCode", "")
    detail = f"{code}: {failed.get('ErrorMessage', '')}"
    if code.startswith("Internal") or code == "ConcurrentUpdateError" or "Limit" in code or "Throttl" in code:
        return Reject("unknown", detail, Again.ALWAYS)
    if code in {"InvalidInput", "FindingSizeExceeded"}:
        return Reject("invalid", detail, Again.NEVER)
    if code.startswith("InvalidAccess"):
        return Reject("permission", detail, Again.BLOCKED)
    return Reject("unknown", detail, Again.LIMITED)
