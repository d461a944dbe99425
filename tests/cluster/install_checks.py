"""The chart on a real control plane: API server, etcd, controller-manager, scheduler, and Helm. Run by `make chart-install-test`.

Real: admission (Pod Security, ServiceAccount, validation), scheduling, StatefulSet and DaemonSet controllers, disruption budget,
EndpointSlices, volume binding, RBAC, garbage collection. Acted by kwok: that nodes are alive and that a scheduled pod is ready at
once; no container runs and no probe is asked. What happens to alerts meanwhile is tried in ``rolling_checks.py``.
Not named test_*, because `make test` has no control plane.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import permissions
from tests.cluster.api import path_of
from tests.cluster.control_plane import ControlPlane, Object
from tests.cluster.harness import REPOSITORY
from tests.cluster.installed import (
    Pod,
    claims,
    cordoned,
    disruptions_allowed,
    endpoints,
    evict,
    foreign_kinds,
    ready,
    running,
    volumes,
)
from tests.cluster.releases import (
    CHART,
    LOGS,
    PREVIOUS,
    PREVIOUS_PRE_STOP_SECS,
    RELEASE,
    Helm,
    contents,
    previous_chart,
)

NAME = f"{RELEASE}-falco-aws-forwarder"
CURRENT = Pod(
    str(yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]),
    int(yaml.safe_load((CHART / "values.yaml").read_text())["preStopSleepSeconds"]),
)
OLDER = Pod(PREVIOUS, PREVIOUS_PRE_STOP_SECS)
NODES = 3
MODES: dict[str, Object] = {
    "statefulset": {},
    "daemonset": {"mode": "daemonset", "daemonset": {"maxUnavailable": 3}},
}
QUICK = {"minReadySeconds": 1}
"""kwok's pods are ready at once: there is nothing to wait for."""
HOST_PATH: Object = {"mode": "daemonset", "daemonset": {"hostPath": {"enabled": True}}}


@pytest.fixture(scope="module", autouse=True)
def nodes(plane: ControlPlane) -> Iterator[list[str]]:
    with plane.nodes(NODES) as names:
        yield names


@pytest.fixture
def restricted(plane: ControlPlane) -> Iterator[str]:
    with plane.place("restricted") as name:
        yield name


@pytest.fixture
def helm(plane: ControlPlane, restricted: str, tmp_path: Path) -> Helm:
    return Helm(plane, restricted, tmp_path)


def test_two_replicas_under_restricted(
    plane: ControlPlane, nodes: list[str], restricted: str, helm: Helm
) -> None:
    """Admitted, on two nodes, ready, found by both Services, and guarded by the disruption budget."""
    told = helm.install({"config": LOGS})
    assert f"http://{NAME}.{restricted}.svc:2801/" in told, told
    assert f"helm test {RELEASE}" in told, told
    pods = plane.pods(restricted)
    assert [it["metadata"]["name"] for it in pods] == [f"{NAME}-0", f"{NAME}-1"]
    assert len({it["spec"]["nodeName"] for it in pods}) == 2, "both replicas on one node"
    assert all(ready(it) for it in pods)
    addresses = {it["status"]["podIP"] for it in pods}
    for service in (NAME, f"{NAME}-headless"):
        plane.until(
            lambda service=service: endpoints(plane, restricted, service) == addresses, f"{service} has both"
        )

    plane.until(lambda: disruptions_allowed(plane, restricted, NAME) == 1, "one disruption is allowed")
    with cordoned(plane, nodes):  # or the first one's successor could be there before the second is asked for
        answers = [evict(plane, restricted, it["metadata"]["name"]) for it in pods]
    assert answers == [201, 429], "the budget lets one go, and not the other"


