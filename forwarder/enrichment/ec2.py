"""Which EC2 instance this is, by IMDSv2, and which alerts happened on it: the enricher ``ec2``.

The identity document describes the machine this process runs on, and no other. An alert gets a ``node`` from it only where
it is certain that Falco runs on the very same machine; on Kubernetes, where one forwarder serves many nodes, the Node object
tells of the others. ``node`` is ``{name, instance_id, instance_type, zone, region, launched_at}``, texts, absent where unknown.

IMDSv2 only, as the EC2 user guide has it ("Retrieve instance metadata", "Use IMDSv2"): PUT for a token, GET with the token;
400 the PUT is not valid, 401 the token is not, 403 it is switched off or forbidden. There being no IMDS is normal (Fargate,
other clouds, EKS with a hop limit of 1, where the answer to the PUT never arrives): one line in the log, then another
attempt every ten minutes. The SDK's switch AWS_EC2_METADATA_DISABLED is about its credentials and not looked at here.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import aiohttp
import msgspec
import structlog

from forwarder.alert import encode
from forwarder.config import setting
from forwarder.enricher import Subject

ENDPOINT, ENDPOINT_IPV6 = "http://169.254.169.254", "http://[fd00:ec2::254]"
REQUEST_SECS_MAX = 1.0
TRIES_MAX = 2
TRY_PAUSE_SECS = 0.2
RETRY_SECS = 600.0
TOKEN_TTL_SECS = 21_600
TOKEN_BYTES_MAX = 1024
DOCUMENT_BYTES_MAX = 16_384

HTTP_OK, HTTP_UNAUTHORIZED, HTTP_TOO_MANY, HTTP_SERVER_ERROR = 200, 401, 429, 500

_TOKEN = re.compile(rb"[!-~]{1,1024}")
_CONTAINER_HOST = re.compile(r"[0-9a-f]{12}")
_INSTANCE_KEY = b'"instance_id":'
_ACCOUNT = re.compile(r"[0-9]{12}")
_REGION = re.compile(r"[a-z]{2,8}(-[a-z]+)+-[0-9]{1,2}")
_INSTANCE = re.compile(r"i-[0-9a-f]{8,17}")
_EVERYBODYS_NAMES = frozenset({"", "localhost", "localhost.localdomain", "localhost6", "(none)"})
_LOOPBACK = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})
_ORCHESTRATED = ("KUBERNETES_SERVICE_HOST", "ECS_CONTAINER_METADATA_URI_V4")
"""Set where a proxy of a service mesh may stand in between: what it hands on comes from loopback, whoever sent it."""

log = structlog.get_logger("enrichment.ec2")


class Ec2Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Section ``enrichment.ec2``."""

    enabled: Annotated[
        bool | Literal["auto"],
        setting("Ask IMDSv2 for this machine's identity; `auto`: and take it for normal that there is none."),
    ] = "auto"
    same_node: Annotated[
        bool | Literal["auto"],
        setting(
            "Whether Falco runs on this very machine (daemon set, plain EC2), so that its alerts get our instance as "
            "`node`; auto: where host name or connection prove it."
        ),
    ] = "auto"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What the instance identity document says of this machine. Texts; ``""`` where it says nothing."""

    account_id: str
    """The owner's account, 12 digits."""
    region: str
    zone: str
    instance_id: str
    instance_type: str
    launched_at: str
    """``pendingTime``: the last launch, ISO 8601 in UTC, seconds."""
    private_ip: str
    """The primary private IPv4 address."""


class NoIdentityError(Exception):
    """IMDS did not say who we are; the message names the reason in one line."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final
        """Asking again at once would not help."""


class _Document(msgspec.Struct, frozen=True, rename="camel"):
    account_id: str | None = None
    region: str | None = None
    availability_zone: str | None = None
    instance_id: str | None = None
    instance_type: str | None = None
    pending_time: str | None = None
    private_ip: str | None = None


_document = msgspec.json.Decoder(_Document)


def endpoint_of(environment: Mapping[str, str]) -> str:
    """Where IMDS is, by the SDK's own names: an endpoint given wins over the mode (as in botocore)."""
    given = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "").strip()
    mode = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").strip().lower()
    return given.rstrip("/") or (ENDPOINT_IPV6 if mode == "ipv6" else ENDPOINT)


