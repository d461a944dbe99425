"""What is known of ECS containers, and how the three who know say it. Pure, no I/O.

A container's facts are ``{cluster_arn, task_arn, family, revision, service, launch_type, container, container_arn, image,
image_id}``, texts, absent where unknown. Facts of one container never change, so what several sources say adds up.

Member names: task metadata v4 from the developer guide ("Amazon ECS task metadata V4 JSON response"), the agent's from its
source (``ecs-agent/introspection/v1/response.go``), the API's from its reference. The API's ``imageDigest`` is not an
``image_id``: on EC2 that is the digest of the image's configuration, not of its manifest.

A Fargate id begins with its task's id: cut to 12 digits, as Falco may, it names the task but no container of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from forwarder.alert import encode, present

CONTAINERS_MAX = 10_000
VANISHED_SECS = 600.0
"""Alerts arrive after their container is gone."""
TEXT_CHARS_MAX = 2048
ALIKE_MAX = 32
"""So many containers of one beginning and nothing is said of all of them: a Fargate task has ten at most."""
SHORT_ID_CHARS = 12
MEMBERS = (
    *("cluster_arn", "task_arn", "family", "revision", "service", "launch_type"),
    *("container", "container_arn", "image", "image_id"),
)
_TASK_MEMBERS = frozenset(MEMBERS[:6])

_ID = re.compile(r"[0-9a-f]{64}|[0-9a-f]{12}|[0-9a-f]{32}-[0-9]{1,10}")
"""Docker's, Docker's as Falco cuts it, Fargate's (documented with ten digits, seen with fewer)."""
_CLUSTER_ARN = re.compile(r"arn:aws[a-z-]*:ecs:[a-z0-9-]+:[0-9]{12}:cluster/[A-Za-z0-9_-]{1,255}")
_TASK_ARN = re.compile(r"(arn:aws[a-z-]*:ecs:[a-z0-9-]+:[0-9]{12}):task/([A-Za-z0-9_-]{1,255})/[A-Za-z0-9-]+")

_T = TypeVar("_T")


class OddAnswerError(Exception):
    """What came is not what the source's documents promise."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """The ECS task the forwarder runs in. Texts; ``""`` where the metadata endpoint does not say."""

    arn: str
    cluster: str
    """The cluster's name."""
    cluster_arn: str
    family: str
    revision: str
    service: str
    launch_type: str
    """EC2, FARGATE, EXTERNAL or MANAGED_INSTANCES."""
    zone: str


class Sighting(NamedTuple):
    """A container as one source tells of it."""

    id: str
    facts: dict[str, str]


class _Container(msgspec.Struct, frozen=True, rename="pascal"):
    docker_id: str | None = None
    name: str | None = None
    image: str | None = None
    image_id: str | None = msgspec.field(name="ImageID", default=None)
    container_arn: str | None = msgspec.field(name="ContainerARN", default=None)


class _OwnTask(msgspec.Struct, frozen=True, rename="pascal"):
    cluster: str | None = None
    task_arn: str | None = msgspec.field(name="TaskARN", default=None)
    family: str | None = None
    revision: str | None = None
    service_name: str | None = None
    launch_type: str | None = None
    availability_zone: str | None = None
    containers: list[_Container] | None = None


class _AgentTask(msgspec.Struct, frozen=True, rename="pascal"):
    arn: str | None = None
    family: str | None = None
    version: str | None = None
    containers: list[_Container] | None = None


class _AgentTasks(msgspec.Struct, frozen=True, rename="pascal"):
    tasks: list[_AgentTask | None] | None = None


class _Agent(msgspec.Struct, frozen=True, rename="pascal"):
    cluster: str | None = None


class _ApiContainer(msgspec.Struct, frozen=True, rename="camel"):
    runtime_id: str | None = None
    name: str | None = None
    image: str | None = None
    container_arn: str | None = None


class _ApiTask(msgspec.Struct, frozen=True, rename="camel"):
    task_arn: str | None = None
    cluster_arn: str | None = None
    task_definition_arn: str | None = None
    group: str | None = None
    started_by: str | None = None
    launch_type: str | None = None
    containers: list[_ApiContainer] | None = None


_own_task = msgspec.json.Decoder(_OwnTask)
_agent = msgspec.json.Decoder(_Agent)
_agent_tasks = msgspec.json.Decoder(_AgentTasks)


def container_id(full: str | None, short: str | None) -> str:
    """The longest id of Falco's ``container.full_id`` and ``container.id``; nothing where neither is one (``host``)."""
    for text in (present(full), present(short)):
        if _ID.fullmatch(text):
            return text
    return ""


def own_task(body: bytes) -> tuple[Task, list[Sighting]]:
    """Of ``${ECS_CONTAINER_METADATA_URI_V4}/task``; raises ``OddAnswerError``."""
    task = _decoded(_own_task, body)
    if not task.task_arn:
        raise OddAnswerError("the answer names no task")
    cluster_arn = _cluster_arn(task.cluster, task.task_arn)
    found = Task(
        arn=task.task_arn,
        cluster=(cluster_arn or task.cluster or "").rpartition("/")[2],
        cluster_arn=cluster_arn,
        family=task.family or "",
        revision=task.revision or "",
        service=task.service_name or "",
        launch_type=task.launch_type or "",
        zone=task.availability_zone or "",
    )
    facts = {
        "cluster_arn": cluster_arn,
        "task_arn": found.arn,
        "family": found.family,
        "revision": found.revision,
        "service": found.service,
        "launch_type": found.launch_type,
    }
    return found, list(_sightings(task.containers, facts))


