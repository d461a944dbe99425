"""ECS tasks by container id: three sources, each asked no more than needed, and never a guess."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from forwarder import ecs_tasks
from forwarder.aws import Aws, AwsSettings
from forwarder.config import ConfigError, load
from forwarder.contract import Permanent, Permission, Transient
from forwarder.ecs_tasks import CONTAINERS_MAX, VANISHED_SECS, Containers, Sighting
from forwarder.enricher import Fields, Subject
from forwarder.enrichment import ecs
from forwarder.enrichment.ecs import (
    API_GAP_SECS,
    BACKOFF_SECS_MAX,
    MISS_GAP_SECS,
    MISSED_MAX,
    REFUSED_SECS,
    TASKS_MAX,
    UNKNOWN_SECS,
    Ecs,
    EcsSettings,
)
from tests.fakes.aws import FakeAws
from tests.fakes.ecs import FakeContainer, FakeEcs, FakeTask

OWN, LOCAL, REMOTE, STRANGE = ("a0" * 32, "b1" * 32, "c2" * 32, "d3" * 32)
FARGATE = "cd189a933e5849daa93386466019ab50"
CLUSTER_ARN = "arn:aws:ecs:eu-west-1:111122223333:cluster/prod"
TASK_ARN = "arn:aws:ecs:eu-west-1:111122223333:task/prod"

Make = Callable[..., Awaitable[Ecs]]


def numbered(number: int) -> str:
    """A container id that differs in what Falco shows of it, too."""
    return f"{number:012x}{0:052x}"


def subject(container: str, full: str | None = None) -> Subject:
    return Subject("syscall", "", 1, Fields(container_id=container, container_full_id=full), "10.0.0.9")


def ecs_of(made: Ecs, container: str, full: str | None = None) -> Any:
    """What the alert gets: an object, ``"unresolved"``, or None for nothing to be found."""
    members: dict[str, bytes] = {}
    complete = made.enrich(subject(container, full), members)
    assert members.keys() <= {"ecs"}
    assert complete or not members
    return json.loads(members["ecs"]) if members else None if complete else "unresolved"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a server answers in real time
            await asyncio.sleep(0.01)


# ---- over the wire ----------------------------------------------------------------------------------


@pytest.fixture
async def fake(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeEcs]:
    """A cluster with our own task, one beside it, one on another instance; and no long waits."""
    monkeypatch.setattr(logging.getLogger("aiobotocore.credentials"), "disabled", True)
    monkeypatch.setattr(ecs, "MISS_GAP_SECS", 0.05)
    monkeypatch.setattr(ecs, "REQUEST_SECS_MAX", 0.5)
    async with FakeEcs() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_ECS", server.url)
        server.tasks = [
            FakeTask(server.task_arn(1), [FakeContainer(OWN, "forwarder"), FakeContainer("")], service="fwd"),
            FakeTask(server.task_arn(2), [FakeContainer(LOCAL, "web")], family="web", revision="3"),
            FakeTask(
                server.task_arn(3),
                [FakeContainer(REMOTE, "db")],
                family="db",
                revision="12",
                group="service:database",
                started_by="ecs-svc/1234567890123456789",
                here=False,
            ),
        ]
        yield server


@pytest.fixture
async def make(fake: FakeEcs) -> AsyncIterator[Make]:
    """Makes started enrichers that talk to the fake over HTTP and by the real SDK."""
    async with AsyncExitStack() as stack:

        async def build(environment: dict[str, str] | None = None, **settings: Any) -> Ecs:
            aws = Aws(AwsSettings(), validate=True)
            stack.push_async_callback(aws.close)
            made = Ecs(
                msgspec.convert({"agent_url": fake.url} | settings, EcsSettings),
                metrics=None,
                monotonic=asyncio.get_running_loop().time,
                rng=random.Random(7),
                aws=aws,
                environment=fake.environment() if environment is None else environment,
            )
            await aws.open_clients(made.wanted_services())
            await made.start()
            stack.push_async_callback(made.stop)
            return made

        yield build


async def test_the_own_tasks_containers(make: Make, fake: FakeEcs) -> None:
    fake.agent_mode = "error"
    made = await make(describe_tasks=False)
    await until(lambda: made.task)
    assert ecs_of(made, OWN[:12], OWN) == {
        "cluster_arn": CLUSTER_ARN,
        "task_arn": fake.task_arn(1),
        "family": "shop",
        "revision": "7",
        "service": "fwd",
        "launch_type": "EC2",
        "container": "forwarder",
        "container_arn": fake.container_arn(fake.tasks[0], fake.tasks[0].containers[0]),
        "image": "registry.example/app:1",
        "image_id": "sha256:" + "c0" * 32,
    }
    assert ecs_of(made, OWN[:12]) == ecs_of(made, OWN[:12], OWN)
    own = made.task
    assert own is not None
    assert (own.cluster, own.cluster_arn, own.arn) == ("prod", CLUSTER_ARN, fake.task_arn(1))
    assert (own.family, own.revision, own.service, own.zone) == ("shop", "7", "fwd", "eu-west-1b")


async def test_the_neighbours_by_the_agent(make: Make, fake: FakeEcs) -> None:
    """It says no service and no launch type; the cluster's ARN is in the task's."""
    made = await make(describe_tasks=False)
    await until(lambda: ecs_of(made, LOCAL[:12]) not in (None, "unresolved"))
    assert ecs_of(made, LOCAL[:12]) == {
        "cluster_arn": CLUSTER_ARN,
        "task_arn": fake.task_arn(2),
        "family": "web",
        "revision": "3",
        "container": "web",
        "image": "registry.example/app:1",
        "image_id": "sha256:" + "c0" * 32,
    }


async def test_an_agent_that_goes_away_is_looked_for_again(
    make: Make, fake: FakeEcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it told before stays known."""
    monkeypatch.setattr(ecs, "BACKOFF_SECS", 0.1)
    made = await make(describe_tasks=False)
    await until(lambda: ecs_of(made, LOCAL[:12]) not in (None, "unresolved"))
    fake.agent_mode = "error"
    await until(lambda: ecs_of(made, STRANGE[:12]) is None and "500" in made.status()["sources"]["agent"])
    assert ecs_of(made, LOCAL[:12])["family"] == "web"
    fake.agent_mode = "ok"
    await until(lambda: made.status()["sources"]["agent"] == "answers")
    assert fake.requests["/v1/metadata"] >= 2


