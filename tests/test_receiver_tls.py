"""TLS, client certificates and credentials on the receiver, from outside."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import io
import os
import socket
import ssl
from asyncio import sslproto
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder import receiver_tls
from forwarder.app import Application
from forwarder.receiver_auth import Credentials
from forwarder.receiver_files import ReceiverFilesError
from forwarder.receiver_tls import expiry
from tests.certificates import Authority
from tests.falco import get, send_raw
from tests.running import Running, Start, replace, settings_of
from tests.samples import REAL_BODIES as ALERTS

USERINFO = "falco:s3cret"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def tls(authority: Authority, **more: Any) -> dict[str, Any]:
    pair = authority.pair()
    return {"receiver.tls": {"cert_file": str(pair.cert), "key_file": str(pair.key), **more}}


def auth(directory: Path, text: str) -> dict[str, Any]:
    file = directory / "credentials"
    file.write_text(text)
    return {"receiver.auth": {"credentials_file": str(file)}}


async def test_alerts_over_tls(forwarder: Start, authority: Authority) -> None:
    running = await forwarder(tls(authority))
    async with running.falco(tls=authority.trusted()) as falco:
        answers = [await falco.post(alert) for alert in ALERTS]
    assert {answer.status for answer in answers} == {200}
    assert falco.connections == 1
    await running.at_rest()
    scrape = await running.scrape()
    assert scrape.broken_law() == {}
    assert scrape.total("stored_events_total") == len(ALERTS)
    assert scrape.total("tls_handshakes_failed_total") == 0


async def test_old_falco_over_tls(forwarder: Start, authority: Authority) -> None:
    """Up to 0.35: a connection and a handshake for every alert."""
    running = await forwarder(tls(authority))
    async with running.falco(tls=authority.trusted(), reuse=False) as falco:
        assert [(await falco.post(alert)).status for alert in ALERTS[:5]] == [200] * 5
    assert falco.connections == 5
    await running.until(lambda: not running.app.receiver.server.connections)


async def failed(running: Running, reason: str) -> None:
    """Wait for the count: the server hears of some refusals after the client has gone."""
    count = running.app.metrics.handshakes_failed[reason]
    await running.until(lambda: count._value.get() == 1)
    assert (await running.scrape()).total("tls_handshakes_failed_total") == 1
    assert running.app.files.tls is not None
    await running.until(lambda: not running.app.files.tls.handshakes)  # type: ignore[union-attr]


async def test_plain_http_to_a_tls_port(
    forwarder: Start, authority: Authority, log_lines: io.StringIO
) -> None:
    running = await forwarder(tls(authority))
    with pytest.raises(ConnectionError):
        await running.post(ALERTS[0])
    await failed(running, "plain_http")
    with pytest.raises(ConnectionError):
        await running.post(ALERTS[0])
    assert log_lines.getvalue().count("TLS handshake failed") == 1  # a line a minute


async def test_a_sender_that_does_not_trust_us(
    forwarder: Start, authority: Authority, tmp_path: Path
) -> None:
    running = await forwarder(tls(authority))
    other = Authority(tmp_path, "other").trusted()

    def connect() -> None:
        """As libcurl does: OpenSSL on the socket itself says why it leaves. asyncio's client just leaves."""
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as plain:
            other.wrap_socket(plain, server_hostname="127.0.0.1")

    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.to_thread(connect)
    await failed(running, "refused_by_sender")


async def test_client_certificates(forwarder: Start, authority: Authority, tmp_path: Path) -> None:
    """Only a sender with a certificate of the client authority may post."""
    senders, strangers = Authority(tmp_path, "senders"), Authority(tmp_path, "strangers")
    running = await forwarder(tls(authority, client_ca_file=str(senders.file)))
    async with running.falco(tls=authority.trusted(senders.pair("falco"))) as falco:
        assert (await falco.post(ALERTS[0])).status == 200
    count = running.app.metrics.handshakes_failed
    for shown, reason in (
        (None, "no_certificate"),
        (strangers.pair("stranger"), "untrusted_certificate"),
    ):
        async with running.falco(tls=authority.trusted(shown)) as falco:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await falco.post(ALERTS[0])
        await running.until(partial(_is_one, count[reason]))
    assert (await running.scrape()).total("stored_events_total") == 1


def _is_one(counter: Any) -> bool:
    return bool(counter._value.get() == 1)


