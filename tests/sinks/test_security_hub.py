"""Security Hub: what is accepted, what is refused one by one, a hub that is off, and another account's hub."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
from aiohttp import web

from forwarder.aws import Aws, AwsSettings, Role
from forwarder.batch import Item, pack
from forwarder.contract import Again, Blocked, DeliveryError, Permanent, Permission, Reject, Transient
from forwarder.sinks import SINKS, sink_class
from forwarder.sinks.security_hub import CALL_BYTES_MAX, FINDINGS_MAX, SecurityHub, SecurityHubSettings
from tests.fakes.aws import FakeAws
from tests.samples import REAL_BODIES, record_of

pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")

ROLE = "arn:aws:iam::444455556666:role/security/falco"

Make = Callable[..., Awaitable[SecurityHub]]


@pytest.fixture
async def fake(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> FakeAws:
    """A fake AWS in whose way the SDK's own log, which pytest writes to a file, does not stand."""
    monkeypatch.setattr(logging.getLogger("aiobotocore.credentials"), "disabled", True)
    return aws


@pytest.fixture
async def make(fake: FakeAws) -> AsyncIterator[Make]:
    """Makes sinks that talk to the fake by the real SDK."""
    async with AsyncExitStack() as stack:

        async def build(
            *, account_id: str = "", opened: bool = True, validate: bool = True, **settings: Any
        ) -> SecurityHub:
            aws = Aws(AwsSettings(account_id=account_id), validate=validate)
            stack.push_async_callback(aws.close)
            sink = SecurityHub(
                msgspec.convert({"enabled": True} | settings, SecurityHubSettings),
                aws=aws,
                cluster="prod",
                replica="replica-0",
                log_group="/falco/prod",
                log_stream="{replica}",
            )
            await aws.open_clients([("securityhub", sink.role)])
            if opened:
                await sink.open()
            return sink

        yield build


def items_of(sink: SecurityHub, *alerts: dict[str, Any]) -> list[Item]:
    return [sink.encode(record_of({"rule": "r"} | alert), index) for index, alert in enumerate(alerts)]


def test_the_registry_knows_the_class() -> None:
    assert sink_class("security_hub") is SecurityHub
    assert list(SINKS) == ["cloudwatch_logs", "security_hub"]


# ---- accepted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("validate", [True, False])
async def test_all_real_alerts_become_findings(make: Make, fake: FakeAws, validate: bool) -> None:
    """With the SDK's own check of parameters and, as in production, without it."""
    sink = await make(validate=validate)
    items = [sink.encode(record_of(body), index) for index, body in enumerate(REAL_BODIES)]
    batches = pack(items, sink.limits)
    for batch in batches:
        assert len(batch) <= FINDINGS_MAX
        assert await sink.deliver(batch) == {}
    assert fake.findings.keys() == {json.loads(item.data)["Id"] for item in items}
    assert fake.validation_errors == []
    assert all(call.body_bytes < CALL_BYTES_MAX for call in fake.calls)
    some = next(iter(fake.findings.values()))
    assert some["Severity"]["Label"] == some["FindingProviderFields"]["Severity"]["Label"]
    assert some["ProductFields"]["falco/log_stream"] == "replica-0"


async def test_a_repeated_call_changes_nothing(make: Make, fake: FakeAws) -> None:
    sink = await make()
    items = items_of(sink, {"uuid": "a"}, {"uuid": "b"})
    for _ in range(2):
        assert await sink.deliver(items) == {}
    assert (len(fake.findings), fake.finding_writes, fake.finding_ignored) == (2, 2, 2)


async def test_a_full_call_of_large_findings_is_within_the_limit(make: Make, fake: FakeAws) -> None:
    sink = await make()
    alerts = [
        {"uuid": f"u{n}", "output_fields": {f"field{i}": "v" * 2000 for i in range(40)}} for n in range(101)
    ]
    batches = pack(items_of(sink, *alerts), sink.limits)
    assert [sum(item.size_bytes for item in batch) <= CALL_BYTES_MAX for batch in batches] == [True] * len(
        batches
    )
    for batch in batches:
        assert await sink.deliver(batch) == {}
    assert len(fake.findings) == 101


