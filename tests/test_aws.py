"""The SDK: errors into the taxonomy, identity, our own bodies on the wire, credentials that are not there."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions as sdk
import botocore.session
import pytest
from aiohttp import web
from botocore.parsers import ResponseParserError

from forwarder import aws as module
from forwarder.aws import Aws, AwsSettings, Role, region_of, translate
from forwarder.contract import Blocked, DeliveryError, Permanent, Permission, TooLarge, Transient
from tests.fakes.aws import FakeAws

ROLE = Role("arn:aws:iam::444455556666:role/falco", "shared-secret")
WEB_ROLE = "arn:aws:iam::777788889999:role/irsa"

Make = Callable[..., Aws]


@pytest.fixture(autouse=True)
def nothing_blocks() -> None:
    """The loop is not watched here: the SDK logs (pytest: to a file) and reads tokens within our calls."""


@pytest.fixture
async def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[FakeAws]:
    """A fake AWS, the environment that leads to it, and none of the machine's own settings."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    async with FakeAws() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
async def make(fake: FakeAws) -> AsyncIterator[Make]:
    """Makes clients' owners that are closed in the end."""
    async with AsyncExitStack() as stack:

        def build(*, validate: bool = True, **settings: str) -> Aws:
            found = Aws(AwsSettings(**settings), validate=validate)
            stack.push_async_callback(found.close)
            return found

        yield build


@pytest.fixture
def aws(make: Make) -> Aws:
    return make()


def without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)


