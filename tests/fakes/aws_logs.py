"""The CloudWatch Logs part of the fake: groups, streams, and every documented rule of PutLogEvents.

Rules from the CloudWatch Logs API reference and quotas page: a call takes 1 to 10,000 events of together
1,048,576 bytes (UTF-8 bytes of the messages plus 26 each), in chronological order. Events outside
[now - 14 days or the group's retention, now + 2 hours] are rejected one by one with HTTP 200 and index
ranges: `tooOldLogEventEndIndex` and `expiredLogEventEndIndex` are the first index that is not rejected,
`tooNewLogEventStartIndex` is the first index that is. The events inside the window span at most 24 hours.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from tests.fakes.aws_common import AwsError, LogEvent, LogGroup
from tests.fakes.aws_logs_rules import (
    EVENT_OVERHEAD,
    MAX_BATCH_BYTES,
    checked_events,
    checked_tags,
    choice,
    constraint,
    entity_error,
    group_name,
    invalid,
    number,
    only_members,
    stream_name,
    string,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

DAY_MS = 86_400_000
OLDEST_MS = 14 * DAY_MS
NEWEST_MS = 2 * 3_600_000
RETENTION_DAYS = frozenset(
    (1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653)
)
# Requests per second; the service grants the same number as burst.
RATES = {
    "PutLogEvents": 5000,
    "CreateLogStream": 50,
    "CreateLogGroup": 10,
    "DescribeLogStreams": 25,
    "DescribeLogGroups": 10,
    "FilterLogEvents": 10,
    "GetLogEvents": 25,
}


class Logs:
    """State and operations; `operations` maps names to methods that take and give JSON objects."""

    def __init__(
        self,
        *,
        arn_prefix: str,
        clock: Callable[[], float],
        on_events: Callable[[str, str, list[LogEvent]], None],
    ) -> None:
        self._arn = arn_prefix
        self._clock = clock
        self._on_events = on_events
        self.groups: dict[str, LogGroup] = {}
        self.operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "CreateLogGroup": self.create_log_group,
            "DeleteLogGroup": self.delete_log_group,
            "PutRetentionPolicy": self.put_retention_policy,
            "DeleteRetentionPolicy": self.delete_retention_policy,
            "CreateLogStream": self.create_log_stream,
            "DeleteLogStream": self.delete_log_stream,
            "DescribeLogGroups": self.describe_log_groups,
            "DescribeLogStreams": self.describe_log_streams,
            "PutLogEvents": self.put_log_events,
            "FilterLogEvents": self.filter_log_events,
            "GetLogEvents": self.get_log_events,
        }

    def _group(self, body: dict[str, Any]) -> LogGroup:
        name = group_name(body)
        if name not in self.groups:
            raise AwsError("ResourceNotFoundException", "The specified log group does not exist.")
        return self.groups[name]

    def _stream(self, body: dict[str, Any]) -> list[LogEvent]:
        stream = stream_name(body)
        group = self._group(body)
        if stream not in group.streams:
            raise AwsError("ResourceNotFoundException", "The specified log stream does not exist.")
        return group.streams[stream]

    def create_log_group(self, body: dict[str, Any]) -> dict[str, Any]:
        only_members(body, "logGroupName kmsKeyId tags logGroupClass deletionProtectionEnabled")
        name = group_name(body)
        if name.lower().startswith("aws/"):
            raise invalid("Log groups starting with AWS/ are reserved for AWS.")
        group_class = choice(body, "logGroupClass", ("STANDARD", "INFREQUENT_ACCESS", "DELIVERY"))
        key = None
        if "kmsKeyId" in body:
            key = string(body, "kmsKeyId", 0, 256)
            if not re.fullmatch(r"arn:aws[a-z-]*:kms:[a-z0-9-]+:\d{12}:(key|alias)/.+", key):
                raise invalid("The specified KMS Key Id is not an ARN of a KMS key.")
        tags = checked_tags(body)
        if name in self.groups:
            raise AwsError("ResourceAlreadyExistsException", "The specified log group already exists")
        self.groups[name] = LogGroup(name, None, key, group_class, tags, {}, self._clock())
        return {}

    def delete_log_group(self, body: dict[str, Any]) -> dict[str, Any]:
        del self.groups[self._group(body).name]
        return {}

    def put_retention_policy(self, body: dict[str, Any]) -> dict[str, Any]:
        only_members(body, "logGroupName retentionInDays")
        group_name(body)
        if body.get("retentionInDays") is None:
            raise constraint("retentionInDays", None, "Member must not be null")
        days = number(body, "retentionInDays", -(2**31), 2**31 - 1, 0)
        if days not in RETENTION_DAYS:
            shown = ", ".join(map(str, sorted(RETENTION_DAYS)))
            raise constraint("retentionInDays", days, f"Member must satisfy enum value set: [{shown}]")
        self._group(body).retention_days = days
        return {}

    def delete_retention_policy(self, body: dict[str, Any]) -> dict[str, Any]:
        self._group(body).retention_days = None
        return {}

    def create_log_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        only_members(body, "logGroupName logStreamName")
        stream = stream_name(body)
        group = self._group(body)
        if stream in group.streams:
            raise AwsError("ResourceAlreadyExistsException", "The specified log stream already exists")
        group.streams[stream] = []
        return {}

    def delete_log_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        self._stream(body)
        del self._group(body).streams[body["logStreamName"]]
        return {}

    def describe_log_groups(self, body: dict[str, Any]) -> dict[str, Any]:
        only_members(body, "logGroupNamePrefix logGroupNamePattern nextToken limit logGroupClass")
        if "logGroupNamePrefix" in body and "logGroupNamePattern" in body:
            raise invalid("LogGroup name prefix and LogGroup name pattern are mutually exclusive parameters.")
        prefix = group_name(body, "logGroupNamePrefix") if "logGroupNamePrefix" in body else ""
        pattern = string(body, "logGroupNamePattern", 0, 512) if "logGroupNamePattern" in body else ""
        found = [g for n, g in sorted(self.groups.items()) if n.startswith(prefix) and pattern in n]
        if "logGroupClass" in body:
            wanted = choice(body, "logGroupClass", ("STANDARD", "INFREQUENT_ACCESS", "DELIVERY"))
            found = [g for g in found if g.group_class == wanted]
        page, token = _page(found, body, number(body, "limit", 1, 50, 50))
        return {"logGroups": [self._show_group(group) for group in page], **token}

    def _show_group(self, group: LogGroup) -> dict[str, Any]:
        arn = f"{self._arn}:log-group:{group.name}"
        shown: dict[str, Any] = {
            "logGroupName": group.name,
            "creationTime": int(group.created * 1000),
            "metricFilterCount": 0,
            "arn": f"{arn}:*",
            "logGroupArn": arn,
            "logGroupClass": group.group_class,
            "storedBytes": 0,
        }
        if group.retention_days is not None:
            shown["retentionInDays"] = group.retention_days
        if group.kms_key_id is not None:
            shown["kmsKeyId"] = group.kms_key_id
        return shown

    def describe_log_streams(self, body: dict[str, Any]) -> dict[str, Any]:
        only_members(body, "logGroupName logStreamNamePrefix orderBy descending nextToken limit")
        order = choice(body, "orderBy", ("LogStreamName", "LastEventTime"))
        prefix = stream_name(body, "logStreamNamePrefix") if "logStreamNamePrefix" in body else ""
        if prefix and order == "LastEventTime":
            raise invalid("Cannot order by LastEventTime with a logStreamNamePrefix.")
        group = self._group(body)

        def key(item: tuple[str, list[LogEvent]]) -> tuple[int, str]:
            name, events = item
            return (max((e.timestamp for e in events), default=0) if order == "LastEventTime" else 0, name)

        streams = [item for item in group.streams.items() if item[0].startswith(prefix)]
        streams.sort(key=key, reverse=body.get("descending") is True)
        page, token = _page(streams, body, number(body, "limit", 1, 50, 50))
        return {"logStreams": [self._show_stream(group, *item) for item in page], **token}

    def _show_stream(self, group: LogGroup, name: str, events: list[LogEvent]) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "logStreamName": name,
            "creationTime": int(group.created * 1000),
            "arn": f"{self._arn}:log-group:{group.name}:log-stream:{name}",
            "storedBytes": 0,
        }
        if events:
            shown["firstEventTimestamp"] = min(e.timestamp for e in events)
            shown["lastEventTimestamp"] = max(e.timestamp for e in events)
            shown["lastIngestionTime"] = int(events[-1].ingested * 1000)
            shown["uploadSequenceToken"] = "4" * 56
        return shown

    def put_log_events(self, body: dict[str, Any]) -> dict[str, Any]:
        only_members(body, "logGroupName logStreamName logEvents sequenceToken entity")
        group_name(body)
        stream_name(body)
        if "sequenceToken" in body:
            string(body, "sequenceToken", 1, 1024)
        events = checked_events(body.get("logEvents"))
        answer: dict[str, Any] = {}
        if (refused := entity_error(body.get("entity"))) is not None:
            answer["rejectedEntityInfo"] = {"errorType": refused}
        stream = self._stream(body)
        retention_days = self._group(body).retention_days

        now = self._clock()
        now_ms = int(now * 1000)
        first, rejected = 0, {}
        while first < len(events) and events[first][0] < now_ms - OLDEST_MS:
            first += 1
        if first:
            rejected["tooOldLogEventEndIndex"] = first
        if retention_days is not None:
            too_old = first
            while first < len(events) and events[first][0] < now_ms - retention_days * DAY_MS:
                first += 1
            if first > too_old:
                rejected["expiredLogEventEndIndex"] = first
        end = len(events)
        while end > first and events[end - 1][0] > now_ms + NEWEST_MS:
            end -= 1
        if end < len(events):
            rejected["tooNewLogEventStartIndex"] = end
        accepted = events[first:end]
        if accepted and accepted[-1][0] - accepted[0][0] > DAY_MS:
            raise invalid(
                "The batch of log events in a single PutLogEvents request cannot span more than 24 hours."
            )
        stored = [LogEvent(timestamp, message, now) for timestamp, message in accepted]
        stream.extend(stored)
        self._on_events(body["logGroupName"], body["logStreamName"], stored)
        if rejected:
            answer["rejectedLogEventsInfo"] = rejected
        answer["nextSequenceToken"] = "4" * 56
        return answer

    def filter_log_events(self, body: dict[str, Any]) -> dict[str, Any]:
        only_members(
            body,
            "logGroupName logStreamNames logStreamNamePrefix startTime endTime filterPattern nextToken limit "
            "interleaved startFromHead unmask",
        )
        if "logStreamNames" in body and "logStreamNamePrefix" in body:
            raise invalid("logStreamNames and logStreamNamePrefix are mutually exclusive parameters.")
        group = self._group(body)
        names = body.get("logStreamNames")
        if names is not None:
            if not isinstance(names, list) or not 1 <= len(names) <= 100:
                raise constraint("logStreamNames", names, "Member must have between 1 and 100 items")
            if any(name not in group.streams for name in names):
                raise AwsError("ResourceNotFoundException", "The specified log stream does not exist.")
        prefix = stream_name(body, "logStreamNamePrefix") if "logStreamNamePrefix" in body else ""
        start = number(body, "startTime", 0, 2**63, 0)
        end = number(body, "endTime", 0, 2**63, 2**63)
        if start > end:
            raise invalid("End time should not be less than start time.")
        terms = _filter_terms(body.get("filterPattern", ""))
        found = [
            (event.timestamp, stream, index, event)
            for stream, events in group.streams.items()
            if stream.startswith(prefix) and (names is None or stream in names)
            for index, event in enumerate(events)
            if start <= event.timestamp <= end and all(term in event.message for term in terms)
        ]
        found.sort(key=lambda item: item[:3])
        page, token = _page(found, body, number(body, "limit", 1, 10_000, 10_000), _event_bytes)
        shown = [
            {**_show_event(event), "logStreamName": stream, "eventId": _event_id(stream, index, event)}
            for _, stream, index, event in page
        ]
        return {"events": shown, "searchedLogStreams": [], **token}

    def get_log_events(self, body: dict[str, Any]) -> dict[str, Any]:
        only_members(
            body, "logGroupName logStreamName startTime endTime nextToken limit startFromHead unmask"
        )
        stream = self._stream(body)
        start = number(body, "startTime", 0, 2**63, 0)
        end = number(body, "endTime", 0, 2**63, 2**63)
        events = sorted((e for e in stream if start <= e.timestamp < end), key=lambda event: event.timestamp)
        limit = number(body, "limit", 1, 10_000, 10_000)
        token = body.get("nextToken")
        if token is None:
            first = 0 if body.get("startFromHead") is True else max(0, len(events) - limit)
        elif isinstance(token, str) and re.fullmatch(r"[fb]/\d+", token):
            position = int(token[2:])
            first = position if token[0] == "f" else max(0, position - limit)
            limit = limit if token[0] == "f" else position - first
        else:
            raise invalid("The specified nextToken is invalid.")
        page = events[first : first + limit]
        return {
            "events": [_show_event(event) for event in page],
            "nextForwardToken": f"f/{first + len(page)}",
            "nextBackwardToken": f"b/{first}",
        }


def _filter_terms(pattern: Any) -> list[str]:
    """The words or quoted phrases an event must contain; the richer pattern syntax is not played."""
    if not isinstance(pattern, str) or len(pattern) > 1024 or re.match(r"\s*[{\[?%-]", pattern):
        raise invalid("The fake only knows filter patterns made of words and quoted phrases")
    return [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', pattern)]


def _show_event(event: LogEvent) -> dict[str, Any]:
    return {
        "timestamp": event.timestamp,
        "message": event.message,
        "ingestionTime": int(event.ingested * 1000),
    }


def _event_id(stream: str, index: int, event: LogEvent) -> str:
    digest = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big")
    return f"{event.timestamp:016d}{digest:020d}{index:020d}"


def _event_bytes(item: tuple[int, str, int, LogEvent]) -> int:
    return len(item[3].message) + EVENT_OVERHEAD


def _page(
    items: list[Any], body: dict[str, Any], limit: int, size: Callable[[Any], int] | None = None
) -> tuple[Iterable[Any], dict[str, str]]:
    """One page of at most `limit` items (and 1 MB); the token is good for the same question only."""
    question = {name: value for name, value in body.items() if name not in ("nextToken", "limit")}
    seal = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:24]
    first = 0
    if (token := body.get("nextToken")) is not None:
        if not isinstance(token, str) or not re.fullmatch(rf"{seal}-\d+", token):
            raise invalid("The specified nextToken is invalid.")
        first = int(token.rpartition("-")[2])
    last = min(len(items), first + limit)
    if size is not None:
        room = MAX_BATCH_BYTES
        for index in range(first, last):
            room -= size(items[index])
            if room < 0 and index > first:
                last = index
                break
    return items[first:last], ({"nextToken": f"{seal}-{last}"} if last < len(items) else {})
