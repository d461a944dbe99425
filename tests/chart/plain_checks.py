"""k8s/ for people without Helm: kustomize makes of it what docs/kubernetes.md says. Run by `make chart-test`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from forwarder.settings import load_settings
from tests.chart.rendering import ROOT, Object, configuration, container, objects_of, one, tool

CHAPTER = (ROOT / "docs/kubernetes.md").read_text().partition("## Without Helm\n")[2].partition("\n## ")[0]
ROLE = "arn:aws:iam::111122223333:role/falco-forwarder"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the chapter, by the name in their first line, over a copy of k8s/."""
    for text in re.findall(r"```yaml\n(.*?)```", CHAPTER, re.DOTALL):
        name = re.match(r"# ([a-z]+\.yaml)", text)
        assert name, text
        (tmp_path / name[1]).write_text(text)
    shutil.copytree(ROOT / "k8s", tmp_path / "path/to/k8s")
    return tmp_path


def test_the_example_is_whole(folder: Path) -> None:
    """One namespace, the reader's image and configuration, the role of IRSA."""
    objects = built(folder)
    base = objects_of(ROOT / "k8s/values.yaml")
    kinds = sorted(it["kind"] for it in base if "helm.sh/hook" not in it["metadata"].get("annotations", {}))
    assert sorted(it["kind"] for it in objects) == kinds
    namespaces = {it["metadata"].get("namespace") for it in objects if "ClusterRole" not in it["kind"]}
    assert namespaces == {"falco"}
    assert one(objects, "ClusterRoleBinding")["subjects"][0]["namespace"] == "falco"
    assert container(objects)["image"] == "REPOSITORY:0.1.0"
    assert configuration(objects)["cluster"]["name"] == "shop-prod"
    annotations = one(objects, "ServiceAccount")["metadata"]["annotations"]
    assert annotations == {"eks.amazonaws.com/role-arn": ROLE}


def test_the_forwarder_reads_it_as_the_chart_would_have_it(folder: Path) -> None:
    """What only the chart derives, the example has written out."""
    objects = built(folder)
    file = folder / "forwarder.yaml"
    file.write_text(one(objects, "ConfigMap")["data"]["forwarder.yaml"])
    assert load_settings(file, {}).cluster.name == "shop-prod"
    ours, charts = configuration(objects), configuration(objects_of(ROOT / "k8s/values.yaml"))
    assert ours["sensors"] == charts["sensors"]
    assert ours["sinks"]["security_hub"] == charts["sinks"]["security_hub"]
    directory = {"directory": "/var/lib/falco-forwarder"}  # the default
    assert ours["spool"] | directory == charts["spool"]


def test_pod_identity_needs_no_patch(folder: Path) -> None:
    file = folder / "kustomization.yaml"
    told = yaml.safe_load(file.read_text())
    told["patches"] = [it for it in told["patches"] if it["target"]["kind"] != "ServiceAccount"]
    file.write_text(yaml.safe_dump(told))
    objects = built(folder)
    assert "annotations" not in one(objects, "ServiceAccount")["metadata"]
    assert {"name": "AWS_EC2_METADATA_DISABLED", "value": "true"} in container(objects)["env"]


def test_falco_and_the_role_look_where_it_is() -> None:
    objects = [yaml.safe_load(it.read_text()) for it in (ROOT / "k8s").glob("s*.yaml")]
    services = [it for it in objects if it["kind"] == "Service" and it["spec"].get("clusterIP") != "None"]
    service = one(services, "Service")
    place = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    falco = yaml.safe_load((ROOT / "helm/falco-values.yaml").read_text())["falco"]
    assert urlsplit(falco["http_output"]["url"]).hostname == place
    template = (ROOT / "docs/aws/template.yaml").read_text()
    account = one(objects, "ServiceAccount")["metadata"]
    for parameter, value in (("Namespace", account["namespace"]), ("ServiceAccount", account["name"])):
        assert f"\n  {parameter}:\n    Type: String\n    Default: {value}\n" in template


def built(folder: Path) -> list[Object]:
    done = tool("kustomize", "build", folder)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # warnings: of what is deprecated, of a patch that fits nothing
    return [it for it in yaml.safe_load_all(done.stdout) if it is not None]
