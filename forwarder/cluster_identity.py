"""Which cluster this is. The configuration's word counts; where it has none, it is looked for, surest first.

There is no official way to learn the name from inside a pod. In this order (each step is skipped where it is not possible or not
permitted; a failed search is repeated every ``AGAIN_SECS``):

1. ``cluster.name``.
2. The nodes: hybrid providerIDs that agree, or eksctl's label on most of them.
3. The ConfigMap ``amazon-cloudwatch/cluster-info`` of the CloudWatch agent, if it is there and readable.
4. The tags of a node's EC2 instance (``ec2:DescribeTags``).
5. The EKS cluster whose OIDC issuer signed our service account's token (``eks:ListClusters``, ``eks:DescribeCluster``).

Not used: the session name of Pod Identity credentials begins with the name, but names have hyphens and may be cut, so where it ends is
a guess. Records carry the discovered name from the alert on; a name found later does not change them.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable
from html import unescape
from typing import Any
from urllib.parse import quote

import msgspec
import structlog

from forwarder.aws import Aws
from forwarder.aws_signed import SignedError, signed
from forwarder.kubernetes_access import AccessError
from forwarder.kubernetes_api import Api, ApiError

FIRST_WAIT_SECS = 2.0
"""For the nodes to be listed."""
TRIES_AT_FIRST = 5
AGAIN_SECS = 600.0
CLUSTERS_MAX = 100
CLUSTER_INFO = "/api/v1/namespaces/amazon-cloudwatch/configmaps/cluster-info"

_NAME = re.compile(r"[0-9A-Za-z][A-Za-z0-9_-]{0,99}\Z")
_ITEM = re.compile(r"<item>(.*?)</item>", re.DOTALL)
_KEY, _VALUE = re.compile(r"<key>([^<]*)</key>"), re.compile(r"<value>([^<]*)</value>")
_NAMING_TAGS = ("aws:eks:cluster-name", "eks:cluster-name", "eks:eks-cluster-name")
"""Those nobody but AWS can set first."""
_OWNED = "kubernetes.io/cluster/"
PAGES_MAX = 10

_ODD = (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError, RecursionError)
"""What an answer of another shape than expected ends in."""

log = structlog.get_logger("cluster")


class Surroundings:
    """What the search may ask; each answers nothing where it does not know."""

    def __init__(
        self,
        *,
        nodes_say: Callable[[], str] = str,
        an_instance: Callable[[], str] = str,
        api: Callable[[], Api | None] = lambda: None,
        region: Callable[[], str] = str,
    ) -> None:
        """``region`` is the nodes', which may not be the sinks'."""
        self.nodes_say = nodes_say
        self.an_instance = an_instance
        self.api = api
        self.region = region


class ClusterIdentity:
    """The cluster's name, as soon as it is known."""

    def __init__(self, configured: str, aws: Aws, surroundings: Surroundings) -> None:
        self.source = "configured" if configured else ""
        """Which step found it."""
        self.steps: dict[str, str] = {}
        """What each step said when it was asked last."""
        self._configured = configured
        self._aws = aws
        self._around = surroundings
        self._found = ""
        self._task: asyncio.Task[None] | None = None

    def discovered(self) -> str:
        """The name that goes with each record: nothing where the configuration has one."""
        return self._found

    @property
    def name(self) -> str:
        return self._configured or self._found

    async def start(self) -> None:
        """Begin to look for it, if need be."""
        if not self._configured:
            self._task = asyncio.create_task(self._search(), name="cluster identity")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> str:
        """One search through all steps."""
        steps: tuple[tuple[str, Callable[[], Awaitable[str]]], ...] = (
            ("nodes", self._nodes),
            ("cluster-info", self._cluster_info),
            ("instance tags", self._tags),
            ("eks", self._issuer),
        )
        for source, step in steps:
            try:
                name = await step()
            except (ApiError, AccessError, SignedError, *_ODD) as error:
                self.steps[source] = str(error)[:200] or type(error).__name__
                continue
            self.steps[source] = name or "does not know"
            if _NAME.match(name):
                self.source = source
                return name
        return ""

    async def _search(self) -> None:
        tries = 0
        while True:
            await asyncio.sleep(FIRST_WAIT_SECS if tries < TRIES_AT_FIRST else AGAIN_SECS)
            tries += 1
            try:
                name = await self.look()
            except Exception:
                log.exception("search for the cluster's name failed")
                continue
            if name:
                self._found = name
                log.info("cluster found", name=name, source=self.source)
                return
            if tries == TRIES_AT_FIRST:
                log.warning("cluster unknown: set cluster.name, events and findings go without")

    async def _nodes(self) -> str:
        return self._around.nodes_say()

    async def _cluster_info(self) -> str:
        api = self._around.api()
        if api is None:
            return ""
        data = msgspec.json.decode(await api.ask(CLUSTER_INFO))
        return str(data["data"]["cluster.name"])

    async def _tags(self) -> str:
        instance = self._around.an_instance()
        if not instance:
            return ""
        form = {
            "Action": "DescribeTags",
            "Version": "2016-11-15",
            "Filter.1.Name": "resource-id",
            "Filter.1.Value.1": instance,
        }
        tags = _tags_in(await signed(self._aws, "ec2", "/", form, region=self._around.region()))
        for key in _NAMING_TAGS:
            if key in tags:
                return tags[key]
        owned = {key.removeprefix(_OWNED) for key in tags if key.startswith(_OWNED)}
        return owned.pop() if len(owned) == 1 else ""

    async def _issuer(self) -> str:
        api = self._around.api()
        if api is None:
            return ""
        issuer = _issuer_of((await api.access.credentials()).token)
        if not issuer.startswith("https://oidc.eks."):
            return ""
        token = ""
        for _ in range(PAGES_MAX):
            path = f"/clusters?maxResults={CLUSTERS_MAX}" + (
                f"&nextToken={quote(token, safe='')}" if token else ""
            )
            listed: Any = msgspec.json.decode(await self._eks(path))
            for name in listed["clusters"]:
                if await self._signed_by(name, issuer):
                    return str(name)
            token = listed.get("nextToken") or ""
            if not token:
                break
        return ""

    async def _signed_by(self, name: str, issuer: str) -> bool:
        """Whether this cluster's issuer is ours; one we may not look at is not."""
        try:
            described: Any = msgspec.json.decode(await self._eks(f"/clusters/{quote(name, safe='')}"))
            return bool(described["cluster"]["identity"]["oidc"]["issuer"] == issuer)
        except (SignedError, *_ODD) as error:
            log.debug("cluster not looked at", name=name, error=str(error)[:200])
            return False

    async def _eks(self, path: str) -> bytes:
        return await signed(self._aws, "eks", path, region=self._around.region())


def _tags_in(answer: bytes) -> dict[str, str]:
    """Tags of EC2's DescribeTags; a tag may have no value."""
    tags = {}
    for item in _ITEM.findall(answer.decode()):
        key, value = _KEY.search(item), _VALUE.search(item)
        if key:
            tags[unescape(key[1])] = unescape(value[1]) if value else ""
    return tags


def _issuer_of(token: str) -> str:
    """``iss`` of a service account's token; its signature is not our business."""
    claims = token.split(".")[1] if token.count(".") == 2 else ""  # noqa: PLR2004 - header, claims, signature
    data: Any = msgspec.json.decode(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)) or b"{}")
    return str(data.get("iss", ""))