async def test_an_old_agent_says_no_image(make: Make, fake: FakeEcs) -> None:
    fake.agent_images = False
    made = await make(describe_tasks=False)
    await until(lambda: ecs_of(made, LOCAL[:12]) not in (None, "unresolved"))
    assert ecs_of(made, LOCAL[:12]).keys() == {"cluster_arn", "task_arn", "family", "revision", "container"}


async def test_a_container_of_another_instance_by_the_api(make: Make, fake: FakeEcs) -> None:
    """Only once nobody nearer knew it. The manifest's digest is no image id."""
    made = await make()
    await until(lambda: fake.requests["/v1/tasks"] and made.task)
    assert ecs_of(made, LOCAL[:12])
    assert fake.requests["ListTasks"] == 0
    assert ecs_of(made, REMOTE[:12], REMOTE) == "unresolved"
    await until(lambda: ecs_of(made, REMOTE[:12], REMOTE) not in (None, "unresolved"))
    assert ecs_of(made, REMOTE[:12], REMOTE) == {
        "cluster_arn": CLUSTER_ARN,
        "task_arn": fake.task_arn(3),
        "family": "db",
        "revision": "12",
        "service": "database",
        "launch_type": "EC2",
        "container": "db",
        "container_arn": fake.container_arn(fake.tasks[2], fake.tasks[2].containers[0]),
        "image": "registry.example/app:1",
    }
    assert (fake.requests["ListTasks"], fake.requests["DescribeTasks"]) == (1, 1)
    assert not fake.refusals
    # What several sources say adds up.
    assert ecs_of(made, LOCAL[:12])["launch_type"] == "EC2"
    assert ecs_of(made, LOCAL[:12])["image_id"]


async def test_more_tasks_than_one_page(make: Make, fake: FakeEcs) -> None:
    fake.page_max = 40
    fake.tasks[2:2] = [
        FakeTask(fake.task_arn(n), [FakeContainer(numbered(n))], here=False) for n in range(10, 200)
    ]
    made = await make()
    await until(lambda: ecs_of(made, REMOTE[:12], REMOTE) not in (None, "unresolved"))
    assert (fake.requests["ListTasks"], fake.requests["DescribeTasks"]) == (5, 2)
    assert not fake.refusals


