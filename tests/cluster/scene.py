"""A small shop in a test cluster: every kind of workload, every kind of node; and the resources of a finding about it.

What is expected is worked out from the objects as the API server returned them, and not from our code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from tests.cluster import objects
from tests.cluster.api import path_of
from tests.cluster.changes import BACKGROUND
from tests.cluster.harness import Cluster
from tests.cluster.objects import digits, ec2_labels, owned_by
from tests.enriched import kept

REGION, ACCOUNT, CLUSTER = "eu-west-1", "111122223333", "test-cluster"
NAMESPACE_LABELS = {"team": "payments", "app.kubernetes.io/part-of": "shop", "secret": "no"}
EC2 = "ip-10-0-1-17.eu-west-1.compute.internal"
LOCAL = "ip-10-0-2-5.eu-west-1.compute.internal"
"""Alerts of tests come from its address."""
FARGATE = "fargate-ip-10-0-3-7.eu-west-1.compute.internal"
HYBRID = "mi-0fedcba9876543210"
CONTROLLERS = ("deployments", "replicasets", "statefulsets", "daemonsets", "cronjobs", "jobs")
_PATHS = {kind: f"/apis/apps/v1/namespaces/{{}}/{kind}" for kind in ("statefulsets", "daemonsets")}

Object = dict[str, Any]


class Scene:
    """Objects that were made, as the API server has them, and the means to make more."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.nodes: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.workloads: dict[str, tuple[str, str]] = {}
        """Kind and name of a pod's top owner, by the pod's name."""
        self._namespaces: list[str] = []

    def build(self) -> None:
        """The shop."""
        labels = {"metadata": {"labels": NAMESPACE_LABELS}}
        self.cluster.admin.patch("namespaces", self.namespace, labels)
        self.node(EC2, "aws:///eu-west-1a/i-0123456789abcdef0", ["10.0.1.17"], ec2_labels())
        second = ec2_labels("eu-west-1b", "c7g.xlarge")
        self.node(LOCAL, "aws:///eu-west-1b/i-00000000000000017", ["127.0.0.1"], second)
        fargate = {"eks.amazonaws.com/compute-type": "fargate", "topology.kubernetes.io/region": REGION}
        provider = f"aws:///eu-west-1b/0a1b2c3d4e-0123456789abcdef0123456789abcdef/{FARGATE}"
        self.node(FARGATE, provider, ["10.0.3.7"], fargate)
        hybrid = {"eks.amazonaws.com/compute-type": "hybrid"}
        self.node(HYBRID, f"eks-hybrid:///{REGION}/{CLUSTER}/{HYBRID}", ["192.168.7.7"], hybrid)

        web = self.controller("deployments", "web")
        replicas = self.controller("replicasets", "web-5d4", owned_by("Deployment", "web", web))
        labels_of_web = {"app.kubernetes.io/name": "web", "team": "shop", "pod-template-hash": "5d4"}
        self.pod(
            "web-5d4-abcde",
            EC2,
            owned_by("ReplicaSet", "web-5d4", replicas),
            ("Deployment", "web"),
            ids={"app": digits("web"), "side-car": digits("web side-car")},
            ip="10.0.1.42",
            labels=labels_of_web,
            service_account="web",
            privileged=False,
        )
        nightly = self.controller("cronjobs", "nightly", body=objects.cron_job("nightly"))
        run = self.controller(
            "jobs",
            "nightly-1",
            body=objects.job("nightly-1", owner=owned_by("CronJob", "nightly", nightly)),
        )
        self.pod("nightly-1-xyz", FARGATE, owned_by("Job", "nightly-1", run), ("CronJob", "nightly"))
        once = self.controller("jobs", "once", body=objects.job("once"))
        self.pod("once-xyz", EC2, owned_by("Job", "once", once), ("Job", "once"))
        data = self.controller("statefulsets", "db")
        self.pod("db-0", HYBRID, owned_by("StatefulSet", "db", data), ("StatefulSet", "db"), ip="192.168.8.1")
        falco = owned_by("DaemonSet", "falco", self.controller("daemonsets", "falco"))
        self.pod("falco-xczjd", EC2, falco, ("DaemonSet", "falco"), ip="10.0.1.50")
        self.pod("debug", LOCAL, ip="10.0.2.99")
        self.pod("lost", "not-a-node", ip="10.0.9.9")

    def clear(self) -> None:
        """Remove everything that would stay after the namespace."""
        api = self.cluster.admin
        for name in self.nodes:
            api.delete("nodes", name)
        for pod in self.pods.values():
            with contextlib.suppress(Exception):
                api.delete("pods", pod["metadata"]["name"], pod["metadata"]["namespace"])
        for kind in CONTROLLERS:
            api.call("DELETE", self._path(kind), BACKGROUND)
        for name in self._namespaces:
            self.cluster.drop_namespace(name)

    # ---- making -------------------------------------------------------------------------------------

    def node(
        self, name: str, provider_id: str, addresses: list[str], labels: Mapping[str, str] | None = None
    ) -> None:
        body = objects.node(name, provider_id, addresses=addresses, labels=labels)
        self.nodes[name] = self.cluster.admin.create("nodes", body)

    def other_namespace(self, name: str) -> None:
        """One more, if it is not there."""
        if name not in {"default", "kube-system", *self._namespaces}:
            self._namespaces.append(self.cluster.make_namespace(name))

    def controller(
        self, kind: str, name: str, owner: Mapping[str, Any] | None = None, body: Object | None = None
    ) -> str:
        """Make one, return its UID."""
        made = self.cluster.admin.call("POST", self._path(kind), body or objects.workload(name, owner=owner))
        return str(made["metadata"]["uid"])

    def pod(
        self,
        name: str,
        node: str,
        owner: Mapping[str, Any] | None = None,
        workload: tuple[str, str] | None = None,
        *,
        namespace: str = "",
        **options: Any,
    ) -> Object:
        """Make a running pod; its address and container id come from its name where they are not given."""
        place = namespace or self.namespace
        options = {
            "ids": {"app": digits(f"{place}/{name}")},
            "ip": "10.0.0.8",
            "labels": {"app": name},
        } | options
        body = objects.pod(name, node=node, owner=owner, **options)
        self.pods[name] = self.cluster.admin.create("pods", body, place)
        self.workloads[name] = workload or ("Pod", name)
        return self.pods[name]

    def _path(self, kind: str) -> str:
        return _PATHS[kind].format(self.namespace) if kind in _PATHS else path_of(kind, self.namespace)

    # ---- expecting ----------------------------------------------------------------------------------

    def node_of(self, name: str) -> dict[str, str]:
        """``node`` in CloudWatch, by the rules of docs/enrichment.md."""
        if name not in self.nodes:
            return {"name": name}
        node = self.nodes[name]
        labels, provider = node["metadata"]["labels"], node["spec"].get("providerID", "")
        scheme, _, rest = provider.partition(":///")
        parts = rest.split("/")
        is_instance = scheme == "aws" and parts[-1].startswith("i-")
        expected = {
            "name": name,
            "instance_id": parts[-1] if is_instance else "",
            "instance_type": labels.get("node.kubernetes.io/instance-type", ""),
            "zone": labels.get("topology.kubernetes.io/zone") or (parts[0] if scheme == "aws" else ""),
            "region": labels.get("topology.kubernetes.io/region")
            or (parts[0] if scheme == "eks-hybrid" else ""),
            "provider_id": provider,
            "nodegroup": labels.get("eks.amazonaws.com/nodegroup", ""),
            "compute_type": labels.get("eks.amazonaws.com/compute-type", ""),
        }
        return {key: value for key, value in expected.items() if value}

    def host_resource(self, name: str, hostname: str) -> Object:
        """``AwsEc2Instance``, or ``Other`` for what is none."""
        node = self.node_of(name)
        facts = {"node": name, "hostname": hostname}
        facts |= {key: node[key] for key in ("zone", "nodegroup", "compute_type") if key in node}
        facts = {key: value for key, value in facts.items() if value}
        place = {"Region": node.get("region", REGION), "Partition": "aws"}
        if "instance_id" not in node:
            facts |= {"provider_id": node["provider_id"]} if "provider_id" in node else {}
            return {"Type": "Other", "Id": name, "Details": {"Other": facts}} | place
        arn = f"arn:aws:ec2:{place['Region']}:{ACCOUNT}:instance/{node['instance_id']}"
        details = {"AwsEc2Instance": {"Type": node["instance_type"]}, "Other": facts}
        return {"Type": "AwsEc2Instance", "Id": arn, "Details": details} | place


