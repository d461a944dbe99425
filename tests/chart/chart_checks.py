"""The chart without a cluster: linted, rendered for every ci/*-values.yaml, and judged.

Run by `make chart-test`; not named test_*, because `make test` needs no helm. The forwarder itself reads every rendered configuration.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from forwarder.settings import Settings, load_settings
from tests.chart.rendering import (
    CASES,
    CHART,
    DAEMONSET,
    EVERYTHING,
    IMAGE,
    LOGS,
    NAMESPACE,
    PERSISTENCE,
    RELEASE,
    ROOT,
    TOOLS,
    Object,
    configuration,
    container,
    helm,
    objects_of,
    one,
    pods,
    text_of,
    tool,
    workload,
)

SCHEMAS = TOOLS.parent / "schemas"
VERSIONS = [
    line.split()[2].removeprefix("v")
    for line in (Path(__file__).parent / "schemas.txt").read_text().splitlines()
    if line.startswith("kubernetes ")
]

cases = pytest.mark.parametrize("case", CASES, ids=lambda path: path.name.removesuffix("-values.yaml"))


@cases
def test_lints(case: Path) -> None:
    done = helm("lint", case, "--strict")
    assert done.returncode == 0, done.stdout + done.stderr


@cases
@pytest.mark.parametrize("version", VERSIONS)
def test_is_what_the_api_server_knows(case: Path, version: str) -> None:
    """Schemas of Kubernetes' own OpenAPI document and of the Prometheus operator's CRDs; unknown fields and kinds are faults."""
    assert (SCHEMAS / f"v{version}").is_dir(), f"no schemas of {version}: make tools"
    done = _kubeconform(text_of(case), version)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Invalid: 0, Errors: 0, Skipped: 0" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("serviceName:", "serviceNames:"),
        ("replicas: 3", "replicas: three"),
        ("kind: StatefulSet", "kind: StatefullSet"),
        ("periodSeconds: 2\n", "periodSecs: 2\n"),
        ("apiVersion: policy/v1", "apiVersion: policy/v1beta1"),
        ("kind: ServiceMonitor", "kind: ServiceMonitors"),
        ("path: /metrics", "paths: /metrics"),
    ],
)
def test_kubeconform_refuses_what_it_should(right: str, wrong: str) -> None:
    """The judge is awake."""
    text = text_of(PERSISTENCE, sets=["serviceMonitor.enabled=true"])
    assert right in text
    done = _kubeconform(text.replace(right, wrong), VERSIONS[-1])
    assert done.returncode != 0, done.stdout


@cases
def test_objects_are_labelled_and_named(case: Path) -> None:
    values = yaml.safe_load(case.read_text())
    seen = set()
    for item in objects_of(case):
        metadata = item["metadata"]
        key = (item["kind"], metadata["name"])
        assert key not in seen
        seen.add(key)
        if "extra" in metadata["name"] or "more" in metadata["name"]:
            continue
        assert metadata["labels"]["app.kubernetes.io/instance"] == RELEASE
        for name, value in values.get("commonLabels", {}).items():
            assert metadata["labels"][name] == value, key
        if not item["kind"].startswith("ClusterRole"):
            assert metadata["namespace"] == values.get("namespaceOverride", NAMESPACE), key


@cases
def test_pods_are_restricted(case: Path) -> None:
    """Pod Security `restricted`, and more: read-only root, 65532, a memory limit, no service links. hostPath is the documented exception."""
    hosted = yaml.safe_load(case.read_text()).get("daemonset", {}).get("hostPath", {}).get("enabled", False)
    for name, pod in pods(objects_of(case)):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        kinds = {kind for volume in pod.get("volumes", []) for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "secret"} | ({"hostPath"} if hosted else set()), name
        for it in [*pod["containers"], *pod.get("initContainers", [])]:
            own = it["securityContext"]
            prepares = hosted and it["name"] == "prepare-spool"
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]} | ({"add": ["CHOWN"]} if prepares else {})
            assert it["resources"]["limits"]["memory"]
            assert "cpu" not in it["resources"]["limits"]


@cases
def test_the_forwarder_takes_its_configuration(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by the forwarder's own code, with the environment of the pod."""
    monkeypatch.setenv("AWS_REGION", "eu-west-1")  # as IRSA and Pod Identity do
    objects = objects_of(case)
    settings = _settings(objects, tmp_path)
    container = workload(objects)["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.receiver.port, "admin": settings.admin.port}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["spool"] == settings.spool.directory
    assert container["args"] == ["run", "--config", f"{mounts['config']}/forwarder.yaml"]
    grace = workload(objects)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace >= sleep + settings.receiver.drain_delay_secs + settings.delivery.drain_secs_max + 10


@cases
def test_given_configuration_is_kept_word_for_word(case: Path) -> None:
    given = yaml.load(case.read_text(), yaml.BaseLoader)["config"]  # noqa: S506 - texts only, safer still

    def contained(inner: Any, outer: Any, path: str) -> None:
        if isinstance(inner, dict):
            for key, value in inner.items():
                contained(value, outer[key], f"{path}.{key}")
        elif isinstance(inner, list):
            assert len(inner) == len(outer), path
            for place, value in enumerate(inner):
                contained(value, outer[place], f"{path}[{place}]")
        else:
            assert inner == outer, path

    rendered = one(objects_of(case), "ConfigMap", workload(objects_of(case))["metadata"]["name"])
    contained(given, yaml.load(rendered["data"]["forwarder.yaml"], yaml.BaseLoader), "config")  # noqa: S506


def test_derives_what_was_not_given(tmp_path: Path) -> None:
    plain = configuration(objects_of(None, sets=[LOGS]))
    assert plain["spool"] == {
        "directory": "/var/lib/falco-forwarder",
        "bytes_max": (2 << 30) * 3 // 5,
        "sync": "normal",
    }
    assert plain["sensors"]["peers"] == [f"{RELEASE}-headless.{NAMESPACE}.svc:8080"]
    assert "rate_per_sec" not in plain["sinks"]["security_hub"]
    assert "sensors" not in configuration(objects_of(None, sets=[LOGS, "replicas=1"]))
    kept = configuration(objects_of(PERSISTENCE))
    assert kept["spool"]["sync"] == "full"
    assert kept["spool"]["bytes_max"] == (10 << 30) * 3 // 5
    assert kept["sinks"]["security_hub"]["rate_per_sec"] == pytest.approx(10 / 3)
    assert kept["sinks"]["security_hub"]["burst"] == 10
    nodes = configuration(objects_of(DAEMONSET))
    assert nodes["sinks"]["security_hub"]["rate_per_sec"] == 2.5
    assert nodes["spool"]["sync"] == "full"
    assert "sensors" not in nodes
    names = {
        it["name"]: it["valueFrom"]["fieldRef"]["fieldPath"]
        for it in container(objects_of(DAEMONSET))["env"]
        if "valueFrom" in it
    }
    assert names == {
        "FORWARDER__REPLICA__NAME": "spec.nodeName",
        "FORWARDER__ENRICHMENT__KUBERNETES__NODE_NAME": "spec.nodeName",
    }
    names = {
        it["name"]: it["valueFrom"]["fieldRef"]["fieldPath"]
        for it in container(objects_of(PERSISTENCE))["env"]
        if "valueFrom" in it
    }
    assert names == {"FORWARDER__REPLICA__NAME": "metadata.name"}


def test_empty_and_false_are_given_too(tmp_path: Path) -> None:
    """What was given wins over what is derived, whatever it is; a date stays text."""
    (tmp_path / "values.yaml").write_text(
        """
config:
  cluster: {name: x}
  sensors: {peers: [], finding: {enabled: false}}
  spool: {sync: full}
  sinks:
    security_hub: {enabled: true, rate_per_sec: 1, aggregation: {enabled: false}}
  rules: [{silence: {until: 2099-12-24, reason: test, by: ana}, drop: false}]
"""
    )
    config = configuration(objects_of(tmp_path / "values.yaml", sets=[IMAGE]))
    assert config["sensors"] == {"peers": [], "finding": {"enabled": False}}
    assert config["spool"]["sync"] == "full"
    hub = config["sinks"]["security_hub"]
    assert hub == {"enabled": True, "rate_per_sec": 1, "burst": 15, "aggregation": {"enabled": False}}
    assert config["rules"] == [
        {"silence": {"until": "2099-12-24", "reason": "test", "by": "ana"}, "drop": False}
    ]


def test_topologies() -> None:
    stateful = workload(objects_of(PERSISTENCE))["spec"]
    assert stateful["podManagementPolicy"] == "Parallel"
    assert stateful["persistentVolumeClaimRetentionPolicy"] == {
        "whenDeleted": "Retain",
        "whenScaled": "Retain",
    }
    assert stateful["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "10Gi"
    assert one(objects_of(PERSISTENCE), "Service", "-headless")["metadata"]["name"] == stateful["serviceName"]
    daemon = objects_of(DAEMONSET)
    assert workload(daemon)["kind"] == "DaemonSet"
    assert one(daemon, "Service", RELEASE)["spec"]["internalTrafficPolicy"] == "Local"
    assert not [it for it in daemon if it["kind"] == "PodDisruptionBudget"]
    budget = one(objects_of(PERSISTENCE), "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@cases
def test_selectors_meet_the_pods(case: Path) -> None:
    """Services, budget, policy and monitors select what they should."""
    objects = objects_of(case)
    labels = workload(objects)["spec"]["template"]["metadata"]["labels"]
    for item in objects:
        if item["kind"] == "Service":
            assert item["spec"]["selector"].items() <= labels.items()
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= {"http", "admin"}
        if item["kind"] in {"StatefulSet", "DaemonSet", "PodDisruptionBudget", "PodMonitor"}:
            assert item["spec"]["selector"]["matchLabels"].items() <= labels.items(), item["kind"]
        if item["kind"] == "NetworkPolicy":
            assert item["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        if item["kind"] == "ServiceMonitor":
            wanted = item["spec"]["selector"]["matchLabels"]
            found = [
                it
                for it in objects
                if it["kind"] == "Service" and wanted.items() <= it["metadata"]["labels"].items()
            ]
            assert len(found) == 1  # two would be scraped twice
            assert {port["name"] for port in found[0]["spec"]["ports"]} == {"admin"}


def test_a_sender_stays_but_still_changes_replicas() -> None:
    """Shorter than the youngest age at which a connection is closed (75 % of the maximum), or nobody would ever move."""
    for case, age in ((PERSISTENCE, 600), (EVERYTHING, 300)):
        found = [
            it for it in objects_of(case) if it["kind"] == "Service" and it["spec"].get("sessionAffinity")
        ]
        assert len(found) == 1
        assert (
            0.5 * age <= found[0]["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"] < 0.75 * age
        )


def test_role_is_the_tested_one() -> None:
    rules = yaml.safe_load((CHART / "files/cluster-role-rules.yaml").read_text())
    objects = objects_of(PERSISTENCE)
    assert one(objects, "ClusterRole")["rules"] == rules
    subject = one(objects, "ClusterRoleBinding")["subjects"][0]
    assert (
        subject["name"]
        == one(objects, "ServiceAccount")["metadata"]["name"]
        == workload(objects)["spec"]["template"]["spec"]["serviceAccountName"]
    )
    without = objects_of(CHART / "ci/podmonitor-no-api-values.yaml")
    assert not [it for it in without if it["kind"].startswith("ClusterRole")]
    assert workload(without)["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_other_rules_do_not_restart_pods() -> None:
    def mark(*sets: str) -> str:
        sum_: str = workload(objects_of(EVERYTHING, sets=sets))["spec"]["template"]["metadata"][
            "annotations"
        ]["checksum/config"]
        return sum_

    assert mark() == mark("config.rules[0].name=other")
    assert mark() != mark("config.log.level=info")


def test_irsa_and_pod_identity_keep_away_from_the_nodes_role() -> None:
    def off(case: Path) -> bool:
        return {"name": "AWS_EC2_METADATA_DISABLED", "value": "true"} in container(objects_of(case))["env"]

    assert off(PERSISTENCE)
    assert off(EVERYTHING)
    assert not off(DAEMONSET)


def test_chart_says_what_it_is() -> None:
    """For Artifact Hub: the annotations that hold YAML are YAML, the image is the one that is rendered, the icon is helm/icon.svg."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    said = {key.removeprefix("artifacthub.io/"): value for key, value in chart["annotations"].items()}
    (image,) = yaml.safe_load(said["images"])
    # The project publishes none: its name is the one a person gives it who builds it.
    name, _, tag = container(objects_of(None, sets=[LOGS]))["image"].rpartition("/")[2].partition(":")
    assert image == {"name": name, "image": f"{name}:{tag}"}
    assert {it["kind"] for it in yaml.safe_load(said["changes"])} <= {
        "added",
        "changed",
        "deprecated",
        "removed",
        "fixed",
        "security",
    }
    assert all(it["url"].startswith("https://") for it in yaml.safe_load(said["links"]))
    icon = (ROOT / "helm/icon.svg").read_bytes().strip()
    assert chart["icon"] == f"data:image/svg+xml;base64,{base64.b64encode(icon).decode()}"
    version = re.search(r'__version__ = "(.*)"', (ROOT / "forwarder/__init__.py").read_text())
    assert version
    assert chart["appVersion"] == version[1]


def test_every_value_is_described() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["additionalProperties"] is False
    assert all(it.get("description") or it.get("properties") for it in schema["properties"].values())


def _kubeconform(text: str, version: str) -> subprocess.CompletedProcess[str]:
    file = "{{.ResourceKind}}{{.KindSuffix}}.json"
    places = (f"{SCHEMAS}/{{{{.NormalizedKubernetesVersion}}}}/{file}", f"{SCHEMAS}/crds/{file}")
    locations = [argument for place in places for argument in ("-schema-location", place)]
    return tool("kubeconform", "-strict", "-summary", "-kubernetes-version", version, *locations, stdin=text)


def _settings(objects: list[Object], folder: Path) -> Settings:
    file = folder / "forwarder.yaml"
    maps = [it for it in objects if it["kind"] == "ConfigMap" and "forwarder.yaml" in (it.get("data") or {})]
    file.write_text(maps[0]["data"]["forwarder.yaml"])
    environment = {
        it["name"]: it.get("value", "ip-10-0-1-17.ec2.internal") for it in container(objects)["env"]
    }
    return load_settings(file, environment)


@pytest.mark.parametrize("word", ["123", "1e5", "true", "null"])
def test_names_are_texts_whatever_they_look_like(word: str) -> None:
    """A release called 123 must not make a number of a label."""
    overrides = f"nameOverride={word},fullnameOverride={word},namespaceOverride={word}"
    secrets = f"tls.existingSecret={word},auth.existingSecret={word},priorityClassName={word}"
    values: list[str | Path] = [
        "--values",
        EVERYTHING,
        "--set",
        "tls.enabled=true,tls.certManager.enabled=false,tls.testClientSecret=",
    ]
    rendered = tool("helm", "template", word, CHART, *values, "--set-string", f"{overrides},{secrets}")
    assert rendered.returncode == 0, rendered.stderr
    texts = 0
    for item in yaml.safe_load_all(rendered.stdout):
        for path, value in _leaves_of(item):
            if (
                path[-1] in {"name", "namespace", "secretName", "priorityClassName"}
                or "labels" in path
                or "matchLabels" in path
            ):
                assert isinstance(value, str), (path, value)
                texts += value == word
    assert texts > 20


def _leaves_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, member in value.items():
            yield from _leaves_of(member, (*path, str(key)))
    elif isinstance(value, list):
        for member in value:
            yield from _leaves_of(member, path)
    elif path:
        yield path, value
