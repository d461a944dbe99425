"""Logging: one JSON line per event on stderr, secrets redacted, libraries included.

Levels: INFO a change of state, WARNING unexpected but nothing lost, ERROR loss or a person is needed. Never a
line per alert.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Annotated, Any, Literal, TextIO

import msgspec
import structlog

from forwarder.config import setting

REDACTED = "[redacted]"
VALUE_LENGTH_MAX = 4000
_SECRET_KEY = re.compile(r"(?i)(secret|token|password|passwd|authorization|credential)")
_SECRET_TEXT = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"
    r"|(?<=://)[^/\s@]+(?=@)"
    r"|(?i:(?<=x-amz-security-token=)|(?<=signature=))[A-Za-z0-9%/+=]+"
)


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the log."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        setting("Lowest level written; `debug` adds a line per batch."),
    ] = "info"


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace secrets by ``[redacted]`` and cut endless values."""
    for key, value in event.items():
        if _SECRET_KEY.search(key):
            event[key] = REDACTED
        elif isinstance(value, str):
            event[key] = _SECRET_TEXT.sub(REDACTED, value)[:VALUE_LENGTH_MAX]
    return event


def configure(level: str, stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's logging for the process."""
    shared: list[Any] = [
        structlog.stdlib.add_logger_name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redact,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(serializer=_serialise),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for library in ("botocore", "aiobotocore", "aiohttp", "asyncio"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _serialise(event: Any, **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=str, order="deterministic").decode()
