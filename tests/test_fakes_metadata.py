"""The fakes of IMDS and ECS say no where the real ones do: a client that is wrong must not pass with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.fakes.ecs import TARGET, FakeContainer, FakeEcs, FakeTask
from tests.fakes.imds import TOKEN_HEADER, TTL_HEADER, FakeImds

DOCUMENT = "/latest/dynamic/instance-identity/document"
IDS = ("a0" * 32, "b1" * 32)


@pytest.fixture(autouse=True)
def nothing_blocks() -> None:
    """Nothing of ``forwarder`` runs here."""


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def imds() -> AsyncIterator[FakeImds]:
    async with FakeImds() as fake:
        yield fake


@pytest.fixture
async def ecs() -> AsyncIterator[FakeEcs]:
    async with FakeEcs() as fake:
        fake.tasks = [
            FakeTask(fake.task_arn(1), [FakeContainer(IDS[0], "app")], service="shop"),
            FakeTask(fake.task_arn(2), [FakeContainer(IDS[1], "db")], here=False),
        ]
        yield fake


async def token_of(
    http: aiohttp.ClientSession, imds: FakeImds, path: str = "/latest/api/token", **headers: str
) -> tuple[int, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.put(imds.url + path, headers=named) as response:
        return response.status, await response.text()


async def get(http: aiohttp.ClientSession, url: str, **headers: str) -> tuple[int, Any]:
    async with http.get(url, headers=headers) as response:
        text = await response.text()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text


# ---- IMDS -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ttl", "status"),
    [
        ("1", 200),
        ("21600", 200),
        ("0", 400),
        ("21601", 400),
        ("-1", 400),
        ("six", 400),
        ("", 400),
        (None, 400),
    ],
)
async def test_a_token_needs_a_ttl(
    http: aiohttp.ClientSession, imds: FakeImds, ttl: str | None, status: int
) -> None:
    headers = {} if ttl is None else {TTL_HEADER: ttl}
    assert (await token_of(http, imds, **headers))[0] == status
    assert imds.requests == {f"PUT {status}": 1}


async def test_a_token_through_a_proxy_is_refused(http: aiohttp.ClientSession, imds: FakeImds) -> None:
    assert (await token_of(http, imds, **{TTL_HEADER: "60", "X-Forwarded-For": "10.0.0.1"}))[0] == 403
    assert (await token_of(http, imds, "/2021-03-23/api/token", **{TTL_HEADER: "60"}))[0] == 403
    assert not imds.tokens


async def test_nothing_without_a_token_that_holds(http: aiohttp.ClientSession, imds: FakeImds) -> None:
    """No IMDSv1, no invented token, none that has ended."""
    now = 0.0
    imds.clock = lambda: now
    _, token = await token_of(http, imds, **{TTL_HEADER: "60"})
    assert (await get(http, imds.url + DOCUMENT))[0] == 401
    assert (await get(http, imds.url + DOCUMENT, **{TOKEN_HEADER: "invented"}))[0] == 401
    status, document = await get(http, imds.url + DOCUMENT, **{TOKEN_HEADER: token})
    assert (status, document["instanceId"]) == (200, "i-0123456789abcdef0")
    assert (await get(http, imds.url + "/latest/none", **{TOKEN_HEADER: token}))[0] == 404
    now = 60.0
    assert (await get(http, imds.url + DOCUMENT, **{TOKEN_HEADER: token}))[0] == 401


async def test_switched_off_everything_is_forbidden(http: aiohttp.ClientSession, imds: FakeImds) -> None:
    imds.enabled = False
    assert (await token_of(http, imds, **{TTL_HEADER: "60"}))[0] == 403
    assert (await get(http, imds.url + DOCUMENT))[0] == 403
    async with http.post(imds.url + DOCUMENT) as response:
        assert response.status == 403


async def test_a_hop_limit_of_one_is_silence(http: aiohttp.ClientSession, imds: FakeImds) -> None:
    imds.hop_limit_1 = True
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await token_of(http, imds, **{TTL_HEADER: "60"})
    assert (imds.requests, imds.issued) == ({"PUT hang": 1}, [])


# ---- ECS: metadata and agent ------------------------------------------------------------------------


async def test_task_metadata(http: aiohttp.ClientSession, ecs: FakeEcs) -> None:
    base = ecs.environment()["ECS_CONTAINER_METADATA_URI_V4"]
    assert (await get(http, base))[1]["DockerId"] == IDS[0]
    status, task = await get(http, f"{base}/task")
    assert (status, task["TaskARN"], task["ServiceName"]) == (200, ecs.task_arn(1), "shop")
    assert "TaskTags" not in task
    assert (await get(http, f"{base}/taskWithTags"))[1]["TaskTags"]
    assert (await get(http, f"{base}/tasks"))[0] == 404
    ecs.tasks = []
    assert (await get(http, f"{base}/task"))[0] == 404


async def test_a_container_that_is_being_pulled_has_no_id(http: aiohttp.ClientSession, ecs: FakeEcs) -> None:
    ecs.tasks[0].containers.append(FakeContainer("", "slow"))
    _, task = await get(http, f"{ecs.environment()['ECS_CONTAINER_METADATA_URI_V4']}/task")
    assert [container.get("DockerId") for container in task["Containers"]] == [IDS[0], None]


async def test_the_agent_knows_its_instance_only(http: aiohttp.ClientSession, ecs: FakeEcs) -> None:
    assert (await get(http, f"{ecs.url}/v1/metadata"))[1]["Cluster"] == "prod"
    _, answer = await get(http, f"{ecs.url}/v1/tasks")
    assert [task["Arn"] for task in answer["Tasks"]] == [ecs.task_arn(1)]
    assert "AvailableCommands" in (await get(http, f"{ecs.url}/v1/anything"))[1]


@pytest.mark.parametrize(
    ("query", "status", "arn"),
    [
        (f"dockerid={IDS[0]}", 200, 1),
        (f"dockerid={IDS[0][:12]}", 200, 1),
        (f"dockerid={IDS[0][:11]}", 404, 0),
        (f"dockerid={IDS[1]}", 404, 0),
        ("taskarn={arn}", 200, 1),
        (f"dockerid={IDS[0]}&taskarn={{arn}}", 400, 0),
    ],
)
async def test_the_agents_task_of_a_container(
    http: aiohttp.ClientSession, ecs: FakeEcs, query: str, status: int, arn: int
) -> None:
    query = query.format(arn=ecs.task_arn(1))
    found = await get(http, f"{ecs.url}/v1/tasks?{query}")
    assert (found[0], found[1]["Arn"]) == (status, ecs.task_arn(1) if arn else "")


async def test_modes(http: aiohttp.ClientSession, ecs: FakeEcs) -> None:
    """Each of the three by itself."""
    ecs.agent_mode = "garbage"
    assert isinstance((await get(http, f"{ecs.url}/v1/tasks"))[1], str)
    assert (await get(http, f"{ecs.environment()['ECS_CONTAINER_METADATA_URI_V4']}/task"))[0] == 200
    ecs.agent_mode = "error"
    assert (await get(http, f"{ecs.url}/v1/tasks"))[0] == 500
    ecs.agent_mode = "hang"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await get(http, f"{ecs.url}/v1/tasks")


# ---- ECS: API ---------------------------------------------------------------------------------------


async def test_the_api_takes_signed_requests_only(http: aiohttp.ClientSession, ecs: FakeEcs) -> None:
    headers = {"X-Amz-Target": f"{TARGET}ListTasks", "Content-Type": "application/x-amz-json-1.1"}
    async with http.post(ecs.url, data=b'{"cluster":"prod"}', headers=headers) as response:
        assert (response.status, json.loads(await response.read())["__type"]) == (
            400,
            "MissingAuthenticationTokenException",
        )


@pytest.mark.parametrize(
    ("operation", "parameters", "code"),
    [
        ("ListTasks", {"cluster": "other"}, "ClusterNotFoundException"),
        ("ListTasks", {}, "ClusterNotFoundException"),  # the cluster "default"
        ("ListTasks", {"cluster": "prod", "maxResults": 101}, "InvalidParameterException"),
        ("ListTasks", {"cluster": "prod", "maxResults": 0}, "InvalidParameterException"),
        ("ListTasks", {"cluster": "prod", "nextToken": "invented"}, "InvalidParameterException"),
        ("ListTasks", {"cluster": "prod", "tasks": []}, "InvalidParameterException"),
        ("DescribeTasks", {"cluster": "prod"}, "InvalidParameterException"),
        ("DescribeTasks", {"cluster": "prod", "tasks": []}, "InvalidParameterException"),
        ("DescribeTasks", {"cluster": "prod", "tasks": ["x"] * 101}, "InvalidParameterException"),
        ("DescribeTasks", {"cluster": "other", "tasks": ["x"]}, "ClusterNotFoundException"),
        ("StopTask", {"cluster": "prod"}, "UnknownOperationException"),
    ],
)
async def test_the_api_refuses(
    ecs: FakeEcs, monkeypatch: pytest.MonkeyPatch, operation: str, parameters: Any, code: str
) -> None:
    assert (await called(ecs, monkeypatch, operation, parameters)).get("__type") == code


async def test_the_api_pages_and_describes(ecs: FakeEcs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await called(ecs, monkeypatch, "ListTasks", {"cluster": "prod", "maxResults": 1})
    assert first["taskArns"] == [ecs.task_arn(1)]
    more = {"cluster": ecs.cluster_arn, "nextToken": first["nextToken"]}
    assert await called(ecs, monkeypatch, "ListTasks", more) == {"taskArns": [ecs.task_arn(2)]}
    wanted = {"cluster": "prod", "tasks": [ecs.task_arn(2), "gone"]}
    found = await called(ecs, monkeypatch, "DescribeTasks", wanted)
    assert [task["taskArn"] for task in found["tasks"]] == [ecs.task_arn(2)]
    assert found["tasks"][0]["containers"][0]["runtimeId"] == IDS[1]
    assert found["failures"] == [{"arn": "gone", "reason": "MISSING"}]
    assert not ecs.refusals


async def test_permissions_and_throttling(ecs: FakeEcs, monkeypatch: pytest.MonkeyPatch) -> None:
    ecs.denied = {"DescribeTasks"}
    wanted = {"cluster": "prod", "tasks": [ecs.task_arn(2)]}
    assert (await called(ecs, monkeypatch, "DescribeTasks", wanted))["__type"] == "AccessDeniedException"
    assert "taskArns" in await called(ecs, monkeypatch, "ListTasks", {"cluster": "prod"})
    ecs.throttled = True
    assert (await called(ecs, monkeypatch, "ListTasks", {"cluster": "prod"}))[
        "__type"
    ] == "ThrottlingException"


async def called(ecs: FakeEcs, monkeypatch: pytest.MonkeyPatch, operation: str, parameters: Any) -> Any:
    """One call whose signature is taken for good; that it is looked at, another test shows."""
    monkeypatch.setattr("tests.fakes.ecs.verify", lambda *_, **__: None)
    headers = {"X-Amz-Target": f"{TARGET}{operation}", "Content-Type": "application/x-amz-json-1.1"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(ecs.url, data=json.dumps(parameters), headers=headers) as response,
    ):
        return json.loads(await response.read())
