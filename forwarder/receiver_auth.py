"""Basic authentication of senders: all that Falco can do besides a client certificate, by the userinfo of its URL.

The file has a line ``user:password`` for each sender; two lines for one user while a password is changed. Empty lines
and lines that begin with ``#`` do not count. Only digests of the lines are kept, and what a sender says is compared as a
digest too: how long that takes tells nothing about a password.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

CREDENTIALS_MAX = 1000
SCHEME = "basic "


class Credentials:
    """Who may post. Immutable: a changed file makes a new one."""

    def __init__(self, content: bytes) -> None:
        """Raises ``ValueError`` with what is wrong with the file; passwords are not in it."""
        try:
            lines = [line.rstrip("\r") for line in content.decode("utf-8-sig").split("\n")]
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8 text") from None
        given = [
            (number, line)
            for number, line in enumerate(lines, 1)
            if line.strip() and not line.startswith("#")
        ]
        for number, line in given:
            user, colon, password = line.partition(":")
            if not (user and colon and password):
                raise ValueError(f"line {number} is not user:password")
        if not given:
            raise ValueError("has no line of the form user:password, so nobody could post")
        if len(given) > CREDENTIALS_MAX:
            raise ValueError(f"has {len(given)} lines, {CREDENTIALS_MAX} are allowed")
        self._digests = frozenset(_digest(line.encode()) for _, line in given)

    def __len__(self) -> int:
        return len(self._digests)

    def refuses(self, header: str | None) -> str:
        """Why a request with this ``Authorization`` may not post (a label of the metric), or nothing."""
        if header is None:
            return "missing"
        if header[: len(SCHEME)].lower() != SCHEME:
            return "wrong"
        try:
            said = base64.b64decode(header[len(SCHEME) :].strip(), validate=True)
        except (binascii.Error, ValueError):
            return "wrong"
        return "" if _digest(said) in self._digests else "wrong"


def _digest(said: bytes) -> bytes:
    return hashlib.sha256(said).digest()