@pytest.mark.parametrize("mode", MODES)
def test_from_install_to_uninstall(
    plane: ControlPlane, restricted: str, helm: Helm, tmp_path: Path, mode: str
) -> None:
    """Install the chart before this one (a copy: see ``previous_chart``), upgrade, roll back, uninstall: nothing stays."""
    before = contents(plane)
    values = MODES[mode] | QUICK | {"config": LOGS}
    count = NODES if mode == "daemonset" else 2
    helm.install(values, chart=previous_chart(tmp_path))
    old = running(plane, restricted, count)
    assert set(old.values()) == {OLDER}

    helm.upgrade(values)
    new = running(plane, restricted, count)
    assert set(new.values()) == {CURRENT}
    assert not new.keys() & old.keys(), "a pod was not replaced"

    helm.rollback()
    again = running(plane, restricted, count)
    assert set(again.values()) == {OLDER}
    assert not again.keys() & new.keys(), "a pod was not replaced"

    helm.uninstall()
    plane.until(lambda: contents(plane) <= before, lambda: f"all is gone: {contents(plane) - before}")


def test_a_change_of_rules_replaces_no_pod(plane: ControlPlane, restricted: str, helm: Helm) -> None:
    """Rules are reloaded by the running ones; any other change of the configuration replaces the pods."""
    helm.install(QUICK | {"config": LOGS})
    first = running(plane, restricted, 2)
    rules = [{"name": "quiet", "match": {"namespace": "x"}, "sinks": ["cloudwatch_logs"]}]
    helm.upgrade(QUICK | {"config": LOGS | {"rules": rules}})
    assert running(plane, restricted, 2).keys() == first.keys()
    assert "quiet" in plane.admin.get("configmaps", NAME, restricted)["data"]["forwarder.yaml"]
    helm.upgrade(QUICK | {"config": LOGS | {"rules": rules, "log": {"level": "debug"}}})
    assert not running(plane, restricted, 2).keys() & first.keys()


def test_claims_outlive_the_release(plane: ControlPlane, restricted: str, helm: Helm, tmp_path: Path) -> None:
    """Each replica gets a claim, which is bound and kept by an upgrade; uninstalled, only the claims stay, for the next release."""
    before = contents(plane)
    values = QUICK | {
        "config": LOGS,
        "persistence": {"enabled": True, "size": "2Gi", "storageClassName": restricted},
    }
    with volumes(plane, restricted, 2, "2Gi"):
        helm.install(values, chart=previous_chart(tmp_path))
        bound = claims(plane, restricted)
        assert set(bound) == {f"spool-{NAME}-0", f"spool-{NAME}-1"}
        assert all(phase == "Bound" for _, phase in bound.values()), bound
        helm.upgrade(values)
        assert set(running(plane, restricted, 2).values()) == {CURRENT}
        assert claims(plane, restricted) == bound
        helm.uninstall()
        left = {f"persistentvolumeclaims {restricted}/{name}" for name in bound}

        def stays() -> set[str]:
            return {
                it
                for it in contents(plane) - before
                if not it.startswith(("persistentvolumes ", "storageclasses "))
            }

        plane.until(lambda: stays() == left, lambda: f"only claims stay: {stays()}")
        helm.install(values)
        assert claims(plane, restricted) == bound
        helm.uninstall()


def test_a_directory_of_the_node_is_not_for_restricted(
    plane: ControlPlane, restricted: str, helm: Helm, tmp_path: Path
) -> None:
    """`restricted` refuses the pods of `daemonset.hostPath`, `privileged` takes them."""
    helm.install(HOST_PATH | QUICK | {"config": LOGS}, "--wait=false")

    def refusals() -> list[str]:
        events = plane.admin.list("events", restricted, fieldSelector="reason=FailedCreate")["items"]
        return [it["message"] for it in events if it["involvedObject"]["kind"] == "DaemonSet"]

    plane.until(refusals, "pods are refused")
    assert 'violates PodSecurity "restricted:latest"' in refusals()[0]
    assert 'volume "spool" uses restricted volume type "hostPath"' in refusals()[0]
    assert plane.pods(restricted) == []
    helm.uninstall()
    with plane.place("privileged") as privileged:
        other = Helm(plane, privileged, tmp_path)
        other.install(HOST_PATH | QUICK | {"config": LOGS})
        running(plane, privileged, NODES)
        assert len({it["spec"]["nodeName"] for it in plane.pods(privileged)}) == NODES
        other.uninstall()


