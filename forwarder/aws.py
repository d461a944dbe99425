"""The AWS SDK, in one place: sessions, clients, identity, pre-encoded bodies, errors into the taxonomy.

Facts that shaped it (measured with aiobotocore 3.10): the SDK's own validation and serialisation of a full
call block the event loop for 8 to 15 ms, so bodies are encoded by the sinks and put in by a ``before-call``
hook (public botocore API) while the SDK does endpoint, credentials, signature, transport and parsing. The
first client costs some 100 ms of loading: ``open_clients`` runs before the listener opens. Retries and
back-off are the delivery worker's; the SDK tries twice at most.

Everything an environment may say keeps its SDK name: AWS_ENDPOINT_URL (and its service forms), AWS_REGION,
AWS_ACCESS_KEY_ID, IRSA (AWS_ROLE_ARN + AWS_WEB_IDENTITY_TOKEN_FILE), EKS Pod Identity, and so on.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

import aiobotocore
import aiohttp
import botocore.exceptions as sdk
import msgspec
import structlog
from aiobotocore.config import AioConfig
from aiobotocore.credentials import AioAssumeRoleCredentialFetcher, AioDeferredRefreshableCredentials
from aiobotocore.session import AioSession
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest

from forwarder import __version__
from forwarder.config import setting
from forwarder.contract import Blocked, DeliveryError, Permanent, Permission, TooLarge, Transient

CONNECT_SECS_MAX, READ_SECS_MAX = 3.0, 20.0
CONNECTIONS_MAX = 16
SDK_ATTEMPTS_MAX = 2
FRESH_PERIOD_SECS = 60.0

_THROTTLES = frozenset(
    {
        "LimitExceededException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "TooManyRequestsException",
    }
)
_CREDENTIALS = frozenset(
    {
        "AuthFailure",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidIdentityToken",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_PARTITIONS = {
    "cn-": "aws-cn",
    "us-gov-": "aws-us-gov",
    "us-isob-": "aws-iso-b",
    "us-isof-": "aws-iso-f",
    "us-iso-": "aws-iso",
    "eu-isoe-": "aws-iso-e",
    "eusc-": "aws-eusc",
}
_STS = frozenset({"AssumeRole", "AssumeRoleWithWebIdentity", "GetCallerIdentity"})
"""Made on the way to a call: whatever they say, it is about our credentials, not about an alert."""
_PERMISSION = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"})
_DISABLED = frozenset({"InvalidAccessException", "OptInRequired", "SubscriptionRequiredException"})
_CREDENTIAL_ERRORS = (
    sdk.NoCredentialsError,
    sdk.PartialCredentialsError,
    sdk.CredentialRetrievalError,
    sdk.TokenRetrievalError,
    sdk.MetadataRetrievalError,
    sdk.NoAuthTokenError,
    sdk.ProfileNotFound,
    sdk.ConfigParseError,
)
_TIMEOUTS = (sdk.ReadTimeoutError, sdk.ConnectTimeoutError, TimeoutError)
_NETWORK = (sdk.HTTPClientError, sdk.ConnectionError, aiohttp.ClientError, OSError)

log = structlog.get_logger("aws")
_body: ContextVar[bytes | None] = ContextVar("body", default=None)


class AwsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the SDK."""

    region: Annotated[
        str, setting("Region of the sinks; AWS_REGION or AWS_DEFAULT_REGION where it is empty.")
    ] = ""
    account_id: Annotated[
        str,
        setting(
            "Account of the findings; the caller's (STS GetCallerIdentity) where it is empty.",
            pattern=r"^([0-9]{12})?\Z",
        ),
    ] = ""

    def faults(self) -> Iterator[tuple[str, str]]:
        if not region_of(self, os.environ):
            yield "region", "is required, here or as AWS_REGION (on EC2, run asks the instance for it)"


class Role(msgspec.Struct, frozen=True):
    """A role to assume, for a sink in another account."""

    arn: str
    external_id: str

    @property
    def account(self) -> str:
        """The account in the role's ARN: findings must carry the caller's."""
        return self.arn.split(":")[4]


def region_of(settings: AwsSettings, environment: Mapping[str, str]) -> str:
    """The region in force, or nothing."""
    return settings.region or environment.get("AWS_REGION", "") or environment.get("AWS_DEFAULT_REGION", "")


def role_of(settings: Any) -> Role | None:
    """The role of a sink's settings, if it has one."""
    return Role(settings.role_arn, settings.external_id) if settings.role_arn else None


