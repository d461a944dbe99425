"""``Resources`` of a finding: the container, the host, the cluster. Pure.

What Falco did not say is absent; nothing is invented. Image names are ``repository:tag`` because a digest would not fit the 128
characters of ImageName; it goes to ImageId.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from forwarder.alert import encode as json_encode
from forwarder.asff_context import Context, check, cut
from forwarder.asff_schema import resources_faults

_PARTITIONS = frozenset({"aws", "aws-cn", "aws-us-gov", "aws-us-iso", "aws-us-iso-b"})
"""What ``Resources[].Partition`` knows; elsewhere the member is left out."""


class ContainerFields(NamedTuple):
    """What Falco says of a container, absent values empty, in the order of ``CONTAINER_NAMES``."""

    full_id: str
    short_id: str
    repository: str
    image: str
    tag: str
    digest: str
    image_id: str
    name: str
    privileged: str
    pod: str
    pod_by_plugin: str
    namespace: str
    namespace_by_plugin: str

    @property
    def identity(self) -> str:
        identity = self.full_id or self.short_id
        return "" if identity == "host" else identity


CONTAINER_NAMES = (
    "container.full_id",
    "container.id",
    "container.image.repository",
    "container.image",
    "container.image.tag",
    "container.image.digest",
    "container.image.id",
    "container.name",
    "container.privileged",
    "k8s.pod.name",
    "k8smeta.pod.name",
    "k8s.ns.name",
    "k8smeta.ns.name",
)


def resources(context: Context, hostname: str, source: str, container: ContainerFields) -> bytes:
    """``Resources``, encoded and checked: container, host, cluster."""
    found: list[dict[str, Any]] = []
    if container.identity:
        found.append(_container(container))
    if hostname:
        other = {"hostname": cut(hostname, 1023)}
        found.append({"Type": "Other", "Id": cut(hostname, 512), "Details": {"Other": other}})
    if context.cluster:
        arn = f"arn:{context.partition}:eks:{context.region}:{context.account}:cluster/{context.cluster}"
        details = {"AwsEksCluster": {"Name": context.cluster, "Arn": arn}}
        found.append({"Type": "AwsEksCluster", "Id": arn, "Details": details})
    if not found:
        found.append({"Type": "Other", "Id": cut(f"falco/{source}", 512)})
    for resource in found:
        resource["Region"] = context.region
        if context.partition in _PARTITIONS:
            resource["Partition"] = context.partition
    found[0]["ResourceRole"] = "Target"
    encoded = json_encode(found)
    check(resources_faults(encoded))
    return encoded


def _container(fields: ContainerFields) -> dict[str, Any]:
    repository = fields.repository or fields.image
    image = f"{repository}:{fields.tag}" if repository and fields.tag else repository
    typed: dict[str, Any] = {
        member: cut(value, 128)
        for member, value in (
            ("Name", fields.name),
            ("ImageName", image),
            ("ImageId", fields.digest or fields.image_id),
        )
        if value
    }
    if fields.privileged:
        typed["Privileged"] = fields.privileged == "true"
    other = {
        name: cut(value, 1023)
        for name, value in (
            ("pod", fields.pod or fields.pod_by_plugin),
            ("namespace", fields.namespace or fields.namespace_by_plugin),
        )
        if value
    }
    details = {name: part for name, part in (("Container", typed), ("Other", other)) if part}
    resource: dict[str, Any] = {"Type": "Container", "Id": cut(fields.identity, 512)}
    if details:
        resource["Details"] = details
    return resource
