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

import hashlib
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, Literal

import msgspec
import structlog
from msgspec import Raw

from forwarder import __version__
from forwarder.alert import encode as json_encode
from forwarder.alert import rank
from forwarder.aws import Aws, Role
from forwarder.batch import Item, Limits
from forwarder.config import PriorityName, setting
from forwarder.contract import Again, DeliveryError, Permanent, Permission, Reject, Transient
from forwarder.pace import Pace
from forwarder.record import UNPARSED, Record, stream_name
from forwarder.timestamp import iso_milliseconds

EVENT_OVERHEAD_BYTES = 26
CALL_BYTES_MAX = 1_000_000
"""Of the 1,048,576 documented: a margin that other forwarders learned to keep."""
EVENT_BYTES_MAX = CALL_BYTES_MAX - EVENT_OVERHEAD_BYTES
EVENTS_MAX = 10_000
DAY_MS = 86_400_000
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
CUT_ROUNDS_MAX = 64
CUT_VALUE_BYTES_MIN = 64
_WELL_KNOWN: tuple[str, ...] = ("time", "rule", "priority", "source", "hostname", "uuid")
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"

log = structlog.get_logger("cloudwatch_logs")
_members = msgspec.json.Decoder(dict[str, Raw])


class CloudWatchLogsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Section ``sinks.cloudwatch_logs``."""

    enabled: Annotated[bool, setting("Send alerts to CloudWatch Logs.")] = False
    log_group: Annotated[
        str,
        setting(
            "Log group, created where it is missing. Required.",
            max_length=512,
            pattern=r"^[.\-_/#A-Za-z0-9]*$",
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
        str, setting("Role to assume for this sink.", pattern=r"^(arn:[a-z-]+:iam::\d{12}:role/.+)?$")
    ] = ""
    external_id: Annotated[str, setting("External id for that role.")] = ""

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.enabled and not self.log_group:
            yield "log_group", "is required where the sink is enabled"
        if self.log_group.startswith("aws/"):
            yield "log_group", "must not begin with aws/"
        if self.retention_days not in RETENTION_DAYS:
            allowed = ", ".join(str(days) for days in sorted(RETENTION_DAYS))
            yield "retention_days", f"{self.retention_days} is not one of {allowed}"


def role_of(settings: Any) -> Role | None:
    """The role of a sink's settings, if it has one."""
    return Role(settings.role_arn, settings.external_id) if settings.role_arn else None


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
        self._own_keys: tuple[str, bytes] = ("", b"")
        self.role = role_of(settings)
        self.linger_secs = settings.linger_secs
        self.minimum_rank = rank(settings.minimum_priority) or 0
        self.pace = Pace(concurrency_max=settings.concurrency_max)
        days = settings.retention_days or 14
        self._past_ms = min(PAST_MS_MAX, days * DAY_MS) - MARGIN_MS

    async def open(self) -> None:
        """Make sure of group and retention. What we may not do, somebody else may have done: see in the call."""
        try:
            await self._aws.account()
        except DeliveryError as error:
            log.warning("account unknown, left out of events (set aws.account_id)", error=str(error))
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
            message = self._cut(record, adjusted=adjusted)
        data = b'{"timestamp":%d,"message":%b}' % (timestamp, json_encode(message.decode()))
        stream = self._settings.log_stream
        if "{" in stream:
            stream = stream_name(
                stream,
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
            await self._create_group()
            await self._create(
                "create_log_stream", logGroupName=self._settings.log_group, logStreamName=stream
            )
            answer = await self._put(body)
        return self._rejects(answer, len(items))

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
        self, record: Record, *, adjusted: bool, extra: bytes = b"", body: bytes | None = None
    ) -> bytes:
        if record.kind == UNPARSED and body is None:
            text = record.body.decode("utf-8", "replace")
            body = json_encode({"unparsed": text})
        body = record.body if body is None else body
        parts = [body[:-1].rstrip(), b',"id":', json_encode(record.id), self._keys()]
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
        if record.notes:
            parts += (b",", record.notes)
        parts += (extra, b"}}")
        return b"".join(parts)

    def _keys(self) -> bytes:
        """Our keys that are the same in every event."""
        account = self._aws.known_account
        if self._own_keys[0] != account or not self._own_keys[1]:
            own = {"cluster": self._cluster, "account": account, "region": self._aws.region}
            encoded = json_encode({key: value for key, value in own.items() if value})
            self._own_keys = (account, b"," + encoded[1:-1] if len(encoded) > 2 else b"")  # noqa: PLR2004
        return self._own_keys[1]

    # ---- alerts larger than an event ----------------------------------------------------------------

    def _cut(self, record: Record, *, adjusted: bool) -> bytes:
        """Cut the longest values until the event fits."""
        if record.kind == UNPARSED:
            members = {"unparsed": Raw(json_encode(record.body.decode("utf-8", "replace")))}
        else:
            members = dict(_members.decode(record.body))
        fields: dict[str, Raw] | None
        try:
            fields = dict(_members.decode(members["output_fields"]))
        except (KeyError, msgspec.MsgspecError):
            fields = None
        names: list[str] = []
        for _ in range(CUT_ROUNDS_MAX):
            if fields is not None:
                members["output_fields"] = Raw(json_encode(fields))
            message = self._message(
                record, adjusted=adjusted, extra=self._cut_note(record, names), body=json_encode(members)
            )
            excess = len(message) - EVENT_BYTES_MAX
            if excess <= 0:
                return message
            if not _cut_longest(members, fields, excess, names):
                break
        return self._envelope(record, members, adjusted=adjusted)

    @staticmethod
    def _cut_note(record: Record, names: list[str]) -> bytes:
        digest = hashlib.sha256(record.body).hexdigest()
        return b',"truncated":%b,"sha256":"%b"' % (json_encode(sorted(set(names))), digest.encode())

    def _envelope(self, record: Record, members: dict[str, Raw], *, adjusted: bool) -> bytes:
        """What is left of an alert whose keys alone are too many or too long: its well-known members."""
        kept: dict[str, Raw] = {
            key: members[key]
            for key in _WELL_KNOWN
            if key in members and len(bytes(members[key])) < 4096  # noqa: PLR2004
        } or {"output": Raw(b'"(too large)"')}
        return self._message(
            record, adjusted=adjusted, extra=self._cut_note(record, ["*"]), body=json_encode(kept)
        )


def _cut_longest(
    members: dict[str, Raw], fields: dict[str, Raw] | None, excess: int, names: list[str]
) -> bool:
    """Shorten the longest value by what is too much; False where nothing long is left."""
    places = [
        (len(bytes(raw)), "", key) for key, raw in members.items() if key != "output_fields" or fields is None
    ]
    places += [(len(bytes(raw)), "output_fields", key) for key, raw in (fields or {}).items()]
    if not places:
        return False
    size, parent, key = max(places)
    if size <= CUT_VALUE_BYTES_MIN:
        return False
    target = fields if parent and fields is not None else members
    raw = bytes(target[key])
    text = msgspec.json.decode(raw, type=str) if raw[:1] == b'"' else raw.decode("utf-8", "replace")
    # Halve at least, so that escapes (one character, six bytes) cannot make many small rounds.
    keep = max(CUT_VALUE_BYTES_MIN // 2, min(len(text) - excess - len(_ELLIPSIS), len(text) * 7 // 8))
    target[key] = Raw(json_encode(text[:keep] + _ELLIPSIS))
    names.append(f"{parent}.{key}" if parent else key)
    return True
