"""What Prometheus looks at: two replicas of the forwarder, the strict fake AWS, the demo's cluster, and senders with real alerts.

The first replica speaks plain HTTP and has keys that do not expire. The second one speaks TLS, asks for a password, and assumes a role
for Security Hub: so every metric that depends on such a setting has something to say.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import ipaddress
import json
import os
import random
import socket
import ssl
import sys
import uuid
from collections.abc import Iterable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Self

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from forwarder import demo_kubernetes
from forwarder.app import Application
from forwarder.sensors import SNAPSHOT_RULE
from tests.fakes.aws import FakeAws
from tests.running import Running, settings_of

ROOT = Path(__file__).resolve().parents[2]
START_SECS_MAX = 30.0
NODES = sorted(demo_kubernetes.cluster()["nodes"])
QUIET_NODE = NODES[-1]
"""Its Falco sends nothing."""
ROLE = "arn:aws:iam::444455556666:role/security"
PASSWORD = "right"
RULES: list[dict[str, Any]] = [
    {
        "name": "maintenance",
        "match": {"rule": "Clear Log Activities"},
        "silence": {"until": "2099-12-31", "reason": "log rotation", "by": "ana"},
    },
    {"name": "logs only", "match": {"rule": "Write below root"}, "sinks": ["cloudwatch_logs"]},
]


def sample() -> list[dict[str, Any]]:
    """The demo's real alerts."""
    text = resources.files("forwarder").joinpath("data/falco_alerts.ndjson").read_text()
    return [json.loads(line) for line in text.splitlines() if line]


def snapshot(node: str, drops: int = 0) -> bytes:
    """A metrics snapshot as a node's Falco sends it."""
    fields = {
        "falco.version": "0.44.0" if node != NODES[0] else "0.43.1",
        "falco.outputs_queue_num_drops": 0,
        "scap.n_drops": drops,
    }
    return json.dumps(
        {
            "hostname": node,
            "rule": SNAPSHOT_RULE,
            "priority": "Informational",
            "source": "internal",
            "output": f"Falco metrics snapshot {uuid.uuid4()}",
            "time": _now(),
            "output_fields": fields,
        }
    ).encode()


