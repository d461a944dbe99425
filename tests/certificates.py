"""Certificates for tests: authorities, and what they sign."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LIFE = dt.timedelta(days=2)


class Pair(NamedTuple):
    """Files of a certificate and its key, PEM."""

    cert: Path
    key: Path


class Authority:
    """Signs for 127.0.0.1 and for clients alike."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = name
        self.certificate = self._sign(name, self._key, is_authority=True)
        self.file = directory / f"{name}.crt"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def pair(
        self, name: str = "server", *, not_after: dt.datetime | None = None, password: bytes = b""
    ) -> Pair:
        """Write ``NAME.crt`` and ``NAME.key``, in the place of earlier ones."""
        key = ec.generate_private_key(ec.SECP256R1())
        signed = self._sign(name, key, not_after=not_after)
        pair = Pair(self._directory / f"{name}.crt", self._directory / f"{name}.key")
        pair.cert.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption(),
            )
        )
        return pair

    def trusted(self, shown: Pair | None = None) -> ssl.SSLContext:
        """A client's context that trusts this authority, and shows this certificate."""
        context = ssl.create_default_context(cafile=self.file)
        if shown:
            context.load_cert_chain(*shown)
        return context

    def _sign(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        *,
        not_after: dt.datetime | None = None,
        is_authority: bool = False,
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        until = not_after or now + LIFE
        subject, issuer = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, self._name)
        )
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, until) - LIFE)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
