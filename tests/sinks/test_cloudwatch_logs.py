"""CloudWatch Logs: what an event looks like, and what the sink does about groups, streams and refusals."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
from aiohttp import web

from forwarder import __version__
from forwarder.aws import Aws, AwsSettings, role_of
from forwarder.batch import Item, pack
from forwarder.contract import Again, Blocked, DeliveryError, Permanent, Permission, Reject, Transient
from forwarder.record import TEXT, UNPARSED, Record
from forwarder.sinks.cloudwatch_logs import (
    CALL_BYTES_MAX,
    EVENT_OVERHEAD_BYTES,
    CloudWatchLogs,
    CloudWatchLogsSettings,
)
from forwarder.timestamp import iso_milliseconds
from tests.fakes.aws import FakeAws
from tests.samples import REAL_ALERTS, REAL_BODIES, RECEIVED_NS, TEXT_LINES, body_of, record_of

# The SDK hands bodies over 1 MiB to aiohttp as bytes, which aiohttp warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")

NOW = RECEIVED_NS / 1e9
NOW_MS = RECEIVED_NS // 1_000_000
DAY_MS, HOUR_MS = 86_400_000, 3_600_000
GROUP = "/falco/prod"
ROLE = "arn:aws:iam::444455556666:role/logs"

Make = Callable[..., Awaitable[CloudWatchLogs]]


@pytest.fixture
async def fake(aws: FakeAws) -> FakeAws:
    """A fake AWS at a fixed moment."""
    aws.clock = lambda: NOW
    aws.max_clock_skew = float("inf")
    return aws


@pytest.fixture
async def make(fake: FakeAws) -> AsyncIterator[Make]:
    """Makes sinks that talk to the fake by the real SDK, which checks their parameters too."""
    async with AsyncExitStack() as stack:

        async def build(*, account_id: str = "", cluster: str = "prod", **settings: Any) -> CloudWatchLogs:
            settings = {"enabled": True, "log_group": GROUP} | settings
            aws = Aws(AwsSettings(account_id=account_id), validate=True)
            stack.push_async_callback(aws.close)
            sink = CloudWatchLogs(
                msgspec.convert(settings, CloudWatchLogsSettings),
                aws=aws,
                cluster=cluster,
                replica="replica-0",
                now=lambda: NOW,
            )
            await aws.open_clients([("logs", sink.role)])
            return sink

        yield build


def event_of(item: Item) -> dict[str, Any]:
    """The message of an item, checked to be counted as the service counts it."""
    message = json.loads(item.data)["message"]
    assert item.size_bytes == len(message.encode()) + EVENT_OVERHEAD_BYTES
    event: dict[str, Any] = json.loads(message)
    return event


def ours_of(record: Record, **more: Any) -> dict[str, Any]:
    """The keys we add to every event."""
    return {
        "id": record.id,
        "cluster": "prod",
        "account": "111122223333",
        "region": "eu-west-1",
        "forwarder": {"version": __version__, "received": iso_milliseconds(record.received_ns)} | more,
    }


def recent(body: bytes | dict[str, Any], **changes: Any) -> Record:
    return record_of(body, **{"time_ns": RECEIVED_NS} | changes)


def unparsed(raw: bytes) -> Record:
    return Record(
        UNPARSED, "0" * 32, 4, RECEIVED_NS, RECEIVED_NS, internal=False, body=raw, notes=b'"reason":"x"'
    )


# ---- the event --------------------------------------------------------------------------------------


async def test_falcos_bytes_are_kept_and_ours_added_at_the_end(make: Make) -> None:
    sink = await make()
    await sink.open()
    for body, sent in zip(REAL_BODIES, REAL_ALERTS, strict=True):
        record = recent(body)
        item = sink.encode(record, 7)
        message = json.loads(item.data)["message"].encode()
        assert message.startswith(body.rstrip(b" }") if body.endswith(b" }") else body[:-1])
        assert event_of(item) == sent | ours_of(record)
        assert (item.index, item.truncated, item.adjusted, item.order) == (7, False, False, NOW_MS)


async def test_all_real_alerts_arrive_as_sent(make: Make, fake: FakeAws) -> None:
    sink = await make()
    await sink.open()
    records = [record_of(body) for body in REAL_BODIES]
    items = [sink.encode(record, index) for index, record in enumerate(records)]
    for batch in pack(items, sink.limits):
        assert await sink.deliver(batch) == {}
    arrived = {message["id"]: message for message in fake.messages()}
    for record, sent in zip(records, REAL_ALERTS, strict=True):
        assert arrived[record.id] == sent | ours_of(record, timestamp_adjusted=True)
    assert fake.validation_errors == []


async def test_numbers_no_type_can_hold_arrive_digit_by_digit(make: Make, fake: FakeAws) -> None:
    sink = await make()
    huge = b"9" * 5000
    body = b'{"rule":"r","output_fields":{"n":' + huge + b',"f":1e400,"t":1739178940698757001}}'
    await sink.deliver([sink.encode(recent(body), 0)])
    (event,) = fake.events()
    assert event.message.encode().startswith(body[:-1])


async def test_enrichment_and_notes_have_their_places(make: Make) -> None:
    sink = await make(account_id="999988887777")
    record = recent(
        {"rule": "r", "cluster": "sender's"},
        enrichment=b'"node":{"name":"n"},"kubernetes":{"pod":{"name":"p"}}',
    )
    event = event_of(sink.encode(record, 0))
    assert event["node"] == {"name": "n"}
    assert event["kubernetes"] == {"pod": {"name": "p"}}
    assert event["cluster"] == "prod"
    assert event["account"] == "999988887777"
    assert event["forwarder"]["sender_keys"] == {"cluster": "sender's"}


async def test_keys_that_are_unknown_are_left_out(make: Make, fake: FakeAws) -> None:
    """STS cannot be reached at start: the account follows when it is known."""
    fake.fail("GetCallerIdentity", times=None)
    sink = await make(cluster="")
    await sink.open()
    event = event_of(sink.encode(recent({"rule": "r"}), 0))
    assert event.keys() == {"rule", "id", "region", "forwarder"}


@pytest.mark.parametrize("raw", [b"not json", b"\x00\xff\xfe", b'{"rule":', "\u00e4\u2028".encode()])
async def test_an_unparsed_body_is_forwarded_as_text(make: Make, fake: FakeAws, raw: bytes) -> None:
    sink = await make()
    await sink.deliver([sink.encode(unparsed(raw), 0)])
    (event,) = fake.messages()
    assert event["unparsed"] == raw.decode("utf-8", "replace")
    assert event["forwarder"]["reason"] == "x"


async def test_a_text_alert_is_an_event(make: Make) -> None:
    sink = await make()
    event = event_of(sink.encode(recent(TEXT_LINES[0], kind=TEXT), 0))
    assert (event["output"], event["priority"]) == (TEXT_LINES[0].decode(), "Notice")


# ---- timestamps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset_ms", "retention", "moved"),
    [
        (0, 0, False),
        (-DAY_MS, 0, False),
        (-13 * DAY_MS, 0, False),
        (-15 * DAY_MS, 0, True),
        (-400 * DAY_MS, 3653, True),
        (-20 * HOUR_MS, 1, False),
        (-25 * HOUR_MS, 1, True),
        (-6 * DAY_MS, 7, False),
        (-8 * DAY_MS, 7, True),
        (HOUR_MS, 0, False),
        (3 * HOUR_MS, 0, True),
        (4000 * DAY_MS, 1, True),
    ],
)
async def test_timestamps_move_into_the_accepted_window(
    make: Make, fake: FakeAws, offset_ms: int, retention: int, moved: bool
) -> None:
    sink = await make(retention_days=retention)
    await sink.open()
    text = iso_milliseconds((NOW_MS + offset_ms) * 1_000_000)
    item = sink.encode(record_of({"rule": "r", "time": text}), 0)
    event = event_of(item)
    assert item.adjusted is moved
    assert event["forwarder"].get("timestamp_adjusted", False) is moved
    assert event["time"] == text
    if not moved:
        assert item.order == NOW_MS + offset_ms
    assert await sink.deliver([item]) == {}
    assert len(fake.events()) == 1


@pytest.mark.parametrize("time_ns", [0, -(10**18), 2**63, 2**64 - 1])
async def test_impossible_times_are_delivered_all_the_same(make: Make, fake: FakeAws, time_ns: int) -> None:
    sink = await make()
    assert await sink.deliver([sink.encode(record_of({"rule": "r"}, time_ns=time_ns), 0)]) == {}
    assert len(fake.events()) == 1


async def test_the_services_clock_decides(make: Make) -> None:
    """Where ours is 40 days late, an alert of "now" by our clock is too old for the service, whose answer tells."""
    sink = await make()
    sink._now = lambda: time.time() - 40 * DAY_MS / 1000
    record = record_of({"rule": "r"}, time_ns=int(sink._now() * 1e9))
    before = sink.encode(record, 0)
    await sink.deliver([before])
    after = sink.encode(record, 0)
    assert (before.adjusted, after.adjusted) == (False, True)
    assert abs(after.order + 14 * DAY_MS - time.time() * 1000) < HOUR_MS


# ---- streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "stream"),
    [
        ("{replica}", "replica-0"),
        ("fixed", "fixed"),
        ("{cluster}/{hostname}/{date}", "prod/node_1/2026-11-20"),
        ("a:b*c", "a_b_c"),
        ("{hostname}" * 25, ("node_1" * 25)),
    ],
)
async def test_the_stream_of_an_alert(make: Make, fake: FakeAws, template: str, stream: str) -> None:
    sink = await make(log_stream=template)
    record = record_of({"rule": "r", "hostname": "node:1", "time": "2026-11-20T23:59:59.9Z"})
    item = sink.encode(record, 0)
    assert item.partition == stream
    await sink.deliver([item])
    assert list(fake.groups[GROUP].streams) == [stream]


async def test_the_stream_of_an_alert_without_hostname(make: Make) -> None:
    sink = await make(log_stream="{hostname}")
    assert sink.encode(recent({"rule": "r"}), 0).partition == "unknown"


# ---- group and stream -------------------------------------------------------------------------------


async def test_open_makes_the_group_with_all_that_is_set(make: Make, fake: FakeAws) -> None:
    key = "arn:aws:kms:eu-west-1:111122223333:key/1234"
    sink = await make(retention_days=90, kms_key_id=key, log_group_class="INFREQUENT_ACCESS")
    await sink.open()
    await sink.open()
    group = fake.groups[GROUP]
    assert (group.retention_days, group.kms_key_id, group.group_class) == (90, key, "INFREQUENT_ACCESS")


async def test_open_leaves_retention_alone_where_none_is_set(make: Make, fake: FakeAws) -> None:
    await (await make()).open()
    assert fake.groups[GROUP].retention_days is None
    assert "PutRetentionPolicy" not in {call.operation for call in fake.calls}


@pytest.mark.parametrize("refused", ["CreateLogGroup", "PutRetentionPolicy"])
@pytest.mark.parametrize("code", ["AccessDeniedException", "InvalidParameterException"])
async def test_open_goes_on_without_the_right_to_prepare_the_group(
    make: Make, fake: FakeAws, refused: str, code: str
) -> None:
    fake.fail(refused, status=400, code=code, times=None)
    await (await make(retention_days=7)).open()


async def test_open_waits_for_a_service_that_is_away(make: Make, fake: FakeAws) -> None:
    fake.fail("CreateLogGroup", status=503, code="ServiceUnavailableException", times=None)
    with pytest.raises(Transient):
        await (await make()).open()


async def test_a_missing_group_and_stream_are_made_on_the_way(make: Make, fake: FakeAws) -> None:
    sink = await make(retention_days=7)
    item = sink.encode(recent({"rule": "r"}), 0)
    assert await sink.deliver([item]) == {}
    assert fake.groups[GROUP].retention_days == 7
    fake.groups.clear()
    assert await sink.deliver([item]) == {}
    del fake.groups[GROUP].streams["replica-0"]
    assert await sink.deliver([item]) == {}
    assert len(fake.events()) == 1


@pytest.mark.parametrize("refused", ["CreateLogGroup", "PutRetentionPolicy"])
async def test_a_missing_stream_is_made_without_the_right_to_make_the_group(
    make: Make, fake: FakeAws, refused: str
) -> None:
    """The group was made by somebody else, as is usual: only streams are ours."""
    sink = await make(retention_days=7)
    await sink.open()
    fake.fail(refused, status=400, code="AccessDeniedException", times=None)
    assert await sink.deliver([sink.encode(recent({"rule": "r"}), 0)]) == {}
    assert len(fake.events()) == 1


async def test_no_right_to_make_the_stream_is_told_as_such(make: Make, fake: FakeAws) -> None:
    sink = await make()
    fake.fail("CreateLogStream", status=400, code="AccessDeniedException", times=None)
    with pytest.raises(Blocked):
        await sink.deliver([sink.encode(recent({"rule": "r"}), 0)])


async def test_a_stream_made_by_another_call_meanwhile_is_fine(make: Make, fake: FakeAws) -> None:
    fake.fail("PutLogEvents", status=400, code="ResourceNotFoundException")
    sink = await make()
    await sink.open()
    item = sink.encode(recent({"rule": "r"}), 0)
    await sink._create("create_log_stream", logGroupName=GROUP, logStreamName=item.partition)
    assert await sink.deliver([item]) == {}


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("ThrottlingException", 400, Transient),
        ("ServiceUnavailableException", 503, Transient),
        ("InvalidParameterException", 400, Permanent),
        ("AccessDeniedException", 400, Permission),
    ],
)
async def test_failures_of_a_call(
    make: Make, fake: FakeAws, code: str, status: int, kind: type[DeliveryError]
) -> None:
    sink = await make()
    fake.fail("PutLogEvents", status=status, code=code, times=None)
    with pytest.raises(kind, match=code):
        await sink.deliver([sink.encode(recent({"rule": "r"}), 0)])


async def test_a_role_is_assumed_for_the_sink(make: Make, fake: FakeAws) -> None:
    fake.roles[ROLE] = "shared-secret"
    sink = await make(role_arn=ROLE, external_id="shared-secret")
    assert sink.role == role_of(sink._settings)
    assert await sink.deliver([sink.encode(recent({"rule": "r"}), 0)]) == {}
    assert {call.operation for call in fake.calls} >= {"AssumeRole", "PutLogEvents"}
    assert sink._aws.client("logs", sink.role) is not None


# ---- refused events ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "refused"),
    [
        ({}, []),
        ({"tooOldLogEventEndIndex": 2}, [0, 1]),
        ({"expiredLogEventEndIndex": 3}, [0, 1, 2]),
        ({"tooOldLogEventEndIndex": 1, "expiredLogEventEndIndex": 2}, [0, 1]),
        ({"tooNewLogEventStartIndex": 4}, [4]),
        ({"tooNewLogEventStartIndex": 0}, [0, 1, 2, 3, 4]),
        ({"tooNewLogEventStartIndex": 5}, []),
        ({"tooOldLogEventEndIndex": 1, "tooNewLogEventStartIndex": 3}, [0, 3, 4]),
        ({"tooOldLogEventEndIndex": 99}, [0, 1, 2, 3, 4]),
    ],
)
def test_indexes_of_refused_events(info: dict[str, int], refused: list[int]) -> None:
    """The ends are exclusive, the start is inclusive."""
    rejects = CloudWatchLogs._rejects({"rejectedLogEventsInfo": info}, 5)
    assert sorted(rejects) == refused
    assert {(reject.reason, reject.again) for reject in rejects.values()} <= {("rejected", Again.LIMITED)}
    assert CloudWatchLogs._rejects({}, 5) == {}


async def test_exactly_the_refused_events_are_reported(make: Make, fake: FakeAws) -> None:
    """A group whose retention is shorter than we know, and a clock that is ahead of ours."""
    sink = await make()
    await sink.open()
    fake.groups[GROUP].retention_days = 1
    offsets = (-30 * DAY_MS, -2 * DAY_MS, -DAY_MS + 1000, 0, HOUR_MS, 5 * HOUR_MS)
    items = [
        Item(index=number, data=b'{"timestamp":%d,"message":"%d"}' % (NOW_MS + offset, number), size_bytes=27)
        for number, offset in enumerate(offsets)
    ]
    items = [msgspec.structs.replace(item, partition="s") for item in items]
    del items[2 + 2]  # within 24 hours of the third
    rejects = await sink.deliver(items)
    assert sorted(rejects) == [0, 1, 4]
    assert all(isinstance(reject, Reject) for reject in rejects.values())
    assert [event.message for event in fake.events()] == ["2", "3"]


# ---- an answer that is odd --------------------------------------------------------------------------


async def test_an_answer_without_a_date_is_no_problem(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    sink = await make()
    await sink.deliver([sink.encode(recent({"rule": "r"}), 0)])
    assert sink._skew_secs != 0.0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(
            body=b"{}", headers={"Date": "no date", "Content-Type": "application/x-amz-json-1.1"}
        )

    server = web.ServerRunner(web.Server(answer))
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", 0).start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.addresses[0][1]}")
        aws = Aws(AwsSettings(account_id="111122223333"))
        await aws.open_clients([("logs", None)])
        sink._aws = aws
        assert await sink.deliver([sink.encode(recent({"rule": "r"}), 0)]) == {}
        assert sink._skew_secs == 0.0
        await aws.close()
    finally:
        await server.cleanup()


async def test_a_full_call_is_within_the_services_limits(make: Make, fake: FakeAws) -> None:
    sink = await make()
    records = [recent({"rule": "r", "output": "\u00e4" * 500, "n": number}) for number in range(1200)]
    batches = pack([sink.encode(record, n) for n, record in enumerate(records)], sink.limits)
    assert len(batches) > 1
    for batch in batches:
        assert sum(item.size_bytes for item in batch) <= CALL_BYTES_MAX
        assert await sink.deliver(batch) == {}
    assert sorted(message["n"] for message in fake.messages()) == list(range(1200))
    assert body_of(fake.messages()[0])
