"""Docs cannot drift: what they say of keys, metrics, commands and sinks is compared with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from forwarder.__main__ import parser
from forwarder.metrics import Metrics
from forwarder.sensors_metrics import FAMILIES
from forwarder.sinks import SINKS, sink_class

ROOT = Path(__file__).parent.parent
FILES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "helm").rglob("*.md")),
]
LINES_MAX = 400


def test_generated_docs_are_current() -> None:
    """`make docs` was run after the last change of a setting or metric."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_metric_named_in_the_docs_exists() -> None:
    known = {family.name for family in FAMILIES}
    for family in Metrics(SINKS).registry.collect():
        known |= {family.name, f"{family.name}_total", *(sample.name for sample in family.samples)}
    for file in FILES:
        for name in re.findall(r"falco_forwarder_[a-z0-9_]+", file.read_text()):
            assert name in known, f"{file.name}: {name}"


def test_every_sink_is_in_readme_and_sink_docs() -> None:
    for name in SINKS:
        assert name in (ROOT / "README.md").read_text()
        assert name in (ROOT / "docs" / "sinks.md").read_text()
        assert sink_class(name).settings_type.__doc__


def test_every_command_is_in_the_readme() -> None:
    (commands,) = (action for action in parser()._actions if action.dest == "command")
    for command in commands.choices or ():
        assert f"falco-forwarder {command}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_links_between_docs_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", file.read_text()):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target


def test_no_source_file_is_too_long() -> None:
    """Where a stranger would get lost first."""
    longer = {
        file.name: count
        for file in (ROOT / "forwarder").rglob("*.py")
        if (count := len(file.read_text().splitlines())) > LINES_MAX
    }
    assert not longer
