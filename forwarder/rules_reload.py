"""New rules without a restart: looks at the configuration file, and puts other rules in force when its content changes.

The content is compared, not a time: Kubernetes swaps a symbolic link when a ConfigMap changes, and the file may be away for a moment.
The whole file is loaded again, because a rule may be wrong only beside other settings. All of it or nothing: with a fault the old rules
stay in force. What else was changed takes effect at the next start, and is said.

Reading, parsing and compiling happen in a thread; the event loop only swaps.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import structlog

from forwarder.config import FILE_BYTES_MAX, ConfigError
from forwarder.rules import RuleBook, Rules
from forwarder.rules_settings import RuleSettings

PERIOD_SECS = 10.0
MISSING_LOOKS = 3
"""So many times in a row without the file are no swap of a mount any more."""

log = structlog.get_logger("rules")


class Configured(Protocol):
    """The whole configuration, as far as it is looked at here."""

    @property
    def rules(self) -> Sequence[RuleSettings]: ...


C = TypeVar("C", bound=Configured)


class RulesReload:
    """Keeps the rules of a book at what the file says."""

    def __init__(
        self,
        path: Path,
        book: RuleBook,
        started: Configured,
        *,
        load: Callable[[Path], Configured],
        reloaded: Callable[[bool], object],
        period_secs: float = PERIOD_SECS,
        in_thread: Callable[..., Any] = asyncio.to_thread,
    ) -> None:
        """``started`` is what the process started with; ``reloaded`` is told of every new content whether it was good."""
        self._path = path
        self._book = book
        self._started = started
        self._rules: Sequence[RuleSettings] = started.rules
        self._load = load
        self._reloaded = reloaded
        self._period_secs = period_secs
        self._in_thread = in_thread
        self._seen: bytes | None = None
        self._missing = 0
        self._ok = True
        self._other: list[str] = []

    async def run(self) -> None:
        """Look for ever."""
        while True:
            try:
                await self.look()
            except Exception:
                # A fault of ours must not end reloading, and is no reason to change rules that work.
                log.exception("reloading the rules failed, the old ones stay in force")
                self._report(ok=False)
            await asyncio.sleep(self._period_secs)

    async def look(self) -> None:
        """Look once. The first look is for what changed since the process read the file."""
        before = self._seen
        try:
            digest = await self._in_thread(_digest, self._path)
            if digest == before:
                self._missing = 0
                return
            self._seen = digest
            settings, rules = await self._in_thread(self._compiled)
        except OSError as error:
            self._seen = before
            self._is_missing(error)
        except ConfigError as error:
            faults = [str(fault) for fault in error.faults]
            log.error("the new configuration has faults, the old rules stay in force", faults=faults)
            self._report(ok=False)
        else:
            self._take(settings, rules, quietly=before is None and self._ok)

    def _compiled(self) -> tuple[Configured, Rules]:
        try:
            settings = self._load(self._path)
        except ConfigError:
            _digest(self._path)  # perhaps the file is only away for a moment
            raise
        return settings, self._book.compiled(settings.rules)

    def _take(self, settings: Configured, rules: Rules, *, quietly: bool) -> None:
        self._tell_of_the_rest(settings)
        if settings.rules != self._rules:
            self._rules = settings.rules
            self._book.put(rules)
        elif quietly:
            return
        log.info("rules reloaded", rules=len(rules))
        self._report(ok=True)

    def _is_missing(self, error: OSError) -> None:
        self._missing += 1
        if self._missing == MISSING_LOOKS:
            self._seen = None  # what comes back is read again, to say that all is well
            log.error(
                "the configuration cannot be read, the rules stay in force",
                file=str(self._path),
                error=error.strerror or str(error),
            )
            self._report(ok=False)

    def _report(self, *, ok: bool) -> None:
        self._ok = ok
        self._missing = 0 if ok else self._missing
        self._reloaded(ok)

    def _tell_of_the_rest(self, settings: Configured) -> None:
        other = _changed(self._started, settings)
        if other and other != self._other:
            log.warning("settings other than rules changed: takes effect at the next start", sections=other)
        self._other = other


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(FILE_BYTES_MAX + 1)).digest()


def _changed(old: Any, new: Any) -> list[str]:
    """Sections that differ, but for the rules."""
    names = [field.name for field in msgspec.structs.fields(old)]
    return [name for name in names if name != "rules" and getattr(old, name) != getattr(new, name)]
