"""The chart, rendered and judged by real tools: helm, kubeconform. A tool that is missing is a failure, never a skip."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".tools/bin"
CHART = ROOT / "helm/falco-aws-forwarder"
CASES = sorted((CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "falco-aws-forwarder", "falco"
EVERYTHING = CHART / "ci/everything-on-values.yaml"
PERSISTENCE = CHART / "ci/persistence-values.yaml"
DAEMONSET = CHART / "ci/daemonset-values.yaml"
LOGS = "config.sinks.cloudwatch_logs.enabled=true,config.sinks.cloudwatch_logs.log_group=/falco/x"
IMAGE = "image.repository=example/falco-aws-forwarder"
"""What no default can be given for; the values files of ci/ have it."""
HUB = "config.sinks.security_hub.enabled=true,config.cluster.name=x"

Object = dict[str, Any]


def tool(name: str, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a tool of `make tools`."""
    path = TOOLS / name
    assert path.exists(), f"{path} is missing: make tools"
    return subprocess.run(
        [path, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def helm(
    command: str, values: Path | None = None, *more: str, sets: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """`helm template` or `helm lint` of our chart."""
    arguments: list[str | Path] = [
        command,
        *([RELEASE] if command != "lint" else []),
        CHART,
        "--namespace",
        NAMESPACE,
    ]
    if values is not None:
        arguments += ["--values", values]
    for pair in (IMAGE, *sets) if values is None and command != "lint" else sets:
        arguments += ["--set", pair]
    return tool("helm", *arguments, *more)


def text_of(values: Path | None, *more: str, sets: Sequence[str] = ()) -> str:
    """What Kubernetes would get."""
    done = helm("template", values, *more, sets=sets)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects_of(values: Path | None, *more: str, sets: Sequence[str] = ()) -> list[Object]:
    """The same, read."""
    return [it for it in yaml.safe_load_all(text_of(values, *more, sets=sets)) if it is not None]


def one(objects: list[Object], kind: str, ending: str = "") -> Object:
    """The only object of a kind (whose name ends so)."""
    found = [it for it in objects if it["kind"] == kind and it["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, f"{len(found)} of {kind}"
    return found[0]


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """The specification of every pod there is."""
    for item in objects:
        name = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "Pod":
            yield name, item["spec"]
        elif item["kind"] in {"StatefulSet", "DaemonSet"}:
            yield name, item["spec"]["template"]["spec"]


def workload(objects: list[Object]) -> Object:
    """The stateful set or daemon set."""
    found = [it for it in objects if it["kind"] in {"StatefulSet", "DaemonSet"}]
    assert len(found) == 1
    return found[0]


def configuration(objects: list[Object]) -> Object:
    """The forwarder's configuration in the ConfigMap."""
    found = [it for it in objects if it["kind"] == "ConfigMap" and "forwarder.yaml" in (it.get("data") or {})]
    assert len(found) == 1
    loaded: Object = yaml.safe_load(found[0]["data"]["forwarder.yaml"])
    return loaded


def container(objects: list[Object]) -> Object:
    """The forwarder's own container."""
    found: Object = workload(objects)["spec"]["template"]["spec"]["containers"][0]
    return found
