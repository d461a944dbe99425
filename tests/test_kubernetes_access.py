"""Where the API is and as whom we ask: every form of a kubeconfig, and files that change under the service."""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from forwarder.kubernetes_access import (
    FILE_BYTES_MAX,
    REREAD_SECS,
    Access,
    AccessError,
    Source,
    find_source,
    read_kubeconfig,
)

SECRET = "s3cr3t-t0k3n"


class Pair(NamedTuple):
    """A certificate and its key, PEM."""

    certificate: str
    key: str


@lru_cache
def pair(name: str) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder(names, names, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return Pair(made.public_bytes(form).decode(), key.private_bytes(form, *plain).decode())


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def trusted(context: ssl.SSLContext | bool) -> list[Any]:
    assert isinstance(context, ssl.SSLContext)
    subjects: list[Any] = [item["subject"] for item in context.get_ca_certs()]
    return [dict(part[0] for part in subject)["commonName"] for subject in subjects]


def kubeconfig(folder: Path, cluster: dict[str, Any] | None = None, user: Any = None, **changes: Any) -> Path:
    """A kubeconfig with two of everything, ``prod`` being the current one."""
    members = {
        "current-context": "prod",
        "contexts": [
            {"name": "dev", "context": {"cluster": "dev", "user": "dev"}},
            {"name": "prod", "context": {"cluster": "c", "user": "u", "namespace": "falco"}},
        ],
        "clusters": [
            {"name": "dev", "cluster": {"server": "https://wrong"}},
            {"name": "c", "cluster": {"server": "https://api:6443"} | (cluster or {})},
        ],
        "users": [
            {"name": "dev", "user": {"token": "wrong"}},
            {"name": "u", "user": {"token": SECRET} if user is None else user},
        ],
    } | changes
    path = folder / "config"
    path.write_text(yaml.safe_dump(members))
    return path


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """A service account as the kubelet mounts it."""
    folder = tmp_path / "serviceaccount"
    folder.mkdir()
    (folder / "token").write_text(f"{SECRET}\n")
    (folder / "ca.crt").write_text(pair("first").certificate)
    return folder


# ---- in a pod ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "port", "server"),
    [
        ("10.100.0.1", "443", "https://10.100.0.1:443"),
        ("10.100.0.1", "", "https://10.100.0.1:443"),
        ("fd12:3456::1", "6443", "https://[fd12:3456::1]:6443"),
        ("kubernetes.default.svc", "443", "https://kubernetes.default.svc:443"),
    ],
)
def test_in_a_pod(account: Path, host: str, port: str, server: str) -> None:
    names = {"KUBERNETES_SERVICE_HOST": host} | ({"KUBERNETES_SERVICE_PORT": port} if port else {})
    source = find_source("", names, account)
    assert source == Source(server, token_file=account / "token", ca_file=account / "ca.crt", verify=True)


def test_nothing_where_there_is_no_cluster(account: Path, tmp_path: Path) -> None:
    assert find_source("", {}, account) is None
    assert find_source("", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path / "none") is None


def test_a_kubeconfig_outweighs_the_service_account(account: Path, tmp_path: Path) -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    path = kubeconfig(tmp_path)
    second = kubeconfig(account, {"server": "https://second"})
    found = [
        find_source("", pod | {"KUBECONFIG": str(path)}, account),
        find_source(str(second), pod | {"KUBECONFIG": str(path)}, account),
    ]
    assert [source and source.server for source in found] == ["https://api:6443", "https://second"]