async def test_without_permission_the_api_is_left_alone(make: Make, fake: FakeEcs) -> None:
    """One attempt; then the ids are unknown, and everything else goes on."""
    fake.denied = {"ListTasks"}
    made = await make()
    await until(lambda: ecs_of(made, REMOTE[:12], REMOTE) is None)
    assert "not authorized to perform: ecs:ListTasks" in made.status()["sources"]["describe_tasks"]
    assert fake.requests["ListTasks"] == 1
    assert ecs_of(made, LOCAL[:12])["family"] == "web"


async def test_a_cluster_of_another_region_switches_the_api_off(make: Make, fake: FakeEcs) -> None:
    fake.cluster_said = "elsewhere"
    fake.tasks[0].arn = f"{fake.arn}:task/old-format-uuid"
    made = await make()
    await until(lambda: ecs_of(made, REMOTE[:12], REMOTE) is None)
    assert "ClusterNotFoundException" in made.status()["sources"]["describe_tasks"]
    assert made.task is not None
    assert (made.task.cluster, made.task.cluster_arn) == ("elsewhere", "")
    assert "cluster_arn" not in ecs_of(made, OWN[:12])


REASONS = [
    ("hang", "no answer within 0.5 s"),
    ("garbage", "odd answer"),
    ("huge", "larger than"),
    ("error", "status 500"),
]


@pytest.mark.parametrize(("mode", "reason"), REASONS)
async def test_odd_answers_of_one_source_do_not_hurt_the_others(
    make: Make, fake: FakeEcs, mode: Any, reason: str
) -> None:
    fake.agent_mode = mode
    made = await make()
    await until(lambda: ecs_of(made, REMOTE[:12], REMOTE) not in (None, "unresolved"))
    assert ecs_of(made, OWN[:12])["container"] == "forwarder"
    assert reason in made.status()["sources"]["agent"]
    assert made.status()["sources"]["task_metadata"] == "answers"


@pytest.mark.parametrize(("mode", "reason"), REASONS)
async def test_without_the_own_task_the_agent_knows_the_cluster(
    make: Make, fake: FakeEcs, mode: Any, reason: str
) -> None:
    fake.metadata_mode = mode
    made = await make()
    await until(lambda: ecs_of(made, REMOTE[:12], REMOTE) not in (None, "unresolved"))
    assert made.task is None
    assert reason in made.status()["sources"]["task_metadata"]


async def test_throttled_is_not_switched_off(make: Make, fake: FakeEcs) -> None:
    fake.throttled = True
    made = await make()
    await until(lambda: ecs_of(made, REMOTE[:12], REMOTE) is None)
    assert "Throttling" in made.status()["sources"]["describe_tasks"]
    source = next(source for source in made._sources if source.name == "describe_tasks")
    assert source.pause_secs < REFUSED_SECS