def test_the_account_may_what_the_reflector_needs_and_nothing_else(
    plane: ControlPlane, restricted: str, helm: Helm
) -> None:
    """Its own list, and every verb on every resource here and in another namespace, against files/cluster-role-rules.yaml."""
    helm.install(QUICK | {"config": LOGS})
    wanted = permissions.NEEDED
    assert permissions.in_the_chart() == wanted
    bystander = permissions.listed(plane, restricted, "default")
    assert bystander.resources == permissions.EVERYBODY
    assert {verb for verb, _ in bystander.paths} == {"get"}
    mine = permissions.listed(plane, restricted, NAME)
    assert mine.resources == wanted | permissions.EVERYBODY
    assert mine.paths == bystander.paths

    user = f"system:serviceaccount:{restricted}:{NAME}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{restricted}", "system:authenticated"]
    for namespace in (restricted, "kube-system", ""):
        assert permissions.tried(plane, user, groups, namespace) == wanted | permissions.EVERYBODY, namespace


def test_bad_values_leave_nothing_behind(plane: ControlPlane, helm: Helm) -> None:
    """Refused by Helm, with the path of the value, before anything is made."""
    before = contents(plane)
    hub = {"config": {"sinks": {"security_hub": {"enabled": True}}}}
    assert "config.cluster.name: is required where config.sinks.security_hub is enabled" in helm.install(
        hub, fails=True
    )
    unknown: dict[str, Any] = {"config": LOGS | {"spool": {"bytes_maximum": 1}}, "image": {"tags": "1"}}
    said = helm.install(unknown, fails=True)
    assert "at '/config/spool': additional properties 'bytes_maximum' not allowed" in said, said
    assert "at '/image': additional properties 'tags' not allowed" in said, said
    assert contents(plane) <= before


def test_everything_on(plane: ControlPlane, tmp_path: Path) -> None:
    """ci/everything-on-values.yaml under `restricted`, with the CRDs of the Prometheus operator, and gone again.

    Its scheduler is not here; its runtime class is made, as a pod that names none there is is refused.
    """
    values = CHART / "ci/everything-on-values.yaml"
    given = yaml.safe_load(values.read_text())
    place = given["namespaceOverride"]
    helm = Helm(plane, place, tmp_path)
    with foreign_kinds(plane):
        plane.make_place(place, "restricted")
        runtime = {"metadata": {"name": given["runtimeClassName"]}, "handler": "any"}
        plane.admin.create("runtimeclasses", runtime)
        before = contents(plane)
        with volumes(plane, "", 2, "1Ti"):
            helm.install(values, "--set", "schedulerName=default-scheduler")
            pods = plane.pods(place)
            assert len({it["spec"]["nodeName"] for it in pods}) == 2
            assert all(ready(it) for it in pods)
            made = {it.partition(" ")[0] for it in contents(plane) - before}
            monitoring = {"servicemonitors", "prometheusrules", "networkpolicies", "poddisruptionbudgets"}
            assert monitoring <= made, made
            helm.uninstall()
        plane.until(lambda: contents(plane) <= before, lambda: f"all is gone: {contents(plane) - before}")
        plane.drop_place(place)
        plane.gone(place)


def test_hooks_are_admitted(plane: ControlPlane, restricted: str, helm: Helm) -> None:
    """The pod of `helm test` passes the same admission; it is not run here (tests/chart/delivery_checks.py runs its program)."""
    helm.install(QUICK | {"config": LOGS}, "--wait=false")
    found = [it for it in yaml.safe_load_all(helm.run("get", "hooks", RELEASE)) if it]
    assert [it["kind"] for it in found] == ["Pod"]
    answer = plane.admin.request("POST", f"{path_of('pods', restricted)}?dryRun=All", found[0])
    assert answer.status == 201, answer


