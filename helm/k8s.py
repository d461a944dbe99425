"""Renders the chart into k8s/, for people without Helm; ``--check`` only says whether that is current.

The values are k8s/values.yaml. What only Helm understands (its labels, hooks) is left out; nothing else is changed. The namespace is
Falco's own and not part of it: `kubectl delete -k` would take Falco with it.
"""

# ruff: noqa: T201 - a program of the command line

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
HELM = ROOT / ".tools/bin/helm"
CHART = ROOT / "helm/falco-aws-forwarder"
TARGET = ROOT / "k8s"
NAMESPACE = "falco"
NOTE = "# Rendered from the chart by `make k8s`; do not edit: change values.yaml, or patch with kustomize.\n"
KUSTOMIZATION = "kustomization.yaml"
HELMS_LABELS = ("helm.sh/chart", "app.kubernetes.io/managed-by")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def rendered() -> dict[str, str]:
    """File name and content."""
    command: list[str | Path] = [
        HELM,
        "template",
        "falco-aws-forwarder",
        CHART,
        "--namespace",
        NAMESPACE,
        "--values",
        TARGET / "values.yaml",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - our own tool
    objects = [it for it in yaml.safe_load_all(output) if it is not None]
    files: dict[str, str] = {}
    for item in objects:
        if "helm.sh/hook" in item["metadata"].get("annotations", {}):
            continue
        _strip(item)
        name = f"{item['kind'].lower()}{'-headless' if item['metadata']['name'].endswith('-headless') else ''}.yaml"
        if name in files:
            raise SystemExit(f"helm/k8s.py: two objects for {name}")
        files[name] = NOTE + _yaml(item)
    listed = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": sorted(files),
    }
    files[KUSTOMIZATION] = NOTE + _yaml(listed)
    return files


def _yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000)


def _strip(node: Any) -> None:
    if isinstance(node, dict):
        labels = node.get("labels")
        if isinstance(labels, dict):
            for name in HELMS_LABELS:
                labels.pop(name, None)
        for value in node.values():
            _strip(value)
    elif isinstance(node, list):
        for value in node:
            _strip(value)


def main() -> int:
    try:
        wanted = rendered()
    except FileNotFoundError:
        print(f"{HELM} is missing: make tools", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return 1
    there = {path.name: path.read_text() for path in TARGET.glob("*.yaml") if path.name != "values.yaml"}
    if there == wanted:
        return 0
    if "--check" in sys.argv:
        names = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
        print(f"out of date, run `make k8s`: {', '.join(names)}", file=sys.stderr)
        return 1
    for name in there.keys() - wanted.keys():
        (TARGET / name).unlink()
    for name, text in wanted.items():
        (TARGET / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