async def test_the_agent_is_looked_for_at_both_addresses(
    make: Make, fake: FakeEcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first may be taken by something else that answers 200 to anything."""
    monkeypatch.setattr(ecs, "AGENT_URLS", (f"{fake.url}/nobody", fake.url))
    made = await make(agent_url="", describe_tasks=False)
    await until(lambda: ecs_of(made, LOCAL[:12]) not in (None, "unresolved"))
    monkeypatch.setattr(ecs, "AGENT_URLS", ("http://127.0.0.1:1", f"{fake.url}/nobody"))
    made = await make(agent_url="", describe_tasks=False)
    await until(lambda: made.status()["sources"]["agent"] not in ("answers", "not asked"))
    assert "http://127.0.0.1:1: Client" in made.status()["sources"]["agent"]
    assert "/nobody: the answer names no cluster" in made.status()["sources"]["agent"]


async def test_a_proxy_is_not_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    made = await make(describe_tasks=False)
    await until(lambda: made.task)


async def test_outside_ecs_it_does_nothing(make: Make, fake: FakeEcs) -> None:
    made = await make({})
    assert (made.active, made.wanted_services()) == (False, [])
    assert ecs_of(made, LOCAL[:12]) is None
    await asyncio.sleep(0.05)
    assert not fake.requests
    assert made.status() == {"state": "off", "reason": "not on ECS"}
    off = await make(enabled=False)
    assert (off.active, off.status()["reason"]) == (False, "switched off")


async def test_switched_on_it_works_without_the_metadata_endpoint(make: Make, fake: FakeEcs) -> None:
    made = await make({}, enabled=True)
    assert made.wanted_services() == [("ecs", None)]
    await until(lambda: ecs_of(made, REMOTE[:12], REMOTE) not in (None, "unresolved"))
    assert fake.requests["/task"] == 0


async def test_stop_does_not_wait(make: Make, fake: FakeEcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ecs, "REQUEST_SECS_MAX", 30.0)
    fake.metadata_mode = "hang"
    made = await make()
    async with asyncio.timeout(1):
        await until(lambda: fake.requests["/task"])
        await made.stop()


# ---- in simulated time ------------------------------------------------------------------------------


class World:
    """The three sources in simulated time: what they answer, and when they were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self.now: Callable[[], float] = lambda: loop.time()  # noqa: PLW0108 - looptime swaps the method
        self.asked: dict[str, list[float]] = {"task": [], "metadata": [], "tasks": [], "list_tasks": []}
        self.fails: set[str] = set()
        self.api_error: Exception | None = None
        self.local: list[str] = []
        self.remote: list[str] = []
        monkeypatch.setattr(ecs, "_get", self.get)
        aws: Any = SimpleNamespace(client=lambda name: name, call=self.call)
        self.ecs = Ecs(
            EcsSettings(),
            monotonic=self.now,
            rng=random.Random(7),
            aws=aws,
            environment={"ECS_CONTAINER_METADATA_URI_V4": "http://own/v4/x"},
        )

    async def get(self, _: object, url: str, __: int) -> bytes:
        name = url.rpartition("/")[2]
        self.asked[name].append(self.now())
        await asyncio.sleep(0.01)
        if name in self.fails:
            raise ecs._NoAnswerError("away")
        containers = [{"DockerId": identity, "Name": "n"} for identity in self.local]
        return json.dumps(
            {
                "task": {
                    "Cluster": "prod",
                    "TaskARN": f"{TASK_ARN}/1",
                    "Containers": [{"DockerId": OWN}],
                },
                "metadata": {"Cluster": "prod"},
                "tasks": {"Tasks": [{"Arn": f"{TASK_ARN}/2", "Containers": containers}]},
            }[name]
        ).encode()

    async def call(self, _: object, method: str, **parameters: Any) -> Any:
        await asyncio.sleep(0.01)
        if method == "list_tasks":
            self.asked["list_tasks"].append(self.now())
            if self.api_error:
                raise self.api_error
            return {"taskArns": [f"{TASK_ARN}/{n}" for n in range(len(self.remote))]}
        assert 1 <= len(parameters["tasks"]) <= 100
        numbers = [int(arn.rpartition("/")[2]) for arn in parameters["tasks"]]
        return {
            "tasks": [
                {"taskArn": f"{TASK_ARN}/{n}", "containers": [{"runtimeId": self.remote[n]}]} for n in numbers
            ]
        }

    def asks(self) -> Counter[str]:
        return Counter({name: len(times) for name, times in self.asked.items()})


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    world = World(monkeypatch)
    yield world
    await world.ecs.stop()


@pytest.mark.looptime
async def test_an_hour_without_misses(world: World) -> None:
    """Own task once a minute, agent every 30 s, the API never."""
    await world.ecs.start()
    await asyncio.sleep(3599)
    assert world.asks() == {"task": 60, "metadata": 1, "tasks": 120, "list_tasks": 0}


@pytest.mark.looptime
async def test_a_new_neighbour_is_known_within_a_moment(world: World) -> None:
    await world.ecs.start()
    await asyncio.sleep(10)
    world.local = [LOCAL]
    assert ecs_of(world.ecs, LOCAL[:12]) == "unresolved"
    await asyncio.sleep(0.5)
    assert ecs_of(world.ecs, LOCAL[:12]) == {
        "cluster_arn": CLUSTER_ARN,
        "task_arn": f"{TASK_ARN}/2",
        "container": "n",
    }
    assert not world.asked["list_tasks"]


@pytest.mark.looptime
async def test_an_unknown_id_is_asked_for_once_a_minute(world: World) -> None:
    """An alert a second of a container nobody knows, for ten minutes."""
    await world.ecs.start()
    await asyncio.sleep(5)
    unresolved = 0
    for _ in range(600):
        unresolved += ecs_of(world.ecs, STRANGE[:12]) == "unresolved"
        await asyncio.sleep(1)
    assert 9 <= len(world.asked["list_tasks"]) <= 600 / UNKNOWN_SECS + 1
    assert unresolved <= 30  # each time until the nearer sources were asked, too
    assert world.ecs.status()["unknown_ids"] == 1


@pytest.mark.looptime
async def test_new_unknown_ids_all_the_time_keep_the_gaps(world: World) -> None:
    """Each source keeps its own pace, and none starves behind another."""
    await world.ecs.start()
    await asyncio.sleep(5)
    start = world.now()
    for number in range(3000):
        ecs_of(world.ecs, numbered(number))
        await asyncio.sleep(0.1)
    for name, gap in (("task", MISS_GAP_SECS), ("tasks", MISS_GAP_SECS), ("list_tasks", API_GAP_SECS)):
        times = [at for at in world.asked[name] if at >= start]
        assert all(b - a >= gap - 1e-6 for a, b in pairwise(times)), name
        assert len(times) >= 0.9 * 300 / (gap + 0.1), (name, len(times))


@pytest.mark.looptime
async def test_an_unreachable_agent_is_asked_ever_more_seldom_and_not_waited_for(world: World) -> None:
    world.fails = {"metadata"}
    await world.ecs.start()
    await asyncio.sleep(5)
    assert ecs_of(world.ecs, STRANGE[:12]) == "unresolved"
    await asyncio.sleep(1)
    assert ecs_of(world.ecs, STRANGE[:12]) is None
    await asyncio.sleep(7200)
    times = sorted(set(world.asked["metadata"]))
    assert len(times) <= 2 * (6 + 7200 / (0.8 * BACKOFF_SECS_MAX))
    world.fails.clear()
    await asyncio.sleep(1.3 * BACKOFF_SECS_MAX)
    assert world.ecs.status()["sources"]["agent"] == "answers"


@pytest.mark.looptime
@pytest.mark.parametrize(("error", "off"), [(Permission("no"), True), (Permanent("no"), True)])
async def test_what_only_a_person_can_change_is_asked_for_seldom(
    world: World, error: Exception, off: bool
) -> None:
    world.api_error = error
    await world.ecs.start()
    for number in range(300):
        ecs_of(world.ecs, numbered(number))
        await asyncio.sleep(10)
    assert len(world.asked["list_tasks"]) == 1 + 300 * 10 // REFUSED_SECS - 1, (
        "now and then: rights may be given"
    )
    assert world.ecs.status()["sources"]["describe_tasks"] == "no"


