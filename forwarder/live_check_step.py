"""One line of what ``falco-forwarder check --live`` prints."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """What was tried, and what came of it."""

    what: str
    ok: bool
    finding: str
    advice: str = ""