def fresh(alert: Mapping[str, Any]) -> bytes:
    """The alert as if it happened now: the same bytes twice would count as one."""
    return json.dumps({**alert, "time": _now(), "uuid": str(uuid.uuid4())}).encode()


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Scene:
    """Started and stopped as a whole."""

    def __init__(self, directory: Path, *, flush_secs: Iterable[float] = (1,)) -> None:
        self._directory = directory
        self._flush_secs = list(flush_secs)
        self._before: dict[str, str] = {}
        self._kubernetes: asyncio.subprocess.Process | None = None
        self.aws = FakeAws(rate_limits=False)
        self.replicas: list[Running] = []
        self._sessions: list[aiohttp.ClientSession] = []

    async def __aenter__(self) -> Self:
        await self.aws.start()
        self._lead_the_sdk()
        port = await self._start_kubernetes()
        kubeconfig = self._directory / "kubeconfig"
        kubeconfig.write_text(demo_kubernetes.kubeconfig(f"http://127.0.0.1:{port}"))
        certificate, key = self._certificate()
        passwords = self._directory / "passwords"
        passwords.write_text(f"falco:{PASSWORD}\n")
        await self._start_replica(0, {})
        await self._start_replica(
            1,
            {
                "receiver.tls": {"cert_file": str(certificate), "key_file": str(key)},
                "receiver.auth": {"credentials_file": str(passwords)},
                "sinks.security_hub.role_arn": ROLE,
            },
        )
        trusting = ssl.create_default_context(cafile=str(certificate))
        self._sessions = [
            aiohttp.ClientSession(),
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=trusting), headers=_basic(f"falco:{PASSWORD}")
            ),
        ]
        for running in self.replicas:
            await running.until(partial(_knows_the_cluster, running))
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in self._sessions:
            await session.close()
        for running in self.replicas:
            await running.stop()
        if self._kubernetes is not None:
            self._kubernetes.terminate()
            await self._kubernetes.wait()
        await self.aws.stop()
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(self._before)

    def targets(self) -> list[dict[str, Any]]:
        """What Prometheus scrapes, labelled as its discovery in Kubernetes would."""
        return [
            {
                "targets": [f"127.0.0.1:{running.app.admin.port}"],
                "labels": {
                    "cluster": "shop-prod",
                    "namespace": "falco",
                    "pod": f"falco-aws-forwarder-{number}",
                },
            }
            for number, running in enumerate(self.replicas)
        ]

    async def post(self, replica: int, body: bytes) -> int:
        """One body to one replica; the status of the answer."""
        async with self._sessions[replica].post(self._url(replica), data=body) as answer:
            return answer.status

    async def post_as_stranger(self) -> int:
        """To the second replica, with a password it does not know."""
        async with self._sessions[1].post(
            self._url(1), data=fresh(sample()[0]), headers=_basic("falco:guessed")
        ) as answer:
            return answer.status

    async def post_in_plain(self) -> None:
        """To the second replica, without TLS."""
        async with aiohttp.ClientSession() as session:
            try:
                async with session.post(self._url(1).replace("https", "http"), data=b"{}") as answer:
                    await answer.read()
            except aiohttp.ClientError:
                return
        raise AssertionError("the TLS port answers plain HTTP")

    async def every_node_speaks(self, drops: int = 0) -> None:
        """But the quiet one."""
        for number, node in enumerate(NODES):
            if node != QUIET_NODE:
                assert await self.post(number % 2, snapshot(node, drops if number == 1 else 0)) == 200

    async def send(self, count: int, seed: random.Random) -> None:
        """Real alerts, a few at a time, to both replicas; some come twice."""
        alerts = sample()
        bodies = [fresh(seed.choice(alerts)) for _ in range(count)]
        bodies += bodies[: count // 10]
        answers = await asyncio.gather(*(self.post(place % 2, body) for place, body in enumerate(bodies)))
        assert set(answers) == {200}

    async def _start_replica(self, number: int, changes: Mapping[str, Any]) -> None:
        directory = self._directory / f"replica-{number}"
        directory.mkdir()
        settings = settings_of(
            directory,
            {
                "cluster.name": "shop-prod",
                "replica.name": f"falco-aws-forwarder-{number}",
                "rules": RULES,
                "enrichment.kubernetes": {"enabled": True, "kubeconfig": str(self._directory / "kubeconfig")},
                "sinks.cloudwatch_logs.minimum_priority": "debug",
                "sinks.security_hub.aggregation": {"enabled": True, "flush_secs": self._flush_secs},
                **changes,
            },
        )
        running = Running(Application(settings))
        await running.app.start()
        self.replicas.append(running)

    async def _start_kubernetes(self) -> int:
        """The demo's API server, a process of its own: it reads files."""
        port = free_port()
        arguments = (sys.executable, "-m", "forwarder.demo_kubernetes", str(port))
        self._kubernetes = await asyncio.create_subprocess_exec(*arguments, cwd=ROOT)
        async with asyncio.timeout(START_SECS_MAX), aiohttp.ClientSession() as session:
            # It announces itself to nobody.
            while not await _answers(session, f"http://127.0.0.1:{port}/readyz"):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.1)
        return port

    def _lead_the_sdk(self) -> None:
        """To the fake AWS, and nowhere else."""
        self._before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        for name in self._before:
            del os.environ[name]
        nothing = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
        os.environ.update(self.aws.environment() | nothing)

    def _url(self, replica: int) -> str:
        return f"{'https' if replica else 'http'}://127.0.0.1:{self.replicas[replica].port}/"

    def _certificate(self) -> tuple[Path, Path]:
        """One for 127.0.0.1 that signs itself and lives for 90 days."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "falco-aws-forwarder")])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=90))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        files = self._directory / "tls.crt", self._directory / "tls.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files


def _basic(pair: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _knows_the_cluster(running: Running) -> bool:
    running.app.publish()  # brings up to date what enrichment takes for stale
    kinds = running.app.status()["enrichment"]["kubernetes"].get("kinds", {})
    return bool(kinds) and all(kind["synced"] and not kind["stale"] for kind in kinds.values())


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


def free_port() -> int:
    """One nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
