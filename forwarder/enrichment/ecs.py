"""Which ECS task a container belongs to: the enricher ``ecs``.

Falco tells a container's id; the task whose containers have that id is the alert's, not the task Falco or we run in. Three
sources know ids, and each is asked only for what the one before does not know:

1. our own task: GET ``${ECS_CONTAINER_METADATA_URI_V4}/task`` (developer guide, "task metadata endpoint version 4");
2. all tasks of this container instance: the agent's introspection API, GET ``/v1/tasks`` on port 51678. Reachable with host
   or bridge network; from ``awsvpc`` tasks AWS's images block it, on Fargate there is none. Agents before the autumn of 2023
   say no ``Image`` and ``ImageID``; none says service and launch type;
3. the cluster's tasks: ecs:ListTasks and ecs:DescribeTasks, where allowed, and only after a container nobody knew.

``ecs`` holds the facts ``forwarder.ecs_tasks`` lists: texts, absent where unknown.

Everything is learnt in one background task; ``enrich`` looks up a dictionary. A failing source is asked ever more seldom and
not waited for; ids no source knows are remembered for a while, so that they do not keep us asking.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal

import aiohttp
import msgspec
import structlog

from forwarder.aws import Aws, Role
from forwarder.config import setting
from forwarder.contract import Blocked, DeliveryError, Permanent, Permission
from forwarder.ecs_tasks import (
    Containers,
    OddAnswerError,
    Sighting,
    Task,
    agent_cluster,
    agent_tasks,
    api_tasks,
    container_id,
    own_task,
)
from forwarder.enricher import Subject

AGENT_URLS = ("http://127.0.0.1:51678", "http://172.17.0.1:51678")
REQUEST_SECS_MAX, API_SECS_MAX = 2.0, 60.0
OWN_TASK_BYTES_MAX, AGENT_BYTES_MAX = 1 << 20, 4 << 20
OWN_TASK_SECS, AGENT_SECS, API_SECS = 60.0, 30.0, 300.0
"""A source is asked again after this time."""
MISS_GAP_SECS, API_GAP_SECS = 2.0, 30.0
"""And after a miss not before this time."""
BACKOFF_SECS, BACKOFF_SECS_MAX = 30.0, 600.0
GATHER_SECS = 0.05
"""Misses that come together are one."""
WAIT_SECS_MAX = 60.0
UNKNOWN_MAX = MISSED_MAX = 10_000
UNKNOWN_SECS = 60.0
TASKS_MAX, TASKS_PER_CALL_MAX, LIST_CALLS_MAX = 1000, 100, 20
HTTP_OK = 200

REFUSED_SECS = 600.0

log = structlog.get_logger("enrichment.ecs")


class EcsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Section ``enrichment.ecs``."""

    enabled: Annotated[
        bool | Literal["auto"],
        setting("Look up containers' ECS tasks; auto: where the forwarder itself runs in an ECS task."),
    ] = "auto"
    agent_url: Annotated[
        str,
        setting(
            f"The ECS agent's introspection API; where it is empty, {AGENT_URLS[0]} and {AGENT_URLS[1]} are tried.",
            pattern=r"^(https?://[^\s/]+/?)?\Z",
        ),
    ] = ""
    describe_tasks: Annotated[
        bool, setting("Ask ecs:ListTasks and ecs:DescribeTasks for containers of other instances.")
    ] = True


_Ask = Callable[[aiohttp.ClientSession], Awaitable[str]]
"""Asks a source; what is worth knowing of its answer, for ``status``."""


class _NoAnswerError(Exception):
    """A source does not answer now."""


class _RefusedError(Exception):
    """A source will not answer before a person changes something."""


class _Source:
    """When one source may be asked, and whether its silence means anything. Times are monotonic seconds."""

    def __init__(
        self, name: str, ask: _Ask, *, period_secs: float, gap_secs: float, on_demand: bool = False
    ) -> None:
        self.name, self.ask = name, ask
        self._period_secs, self._gap_secs, self._on_demand = period_secs, gap_secs, on_demand
        self.asked_at = self.answered_at = -math.inf
        self.failures = 0
        self.pause_secs = 0.0
        self.reason = ""

    @property
    def usable(self) -> bool:
        return not self.failures

    def due(self, *, wanted: bool) -> float:
        """When to ask, ``wanted`` for an id it was not asked for yet."""
        if self._on_demand and not wanted and self.asked_at == -math.inf:
            return math.inf
        if self.failures:
            return self.asked_at + self.pause_secs
        return self.asked_at + (self._gap_secs if wanted else self._period_secs)

    def failed(self, reason: str, jitter: float) -> None:
        """Ask ever more seldom; one line where it had answered, or never was asked."""
        if not self.failures:
            log.info("ECS source does not answer", source=self.name, reason=reason)
        self.pause_secs = jitter * min(BACKOFF_SECS * 2.0 ** min(self.failures, 10), BACKOFF_SECS_MAX)
        self.failures += 1
        self.reason = reason

    def refused(self, reason: str) -> None:
        """Forbidden, or asked for what does not exist: only a person can change that, so ask again now and then."""
        if self.reason != reason:
            log.warning("ECS source refuses us", source=self.name, reason=reason)
        self.failures += 1
        self.pause_secs, self.reason = REFUSED_SECS, reason