def agent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials would come from the EKS Pod Identity agent, which does not answer."""
    without_credentials(monkeypatch)
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.RETRY_ATTEMPTS", 1)
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/credentials")


async def error_of(call: Any) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        await call
    return caught.value


# ---- errors into the taxonomy -----------------------------------------------------------------------


def answer(code: str, status: int, message: str = "words", headers: dict[str, str] | None = None) -> Any:
    return {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers or {}},
    }


@pytest.mark.parametrize(
    ("code", "status", "kind", "label"),
    [
        *((code, 400, Transient, "throttled") for code in sorted(module._THROTTLES)),
        ("AnythingAtAll", 429, Transient, "throttled"),
        *((code, 403, Transient, "credentials") for code in sorted(module._CREDENTIALS)),
        *((code, 400, Permission, "permission") for code in sorted(module._PERMISSION)),
        *((code, 401, Blocked, "disabled") for code in sorted(module._DISABLED)),
        ("ResourceNotFoundException", 400, Transient, "not_found"),
        ("OperationAbortedException", 400, Transient, "conflict"),
        ("ConflictException", 409, Transient, "conflict"),
        ("RequestTimeout", 400, Transient, "timeout"),
        ("RequestTimeoutException", 400, Transient, "timeout"),
        ("", 408, Transient, "timeout"),
        ("RequestEntityTooLarge", 413, TooLarge, "too_large"),
        ("InternalFailure", 500, Transient, "unavailable"),
        ("InternalException", 500, Transient, "unavailable"),
        ("ServiceUnavailableException", 503, Transient, "unavailable"),
        ("504", 504, Transient, "unavailable"),
        ("Strange", 200, Transient, "unavailable"),
        ("", 0, Transient, "unavailable"),
        ("InvalidParameterException", 400, Permanent, "invalid"),
        ("InvalidInputException", 400, Permanent, "invalid"),
        ("SerializationException", 400, Permanent, "invalid"),
        ("ResourceAlreadyExistsException", 400, Permanent, "invalid"),
        ("UnknownOperationException", 404, Permanent, "invalid"),
    ],
)
def test_answers_of_the_service(code: str, status: int, kind: type[DeliveryError], label: str) -> None:
    found = translate(sdk.ClientError(answer(code, status), "PutLogEvents"))
    assert type(found) is kind
    assert found.code == label
    assert str(found) == f"{code}: words"


def test_an_upload_too_large_is_split_and_an_event_too_large_is_not() -> None:
    text = "Upload too large: 1048577 bytes exceeds limit of 1048576"
    found = translate(sdk.ClientError(answer("InvalidParameterException", 400, text), "PutLogEvents"))
    assert type(found) is TooLarge
    text = "Log event too large: 1048600 bytes exceeds limit of 1048576"
    found = translate(sdk.ClientError(answer("InvalidParameterException", 400, text), "PutLogEvents"))
    assert type(found) is Permanent


@pytest.mark.parametrize(
    ("text", "secs"), [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("Fri, 20 Nov 2026 09:00:00 GMT", 0.0)]
)
@pytest.mark.parametrize(("code", "status"), [("ThrottlingException", 400), ("InternalFailure", 500)])
def test_the_services_own_delay_is_kept(code: str, status: int, text: str, secs: float) -> None:
    error = sdk.ClientError(answer(code, status, headers={"retry-after": text}), "PutLogEvents")
    assert translate(error).delay_secs == secs


def test_an_answer_without_any_detail() -> None:
    assert type(translate(sdk.ClientError({}, "PutLogEvents"))) is Transient


@pytest.mark.parametrize("operation", ["AssumeRoleWithWebIdentity", "AssumeRole"])
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("IDPCommunicationError", 400),
        ("IDPRejectedClaim", 403),
        ("RegionDisabledException", 403),
        ("ValidationError", 400),
        ("InvalidIdentityToken", 400),
        ("ExpiredTokenException", 400),
        ("AccessDenied", 403),
    ],
)
def test_trouble_with_the_token_service_never_condemns_alerts(operation: str, code: str, status: int) -> None:
    """The refused call is not the one that carries the alerts: they are not at fault."""
    assert not isinstance(translate(sdk.ClientError(answer(code, status), operation)), Permanent | TooLarge)


@pytest.mark.parametrize(
    ("error", "kind", "label"),
    [
        (sdk.NoCredentialsError(), Transient, "credentials"),
        (sdk.PartialCredentialsError(provider="x", cred_var="y"), Transient, "credentials"),
        (sdk.CredentialRetrievalError(provider="x", error_msg="y"), Transient, "credentials"),
        (sdk.TokenRetrievalError(provider="x", error_msg="y"), Transient, "credentials"),
        (sdk.MetadataRetrievalError(error_msg="y"), Transient, "credentials"),
        (sdk.NoAuthTokenError(), Transient, "credentials"),
        (sdk.ProfileNotFound(profile="x"), Transient, "credentials"),
        (sdk.ConfigParseError(path="x"), Transient, "credentials"),
        (sdk.ReadTimeoutError(endpoint_url="x"), Transient, "timeout"),
        (sdk.ConnectTimeoutError(endpoint_url="x"), Transient, "timeout"),
        (TimeoutError(), Transient, "timeout"),
        (sdk.HTTPClientError(error="x"), Transient, "network"),
        (sdk.EndpointConnectionError(endpoint_url="x"), Transient, "network"),
        (sdk.ConnectionClosedError(endpoint_url="x"), Transient, "network"),
        (sdk.SSLError(endpoint_url="x", error=OSError("y")), Transient, "network"),
        (sdk.ProxyConnectionError(proxy_url="x"), Transient, "network"),
        (aiohttp.ServerDisconnectedError(), Transient, "network"),
        (aiohttp.ClientPayloadError(), Transient, "network"),
        (ConnectionResetError(), Transient, "network"),
        (OSError(24, "Too many open files"), Transient, "network"),
        (sdk.ParamValidationError(report="x"), Permanent, "invalid"),
        (ResponseParserError("x"), Transient, "unknown"),
        (RuntimeError("x"), Transient, "unknown"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_sdk(error: Exception, kind: type[DeliveryError], label: str) -> None:
    found = translate(error)
    assert type(found) is kind
    assert found.code == label
    assert type(error).__name__ in str(found)


def test_our_own_errors_pass_unchanged() -> None:
    error = Blocked("x")
    assert translate(error) is error


# ---- region, partition, identity --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "environment", "region"),
    [
        ("a", {"AWS_REGION": "b", "AWS_DEFAULT_REGION": "c"}, "a"),
        ("", {"AWS_REGION": "b", "AWS_DEFAULT_REGION": "c"}, "b"),
        ("", {"AWS_REGION": "", "AWS_DEFAULT_REGION": "c"}, "c"),
        ("", {}, ""),
    ],
)
def test_region(own: str, environment: dict[str, str], region: str) -> None:
    assert region_of(AwsSettings(region=own), environment) == region


@pytest.mark.parametrize(
    ("region", "partition"),
    [
        ("eu-west-1", "aws"),
        ("cn-north-1", "aws-cn"),
        ("us-gov-west-1", "aws-us-gov"),
        ("eusc-de-east-1", "aws-eusc"),
    ],
)
async def test_partition_of_the_region(fake: FakeAws, make: Make, region: str, partition: str) -> None:
    aws = make(region=region)
    await aws.open_clients([])
    assert aws.partition() == partition
    assert fake.calls == []


async def test_partition_while_no_client_can_be_made(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make
) -> None:
    """ARNs must be right all the same: the SDK's own table is the judge."""
    agent_away(monkeypatch)
    tables = botocore.session.get_session().get_component("data_loader").load_data("partitions")
    found: dict[str, str] = {}
    for table in tables["partitions"]:
        region = next(name for name in sorted(table["regions"]) if not name.endswith("-global"))
        aws = make(region=region)
        await aws.open_clients([])
        found[table["id"]] = aws.partition()
    assert len(found) > 5
    assert {name: seen for name, seen in found.items() if name != seen} == {}