def test_the_pod_of_the_test_stays_for_its_log(plane: ControlPlane, restricted: str, helm: Helm) -> None:
    """`helm test` is over when kwok's pod has succeeded. Helm reads the log after that: the pod must be there still, and may again."""
    helm.install(QUICK | {"config": LOGS})
    name = f"{NAME}-test"
    seen = set()
    for _ in range(2):
        assert "Phase:          Succeeded" in helm.run("test", RELEASE, "--timeout", "60s")
        pod = plane.admin.get("pods", name, restricted)
        assert pod["status"]["phase"] == "Succeeded"
        seen.add(pod["metadata"]["uid"])
    assert len(seen) == 2, "the second test is the first one's pod"


@pytest.mark.parametrize(("case", "count"), [("autoscaling", 2), ("daemonset-emptydir", NODES), ("tls", 2)])
def test_values_of_ci(plane: ControlPlane, restricted: str, helm: Helm, case: str, count: int) -> None:
    """As many pods as there should be, all ready: those of the autoscaler without a metric, and those with Secrets."""
    before = contents(plane)
    secrets = {"forwarder-tls": ("tls.crt", "tls.key"), "forwarder-senders": ("htpasswd.txt",)}
    for name, keys in secrets.items():
        body = {"metadata": {"name": name}, "stringData": dict.fromkeys(keys, "x")}
        plane.admin.create("secrets", body, restricted)
    helm.install(CHART / f"ci/{case}-values.yaml", "--set", "minReadySeconds=1")
    running(plane, restricted, count)
    if case == "autoscaling":
        scaler = plane.admin.call(
            "GET", f"/apis/autoscaling/v2/namespaces/{restricted}/horizontalpodautoscalers/{NAME}"
        )
        assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 5)
    helm.uninstall()
    left = {f"secrets {restricted}/{name}" for name in secrets}
    plane.until(lambda: contents(plane) - before <= left, lambda: f"all is gone: {contents(plane) - before}")


def test_what_fails_leaves_nothing_behind(plane: ControlPlane, nodes: list[str]) -> None:
    """A test that fails must not make the next ones fail: what it was lent goes back."""
    before = contents(plane)
    with contextlib.suppress(InterruptedError), contextlib.ExitStack() as lent:
        for lender in (
            foreign_kinds(plane),
            volumes(plane, "lent", 2, "1Gi"),
            cordoned(plane, nodes),
            plane.place(),
        ):
            lent.enter_context(lender)
        more = lent.enter_context(plane.nodes(1))
        assert contents(plane) - before
        raise InterruptedError
    assert not any("unschedulable" in plane.admin.get("nodes", it)["spec"] for it in nodes)
    assert not plane.exists("nodes", more[0])
    plane.until(lambda: contents(plane) <= before, lambda: f"all is gone: {contents(plane) - before}")


def test_plain_manifests(plane: ControlPlane) -> None:
    """k8s/ as it is, in a namespace that enforces `restricted`: both replicas become ready."""
    folder = REPOSITORY / "k8s"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    place = kustomization["namespace"]
    objects = [yaml.safe_load((folder / it).read_text()) for it in kustomization["resources"]]
    with contextlib.ExitStack() as made:
        plane.make_place(place, "restricted")
        made.callback(plane.drop_place, place)
        for item in objects:
            kind, name = f"{item['kind'].lower()}s", item["metadata"]["name"]
            plane.admin.create(kind, item, item["metadata"].get("namespace", ""))
            if kind.startswith("clusterrole"):
                made.callback(plane.admin.delete, kind, name)
        plane.until(lambda: sum(map(ready, plane.pods(place))) == 2, "both are ready")
