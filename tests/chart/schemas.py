"""Makes kubeconform's schemas, in .tools/schemas, of the modules in schemas.txt: Kubernetes' own OpenAPI documents, and CRDs.

Stricter than what the API server prunes: an object with known fields refuses all others.
"""

# ruff: noqa: T201 - a program of the command line

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / ".tools/schemas"
SOURCES = HERE / "schemas.txt"
KINDS = {
    "ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet", "HorizontalPodAutoscaler", "Namespace", "NetworkPolicy", "Pod", "PodDisruptionBudget",
    "Service", "ServiceAccount", "StatefulSet",
}  # fmt: skip
"""What the chart and k8s/ render."""
VERSION = {"HorizontalPodAutoscaler": "v2"}
"""Where it is not v1."""
CRDS = {
    "operator": ("example/prometheus-operator-crd", ["monitoring.coreos.com_servicemonitors", "monitoring.coreos.com_podmonitors",
                 "monitoring.coreos.com_prometheusrules"]),
    "cert-manager": ("deploy/crds", ["cert-manager.io_certificates"]),
}  # fmt: skip
"""Folder and files of a module."""


def fetch(module: str, version: str, sum_: str) -> Path:
    """The module's directory in Go's cache, checked."""
    with tempfile.TemporaryDirectory() as folder:  # outside of any module
        done = subprocess.run(
            ["go", "mod", "download", "-json", f"{module}@{version}"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{module} {version}: {done.stdout}{done.stderr}")
    told = json.loads(done.stdout)
    if told["Sum"] != sum_:
        raise SystemExit(f"{module} {version}: its checksum is {told['Sum']}, not {sum_}")
    return Path(told["Dir"])


def kubernetes(source: Path, target: Path) -> None:
    """One file for each kind."""
    definitions = json.loads((source / "api/openapi-spec/swagger.json").read_text())["definitions"]
    missing = set(KINDS)
    for definition in definitions.values():
        for name in definition.get("x-kubernetes-group-version-kind", []):
            if (
                name["kind"] in KINDS
                and name["version"] == VERSION.get(name["kind"], "v1")
                and len(definition["x-kubernetes-group-version-kind"]) == 1
            ):
                schema = _strict(definition, definitions)
                group, version = name["group"].partition(".")[0], name["version"]
                schema["properties"]["apiVersion"] = {
                    "enum": [f"{name['group']}/{version}" if name["group"] else version]
                }
                schema["properties"]["kind"] = {"enum": [name["kind"]]}
                schema["required"] = sorted({*schema.get("required", []), "apiVersion", "kind", "metadata"})
                file = "-".join(filter(None, [name["kind"].lower(), group, version]))
                (target / f"{file}.json").write_text(json.dumps(schema))
                missing.discard(name["kind"])
    if missing:
        raise SystemExit(f"{source}: no schema of {', '.join(sorted(missing))}")


def crds(what: str, source: Path, target: Path) -> None:
    """The operator's monitors and rules, cert-manager's certificates."""
    folder, names = CRDS[what]
    for name in names:
        document = yaml.safe_load((source / folder / f"{name}.yaml").read_text())
        for version in document["spec"]["versions"]:
            kind, group = document["spec"]["names"]["kind"].lower(), name.partition(".")[0]
            schema = _strict(version["schema"]["openAPIV3Schema"], {})
            (target / f"{kind}-{group}-{version['name']}.json").write_text(json.dumps(schema))


def _strict(node: Any, definitions: Mapping[str, Any]) -> Any:
    """Without references, and closed."""
    if isinstance(node, list):
        return [_strict(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        if name.endswith(".api.resource.Quantity"):
            return {"type": ["string", "number"]}
        return _strict(definitions[name], definitions)
    if node.get("format") == "int-or-string":
        return {"type": ["string", "integer"]}
    plain = {
        key: (
            {name: _strict(it, definitions) for name, it in value.items()}
            if key == "properties"
            else _strict(value, definitions)
        )
        for key, value in node.items()
        if key != "description" and not key.startswith("x-kubernetes-")
    }
    if (
        "properties" in plain
        and "additionalProperties" not in plain
        and not node.get("x-kubernetes-preserve-unknown-fields")
    ):
        plain["additionalProperties"] = False
    return plain


def main() -> int:
    if shutil.which("go") is None:
        print(
            "make: schemas come from Go modules, and there is no `go` in PATH: install Go 1.26 or newer",
            file=sys.stderr,
        )
        return 1
    shutil.rmtree(TARGET, ignore_errors=True)
    for line in SOURCES.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        what, module, version, sum_ = line.split()
        folder = TARGET / (version if what == "kubernetes" else "crds")
        folder.mkdir(parents=True, exist_ok=True)
        source = fetch(module, version, sum_)
        if what == "kubernetes":
            kubernetes(source, folder)
        else:
            crds(what, source, folder)
    (TARGET / "complete").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
