"""helm-unittest with snapshots, and kube-score over everything rendered. Run by `make chart-test`."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tests.chart.rendering import CASES, CHART, objects_of, text_of, tool

LINTING = yaml.safe_load((Path(__file__).parent / "linting.yaml").read_text())
POLICY = ["networkPolicy.enabled=true"]
GOOD = 10
"""kube-score's grade; below it are warnings and worse."""


def test_units_and_snapshots(tmp_path: Path) -> None:
    """In a copy: a snapshot that is not there would be taken, and pass."""
    copy = tmp_path / CHART.name
    shutil.copytree(CHART, copy)
    done = tool("helm-unittest", "--strict", "--color=false", copy)
    assert done.returncode == 0, (
        f"{done.stdout}{done.stderr}\nafter a change on purpose: make chart-snapshots"
    )
    kept, taken = (_files(chart / "tests/__snapshot__") for chart in (CHART, copy))
    assert kept == taken, "make chart-snapshots"
    assert kept


def test_every_template_has_a_unit_test() -> None:
    told = "".join(it.read_text() for it in (CHART / "tests").glob("*_test.yaml"))
    for template in (CHART / "templates").rglob("*.yaml"):
        assert f"templates/{template.relative_to(CHART / 'templates')}" in told, template.name


def test_a_unit_test_can_fail(tmp_path: Path) -> None:
    copy = tmp_path / CHART.name
    shutil.copytree(CHART, copy)
    workload = copy / "templates/workload.yaml"
    workload.write_text(
        workload.read_text().replace("podManagementPolicy: Parallel", "podManagementPolicy: OrderedReady")
    )
    done = tool("helm-unittest", "--strict", "--color=false", copy)
    assert done.returncode != 0
    assert "OrderedReady" in done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def test_kube_score_finds_nothing_but_what_is_explained(case: Path) -> None:
    assert [it for it in _found(text_of(case, sets=POLICY)) if not _explained(*it)] == []


def test_every_exception_is_needed() -> None:
    found = {(test, name) for case in CASES for test, name, _ in _found(text_of(case, sets=POLICY))}
    for it in LINTING["exceptions"]:
        assert any(test == it["test"] and fnmatch(name, it["objects"]) for test, name in found), it["test"]
        assert it["reason"]


def test_kube_score_is_awake() -> None:
    text = text_of(CASES[0], sets=POLICY)
    for right, wrong, test in (
        (
            "readOnlyRootFilesystem: true",
            "readOnlyRootFilesystem: false",
            "container-security-context-readonlyrootfilesystem",
        ),
        ("falco-aws-forwarder:0.1.0", "falco-aws-forwarder:latest", "container-image-tag"),
        ("seccompProfile:", "otherProfile:", "container-seccomp-profile"),
    ):
        assert right in text
        found = [it for it in _found(text.replace(right, wrong)) if not _explained(*it)]
        assert any(it[0] == test for it in found), (wrong, found)


def test_rendered_objects_are_those_that_were_linted() -> None:
    """kube-score says nothing of objects it does not know; it must have seen the workload of every case."""
    for case in CASES:
        kinds = {it["kind"] for it in objects_of(case)}
        names = {name.partition("/")[0] for name in _seen(text_of(case, sets=POLICY))}
        assert kinds & {"StatefulSet", "DaemonSet"} <= names, case.name


def _score(text: str) -> list[dict[str, object]]:
    optional = [argument for test in LINTING["optional"] for argument in ("--enable-optional-test", test)]
    done = tool(
        "kube-score",
        "score",
        "--output-format",
        "json",
        "--kubernetes-version",
        "v1.30",
        *LINTING["flags"],
        *optional,
        "-",
        stdin=text,
    )
    assert done.stdout.startswith("["), done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def _found(text: str) -> list[tuple[str, str, str]]:
    """Test, object and what is said, of all that is less than good."""
    return [
        (check["check"]["id"], _name(item), "; ".join(it["summary"] for it in check["comments"] or []))
        for item in _score(text)
        for check in item["checks"]  # type: ignore[attr-defined]  # as kube-score writes it
        if not check["skipped"] and check["grade"] < GOOD
    ]


def _seen(text: str) -> set[str]:
    return {_name(item) for item in _score(text)}


def _name(item: dict[str, object]) -> str:
    kind = item["type_meta"]["kind"]  # type: ignore[index]
    return f"{kind}/{item['object_meta']['name']}"  # type: ignore[index]


def _explained(test: str, name: str, _: str) -> bool:
    return any(it["test"] == test and fnmatch(name, it["objects"]) for it in LINTING["exceptions"])


def _files(folder: Path) -> dict[str, str]:
    return {it.name: it.read_text() for it in folder.glob("*")}
