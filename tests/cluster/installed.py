"""What became of an installed chart: its pods, endpoints and claims; and what a cluster would have brought along."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import yaml

from tests.chart.schemas import CRDS, SOURCES, fetch
from tests.cluster.api import path_of
from tests.cluster.control_plane import ControlPlane, Object


class Pod(NamedTuple):
    """What tells one revision of a release from another."""

    version: str
    """Tag of the image."""
    pre_stop: int


def running(plane: ControlPlane, namespace: str, count: int) -> dict[str, Pod]:
    """Pods by uid, when all are ready: Helm does not wait for as many of a DaemonSet as may be unavailable."""
    plane.until(lambda: list(map(ready, plane.pods(namespace))) == [True] * count, f"{count} pods are ready")
    found = {}
    for pod in plane.pods(namespace):
        (container,) = pod["spec"]["containers"]
        version = container["image"].rpartition(":")[2]
        found[str(pod["metadata"]["uid"])] = Pod(
            version, container["lifecycle"]["preStop"]["sleep"]["seconds"]
        )
    return found


def ready(pod: Object) -> bool:
    return any(it["type"] == "Ready" and it["status"] == "True" for it in pod["status"].get("conditions", ()))


def endpoints(plane: ControlPlane, namespace: str, service: str) -> set[str]:
    """Addresses a Service sends to."""
    found = plane.admin.list(
        "endpointslices", namespace, labelSelector=f"kubernetes.io/service-name={service}"
    )
    return {
        str(address)
        for piece in found["items"]
        for it in piece["endpoints"] or ()
        if it["conditions"]["ready"]
        for address in it["addresses"]
    }


def disruptions_allowed(plane: ControlPlane, namespace: str, name: str) -> int:
    """-1 while the controller has not counted."""
    status = plane.admin.get("poddisruptionbudgets", name, namespace).get("status", {})
    return int(status.get("disruptionsAllowed", -1))


def evict(plane: ControlPlane, namespace: str, pod: str) -> int:
    """Status of an eviction, as `kubectl drain` asks for it."""
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
    return plane.admin.request("POST", path_of("pods", namespace, pod, "eviction"), body).status


@contextlib.contextmanager
def cordoned(plane: ControlPlane, nodes: list[str]) -> Iterator[None]:
    """No new pod goes to these nodes."""
    try:
        for name in nodes:
            plane.admin.patch("nodes", name, {"spec": {"unschedulable": True}})
        yield
    finally:
        for name in nodes:
            plane.admin.patch("nodes", name, {"spec": {"unschedulable": None}})


def claims(plane: ControlPlane, namespace: str) -> dict[str, tuple[str, str]]:
    """Uid and phase of every claim, by name."""
    found = plane.admin.list("persistentvolumeclaims", namespace)["items"]
    return {it["metadata"]["name"]: (it["metadata"]["uid"], it["status"]["phase"]) for it in found}


@contextlib.contextmanager
def volumes(plane: ControlPlane, storage_class: str, count: int, size: str) -> Iterator[None]:
    """Volumes of a class for claims to be bound to; there is nobody who would make them when asked."""
    wait = {"provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer"}
    spec = {
        "capacity": {"storage": size},
        "accessModes": ["ReadWriteOnce"],
        "persistentVolumeReclaimPolicy": "Retain",
        "storageClassName": storage_class,
        "hostPath": {"path": "/nowhere"},
    }
    with contextlib.ExitStack() as made:
        if storage_class:
            plane.admin.create("storageclasses", {"metadata": {"name": storage_class}} | wait)
            made.callback(plane.admin.delete, "storageclasses", storage_class)
        for name in (f"volume-{storage_class or 'plain'}-{number}" for number in range(count)):
            plane.admin.create("persistentvolumes", {"metadata": {"name": name}, "spec": spec})
            made.callback(plane.admin.delete, "persistentvolumes", name)
        yield


@contextlib.contextmanager
def foreign_kinds(plane: ControlPlane) -> Iterator[None]:
    """The CRDs of others (the Prometheus operator's, cert-manager's), their own files from the modules schemas.txt names."""
    crds = []
    for line in SOURCES.read_text().splitlines():
        what, _, module = line.partition(" ")
        if what in CRDS:
            folder, files = CRDS[what]
            source = fetch(*module.split())
            crds += [yaml.safe_load((source / folder / f"{it}.yaml").read_text()) for it in files]
    assert len(crds) == sum(len(files) for _, files in CRDS.values())
    paths = [
        f"/apis/{it['spec']['group']}/{version['name']}/{it['spec']['names']['plural']}"
        for it in crds
        for version in it["spec"]["versions"]
        if version["served"]
    ]

    def answers() -> set[int]:
        return {plane.admin.request("GET", path).status for path in paths}

    with contextlib.ExitStack() as made:
        made.callback(lambda: plane.until(lambda: answers() == {404}, "the CRDs are gone"))
        for crd in crds:
            plane.admin.create("customresourcedefinitions", crd)
            made.callback(
                plane.admin.call, "DELETE", path_of("customresourcedefinitions", "", crd["metadata"]["name"])
            )
        plane.until(lambda: answers() == {200}, "the CRDs are served")
        yield
