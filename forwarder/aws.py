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

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Annotated, Any

import aiohttp
import botocore.exceptions as sdk
import msgspec
import structlog
from aiobotocore.config import AioConfig
from aiobotocore.credentials import AioAssumeRoleCredentialFetcher, AioDeferredRefreshableCredentials
from aiobotocore.session import AioSession

from forwarder import __version__
from forwarder.config import setting
from forwarder.contract import Blocked, DeliveryError, Permanent, Permission, TooLarge, Transient

CONNECT_SECS_MAX, READ_SECS_MAX = 3.0, 20.0
CONNECTIONS_MAX = 16
SDK_ATTEMPTS_MAX = 2
SERVICES = ("logs", "securityhub", "sts")

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
            pattern=r"^(\d{12})?$",
        ),
    ] = ""

    def faults(self) -> Iterator[tuple[str, str]]:
        if not region_of(self, os.environ):
            yield "region", "is required, here or as AWS_REGION"


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


class Aws:
    """Clients and identity. One per application; nothing happens before ``open_clients``."""

    def __init__(self, settings: AwsSettings, *, validate: bool = False) -> None:
        """``validate`` lets the SDK check parameters too: on in tests, off in production."""
        self._settings = settings
        self._validate = validate
        self._stack = contextlib.AsyncExitStack()
        self._session = AioSession()
        self._clients: dict[tuple[str, Role | None], Any] = {}
        self.region = region_of(settings, os.environ)
        self.known_account = settings.account_id
        """The caller's account, once it is known."""

    async def open_clients(self, wanted: list[tuple[str, Role | None]]) -> None:
        """Create the clients the sinks will ask for; makes no call."""
        for service, role in [*wanted, ("sts", None)]:
            if (service, role) not in self._clients:
                self._clients[service, role] = await self._create(service, role)

    async def close(self) -> None:
        await self._stack.aclose()

    def client(self, service: str, role: Role | None = None) -> Any:
        """A client made by ``open_clients``."""
        return self._clients[service, role]

    def partition(self) -> str:
        """``aws``, ``aws-cn``, ``aws-us-gov`` ... of the region."""
        return str(self._clients["sts", None].meta.partition)

    async def account(self, role: Role | None = None) -> str:
        """Account whose credentials make the calls; raises ``DeliveryError``."""
        if role is not None:
            return role.account
        if not self.known_account:
            identity = await self.call(self._clients["sts", None], "get_caller_identity")
            self.known_account = str(identity["Account"])
        return self.known_account

    async def call(self, client: Any, method: str, body: bytes | None = None, **parameters: Any) -> Any:
        """One call; ``body`` replaces what the SDK would serialise. Raises ``DeliveryError``."""
        if body is not None and self._validate:
            parameters = msgspec.json.decode(body)
        token = _body.set(body)
        try:
            return await getattr(client, method)(**parameters)
        except Exception as error:
            raise translate(error) from error
        finally:
            _body.reset(token)

    async def _create(self, service: str, role: Role | None) -> Any:
        session: Any = self._session if role is None else await self._assumed(role)
        client = await self._stack.enter_async_context(
            session.create_client(service, region_name=self.region, config=self._client_config())
        )
        client.meta.events.register("before-call.cloudwatch-logs.PutLogEvents", _swap_body)
        client.meta.events.register("before-call.securityhub.BatchImportFindings", _swap_body)
        return client

    def _client_config(self) -> AioConfig:
        return AioConfig(
            connect_timeout=CONNECT_SECS_MAX,
            read_timeout=READ_SECS_MAX,
            max_pool_connections=CONNECTIONS_MAX,
            retries={"mode": "standard", "total_max_attempts": SDK_ATTEMPTS_MAX},
            parameter_validation=self._validate,
            user_agent_extra=f"falco-aws-forwarder/{__version__}",
            warm_up_loader_caches=True,
        )

    async def _assumed(self, role: Role) -> Any:
        """A session whose credentials come from AssumeRole and refresh themselves."""
        source: Any = await self._session.get_credentials()
        extra = {"RoleSessionName": "falco-aws-forwarder"}
        if role.external_id:
            extra["ExternalId"] = role.external_id

        session: Any = AioSession()
        parent: Any = self._session

        def sts(service: str, **keys: Any) -> Any:
            # The fetcher asks for a client of the global endpoint; ours is regional, as everything else.
            keys["region_name"] = self.region
            return parent.create_client(service, config=self._client_config(), **keys)

        fetcher = AioAssumeRoleCredentialFetcher(
            client_creator=sts,
            source_credentials=source,
            role_arn=role.arn,
            extra_args=extra,
        )
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
    if code in _CREDENTIALS:
        return Transient(text, code="credentials")
    if code in _PERMISSION:
        return Permission(text)
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