async def test_a_renewed_certificate_needs_no_restart(
    forwarder: Start, authority: Authority, impatient: None, log_lines: io.StringIO
) -> None:
    running = await forwarder(tls(authority))
    before = (await running.scrape()).total("certificate_expires_timestamp_seconds")
    async with running.falco(tls=authority.trusted()) as old, running.falco(tls=authority.trusted()) as new:
        assert (await old.post(ALERTS[0])).status == 200
        until = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=90)
        authority.pair(not_after=until)
        await running.until(lambda: running.app.files.tls.expires_at == until.timestamp())  # type: ignore[union-attr]
        assert (await new.post(ALERTS[1])).status == 200
        assert new._streams is not None
        shown = new._streams[1].get_extra_info("peercert")["notAfter"]
        assert ssl.cert_time_to_seconds(shown) == until.timestamp() > before
        assert (await old.post(ALERTS[2])).status == 200
        assert old.connections == 1
    assert "in force" in log_lines.getvalue()


async def test_a_broken_renewal_leaves_what_was_in_force(
    forwarder: Start, authority: Authority, impatient: None, tmp_path: Path, log_lines: io.StringIO
) -> None:
    running = await forwarder(tls(authority) | auth(tmp_path, USERINFO))
    key = tmp_path / "server.key"
    good = key.read_bytes()
    authority.pair("another")
    for broken in (b"", b"nonsense", (tmp_path / "another.key").read_bytes(), None):
        key.write_bytes(broken) if broken is not None else key.unlink()
        await running.until(lambda: running.app.metrics.receiver_files_ok._value.get() == 0)
        async with running.falco(tls=authority.trusted(), userinfo=USERINFO) as falco:
            assert (await falco.post(ALERTS[0])).status == 200
        # The other kind is read all the same.
        replace(tmp_path / "credentials", f"{USERINFO}\nother:{broken!r}\n")
        user = f"other:{broken!r}"
        async with running.falco(tls=authority.trusted(), userinfo=user) as falco:
            async with asyncio.timeout(5):
                while (await falco.post(ALERTS[1])).status != 200:  # noqa: ASYNC110 - asked from outside
                    await asyncio.sleep(0.02)
        key.write_bytes(good)
        await running.until(lambda: running.app.metrics.receiver_files_ok._value.get() == 1)
    assert log_lines.getvalue().count("do not belong together") == 1
    assert "s3cret" not in log_lines.getvalue()


async def test_basic_credentials(forwarder: Start, tmp_path: Path) -> None:
    running = await forwarder(auth(tmp_path, f"# senders\n{USERINFO}\n\nfalco:pa:ss ü\n"))
    for userinfo in (USERINFO, "falco:pa:ss ü"):
        async with running.falco(userinfo=userinfo) as falco:
            assert [(await falco.post(alert)).status for alert in ALERTS[:3]] == [200] * 3
            assert falco.connections == 1
    for userinfo in ("falco:S3cret", "falco:", "falco", "# senders", "s3cret:falco", "ü:ü"):
        async with running.falco(userinfo=userinfo) as falco:
            answer = await falco.post(ALERTS[3])
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Basic ")
            assert answer.headers["connection"] == "close"
    async with running.falco() as falco:
        assert (await falco.post(ALERTS[3])).status == 401
    scrape = await running.scrape()
    assert scrape.total("auth_failures_total", reason="missing") == 1
    assert scrape.total("auth_failures_total", reason="wrong") == 6
    assert scrape.total("http_requests_total", status="401") == 7
    assert scrape.total("stored_events_total") == 3
    assert scrape.broken_law() == {}


async def test_pings_need_no_credentials(forwarder: Start, tmp_path: Path) -> None:
    running = await forwarder(auth(tmp_path, USERINFO))
    assert (await get(running.port, "/ping")).status == 200
    assert (await get(running.port, "/healthz")).status == 200
    assert (await get(running.port, "/test", method="POST")).status == 401


async def test_a_stranger_cannot_make_us_read(forwarder: Start, tmp_path: Path) -> None:
    """Refused before the body comes, also where the sender would ask first."""
    running = await forwarder(auth(tmp_path, USERINFO))
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n"
    for header in (
        b"",
        b"Expect: 100-continue\r\n",
        b"Authorization: Bearer x\r\n",
        b"Authorization: basic\r\n",
    ):
        assert (await send_raw(running.port, head + header + b"\r\n")).status == 401