async def test_settings_reach_the_finding(make: Make, fake: FakeAws) -> None:
    sink = await make(
        severity="guidance",
        minimum_priority="error",
        remediation={"r": {"text": "Look", "url": "https://w/x"}},
    )
    assert sink.minimum_rank == 3
    await sink.deliver(items_of(sink, {"priority": "Warning"}))
    (finding,) = fake.findings.values()
    assert finding["Severity"]["Label"] == "HIGH"
    assert finding["Remediation"] == {"Recommendation": {"Text": "Look", "Url": "https://w/x"}}


# ---- two alerts of one id ---------------------------------------------------------------------------


async def test_of_two_alerts_with_one_id_the_later_stands_for_both(make: Make, fake: FakeAws) -> None:
    sink = await make()
    items = items_of(sink, {"uuid": "a", "output": "1"}, {"uuid": "b"}, {"uuid": "a", "output": "3"})
    assert await sink.deliver(items) == {}
    assert fake.calls[-1].count == 2
    assert {finding["Description"] for finding in fake.findings.values()} == {"3", "r"}


async def test_of_two_alerts_with_one_id_both_are_refused(make: Make, fake: FakeAws) -> None:
    sink = await make()
    fake.fail_findings(lambda finding: finding["Id"].endswith("/a"), code="InvalidInput")
    items = items_of(sink, {"uuid": "a", "n": 1}, {"uuid": "b"}, {"uuid": "a", "n": 2})
    assert sorted(await sink.deliver(items)) == [0, 2]


# ---- refused one by one -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason", "again"),
    [
        ("InvalidInput", "invalid", Again.NEVER),
        ("FindingSizeExceeded", "invalid", Again.NEVER),
        ("InvalidAccess", "permission", Again.BLOCKED),
        ("InvalidAccessException", "permission", Again.BLOCKED),
        ("InternalError", "unknown", Again.ALWAYS),
        ("InternalFailure", "unknown", Again.ALWAYS),
        ("ConcurrentUpdateError", "unknown", Again.ALWAYS),
        ("LimitExceeded", "unknown", Again.ALWAYS),
        ("ThrottlingException", "unknown", Again.ALWAYS),
        ("SomethingNew", "unknown", Again.LIMITED),
    ],
)
async def test_refused_findings_by_code(
    make: Make, fake: FakeAws, code: str, reason: str, again: Again
) -> None:
    sink = await make()
    fake.fail_findings(lambda finding: finding["Id"].endswith("/b"), code=code, message="because")
    rejects = await sink.deliver(items_of(sink, {"uuid": "a"}, {"uuid": "b"}, {"uuid": "c"}))
    assert list(rejects) == [1]
    assert (rejects[1].reason, rejects[1].again) == (reason, again)
    assert rejects[1].detail == f"{code}: because"
    assert len(fake.findings) == 2


async def test_a_hub_that_is_off_refuses_the_call(make: Make, fake: FakeAws) -> None:
    sink = await make()
    fake.hub_enabled = False
    with pytest.raises(Blocked, match="not subscribed"):
        await sink.deliver(items_of(sink, {}))


async def test_a_hub_that_is_off_refuses_every_finding(make: Make, fake: FakeAws) -> None:
    sink = await make()
    fake.hub_enabled = False
    fake.hub_disabled_shape = "finding"
    rejects = await sink.deliver(items_of(sink, {"uuid": "a"}, {"uuid": "b"}))
    assert {place: reject.again for place, reject in rejects.items()} == {0: Again.BLOCKED, 1: Again.BLOCKED}
    fake.hub_enabled = True
    assert await sink.deliver(items_of(sink, {"uuid": "a"})) == {}


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("TooManyRequestsException", 429, Transient),
        ("LimitExceededException", 429, Transient),
        ("InternalException", 500, Transient),
        ("InvalidInputException", 400, Permanent),
        ("AccessDeniedException", 403, Permission),
    ],
)
async def test_failures_of_a_call(
    make: Make, fake: FakeAws, code: str, status: int, kind: type[DeliveryError]
) -> None:
    sink = await make()
    fake.fail("BatchImportFindings", code=code, status=status, times=None)
    with pytest.raises(kind):
        await sink.deliver(items_of(sink, {}))