def agent_cluster(body: bytes) -> str:
    """The cluster, a name or an ARN, of the agent's ``/v1/metadata``; raises ``OddAnswerError``."""
    cluster = _decoded(_agent, body).cluster
    if not cluster:  # anything else may speak JSON at that port
        raise OddAnswerError("the answer names no cluster")
    return cluster


def agent_tasks(body: bytes, cluster: str) -> list[Sighting]:
    """Of the agent's ``/v1/tasks``, which go without service and launch type; raises ``OddAnswerError``."""
    found: list[Sighting] = []
    for task in _decoded(_agent_tasks, body).tasks or ():
        if task is not None:
            facts = {
                "cluster_arn": _cluster_arn(cluster, task.arn),
                "task_arn": task.arn,
                "family": task.family,
                "revision": task.version,
            }
            found += _sightings(task.containers, facts)
    return found


def api_tasks(answer: Mapping[str, Any]) -> list[Sighting]:
    """Of ecs:DescribeTasks as the SDK gives it; raises ``OddAnswerError``."""
    try:
        tasks = msgspec.convert(answer.get("tasks") or [], list[_ApiTask])
    except msgspec.ValidationError as error:
        raise OddAnswerError(f"odd answer: {error}") from None
    found: list[Sighting] = []
    for task in tasks:
        family, _, revision = (task.task_definition_arn or "").rpartition("/")[2].rpartition(":")
        kind, _, group = (task.group or "").partition(":")
        # A group may be given to any task; a service also starts its tasks in the name of a deployment.
        of_service = kind == "service" and (task.started_by or "").startswith("ecs-svc/")
        facts = {
            "cluster_arn": _cluster_arn(task.cluster_arn, task.task_arn),
            "task_arn": task.task_arn,
            "family": family,
            "revision": revision,
            "service": group if of_service else None,
            "launch_type": task.launch_type,
        }
        for container in task.containers or ():
            more = {
                "container": container.name,
                "container_arn": container.container_arn,
                "image": container.image,
            }
            found += _sighting(container.runtime_id, facts | more)
    return found


class Containers:
    """Facts by full id, and the answers ready for every id Falco may name."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        """Full id or its first 12 characters -> JSON object."""
        self._facts: dict[str, dict[str, str]] = {}
        self._seen: dict[str, float] = {}
        """Monotonic seconds, in the order of the last sighting."""
        self._alike: dict[str, set[str]] = {}
        """Full ids by their first 12 characters."""

    def __len__(self) -> int:
        return len(self._seen)

    def put(self, sighting: Sighting, now: float) -> None:
        """Remember a container, or more of it."""
        identity = sighting.id
        known = self._facts.get(identity)
        facts = sighting.facts if known is None else known | sighting.facts
        self._seen.pop(identity, None)
        self._seen[identity] = now
        if facts != known:
            short = identity[:SHORT_ID_CHARS]
            self._facts[identity] = facts
            self._alike.setdefault(short, set()).add(identity)
            self.answers[identity] = _encoded(facts)
            self._answer_short(short)

    def forget(self, now: float) -> None:
        """Drop what vanished long ago, and the oldest where there are too many."""
        while self._seen:
            identity, seen = next(iter(self._seen.items()))
            if now - seen <= VANISHED_SECS and len(self._seen) <= CONTAINERS_MAX:
                return
            short = identity[:SHORT_ID_CHARS]
            del self._seen[identity], self._facts[identity], self.answers[identity]
            self._alike[short].discard(identity)
            if self._alike[short]:
                self._answer_short(short)
            else:
                del self._alike[short]
                self.answers.pop(short, None)

    def _answer_short(self, short: str) -> None:
        """What is true of every container whose id begins like this."""
        if len(self._alike[short]) > ALIKE_MAX:
            self.answers.pop(short, None)
            return
        first, *others = (self._facts[identity] for identity in self._alike[short])
        common = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
        if any("-" in identity for identity in self._alike[short]):
            common = {key: text for key, text in common.items() if key in _TASK_MEMBERS}
        if common:
            self.answers[short] = _encoded(common)
        else:
            self.answers.pop(short, None)


def _sightings(containers: list[_Container] | None, facts: Mapping[str, str | None]) -> Iterator[Sighting]:
    for container in containers or ():
        more = {
            "container": container.name,
            "container_arn": container.container_arn,
            "image": container.image,
            "image_id": container.image_id,
        }
        yield from _sighting(container.docker_id, {**facts, **more})


def _sighting(identity: str | None, facts: Mapping[str, str | None]) -> Iterator[Sighting]:
    """None for a container that was not made yet, or whose id is no whole one."""
    known = {key: text for key, text in facts.items() if text and len(text) <= TEXT_CHARS_MAX}
    if known and identity and len(identity) > SHORT_ID_CHARS and _ID.fullmatch(identity):
        yield Sighting(identity, known)


def _cluster_arn(cluster: str | None, task_arn: str | None) -> str:
    """The cluster's ARN, given or in the task's; a short name alone says too little."""
    if cluster and _CLUSTER_ARN.fullmatch(cluster):
        return cluster
    found = _TASK_ARN.fullmatch(task_arn or "")
    return f"{found[1]}:cluster/{found[2]}" if found else ""


def _encoded(facts: Mapping[str, str]) -> bytes:
    return encode({key: facts[key] for key in MEMBERS if key in facts})


def _decoded(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise OddAnswerError(f"odd answer: {error}") from None