async def test_the_account_is_asked_for_once(aws: Aws, fake: FakeAws) -> None:
    await aws.open_clients([])
    assert aws.known_account == ""
    assert [await aws.account(), await aws.account(None), aws.known_account] == ["111122223333"] * 3
    assert [call.operation for call in fake.calls] == ["GetCallerIdentity"]
    assert await aws.account(ROLE) == "444455556666"


async def test_a_configured_account_is_not_asked_for(fake: FakeAws, make: Make) -> None:
    aws = make(account_id="012345678901")
    await aws.open_clients([])
    assert await aws.account() == "012345678901"
    assert fake.calls == []


async def test_clients_are_made_once_and_only_those_asked_for(aws: Aws, fake: FakeAws) -> None:
    await aws.open_clients([("logs", None), ("logs", None)])
    client = aws.client("logs")
    await aws.open_clients([("logs", None)])
    assert aws.client("logs") is client
    with pytest.raises(KeyError):
        aws.client("securityhub")
    assert fake.calls == []


# ---- our bodies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("validate", [True, False])
async def test_our_bytes_are_what_is_sent(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make, validate: bool
) -> None:
    """Each call its own, also side by side; and none where the SDK is to write the body."""
    received: list[bytes] = []

    async def record(request: web.BaseRequest) -> web.StreamResponse:
        received.append(await request.read())
        return web.Response(body=b"{}", headers={"Content-Type": "application/x-amz-json-1.1"})

    server = web.ServerRunner(web.Server(record))
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", 0).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.addresses[0][1]}")
    aws = make(account_id="111122223333", validate=validate)
    await aws.open_clients([("logs", None), ("securityhub", None)])
    logs, hub = aws.client("logs"), aws.client("securityhub")
    event = '[ {"timestamp":1,\t"message":"\u00e4\\u0001 %d"} ]'
    put = [
        b'{"logGroupName":"g", "logStreamName":"s", "logEvents":%b}' % (event % number).encode()
        for number in range(20)
    ]
    findings = b'{"Findings":[ ] }' if not validate else b'{"Findings":[%b] }' % FINDING
    await asyncio.gather(
        *(aws.call(logs, "put_log_events", body) for body in put),
        aws.call(hub, "batch_import_findings", findings),
        aws.call(logs, "create_log_group", logGroupName="plain"),
    )
    assert sorted(received) == sorted([*put, findings, b'{"logGroupName": "plain"}'])
    await server.cleanup()


FINDING = (
    b'{"SchemaVersion":"2018-10-08","Id":"x","ProductArn":"arn:aws:securityhub","GeneratorId":"g",'
    b'"AwsAccountId":"111122223333","CreatedAt":"2026-01-01T00:00:00Z","UpdatedAt":"2026-01-01T00:00:00Z",'
    b'"Title":"t","Description":"d","Resources":[{"Type":"Other","Id":"x"}]}'
)


