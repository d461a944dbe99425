"""Objects in the shapes a real cluster has, for the fake Kubernetes: a pod is about 12 KB of JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from uuid import NAMESPACE_URL, uuid5

from tests.fakes.kubernetes_parts import (
    REGISTRY,
    Container,
    container_spec,
    container_status,
    env,
    hex64,
    managed_by,
    volumes,
)

__all__ = ["Container", "Owner", "hex64", "job", "namespace", "node", "pod", "replicaset", "uid_of"]

_CREATED: Final = "2026-11-20T08:15:30Z"


def uid_of(seed: str) -> str:
    return str(uuid5(NAMESPACE_URL, seed))


@dataclass(frozen=True, slots=True)
class Owner:
    """The controller of an object."""

    kind: str
    name: str
    uid: str
    controller: bool = True

    def reference(self) -> dict[str, Any]:
        versions = {"Job": "batch/v1", "CronJob": "batch/v1", "Node": "v1", "ReplicationController": "v1"}
        return {
            "apiVersion": versions.get(self.kind, "apps/v1"),
            "kind": self.kind,
            "name": self.name,
            "uid": self.uid,
            "controller": self.controller,
            "blockOwnerDeletion": True,
        }


def _metadata(
    name: str,
    *,
    namespace: str = "",
    uid: str = "",
    created: str = _CREATED,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    owner: Owner | None = None,
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if namespace:
        metadata["namespace"] = namespace
    metadata["uid"] = uid or uid_of(f"{namespace}/{name}")
    metadata["creationTimestamp"] = created
    if labels:
        metadata["labels"] = labels
    if annotations:
        metadata["annotations"] = annotations
    if owner is not None:
        metadata["ownerReferences"] = [owner.reference()]
    return metadata


def pod(
    name: str,
    namespace: str = "default",
    *,
    node: str = "ip-10-0-1-17.eu-west-1.compute.internal",
    ip: str = "10.0.1.42",
    containers: list[Container] | None = None,
    owner: Owner | None = None,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    service_account: str = "default",
    uid: str = "",
    created: str = _CREATED,
    phase: str = "Running",
    host_network: bool = False,
) -> dict[str, Any]:
    """A pod; without `node` it is not scheduled yet and has neither IP nor containers' ids."""
    chosen = containers if containers is not None else [Container()]
    seed = uid or uid_of(f"{namespace}/{name}")
    app = (owner.name.rpartition("-")[0] or owner.name) if owner else name
    images = [item.image or f"{REGISTRY}/{app}/{item.name}:1.4.2" for item in chosen]
    metadata = _metadata(
        name,
        namespace=namespace,
        uid=seed,
        created=created,
        labels=labels
        if labels is not None
        else {"app.kubernetes.io/name": app, "app.kubernetes.io/instance": app},
        annotations=annotations
        if annotations is not None
        else {
            "checksum/config": hex64(app),
            "kubectl.kubernetes.io/restartedAt": "2026-11-20T08:15:00Z",
            "prometheus.io/port": "9090",
            "prometheus.io/scrape": "true",
        },
        owner=owner,
    )
    if owner is not None:
        metadata["generateName"] = f"{owner.name}-"
    metadata["managedFields"] = managed_by(chosen, created)
    spec: dict[str, Any] = {
        "volumes": volumes(app),
        "containers": [
            container_spec(item, image, env(app, namespace))
            for item, image in zip(chosen, images, strict=True)
        ],
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "serviceAccountName": service_account,
        "serviceAccount": service_account,
    }
    spec |= {"nodeName": node} if node else {}
    spec |= {"hostNetwork": True} if host_network else {}
    spec |= {
        "securityContext": {"runAsUser": 65532, "runAsNonRoot": True, "fsGroup": 65532},
        "schedulerName": "default-scheduler",
        "tolerations": [
            {
                "key": f"node.kubernetes.io/{taint}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": 300,
            }
            for taint in ("not-ready", "unreachable")
        ],
        "priority": 0,
        "enableServiceLinks": True,
        "preemptionPolicy": "PreemptLowerPriority",
    }
    status: dict[str, Any] = {"phase": phase if node else "Pending"}
    ready = "True" if node and not any(item.waiting for item in chosen) else "False"
    kinds = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
    status["conditions"] = [
        {
            "type": kind,
            "status": ready if kind in ("Ready", "ContainersReady") else "True" if node else "False",
            "lastProbeTime": None,
            "lastTransitionTime": created,
        }
        for kind in kinds
    ]
    if node:
        status |= {"hostIP": "10.0.1.17", "hostIPs": [{"ip": "10.0.1.17"}]}
        if ip:
            status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
        status["startTime"] = created
        status["containerStatuses"] = [
            container_status(item, image, seed) for item, image in zip(chosen, images, strict=True)
        ]
    status["qosClass"] = "Burstable"
    return {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": spec, "status": status}


def node(
    name: str = "ip-10-0-1-17.eu-west-1.compute.internal",
    *,
    provider_id: str = "aws:///eu-west-1a/i-0123456789abcdef0",
    labels: dict[str, str] | None = None,
    internal_ip: str = "10.0.1.17",
    addresses: list[dict[str, str]] | None = None,
    uid: str = "",
    created: str = _CREATED,
) -> dict[str, Any]:
    """A node; a `provider_id` of "" is one the cloud controller has not seen yet."""
    usual = {
        "beta.kubernetes.io/arch": "amd64",
        "eks.amazonaws.com/nodegroup": "workers",
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": "m6i.large",
        "topology.kubernetes.io/region": "eu-west-1",
        "topology.kubernetes.io/zone": "eu-west-1a",
    }
    default_addresses = [
        {"type": "InternalIP", "address": internal_ip},
        {"type": "InternalDNS", "address": name},
        {"type": "Hostname", "address": name},
    ]
    capacity = {"cpu": "2", "ephemeral-storage": "20959212Ki", "memory": "7934412Ki", "pods": "29"}
    info = {
        "machineID": hex64(name)[:32],
        "systemUUID": uid_of(name),
        "bootID": uid_of(f"boot/{name}"),
        "kernelVersion": "6.12.40-63.114.amzn2023.x86_64",
        "osImage": "Amazon Linux 2023.9.20260105",
        "containerRuntimeVersion": "containerd://2.1.4",
        "kubeletVersion": "v1.34.1-eks-113cf36",
        "kubeProxyVersion": "",
        "operatingSystem": "linux",
        "architecture": "amd64",
    }
    images = [
        {"names": [f"{REGISTRY}/app-{index}@sha256:{hex64(str(index))}"], "sizeBytes": 81_000_000 + index}
        for index in range(20)
    ]
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": _metadata(name, uid=uid, created=created, labels=labels if labels is not None else usual),
        "spec": {"providerID": provider_id} if provider_id else {},
        "status": {
            "capacity": capacity,
            "allocatable": capacity | {"cpu": "1930m", "memory": "7244236Ki"},
            "conditions": [
                {
                    "type": "Ready",
                    "status": "True",
                    "lastHeartbeatTime": created,
                    "lastTransitionTime": created,
                    "reason": "KubeletReady",
                    "message": "kubelet is posting ready status",
                }
            ],
            "addresses": addresses if addresses is not None else default_addresses,
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "nodeInfo": info,
            "images": images,
        },
    }