@pytest.mark.parametrize("environment", [{}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}])
def test_a_named_kubeconfig_has_to_be_there(
    account: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    missing = str(tmp_path / "missing")
    for arguments in ((missing, environment), ("", environment | {"KUBECONFIG": missing})):
        with pytest.raises(AccessError, match=r"missing.*No such file"):
            find_source(*arguments, account)


# ---- kubeconfigs ------------------------------------------------------------------------------------


def test_the_current_context_and_nothing_else(tmp_path: Path) -> None:
    source = read_kubeconfig(kubeconfig(tmp_path, {"server": "https://api:6443/prefix/"}))
    assert source == Source("https://api:6443/prefix", token=SECRET)


def test_paths_are_relative_to_the_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = pair("client")
    (tmp_path / "client.crt").write_text(own.certificate)
    (tmp_path / "client.key").write_text(own.key)
    cluster = {"certificate-authority": "pki/ca.crt", "tls-server-name": "kubernetes"}
    user = {
        "tokenFile": "token",
        "client-certificate": "client.crt",
        "client-key": str(tmp_path / "client.key"),
    }
    path = kubeconfig(tmp_path, cluster, user)
    source = read_kubeconfig(path)
    assert (source.ca_file, source.token_file) == (tmp_path / "pki" / "ca.crt", tmp_path / "token")
    assert (source.certificate, source.key, source.server_name) == (own.certificate, own.key, "kubernetes")
    monkeypatch.chdir(tmp_path)
    relative = read_kubeconfig(Path("config"))
    assert relative.ca_file is not None
    assert relative.ca_file.absolute() == source.ca_file


@pytest.mark.parametrize("wrapped", [False, True], ids=["one line", "wrapped"])
async def test_data_instead_of_files(tmp_path: Path, wrapped: bool) -> None:
    """Base64 may be broken into lines, as ``base64`` does by itself and as kubectl reads it."""

    def data(text: str) -> str:
        return base64.encodebytes(text.encode()).decode() if wrapped else encoded(text)

    own, ca = pair("client"), pair("first").certificate
    user = {"client-certificate-data": data(own.certificate), "client-key-data": data(own.key)}
    source = await asyncio.to_thread(
        read_kubeconfig, kubeconfig(tmp_path, {"certificate-authority-data": data(ca)}, user)
    )
    assert (source.ca_data, source.certificate, source.key) == (ca, own.certificate, own.key)
    assert trusted((await Access(source, lambda: 0.0).credentials()).tls) == ["first"]


async def test_data_outweigh_files(tmp_path: Path) -> None:
    """As with kubectl: the file may be anything."""
    (tmp_path / "other.crt").write_text(pair("other").certificate)
    for name in ("other.crt", "missing.crt"):
        both = {
            "certificate-authority": name,
            "certificate-authority-data": encoded(pair("first").certificate),
        }
        source = await asyncio.to_thread(read_kubeconfig, kubeconfig(tmp_path, both))
        assert trusted((await Access(source, lambda: 0.0).credentials()).tls) == ["first"]


def test_a_context_without_a_user(tmp_path: Path) -> None:
    contexts = [{"name": "prod", "context": {"cluster": "c"}}]
    assert read_kubeconfig(kubeconfig(tmp_path, contexts=contexts)) == Source("https://api:6443")


@pytest.mark.parametrize("kind", ["exec", "auth-provider"])
def test_programs_are_refused_even_beside_a_token(tmp_path: Path, kind: str) -> None:
    user = {"token": SECRET, kind: {"apiVersion": "client.authentication.k8s.io/v1", "command": "aws"}}
    with pytest.raises(AccessError, match=f"'{kind}' are not supported") as caught:
        read_kubeconfig(kubeconfig(tmp_path, user=user))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"current-context": "gone"}, "no context 'gone'"),
        ({"current-context": None}, "no context None"),
        ({"clusters": []}, "no cluster 'c'"),
        ({"users": []}, "no user 'u'"),
        ({"clusters": [{"name": "c"}]}, "no usable kubeconfig"),
        ({"clusters": [{"name": "c", "cluster": {}}]}, "server"),
        ({"clusters": [{"name": "c", "cluster": {"server": "api:6443"}}]}, "neither https"),
        ({"contexts": ["prod"]}, "no usable kubeconfig"),
        ({"contexts": [{"name": "prod", "context": None}]}, "no usable kubeconfig"),
        ({"users": [{"name": "u", "user": "me"}]}, "no usable kubeconfig"),
        ({"users": [{"name": "u", "user": {"tokenFile": 5}}]}, "no usable kubeconfig"),
        ({"users": [{"name": "u", "user": {"client-key-data": "%%%"}}]}, "not base64"),
        ({"users": [{"name": "u", "user": {"client-certificate-data": "/w=="}}]}, "not base64 of text"),
        ({"users": [{"name": "u", "user": {"client-certificate": "lost.crt"}}]}, r"lost\.crt"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(AccessError, match=word):
        read_kubeconfig(kubeconfig(tmp_path, **changes))


@pytest.mark.parametrize("value", ["false", "no", 1, "true"])
def test_certificates_stay_verified_but_for_a_plain_true(tmp_path: Path, value: Any) -> None:
    try:
        source = read_kubeconfig(kubeconfig(tmp_path, {"insecure-skip-tls-verify": value}))
    except AccessError:
        return
    assert source.verify


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"a string", b"5", b"{", b"a: b: c", b"\tx", b"\xff\xfe\xfa", b"\x00\x01",
        b"- [a, b\n", b"!!python/object/apply:os.system ['true']", b"a: *nowhere", b"[" * 10_000,
        b"contexts: &a [*a]\ncurrent-context: x",
    ],
)  # fmt: skip
def test_anything_else_is_no_kubeconfig(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "config"
    path.write_bytes(body)
    with pytest.raises(AccessError) as caught:
        read_kubeconfig(path)
    assert "\n" not in str(caught.value)


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path)
    text = path.read_text()
    path.write_text("#" * FILE_BYTES_MAX + "\n" + text)
    with pytest.raises(AccessError):
        read_kubeconfig(path)
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)  # a terabyte of zeros that takes no room
    with pytest.raises(AccessError):
        read_kubeconfig(path)


