"""What Falco says of a pod, and which pod that is: the steps of ``kubernetes.resolved_by``. Pure.

Whoever can post an alert writes these values, so what is too long to be one is none, and the surest comes first; Docker's name for a
container comes last, because whoever starts a container chooses it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from forwarder.enricher import Fields
from forwarder.kubernetes_cache import Pods, container_named, container_of
from forwarder.kubernetes_objects import ID_LENGTH_MAX, NAME_LENGTH_MAX, Container, Pod

DOCKER_PARTS, DOCKER_LENGTH_MAX = 6, 512
LABEL_LENGTH_MAX, IP_LENGTH_MAX = 63, 45
FALCO_IMAGES = frozenset({"falco", "falco-no-driver"})
ABSENT = "<NA>"
_NO_CONTAINER = frozenset({"host", ABSENT})
"""Falco's ``container.id`` outside of containers, and where it does not know."""


class Told(NamedTuple):
    """What Falco says of the pod, absent values empty."""

    uid: str
    namespace: str
    pod: str
    container: str
    container_id: str
    ip: str
    docker: tuple[str, str, str, str] | None
    """Container, pod, namespace and UID in Docker's name for a pod's container."""


def told_of(fields: Fields) -> Told:
    """Written out: this runs for every alert, and most values are absent. What is too long to be one is none."""
    uid = fields.pod_uid or fields.plugin_pod_uid
    namespace = fields.namespace or fields.plugin_namespace
    pod = fields.pod_name or fields.plugin_pod_name
    container = fields.container_name
    container_id = fields.container_full_id or fields.container_id
    ip = fields.pod_ip or fields.plugin_pod_ip
    docker = None
    if container and container.startswith("k8s_") and len(container) <= DOCKER_LENGTH_MAX:
        # k8s_<container>_<pod>_<namespace>_<uid>_<attempt>
        parts = container.split("_")
        if len(parts) == DOCKER_PARTS:
            container = parts[1]
            docker = (parts[1], parts[2], parts[3], parts[4])
    return Told(
        "" if uid is None or uid == ABSENT or len(uid) > ID_LENGTH_MAX else uid,
        "" if namespace is None or namespace == ABSENT or len(namespace) > LABEL_LENGTH_MAX else namespace,
        "" if pod is None or pod == ABSENT or len(pod) > NAME_LENGTH_MAX else pod,
        "" if container is None or container == ABSENT or len(container) > NAME_LENGTH_MAX else container,
        ""
        if container_id is None or container_id in _NO_CONTAINER or len(container_id) > ID_LENGTH_MAX
        else container_id,
        "" if ip is None or ip == ABSENT or len(ip) > IP_LENGTH_MAX else ip,
        docker,
    )


def find_pod(pods: Pods, told: Told, at: float) -> tuple[Pod | None, str]:
    """The pod, and the step that found it."""
    pod = pods.by_uid(told.uid) if told.uid else None
    if pod is not None:
        return pod, "pod_uid"
    if told.namespace and told.pod:
        pod = pods.by_place(told.namespace, told.pod, at)
        if pod is not None:
            return pod, "name"
    if told.container_id:
        pod = pods.by_container(told.container_id)
        if pod is not None:
            return pod, "container_id"
    if told.ip:
        pod = pods.by_address(told.ip, at)
        if pod is not None:
            return pod, "pod_ip"
    return _by_docker_name(pods, told, at)


def _by_docker_name(pods: Pods, told: Told, at: float) -> tuple[Pod | None, str]:
    if told.docker is None:
        return None, ""
    _, name, namespace, uid = told.docker
    pod = pods.by_uid(uid)
    if pod is not None:
        return pod, "pod_uid"
    pod = pods.by_place(namespace, name, at)
    return pod, "name" if pod is not None else ""


def container_told(pod: Pod, told: Told) -> tuple[Container | None, bool]:
    """The container the alert is about, as far as that is certain, and whether more of it may be known in a moment."""
    named = container_named(pod, told.container) if told.container else None
    if not told.container_id:
        return (pod.containers[0] if named is None and len(pod.containers) == 1 else named), True
    container = container_of(pod, told.container_id)
    if container is None:
        # Started a moment ago, or two restarts back: of that instance only the id is known, and Falco said it.
        return (
            named
            and msgspec.structs.replace(named, id=told.container_id, previous_id="", image_id="", started="")
        ), False
    if not container.id.startswith(told.container_id):
        # The instance before the restart: its start is not known.
        return msgspec.structs.replace(container, id=container.previous_id, started=""), True
    return container, True


def runs_falco(pod: Pod) -> bool:
    """A DaemonSet's pod (as Falco is installed), or one that runs Falco's image."""
    if pod.owner is not None and pod.owner.kind == "DaemonSet":
        return True
    images = [
        container.image.partition("@")[0].rpartition(":")[0] or container.image
        for container in pod.containers
    ]
    return any(image.rpartition("/")[2] in FALCO_IMAGES for image in images)