def cluster_resource() -> Object:
    arn = f"arn:aws:eks:{REGION}:{ACCOUNT}:cluster/{CLUSTER}"
    details = {"AwsEksCluster": {"Name": CLUSTER, "Arn": arn}}
    return {"Type": "AwsEksCluster", "Id": arn, "Details": details, "Region": REGION, "Partition": "aws"}


def container_resource(kubernetes: Mapping[str, Any]) -> Object:
    """``Container`` of a pod that was found with its container: ``kubernetes`` is what CloudWatch has."""
    typed = {
        "Name": kubernetes["container"],
        "ImageName": kubernetes["image"],
        "ImageId": kubernetes["image_id"].rpartition("@")[2],
        "LaunchedAt": kubernetes.get("container_started"),
        "Privileged": kubernetes.get("privileged"),
    }
    details = {
        "Container": {key: value for key, value in typed.items() if value is not None},
        "Other": pod_facts(kubernetes),
    }
    place = {"Region": REGION, "Partition": "aws"}
    return {"Type": "Container", "Id": kubernetes["container_id"], "Details": details} | place


def pod_resource(kubernetes: Mapping[str, Any]) -> Object:
    """``Other`` for a pod whose container is not known, or for the namespace of an audit alert."""
    namespace = kubernetes["namespace"]
    identity = f"pod/{namespace}/{kubernetes['pod']}" if "pod" in kubernetes else f"namespace/{namespace}"
    place = {"Region": REGION, "Partition": "aws"}
    return {"Type": "Other", "Id": identity, "Details": {"Other": pod_facts(kubernetes)}} | place


def pod_facts(kubernetes: Mapping[str, Any]) -> dict[str, str]:
    names = ("pod", "namespace", "pod_uid", "service_account", "pod_ip", "node", "user")
    facts = {name: str(kubernetes[name]) for name in names if name in kubernetes}
    if "workload" in kubernetes:
        facts["workload"] = f"{kubernetes['workload']['kind']}/{kubernetes['workload']['name']}"
    return facts | {f"label/{key}": value for key, value in kept(kubernetes.get("labels", {})).items()}
