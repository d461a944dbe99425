"""Writes the chart's dashboards, files/dashboards/*.json; ``--check`` only says whether they are current."""

# ruff: noqa: T201 - a program of the command line

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helm.dashboards.operations import operations
from helm.dashboards.security import security

FOLDER = Path(__file__).resolve().parents[1] / "falco-aws-forwarder/files/dashboards"


def texts() -> dict[Path, str]:
    """What should be in the files."""
    both = {"operations": operations(), "security": security()}
    return {FOLDER / f"{name}.json": json.dumps(it, indent=2) + "\n" for name, it in both.items()}


def main(arguments: list[str]) -> int:
    stale = [file for file, text in texts().items() if not file.exists() or file.read_text() != text]
    if "--check" in arguments:
        for file in stale:
            print(f"{file.name} is not current: make dashboards", file=sys.stderr)
        return 1 if stale else 0
    for file in stale:
        file.write_text(texts()[file])
        print(f"wrote {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
