"""The files behind the receiver's TLS and authentication, and a look at them every ten seconds.

Certificates are renewed and passwords changed while we run (cert-manager, a Secret): contents are compared, not times, because
Kubernetes swaps a symbolic link. All of one kind or nothing: with a fault, also that of a swap seen half way, what was in
force stays, is told in the log and by the gauge ``receiver_files_ok``, and is tried again at the next look.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from forwarder.metrics import Metrics
from forwarder.receiver_auth import Credentials
from forwarder.receiver_connection import address_of
from forwarder.receiver_settings import ReceiverSettings
from forwarder.receiver_tls import Tls

PERIOD_SECS = 10.0
TELL_SECS = 60.0
FILE_BYTES_MAX = 1 << 20

log = structlog.get_logger("receiver")


class ReceiverFilesError(OSError):
    """The receiver cannot start: what is wrong with each of its files."""


class ReceiverFiles:
    """TLS and credentials in force; ``None`` where they are not configured."""

    def __init__(
        self,
        settings: ReceiverSettings,
        metrics: Metrics,
        *,
        period_secs: float = PERIOD_SECS,
        in_thread: Callable[..., Any] = asyncio.to_thread,
    ) -> None:
        self._metrics = metrics
        self._period_secs = period_secs
        self._in_thread = in_thread
        self._faults: list[str] = []
        self._seen: dict[str, bytes] = {}
        tls, auth = settings.tls, settings.auth
        self.tls = Tls(tls, self._handshake_failed) if tls.cert_file else None
        self._told_at = -math.inf
        self.credentials: Credentials | None = None
        self._kinds = [
            ("receiver.tls", ["cert_file", "key_file", "client_ca_file"], tls, self._load_tls),
            ("receiver.auth", ["credentials_file"], auth, self._load_credentials),
        ]

    async def load(self) -> None:
        """For the start: raises ``ReceiverFilesError`` with every fault."""
        await self._look()
        if self._faults:
            raise ReceiverFilesError("; ".join(self._faults))

    async def run(self) -> None:
        """Look for ever; the first look was the start's."""
        while True:
            await asyncio.sleep(self._period_secs)
            try:
                await self.look()
            except Exception:
                # A fault of ours must not end renewal.
                log.exception("looking at the receiver's files failed")

    async def look(self) -> None:
        """Look once, put in force what is new and good, and say so."""
        before = self._faults
        changed = await self._look()
        if self._faults and self._faults != before:
            log.error("the receiver's files have faults", faults=self._faults)
        elif changed:
            log.info("the receiver's files are in force", sections=changed)

    async def _look(self) -> list[str]:
        changed: list[str]
        changed, self._faults = await self._in_thread(self._take)
        self._metrics.receiver_files_ok.set(not self._faults)
        if self.tls is not None and self.tls.expires_at:
            self._metrics.certificate_expires.set(self.tls.expires_at)
        return changed

    def _handshake_failed(self, reason: str, transport: asyncio.BaseTransport) -> None:
        self._metrics.handshakes_failed[reason].inc()
        now = asyncio.get_running_loop().time()
        if reason != "left" and now >= self._told_at + TELL_SECS:
            self._told_at = now
            log.warning(
                "TLS handshake failed: what was to be sent is lost", reason=reason, peer=address_of(transport)
            )

    def _take(self) -> tuple[list[str], list[str]]:
        """The sections with new files, and the faults of all."""
        changed: list[str] = []
        faults: list[str] = []
        for section, names, settings, load in self._kinds:
            given = {f"{section}.{name}": path for name in names if (path := getattr(settings, name))}
            contents: dict[str, bytes] = {}
            try:
                for key, path in given.items():
                    contents[key] = _read(key, Path(path))
                digest = hashlib.sha256(
                    b"".join(hashlib.sha256(part).digest() for part in contents.values())
                ).digest()
                if contents and digest != self._seen.get(section):
                    load(contents)
                    self._seen[section] = digest
                    changed.append(section)
            except ValueError as error:
                faults.append(str(error))
        return changed, faults

    def _load_tls(self, contents: dict[str, bytes]) -> None:
        assert self.tls is not None  # noqa: S101 - for the type checker: it has files
        self.tls.load(contents["receiver.tls.cert_file"])

    def _load_credentials(self, contents: dict[str, bytes]) -> None:
        ((key, content),) = contents.items()
        try:
            self.credentials = Credentials(content)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None  # no colon: logs would redact what follows


def _read(key: str, path: Path) -> bytes:
    """The content of a file; raises ``ValueError``. Nothing but a regular file: a pipe would keep us for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{key} ({path}): is no regular file")
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(f"{key} ({path}): {error.strerror or error}") from None
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"{key} ({path}): larger than {FILE_BYTES_MAX} bytes")
    return content