class Ecs:
    """The enricher ``ecs``."""

    settings_type = EcsSettings
    name = "ecs"

    def __init__(
        self,
        settings: EcsSettings,
        *,
        monotonic: Callable[[], float],
        rng: random.Random,
        aws: Aws,
        environment: Mapping[str, str],
        **_: Any,
    ) -> None:
        """``monotonic`` is the event loop's time; ``aws`` has the clients of ``wanted_services`` before ``start``."""
        self._settings = settings
        self._now = monotonic
        self._rng = rng
        self._aws = aws
        self._uri = environment.get("ECS_CONTAINER_METADATA_URI_V4", "").rstrip("/")
        self.active = settings.enabled is True or (settings.enabled == "auto" and bool(self._uri))
        self._agent_urls = (settings.agent_url.rstrip("/"),) if settings.agent_url else AGENT_URLS
        self._agent_url = self._agent_cluster = ""
        self._containers = Containers()
        self._answers = self._containers.answers
        self._missed: dict[str, float] = {}
        """Ids asked for in vain -> when."""
        self._unknown: dict[str, float] = {}
        """Ids no source knows -> until when that is believed."""
        self._wake = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._task: Task | None = None
        own = _Source("task_metadata", self._ask_own, period_secs=OWN_TASK_SECS, gap_secs=MISS_GAP_SECS)
        agent = _Source("agent", self._ask_agent, period_secs=AGENT_SECS, gap_secs=MISS_GAP_SECS)
        api = _Source(
            "describe_tasks", self._ask_api, period_secs=API_SECS, gap_secs=API_GAP_SECS, on_demand=True
        )
        self._sources = [*([own] if self._uri else []), agent, *([api] if settings.describe_tasks else [])]

    @property
    def task(self) -> Task | None:
        """Our own task, once it is known."""
        return self._task

    def wanted_services(self) -> list[tuple[str, Role | None]]:
        """Clients to open before ``start``."""
        return [("ecs", None)] if self.active and self._settings.describe_tasks else []

    async def start(self) -> None:
        """Begin to learn. Returns at once."""
        if self.active and self._running is None:
            self._running = asyncio.create_task(self._learn(), name="enrichment ecs")

    async def stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def enrich(self, subject: Subject, members: dict[str, bytes]) -> bool:
        """Put in ``ecs`` for a container we know. False while it may still turn out whose it is."""
        if not self.active or not subject.on_a_node:
            return True
        identity = container_id(subject.fields.container_full_id, subject.fields.container_id)
        found = self._answers.get(identity)
        if found is not None:
            members.setdefault("ecs", found)
            return True
        now = self._now()
        if not identity or self._unknown.get(identity, -math.inf) > now:
            return True
        if identity not in self._missed and len(self._missed) < MISSED_MAX:
            self._missed[identity] = now
            self._wake.set()
        return False

    def publish(self) -> None:
        """Nothing to bring up to date: the composition root counts."""

    def status(self) -> dict[str, Any]:
        """``state`` is off or active; ``sources`` says of each whether it answers, or why not."""
        if not self.active:
            return {"state": "off", "reason": "switched off" if not self._settings.enabled else "not on ECS"}
        return {
            "state": "active",
            "reason": None,
            "task": msgspec.structs.asdict(self._task) if self._task else None,
            "containers": len(self._containers),
            "unknown_ids": len(self._unknown),
            "sources": {
                source.name: source.reason or ("answers" if source.answered_at > -math.inf else "not asked")
                for source in self._sources
            },
        }

    # ---- when to ask whom ---------------------------------------------------------------------------

    async def _learn(self) -> None:
        jar = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(trust_env=False, auto_decompress=False, cookie_jar=jar) as session:
            while True:
                source, at = self._next()
                delay_secs = at - self._now()
                if delay_secs > 0:
                    await self._wait(max(GATHER_SECS, min(delay_secs, WAIT_SECS_MAX)))
                else:
                    await self._ask(source, session)
                    self._settle()

    def _next(self) -> tuple[_Source, float]:
        """The source to ask next, and when."""
        chosen, soonest = self._sources[0], math.inf
        settled_at = math.inf  # ids missed later are still the business of a source before
        for source in self._sources:
            wanted = any(source.answered_at < at <= settled_at for at in self._missed.values())
            at = source.due(wanted=wanted)
            if at < soonest:
                chosen, soonest = source, at
            if source.usable:
                settled_at = min(settled_at, source.answered_at)
        return chosen, soonest

    async def _wait(self, secs_max: float) -> None:
        try:
            async with asyncio.timeout(secs_max):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()
        await asyncio.sleep(GATHER_SECS)

    async def _ask(self, source: _Source, session: aiohttp.ClientSession) -> None:
        source.asked_at = self._now()
        try:
            source.reason = await source.ask(session)
        except _RefusedError as error:
            source.refused(str(error))
        except (_NoAnswerError, OddAnswerError) as error:
            source.failed(str(error), self._rng.uniform(0.8, 1.2))
        except Exception as error:
            log.exception("asking an ECS source failed", source=source.name)
            source.failed(repr(error), self._rng.uniform(0.8, 1.2))
        else:
            source.answered_at = source.asked_at
            source.failures = 0

    def _settle(self) -> None:
        """Let go of missed ids that are known now, or that all who answer do not know."""
        now = self._now()
        self._containers.forget(now)
        for identity, until in list(self._unknown.items()):
            if until > now:
                break  # in the order of their ends
            del self._unknown[identity]
        answered_at = min((s.answered_at for s in self._sources if s.usable), default=math.inf)
        for identity, missed_at in list(self._missed.items()):
            if identity in self._answers:
                del self._missed[identity]
            elif answered_at >= missed_at:
                del self._missed[identity]
                self._unknown[identity] = now + UNKNOWN_SECS
                if len(self._unknown) > UNKNOWN_MAX:
                    del self._unknown[next(iter(self._unknown))]

    # ---- the sources --------------------------------------------------------------------------------

    async def _ask_own(self, session: aiohttp.ClientSession) -> str:
        self._task, found = own_task(await _get(session, f"{self._uri}/task", OWN_TASK_BYTES_MAX))
        self._put(found)
        return ""

    async def _ask_agent(self, session: aiohttp.ClientSession) -> str:
        if not self._agent_url:
            await self._find_agent(session)
        try:
            body = await _get(session, f"{self._agent_url}/v1/tasks", AGENT_BYTES_MAX)
            self._put(agent_tasks(body, self._agent_cluster))
        except (_NoAnswerError, OddAnswerError):
            self._agent_url = ""
            raise
        return ""

    async def _find_agent(self, session: aiohttp.ClientSession) -> None:
        reasons = []
        for url in self._agent_urls:
            try:
                self._agent_cluster = agent_cluster(
                    await _get(session, f"{url}/v1/metadata", OWN_TASK_BYTES_MAX)
                )
            except (_NoAnswerError, OddAnswerError) as error:
                reasons.append(f"{url}: {error}")
            else:
                self._agent_url = url
                return
        raise _NoAnswerError("; ".join(reasons))

    async def _ask_api(self, _: aiohttp.ClientSession) -> str:
        own = self._task
        cluster = (own and (own.cluster_arn or own.cluster)) or self._agent_cluster
        if not cluster:
            raise _NoAnswerError("the cluster is not known")
        try:
            async with asyncio.timeout(API_SECS_MAX):
                return await self._describe(cluster)
        except (Permission, Permanent, Blocked) as error:
            raise _RefusedError(str(error)) from error
        except DeliveryError as error:
            raise _NoAnswerError(str(error)) from error
        except TimeoutError:
            raise _NoAnswerError(f"no answer within {API_SECS_MAX:g} s") from None

    async def _describe(self, cluster: str) -> str:
        client = self._aws.client("ecs")
        arns: list[str] = []
        page: dict[str, Any] = {"cluster": cluster, "maxResults": TASKS_PER_CALL_MAX}
        for _ in range(LIST_CALLS_MAX):
            answer = await self._aws.call(client, "list_tasks", **page)
            arns += answer.get("taskArns") or ()
            page["nextToken"] = answer.get("nextToken")
            if not page["nextToken"] or len(arns) >= TASKS_MAX:
                break
        whole = not page["nextToken"] and len(arns) <= TASKS_MAX
        del arns[TASKS_MAX:]
        for start in range(0, len(arns), TASKS_PER_CALL_MAX):
            tasks = arns[start : start + TASKS_PER_CALL_MAX]
            self._put(api_tasks(await self._aws.call(client, "describe_tasks", cluster=cluster, tasks=tasks)))
        return "" if whole else f"answers, but there are more than the {len(arns)} tasks looked at"

    def _put(self, found: list[Sighting]) -> None:
        now = self._now()
        for sighting in found:
            self._containers.put(sighting, now)


async def _get(session: aiohttp.ClientSession, url: str, bytes_max: int) -> bytes:
    """The body of a 200, in ``REQUEST_SECS_MAX`` and ``bytes_max``."""
    body = bytearray()
    try:
        async with (
            asyncio.timeout(REQUEST_SECS_MAX),
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != HTTP_OK:
                raise _NoAnswerError(f"status {response.status}")
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > bytes_max:
                    raise _NoAnswerError(f"the answer is larger than {bytes_max} bytes")
    except TimeoutError:
        raise _NoAnswerError(f"no answer within {REQUEST_SECS_MAX:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise _NoAnswerError(f"{type(error).__name__}: {error}") from None
    return bytes(body)
