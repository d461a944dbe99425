"""The record: one alert as the spool keeps it, complete enough to make sense hours later.

A record holds the sender's bytes (never re-encoded where that can be avoided, so integers beyond 64
bits, exponents and key order survive), what was decided at ingest, and what enrichment knew at that
moment. Records are written as a msgpack array in the order of the fields below; the layout is part of
the spool's schema (see ``spool_schema``): append fields with defaults, never reorder.
"""

from __future__ import annotations

import msgspec

ALERT = 0
"""A decoded Falco alert: ``body`` is its JSON object."""
TEXT = 1
"""An alert in Falco's text form: ``body`` is a JSON object made of it. For log sinks only."""
UNPARSED = 2
"""A body nobody could read, kept raw. For log sinks only, and never counted as an alert."""


HOSTNAME_USUAL_MAX = 16


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One spooled record."""

    kind: int
    id: str
    """The sender's uuid, or 32 hex digits of the body's SHA-256: the same bytes have the same id."""
    priority: int
    """Syslog rank: 0 Emergency ... 7 Debug."""
    time_ns: int
    """When Falco says it happened, UTC, nanoseconds since 1970; the time of receipt where it says nothing."""
    received_ns: int
    """When the receiver took it, UTC, nanoseconds since 1970."""
    internal: bool
    """Falco talking about itself (drops, metrics snapshots): never a finding."""
    body: bytes
    """UTF-8 JSON object without surrounding white space; the raw bytes for ``UNPARSED``."""
    enrichment: bytes = b""
    """Members of a JSON object without its braces (``"node":{...}``), or nothing."""
    notes: bytes = b""
    """Members for the event's ``forwarder`` object without braces (``"priority_unknown":true``), or nothing."""
    hostname: str = ""
    """Falco's hostname, for log stream names."""
    unresolved: bool = False
    """Enrichment did not find all it might: delivery asks once more."""
    peer: str = ""
    """Address the alert came from; kept only where it is unresolved."""

    @property
    def size_bytes(self) -> int:
        """Memory and spool room it takes, roughly and never too little."""
        texts = 4 * len(self.hostname) if len(self.hostname) > HOSTNAME_USUAL_MAX else 0
        return len(self.body) + len(self.enrichment) + len(self.notes) + len(self.peer) + texts + 170


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A record a sink will never accept, or a body the receiver could not read, with the reason."""

    sink: str
    """Name of the sink, or ``receiver`` for unparsable bodies."""
    id: str
    reason: str
    """Bounded word for metrics: ``invalid``, ``rejected``, ``unparsed`` ..."""
    detail: str
    """The service's (or the decoder's) own words."""
    at: float
    """When it was set aside, seconds since 1970."""
    body: bytes


def stream_name(template: str, *, replica: str, cluster: str, hostname: str, day: str) -> str:
    """Log stream of a record: ``{replica}``, ``{cluster}``, ``{hostname}`` and ``{date}`` filled in.

    CloudWatch Logs refuses ``:`` and ``*`` in stream names and takes 1 to 512 characters.
    """
    name = (
        template.replace("{replica}", replica)
        .replace("{cluster}", cluster)
        .replace("{hostname}", hostname or "unknown")
        .replace("{date}", day)
    )
    return name.replace(":", "_").replace("*", "_")[:512] or "unknown"
