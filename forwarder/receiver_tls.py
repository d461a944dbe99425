"""TLS of the receiver: the certificate in force, and the handshakes.

The certificate may be renewed while senders are connected: a renewed pair is first loaded whole; only then new connections meet it.
Those that stand keep theirs until their age ends them.

The listener accepts plain connections, and each has its handshake here (``Handshake``) before it becomes a sender's: asyncio's
own listener would tell nobody of one that failed, and an alert that Falco could not send is what people must hear of. A
handshake has ``header_secs_max``; of more than ``HANDSHAKES_MAX`` at a time the oldest goes, so that connections that never speak
do not keep Falco out.

With client certificates no session is resumed: a ticket would let a sender in after its certificate has expired.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from asyncio import sslproto
from collections.abc import Callable
from typing import Any

from forwarder.metrics import HANDSHAKE_FAULTS
from forwarder.receiver_settings import ReceiverTlsSettings

HANDSHAKES_MAX = 256
GOODBYE_SECS_MAX = 2.0
BUFFER_BYTES = 32 << 10
"""asyncio takes 256 KiB for every TLS connection; a TLS record has 16 KiB at most."""

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


class Tls:
    """The certificate in force."""

    def __init__(
        self, settings: ReceiverTlsSettings, failed: Callable[[str, asyncio.BaseTransport], object]
    ) -> None:
        """``failed`` hears of each handshake that failed: a reason of ``HANDSHAKE_FAULTS``, and whose it was."""
        self._settings = settings
        self._failed = failed
        self.context: ssl.SSLContext | None = None
        self.expires_at = 0.0
        """Unix seconds at which the certificate in force expires."""
        self.handshakes: dict[Handshake, None] = {}
        """Under way, the oldest first."""
        sslproto.SSLProtocol.max_size = BUFFER_BYTES

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
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        try:
            expires_at = expiry(cert)
        except ValueError as error:
            raise ValueError(f"receiver.tls.cert_file: {error}") from None
        self.context, self.expires_at = context, expires_at

    def began(self, handshake: Handshake) -> None:
        """Count it; where there are too many, the oldest goes."""
        self.handshakes[handshake] = None
        if len(self.handshakes) > HANDSHAKES_MAX:
            next(iter(self.handshakes)).give_up()

    def ended(self, handshake: Handshake) -> None:
        self.handshakes.pop(handshake, None)

    def failed(self, error: Exception, transport: asyncio.BaseTransport) -> None:
        """An error that is none of TLS: the other side left, or said nothing in time."""
        reason = "left"
        if isinstance(error, ssl.SSLError):
            reason = _REASONS.get(error.reason or "", "other")
        assert reason in HANDSHAKE_FAULTS  # noqa: S101
        self._failed(reason, transport)


class Handshake(asyncio.Protocol):
    """A connection that is not a sender's yet. What comes right behind the handshake is kept for the one it becomes."""

    def __init__(self, tls: Tls, *, secs_max: float, becomes: Callable[[], asyncio.Protocol]) -> None:
        """``becomes`` makes the protocol that takes over."""
        self._tls = tls
        self._secs_max = secs_max
        self._becomes = becomes
        self._data = bytearray()
        self._lost = self._eof = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker: a TCP listener's
        transport.pause_reading()  # not a byte before there is somebody who understands it
        self._transport = transport
        self._tls.began(self)
        self._task = asyncio.get_running_loop().create_task(self._shake(), name="TLS handshake")

    def data_received(self, data: bytes) -> None:
        self._data += data

    def eof_received(self) -> bool:
        self._eof = True
        return False

    def connection_lost(self, exc: BaseException | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        self._lost = True

    def give_up(self) -> None:
        """Make room: whoever took so long is nobody."""
        self._tls.ended(self)
        self._transport.abort()

    async def _shake(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._tls.context is not None  # noqa: S101 - for the type checker: loaded before the listener opens
        secured: Any = None
        try:
            if self._lost:
                raise ConnectionResetError
            secured = await loop.start_tls(
                self._transport,
                self,
                self._tls.context,
                server_side=True,
                ssl_handshake_timeout=self._secs_max,
                ssl_shutdown_timeout=GOODBYE_SECS_MAX,
            )
        except (OSError, TimeoutError) as error:
            self._tls.failed(error, self._transport)
        finally:
            self._tls.ended(self)
            if secured is None:
                self._transport.abort()
        if secured is None or self._lost:
            return
        protocol = self._becomes()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if self._data:
            protocol.data_received(bytes(self._data))
        if self._eof:
            protocol.eof_received()


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