async def read_identity(environment: Mapping[str, str]) -> Identity | None:
    """Who this machine is, or None where IMDS does not say. Never raises; takes some seconds at most."""
    try:
        return await ask_identity(environment)
    except NoIdentityError:
        return None


async def ask_identity(environment: Mapping[str, str]) -> Identity:
    """As ``read_identity``; raises ``NoIdentityError`` with the reason."""
    endpoint = endpoint_of(environment)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(trust_env=False, auto_decompress=False, cookie_jar=jar) as session:
        for left in reversed(range(TRIES_MAX)):
            try:
                return await _identity(session, endpoint)
            except NoIdentityError as error:
                if error.final or not left:
                    raise
            await asyncio.sleep(TRY_PAUSE_SECS)
    raise AssertionError("unreachable")


async def _identity(session: aiohttp.ClientSession, endpoint: str) -> Identity:
    url = f"{endpoint}/latest/dynamic/instance-identity/document"
    status, body = await _get(session, url, await _token(session, endpoint))
    if status == HTTP_UNAUTHORIZED:  # the token ended, or the instance was moved: one new token
        status, body = await _get(session, url, await _token(session, endpoint))
    if status != HTTP_OK:
        raise _refusal("the identity document", status)
    try:
        document = _document.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise NoIdentityError(f"the identity document cannot be read: {error}") from None
    account, region, instance = document.account_id or "", document.region or "", document.instance_id or ""
    if not (_ACCOUNT.fullmatch(account) and _REGION.fullmatch(region) and _INSTANCE.fullmatch(instance)):
        raise NoIdentityError("the identity document names no account, region and instance", final=True)
    return Identity(
        account_id=account,
        region=region,
        zone=document.availability_zone or "",
        instance_id=instance,
        instance_type=document.instance_type or "",
        launched_at=document.pending_time or "",
        private_ip=document.private_ip or "",
    )


async def _token(session: aiohttp.ClientSession, endpoint: str) -> str:
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_SECS)}
    status, body = await _request(session, "PUT", f"{endpoint}/latest/api/token", headers, TOKEN_BYTES_MAX)
    if status != HTTP_OK:
        raise _refusal("a token", status)
    if not _TOKEN.fullmatch(body):  # it becomes a header
        raise NoIdentityError("what came as a token is none", final=True)
    return body.decode()


async def _get(session: aiohttp.ClientSession, url: str, token: str) -> tuple[int, bytes]:
    return await _request(session, "GET", url, {"X-aws-ec2-metadata-token": token}, DOCUMENT_BYTES_MAX)


async def _request(
    session: aiohttp.ClientSession, method: str, url: str, headers: dict[str, str], bytes_max: int
) -> tuple[int, bytes]:
    """Status and body of one request, in ``REQUEST_SECS_MAX`` and ``bytes_max``."""
    body = bytearray()
    try:
        async with (
            asyncio.timeout(REQUEST_SECS_MAX),
            session.request(method, url, headers=headers, allow_redirects=False) as response,
        ):
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > bytes_max:
                    raise NoIdentityError(f"the answer is larger than {bytes_max} bytes", final=True)
            return response.status, bytes(body)
    except TimeoutError:
        raise NoIdentityError(
            f"no answer within {REQUEST_SECS_MAX:g} s: no IMDS here, or a hop limit of 1 in front of a pod"
        ) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise NoIdentityError(f"{type(error).__name__}: {error}") from None


def _refusal(what: str, status: int) -> NoIdentityError:
    passing = status == HTTP_TOO_MANY or status >= HTTP_SERVER_ERROR
    return NoIdentityError(f"IMDS refuses {what} with status {status}", final=not passing)


