"""CloudWatch Logs: every alert as one log event, by PutLogEvents.

Contract of the service (API reference, checked against error texts): 1 to 10,000 events and 1,048,576 bytes a
call, counted as UTF-8 bytes of the message plus 26 each; ascending timestamps, at most 24 h apart; events older
than 14 days or the group's retention, or more than 2 h ahead, are refused inside an HTTP 200 by index. There is
no idempotency: a call whose answer is lost is repeated, so every event carries the alert's ``id``.

The event is Falco's own JSON, byte for byte, with our keys added at its end. Out-of-window timestamps move to
the nearest accepted instant (``forwarder.timestamp_adjusted``; Falco's ``time`` stays). An alert too big for
an event loses its longest values first, named in ``forwarder.truncated``, with the SHA-256 of the original.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, Literal

import msgspec
import structlog

from forwarder import __version__
from forwarder.alert import encode as json_encode
from forwarder.alert import rank
from forwarder.aws import Aws, role_of
from forwarder.batch import Item, Limits
from forwarder.config import PriorityName, setting
from forwarder.contract import Again, Blocked, DeliveryError, Permanent, Permission, Reject, Transient
from forwarder.pace import Pace
from forwarder.record import UNPARSED, Record, stream_name
from forwarder.shorten import shortened, unparsed_body
from forwarder.timestamp import iso_milliseconds

EVENT_OVERHEAD_BYTES = 26
CALL_BYTES_MAX = 1_000_000
"""Of the 1,048,576 documented: a margin that other forwarders learned to keep."""
EVENT_BYTES_MAX = CALL_BYTES_MAX - EVENT_OVERHEAD_BYTES
EVENTS_MAX = 10_000
DAY_MS = 86_400_000
ACCOUNT_SECS = 300.0
MARGIN_MS = 300_000
"""Kept from both ends of the accepted window, for the time a batch is under way."""
PAST_MS_MAX, FUTURE_MS_MAX = 14 * DAY_MS, 2 * 3_600_000
RETENTION_DAYS = frozenset(
    {
        0,
        1,
        3,
        5,
        7,
        14,
        30,
        60,
        90,
        120,
        150,
        180,
        365,
        400,
        545,
        731,
        1096,
        1827,
        2192,
        2557,
        2922,
        3288,
        3653,
    }
)

_PLACE = re.compile(r"\{([^{}]*)\}")

log = structlog.get_logger("cloudwatch_logs")


class CloudWatchLogsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Section ``sinks.cloudwatch_logs``."""

    enabled: Annotated[bool, setting("Send alerts to CloudWatch Logs.")] = False
    log_group: Annotated[
        str,
        setting(
            "Log group, created where it is missing. Required.",
            max_length=512,
            pattern=r"^[.\-_/#A-Za-z0-9]*\Z",
        ),
    ] = ""
    log_stream: Annotated[
        str,
        setting(
            "Log stream; `{replica}`, `{cluster}`, `{hostname}` (Falco's) and `{date}` are filled in. "
            "One stream per replica fills batches best.",
            min_length=1,
            max_length=256,
        ),
    ] = "{replica}"
    retention_days: Annotated[
        int, setting("Retention set on the group at start; 0 leaves it alone.", unit="days")
    ] = 0
    kms_key_id: Annotated[str, setting("KMS key (ARN) for a group the forwarder creates.")] = ""
    log_group_class: Annotated[
        Literal["STANDARD", "INFREQUENT_ACCESS"], setting("Class of a group the forwarder creates.")
    ] = "STANDARD"
    minimum_priority: Annotated[PriorityName, setting("Alerts below it are filtered.")] = "debug"
    linger_secs: Annotated[
        float, setting("Longest wait for a fuller batch.", unit="seconds", ge=0, le=60)
    ] = 1.0
    concurrency_max: Annotated[int, setting("Calls at a time; adapts below it.", ge=1, le=16)] = 4
    role_arn: Annotated[
        str, setting("Role to assume for this sink.", pattern=r"^(arn:[a-z-]+:iam::[0-9]{12}:role/[^\s]+)?\Z")
    ] = ""
    external_id: Annotated[str, setting("External id for that role.")] = ""

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.enabled and not self.log_group:
            yield "log_group", "is required where the sink is enabled"
        if self.log_group.lower().startswith("aws/"):
            yield "log_group", "must not begin with aws/"
        for name in set(_PLACE.findall(self.log_stream)) - {"replica", "cluster", "hostname", "date"}:
            yield "log_stream", f"{{{name}}} is not one of {{replica}}, {{cluster}}, {{hostname}}, {{date}}"
        if self.retention_days not in RETENTION_DAYS:
            allowed = ", ".join(str(days) for days in sorted(RETENTION_DAYS))
            yield "retention_days", f"{self.retention_days} is not one of {allowed}"


