"""Times as Falco writes them, and as AWS wants them. Pure, and quick: every alert has one.

Falco's are RFC 3339 with nine digits of fraction in UTC; falcosidekick drops trailing zeros; other senders have
offsets. Nanoseconds are integers here and never floats.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache

FALCO_TIME_LENGTH = 30
"""``2026-11-20T22:58:03.161518126Z``: nine digits of fraction, always."""

SECONDS_MAX = 9_220_000_000
"""Years 1678 to 2262: nanoseconds fit into 64 bits. Other times count as absent; Falco's text stays as it is."""

_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:[.,](\d{1,9})\d*)?\s*(Z|z|[+-]\d\d:?\d\d)?\s*\Z", re.ASCII
)
_SECOND = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\Z", re.ASCII)


def time_ns(text: str) -> int | None:
    """Nanoseconds since 1970 of an RFC 3339 time (fraction of any length, any offset), or None."""
    if len(text) == FALCO_TIME_LENGTH and text[19] == "." and text[29] == "Z":
        seconds, fraction = _seconds(text[:19]), text[20:29]
        if seconds is not None and fraction.isdecimal() and fraction.isascii():
            return seconds * 1_000_000_000 + int(fraction)
    return _any_time_ns(text)


def _any_time_ns(text: str) -> int | None:
    match = _TIME.match(text)
    if match is None:
        return None
    day, clock, rest, zone = match.groups()
    seconds = _seconds(f"{day}T{clock}")
    if seconds is None:
        return None
    if zone and zone not in "Zz":
        offset = int(zone[1:3]) * 3600 + int(zone[-2:]) * 60
        seconds -= offset if zone[0] == "+" else -offset
    return seconds * 1_000_000_000 + (int(rest.ljust(9, "0")) if rest else 0)


@lru_cache(maxsize=4096)
def _seconds(text: str) -> int | None:
    """Of ``YYYY-MM-DDTHH:MM:SS``; alerts come many to the second."""
    if _SECOND.match(text) is None:
        return None
    try:
        seconds = int(datetime.fromisoformat(f"{text}+00:00").timestamp())
    except ValueError:
        return None
    return seconds if abs(seconds) < SECONDS_MAX else None


def iso_milliseconds(nanoseconds: int) -> str:
    """``2026-11-20T09:00:00.123Z`` of nanoseconds since 1970, kept within years 1970 to 9999."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{_iso_seconds(seconds)}.{rest // 1_000_000:03d}Z"


@lru_cache(maxsize=4096)
def _iso_seconds(seconds: int) -> str:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=min(max(seconds, 0), 253_402_300_799))
    return moment.strftime("%Y-%m-%dT%H:%M:%S")