@pytest.mark.looptime
async def test_what_passes_is_tried_again(world: World) -> None:
    world.api_error = Transient("busy")
    world.remote = [REMOTE]
    await world.ecs.start()
    await asyncio.sleep(1)
    for _ in range(60):
        ecs_of(world.ecs, REMOTE[:12])
        await asyncio.sleep(10)
    assert 3 <= len(world.asked["list_tasks"]) <= 8
    world.api_error = None
    for _ in range(120):
        ecs_of(world.ecs, REMOTE[:12])
        await asyncio.sleep(10)
    assert ecs_of(world.ecs, REMOTE[:12])["task_arn"] == f"{TASK_ARN}/0"


@pytest.mark.looptime
async def test_a_vanished_container_is_known_for_ten_minutes(world: World) -> None:
    world.local = [LOCAL]
    await world.ecs.start()
    await asyncio.sleep(65)
    world.local = []
    await asyncio.sleep(VANISHED_SECS - 30)
    assert ecs_of(world.ecs, LOCAL[:12])["container"] == "n"
    await asyncio.sleep(100)
    assert ecs_of(world.ecs, LOCAL[:12]) == "unresolved"


@pytest.mark.looptime
async def test_containers_known_by_the_api_alone_do_not_vanish(world: World) -> None:
    world.remote = [REMOTE]
    await world.ecs.start()
    ecs_of(world.ecs, REMOTE[:12])
    await asyncio.sleep(4 * VANISHED_SECS)
    assert ecs_of(world.ecs, REMOTE[:12])["task_arn"] == f"{TASK_ARN}/0"