async def test_credentials_are_changed_without_a_restart(
    forwarder: Start, tmp_path: Path, impatient: None, log_lines: io.StringIO
) -> None:
    running = await forwarder(auth(tmp_path, USERINFO))
    file = tmp_path / "credentials"
    async with running.falco(userinfo=USERINFO) as old, running.falco(userinfo="falco:new") as new:
        assert (await old.post(ALERTS[0])).status == 200
        assert (await new.post(ALERTS[1])).status == 401
        replace(file, "nobody\n")
        await running.until(lambda: running.app.metrics.receiver_files_ok._value.get() == 0)
        assert (await old.post(ALERTS[1])).status == 200
        replace(file, "falco:new\n")
        await running.until(lambda: running.app.metrics.receiver_files_ok._value.get() == 1)
        assert (await new.post(ALERTS[2])).status == 200
        assert (await old.post(ALERTS[3])).status == 401
    text = log_lines.getvalue()
    assert "line 1 is not user:password" in text
    assert "nobody" not in text
    assert text.count("sender without valid credentials") == 1  # a line a minute


@pytest.mark.parametrize(
    ("make", "faults"),
    [
        (lambda files: files["server.crt"].unlink(), ["receiver.tls.cert_file", "No such file"]),
        (lambda files: files["server.crt"].write_bytes(b"x"), ["receiver.tls.cert_file", "no usable PEM"]),
        (
            lambda files: files["server.key"].write_bytes(b"\xff" * 2_000_000),
            ["receiver.tls.key_file", "larger"],
        ),
        (
            lambda files: files["authority.crt"].write_bytes(b"x"),
            ["receiver.tls.client_ca_file", "no usable PEM"],
        ),
        (
            lambda files: files["credentials"].write_bytes(b"\xff:\xff"),
            ["receiver.auth.credentials_file", "UTF-8"],
        ),
        (
            lambda files: files["credentials"].write_bytes(b"# none\n"),
            ["receiver.auth.credentials_file", "nobody"],
        ),
        (
            lambda files: [file.unlink() for file in files.values()],
            ["receiver.tls.cert_file", "receiver.auth.credentials_file"],
        ),
    ],
)
async def test_a_start_says_every_fault_and_touches_nothing(
    authority: Authority, tmp_path: Path, make: Any, faults: list[str]
) -> None:
    changes = tls(authority, client_ca_file=str(authority.file)) | auth(tmp_path, USERINFO)
    make({path.name: path for path in tmp_path.iterdir()})  # noqa: ASYNC240 - a test may block
    with pytest.raises(ReceiverFilesError) as caught:
        await Application(settings_of(tmp_path, changes | {"aws.region": "eu-central-1"})).start()
    for fault in faults:
        assert fault in str(caught.value)
    assert not (tmp_path / "spool").exists()


async def test_an_encrypted_key_is_refused_and_asks_no_terminal(authority: Authority, tmp_path: Path) -> None:
    changes = tls(authority)
    authority.pair(password=b"geheim")
    with pytest.raises(ReceiverFilesError, match="must not be encrypted"):
        await Application(settings_of(tmp_path, changes | {"aws.region": "eu-central-1"})).start()


async def test_a_silent_connection_is_no_sender(forwarder: Start, authority: Authority) -> None:
    """A handshake that does not come ends after header_secs_max, is counted, and stops nobody from going."""
    running = await forwarder(tls(authority) | {"receiver.header_secs_max": 0.2})
    silent = await asyncio.open_connection("127.0.0.1", running.port)
    async with asyncio.timeout(3):
        assert await silent[0].read() == b""
    gone = await asyncio.open_connection("127.0.0.1", running.port)
    for _, writer in (silent, gone):
        writer.close()
    count = running.app.metrics.handshakes_failed["left"]
    await running.until(lambda: count._value.get() == 2)


