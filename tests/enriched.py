"""What enrichment must say of an alert, worked out from the API's own objects and not from our code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

RULE = "Terminal shell in container"


def alert(fields: Mapping[str, Any], **members: Any) -> bytes:
    """A Falco alert with these output fields; members may replace the usual ones."""
    body = {
        "hostname": "ip-10-0-1-17.eu-west-1.compute.internal",
        "output": f"Something happened ({json.dumps(fields)})",
        "output_fields": dict(fields),
        "priority": "Warning",
        "rule": RULE,
        "source": "syscall",
        "tags": ["container", "shell", "mitre_execution"],
        "time": "2026-11-21T03:00:00.123456789Z",
    }
    return json.dumps({key: value for key, value in (body | members).items() if value is not None}).encode()


def kubernetes_of(
    pod: Mapping[str, Any],
    *,
    container: str | None = "app",
    workload: tuple[str, str],
    resolved_by: str,
    namespace_labels: Mapping[str, str] | None = None,
    stale: bool = False,
) -> dict[str, Any]:
    """``kubernetes`` of an alert about this pod (an object of the API)."""
    meta, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    expected: dict[str, Any] = {"namespace": meta["namespace"], "pod": meta["name"], "pod_uid": meta["uid"]}
    if container is not None:
        told = next(item for item in spec["containers"] if item["name"] == container)
        seen: Any = next(
            (item for item in status.get("containerStatuses", ()) if item["name"] == container), {}
        )
        expected |= {"container": container, "image": told["image"]}
        if seen:
            expected["container_id"] = seen["containerID"].split("://")[1]
            expected["image_id"] = seen["imageID"]
            started = seen.get("state", {}).get("running", {}).get("startedAt")
            expected |= {"container_started": started} if started else {}
        if "privileged" in told.get("securityContext", {}):
            expected["privileged"] = told["securityContext"]["privileged"]
    labels = kept(meta.get("labels", {}))
    expected |= {
        "workload": {"kind": workload[0], "name": workload[1]},
        "service_account": spec["serviceAccountName"],
        "resolved_by": resolved_by,
        "stale": stale,
    }
    expected |= {"pod_ip": status["podIP"]} if status.get("podIP") else {}
    expected |= {"node": spec["nodeName"]} if spec.get("nodeName") else {}
    expected |= {"labels": labels} if labels else {}
    names = kept(namespace_labels or {})
    return expected | ({"namespace_labels": names} if names else {})


def kept(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels that the default allow-list keeps."""
    return {
        key: value
        for key, value in labels.items()
        if key in {"app", "team"} or key.startswith("app.kubernetes.io/")
    }


def node_of(node: Mapping[str, Any]) -> dict[str, str]:
    """``node`` of an alert on this node (an object of the API) with an EC2 provider id."""
    labels = node["metadata"]["labels"]
    expected = {
        "name": node["metadata"]["name"],
        "instance_id": node["spec"]["providerID"].rpartition("/")[2],
        "instance_type": labels.get("node.kubernetes.io/instance-type"),
        "zone": labels.get("topology.kubernetes.io/zone"),
        "region": labels.get("topology.kubernetes.io/region"),
        "provider_id": node["spec"]["providerID"],
        "nodegroup": labels.get("eks.amazonaws.com/nodegroup"),
        "compute_type": labels.get("eks.amazonaws.com/compute-type"),
    }
    return {key: value for key, value in expected.items() if value}


def resource(finding: Mapping[str, Any], kind: str) -> Any:
    """The resource of this type; fails where there is none."""
    (found,) = [item for item in finding["Resources"] if item["Type"] == kind]
    return found
