"""Where the Kubernetes API is, and as whom we ask: the pod's own service account, or a kubeconfig.

Tokens and the CA's certificate change while the service runs (the kubelet rotates them; EKS refuses tokens older than 90 days), so
their files are read again: every ``REREAD_SECS``, and at once after a 401. A kubeconfig itself is read once. All reading happens in a thread: a volume may be slow.

A kubeconfig may give a token, a file with one, or a client certificate. Plug-ins that run a program (``exec``) and the old
providers are refused with a clear word: the image has no shell.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import ssl
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
READ_SECS_MAX = 10.0
REREAD_SECS = 50.0
"""A minute less ten seconds of leeway, as the Go client does."""
FILE_BYTES_MAX = 1 << 20


class AccessError(Exception):
    """The API cannot be asked; the message says what is missing."""


class Source(NamedTuple):
    """Where to find what a request needs. Paths are read again and again, texts stay."""

    server: str
    token: str = ""
    token_file: Path | None = None
    ca_file: Path | None = None
    ca_data: str = ""
    certificate: str = ""
    key: str = ""
    server_name: str | None = None
    verify: bool = True


class Credentials(NamedTuple):
    """What a request carries now."""

    token: str
    tls: ssl.SSLContext | bool
    """``True`` for plain HTTP, where it means nothing."""


class Access:
    """Credentials, kept fresh."""

    def __init__(self, source: Source, monotonic: Any) -> None:
        self.source = source
        self._monotonic = monotonic
        self._read_at = float("-inf")
        self._marks: tuple[float, ...] | None = None
        self._tls: ssl.SSLContext | bool = True
        self._token = ""
        self._reading = asyncio.Lock()

    async def credentials(self) -> Credentials:
        """What to send now; raises ``AccessError`` where a file is missing."""
        async with self._reading:
            if self._monotonic() - self._read_at >= REREAD_SECS:
                try:
                    async with asyncio.timeout(READ_SECS_MAX):
                        await asyncio.to_thread(self._read)
                except TimeoutError:
                    raise AccessError("credentials cannot be read: their volume does not answer") from None
                self._read_at = self._monotonic()
        return Credentials(self._token, self._tls)

    def refused(self) -> None:
        """The API server did not know us (401): read again before the next request."""
        self._read_at = float("-inf")

    def _read(self) -> None:
        source = self.source
        try:
            self._token = _text(source.token_file).strip() if source.token_file is not None else source.token
            if source.server.startswith("https:"):
                marks = (source.ca_file.stat().st_mtime_ns,) if source.ca_file is not None else ()
                if self._marks != marks:
                    self._tls = _context(source)
                    self._marks = marks
        except (OSError, ssl.SSLError, ValueError) as error:
            raise AccessError(f"credentials cannot be read: {error}") from error


def find_source(
    kubeconfig: str, environment: Mapping[str, str], account: Path = SERVICE_ACCOUNT
) -> Source | None:
    """The source to use: the named kubeconfig, KUBECONFIG, the pod's service account, or None where there is none.

    Raises:
        AccessError: there is one, and it cannot be used.

    """
    path = kubeconfig or environment.get("KUBECONFIG", "")
    if os.pathsep in path:
        raise AccessError(f"KUBECONFIG names several files ({path}): name one")
    if path:
        return read_kubeconfig(Path(path))
    host, port = (
        environment.get("KUBERNETES_SERVICE_HOST", ""),
        environment.get("KUBERNETES_SERVICE_PORT", "443"),
    )
    try:
        if not host or not (account / "token").exists():
            return None
    except OSError as error:
        raise AccessError(f"{account / 'token'} cannot be read: {error.strerror}") from error
    return Source(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        token_file=account / "token",
        ca_file=account / "ca.crt",
    )


def read_kubeconfig(path: Path) -> Source:
    """The current context of a kubeconfig; raises ``AccessError``."""
    try:
        data = yaml.safe_load(_text(path))
        context = _named(data, "contexts", "context", data["current-context"])
        cluster = _named(data, "clusters", "cluster", context["cluster"])
        user = _named(data, "users", "user", context["user"]) if context.get("user") else {}
        return _source(path.parent, cluster, user)
    except OSError as error:
        raise AccessError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        # Not the parser's own words: they quote the line, which may be the token's.
        mark = getattr(error, "problem_mark", None)
        raise AccessError(f"{path} is not valid YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    except RecursionError:
        raise AccessError(f"{path} is nested too deeply") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise AccessError(f"{path} is no usable kubeconfig: {text}") from error


def _source(folder: Path, cluster: Mapping[str, Any], user: Mapping[str, Any]) -> Source:
    for refused in ("exec", "auth-provider"):
        if refused in user:
            raise AccessError(
                f"kubeconfig users with {refused!r} are not supported: use a token or a certificate"
            )
    server = str(cluster["server"]).rstrip("/")
    if not server.startswith(("https://", "http://")):
        raise AccessError(f"server {server!r} is neither https:// nor http://")
    token_file = user.get("tokenFile")
    ca_data = _decoded(cluster.get("certificate-authority-data"))
    ca_file = None if ca_data else cluster.get("certificate-authority")
    return Source(
        server=server,
        token=str(user.get("token", "")),
        token_file=folder / token_file if token_file else None,
        ca_file=folder / ca_file if ca_file else None,
        ca_data=ca_data,
        certificate=_decoded(user.get("client-certificate-data"))
        or _file(folder, user.get("client-certificate")),
        key=_decoded(user.get("client-key-data")) or _file(folder, user.get("client-key")),
        server_name=cluster.get("tls-server-name"),
        verify=cluster.get("insecure-skip-tls-verify") is not True,
    )


def _named(data: Mapping[str, Any], group: str, member: str, name: str) -> Mapping[str, Any]:
    for item in data[group]:
        if item["name"] == name:
            found: Mapping[str, Any] = item[member]
            return found
    raise AccessError(f"kubeconfig has no {member} {name!r}")


def _context(source: Source) -> ssl.SSLContext:
    context = ssl.create_default_context(
        cafile=str(source.ca_file) if source.ca_file is not None else None, cadata=source.ca_data or None
    )
    if not source.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if source.certificate:
        # OpenSSL takes a client's certificate from a file only.
        with tempfile.TemporaryDirectory() as folder:
            chain = Path(folder, "client.pem")
            chain.touch(0o600)
            chain.write_text(f"{source.certificate}\n{source.key}\n")
            context.load_cert_chain(chain)
    return context


def _decoded(data: object) -> str:
    if not data:
        return ""
    with contextlib.suppress(binascii.Error, UnicodeDecodeError):
        return base64.b64decode("".join(str(data).split()), validate=True).decode()
    raise ValueError("certificate or key data is not base64 of text")


def _file(folder: Path, name: object) -> str:
    return _text(folder / str(name)) if name else ""


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(FILE_BYTES_MAX).decode()
