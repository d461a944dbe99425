"""The Kubernetes API's JSON, as far as it is looked at: the typed decoder skips everything that is not named here. Pure."""

from __future__ import annotations

import msgspec
from msgspec import Struct


class Owner(Struct, frozen=True, gc=False):
    """One of ``ownerReferences``."""

    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool | None = None


class Metadata(Struct, frozen=True, gc=False, rename="camel"):
    """``metadata`` of any object."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None
    labels: dict[str, str] | None = None
    owner_references: list[Owner] | None = None


class SecurityContext(Struct, frozen=True, gc=False):
    """Of a container."""

    privileged: bool | None = None


class ContainerSpec(Struct, frozen=True, gc=False, rename="camel"):
    """A container in a pod's specification."""

    name: str = ""
    image: str = ""
    security_context: SecurityContext | None = None


class Running(Struct, frozen=True, gc=False, rename="camel"):
    """What a container does or did."""

    started_at: str | None = None
    container_id: str | None = msgspec.field(name="containerID", default=None)


class State(Struct, frozen=True, gc=False):
    """Of a container."""

    running: Running | None = None
    terminated: Running | None = None


class ContainerStatus(Struct, frozen=True, gc=False, rename="camel"):
    """A container in a pod's status."""

    name: str = ""
    container_id: str = msgspec.field(name="containerID", default="")
    image_id: str = msgspec.field(name="imageID", default="")
    state: State | None = None
    last_state: State | None = None


class PodSpec(Struct, frozen=True, gc=False, rename="camel"):
    """``spec`` of a pod."""

    node_name: str = ""
    service_account_name: str = ""
    host_network: bool = False
    containers: list[ContainerSpec] | None = None
    init_containers: list[ContainerSpec] | None = None
    ephemeral_containers: list[ContainerSpec] | None = None


class PodStatus(Struct, frozen=True, gc=False, rename="camel"):
    """``status`` of a pod."""

    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    container_statuses: list[ContainerStatus] | None = None
    init_container_statuses: list[ContainerStatus] | None = None
    ephemeral_container_statuses: list[ContainerStatus] | None = None


class Pod(Struct, frozen=True, gc=False):
    """A pod."""

    metadata: Metadata
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class NodeSpec(Struct, frozen=True, gc=False):
    """``spec`` of a node."""

    provider_id: str = msgspec.field(name="providerID", default="")


class Address(Struct, frozen=True, gc=False):
    """One of a node's addresses."""

    type: str = ""
    address: str = ""


class NodeStatus(Struct, frozen=True, gc=False):
    """``status`` of a node."""

    addresses: list[Address] | None = None


class Node(Struct, frozen=True, gc=False):
    """A node."""

    metadata: Metadata
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class Object(Struct, frozen=True, gc=False):
    """Any object, of which only the metadata is looked at."""

    metadata: Metadata