@pytest.mark.looptime
async def test_a_huge_cluster_is_looked_at_in_part(world: World) -> None:
    world.remote = [numbered(n) for n in range(TASKS_MAX + 500)]
    await world.ecs.start()
    ecs_of(world.ecs, STRANGE)
    await asyncio.sleep(5)
    assert len(world.ecs._containers) == TASKS_MAX + 1
    assert "more than the 1000 tasks" in world.ecs.status()["sources"]["describe_tasks"]


@pytest.mark.looptime
async def test_a_fault_of_ours_does_not_end_the_learning(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(ecs, "own_task", broken)
    await world.ecs.start()
    await asyncio.sleep(1)
    assert "ZeroDivisionError" in world.ecs.status()["sources"]["task_metadata"]
    monkeypatch.setattr(ecs, "own_task", ecs_tasks.own_task)
    await asyncio.sleep(60)
    assert world.ecs.task is not None


async def test_what_is_missed_is_bounded(world: World) -> None:
    for number in range(MISSED_MAX + 10):
        assert ecs_of(world.ecs, numbered(number)) == "unresolved"
    assert len(world.ecs._missed) == MISSED_MAX


# ---- ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "identity",
    ["", "host", "<NA>", "a0a0", "A0A0A0A0A0A0", "a0" * 33, f"{FARGATE}-", "a0a0a0a0a0a\n", "x" * 64],
)
async def test_what_is_no_container_id_is_not_looked_for(world: World, identity: str) -> None:
    assert ecs_of(world.ecs, identity, identity) is None
    assert not world.ecs._missed


async def test_the_whole_id_is_asked_for_where_there_is_one(world: World) -> None:
    """And a container that only begins alike is not taken for it."""
    world.ecs._containers.put(Sighting(OWN, {"container": "a"}), 0)
    assert ecs_of(world.ecs, OWN[:12], OWN[:12] + "f" * 52) == "unresolved"
    assert ecs_of(world.ecs, OWN[:12], "<NA>") == {"container": "a"}


async def test_a_record_that_is_there_is_left_alone(world: World) -> None:
    world.ecs._containers.put(Sighting(OWN, {"container": "a"}), 0)
    members = {"ecs": b"{}"}
    assert world.ecs.enrich(subject(OWN), members)
    assert members == {"ecs": b"{}"}


def task_facts(**more: str) -> dict[str, str]:
    return {"task_arn": f"{TASK_ARN}/1", "family": "f"} | more


@pytest.mark.parametrize("digits", ["2495160603", "249516060", "1"])
def test_a_fargate_id_cut_short_names_the_task_only(digits: str) -> None:
    """All containers of a task share the beginning; documented are ten digits, nine and eight were seen."""
    known = Containers()
    known.put(Sighting(f"{FARGATE}-{digits}", task_facts(container="a", image="i")), 0)
    assert ecs_tasks.container_id(f"{FARGATE}-{digits}", FARGATE[:12]) == f"{FARGATE}-{digits}"
    assert json.loads(known.answers[f"{FARGATE}-{digits}"]) == task_facts(container="a", image="i")
    assert json.loads(known.answers[FARGATE[:12]]) == task_facts()


def test_ids_that_begin_alike_share_only_what_is_true_of_all() -> None:
    known = Containers()
    known.put(Sighting("a0" * 32, task_facts(container="a")), 0)
    known.put(Sighting("a0" * 31 + "ff", task_facts(container="b")), 1)
    assert json.loads(known.answers["a0" * 6]) == task_facts()
    known.put(Sighting("a0" * 31 + "ee", {"family": "g"}), 2)
    assert "a0" * 6 not in known.answers
    known.forget(VANISHED_SECS + 1.5)
    assert json.loads(known.answers["a0" * 6]) == {"family": "g"}
    known.forget(VANISHED_SECS + 2.5)
    assert not known.answers
    assert not known._alike


def test_the_number_of_containers_is_bounded() -> None:
    """The oldest sighting goes first."""
    known = Containers()
    for number in range(CONTAINERS_MAX + 5):
        known.put(Sighting(numbered(number), {"container": "n"}), number / 1e6)
    known.put(Sighting(numbered(0), {"container": "n"}), 1.0)
    known.forget(1.0)
    assert len(known) == CONTAINERS_MAX
    assert numbered(0) in known.answers
    assert numbered(5) not in known.answers
    assert numbered(6) in known.answers


