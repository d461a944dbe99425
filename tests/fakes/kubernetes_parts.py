"""The inner parts of a realistic pod: containers, environment, volumes, and who manages which field."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

REGISTRY: Final = "111122223333.dkr.ecr.eu-west-1.amazonaws.com"


def hex64(seed: str) -> str:
    """64 hex digits that are always the same for a seed, as in container ids and digests."""
    return hashlib.sha256(seed.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Container:
    """A container of a pod; what is empty is made up from its name, `waiting` has no ids yet."""

    name: str = "app"
    image: str = ""
    container_id: str = ""
    image_id: str = ""
    started_at: str = "2026-11-20T08:15:34Z"
    privileged: bool = False
    waiting: bool = False
    restarts: int = 0


def _managed(manager: str, when: str, fields: dict[str, Any], subresource: str = "") -> dict[str, Any]:
    entry: dict[str, Any] = {
        "manager": manager,
        "operation": "Update",
        "apiVersion": "v1",
        "time": when,
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
    }
    return entry | {"subresource": subresource} if subresource else entry


def _fields(names: str, inner: dict[str, Any] | None = None) -> dict[str, Any]:
    return {".": {}} | {f"f:{name}": inner or {} for name in names.split()}


def env(name: str, namespace: str) -> list[dict[str, Any]]:
    plain = {
        "AWS_REGION": "eu-west-1",
        "AWS_STS_REGIONAL_ENDPOINTS": "regional",
        "AWS_ROLE_ARN": f"arn:aws:iam::111122223333:role/{namespace}-{name}",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/eks.amazonaws.com/serviceaccount/token",
        "JAVA_TOOL_OPTIONS": "-XX:MaxRAMPercentage=75.0 -XX:+ExitOnOutOfMemoryError -Dfile.encoding=UTF-8",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel-collector.observability.svc.cluster.local:4317",
        "OTEL_RESOURCE_ATTRIBUTES": f"service.name={name},service.namespace={namespace},deployment.environment=prod",
        "DATABASE_URL": f"postgres://{name}@{name}-db.{namespace}.svc.cluster.local:5432/{name}?sslmode=require",
        "LOG_LEVEL": "info",
    }
    found: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in plain.items()]
    for key, path in (
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("NODE_NAME", "spec.nodeName"),
        ("POD_IP", "status.podIP"),
    ):
        found.append({"name": key, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}})
    secret = {"secretKeyRef": {"name": f"{name}-credentials", "key": "password"}}
    return [*found, {"name": "DATABASE_PASSWORD", "valueFrom": secret}]


def container_spec(container: Container, image: str, env: list[dict[str, Any]]) -> dict[str, Any]:
    def probe(path: str, delay: int) -> dict[str, Any]:
        return {
            "httpGet": {"path": path, "port": "http", "scheme": "HTTP"},
            "initialDelaySeconds": delay,
            "timeoutSeconds": 5,
            "periodSeconds": 10,
            "successThreshold": 1,
            "failureThreshold": 6,
        }

    security: dict[str, Any] = {
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    return {
        "name": container.name,
        "image": image,
        "args": ["--config=/etc/app/config.yaml", "--log-format=json", "--listen=:8080"],
        "ports": [
            {"name": "http", "containerPort": 8080, "protocol": "TCP"},
            {"name": "metrics", "containerPort": 9090, "protocol": "TCP"},
        ],
        "env": env,
        "resources": {"limits": {"memory": "512Mi"}, "requests": {"cpu": "100m", "memory": "256Mi"}},
        "volumeMounts": [
            {"name": "config", "readOnly": True, "mountPath": "/etc/app"},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a path in a container
            {
                "name": "kube-api-access-x7k2p",
                "readOnly": True,
                "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
            },
            {
                "name": "aws-iam-token",
                "readOnly": True,
                "mountPath": "/var/run/secrets/eks.amazonaws.com/serviceaccount",
            },
        ],
        "livenessProbe": probe("/livez", 10),
        "readinessProbe": probe("/readyz", 5),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "imagePullPolicy": "IfNotPresent",
        "securityContext": {"privileged": True} if container.privileged else security,
    }


def container_status(container: Container, image: str, seed: str) -> dict[str, Any]:
    status: dict[str, Any] = {"name": container.name}
    if container.waiting:
        return status | {
            "state": {"waiting": {"reason": "ContainerCreating"}},
            "lastState": {},
            "ready": False,
            "restartCount": container.restarts,
            "image": image,
            "imageID": "",
            "started": False,
        }
    repository = image.partition("@")[0].rpartition(":")[0] or image
    return status | {
        "state": {"running": {"startedAt": container.started_at}},
        "lastState": {},
        "ready": True,
        "restartCount": container.restarts,
        "image": image,
        "imageID": container.image_id or f"{repository}@sha256:{hex64(image)}",
        "containerID": container.container_id or f"containerd://{hex64(f'{seed}/{container.name}')}",
        "started": True,
    }


def volumes(name: str) -> list[dict[str, Any]]:
    return [
        {
            "name": "aws-iam-token",
            "projected": {
                "sources": [
                    {
                        "serviceAccountToken": {
                            "audience": "sts.amazonaws.com",
                            "expirationSeconds": 86400,
                            "path": "token",
                        }
                    }
                ],
                "defaultMode": 420,
            },
        },
        {"name": "config", "configMap": {"name": f"{name}-config", "defaultMode": 420}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
        {
            "name": "kube-api-access-x7k2p",
            "projected": {
                "sources": [
                    {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                    {
                        "configMap": {
                            "name": "kube-root-ca.crt",
                            "items": [{"key": "ca.crt", "path": "ca.crt"}],
                        }
                    },
                    {
                        "downwardAPI": {
                            "items": [
                                {
                                    "path": "namespace",
                                    "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"},
                                }
                            ]
                        }
                    },
                ],
                "defaultMode": 420,
            },
        },
    ]


def managed_by(containers: list[Container], created: str) -> list[dict[str, Any]]:
    spec_fields = "name image args imagePullPolicy terminationMessagePath terminationMessagePolicy resources"
    inner = _fields(spec_fields) | {
        "f:env": {f'k:{{"name":"{item["name"]}"}}': _fields("name value") for item in env("app", "default")},
        "f:ports": {
            f'k:{{"containerPort":{port},"protocol":"TCP"}}': _fields("containerPort name protocol")
            for port in (8080, 9090)
        },
        "f:livenessProbe": _fields(
            "failureThreshold httpGet initialDelaySeconds periodSeconds timeoutSeconds"
        ),
        "f:readinessProbe": _fields(
            "failureThreshold httpGet initialDelaySeconds periodSeconds timeoutSeconds"
        ),
        "f:securityContext": _fields(
            "allowPrivilegeEscalation capabilities privileged readOnlyRootFilesystem"
        ),
        "f:volumeMounts": {
            f'k:{{"mountPath":"{path}"}}': _fields("mountPath name readOnly")
            for path in ("/etc/app", "/tmp")  # noqa: S108 - a path in a container
        },
    }
    controller = {
        "f:metadata": {
            "f:annotations": _fields("checksum/config prometheus.io/port prometheus.io/scrape"),
            "f:generateName": {},
            "f:labels": _fields("app.kubernetes.io/name app.kubernetes.io/instance pod-template-hash"),
            "f:ownerReferences": _fields("uid"),
        },
        "f:spec": _fields(
            "affinity dnsPolicy enableServiceLinks restartPolicy schedulerName securityContext serviceAccount "
            "serviceAccountName terminationGracePeriodSeconds topologySpreadConstraints volumes"
        )
        | {"f:containers": {f'k:{{"name":"{item.name}"}}': inner for item in containers[:1]}},
    }
    conditions = {
        f'k:{{"type":"{kind}"}}': _fields("lastProbeTime lastTransitionTime observedGeneration status type")
        for kind in ("ContainersReady", "Initialized", "PodReadyToStartContainers", "Ready")
    }
    kubelet = {
        "f:status": {"f:conditions": conditions}
        | _fields("containerStatuses hostIP hostIPs phase podIP podIPs")
    }
    return [
        _managed("kube-controller-manager", created, controller),
        _managed("kubelet", created, kubelet, "status"),
    ]