def namespace(
    name: str = "default", *, labels: dict[str, str] | None = None, uid: str = "", created: str = _CREATED
) -> dict[str, Any]:
    return {
        "kind": "Namespace",
        "apiVersion": "v1",
        "metadata": _metadata(
            name, uid=uid, created=created, labels={"kubernetes.io/metadata.name": name} | (labels or {})
        ),
        "spec": {"finalizers": ["kubernetes"]},
        "status": {"phase": "Active"},
    }


def _template(labels: dict[str, str], restart: str) -> dict[str, Any]:
    app = Container()
    spec = {
        "containers": [container_spec(app, f"{REGISTRY}/app:1.4.2", [])],
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "securityContext": {},
        "schedulerName": "default-scheduler",
    }
    return {"metadata": {"creationTimestamp": None, "labels": labels}, "spec": spec}


def replicaset(
    name: str,
    namespace: str = "default",
    *,
    owner: Owner | None = None,
    labels: dict[str, str] | None = None,
    uid: str = "",
    created: str = _CREATED,
) -> dict[str, Any]:
    app, _, template_hash = name.rpartition("-")
    marks = {"app.kubernetes.io/name": app or name, "pod-template-hash": template_hash} | (labels or {})
    return {
        "kind": "ReplicaSet",
        "apiVersion": "apps/v1",
        "metadata": _metadata(
            name,
            namespace=namespace,
            uid=uid,
            created=created,
            labels=marks,
            annotations={
                "deployment.kubernetes.io/desired-replicas": "2",
                "deployment.kubernetes.io/revision": "7",
            },
            owner=owner,
        ),
        "spec": {"replicas": 2, "selector": {"matchLabels": marks}, "template": _template(marks, "Always")},
        "status": {
            "replicas": 2,
            "fullyLabeledReplicas": 2,
            "readyReplicas": 2,
            "availableReplicas": 2,
            "observedGeneration": 1,
        },
    }


def job(
    name: str,
    namespace: str = "default",
    *,
    owner: Owner | None = None,
    labels: dict[str, str] | None = None,
    uid: str = "",
    created: str = _CREATED,
) -> dict[str, Any]:
    chosen = uid or uid_of(f"{namespace}/{name}")
    marks = {"batch.kubernetes.io/controller-uid": chosen, "batch.kubernetes.io/job-name": name} | (
        labels or {}
    )
    return {
        "kind": "Job",
        "apiVersion": "batch/v1",
        "metadata": _metadata(
            name, namespace=namespace, uid=chosen, created=created, labels=marks, owner=owner
        ),
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": 6,
            "selector": {"matchLabels": {"batch.kubernetes.io/controller-uid": chosen}},
            "template": _template(marks, "Never"),
            "completionMode": "NonIndexed",
            "suspend": False,
        },
        "status": {"startTime": created, "active": 1, "ready": 1},
    }
