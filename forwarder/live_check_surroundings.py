"""What ``falco-forwarder check --live`` says of enrichment: instance metadata, Kubernetes API and permissions, cluster's name.

Enrichment is never a condition for delivery, so what is not there is no failure, unless the configuration says it has to be.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

import msgspec

from forwarder.aws import Aws
from forwarder.cluster_identity import ClusterIdentity, Surroundings
from forwarder.contract import DeliveryError
from forwarder.enrichment.ec2 import NoIdentityError, ask_identity
from forwarder.enrichment.ecs import Ecs
from forwarder.kubernetes_access import Access, AccessError, find_source
from forwarder.kubernetes_api import Api, ApiError
from forwarder.kubernetes_cache import Nodes
from forwarder.kubernetes_members import cluster_of
from forwarder.kubernetes_mirror import PERMISSIONS
from forwarder.kubernetes_objects import decode_node
from forwarder.live_check_step import Step
from forwarder.settings import Settings

NODES_MAX = 100
ECS_SECS_MAX = 5.0
RULES = "give the service account the rules of docs/enrichment.md (the chart does)"


async def surroundings(settings: Settings, aws: Aws) -> list[Step]:
    """All steps of enrichment; never raises for what a peer says."""
    steps = [await _instance(settings), *await _ecs(settings, aws)]
    own = settings.enrichment.kubernetes
    nodes = Nodes()
    api: Api | None = None
    if own.enabled is not False:
        try:
            source = await asyncio.to_thread(find_source, own.kubeconfig, os.environ)
        except AccessError as error:
            steps.append(Step("kubernetes: API", ok=False, finding=str(error), advice="mend the kubeconfig"))
        else:
            if source is None:
                steps.append(
                    Step(
                        "kubernetes: API",
                        ok=own.enabled == "auto",
                        finding="none here: no service account, no kubeconfig",
                        advice="set enrichment.kubernetes.kubeconfig, or automountServiceAccountToken in the pod",
                    )
                )
            else:
                api = Api(Access(source, time.monotonic))
                steps += await _kubernetes(api, nodes)
    try:
        steps.append(await _cluster(settings, aws, api, nodes))
    finally:
        if api is not None:
            await api.close()
    return steps


async def _instance(settings: Settings) -> Step:
    what = "instance metadata (IMDSv2)"
    if settings.enrichment.ec2.enabled is False:
        return Step(what, ok=True, finding="off")
    try:
        found = await ask_identity(os.environ)
    except NoIdentityError as error:
        return Step(
            what,
            ok=settings.enrichment.ec2.enabled == "auto",
            finding=f"none here: {error}",
            advice="raise the hop limit to 2, or set enrichment.ec2.enabled to false",
        )
    return Step(
        what, ok=True, finding=f"{found.instance_id} ({found.instance_type}) in {found.zone or found.region}"
    )


async def _ecs(settings: Settings, aws: Aws) -> list[Step]:
    """What each source of the ECS enricher says, after one round of asking."""
    ecs = Ecs(
        settings.enrichment.ecs,
        metrics=None,
        monotonic=time.monotonic,
        rng=random.Random(),  # noqa: S311 - jitter
        aws=aws,
        environment=os.environ,
    )
    if not ecs.active:
        return [Step("ECS", ok=True, finding=str(ecs.status()["reason"]))]
    await aws.open_clients(list(ecs.wanted_services()))
    await ecs.start()
    try:
        until = time.monotonic() + ECS_SECS_MAX
        while "not asked" in _sources(ecs, "describe_tasks") and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    finally:
        await ecs.stop()
    said = dict(ecs.status()["sources"])
    if "describe_tasks" in said:
        said["describe_tasks"] = await _list_tasks(ecs, aws)
    advice = "without it, its containers go without `ecs` (docs/enrichment.md)"
    return [
        Step(f"ECS: {name}", ok=word == "answers" or name != "task_metadata", finding=word, advice=advice)
        for name, word in said.items()
    ]


def _sources(ecs: Ecs, but: str) -> list[str]:
    """What all sources but one say: that one is only asked for what the others do not know."""
    return [said for name, said in ecs.status()["sources"].items() if name != but]


async def _list_tasks(ecs: Ecs, aws: Aws) -> str:
    if ecs.task is None:
        return "not tried: the cluster is not known"
    try:
        await aws.call(aws.client("ecs"), "list_tasks", cluster=ecs.task.cluster, maxResults=1)
    except DeliveryError as error:
        return f"{error.code}: {error}"
    return "answers"


async def _kubernetes(api: Api, nodes: Nodes) -> list[Step]:
    try:
        version: Any = msgspec.json.decode(await api.ask("/version"))
        finding = f"{api.server}, {version.get('gitVersion', 'unknown version')}"
        steps = [Step("kubernetes: API", ok=True, finding=finding)]
    except (ApiError, msgspec.MsgspecError, AttributeError) as error:
        advice = "check the NetworkPolicy, the server's address, the token"
        return [Step("kubernetes: API", ok=False, finding=str(error), advice=advice)]
    for verb, group, resource in PERMISSIONS:
        what = f"kubernetes: {verb} {resource}"
        try:
            allowed = await api.may(verb, group, resource)
        except ApiError as error:
            steps.append(Step(what, ok=False, finding=str(error), advice=RULES))
        else:
            steps.append(Step(what, ok=allowed, finding="allowed" if allowed else "forbidden", advice=RULES))
    try:
        listed = msgspec.json.decode(
            await api.ask(f"/api/v1/nodes?limit={NODES_MAX}"), type=dict[str, msgspec.Raw]
        )
        for item in msgspec.json.decode(listed["items"], type=list[msgspec.Raw]):
            nodes.put(decode_node(bytes(item))[0])
    except (ApiError, msgspec.MsgspecError, KeyError):
        pass  # said above: nodes may not be listed
    return steps


async def _cluster(settings: Settings, aws: Aws, api: Api | None, nodes: Nodes) -> Step:
    what = "cluster identity"
    around = Surroundings(
        nodes_say=lambda: cluster_of(nodes),
        an_instance=lambda: next((node.instance_id for node in nodes.live() if node.instance_id), ""),
        api=lambda: api,
    )
    identity = ClusterIdentity(settings.cluster.name, aws, around)
    name = settings.cluster.name or await identity.look()
    if not name:
        hub = settings.sinks.security_hub.enabled
        return Step(what, ok=not hub, finding="unknown", advice="set cluster.name")
    return Step(what, ok=True, finding=f"{name} ({identity.source})")