class Ec2:
    """The enricher ``ec2``."""

    settings_type = Ec2Settings
    name = "ec2"

    def __init__(
        self,
        settings: Ec2Settings,
        *,
        rng: random.Random,
        environment: Mapping[str, str],
        hostname: str = "",
        **_: Any,
    ) -> None:
        """``hostname`` stands in for the operating system's answer (tests)."""
        self._settings = settings
        self._rng = rng
        self._environment = environment
        self._node_name = environment.get("NODE_NAME", "")
        self._orchestrated = any(environment.get(name) for name in _ORCHESTRATED)
        hostname = hostname or socket.gethostname()
        self._names = frozenset({hostname, self._node_name}) - _EVERYBODYS_NAMES
        # Outside containers' orchestration the host's name is the node's; within, it may be a pod's.
        self._host = hostname if hostname in self._names and not self._orchestrated else None
        self._addresses: frozenset[str] = frozenset() if self._orchestrated else _LOOPBACK
        self._task: asyncio.Task[None] | None = None
        self._reason = "" if settings.enabled else "switched off"
        self._identity: Identity | None = None
        self._node = self._named_node = b""

    @property
    def identity(self) -> Identity | None:
        """Who we are, once it is known."""
        return self._identity

    def wanted_services(self) -> list[tuple[str, Any]]:
        """None: IMDS is no AWS API."""
        return []

    async def start(self) -> None:
        """Begin to ask. Returns at once."""
        if self._settings.enabled and self._task is None:
            self._task = asyncio.create_task(self._learn(), name="enrichment ec2")

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def enrich(self, subject: Subject, members: dict[str, bytes]) -> bool:
        """Put in ``node`` for what happened on this machine. Always all there is to know."""
        if self._identity is not None and subject.on_a_node and self._is_here(subject):
            known = members.get("node", b"")
            if _INSTANCE_KEY not in known:  # the Node object, where it was there, says more than IMDS
                members["node"] = self._named_node if subject.hostname == self._host else self._node
        return True

    def publish(self) -> None:
        """Nothing to bring up to date: the composition root counts."""

    def status(self) -> dict[str, Any]:
        """``state`` is off, starting, unavailable (and ``reason`` why) or active."""
        if self._identity is not None:
            return {"state": "active", "reason": None} | msgspec.structs.asdict(self._identity)
        state = "off" if not self._settings.enabled else "unavailable" if self._reason else "starting"
        return {"state": state, "reason": self._reason or None}

    def _is_here(self, subject: Subject) -> bool:
        """Whether it is certain that the alert comes from this machine."""
        if self._settings.same_node != "auto":
            return self._settings.same_node
        host = subject.hostname
        if host in self._names:
            return True
        # A proxy on this machine may hand on what happened on another one, whose name stands there then; a container's id names none.
        names_none = host in _EVERYBODYS_NAMES or _CONTAINER_HOST.fullmatch(host) is not None
        return names_none and subject.peer in self._addresses

    async def _learn(self) -> None:
        """Ask until IMDS answers: the identity of a running instance never changes."""
        while True:
            try:
                self._take(await ask_identity(self._environment))
            except NoIdentityError as error:
                if not self._reason:
                    level = log.info if self._settings.enabled == "auto" else log.warning
                    level("no EC2 instance metadata, alerts go without", reason=str(error))
                self._reason = str(error)
            except Exception as error:
                log.exception("reading the EC2 instance metadata failed")
                self._reason = repr(error)
            else:
                return
            await asyncio.sleep(RETRY_SECS * self._rng.uniform(0.9, 1.1))

    def _take(self, identity: Identity) -> None:
        node = {
            "name": self._node_name,
            "instance_id": identity.instance_id,
            "instance_type": identity.instance_type,
            "zone": identity.zone,
            "region": identity.region,
            "launched_at": identity.launched_at,
        }
        self._node = _encoded(node)
        self._named_node = _encoded(node | {"name": self._node_name or self._host or ""})
        self._names |= {identity.instance_id}
        if not self._orchestrated and identity.private_ip:
            self._addresses |= {identity.private_ip}
        self._identity = identity
        log.info("running on an EC2 instance", instance_id=identity.instance_id, region=identity.region)


def _encoded(node: Mapping[str, str]) -> bytes:
    return encode({key: value for key, value in node.items() if value})