# ---- answers ----------------------------------------------------------------------------------------


def own_answer(**members: Any) -> bytes:
    task = {"Cluster": "prod", "TaskARN": f"{TASK_ARN}/1", "Containers": [{"DockerId": OWN, "Name": "n"}]}
    return json.dumps(task | members).encode()


@pytest.mark.parametrize(
    ("cluster", "task_arn", "cluster_arn", "name"),
    [
        (CLUSTER_ARN, f"{TASK_ARN}/1", CLUSTER_ARN, "prod"),
        ("prod", f"{TASK_ARN}/1", CLUSTER_ARN, "prod"),
        ("prod", "arn:aws:ecs:eu-west-1:111122223333:task/0a1b-2c", "", "prod"),
        (
            None,
            "arn:aws-us-gov:ecs:us-gov-west-1:111122223333:task/x/1",
            "arn:aws-us-gov:ecs:us-gov-west-1:111122223333:cluster/x",
            "x",
        ),
        ("arn:aws:ecs:nonsense", "arn:odd", "", "arn:aws:ecs:nonsense"),
    ],
)
def test_the_clusters_arn_is_given_or_in_the_tasks(
    cluster: str | None, task_arn: str, cluster_arn: str, name: str
) -> None:
    task, (found,) = ecs_tasks.own_task(own_answer(Cluster=cluster, TaskARN=task_arn))
    assert (task.cluster_arn, task.cluster) == (cluster_arn, name)
    assert found.facts.get("cluster_arn", "") == cluster_arn


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"{}", b'{"TaskARN":7}', own_answer(Containers=[7]), b"\xff", b"[" * 100_000],
    ids=lambda body: repr(body[:20]),
)
def test_an_odd_own_task_is_an_odd_answer(body: bytes) -> None:
    with pytest.raises(ecs_tasks.OddAnswerError):
        ecs_tasks.own_task(body)


def test_absent_and_overlong_members_are_left_out() -> None:
    container = {"DockerId": OWN, "Name": None, "Image": "x" * 5000, "ImageID": ""}
    _, (found,) = ecs_tasks.own_task(
        own_answer(Containers=[container, {}, {"DockerId": "short"}], Family=None)
    )
    assert found == Sighting(OWN, {"cluster_arn": CLUSTER_ARN, "task_arn": f"{TASK_ARN}/1"})


@pytest.mark.parametrize("body", [b"{}", b'{"Tasks":null}', b'{"Tasks":[null]}', b'{"Tasks":[{}]}'])
def test_an_agent_without_tasks(body: bytes) -> None:
    assert ecs_tasks.agent_tasks(body, "prod") == []


@pytest.mark.parametrize(
    ("group", "started_by", "service"),
    [
        ("service:db", "ecs-svc/123", "db"),
        ("service:db", "a person", None),
        ("service:db", None, None),
        ("family:db", "ecs-svc/123", None),
        (None, None, None),
    ],
)
def test_a_service_is_named_only_for_a_task_it_started(
    group: str | None, started_by: str | None, service: str | None
) -> None:
    """Anybody who may run a task may name its group."""
    task = {"group": group, "startedBy": started_by, "containers": [{"runtimeId": OWN, "name": "n"}]}
    (found,) = ecs_tasks.api_tasks({"tasks": [task]})
    assert found.facts.get("service") == service


@pytest.mark.parametrize("answer", [{"tasks": [7]}, {"tasks": [{"containers": "x"}]}, {"tasks": 7}])
def test_an_odd_answer_of_the_api(answer: Any) -> None:
    with pytest.raises(ecs_tasks.OddAnswerError):
        ecs_tasks.api_tasks(answer)


# ---- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("no", False)])
def test_settings_take_auto_and_yaml_booleans(tmp_path: Path, text: str, value: Any) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"enabled: {text}\nagent_url: http://10.0.0.1:51678\n")
    settings = load(EcsSettings, file, {})
    assert settings == EcsSettings(enabled=value, agent_url="http://10.0.0.1:51678")


@pytest.mark.parametrize("url", ["10.0.0.1:51678", "ftp://x", "http://", "http://x/v1/tasks", "http://x y"])
def test_settings_refuse_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError):
        load(EcsSettings, None, {"FORWARDER__AGENT_URL": url})
