"""What the runbooks tell people to type and to look for: that it is there, and does no harm. Run by `make monitoring-test`."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import aiobotocore.credentials
import pytest

from forwarder.delivery_status import Status
from forwarder.metrics import DISCARD_REASONS, STATES

ROOT = Path(__file__).resolve().parents[2]
FORWARDER = ROOT / "forwarder"
AT_START = {"spool_schema.py"}
"""Modules that speak before the first alert is taken: what they say is older than any hour."""
PAGES = sorted((ROOT / "docs/runbooks").glob("*.md"))
VALIDATE = ROOT / "docs/validate.md"
LOGS = re.compile(r"logs falco-aws-forwarder-0([^|\n]*)\| grep ((?:-\w+ )*)([\"'])(.*?)\3")
ADDRESS = re.compile(r"(?:curl [^\n]*?|-connect )([\w.-]+):(\d+)")


def messages() -> dict[str, set[str]]:
    """Module -> what it logs. The SDK says itself when it gets no new credentials."""
    found: dict[str, set[str]] = {}
    for file in [*FORWARDER.rglob("*.py"), Path(aiobotocore.credentials.__file__)]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                named = isinstance(node.func.value, ast.Name) and node.func.value.id
                of_log = named in {"log", "logger"} and node.func.attr != "debug"
                first = node.args[0]
                if of_log and isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.setdefault(file.name, set()).add(first.value)
    return found


def status_keys() -> set[str]:
    """Of everything a function called `status` puts together, and of a sink."""
    keys = set(Status._fields)
    for file in FORWARDER.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name == "status":
                for node in ast.walk(function):
                    if isinstance(node, ast.Dict):
                        keys |= {
                            key.value
                            for key in node.keys
                            if isinstance(key, ast.Constant) and isinstance(key.value, str)
                        }
    return keys


def commands(text: str) -> str:
    """The blocks of a shell, and what is between single backquotes."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`]+)`", rest)])


def test_what_is_searched_for_in_the_log_is_said_there() -> None:
    """Each alternative of each pattern is in a message, whole."""
    said = messages()
    assert sum(map(len, said.values())) > 40
    tried = 0
    for page in PAGES:
        for options, flags, _, pattern in LOGS.findall(page.read_text()):
            alternatives = pattern.split("|") if "E" in flags else [pattern]
            for alternative in alternatives:
                case = re.IGNORECASE if "i" in flags else 0
                sources = {
                    module
                    for module, texts in said.items()
                    if any(re.search(alternative, text, case) for text in texts)
                }
                assert sources, f"{page.name}: nobody logs {alternative!r}"
                assert not ("--since" in options and sources & AT_START), (
                    f"{page.name}: {alternative!r} is said at the start"
                )
                tried += 1
    assert tried >= 12, "the pattern finds the commands"


def test_what_is_said_to_be_in_status_is_there() -> None:
    known = status_keys() | set(STATES) | set(DISCARD_REASONS)
    assert {"sinks", "pending", "last_error", "oldest_secs", "enrichment", "trouble"} <= known
    tried: set[str] = set()
    for page in PAGES:
        text = textwrap.dedent(
            re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        )
        for sentence in re.split(r"(?<=[.?]) |\n\n|\n(?=- )", text):
            if "`/status`" in sentence:
                named = set(re.findall(r"`([a-z_]+)`", sentence))
                assert named <= known, f"{page.name}: {named - known}"
                tried |= named
    assert {"oldest_secs", "pending", "last_error", "rules"} <= tried


@pytest.mark.parametrize("page", [*PAGES, VALIDATE], ids=lambda page: page.stem)
def test_addresses_are_reached_from_where_the_reader_is(page: Path) -> None:
    """Names of Services do not resolve there, and the API server's proxy may be shut out: each port is forwarded first."""
    text = page.read_text()
    typed = commands(text)
    assert "get --raw" not in typed
    assert "/proxy/" not in typed
    forwarded: set[str] = set()
    for line in typed.splitlines():
        if "port-forward" in line:
            forwarded |= set(re.findall(r" (\d+)(?::\d+)?(?= |$)", line.replace("808$pod:8080", "8080 8081")))
        for host, port in ADDRESS.findall(line):
            assert host == "localhost", f"{host} is no name on the reader's machine"
            assert port in forwarded, f"{page.name}: {port} is not forwarded"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_ends_an_emptydir_is_said(page: Path) -> None:
    """Whoever deletes a pod, or changes what replaces pods, loses what waits in an emptyDir."""
    text = page.read_text()
    ends = re.search(r"delete pod |persistence\.size|spool\.size|spool\.bytes_max|raise the quota", text)
    if ends is not None:
        assert "emptyDir" in text, f"{page.name}: {ends[0]}"
    assert "more room" not in text.lower() or "persistence.enabled" in text
