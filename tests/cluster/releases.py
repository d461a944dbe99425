"""Helm on the control plane, a chart that came before this one, and what is in the cluster at a moment."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.control_plane import ControlPlane, Object
from tests.cluster.harness import REPOSITORY, tool

CHART = REPOSITORY / "helm" / "falco-aws-forwarder"
RELEASE = "forwarder"
PREVIOUS, PREVIOUS_PRE_STOP_SECS = "0.0.9", 3
HELM_SECS_MAX = 120
LOGS: Object = {"sinks": {"cloudwatch_logs": {"enabled": True, "log_group": "/falco/test"}}}
IMAGE: Object = {"image": {"repository": "example/falco-aws-forwarder"}}
"""Of values that are not in a file of their own: the chart has no default for it."""
UNCOUNTED = frozenset({"events", "leases", "controllerrevisions", "endpoints", "componentstatuses", "nodes"})
"""What the cluster makes and forgets by its own clock."""


class Helm:
    """One release in one namespace. Helm's own files stay in the test's directory."""

    def __init__(self, plane: ControlPlane, namespace: str, directory: Path) -> None:
        self._plane, self._namespace, self._directory = plane, namespace, directory
        self.name = RELEASE

    def run(self, *arguments: str | Path, fails: bool = False) -> str:
        """Any command; returns what it printed, or with ``fails`` what it complained of."""
        home = {f"HELM_{it}_HOME": str(self._directory / "helm") for it in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [
                tool("helm"),
                *arguments,
                *("--namespace", self._namespace, "--kubeconfig", self._plane.kubeconfig),
            ],
            env={key: value for key, value in os.environ.items() if not key.startswith(("HELM_", "KUBE"))}
            | home,
            capture_output=True,
            text=True,
            timeout=HELM_SECS_MAX,
            check=False,
        )
        assert (done.returncode != 0) is fails, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stderr if fails else done.stdout

    def install(
        self, values: Mapping[str, Any] | Path, *more: str, chart: Path = CHART, fails: bool = False
    ) -> str:
        return self._apply("install", values, *more, chart=chart, fails=fails)

    def upgrade(self, values: Mapping[str, Any] | Path, *more: str, chart: Path = CHART) -> str:
        return self._apply("upgrade", values, *more, chart=chart, fails=False)

    def rollback(self) -> None:
        """To the revision before, and wait."""
        self.run("rollback", self.name, "--wait", "--timeout", "60s")

    def uninstall(self) -> None:
        self.run("uninstall", self.name, "--wait", "--timeout", "60s")

    def _apply(
        self, command: str, values: Mapping[str, Any] | Path, *more: str, chart: Path, fails: bool
    ) -> str:
        if not isinstance(values, Path):
            file = self._directory / "values.yaml"
            file.write_text(yaml.safe_dump(IMAGE | dict(values)))
            values = file
        wait = () if "--wait=false" in more else ("--wait", "--timeout", "60s")
        return self.run(command, self.name, chart, "--values", values, *more, *wait, fails=fails)


def previous_chart(directory: Path) -> Path:
    """A copy of the chart under an older version, whose pods wait shorter in preStop: no chart is released yet."""
    copy = directory / "previous"
    shutil.copytree(CHART, copy)
    chart = yaml.safe_load((copy / "Chart.yaml").read_text())
    chart |= {"version": PREVIOUS, "appVersion": PREVIOUS}
    (copy / "Chart.yaml").write_text(yaml.safe_dump(chart))
    values = yaml.safe_load((copy / "values.yaml").read_text())
    assert values["preStopSleepSeconds"] != PREVIOUS_PRE_STOP_SECS
    values["preStopSleepSeconds"] = PREVIOUS_PRE_STOP_SECS
    (copy / "values.yaml").write_text(yaml.safe_dump(values))
    return copy


def contents(plane: ControlPlane) -> set[str]:
    """Every object of the cluster that somebody made, as ``resource namespace/name``."""
    found: set[str] = set()
    for prefix, resource in resources(plane):
        if "list" not in resource["verbs"] or resource["name"].partition("/")[0] in UNCOUNTED:
            continue
        for item in plane.admin.call("GET", f"{prefix}/{resource['name']}")["items"]:
            metadata = item["metadata"]
            found.add(f"{resource['name']} {metadata.get('namespace', '')}/{metadata['name']}")
    return found


def resources(plane: ControlPlane) -> list[tuple[str, Object]]:
    """Path of the group and version, and description, of every resource the API server has."""
    groups = plane.admin.call("GET", "/apis")["groups"]
    prefixes = [
        "/api/v1",
        *(f"/apis/{version['groupVersion']}" for it in groups for version in it["versions"]),
    ]
    return [(prefix, it) for prefix in prefixes for it in plane.admin.call("GET", prefix)["resources"]]
