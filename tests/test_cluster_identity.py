"""Which cluster this is: each step against a fake of whom it asks, the order, and what happens when nobody knows."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from html import escape
from typing import Any

import pytest
from aiohttp import web

from forwarder import cluster_identity
from forwarder.aws import Aws, AwsSettings
from forwarder.aws_signed import SignedError, endpoint, signed
from forwarder.cluster_identity import ClusterIdentity, Surroundings
from forwarder.kubernetes_access import Access, Source
from forwarder.kubernetes_api import Api
from tests.fakes.aws import FakeAws
from tests.fakes.kubernetes import FakeKubernetes

ISSUER = "https://oidc.eks.eu-west-1.amazonaws.com/id/0123456789ABCDEF"
INSTANCE = "i-0123456789abcdef0"


class Questions:
    """EC2's and EKS's answers, and what was asked; only signed requests get one."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.issuers: dict[str, str] = {}
        self.asked: list[str] = []
        self.allowed = True
        self.forbidden: set[str] = set()
        self.page = 100

    async def ec2(self, request: web.Request) -> web.Response:
        form = await request.post()
        self._check(request, "ec2", str(form["Action"]))
        assert form["Version"] == "2016-11-15"
        assert (form["Filter.1.Name"], form["Filter.1.Value.1"]) == ("resource-id", INSTANCE)
        items = "".join(
            f"<item><resourceId>{INSTANCE}</resourceId><resourceType>instance</resourceType>"
            f"<key>{escape(key)}</key>{f'<value>{escape(value)}</value>' if value else '<value/>'}</item>"
            for key, value in self.tags.items()
        )
        return web.Response(text=f"<DescribeTagsResponse><tagSet>{items}</tagSet></DescribeTagsResponse>")

    async def clusters(self, request: web.Request) -> web.StreamResponse:
        self._check(request, "eks", "ListClusters")
        start = int(request.query.get("nextToken", 0))
        names, end = list(self.issuers), start + self.page
        more = {"nextToken": str(end)} if end < len(names) else {}
        response = web.StreamResponse()
        await response.prepare(request)
        for byte in json.dumps({"clusters": names[start:end]} | more).encode():  # as a slow network has it
            await response.write(bytes([byte]))
            await asyncio.sleep(0)
        return response

    async def cluster(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self._check(request, "eks", f"DescribeCluster {name}")
        if name in self.forbidden:
            raise web.HTTPForbidden(text="AccessDeniedException: not this one")
        return web.json_response({"cluster": {"identity": {"oidc": {"issuer": self.issuers[name]}}}})

    def _check(self, request: web.Request, service: str, what: str) -> None:
        self.asked.append(what)
        signature = request.headers.get("Authorization", "")
        assert signature.startswith("AWS4-HMAC-SHA256 "), signature
        assert f"/eu-west-1/{service}/aws4_request" in signature
        if not self.allowed:
            raise web.HTTPForbidden(text="UnauthorizedOperation: no")


@pytest.fixture
async def questions(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Questions]:
    asked = Questions()
    application = web.Application()
    application.router.add_post("/", asked.ec2)
    application.router.add_get("/clusters", asked.clusters)
    application.router.add_get("/clusters/{name}", asked.cluster)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", url)
    monkeypatch.setenv("AWS_ENDPOINT_URL_EKS", url)
    yield asked
    await runner.cleanup()


Identify = Callable[..., Any]


@pytest.fixture
async def identify(questions: Questions) -> AsyncIterator[Identify]:
    """Makes an identity over these surroundings."""
    client = Aws(AwsSettings(region="eu-west-1"))
    await client.open_clients([])
    apis: list[Api] = []

    def make(
        configured: str = "", *, nodes: str = "", instance: str = "", api: str = "", token: str = "t0ken"
    ) -> ClusterIdentity:
        found = Api(Access(Source(server=api, token=token), asyncio.get_running_loop().time)) if api else None
        apis.extend([found] if found else [])
        around = Surroundings(nodes_say=lambda: nodes, an_instance=lambda: instance, api=lambda: found)
        return ClusterIdentity(configured, client, around)

    yield make
    for api in apis:
        await api.close()
    await client.close()


def token(issuer: str) -> str:
    parts = [json.dumps(part).encode() for part in ({"alg": "RS256"}, {"iss": issuer, "sub": "x"})]
    return ".".join([*(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts), "signature"])


async def test_the_configured_name_counts(identify: Identify, questions: Questions) -> None:
    identity = identify("prod", nodes="other", instance=INSTANCE)
    await identity.start()
    assert (identity.name, identity.source, identity.discovered()) == ("prod", "configured", "")
    await identity.stop()
    assert questions.asked == []


async def test_the_nodes_come_before_everybody_else(identify: Identify, questions: Questions) -> None:
    questions.tags = {"eks:cluster-name": "tagged"}
    identity = identify(nodes="noded", instance=INSTANCE)
    assert await identity.look() == "noded"
    assert identity.source == "nodes"
    assert questions.asked == []


async def test_the_cloudwatch_agents_config_map(identify: Identify, questions: Questions) -> None:
    questions.tags = {"eks:cluster-name": "tagged"}
    async with FakeKubernetes() as api:
        api.allow.add(("", "configmaps", "get"))
        api.create(
            "configmaps",
            {
                "metadata": {"name": "cluster-info", "namespace": "amazon-cloudwatch"},
                "data": {"cluster.name": "agent"},
            },
        )
        identity = identify(instance=INSTANCE, api=api.url)
        assert (await identity.look(), identity.source) == ("agent", "cluster-info")
        api.allow.discard(("", "configmaps", "get"))
        assert (await identity.look(), identity.source) == ("tagged", "instance tags")


@pytest.mark.parametrize(
    ("tags", "name"),
    [
        ({"Name": "worker", "eks:cluster-name": "a"}, "a"),
        ({"aws:eks:cluster-name": "b"}, "b"),
        ({"eks:eks-cluster-name": "c"}, "c"),
        ({"kubernetes.io/cluster/d": "owned"}, "d"),
        ({"kubernetes.io/cluster/d": "owned", "kubernetes.io/cluster/e": "shared"}, ""),
        ({"Name": "worker"}, ""),
        ({"a": "", "kubernetes.io/cluster/f": "owned"}, "f"),
        ({"k8s.io/cluster-autoscaler/enabled": "", "eks:cluster-name": "g"}, "g"),
        ({"eks:cluster-name": "anybody", "aws:eks:cluster-name": "aws"}, "aws"),
        ({"note": "<item>&", "eks:cluster-name": "h"}, "h"),
        ({"eks:cluster-name": "not/a name"}, ""),
        ({}, ""),
    ],
)
async def test_the_instances_tags(
    identify: Identify, questions: Questions, tags: dict[str, str], name: str
) -> None:
    questions.tags = tags
    identity = identify(instance=INSTANCE)
    assert await identity.look() == name
    assert questions.asked == ["DescribeTags"]


async def test_the_cluster_whose_issuer_signed_our_token(identify: Identify, questions: Questions) -> None:
    questions.issuers = {"other": f"{ISSUER}0", "prod": ISSUER, "third": f"{ISSUER}1"}
    async with FakeKubernetes(token=token(ISSUER)) as api:
        identity = identify(api=api.url, token=token(ISSUER))
        assert (await identity.look(), identity.source) == ("prod", "eks")
        assert questions.asked == ["ListClusters", "DescribeCluster other", "DescribeCluster prod"]
        questions.forbidden, questions.page = {"other"}, 1
        assert await identity.look() == "prod", "one that is forbidden is not ours"
        questions.asked.clear()
        elsewhere = identify(api=api.url, token=token("https://kubernetes.default.svc"))
        assert await elsewhere.look() == ""
        assert questions.asked == []


@pytest.mark.parametrize("bad", ["", "t0ken", "a.b.c", "a.e30.c", "a.bm90IGpzb24.c"])
async def test_a_token_that_is_none_names_nobody(identify: Identify, questions: Questions, bad: str) -> None:
    async with FakeKubernetes(token=bad) as api:
        assert await identify(api=api.url, token=bad).look() == ""


async def test_what_is_forbidden_is_skipped(identify: Identify, questions: Questions) -> None:
    questions.allowed = False
    async with FakeKubernetes(token=token(ISSUER)) as api:
        assert await identify(instance=INSTANCE, api=api.url, token=token(ISSUER)).look() == ""
        assert questions.asked == ["DescribeTags", "ListClusters"]


async def test_it_is_looked_for_until_it_is_found(
    identify: Identify, questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_identity, "FIRST_WAIT_SECS", 0.01)
    monkeypatch.setattr(cluster_identity, "AGAIN_SECS", 0.02)
    identity = identify(instance=INSTANCE)
    await identity.start()
    async with asyncio.timeout(10):
        while len(questions.asked) < 7:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert identity.name == ""
        questions.tags = {"eks:cluster-name": "late"}
        while not identity.name:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert (identity.discovered(), identity.source) == ("late", "instance tags")
    await identity.stop()


@pytest.mark.parametrize(
    ("environment", "partition", "url"),
    [
        ({}, "aws", "https://ec2.eu-west-1.amazonaws.com"),
        ({}, "aws-cn", "https://ec2.eu-west-1.amazonaws.com.cn"),
        ({"AWS_ENDPOINT_URL": "http://x:1/"}, "aws", "http://x:1"),
        ({"AWS_ENDPOINT_URL": "http://x:1", "AWS_ENDPOINT_URL_EC2": "http://y:2"}, "aws", "http://y:2"),
    ],
)
def test_endpoints(environment: dict[str, str], partition: str, url: str) -> None:
    assert endpoint("ec2", "eu-west-1", partition, environment) == url


async def test_nobody_there_is_one_clear_error(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_EKS", "http://127.0.0.1:9")
    client = Aws(AwsSettings(region="eu-west-1"))
    await client.open_clients([])
    with pytest.raises(SignedError, match="Connect"):
        await signed(client, "eks", "/clusters")
    await client.close()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    poor = Aws(AwsSettings(region="eu-west-1"))
    await poor.open_clients([])
    with pytest.raises(SignedError, match="NoCredentials"):
        await signed(poor, "eks", "/clusters")
    await poor.close()