class Client:
    """One service as one role. Its SDK client may have to be made again: without credentials it never looks twice."""

    def __init__(self, service: str, role: Role | None, now: Callable[[], float]) -> None:
        self.service = service
        self.role = role
        self.sdk: Any = None
        self.credentials: Any = None
        self.stack = contextlib.AsyncExitStack()
        self.clock_skew_secs = 0.0
        """The service's clock minus ours, by its last answer, to a second; 5 minutes make every signature invalid."""
        self._now = now

    def credentials_expire_at(self) -> float:
        """Unix seconds; infinite for those that never do, or where there are none yet."""
        expiry = getattr(self.credentials, "_expiry_time", None)  # the SDK tells it nowhere else
        return math.inf if expiry is None else expiry.timestamp()

    def heard(self, parsed: Any, **_: Any) -> None:
        """An answer, good or bad (``after-call`` of the SDK): its Date has whole seconds."""
        date = str(parsed.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", ""))
        with contextlib.suppress(ValueError, OverflowError):
            self.clock_skew_secs = parsedate_to_datetime(date).timestamp() + 0.5 - self._now()


class Aws:
    """Clients and identity. One per application; nothing happens before ``open_clients``."""

    def __init__(
        self, settings: AwsSettings, *, validate: bool = False, now: Callable[[], float] = time.time
    ) -> None:
        """``validate`` lets the SDK check parameters too: on in tests, off in production."""
        self._now = now
        self._validate = validate
        self._clients: dict[tuple[str, Role | None], Client] = {}
        self._making = asyncio.Lock()
        self._credentials: Any = None
        self.region = region_of(settings, os.environ)
        self.known_account = settings.account_id
        """The caller's account, once it is known."""

    async def open_clients(self, wanted: list[tuple[str, Role | None]]) -> None:
        """Make the clients the sinks will ask for. What fails now (no credentials yet) is made when it is used."""
        for service, role in [*wanted, ("sts", None)]:
            if (service, role) not in self._clients:
                client = self._clients[service, role] = Client(service, role, self._now)
                with contextlib.suppress(DeliveryError):
                    await self._ready(client)

    async def close(self) -> None:
        for client in self._clients.values():
            await client.stack.aclose()

    def client(self, service: str, role: Role | None = None) -> Client:
        """A client named to ``open_clients`` before."""
        return self._clients[service, role]

    def partition(self) -> str:
        """``aws``, ``aws-cn``, ``aws-us-gov`` ... of the region."""
        made = self._clients["sts", None].sdk
        if made is not None:
            return str(made.meta.partition)
        # Not one client could be made yet: by the region's name, as the SDK's own tables have it.
        return next((name for prefix, name in _PARTITIONS.items() if self.region.startswith(prefix)), "aws")

    async def account(self, role: Role | None = None) -> str:
        """Account whose credentials make the calls; raises ``DeliveryError``."""
        if role is not None:
            return role.account
        if not self.known_account:
            identity = await self.call(self._clients["sts", None], "get_caller_identity")
            self.known_account = str(identity["Account"])
        return self.known_account

    async def call(self, client: Client, method: str, body: bytes | None = None, **parameters: Any) -> Any:
        """One call; ``body`` replaces what the SDK would serialise. Raises ``DeliveryError``."""
        made = await self._ready(client)
        if body is not None and self._validate:
            parameters = msgspec.json.decode(body)
        token = _body.set(body)
        try:
            return await getattr(made, method)(**parameters)
        except sdk.NoCredentialsError as error:
            await client.stack.aclose()
            client.sdk = None
            raise translate(error) from error
        except Exception as error:
            raise translate(error) from error
        finally:
            _body.reset(token)

    async def sign(self, service: str, region: str, request: AWSRequest) -> None:
        """Add the signature of our own credentials; raises ``DeliveryError``. For calls the SDK has no client for here."""
        try:
            if self._credentials is None:
                raise sdk.NoCredentialsError
            frozen = await self._credentials.get_frozen_credentials()
            SigV4Auth(frozen, service, region).add_auth(request)
        except Exception as error:
            raise translate(error) from error

    async def keep_fresh(self) -> None:
        """For ever: renew credentials before they expire, also while no alert comes.

        The SDK renews 15 minutes ahead, but only when it is asked: after a quiet night the first alert would wait for STS, and
        nobody would have heard that the role is gone. What fails here fails again, and is told, when a call is made.
        """
        while True:
            await asyncio.sleep(FRESH_PERIOD_SECS)
            for client in self._clients.values():
                if client.credentials is not None:
                    with contextlib.suppress(Exception):
                        await client.credentials.get_frozen_credentials()

    async def _ready(self, client: Client) -> Any:
        """The SDK client, made where there is none."""
        if client.sdk is None:
            async with self._making:
                if client.sdk is None:
                    try:
                        client.sdk = await self._create(client)
                    except Exception as error:
                        raise translate(error) from error
        return client.sdk

    async def _create(self, client: Client) -> Any:
        session: Any
        if client.role is not None:
            session = await self._assumed(client.role)
        else:
            session = AioSession()
            self._credentials = await session.get_credentials()
        client.credentials = await session.get_credentials()
        made = await client.stack.enter_async_context(
            session.create_client(client.service, region_name=self.region, config=self._client_config())
        )
        made.meta.events.register("before-call.cloudwatch-logs.PutLogEvents", _swap_body)
        made.meta.events.register("after-call", client.heard)
        made.meta.events.register("before-call.securityhub.BatchImportFindings", _swap_body)
        return made

    def _client_config(self) -> AioConfig:
        return AioConfig(
            connect_timeout=CONNECT_SECS_MAX,
            read_timeout=READ_SECS_MAX,
            max_pool_connections=CONNECTIONS_MAX,
            retries={"mode": "standard", "total_max_attempts": SDK_ATTEMPTS_MAX},
            parameter_validation=self._validate,
            # Given whole: the SDK would put its own together anew twice in every call, an eighth of its time.
            user_agent=f"falco-aws-forwarder/{__version__} aiobotocore/{aiobotocore.__version__}",
            warm_up_loader_caches=True,
        )

    async def _assumed(self, role: Role) -> Any:
        """A session whose credentials come from AssumeRole and refresh themselves."""
        parent: Any = AioSession()
        source: Any = await parent.get_credentials()
        if source is None:
            raise sdk.NoCredentialsError
        extra = {"RoleSessionName": "falco-aws-forwarder"}
        if role.external_id:
            extra["ExternalId"] = role.external_id

        def sts(service: str, **keys: Any) -> Any:
            # The fetcher asks for a client of the global endpoint; ours is regional, as everything else.
            keys["region_name"] = self.region
            return parent.create_client(service, config=self._client_config(), **keys)

        fetcher = AioAssumeRoleCredentialFetcher(
            client_creator=sts, source_credentials=source, role_arn=role.arn, extra_args=extra
        )
        session: Any = AioSession()
        session._credentials = AioDeferredRefreshableCredentials(  # noqa: SLF001 - the SDK offers no other way
            method="assume-role", refresh_using=fetcher.fetch_credentials
        )
        return session


def _swap_body(params: dict[str, Any], **_: Any) -> None:
    body = _body.get()
    if body is not None:
        params["body"] = body


def translate(error: Exception) -> DeliveryError:  # noqa: PLR0911 - one row a line
    """What an SDK error means for delivery: the only place that knows."""
    if isinstance(error, DeliveryError):
        return error
    if isinstance(error, sdk.ClientError):
        return _translate_answer(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, _CREDENTIAL_ERRORS):
        return Transient(text, code="credentials")
    if isinstance(error, _TIMEOUTS):
        return Transient(text, code="timeout")
    if isinstance(error, _NETWORK):
        return Transient(text, code="network")
    if isinstance(error, sdk.ParamValidationError):
        return Permanent(text)
    # A cut answer (ResponseParserError) and whatever else: nothing is given up.
    return Transient(text, code="unknown")


def _translate_answer(error: sdk.ClientError) -> DeliveryError:  # noqa: PLR0911 - one row a line
    code = str(error.response.get("Error", {}).get("Code", ""))
    message = str(error.response.get("Error", {}).get("Message", ""))
    metadata: Any = error.response.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode", 0))
    delay = _retry_after(metadata.get("HTTPHeaders", {}))
    text = f"{code}: {message}"
    if code in _THROTTLES or status == 429:  # noqa: PLR2004
        return Transient(text, code="throttled", delay_secs=delay)
    if code in _PERMISSION:
        return Permission(text)
    if code in _CREDENTIALS or (error.operation_name in _STS and status < 500):  # noqa: PLR2004
        return Transient(text, code="credentials")
    if code in _DISABLED:
        return Blocked(text)
    if code == "ResourceNotFoundException":
        return Transient(text, code="not_found")
    if code in {"OperationAbortedException", "ConflictException"}:
        return Transient(text, code="conflict")
    if code in {"RequestTimeout", "RequestTimeoutException"} or status == 408:  # noqa: PLR2004
        return Transient(text, code="timeout")
    if status == 413 or "Upload too large" in message:  # noqa: PLR2004
        return TooLarge(text)
    if status >= 500 or status < 400:  # noqa: PLR2004 - below 400: an error inside a success, odd but not final
        return Transient(text, delay_secs=delay)
    return Permanent(text)


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