async def test_the_oldest_handshake_makes_room(
    forwarder: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that never speak do not keep a sender out, and take little memory while they may stay."""
    monkeypatch.setattr(receiver_tls, "HANDSHAKES_MAX", 3)
    running = await forwarder(tls(authority))
    silent = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(10)]
    async with running.falco(tls=authority.trusted()) as falco:
        assert (await falco.post(ALERTS[0])).status == 200
    async with asyncio.timeout(3):
        for reader, _ in silent[:7]:
            assert await reader.read() == b""
    assert running.app.files.tls is not None
    assert len(running.app.files.tls.handshakes) <= 3
    assert sslproto.SSLProtocol.max_size == receiver_tls.BUFFER_BYTES
    for _, writer in silent:
        writer.close()


async def test_an_expired_certificate_does_not_resume(
    forwarder: Start, authority: Authority, tmp_path: Path
) -> None:
    """With client certificates there is no session to resume; without, there is."""

    def resumes(port: int, context: ssl.SSLContext) -> bool:
        session = None
        reused = False
        for _ in range(2):
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as secured,
            ):
                secured.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                while secured.recv(4096):
                    pass
                session, reused = secured.session, bool(secured.session_reused)
        return reused

    running = await forwarder(tls(authority))
    assert await asyncio.to_thread(resumes, running.port, authority.trusted())
    await running.stop()
    senders = Authority(tmp_path, "senders")
    running = await forwarder(tls(authority, client_ca_file=str(senders.file)))
    shown = authority.trusted(senders.pair("falco"))
    assert not await asyncio.to_thread(resumes, running.port, shown)


@pytest.mark.parametrize("kind", ["pipe", "directory", "loop"])
async def test_what_is_no_file_keeps_nobody(
    forwarder: Start, tmp_path: Path, impatient: None, log_lines: io.StringIO, kind: str
) -> None:
    """A pipe would have kept a thread for ever, and with it renewal and the end of the process."""
    running = await forwarder(auth(tmp_path, USERINFO))
    file = tmp_path / "credentials"
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(file)
    await running.until(lambda: running.app.metrics.receiver_files_ok._value.get() == 0)
    async with running.falco(userinfo=USERINFO) as falco:
        assert (await falco.post(ALERTS[0])).status == 200
    file.rmdir() if kind == "directory" else file.unlink()
    replace(file, "falco:new")
    await running.until(lambda: running.app.metrics.receiver_files_ok._value.get() == 1)
    async with running.falco(userinfo="falco:new") as falco:
        assert (await falco.post(ALERTS[1])).status == 200


def test_lines_end_where_lines_end() -> None:
    """Only a line feed ends one, and a space may belong to a password."""
    credentials = Credentials("u: ab\u2028x:y \r\n".encode())
    for said, refused in (("u: ab\u2028x:y ", ""), ("u: ab", "wrong"), ("u: ab\u2028x:y", "wrong")):
        assert credentials.refuses(f"Basic {base64.b64encode(said.encode()).decode()}") == refused


async def test_stop_lets_a_handshake_finish(forwarder: Start, authority: Authority) -> None:
    """A connection that was accepted before the listener closed delivers its alert."""
    running = await forwarder(tls(authority))
    loop = asyncio.get_running_loop()
    raw = await loop.create_connection(asyncio.Protocol, "127.0.0.1", running.port)
    await running.until(lambda: len(running.app.files.tls.handshakes) == 1)  # type: ignore[union-attr]
    stopping = asyncio.create_task(running.stop())
    await running.until(lambda: not running.app.receiver.listening)
    transport = await loop.start_tls(raw[0], raw[1], authority.trusted(), server_hostname="127.0.0.1")
    assert transport is not None
    reader = asyncio.StreamReader()
    transport.set_protocol(asyncio.StreamReaderProtocol(reader))
    transport.write(running.falco().head(ALERTS[0]) + ALERTS[0])
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    transport.close()
    await stopping


def test_expiry_of_many_dates(authority: Authority) -> None:
    """UTCTime until 2049, GeneralizedTime from then on; expired ones too."""
    for year in (2001, 2026, 2049, 2050, 2999):
        until = dt.datetime(year, 5, 6, 7, 8, 9, tzinfo=dt.UTC)
        pair = authority.pair(not_after=until)
        assert (
            expiry(b"# a comment\n" + pair.cert.read_bytes() + authority.file.read_bytes())
            == until.timestamp()
        )


@given(st.binary(max_size=300))
def test_expiry_of_nonsense(der: bytes) -> None:
    text = ssl.DER_cert_to_PEM_cert(der).encode()
    with pytest.raises(ValueError, match="certificate"):
        expiry(text)


def test_expiry_of_a_cut_certificate(authority: Authority) -> None:
    der = ssl.PEM_cert_to_DER_cert(authority.pair().cert.read_text())
    for size in range(len(der)):
        with pytest.raises(ValueError, match="cannot be read"):
            expiry(ssl.DER_cert_to_PEM_cert(der[:size]).encode())


users = st.text(st.characters(exclude_characters=":\r\n", exclude_categories=["Cs"]), min_size=1)


@given(user=users, password=users, other=users)
def test_what_is_in_the_file_may_post(user: str, password: str, other: str) -> None:
    line = f"{user}:{password}"
    if line.startswith(("#", "\ufeff")):
        return
    credentials = Credentials(line.encode())
    said = base64.b64encode(line.encode()).decode()
    assert credentials.refuses(f"Basic {said}") == credentials.refuses(f"bAsIc  {said}") == ""
    assert credentials.refuses(None) == "missing"
    wrong = base64.b64encode(f"{user}:{other}".encode()).decode()
    assert credentials.refuses(f"Basic {wrong}") == ("" if other == password else "wrong")


@given(st.text())
def test_any_header_is_an_answer(header: str) -> None:
    assert Credentials(b"a:b").refuses(header) in {"", "wrong"}