class CloudWatchLogs:
    """The sink ``cloudwatch_logs``."""

    settings_type = CloudWatchLogsSettings
    service = "logs"
    name = "cloudwatch_logs"
    findings_only = False
    limits = Limits(EVENTS_MAX, CALL_BYTES_MAX, DAY_MS - 1)

    def __init__(
        self,
        settings: CloudWatchLogsSettings,
        *,
        aws: Aws,
        cluster: str,
        replica: str,
        now: Callable[[], float],
        **_: Any,
    ) -> None:
        self._settings = settings
        self._aws = aws
        self._cluster = cluster
        self._replica = replica
        self._now = now
        self._skew_secs = 0.0
        self._ask_again_at = 0.0
        self._own_keys: tuple[str, bytes] = ("", b"")
        self.role = role_of(settings)
        per_alert = "{hostname}" in settings.log_stream or "{date}" in settings.log_stream
        self._stream = (
            None
            if per_alert
            else stream_name(settings.log_stream, replica=replica, cluster=cluster, hostname="", day="")
        )
        self.linger_secs = settings.linger_secs
        self.minimum_rank = rank(settings.minimum_priority) or 0
        self.pace = Pace(concurrency_max=settings.concurrency_max)
        days = settings.retention_days or 14
        self._past_ms = min(PAST_MS_MAX, days * DAY_MS) - MARGIN_MS

    async def open(self) -> None:
        """Make sure of group and retention. What we may not do, somebody else may have done: see in the call."""
        await self._learn_account()
        try:
            await self._create_group()
        except (Permission, Permanent) as error:
            log.warning(
                "log group not prepared, trying without", group=self._settings.log_group, error=str(error)
            )

    def encode(self, record: Record, index: int) -> Item:
        """One log event. Its size counts as CloudWatch Logs counts it."""
        timestamp, adjusted = self._timestamp(record)
        message = self._message(record, adjusted=adjusted)
        truncated = len(message) > EVENT_BYTES_MAX
        if truncated:
            message = shortened(
                record,
                EVENT_BYTES_MAX,
                lambda body, notes: self._message(record, adjusted=adjusted, body=body, notes=notes),
            )
        data = b'{"timestamp":%d,"message":%b}' % (timestamp, json_encode(message.decode()))
        stream = self._stream
        if stream is None:
            stream = stream_name(
                self._settings.log_stream,
                replica=self._replica,
                cluster=self._cluster,
                hostname=record.hostname,
                day=iso_milliseconds(record.time_ns)[:10],
            )
        return Item(
            index=index,
            data=data,
            size_bytes=len(message) + EVENT_OVERHEAD_BYTES,
            order=timestamp,
            partition=stream,
            truncated=truncated,
            adjusted=adjusted,
        )

    async def deliver(self, items: Sequence[Item]) -> dict[int, Reject]:
        """PutLogEvents; a missing group or stream is made on the way."""
        await self._learn_account()
        stream = items[0].partition
        body = b'{"logGroupName":%b,"logStreamName":%b,"logEvents":[%b]}' % (
            json_encode(self._settings.log_group),
            json_encode(stream),
            b",".join([item.data for item in items]),
        )
        try:
            answer = await self._put(body)
        except Transient as error:
            if error.code != "not_found":
                raise
            await self._prepare(stream)
            answer = await self._put(body)
        return self._rejects(answer, len(items))

    async def _prepare(self, stream: str) -> None:
        """Make what is missing. What we may not or cannot make is no fault of the alerts: ``Blocked``."""
        try:
            with contextlib.suppress(Permission):  # perhaps it is only the stream that is missing
                await self._create_group()
            await self._create(
                "create_log_stream", logGroupName=self._settings.log_group, logStreamName=stream
            )
        except (Permission, Permanent) as error:
            raise Blocked(str(error), code=error.code) from error

    async def _learn_account(self) -> None:
        """Events go without their account where STS cannot be reached; ask again now and then."""
        if self._aws.known_account or self._now() < self._ask_again_at:
            return
        self._ask_again_at = self._now() + ACCOUNT_SECS
        try:
            await self._aws.account()
        except DeliveryError as error:
            log.warning("account unknown, left out of events (set aws.account_id)", error=str(error))

    async def _put(self, body: bytes) -> Any:
        client = self._aws.client("logs", self.role)
        answer = await self._aws.call(client, "put_log_events", body)
        date = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date", "")
        try:
            self._skew_secs = parsedate_to_datetime(date).timestamp() - self._now()
        except ValueError:
            self._skew_secs = 0.0
        return answer

    @staticmethod
    def _rejects(answer: Any, count: int) -> dict[int, Reject]:
        """``tooNewLogEventStartIndex`` is inclusive, both end indexes are exclusive."""
        info = answer.get("rejectedLogEventsInfo") or {}
        rejects: dict[int, Reject] = {}
        for member in ("tooOldLogEventEndIndex", "expiredLogEventEndIndex"):
            for position in range(min(info.get(member) or 0, count)):
                rejects[position] = Reject("rejected", f"timestamp refused: {member}", Again.LIMITED)
        start = info.get("tooNewLogEventStartIndex")
        if start is not None:
            for position in range(start, count):
                rejects[position] = Reject(
                    "rejected", "timestamp refused: tooNewLogEventStartIndex", Again.LIMITED
                )
        return rejects

    async def _create_group(self) -> None:
        settings = self._settings
        parameters: dict[str, Any] = {"logGroupName": settings.log_group}
        if settings.kms_key_id:
            parameters["kmsKeyId"] = settings.kms_key_id
        if settings.log_group_class != "STANDARD":
            parameters["logGroupClass"] = settings.log_group_class
        await self._create("create_log_group", **parameters)
        if settings.retention_days:
            client = self._aws.client("logs", self.role)
            await self._aws.call(
                client,
                "put_retention_policy",
                logGroupName=settings.log_group,
                retentionInDays=settings.retention_days,
            )

    async def _create(self, method: str, **parameters: Any) -> None:
        try:
            await self._aws.call(self._aws.client("logs", self.role), method, **parameters)
        except Permanent as error:
            if "ResourceAlreadyExistsException" not in str(error):
                raise

    def _timestamp(self, record: Record) -> tuple[int, bool]:
        """Milliseconds within the accepted window by the service's clock, and whether they had to move."""
        now = int((self._now() + self._skew_secs) * 1000)
        timestamp = record.time_ns // 1_000_000
        within = min(max(timestamp, now - self._past_ms), now + FUTURE_MS_MAX - MARGIN_MS)
        return within, within != timestamp

    def _message(
        self, record: Record, *, adjusted: bool, body: bytes | None = None, notes: bytes | None = None
    ) -> bytes:
        """The event of a record; ``body`` and ``notes`` stand in for the record's own."""
        if body is None:
            body = unparsed_body(record) if record.kind == UNPARSED else record.body
        notes = record.notes if notes is None else notes
        parts = [body[:-1], b',"id":', json_encode(record.id), self._keys()]
        if record.enrichment:
            parts += (b",", record.enrichment)
        parts += (
            b',"forwarder":{"version":"',
            __version__.encode(),
            b'","received":"',
            iso_milliseconds(record.received_ns).encode(),
            b'"',
        )
        if adjusted:
            parts.append(b',"timestamp_adjusted":true')
        if notes:
            parts += (b",", notes)
        parts.append(b"}}")
        return b"".join(parts)

    def _keys(self) -> bytes:
        """Our keys that are the same in every event."""
        account = self._aws.known_account
        if self._own_keys[0] != account or not self._own_keys[1]:
            own = {"cluster": self._cluster, "account": account, "region": self._aws.region}
            encoded = json_encode({key: value for key, value in own.items() if value})
            self._own_keys = (account, b"," + encoded[1:-1] if len(encoded) > 2 else b"")  # noqa: PLR2004
        return self._own_keys[1]
