"""``check --live``, the part about enrichment: what is said when it is there, forbidden, away, or not wanted."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from forwarder import __main__ as command
from forwarder.aws import Aws
from forwarder.config import ConfigError, Fault
from forwarder.enrichment import ec2
from forwarder.kubernetes_mirror import PERMISSIONS
from forwarder.live_check_step import Step
from forwarder.live_check_surroundings import surroundings
from tests.fakes import kubernetes_objects as objects
from tests.fakes.aws import FakeAws
from tests.fakes.ecs import FakeContainer, FakeEcs, FakeTask
from tests.fakes.imds import FakeImds
from tests.fakes.kubernetes import FakeKubernetes
from tests.running import settings_of

Look = Callable[..., Any]


@pytest.fixture
async def look(aws: FakeAws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Look]:
    """Runs the steps with changed settings: step by name."""
    monkeypatch.setattr(ec2, "REQUEST_SECS_MAX", 0.1)
    opened: list[Aws] = []

    async def run(**enrichment: Any) -> dict[str, Step]:
        changes = {f"enrichment.{name}": value for name, value in enrichment.items() if name != "cluster"}
        settings = settings_of(tmp_path, changes | {"cluster": {"name": enrichment.get("cluster", "prod")}})
        client = Aws(settings.aws)
        opened.append(client)
        await client.open_clients([])
        return {step.what: step for step in await surroundings(settings, client)}

    yield run
    for client in opened:
        await client.close()


def kubeconfig(directory: Path, api: FakeKubernetes) -> str:
    file = directory / "kubeconfig"
    named = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": api.url}}],
        "users": [{"name": "u", "user": {"token": "t0ken"}}],
    }
    file.write_text(json.dumps(named))
    return str(file)


async def test_everything_is_there(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeKubernetes() as api, FakeImds() as imds:
        for name, value in imds.environment().items():
            monkeypatch.setenv(name, value)
        steps = await look(
            kubernetes={"enabled": True, "kubeconfig": kubeconfig(tmp_path, api)}, ec2={"enabled": True}
        )
    assert all(step.ok for step in steps.values()), steps
    assert api.url in steps["kubernetes: API"].finding
    assert {what for what in steps if what.startswith("kubernetes: ")} == {
        "kubernetes: API",
        *(f"kubernetes: {verb} {resource}" for verb, _, resource in PERMISSIONS),
    }
    assert "i-0123456789abcdef0" in steps["instance metadata (IMDSv2)"].finding
    assert steps["ECS"].finding if "ECS" in steps else steps["ECS task metadata"].finding == "off"
    assert steps["cluster identity"].finding == "prod (configured)"


async def test_each_missing_permission_is_named(look: Look, tmp_path: Path) -> None:
    async with FakeKubernetes() as api:
        api.allow -= {("", "nodes", "watch"), ("apps", "replicasets", "list")}
        steps = await look(kubernetes={"enabled": True, "kubeconfig": kubeconfig(tmp_path, api)})
    bad = {what for what, step in steps.items() if not step.ok}
    assert bad == {"kubernetes: watch nodes", "kubernetes: list replicasets"}
    assert "docs/enrichment.md" in steps["kubernetes: watch nodes"].advice


async def test_an_api_server_that_is_away_or_knows_us_not(look: Look, tmp_path: Path) -> None:
    async with FakeKubernetes() as api:
        config = kubeconfig(tmp_path, api)
        api.tokens = {"another"}
        steps = await look(kubernetes={"enabled": True, "kubeconfig": config})
        assert not all(step.ok for step in steps.values())
    steps = await look(kubernetes={"enabled": True, "kubeconfig": config})
    assert not steps["kubernetes: API"].ok
    assert "127.0.0.1" in steps["kubernetes: API"].finding
    steps = await look(kubernetes={"enabled": True, "kubeconfig": str(tmp_path / "none")})
    assert "cannot be read" in steps["kubernetes: API"].finding


@pytest.mark.parametrize(("enabled", "fine"), [("auto", True), (True, False)])
async def test_nothing_there_is_a_fault_only_where_it_has_to_be(
    look: Look, monkeypatch: pytest.MonkeyPatch, enabled: Any, fine: bool
) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    async with FakeImds() as imds:
        imds.enabled = False
        for name, value in imds.environment().items():
            monkeypatch.setenv(name, value)
        steps = await look(kubernetes={"enabled": enabled}, ec2={"enabled": enabled}, ecs={"enabled": "auto"})
    assert steps["kubernetes: API"].ok is fine
    assert steps["instance metadata (IMDSv2)"].ok is fine
    assert steps["ECS"].ok


async def test_the_cluster_is_named_by_the_nodes_or_missing(look: Look, tmp_path: Path) -> None:
    async with FakeKubernetes() as api:
        there = {"enabled": True, "kubeconfig": kubeconfig(tmp_path, api)}
        steps = await look(kubernetes=there, cluster="")
        assert not steps["cluster identity"].ok
        assert steps["cluster identity"].advice == "set cluster.name"
        api.create("nodes", objects.node(labels={"alpha.eksctl.io/cluster-name": "shop"}))
        steps = await look(kubernetes=there, cluster="")
        assert steps["cluster identity"].finding == "shop (nodes)"


async def test_each_source_of_ecs_is_told(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeEcs() as ecs:
        ecs.tasks = [FakeTask(ecs.task_arn(1), [FakeContainer("a" * 64, "forwarder")])]
        for name, value in ecs.environment().items():
            monkeypatch.setenv(name, value)
        steps = await look(ecs={"enabled": "auto", "agent_url": ecs.url, "describe_tasks": False})
    assert steps["ECS: task_metadata"].ok
    assert steps["ECS: task_metadata"].finding == "answers"
    assert steps["ECS: agent"].finding == "answers"


def test_the_region_may_come_from_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for only where it is missing; a configuration with other faults stays faulty."""
    asked: list[int] = []

    async def identity(_: Any) -> Any:
        asked.append(1)
        return ec2.Identity(
            account_id="1" * 12,
            region="eu-north-1",
            zone="",
            instance_id="i-0123456789abcdef0",
            instance_type="",
            launched_at="",
            private_ip="",
        )

    monkeypatch.setattr(ec2, "read_identity", identity)
    monkeypatch.setenv("AWS_REGION", "")

    def load() -> str:
        if not os.environ["AWS_REGION"]:
            raise ConfigError([Fault("aws.region", "is required")])
        return os.environ["AWS_REGION"]

    assert command._with_region(load) == "eu-north-1"
    assert command._with_region(load) == "eu-north-1"
    assert len(asked) == 1

    def other() -> str:
        raise ConfigError([Fault("receiver.port", "is wrong")])

    with pytest.raises(ConfigError):
        command._with_region(other)
    assert len(asked) == 1