async def test_without_a_body_of_ours_the_sdk_writes_it(aws: Aws, fake: FakeAws) -> None:
    await aws.open_clients([("logs", None)])
    logs = aws.client("logs")
    await aws.call(logs, "create_log_group", logGroupName="g")
    await aws.call(logs, "create_log_stream", logGroupName="g", logStreamName="s")
    event = {"timestamp": int(time.time() * 1000), "message": "written by the SDK"}
    await aws.call(logs, "put_log_events", logGroupName="g", logStreamName="s", logEvents=[event])
    assert [found.message for found in fake.events()] == ["written by the SDK"]


async def test_a_slip_of_ours_is_found_where_the_sdk_checks(aws: Aws, fake: FakeAws) -> None:
    await aws.open_clients([("logs", None)])
    error = await error_of(aws.call(aws.client("logs"), "put_log_events", b'{"logGroup":"x"}'))
    assert type(error) is Permanent
    assert fake.calls == []


# ---- a service in trouble ---------------------------------------------------------------------------


async def test_a_token_service_that_is_down(aws: Aws, fake: FakeAws) -> None:
    await aws.open_clients([])
    fault = fake.fail("GetCallerIdentity", status=503, code="ServiceUnavailable", times=None)
    assert (await error_of(aws.account())).code == "unavailable"
    fault.clear()
    fault = fake.reset("GetCallerIdentity", times=None)
    assert (await error_of(aws.account())).code == "network"
    fault.clear()
    assert await aws.account() == "111122223333"
    await fake.stop()
    aws.known_account = ""
    assert (await error_of(aws.account())).code == "network"


async def test_a_cut_answer_is_tried_again(aws: Aws, fake: FakeAws) -> None:
    await aws.open_clients([])
    fake.truncate("GetCallerIdentity", times=None)
    assert type(await error_of(aws.account())) is Transient


async def test_no_answer_in_time(monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make) -> None:
    monkeypatch.setattr(module, "READ_SECS_MAX", 0.05)
    monkeypatch.setattr(module, "SDK_ATTEMPTS_MAX", 1)
    aws = make()
    await aws.open_clients([])
    fake.hang("GetCallerIdentity", times=None)
    assert (await error_of(aws.account())).code == "timeout"


@pytest.mark.parametrize("change", ["secret", "unknown key", "clock"])
async def test_bad_credentials_are_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make, change: str
) -> None:
    if change == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    elif change == "unknown key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWNUNKNOWN00")
    else:
        fake.clock = lambda: time.time() - 86_400
    aws = make()
    await aws.open_clients([("logs", None)])
    error = await error_of(aws.call(aws.client("logs"), "create_log_group", logGroupName="g"))
    assert (type(error), error.code) == (Transient, "credentials")


# ---- credentials that come and go -------------------------------------------------------------------


async def test_credentials_that_appear_later_are_used(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make, tmp_path: Path
) -> None:
    """Nothing is given up for want of credentials, so once they are there, calls must go through."""
    without_credentials(monkeypatch)
    aws = make()
    await aws.open_clients([])
    assert (await error_of(aws.account())).code == "credentials"
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = {fake.access_key}\naws_secret_access_key = {fake.secret_key}\n"
    )
    assert await aws.account() == "111122223333"


