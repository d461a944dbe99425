"""A forwarder process as the chart configures it with TLS and passwords, and those who talk to it.

Rendered by helm, with the Secrets' files in a directory of the test; a sender as Falco's libcurl is curl with Falco's settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.chart.rendering import CHART, LOGS, Object, objects_of, one
from tests.crash.harness import free_ports
from tests.fakes.aws import FakeAws
from tests.falco import get

READY_SECS_MAX = 30.0
STOP_SECS_MAX = 20.0
SERVICE = "falco-aws-forwarder.falco.svc"
PASSWORD = "p@ss:w/rd"
QUOTED = "p%40ss%3Aw%2Frd"
"""As it must stand in Falco's URL."""
CASE = CHART / "ci/mtls-certmanager-values.yaml"
SINGLE = f"{LOGS},replicas=1,aws.region=eu-west-1"
ALONE = ",".join(f"config.enrichment.{name}.enabled=false" for name in ("kubernetes", "ec2", "ecs"))


def issue(folder: Path) -> None:
    """What cert-manager would make of the chart's certificates: an authority's file and pairs, one folder for each Secret."""
    authority = ec.generate_private_key(ec.SECP256R1())
    root = _signed("authority", [], authority, authority, is_authority=True)
    for secret, name in (("falco-forwarder-tls", ""), ("falco-forwarder-client", "-client")):
        wanted = one(objects_of(CASE), "Certificate", f"falco-aws-forwarder{name}")["spec"]
        key = ec.generate_private_key(ec.SECP256R1())
        made = _signed(wanted.get("commonName", ""), wanted.get("dnsNames", []), key, authority)
        into = folder / secret
        into.mkdir()
        (into / "ca.crt").write_bytes(root.public_bytes(serialization.Encoding.PEM))
        (into / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        (into / "tls.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    (folder / "falco-forwarder-auth").mkdir()
    (folder / "falco-forwarder-auth/credentials").write_text(f"# senders\nfalco:{PASSWORD}\n")


class Forwarder(NamedTuple):
    """A running one."""

    port: int
    admin: int
    folder: Path

    async def helm_test(self, objects: list[Object], secs: int = 20) -> tuple[int | None, str]:
        """The test's pod, on this machine."""
        container = one(objects, "Pod")["spec"]["containers"][0]
        program = container["args"][0]
        arguments = ["127.0.0.1", str(self.port), str(self.admin), str(secs), container["args"][-1]]
        told = {it["name"]: _here(it["value"], self.folder) for it in container.get("env", [])}
        return await run(sys.executable, "-u", "-c", program, *arguments, environment=told)

    async def falco(
        self, http_output: Object, body: bytes, *, password: str = QUOTED, host: str = SERVICE
    ) -> tuple[int | None, str]:
        """curl, told what Falco tells libcurl: exit code, and status or error."""
        url = http_output["url"].replace("${FALCO_FORWARDER_PASSWORD}", password).replace(SERVICE, host)
        files = {"ca_cert": "--cacert", "client_cert": "--cert", "client_key": "--key"}
        settings = [
            argument
            for key, option in files.items()
            if key in http_output
            for argument in (option, _here(http_output[key], self.folder))
        ]
        to = f"{host}:2801:127.0.0.1:{self.port}"
        fixed = [
            "--silent",
            "--show-error",
            "--output",
            os.devnull,
            "--write-out",
            "%{http_code}",
            "--noproxy",
            "*",
        ]
        sent = [
            "--http1.1",
            "--user-agent",
            "falcosecurity/falco",
            "--header",
            "Content-Type: application/json",
        ]
        data = ["--max-time", "10", "--data-binary", body.decode()]
        return await run("curl", *fixed, *sent, *settings, *data, "--connect-to", to, url)


@contextlib.asynccontextmanager
async def forwarder(folder: Path, aws: FakeAws, objects: list[Object]) -> AsyncIterator[Forwarder]:
    """`falco-forwarder run` with the ConfigMap's configuration, until the end of the block."""
    ports = free_ports()
    text = one(objects, "ConfigMap")["data"]["forwarder.yaml"]
    text = _here(text, folder).replace("/var/lib/falco-forwarder", str(folder / "spool"))
    file = folder / "forwarder.yaml"
    file.write_text(text)
    listening = {"FORWARDER__RECEIVER__PORT": str(ports.receiver), "FORWARDER__ADMIN__PORT": str(ports.admin)}
    listening |= {f"FORWARDER__{part}__HOST": "127.0.0.1" for part in ("RECEIVER", "ADMIN")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forwarder", "run", "--config", str(file)),
        env={**os.environ, **aws.environment(), **listening},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await _ready(ports.admin, process)
        yield Forwarder(ports.receiver, ports.admin, folder)
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECS_MAX)
        except TimeoutError:
            process.kill()
            await process.wait()


async def run(
    program: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        env={**os.environ, **(environment or {})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def _ready(admin: int, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(READY_SECS_MAX):
        while True:
            assert process.returncode is None, f"the forwarder ended with {process.returncode}"
            with contextlib.suppress(OSError):
                if (await get(admin, "/readyz")).status == 200:
                    return
            await asyncio.sleep(0.05)


def _here(text: str, folder: Path) -> str:
    """Paths of the containers (ours and Falco's), in the test's directory."""
    text = text.replace("/etc/falco-forwarder/", f"{folder}/falco-forwarder-tls/")
    return re.sub(r"/etc/(falco-forwarder-(?:tls|auth|client))", rf"{folder}/\1", text)


def _signed(
    name: str,
    dns: list[str],
    key: ec.EllipticCurvePrivateKey,
    authority: ec.EllipticCurvePrivateKey,
    *,
    is_authority: bool = False,
) -> x509.Certificate:
    now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name or dns[0])])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    if dns:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.DNSName(it) for it in dns]), critical=False
        )
    return builder.sign(authority, hashes.SHA256())