@pytest.mark.parametrize(
    "line", ["    token: {0}: x", "    token: '{0}", '    token: "{0}\\q"', "    token: {{{0}"]
)
def test_a_slip_of_the_pen_does_not_tell_the_token(tmp_path: Path, line: str) -> None:
    """The message goes to the log and to /status."""
    path = tmp_path / "config"
    path.write_text("users:\n- name: u\n  user:\n" + line.format(SECRET) + "\n")
    with pytest.raises(AccessError) as caught:
        read_kubeconfig(path)
    assert SECRET not in str(caught.value)


# ---- credentials ------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(account: Path, clock: Clock) -> Access:
    source = find_source("", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, account)
    assert source is not None
    return Access(source, clock)


async def test_the_token_is_read_again_after_fifty_seconds(
    access: Access, account: Path, clock: Clock
) -> None:
    assert REREAD_SECS == 50
    assert (await access.credentials()).token == SECRET
    (account / "token").write_text("next")
    clock.now += 49.9
    assert (await access.credentials()).token == SECRET
    clock.now += 0.1
    assert (await access.credentials()).token == "next"


async def test_the_token_is_read_again_after_a_401(access: Access, account: Path) -> None:
    await access.credentials()
    (account / "token").write_text("next")
    access.refused()
    assert (await access.credentials()).token == "next"
    (account / "token").write_text("after that")
    assert (await access.credentials()).token == "next"


async def test_another_ca_gives_another_context_and_the_same_one_does_not(
    access: Access, account: Path, clock: Clock
) -> None:
    first = (await access.credentials()).tls
    assert trusted(first) == ["first"]
    assert isinstance(first, ssl.SSLContext)
    assert (first.check_hostname, first.verify_mode) == (True, ssl.CERT_REQUIRED)
    clock.now += REREAD_SECS
    assert (await access.credentials()).tls is first
    rotated = account / "..data"
    rotated.write_text(pair("second").certificate)
    os.utime(rotated, ns=(0, (account / "ca.crt").stat().st_mtime_ns + 1))
    rotated.rename(account / "ca.crt")
    assert (await access.credentials()).tls is first
    clock.now += REREAD_SECS
    assert trusted((await access.credentials()).tls) == ["second"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("token", None), ("ca.crt", None), ("token", b"\xff"), ("ca.crt", b"nonsense"), ("ca.crt", b"")],
)
async def test_missing_and_spoilt_files(
    access: Access, account: Path, clock: Clock, name: str, content: bytes | None
) -> None:
    """Also when all was well before, and all is well again as soon as the file is."""
    good = (account / name).read_bytes()
    await access.credentials()
    clock.now += REREAD_SECS
    (account / name).unlink()
    if content is not None:
        (account / name).write_bytes(content)
    for _ in range(2):
        with pytest.raises(AccessError, match="cannot be read"):
            await access.credentials()
    (account / name).write_bytes(good)
    found = await access.credentials()
    assert (found.token, trusted(found.tls)) == (SECRET, ["first"])


async def test_plain_http_needs_no_context(tmp_path: Path) -> None:
    found = await Access(
        Source("http://127.0.0.1:8001", ca_file=tmp_path / "none"), lambda: 0.0
    ).credentials()
    assert found == ("", True)


async def test_a_clients_certificate_is_shown_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shown: list[tuple[int, str]] = []
    load = ssl.SSLContext.load_cert_chain

    def noted(context: ssl.SSLContext, chain: Path) -> None:
        shown.append((chain.stat().st_mode & 0o777, chain.read_text()))
        load(context, chain)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", noted)
    own = pair("client")
    source = Source("https://api", certificate=own.certificate, key=own.key, verify=False)
    context = (await Access(source, lambda: 0.0).credentials()).tls
    assert isinstance(context, ssl.SSLContext)
    assert (context.check_hostname, context.verify_mode) == (False, ssl.CERT_NONE)
    ((mode, text),) = shown
    assert mode & 0o077 == 0
    assert own.certificate in text
    assert own.key in text
    assert list(tmp_path.glob("*")) == []  # noqa: ASYNC240 - a test may block
    with pytest.raises(AccessError):
        await Access(source._replace(key=pair("other").key), lambda: 0.0).credentials()
