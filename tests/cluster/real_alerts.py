"""Pods and nodes for the real alerts of the demo, and what must come of each alert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.cluster.forwarding import Case
from tests.cluster.objects import digits, ec2_labels, owned_by
from tests.cluster.scene import EC2, FARGATE, HYBRID, LOCAL, NAMESPACE_LABELS, Scene
from tests.enriched import kubernetes_of
from tests.samples import REAL_ALERTS

ON_NODES = {None, "syscall", "internal"}
"""Sources whose alerts happened where Falco runs."""
REAL_PODS = {
    "5892b41bcf46": ("alpine", "default", LOCAL),
    "281c99ea33c2": ("poolmgr-go-default-516098-5bdbf8c8f5-g8gvc", "fission-function", EC2),
    "ee97d9c4186f": ("kubecon", "default", FARGATE),
    "27e4b583e28a": ("lab9-target", "", EC2),
    "d7e667dd5b42": ("without-a-name", "", HYBRID),
    "998306071edc": ("nginx-of-romanenko", "", EC2),
    "ee90b4bfa6d7": ("storage-provisioner", "kube-system", "minikube"),
    "6c9b72f1c563": ("falco-8lvvb", "falco", EC2),
    "5dea0c14015a": ("falco-6htpw", "", LOCAL),
    "45dd76eff80f": ("nginx", "default", "k8-worker-1"),
    "4a2771303b70": ("of-a-vm", "", HYBRID),
    "3ad7b26ded6d": ("payments-api", "", EC2),
}
"""Pods of some of the real alerts: container id, name, namespace (the test's where it has none), node."""
HOSTS = {
    "falco-xczjd": EC2,
    "falco-vf54x": HYBRID,
    "96f3c8ebb841": FARGATE,
    "minikube": "minikube",
    "k8-worker-1": "k8-worker-1",
}
"""Falco's hostnames in real alerts that can be found: Falco's pods, its container, nodes. All others: the peer."""


def populate(scene: Scene) -> None:
    """Nodes and pods of the real alerts; an owner nobody knows is the workload itself."""
    scene.node("minikube", "", ["192.168.49.2"])
    scene.node("k8-worker-1", "aws:///eu-west-1c/i-0000000000000beef", ["10.0.7.7"], ec2_labels("eu-west-1c"))
    falco = owned_by("DaemonSet", "falco", "00000000-0000-0000-0000-00000000000d")
    scene.pod("falco-vf54x", HYBRID, falco, ("DaemonSet", "falco"))
    scene.pod(
        "falco-of-lab9",
        FARGATE,
        falco,
        ("DaemonSet", "falco"),
        ids={"falco": "96f3c8ebb841" + digits("falco")[12:]},
    )
    unknown = owned_by("ReplicaSet", "gone", "00000000-0000-0000-0000-000000000000")
    whole = {str((told.get("output_fields") or {}).get("container.id")) for told in REAL_ALERTS}
    for identity, (name, place, node) in REAL_PODS.items():
        full = next((found for found in whole if len(found) == 64 and found.startswith(identity)), "")
        ids = {"first": digits(name), "app": full or identity + digits(name)[12:]}
        if place:
            scene.other_namespace(place)
        scene.pod(name, node, unknown, ("ReplicaSet", "gone"), namespace=place, ids=ids)


def expected_of(scene: Scene, told: Mapping[str, Any]) -> Case:
    """What must come of a real alert."""
    fields, source = told.get("output_fields") or {}, told.get("source")
    if source == "k8s_audit":
        said = {"namespace": fields.get("ka.target.namespace"), "user": fields.get("ka.user.name")}
        return Case(fields, {key: value for key, value in said.items() if value} or None)
    if source not in ON_NODES:
        return Case(fields)
    found = REAL_PODS.get(str(fields.get("container.id"))[:12])
    if found is not None:
        pod = scene.pods[found[0]]
        is_ours = pod["metadata"]["namespace"] == scene.namespace
        member = kubernetes_of(
            pod,
            workload=scene.workloads[found[0]],
            resolved_by="container_id",
            namespace_labels=NAMESPACE_LABELS if is_ours else {},
        )
        return Case(fields, member, found[2])
    said = {"namespace": fields.get("k8s.ns.name"), "pod": fields.get("k8s.pod.name")}
    said = {key: value for key, value in said.items() if value}
    return Case(fields, said or None, HOSTS.get(str(told.get("hostname")), LOCAL))
