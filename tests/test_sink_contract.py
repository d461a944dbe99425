"""What every sink must do, whatever its service: one table, run against each entry of SINKS."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from forwarder.aws import Aws, AwsSettings
from forwarder.batch import Limits
from forwarder.config import documented
from forwarder.contract import Blocked, DeliveryError, Permanent, Permission, TooLarge, Transient
from forwarder.record import ALERT, Record
from forwarder.sinks import SINKS, sink_class
from tests.fakes.aws import FakeAws

OPERATIONS = {"cloudwatch_logs": "PutLogEvents", "security_hub": "BatchImportFindings"}
ENABLED: dict[str, dict[str, Any]] = {"cloudwatch_logs": {"log_group": "/falco/contract"}, "security_hub": {}}
BODY = b'{"rule":"Terminal shell in container","priority":"Notice","output":"hello","source":"syscall"}'


def record(number: int, body: bytes = BODY) -> Record:
    now = time.time_ns()
    return Record(ALERT, f"{number:032x}", 5, now, now, internal=False, body=body, hostname="node")


@pytest.fixture(params=list(SINKS))
async def sink(request: pytest.FixtureRequest, aws: FakeAws) -> AsyncIterator[Any]:
    """An open sink of each kind, its clients pointed at the fake."""
    name = request.param
    session = Aws(AwsSettings(), validate=True)
    made = sink_class(name)(
        sink_class(name).settings_type(enabled=True, **ENABLED[name]),
        aws=session,
        cluster="contract",
        replica="replica-0",
        now=time.time,
        log_group="/falco/contract",
        log_stream="{replica}",
    )
    await session.open_clients([(made.service, made.role)])
    await made.open()
    yield made
    await session.close()


def items(sink: Any, count: int) -> list[Any]:
    return [sink.encode(record(number), number) for number in range(count)]


async def test_every_sink_is_in_the_tables_of_this_test() -> None:
    assert set(SINKS) == set(OPERATIONS) == set(ENABLED)


async def test_a_sink_declares_its_contract(sink: Any) -> None:
    """Name, limits, pace and filters are data the worker reads."""
    assert sink.name in SINKS
    assert isinstance(sink.limits, Limits)
    assert sink.limits.records_max > 0
    assert sink.linger_secs >= 0
    assert 0 <= sink.minimum_rank <= 7
    assert sink.pace.limit >= 1
    assert isinstance(sink.findings_only, bool)


async def test_settings_are_documented_and_off_by_default(sink: Any) -> None:
    leaves = {leaf.key: leaf for leaf in documented(sink.settings_type)}
    assert all(leaf.meaning for leaf in leaves.values())
    assert leaves["enabled"].default is False
    assert "minimum_priority" in leaves


async def test_a_batch_is_accepted_and_counted_as_the_service_counts(sink: Any, aws: FakeAws) -> None:
    batch = items(sink, 20)
    assert await sink.deliver(batch) == {}
    assert len(aws.events()) + len(aws.findings) == 20
    assert not aws.validation_errors


async def test_a_full_batch_is_within_the_services_limits(sink: Any, aws: FakeAws) -> None:
    batch = items(sink, min(sink.limits.records_max, 3000))
    assert await sink.deliver(batch) == {}
    assert not aws.validation_errors


async def test_encoding_is_pure(sink: Any) -> None:
    """The same record gives the same bytes: a retry after a crash repeats, it does not add."""
    one = record(7)
    assert sink.encode(one, 0).data == sink.encode(one, 0).data


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "ThrottlingException", Transient),
        (429, "TooManyRequestsException", Transient),
        (500, "InternalException", Transient),
        (503, "ServiceUnavailableException", Transient),
        (403, "ExpiredTokenException", Transient),
        (403, "InvalidSignatureException", Transient),
        (400, "UnrecognizedClientException", Transient),
        (400, "InvalidParameterException", Permanent),
        (400, "InvalidInputException", Permanent),
        (403, "AccessDeniedException", Permission),
        (401, "InvalidAccessException", Blocked),
        (413, "RequestEntityTooLarge", TooLarge),
    ],
)
async def test_errors_become_the_taxonomy(
    sink: Any, aws: FakeAws, status: int, code: str, expected: type[DeliveryError]
) -> None:
    aws.fail(OPERATIONS[sink.name], status=status, code=code, times=None)
    with pytest.raises(DeliveryError) as caught:
        await sink.deliver(items(sink, 2))
    assert type(caught.value) is expected
    assert code in str(caught.value)


async def test_a_cut_answer_and_a_reset_are_transient(sink: Any, aws: FakeAws) -> None:
    for fault in (aws.truncate, aws.reset):
        one = fault(OPERATIONS[sink.name], times=None)
        with pytest.raises(Transient):
            await sink.deliver(items(sink, 1))
        one.clear()


async def test_an_alert_of_four_megabytes_is_cut_to_fit(sink: Any, aws: FakeAws) -> None:
    body = msgspec.json.encode({"rule": "r", "priority": "Notice", "output": "x" * (4 << 20)})
    item = sink.encode(record(1, body), 0)
    assert item.size_bytes <= sink.limits.bytes_max
    assert await sink.deliver([item]) == {}
    assert not aws.validation_errors


async def test_opening_twice_is_harmless(sink: Any) -> None:
    await sink.open()
    assert await sink.deliver(items(sink, 1)) == {}
