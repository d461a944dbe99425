"""The chart without a cluster: linted, rendered for every ci/*-values.yaml, and judged.

Run by `make chart-test`; not named test_*, because `make test` needs no helm. The forwarder itself reads every rendered configuration.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from forwarder.settings import Settings, load_settings
from tests.chart.rendering import (
    CASES,
    CHART,
    NAMESPACE,
    RELEASE,
    ROOT,
    TOOLS,
    Object,
    configuration,
    helm,
    objects_of,
    one,
    pods,
    text_of,
    tool,
    workload,
)

LOGS = "config.sinks.cloudwatch_logs.enabled=true,config.sinks.cloudwatch_logs.log_group=/falco/x"
HUB = "config.sinks.security_hub.enabled=true,config.cluster.name=x"
SCHEMAS = TOOLS.parent / "schemas"
VERSIONS = [
    line.split()[2].removeprefix("v")
    for line in (Path(__file__).parent / "schemas.txt").read_text().splitlines()
    if line.startswith("kubernetes ")
]
EVERYTHING = CHART / "ci/everything-on-values.yaml"
PERSISTENCE = CHART / "ci/persistence-values.yaml"
DAEMONSET = CHART / "ci/daemonset-values.yaml"

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
        assert kinds <= {"configMap", "emptyDir"} | ({"hostPath"} if hosted else set()), name
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert "cpu" not in container["resources"]["limits"]
        for container in pod.get("initContainers", []):
            assert hosted
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


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
        "bytes_max": 1536 << 20,
        "sync": "normal",
    }
    assert plain["sensors"]["peers"] == [f"{RELEASE}-headless.{NAMESPACE}.svc:8080"]
    assert "rate_per_sec" not in plain["sinks"]["security_hub"]
    assert "sensors" not in configuration(objects_of(None, sets=[LOGS, "replicas=1"]))
    kept = configuration(objects_of(PERSISTENCE))
    assert kept["spool"]["sync"] == "full"
    assert kept["spool"]["bytes_max"] == (10 << 30) * 3 // 4
    assert kept["sinks"]["security_hub"]["rate_per_sec"] == pytest.approx(10 / 3)
    assert kept["sinks"]["security_hub"]["burst"] == 10
    nodes = configuration(objects_of(DAEMONSET))
    assert nodes["sinks"]["security_hub"]["rate_per_sec"] == 2.5
    assert nodes["spool"]["sync"] == "full"
    assert "sensors" not in nodes
    names = {
        it["name"]: it["valueFrom"]["fieldRef"]["fieldPath"]
        for it in _container(objects_of(DAEMONSET))["env"]
        if "valueFrom" in it
    }
    assert names == {
        "FORWARDER__REPLICA__NAME": "spec.nodeName",
        "FORWARDER__ENRICHMENT__KUBERNETES__NODE_NAME": "spec.nodeName",
    }
    names = {
        it["name"]: it["valueFrom"]["fieldRef"]["fieldPath"]
        for it in _container(objects_of(PERSISTENCE))["env"]
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
    config = configuration(objects_of(tmp_path / "values.yaml"))
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
        return {"name": "AWS_EC2_METADATA_DISABLED", "value": "true"} in _container(objects_of(case))["env"]

    assert off(PERSISTENCE)
    assert off(EVERYTHING)
    assert not off(DAEMONSET)


def test_alerts_name_metrics_that_exist() -> None:
    known = set(
        re.findall(
            r"^\| `(falco_forwarder_[a-z0-9_]+)` \| (?:counter|gauge|histogram)",
            (ROOT / "docs/metrics.md").read_text(),
            re.MULTILINE,
        )
    )
    assert len(known) > 50
    rule = one(objects_of(EVERYTHING), "PrometheusRule")
    alerts = [it for group in rule["spec"]["groups"] for it in group["rules"] if "alert" in it]
    for alert in alerts:
        for name in re.findall(r"falco_forwarder_[a-z0-9_]+", alert["expr"]):
            assert re.sub(r"_(bucket|sum|count)$", "", name) in known, alert["alert"]
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    names = [it["alert"] for it in alerts]
    assert len(names) == len(set(names))
    assert "Mine" in names
    assert "FalcoForwarderIssuesEvicted" not in names
    assert all("runbook_url" in it["annotations"] for it in alerts if it["alert"] != "Mine")
    assert "SELECTOR" not in json.dumps(rule)
    assert "SILENT_AFTER" not in json.dumps(rule)


@pytest.mark.parametrize("case", [EVERYTHING, None], ids=["everything-on", "default"])
def test_prometheus_reads_the_alerts(case: Path | None, tmp_path: Path) -> None:
    """Every expression and template, by Prometheus' own tool."""
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: install Prometheus (Debian: apt-get install prometheus)"
    sets = [] if case else [LOGS, "prometheusRule.enabled=true"]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump(one(objects_of(case, sets=sets), "PrometheusRule")["spec"])
    )
    done = subprocess.run(
        [promtool, "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SUCCESS: 2[0-9] rules found", done.stdout), done.stdout


def test_sensor_alerts_are_those_of_the_docs() -> None:
    documented = yaml.safe_load((ROOT / "tests/promql/sensors_rules.yaml").read_text())["groups"][0]["rules"]
    ours = one(objects_of(None, sets=[LOGS, "prometheusRule.enabled=true"]), "PrometheusRule")["spec"][
        "groups"
    ][1]["rules"]
    assert json.loads(json.dumps(ours).replace("2700s", "45m")) == documented


@pytest.mark.parametrize("sets", ["", "mode=daemonset", "persistence.enabled=true,replicas=1"])
def test_notes_say_the_values_of_falco(sets: str, tmp_path: Path) -> None:
    """Helm renders notes only for an installation, which asks a cluster: so here they are put into an object."""
    shutil.copytree(CHART, tmp_path / CHART.name)
    templates = tmp_path / CHART.name / "templates"
    notes = (templates / "NOTES.txt").read_text()
    (templates / "_notes.tpl").write_text(f'{{{{- define "notes" -}}}}\n{notes}\n{{{{- end }}}}\n')
    (templates / "notes.yaml").write_text('notes: |\n{{ include "notes" . | indent 2 }}\n')
    arguments = [
        "--namespace",
        NAMESPACE,
        "--show-only",
        "templates/notes.yaml",
        "--set",
        f"{LOGS},{sets}".strip(","),
    ]
    done = tool("helm", "template", RELEASE, tmp_path / CHART.name, *arguments)
    assert done.returncode == 0, done.stderr
    said_all: str = yaml.safe_load(done.stdout)["notes"]
    block = re.search(r"\n\n((?:  .*\n)+)", said_all)
    assert block, said_all
    assert "helm test" in said_all
    assert ("With one replica" in said_all) == ("replicas=1" in sets)
    said = yaml.safe_load(block[1])
    ours = yaml.safe_load((ROOT / "helm/falco-values.yaml").read_text())
    ours["falco"].pop("append_output")
    assert said == ours


def test_every_value_is_described() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["additionalProperties"] is False
    assert all(it.get("description") or it.get("properties") for it in schema["properties"].values())


BAD = [
    ("colour=red", "additional properties 'colour' not allowed"),
    ("mode=deployment", "at '/mode': value must be one of 'statefulset', 'daemonset'"),
    ("replicas=0", "at '/replicas': minimum: got 0, want 1"),
    ("replicas=two", "at '/replicas': got string, want integer"),
    ("replicas=33", "at '/replicas': maximum: got 33, want 32"),
    ("resources.cpu=1", "at '/resources': additional properties 'cpu' not allowed"),
    ("image.digest=sha256:12", "at '/image/digest': 'sha256:12' does not match pattern"),
    ("image.pullPolicy=always", "at '/image/pullPolicy': value must be one of"),
    ("persistence.size=8G", "at '/persistence/size': '8G' does not match pattern"),
    ("spool.size=100", "at '/spool/size': got number, want string"),
    ("persistence.accessModes[0]=ReadWriteMany", "at '/persistence/accessModes/0': value must be one of"),
    ("service.port=70000", "at '/service/port': maximum: got 70,000, want 65,535"),
    ("service.typ=NodePort", "at '/service': additional properties 'typ' not allowed"),
    ("serviceAccount.annotations.a=1", "at '/serviceAccount/annotations/a': got number, want string"),
    ("networkPolicy.apiPorts[0]=https", "at '/networkPolicy/apiPorts/0': got string, want integer"),
    ("probes.liveness.path=/x", "at '/probes/liveness': additional properties 'path' not allowed"),
    ("serviceMonitor.interval=30", "at '/serviceMonitor/interval': got number, want string"),
    ("daemonset.maxUnavailable=200%", "at '/daemonset/maxUnavailable': '200%' does not match pattern"),
    ("config.cluster.nmae=x", "at '/config/cluster': additional properties 'nmae' not allowed"),
    ("config.cluster.name=a b", "at '/config/cluster/name': 'a b' does not match pattern"),
    ("config.cluster.account_id=12", "at '/config/cluster/account_id': got number, want string"),
    ("config.spool.sync=sometimes", "at '/config/spool/sync': value must be one of 'full', 'normal'"),
    ("config.spool.bytes_max=1Gi", "at '/config/spool/bytes_max': got string, want integer"),
    ("config.receiver.port=0", "at '/config/receiver/port': minimum: got 0, want 1"),
    (
        "config.sinks.securityhub.enabled=true",
        "at '/config/sinks': additional properties 'securityhub' not allowed",
    ),
    (
        "config.sinks.cloudwatch_logs.minimum_priority=severe",
        "at '/config/sinks/cloudwatch_logs/minimum_priority': value must be one of",
    ),
    (
        "config.sinks.cloudwatch_logs.log_group=a b",
        "at '/config/sinks/cloudwatch_logs/log_group': 'a b' does not match pattern",
    ),
    (
        "config.sinks.security_hub.rate_per_sec=0",
        "at '/config/sinks/security_hub/rate_per_sec': exclusiveMinimum: got 0, want 0",
    ),
    (
        "config.sinks.security_hub.aggregation.flush_secs=60",
        "at '/config/sinks/security_hub/aggregation/flush_secs': got number, want array",
    ),
    ("config.enrichment.kubernetes.enabled=maybe", "at '/config/enrichment/kubernetes/enabled'"),
    ("config.sensors.peers[0]=nowhere", "at '/config/sensors/peers/0': 'nowhere' does not match pattern"),
    ("config.rules[0].matches.rule=x", "at '/config/rules/0': additional properties 'matches' not allowed"),
    ("config.rules[0].silence.till=x", "additional properties 'till' not allowed"),
]


@pytest.mark.parametrize(("pair", "message"), BAD, ids=lambda it: it if "=" in it and " " not in it else "")
def test_schema_refuses(pair: str, message: str) -> None:
    done = helm("template", sets=[LOGS, pair])
    assert done.returncode != 0, done.stdout[:300]
    assert message in done.stderr, done.stderr


SENSELESS = [
    ([], "config.sinks: no sink is enabled"),
    (["config.sinks.cloudwatch_logs.enabled=true"], "config.sinks.cloudwatch_logs.log_group: is required"),
    (
        ["config.sinks.security_hub.enabled=true"],
        "config.cluster.name: is required where config.sinks.security_hub is enabled",
    ),
    ([LOGS, "config.admin.port=2801"], "config.admin.port: is the receiver's port too"),
    ([LOGS, "mode=daemonset,persistence.enabled=true"], "persistence.enabled: needs mode statefulset"),
    (
        [HUB, "mode=daemonset"],
        "daemonset.expectedNodes: is required where config.sinks.security_hub is enabled",
    ),
    ([LOGS, "daemonset.hostPath.enabled=true"], "daemonset.hostPath.enabled: needs mode daemonset"),
    (
        [LOGS, "config.spool.bytes_max=2147483648"],
        "config.spool.bytes_max: 2147483648 is more than three quarters of the volume of 2Gi (1610612736)",
    ),
    ([LOGS, "terminationGracePeriodSeconds=5"], "terminationGracePeriodSeconds: leaves no time"),
    (
        [LOGS, "podMonitor.enabled=true,serviceMonitor.enabled=true"],
        "podMonitor.enabled: together with serviceMonitor everything is scraped twice",
    ),
    ([LOGS, "dashboards.enabled=true"], "dashboards.enabled: this chart has no dashboards yet"),
]


@pytest.mark.parametrize(("sets", "message"), SENSELESS, ids=[it[1].partition(":")[0] for it in SENSELESS])
def test_refuses_what_makes_no_sense(sets: list[str], message: str) -> None:
    done = helm("template", sets=sets)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr


def test_all_faults_at_once() -> None:
    done = helm(
        "template",
        sets=[
            "config.sinks.security_hub.enabled=true,config.admin.port=2801,podMonitor.enabled=true,serviceMonitor.enabled=true"
        ],
    )
    assert "3 fault(s) in the values" in done.stderr


def _kubeconform(text: str, version: str) -> subprocess.CompletedProcess[str]:
    file = "{{.ResourceKind}}{{.KindSuffix}}.json"
    places = (f"{SCHEMAS}/{{{{.NormalizedKubernetesVersion}}}}/{file}", f"{SCHEMAS}/crds/{file}")
    locations = [argument for place in places for argument in ("-schema-location", place)]
    return tool("kubeconform", "-strict", "-summary", "-kubernetes-version", version, *locations, stdin=text)


def _container(objects: list[Object]) -> Object:
    found: Object = workload(objects)["spec"]["template"]["spec"]["containers"][0]
    return found


def _settings(objects: list[Object], folder: Path) -> Settings:
    file = folder / "forwarder.yaml"
    maps = [it for it in objects if it["kind"] == "ConfigMap" and "forwarder.yaml" in (it.get("data") or {})]
    file.write_text(maps[0]["data"]["forwarder.yaml"])
    environment = {
        it["name"]: it.get("value", "ip-10-0-1-17.ec2.internal") for it in _container(objects)["env"]
    }
    return load_settings(file, environment)
