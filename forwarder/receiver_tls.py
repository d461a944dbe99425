"""TLS of the receiver. The certificate may be renewed while senders are connected.

asyncio keeps the one context it was given, so that context hands each new connection to the one now in force. A renewed
pair is first loaded whole; only then new connections meet it. Those that stand keep theirs until their age ends them.

A handshake that fails reaches nobody in asyncio: no connection is made, nothing is logged. It is an alert that Falco could
not send, so it is counted here, by the class of the TLS object (``SSLContext.sslobject_class``).
"""

from __future__ import annotations

import datetime as dt
import ssl
import weakref
from collections.abc import Callable
from typing import Any, Self

from forwarder.metrics import HANDSHAKE_FAULTS
from forwarder.receiver_settings import ReceiverTlsSettings

_REASONS = {
    "HTTP_REQUEST": "plain_http",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
    "CERTIFICATE_VERIFY_FAILED": "untrusted_certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "refused_by_sender",
    "SSLV3_ALERT_BAD_CERTIFICATE": "refused_by_sender",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "refused_by_sender",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "refused_by_sender",
}
"""OpenSSL's reasons; the rest is ``other``."""
_UTC_TIME, _CONTEXT_0 = 0x17, 0xA0


class Tls(ssl.SSLContext):
    """What asyncio is given. ``failed`` hears of each handshake that failed, with a reason of ``HANDSHAKE_FAULTS``."""

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, settings: ReceiverTlsSettings, failed: Callable[[str], object]) -> None:
        self._settings = settings
        self._failed = failed
        self._shaking: weakref.WeakSet[ssl.SSLObject] = weakref.WeakSet()
        self._in_force: ssl.SSLContext | None = None
        self.expires_at = 0.0
        """Unix seconds at which the certificate in force expires."""

    @property
    def handshakes(self) -> int:
        """Connections that were accepted and are not yet a sender's."""
        return len(self._shaking)

    def load(self, cert: bytes) -> None:
        """Put what the files have now in force; ``cert`` is the content of the certificate's, read before.

        Raises ``ValueError`` (with the key of the setting) and leaves what was in force.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._settings.cert_file, self._settings.key_file, password=_no_password)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ValueError(f"receiver.tls.cert_file, key_file: {_fault(error)}") from None
        if self._settings.client_ca_file:
            try:
                context.load_verify_locations(self._settings.client_ca_file)
            except (ssl.SSLError, OSError) as error:
                raise ValueError(f"receiver.tls.client_ca_file: {_fault(error)}") from None
            context.verify_mode = ssl.CERT_REQUIRED
        try:
            expires_at = expiry(cert)
        except ValueError as error:
            raise ValueError(f"receiver.tls.cert_file: {error}") from None
        context.sslobject_class = self._watched_class()
        self._in_force, self.expires_at = context, expires_at

    def wrap_bio(self, *args: Any, **keys: Any) -> ssl.SSLObject:
        """A new connection, for the certificate in force."""
        assert self._in_force is not None  # noqa: S101 - for the type checker: loaded before the listener opens
        made = self._in_force.wrap_bio(*args, **keys)
        self._shaking.add(made)
        return made

    def _watched_class(self) -> type[ssl.SSLObject]:
        shaking, failed = self._shaking, self._failed

        class Watched(ssl.SSLObject):
            """Tells how its handshake ended."""

            def do_handshake(self) -> None:
                try:
                    super().do_handshake()
                except ssl.SSLWantReadError:
                    raise
                except ssl.SSLError as error:
                    shaking.discard(self)
                    reason = _REASONS.get(error.reason or "", "other")
                    assert reason in HANDSHAKE_FAULTS  # noqa: S101
                    failed(reason)
                    raise
                shaking.discard(self)

        return Watched


def expiry(pem: bytes) -> float:
    """``notAfter`` of the first certificate of a PEM file, in Unix seconds (RFC 5280, 4.1.2.5).

    Raises ``ValueError``. The standard library tells it of a peer's certificate only.
    """
    begin, end = ssl.PEM_HEADER.encode(), ssl.PEM_FOOTER.encode()
    start = pem.find(begin)
    stop = pem.find(end, start)
    if start < 0 or stop < 0:
        raise ValueError("has no PEM certificate")
    try:
        der = ssl.PEM_cert_to_DER_cert(pem[start : stop + len(end)].decode("ascii"))
        _, certificate = _element(der, 0)
        at = _element(der, certificate.start)[1].start
        tag, part = _element(der, at)  # version, where there is one
        if tag == _CONTEXT_0:
            at = part.stop
        for _ in range(3):  # serial number, signature, issuer
            at = _element(der, at)[1].stop
        validity = _element(der, at)[1]
        tag, not_after = _element(der, _element(der, validity.start)[1].stop)
        text = der[not_after.start : not_after.stop].decode("ascii")
        form = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
        return dt.datetime.strptime(text, form).replace(tzinfo=dt.UTC).timestamp()
    except (ValueError, IndexError):
        raise ValueError("has a certificate that cannot be read") from None


def _element(der: bytes, at: int) -> tuple[int, range]:
    """Tag of the DER element at ``at``, and where its content lies."""
    tag, size, begin = der[at], der[at + 1], at + 2
    if size >= 0x80:  # noqa: PLR2004 - the long form: so many bytes of length follow
        count = size - 0x80
        size = int.from_bytes(der[begin : begin + count], "big")
        begin += count
    if begin + size > len(der):
        raise ValueError("is cut off")
    return tag, range(begin, begin + size)


def _no_password() -> str:
    """Asked for an encrypted key; without this OpenSSL asks the terminal."""
    return ""


def _fault(error: Exception) -> str:
    reason = getattr(error, "reason", None) or ""
    if reason == "KEY_VALUES_MISMATCH":
        return "certificate and key do not belong together"
    if isinstance(error, ssl.SSLError):
        return f"no usable PEM{f' ({reason})' if reason else ''}; a key must not be encrypted"
    return getattr(error, "strerror", None) or str(error)
