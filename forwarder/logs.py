"""Logging: one JSON line per event on stderr, secrets redacted, libraries included.

Levels: INFO a change of state, WARNING unexpected but nothing lost, ERROR loss or a person is needed. Never a
line per alert.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Annotated, Any, Literal, TextIO

import msgspec
import structlog

from forwarder.config import setting

REDACTED = "[redacted]"
VALUE_LENGTH_MAX = 4000
DEPTH_MAX = 6
LOOP_FAULT_SECS, KINDS_MAX, KIND_LENGTH_MAX = 10.0, 100, 200
_SECRET_KEY = re.compile(r"(?i)(secret|token|password|passwd|authorization|credential)")
_SECRET_TEXT = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"
    r"|(?<=://)[^/\s\"']+(?=@)"
)
_SECRET_PAIR = re.compile(
    r"(?i)((?:secret|token|password|passwd|authorization|credential|signature)[\w-]*"
    # AWS' names of errors are no secrets, and what follows is what a person needs.
    r"(?<!error)(?<!exception)(?<!tokenid)(?<!identitytoken)(?<!doesnotmatch)(?<!incompletesignature)[\"']?\s*[:=]\s*[\"']?"
    r"(?:bearer\s+|basic\s+)?)[^\s\"',;&}\])]+"
)


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the log."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        setting("Lowest level written; `debug` adds a line per batch."),
    ] = "info"


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace secrets by ``[redacted]``, at any depth, and cut endless values."""
    for key, value in event.items():
        if not key.startswith("_"):  # the formatter's own
            event[key] = _clean(key, value, 0)
    return event


def _clean(key: str, value: Any, depth: int) -> Any:
    if _SECRET_KEY.search(key):
        return REDACTED
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict) and depth < DEPTH_MAX:
        return {str(name): _clean(str(name), member, depth + 1) for name, member in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth < DEPTH_MAX:
        return [_clean("", member, depth + 1) for member in value]
    text = str(value)[:VALUE_LENGTH_MAX].encode("utf-8", "replace").decode()
    return _SECRET_PAIR.sub(rf"\1{REDACTED}", _SECRET_TEXT.sub(REDACTED, text))


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


class LoopFaults:
    """The event loop's own reports, each kind at most once in ten seconds.

    Out of file descriptors, asyncio reports a thousand failed accepts a second: the log would fill the disk the spool needs.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._told: dict[str, float] = {}
        self._silent: dict[str, int] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """For ``loop.set_exception_handler``."""
        kind = str(context.get("message", ""))[:KIND_LENGTH_MAX]
        now = self._now()
        if now - self._told.get(kind, -LOOP_FAULT_SECS) < LOOP_FAULT_SECS:
            self._silent[kind] = self._silent.get(kind, 0) + 1
            return
        if len(self._told) >= KINDS_MAX:
            self._told.clear()
            self._silent.clear()
        self._told[kind] = now
        if more := self._silent.pop(kind, 0):
            context = {**context, "message": f"{kind} (and {more} times since the last line)"}
        loop.default_exception_handler(context)
