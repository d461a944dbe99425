"""Objects as a cluster has them, for a real API server: what it validates is there, and what enrichment looks at."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

STARTED = "2026-11-20T08:15:31Z"


def digits(seed: str) -> str:
    """A container id: 64 hexadecimal digits."""
    return hashlib.sha256(seed.encode()).hexdigest()


def owned_by(kind: str, name: str, uid: str) -> dict[str, Any]:
    """``metadata`` of what a controller made."""
    group = {"Job": "batch/v1", "CronJob": "batch/v1"}.get(kind, "apps/v1")
    return {
        "ownerReferences": [{"apiVersion": group, "kind": kind, "name": name, "uid": uid, "controller": True}]
    }


def container_status(
    name: str, container_id: str, *, previous_id: str = "", started: str = STARTED
) -> dict[str, Any]:
    """A running container; with ``previous_id`` it was restarted."""
    status: dict[str, Any] = {
        "name": name,
        "image": f"registry.example.com/{name}:1.4.2",
        "imageID": f"registry.example.com/{name}@sha256:{digits(name)}",
        "containerID": f"containerd://{container_id}",
        "ready": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": started}},
    }
    if previous_id:
        terminated = {
            "exitCode": 137,
            "reason": "OOMKilled",
            "startedAt": STARTED,
            "finishedAt": started,
            "containerID": f"containerd://{previous_id}",
        }
        status |= {"restartCount": 1, "lastState": {"terminated": terminated}}
    return status


def pod(
    name: str,
    *,
    node: str = "",
    ip: str = "",
    ids: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    owner: Mapping[str, Any] | None = None,
    service_account: str = "default",
    host_network: bool = False,
    privileged: bool | None = None,
) -> dict[str, Any]:
    """A pod whose containers have these ``ids``, by name; without an id or an address it has no status."""
    containers = dict(ids or {"app": ""})
    spec: dict[str, Any] = {
        "serviceAccountName": service_account,
        "terminationGracePeriodSeconds": 30,
        "containers": [
            {
                "name": container,
                "image": f"registry.example.com/{container}:1.4.2",
                "env": [{"name": "NAME", "value": '"},{"metadata":{"name":"no"}},{"kind":"Pod"'}],
                **({} if privileged is None else {"securityContext": {"privileged": privileged}}),
            }
            for container in containers
        ],
    }
    spec |= {"nodeName": node} if node else {}
    spec |= {"hostNetwork": True} if host_network else {}
    made: dict[str, Any] = {"metadata": {"name": name, "labels": dict(labels or {})} | dict(owner or {})}
    made["spec"] = spec
    if ip or any(containers.values()):
        made["status"] = running(ip, containers)
    return made


def running(ip: str, ids: Mapping[str, str], *, previous: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``status`` of a running pod."""
    statuses = [
        container_status(name, identity, previous_id=(previous or {}).get(name, ""))
        for name, identity in ids.items()
        if identity
    ]
    status: dict[str, Any] = {"phase": "Running", "containerStatuses": statuses}
    return status | ({"podIP": ip, "podIPs": [{"ip": ip}]} if ip else {})


def node(
    name: str,
    provider_id: str = "",
    *,
    addresses: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A node: its addresses are internal ones."""
    spec = {"providerID": provider_id} if provider_id else {}
    told = [{"type": "InternalIP", "address": address} for address in addresses]
    told.append({"type": "Hostname", "address": name})
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name} | dict(labels or {})},
        "spec": spec,
        "status": {"addresses": told},
    }


def ec2_labels(zone: str = "eu-west-1a", instance_type: str = "m6i.large") -> dict[str, str]:
    return {
        "eks.amazonaws.com/nodegroup": "workers",
        "node.kubernetes.io/instance-type": instance_type,
        "topology.kubernetes.io/region": zone[:-1],
        "topology.kubernetes.io/zone": zone,
    }


def template(name: str, restart: str = "Always") -> dict[str, Any]:
    """``spec`` of a controller's pods."""
    container = {"name": "app", "image": "registry.example.com/app:1.4.2"}
    return {
        "metadata": {"labels": {"app": name}},
        "spec": {"containers": [container], "restartPolicy": restart},
    }


def workload(
    name: str, *, owner: Mapping[str, Any] | None = None, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A Deployment, ReplicaSet, StatefulSet or DaemonSet, whatever the path says."""
    return {
        "metadata": {"name": name, "labels": dict(labels or {})} | dict(owner or {}),
        "spec": {"selector": {"matchLabels": {"app": name}}, "template": template(name)},
    }


def job(name: str, *, owner: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"metadata": {"name": name} | dict(owner or {}), "spec": {"template": template(name, "Never")}}


def cron_job(name: str) -> dict[str, Any]:
    spec = {"schedule": "0 3 * * *", "jobTemplate": {"spec": {"template": template(name, "Never")}}}
    return {"metadata": {"name": name}, "spec": spec}