async def test_a_foreign_account_fails_the_whole_call(make: Make) -> None:
    sink = await make(account_id="999988887777")
    with pytest.raises(Permission, match="999988887777"):
        await sink.deliver(items_of(sink, {}))


@pytest.mark.parametrize(
    "answer",
    [
        {"SuccessCount": 0, "FailedCount": 2, "FailedFindings": []},
        {"SuccessCount": 0, "FailedCount": 2},
        {
            "SuccessCount": 0,
            "FailedCount": 2,
            "FailedFindings": [{"Id": "?", "ErrorCode": "x", "ErrorMessage": ""}],
        },
        {
            "SuccessCount": 0,
            "FailedCount": 2,
            "FailedFindings": [
                {"Id": "falco/eu-west-1/111122223333/prod/a", "ErrorCode": "InvalidInput", "ErrorMessage": ""}
            ],
        },
    ],
    ids=["none", "absent", "unknown id", "one of two"],
)
async def test_failures_that_are_not_named_are_not_taken_for_success(
    make: Make, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    """The call is repeated rather than a finding lost: repeating is harmless."""
    sink = await make()
    items = items_of(sink, {"uuid": "a"}, {"uuid": "b"})

    async def respond(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        return web.json_response(answer)

    server = web.ServerRunner(web.Server(respond))
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", 0).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.addresses[0][1]}")
    aws = Aws(AwsSettings(account_id="111122223333"))
    await aws.open_clients([("securityhub", None)])
    sink._aws = aws
    try:
        with pytest.raises(Transient, match="does not say"):
            await sink.deliver(items)
    finally:
        await aws.close()
        await server.cleanup()


# ---- encoding ---------------------------------------------------------------------------------------


async def test_a_finding_counts_with_its_comma(make: Make) -> None:
    sink = await make()
    item = sink.encode(record_of(REAL_BODIES[0]), 5)
    assert (item.index, item.size_bytes) == (5, len(item.data) + 1)


async def test_encoding_needs_the_account(make: Make) -> None:
    sink = await make(opened=False)
    with pytest.raises(RuntimeError, match="before open"):
        sink.encode(record_of({"rule": "r"}), 0)


async def test_what_cannot_be_a_finding_is_refused_before_the_call(make: Make) -> None:
    sink = await make()
    assert sink._context is not None
    sink._context = sink._context._replace(account="123")
    with pytest.raises(Reject) as caught:
        sink.encode(record_of({"rule": "r"}), 0)
    assert (caught.value.reason, caught.value.again) == ("unmappable", Again.NEVER)


async def test_open_needs_to_know_the_account(make: Make, fake: FakeAws) -> None:
    fake.fail("GetCallerIdentity", code="AccessDenied", status=403, times=None)
    with pytest.raises(Permission):
        await make()
    sink = await make(account_id="111122223333")
    assert await sink.deliver(items_of(sink, {})) == {}


# ---- another account --------------------------------------------------------------------------------


async def test_findings_belong_to_the_account_of_the_role(make: Make, fake: FakeAws) -> None:
    fake.roles[ROLE] = "shared-secret"
    sink = await make(role_arn=ROLE, external_id="shared-secret")
    assert sink.role == Role(ROLE, "shared-secret")
    assert await sink.deliver(items_of(sink, {"uuid": "a"})) == {}
    (finding,) = fake.findings.values()
    assert finding["AwsAccountId"] == "444455556666"
    assert finding["Id"] == "falco/eu-west-1/444455556666/prod/a"
    assert fake.validation_errors == []


@pytest.mark.parametrize("external_id", ["", "wrong"])
async def test_the_wrong_external_id_is_a_lack_of_permission(
    make: Make, fake: FakeAws, external_id: str
) -> None:
    fake.roles[ROLE] = "shared-secret"
    sink = await make(role_arn=ROLE, external_id=external_id)
    with pytest.raises(Permission, match="AssumeRole"):
        await sink.deliver(items_of(sink, {}))
    fake.roles[ROLE] = None
    assert await sink.deliver(items_of(sink, {})) == {}