async def test_calls_side_by_side_find_credentials_that_appeared(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make
) -> None:
    """One of them makes the client, and all use it."""
    without_credentials(monkeypatch)
    aws = make()
    await aws.open_clients([("logs", None)])
    logs = aws.client("logs")
    await error_of(aws.call(logs, "create_log_group", logGroupName="g"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", fake.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", fake.secret_key)
    await asyncio.gather(*(aws.call(logs, "create_log_group", logGroupName=f"g{n}") for n in range(5)))
    assert len(fake.groups) == 5


async def test_a_role_without_credentials_to_assume_it(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make
) -> None:
    without_credentials(monkeypatch)
    aws = make()
    await aws.open_clients([("logs", ROLE)])
    error = await error_of(aws.call(aws.client("logs", ROLE), "create_log_group", logGroupName="g"))
    assert (type(error), error.code) == (Transient, "credentials")


async def test_clients_open_while_the_pod_identity_agent_is_away(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make
) -> None:
    """Opening makes no call that may fail: the spool must take alerts whatever AWS does."""
    agent_away(monkeypatch)
    aws = make()
    await aws.open_clients([("logs", None), ("logs", ROLE)])
    assert (await error_of(aws.account())).code == "credentials"


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The web identity of a Kubernetes service account."""
    path = tmp_path / "token"
    path.write_text("e30.e30.c2lnbmF0dXJl")
    monkeypatch.setenv("AWS_ROLE_ARN", WEB_ROLE)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(path))
    return path


async def test_a_service_accounts_role_is_assumed(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make, token: Path
) -> None:
    without_credentials(monkeypatch)
    aws = make()
    await aws.open_clients([])
    assert await aws.account() == "777788889999"


async def test_an_identity_provider_that_is_away_is_only_waited_for(
    monkeypatch: pytest.MonkeyPatch, fake: FakeAws, make: Make, token: Path
) -> None:
    without_credentials(monkeypatch)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fault = fake.fail("AssumeRoleWithWebIdentity", status=400, code="IDPCommunicationError", times=None)
    aws = make()
    await aws.open_clients([("logs", None)])
    client = aws.client("logs")
    assert type(await error_of(aws.call(client, "create_log_group", logGroupName="g"))) is Transient
    fault.clear()
    await aws.call(client, "create_log_group", logGroupName="g")
    assert "g" in fake.groups


# ---- clocks and expiry --------------------------------------------------------------------------------


@pytest.mark.parametrize("behind_secs", [0, 100, -7200])
async def test_the_clock_is_compared_with_every_answer(fake: FakeAws, behind_secs: float) -> None:
    """Also with an answer that refuses, as a clock 5 minutes off gets it. The Date has whole seconds."""
    aws = Aws(AwsSettings(), now=lambda: time.time() - behind_secs)
    try:
        await aws.open_clients([("securityhub", None)])
        client = aws.client("securityhub")
        assert client.clock_skew_secs == 0
        fake.hub_enabled = False
        await error_of(aws.call(client, "batch_import_findings", b'{"Findings": []}'))
        assert client.clock_skew_secs == pytest.approx(behind_secs, abs=1.6)
    finally:
        await aws.close()


async def test_credentials_that_never_expire(aws: Aws) -> None:
    await aws.open_clients([("logs", None)])
    assert aws.client("logs").credentials_expire_at() == math.inf


async def test_the_expiry_of_a_role_is_known_once_it_was_assumed(aws: Aws, fake: FakeAws) -> None:
    fake.roles[ROLE.arn] = ROLE.external_id
    await aws.open_clients([("logs", ROLE)])
    client = aws.client("logs", ROLE)
    assert client.credentials_expire_at() == math.inf
    await aws.call(client, "create_log_group", logGroupName="/falco")
    assert client.credentials_expire_at() == pytest.approx(time.time() + 3600, abs=30)


async def test_credentials_are_renewed_while_nothing_is_sent(
    monkeypatch: pytest.MonkeyPatch, aws: Aws, fake: FakeAws
) -> None:
    """The SDK renews a role's 15 minutes ahead, if somebody asks; a renewal that fails ends nothing."""
    monkeypatch.setattr(module, "FRESH_PERIOD_SECS", 0.02)
    fake.roles[ROLE.arn] = ROLE.external_id
    fake.max_clock_skew = math.inf
    fake.clock = lambda: time.time() - 3000  # tokens of an hour then have 10 minutes left
    await aws.open_clients([("logs", ROLE), ("securityhub", None)])
    fresh = asyncio.create_task(aws.keep_fresh())
    try:
        async with asyncio.timeout(10):
            await until(lambda: [call.operation for call in fake.calls].count("AssumeRole") >= 3)
            soon = aws.client("logs", ROLE).credentials_expire_at()
            assert soon == pytest.approx(time.time() + 600, abs=30)
            fake.roles[ROLE.arn] = "another secret"
            await until(lambda: any(call.error == "AccessDenied" for call in fake.calls))
            fake.roles.clear()
            fake.clock = time.time
            await until(lambda: aws.client("logs", ROLE).credentials_expire_at() > soon + 1800)
        assert not fresh.done()
    finally:
        fresh.cancel()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the fake tells nobody
        await asyncio.sleep(0.01)
