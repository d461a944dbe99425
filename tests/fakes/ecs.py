"""A strict fake of what ECS tells of tasks, for tests: task metadata, agent introspection and the API, on one port.

- Task metadata endpoint v4 (developer guide): the base is the container, ``/task``, ``/taskWithTags``; anything else 404.
- The agent's introspection API (``ecs-agent/introspection``): ``/v1/metadata``, ``/v1/tasks`` with ``?dockerid=`` (whole, or 12
  digits) or ``?taskarn=``, both at once 400, nobody's 404 with an empty task; any other path answers the list of commands,
  with 200. Agents before 2023 say no image.
- The API: JSON 1.1 with ``X-Amz-Target: AmazonEC2ContainerServiceV20141113.*``, signature verified; ListTasks pages of at
  most 100, DescribeTasks of 1 to 100 tasks; AccessDeniedException, ClusterNotFoundException, InvalidParameterException.

Each of the three has a mode: ``ok``, ``hang`` (never answers), ``garbage`` (200 with broken JSON), ``huge`` (more than anybody
should read), ``error`` (500). Shares no code with the client.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web

from tests.fakes.aws_common import JSON_1_1, AwsError, Caller, load_json
from tests.fakes.aws_sigv4 import Credential, RawRequest, verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

TARGET = "AmazonEC2ContainerServiceV20141113."
PAGE_MAX = 100
_EMPTY_TASK = {"Arn": "", "KnownStatus": "", "Family": "", "Version": "", "Containers": None}
_LIST_MEMBERS = frozenset(
    {
        *("cluster", "containerInstance", "family", "nextToken", "maxResults", "startedBy", "serviceName"),
        *("desiredStatus", "launchType", "daemonName"),
    }
)

Mode = Literal["ok", "hang", "garbage", "huge", "error"]


@dataclass(slots=True)
class FakeContainer:
    """A container; ``id`` is empty while its image is pulled."""

    id: str
    name: str = "app"
    image: str = "registry.example/app:1"
    image_id: str = "sha256:" + "c0" * 32
    digest: str = "sha256:" + "d1" * 32


@dataclass(slots=True)
class FakeTask:
    """A task of the cluster; ``here`` on this container instance."""

    arn: str
    containers: list[FakeContainer] = field(default_factory=list)
    family: str = "shop"
    revision: str = "7"
    service: str = ""
    group: str = ""
    started_by: str = ""
    launch_type: str = "EC2"
    here: bool = True


class FakeEcs:
    """The server, its tasks, and the handles a test pulls. The first task is the client's own."""

    def __init__(
        self,
        *,
        region: str = "eu-west-1",
        account: str = "111122223333",
        cluster: str = "prod",
        access_key: str = "AKIAFAKEFAKEFAKEFAKE",
        secret_key: str = "fakesecretfakesecretfakesecretfakesecret",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.region, self.account, self.cluster = region, account, cluster
        self.arn = f"arn:aws:ecs:{region}:{account}"
        self.cluster_arn = f"{self.arn}:cluster/{cluster}"
        self.cluster_said = self.cluster_arn
        """What the metadata endpoint says as ``Cluster``: ARN or short name."""
        self.tasks: list[FakeTask] = []
        self.metadata_mode: Mode = "ok"
        self.agent_mode: Mode = "ok"
        self.api_mode: Mode = "ok"
        self.agent_images = True
        self.denied: set[str] = set()
        """Operations the caller may not do: ``ListTasks`` ..."""
        self.throttled = False
        self.page_max = PAGE_MAX
        self.requests: Counter[str] = Counter()
        """``/task``, ``/v1/tasks``, ``ListTasks`` ..."""
        self.refusals: list[str] = []
        """What the API refused as the client's mistake."""
        self.url = ""
        self._clock = clock
        caller = Caller(account, f"arn:aws:iam::{account}:user/fake", "AIDAFAKEFAKEFAKEFAKE")
        self._caller = caller
        self._credentials = {access_key: Credential(secret_key, caller)}
        self._pages: dict[str, int] = {}
        self._runner: web.AppRunner | None = None
        self._stopping = asyncio.Event()

    def task_arn(self, number: int) -> str:
        """A new-format task ARN."""
        return f"{self.arn}:task/{self.cluster}/{number:032x}"

    def environment(self) -> dict[str, str]:
        """The environment of a container of the own task, for the metadata endpoint and the API."""
        return {
            "ECS_CONTAINER_METADATA_URI_V4": f"{self.url}/v4/own-container",
            "AWS_ENDPOINT_URL_ECS": self.url,
        }

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()

    # --- requests ----------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            name = request.headers.get("X-Amz-Target", "").removeprefix(TARGET) or "unknown"
            return await self._play(request, name, self.api_mode, self._api)
        if request.path.startswith("/v4/"):
            name = request.path.removeprefix("/v4/own-container") or "/"
            return await self._play(request, name, self.metadata_mode, self._metadata)
        return await self._play(request, request.path, self.agent_mode, self._agent)

    async def _play(
        self,
        request: web.Request,
        name: str,
        mode: Mode,
        answer: Callable[[web.Request, str, bytes], web.Response],
    ) -> web.StreamResponse:
        self.requests[name] += 1
        body = await request.read()
        match mode:
            case "hang":
                await self._stopping.wait()
                return web.Response(status=503)
            case "garbage":
                return web.Response(body=b'{"TaskARN":7,"Tasks":[{"Arn', content_type="application/json")
            case "huge":
                return web.Response(body=b" " * (5 << 20) + b"{}", content_type="application/json")
            case "error":
                return web.Response(status=500, text="unable to get metadata")
            case "ok":
                return answer(request, name, body)

    # --- task metadata -----------------------------------------------------------------------------

    def _metadata(self, request: web.Request, name: str, _: bytes) -> web.Response:
        own = self.tasks[0] if self.tasks else None
        if request.method != "GET" or own is None or name not in {"/", "/task", "/taskWithTags"}:
            return _json("V4 metadata handler: unable to get it", status=404)
        containers = [self._metadata_container(own, container) for container in own.containers]
        if name == "/":
            return _json(containers[0])
        task = {
            "Cluster": self.cluster_said,
            "TaskARN": own.arn,
            "Family": own.family,
            "Revision": own.revision,
            "DesiredStatus": "RUNNING",
            "KnownStatus": "RUNNING",
            "Limits": {"CPU": 0.25, "Memory": 512},
            "PullStartedAt": "2026-11-20T20:27:26.551352793Z",
            "PullStoppedAt": "2026-11-20T20:27:37.086034102Z",
            "AvailabilityZone": "eu-west-1b",
            "LaunchType": own.launch_type,
            "Containers": containers,
            "FaultInjectionEnabled": False,
        }
        if own.service:
            task["ServiceName"] = own.service
        if name == "/taskWithTags":
            task["TaskTags"] = {"team": "shop"}
        return _json(task)

    def _metadata_container(self, task: FakeTask, container: FakeContainer) -> dict[str, Any]:
        made = {
            "DockerId": container.id,
            "Name": container.name,
            "DockerName": f"ecs-{task.family}-{task.revision}-{container.name}-aa",
            "Image": container.image,
            "ImageID": container.image_id,
            "Labels": {"com.amazonaws.ecs.task-arn": task.arn},
            "DesiredStatus": "RUNNING",
            "KnownStatus": "RUNNING",
            "Limits": {"CPU": 2},
            "Type": "NORMAL",
            "ContainerARN": self.container_arn(task, container),
            "Networks": [{"NetworkMode": "awsvpc", "IPv4Addresses": ["10.0.2.61"]}],
        }
        if not container.id:  # being pulled
            del made["DockerId"], made["DockerName"], made["ImageID"]
        return made

    def container_arn(self, task: FakeTask, container: FakeContainer) -> str:
        return f"{self.arn}:container/{self.cluster}/{task.arn.rpartition('/')[2]}/{container.name}-uuid"

    # --- agent -------------------------------------------------------------------------------------

    def _agent(self, request: web.Request, name: str, _: bytes) -> web.Response:
        if name == "/v1/metadata":
            return _json(
                {
                    "Cluster": self.cluster,
                    "ContainerInstanceArn": f"{self.arn}:container-instance/{self.cluster}/{'e' * 32}",
                    "Version": "Amazon ECS Agent - v1.99.0 (ea97869d)",
                }
            )
        if name != "/v1/tasks":
            commands = {"AvailableCommands": ["/v1/metadata", "/v1/tasks", "/license"]}
            return web.Response(text=json.dumps(commands))
        tasks = [self._agent_task(task) for task in self.tasks if task.here]
        docker_id, arn = request.query.get("dockerid"), request.query.get("taskarn")
        if docker_id is not None and arn is not None:
            return _json(_EMPTY_TASK, status=400)
        if docker_id is None and arn is None:
            return _json({"Tasks": tasks})
        for task in tasks:
            ids = [container["DockerId"] for container in task["Containers"]]
            if task["Arn"] == arn or any(
                docker_id in (identity, identity[:12]) for identity in ids if identity
            ):
                return _json(task)
        return _json(_EMPTY_TASK, status=404)

    def _agent_task(self, task: FakeTask) -> dict[str, Any]:
        containers: list[dict[str, Any]] = [
            {"DockerId": container.id, "DockerName": f"ecs-{container.name}", "Name": container.name}
            | ({"Image": container.image, "ImageID": container.image_id} if self.agent_images else {})
            for container in task.containers
        ]
        return {
            "Arn": task.arn,
            "DesiredStatus": "RUNNING",
            "KnownStatus": "RUNNING",
            "Family": task.family,
            "Version": task.revision,
            "Containers": containers,
        }

    # --- API ---------------------------------------------------------------------------------------

    def _api(self, request: web.Request, name: str, body: bytes) -> web.Response:
        headers: dict[str, list[str]] = {}
        for header, value in request.headers.items():
            headers.setdefault(header.lower(), []).append(value)
        wire = RawRequest(request.method, request.raw_path, headers, body)
        try:
            answer = self._operate(wire, name)
        except AwsError as error:
            if error.code in {
                "InvalidParameterException",
                "SerializationException",
                "ClusterNotFoundException",
            }:
                self.refusals.append(str(error))
            return web.Response(
                status=error.status, body=error.body("json", "id"), headers={"Content-Type": JSON_1_1}
            )
        return web.Response(body=json.dumps(answer).encode(), headers={"Content-Type": JSON_1_1})

    def _operate(self, wire: RawRequest, name: str) -> dict[str, Any]:
        verify(
            wire,
            service="ecs",
            region=self.region,
            credentials=self._credentials,
            now=self._clock(),
            max_skew=300.0,
            protocol="json",
        )
        operations = {"ListTasks": self._list_tasks, "DescribeTasks": self._describe_tasks}
        target = wire.header("x-amz-target") or ""
        if name not in operations or not target.startswith(TARGET) or wire.target != "/":
            raise AwsError("UnknownOperationException", f"No operation {name} here")
        if (wire.header("content-type") or "") != JSON_1_1:
            raise AwsError("SerializationException", "ECS takes JSON 1.1")
        if self.throttled:
            raise AwsError("ThrottlingException", "Rate exceeded")
        if name in self.denied:
            raise AwsError(
                "AccessDeniedException",
                f"User: {self._caller.arn} is not authorized to perform: ecs:{name} on resource: * because no "
                f"identity-based policy allows the ecs:{name} action",
            )
        parameters = load_json(wire.body)
        cluster = parameters.get("cluster", "default")
        if cluster not in (self.cluster, self.cluster_arn):
            raise AwsError("ClusterNotFoundException", "Cluster not found.")
        return operations[name](parameters)

    def _list_tasks(self, parameters: dict[str, Any]) -> dict[str, Any]:
        if unknown := parameters.keys() - _LIST_MEMBERS:
            raise AwsError("InvalidParameterException", f"unknown: {unknown}")
        size = parameters.get("maxResults", PAGE_MAX)
        if type(size) is not int or not 1 <= size <= PAGE_MAX:
            raise AwsError("InvalidParameterException", "maxResults must be between 1 and 100.")
        token = parameters.get("nextToken")
        if "nextToken" in parameters and token not in self._pages:
            raise AwsError("InvalidParameterException", "Invalid token.")
        start = self._pages[token] if token else 0
        end = start + min(size, self.page_max)
        answer: dict[str, Any] = {"taskArns": [task.arn for task in self.tasks[start:end]]}
        if end < len(self.tasks):
            answer["nextToken"] = f"token-{end}"
            self._pages[answer["nextToken"]] = end
        return answer

    def _describe_tasks(self, parameters: dict[str, Any]) -> dict[str, Any]:
        if unknown := parameters.keys() - {"cluster", "tasks", "include"}:
            raise AwsError("InvalidParameterException", f"unknown: {unknown}")
        wanted = parameters.get("tasks")
        if not isinstance(wanted, list) or not wanted:
            raise AwsError("InvalidParameterException", "Tasks cannot be empty.")
        if len(wanted) > PAGE_MAX:
            raise AwsError("InvalidParameterException", "Tasks cannot have more than 100 elements.")
        known = {task.arn: task for task in self.tasks}
        return {
            "tasks": [self._described(known[arn]) for arn in wanted if arn in known],
            "failures": [{"arn": arn, "reason": "MISSING"} for arn in wanted if arn not in known],
        }

    def _described(self, task: FakeTask) -> dict[str, Any]:
        return {
            "taskArn": task.arn,
            "clusterArn": self.cluster_arn,
            "taskDefinitionArn": f"{self.arn}:task-definition/{task.family}:{task.revision}",
            "group": task.group or f"family:{task.family}",
            "launchType": task.launch_type,
            "lastStatus": "RUNNING",
            "desiredStatus": "RUNNING",
            "createdAt": 1795000000.123,
            "containers": [
                {
                    "containerArn": self.container_arn(task, container),
                    "taskArn": task.arn,
                    "name": container.name,
                    "image": container.image,
                    "imageDigest": container.digest,
                    "lastStatus": "RUNNING",
                    "cpu": "0",
                }
                | ({"runtimeId": container.id} if container.id else {})
                for container in task.containers
            ],
            "version": 4,
        } | ({"startedBy": task.started_by} if task.started_by else {})


def _json(value: object, status: int = 200) -> web.Response:
    return web.json_response(value, status=status)
