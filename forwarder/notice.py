"""The notice: something the forwarder itself has to say in a finding, for as long as it is true. Pure.

It is no alert: it is not spooled and never reaches a log sink. Its record is made up so that the mapping of findings needs no second way.
"""

from __future__ import annotations

from typing import NamedTuple

from forwarder.record import Record


class Notice(NamedTuple):
    """A state of something, to be told: telling it twice does no harm."""

    key: str
    """The stable part of the finding's Id: ``sensor/<node>``."""
    title: str
    severity: str
    """ASFF label."""
    active: bool
    """False: it is over, archive the finding."""
    record: Record
