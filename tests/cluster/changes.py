"""Things that happen to objects of a test cluster, one by one, all kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.cluster import objects
from tests.cluster.api import Api, path_of
from tests.cluster.harness import Cluster
from tests.cluster.objects import digits, owned_by

NAMED = 6
"""Pods that ``populate`` makes."""
BACKGROUND = {"gracePeriodSeconds": 0, "propagationPolicy": "Background"}
"""Deletes a Job at once: by default it stays until the garbage collector has orphaned its pods, and there is none."""


def populate(api: Api, namespace: str) -> None:
    """Something of every kind. What has no namespace is named after it."""
    api.create("nodes", objects.node(f"{namespace}-a", instance(1), addresses=["10.9.0.1", "10.9.0.3"]))
    api.create("nodes", objects.node(f"{namespace}-b", instance(2), addresses=["10.9.0.2"]))
    api.create("namespaces", {"metadata": {"name": f"{namespace}-more", "labels": {"team": "payments"}}})
    owner = owned_by("Deployment", "web", "d-1")
    controller = api.create("replicasets", objects.workload("web-1", owner=owner), namespace)
    for number in range(NAMED):
        _create_web(api, namespace, number, controller["metadata"]["uid"])
    api.create("jobs", objects.job("nightly-1", owner=owned_by("CronJob", "nightly", "c-1")), namespace)


def clear(cluster: Cluster, namespace: str) -> None:
    """Remove what is named after the namespace; the rest goes with it."""
    if not cluster.apiserver.running:
        cluster.start()
    for kind in ("nodes", "namespaces"):
        for item in cluster.admin.list(kind)["items"]:
            name = item["metadata"]["name"]
            if name.startswith(f"{namespace}-"):
                cluster.admin.delete("nodes", name) if kind == "nodes" else cluster.drop_namespace(name)
    cluster.admin.call("DELETE", path_of("jobs", namespace), BACKGROUND)


def instance(number: int) -> str:
    return f"aws:///eu-west-1a/i-{number:017x}"


def _create_web(api: Api, namespace: str, number: int, owner: str = "r-1", life: int = 0) -> None:
    seed = f"{namespace}/{number}/{life}"
    body = objects.pod(
        f"web-{number}",
        node=f"{namespace}-{'ab'[(number + life) % 2]}",
        ip=f"10.1.{life}.{number}",
        ids={"app": digits(seed), "side-car": digits(f"{seed}/side-car")},
        labels={"app": "web", "other": "no"},
        owner=owned_by("ReplicaSet", "web-1", owner),
    )
    api.create("pods", body, namespace)


# ---- pods ------------------------------------------------------------------------------------------------


def create_without_a_node(api: Api, namespace: str) -> None:
    api.create("pods", objects.pod("late", labels={"app": "late"}), namespace)


def bind_to_a_node(api: Api, namespace: str) -> None:
    target = {"kind": "Node", "name": f"{namespace}-a"}
    body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "late"}, "target": target}
    api.call("POST", path_of("pods", namespace, "late", "binding"), body)


def start_its_container(api: Api, namespace: str) -> None:
    _set_status(api, namespace, "late", objects.running("10.2.0.1", {"app": digits("late")}))


def give_it_another_address(api: Api, namespace: str) -> None:
    _set_status(api, namespace, "late", objects.running("10.2.0.2", {"app": digits("late")}))


def restart_its_container(api: Api, namespace: str) -> None:
    previous = {"app": digits("late")}
    status = objects.running("10.2.0.2", {"app": digits("late again")}, previous=previous)
    _set_status(api, namespace, "late", status)


def label(api: Api, namespace: str) -> None:
    api.patch("pods", "late", {"metadata": {"labels": {"team": "payments", "app": None}}}, namespace)


def finish(api: Api, namespace: str) -> None:
    _set_status(api, namespace, "late", {"phase": "Succeeded"})


def reuse_its_address(api: Api, namespace: str) -> None:
    body = objects.pod("heir", node=f"{namespace}-b", ip="10.2.0.2", ids={"app": digits("heir")})
    api.create("pods", body, namespace)


def run_on_the_hosts_network(api: Api, namespace: str) -> None:
    body = objects.pod(
        "agent", node=f"{namespace}-a", ip="10.9.0.1", ids={"app": digits("agent")}, host_network=True
    )
    api.create("pods", body, namespace)


def delete_with_grace(api: Api, namespace: str) -> None:
    api.delete("pods", "web-5", namespace, grace_secs=30)


def end_its_grace(api: Api, namespace: str) -> None:
    api.delete("pods", "web-5", namespace)


def recreate_pods_elsewhere(api: Api, namespace: str) -> None:
    """Under the same name, on the other node."""
    api.delete("pods", "web-0", namespace)
    _create_web(api, namespace, 0, life=1)


def _set_status(api: Api, namespace: str, name: str, status: dict[str, Any]) -> None:
    api.patch("pods", name, {"status": status}, namespace, "status")


# ---- the other kinds -------------------------------------------------------------------------------------


def change_a_node(api: Api, namespace: str) -> None:
    labels = objects.ec2_labels("eu-west-1b")
    api.patch("nodes", f"{namespace}-a", {"metadata": {"labels": labels}})


def take_an_address_from_a_node(api: Api, namespace: str) -> None:
    _set_addresses(api, f"{namespace}-a", "10.9.0.1")


def give_it_to_the_other(api: Api, namespace: str) -> None:
    _set_addresses(api, f"{namespace}-b", "10.9.0.2", "10.9.0.3")


def recreate_nodes(api: Api, namespace: str) -> None:
    """A new machine under the old name, with the old address."""
    api.delete("nodes", f"{namespace}-b")
    api.create("nodes", objects.node(f"{namespace}-b", instance(3), addresses=["10.9.0.2"]))


def _set_addresses(api: Api, name: str, *addresses: str) -> None:
    api.patch("nodes", name, {"status": objects.node(name, addresses=addresses)["status"]}, "", "status")


def label_a_namespace(api: Api, namespace: str) -> None:
    api.patch("namespaces", f"{namespace}-more", {"metadata": {"labels": {"team": "search", "app": "x"}}})


def recreate_namespaces(api: Api, namespace: str) -> None:
    name = f"{namespace}-more"
    api.delete("namespaces", name)
    body = {"metadata": {"name": name}, "spec": {"finalizers": []}}
    api.call("PUT", path_of("namespaces", "", name, "finalize"), body)
    api.create("namespaces", {"metadata": {"name": name, "labels": {"team": "third"}}})


def change_an_owner(api: Api, namespace: str) -> None:
    for kind, name in (("replicasets", "web-1"), ("jobs", "nightly-1")):
        api.patch(kind, name, {"metadata": owned_by("Rollout", "other", "o-1")}, namespace)


def recreate_replicasets(api: Api, namespace: str) -> None:
    api.delete("replicasets", "web-1", namespace)
    api.create("replicasets", objects.workload("web-1"), namespace)


def recreate_jobs(api: Api, namespace: str) -> None:
    api.call("DELETE", path_of("jobs", namespace, "nightly-1"), BACKGROUND)
    api.create("jobs", objects.job("nightly-1"), namespace)


STEPS: tuple[Callable[[Api, str], None], ...] = (
    create_without_a_node,
    bind_to_a_node,
    start_its_container,
    give_it_another_address,
    restart_its_container,
    label,
    finish,
    reuse_its_address,
    run_on_the_hosts_network,
    delete_with_grace,
    end_its_grace,
    recreate_pods_elsewhere,
    change_a_node,
    take_an_address_from_a_node,
    give_it_to_the_other,
    recreate_nodes,
    label_a_namespace,
    recreate_namespaces,
    change_an_owner,
    recreate_replicasets,
    recreate_jobs,
)


def unseen(api: Api, namespace: str) -> None:
    """What a mirror that was away must find out: new, changed, gone, and another one under the same name."""
    api.delete("pods", "web-1", namespace)
    api.delete("pods", "web-2", namespace)
    _create_web(api, namespace, 2, life=2)
    api.patch("pods", "web-3", {"metadata": {"labels": {"team": "unseen"}}}, namespace)
    create_without_a_node(api, namespace)
    for step in (change_a_node, recreate_nodes, recreate_namespaces, recreate_replicasets, recreate_jobs):
        step(api, namespace)
