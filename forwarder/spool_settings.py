"""Settings of the spool (section ``spool``)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from forwarder.config import setting


class SpoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the spool."""

    directory: Annotated[str, setting("Where the spool lives. One directory per replica.", min_length=1)] = (
        "/var/lib/falco-forwarder"
    )
    bytes_max: Annotated[
        int,
        setting(
            "Quota for waiting alerts and dead letters. Leave two fifths of the volume free: what is more is lowered.",
            unit="bytes",
            ge=1 << 20,
        ),
    ] = 1 << 30
    sync: Annotated[
        Literal["full", "normal"],
        setting(
            "`full` syncs before every answer and survives a power cut; `normal` survives a killed process, "
            "not a lost node: only for volumes a lost node takes with it anyway."
        ),
    ] = "full"
    dead_letter_retention_days: Annotated[
        int, setting("How long dead letters are kept.", unit="days", ge=1, le=3650)
    ] = 30
    unparsed_bytes_max: Annotated[
        int,
        setting("Room for bodies nobody could read; the oldest go first.", unit="bytes", ge=1 << 16),
    ] = 64 << 20
