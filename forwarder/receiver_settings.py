"""Settings of the receiver (section ``receiver``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from forwarder.config import setting


class ReceiverTlsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """TLS of the receiver. The files are read again when they change."""

    cert_file: Annotated[
        str,
        setting(
            "Certificate and its chain (PEM), read again when it changes; together with the key it turns TLS on."
        ),
    ] = ""
    key_file: Annotated[str, setting("Its private key (PEM), not encrypted.")] = ""
    client_ca_file: Annotated[
        str,
        setting(
            "Authorities (PEM). Where it is given, a sender must show a certificate one of them has signed: mutual TLS."
        ),
    ] = ""

    def faults(self) -> Iterator[tuple[str, str]]:
        if bool(self.cert_file) != bool(self.key_file):
            missing = "key_file" if self.cert_file else "cert_file"
            yield missing, "is required: certificate and key come together"
        if self.client_ca_file and not self.cert_file and not self.key_file:
            yield "client_ca_file", "needs cert_file and key_file: without TLS no sender shows a certificate"


class ReceiverAuthSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Basic authentication of senders."""

    credentials_file: Annotated[
        str,
        setting(
            "Lines `user:password`, read again when they change. Where it is given, a POST without one of them is answered 401."
        ),
    ] = ""


class ReceiverSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the receiver."""

    host: Annotated[str, setting("Address to listen on; all, IPv4 and IPv6, where it is empty.")] = ""
    port: Annotated[int, setting("Port Falco posts to; 0 takes a free one.", ge=0, le=65535)] = 2801
    body_bytes_max: Annotated[
        int, setting("Largest body; more is answered 413.", unit="bytes", ge=1024, le=64 << 20)
    ] = 4 << 20
    bodies_bytes_max: Annotated[
        int,
        setting(
            "Memory for bodies that arrive or wait for their answer; more is answered 503, unread.",
            unit="bytes",
            ge=1 << 20,
        ),
    ] = 64 << 20
    header_secs_max: Annotated[
        float, setting("Longest time for a header to arrive.", unit="seconds", gt=0)
    ] = 10.0
    body_secs_max: Annotated[float, setting("Longest time for a body to arrive.", unit="seconds", gt=0)] = (
        15.0
    )
    hold_secs_max: Annotated[
        float,
        setting(
            "With a full spool, how long an answer is held before 503. Above 2 s Falco logs that its outputs are blocked.",
            unit="seconds",
            ge=0,
            le=60,
        ),
    ] = 1.5
    connection_age_secs_max: Annotated[
        float,
        setting(
            "Age at which a connection is closed with its next answer, so that senders spread over replicas.",
            unit="seconds",
            gt=0,
        ),
    ] = 600.0
    connections_max: Annotated[int, setting("Open connections.", unit="connections", ge=1)] = 10_000
    drain_delay_secs: Annotated[
        float,
        setting(
            "After SIGTERM, how long new connections are still accepted while endpoints are withdrawn.",
            unit="seconds",
            ge=0,
            le=600,
        ),
    ] = 2.0
    tls: ReceiverTlsSettings = ReceiverTlsSettings()
    auth: ReceiverAuthSettings = ReceiverAuthSettings()

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.bodies_bytes_max < self.body_bytes_max:
            yield "bodies_bytes_max", f"must not be less than body_bytes_max ({self.body_bytes_max})"
