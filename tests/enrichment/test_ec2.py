"""EC2 identity: IMDSv2 as documented and in all its absences, and which alerts are certain to come from this machine."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forwarder.config import ConfigError, load
from forwarder.enricher import Fields, Subject
from forwarder.enrichment import ec2
from forwarder.enrichment.ec2 import (
    DOCUMENT_BYTES_MAX,
    RETRY_SECS,
    Ec2,
    Ec2Settings,
    Identity,
    NoIdentityError,
    ask_identity,
    endpoint_of,
    read_identity,
)
from tests.fakes.imds import FakeImds

IDENTITY = Identity(
    account_id="111122223333",
    region="eu-west-1",
    zone="eu-west-1b",
    instance_id="i-0123456789abcdef0",
    instance_type="m7i.large",
    launched_at="2026-11-19T16:32:11Z",
    private_ip="10.0.7.9",
)
NODE = {
    "instance_id": "i-0123456789abcdef0",
    "instance_type": "m7i.large",
    "zone": "eu-west-1b",
    "region": "eu-west-1",
    "launched_at": "2026-11-19T16:32:11Z",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "172.20.0.1", "NODE_NAME": "ip-10-0-7-9.ec2.internal"}


@pytest.fixture
async def imds() -> AsyncIterator[FakeImds]:
    async with FakeImds() as fake:
        yield fake


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits for an IMDS that does not answer, shortened."""
    monkeypatch.setattr(ec2, "REQUEST_SECS_MAX", 0.1)
    monkeypatch.setattr(ec2, "TRY_PAUSE_SECS", 0.01)


def enricher(environment: dict[str, str] | None = None, **settings: Any) -> Ec2:
    return Ec2(
        msgspec.convert(settings, Ec2Settings),
        metrics=None,
        now=lambda: 0.0,
        rng=random.Random(7),
        aws=None,
        environment=environment or {},
        hostname="web-1",
    )


def knowing(environment: dict[str, str] | None = None, **settings: Any) -> Ec2:
    """An enricher that has learnt who it is."""
    made = enricher(environment, **settings)
    made._take(IDENTITY)
    return made


def node_of(made: Ec2, hostname: str = "", peer: str = "", source: str = "syscall") -> Any:
    members: dict[str, bytes] = {}
    assert made.enrich(Subject(source, hostname, 1, Fields(), peer), members) is True
    assert members.keys() <= {"node"}
    return json.loads(members["node"]) if members else None


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a server answers in real time
            await asyncio.sleep(0.01)


# ---- IMDS -------------------------------------------------------------------------------------------


async def test_the_identity_is_read_with_one_token(imds: FakeImds) -> None:
    """Version 2 from the first request on: no GET goes without a token."""
    assert await read_identity(imds.environment()) == IDENTITY
    assert imds.issued == [21_600]
    assert imds.requests == {"PUT 200": 1, "GET 200": 1}


async def test_a_refused_token_is_renewed_once(imds: FakeImds) -> None:
    """401 means: make a new token. A second 401 means that no token will do."""
    imds.clock = iter([0.0, 30_000.0, 30_000.0, 30_001.0]).__next__  # the first ends before it is used
    assert await read_identity(imds.environment()) == IDENTITY
    assert imds.requests == {"PUT 200": 2, "GET 401": 1, "GET 200": 1}


async def test_tokens_that_never_hold_are_given_up(imds: FakeImds) -> None:
    imds.token_body = b"not-a-token-of-this-service"
    with pytest.raises(NoIdentityError, match="401"):
        await ask_identity(imds.environment())
    assert imds.requests == {"PUT 200": 2, "GET 401": 2}


async def test_a_hop_limit_of_one_looks_like_silence(imds: FakeImds, hasty: None) -> None:
    """Two tries within their time limit, then None; and never a GET without a token (IMDSv1)."""
    imds.hop_limit_1 = True
    assert await read_identity(imds.environment()) is None
    assert imds.requests == {"PUT hang": 2}


@pytest.mark.parametrize(("status", "tries"), [(403, 1), (404, 1), (400, 1), (405, 1), (503, 2), (429, 2)])
async def test_a_refusal_is_final_and_a_fault_is_tried_twice(
    imds: FakeImds, hasty: None, status: int, tries: int
) -> None:
    imds.status = status
    with pytest.raises(NoIdentityError, match=f"a token with status {status}"):
        await ask_identity(imds.environment())
    assert imds.requests == {f"PUT {status}": tries}


async def test_nobody_listens(hasty: None) -> None:
    with pytest.raises(NoIdentityError, match="Connect"):
        await ask_identity({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1"})


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://127.0.0.1", "http://[broken", "http://"])
async def test_an_endpoint_that_is_none_raises_nothing(endpoint: str, hasty: None) -> None:
    assert await read_identity({"AWS_EC2_METADATA_SERVICE_ENDPOINT": endpoint}) is None


async def test_a_proxy_is_not_used(imds: FakeImds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through it we would learn of another machine, or show it our token."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert await read_identity(imds.environment()) == IDENTITY


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"i-0123456789abcdef0"',
        b'{"accountId":',
        b'{"accountId": 111122223333, "region": "eu-west-1", "instanceId": "i-0123456789abcdef0"}',
        b'{"accountId": "111122223333", "region": "eu-west-1"}',
        b'{"accountId": "1111", "region": "eu-west-1", "instanceId": "i-0123456789abcdef0"}',
        b'{"accountId": "111122223333", "region": "eu west", "instanceId": "i-0123456789abcdef0"}',
        b'{"accountId": "111122223333", "region": "eu-west-1", "instanceId": "vm-1"}',
        b"\xff\xfe" * 50,
        b"[" * 10_000,
    ],
    ids=lambda body: repr(body[:24]) + str(len(body)),
)
async def test_an_odd_document_is_no_identity(imds: FakeImds, hasty: None, body: bytes) -> None:
    imds.document_body = body
    assert await read_identity(imds.environment()) is None
    assert imds.requests["GET 200"] in {1, 2}


async def test_a_document_larger_than_any_is_not_read(imds: FakeImds, hasty: None) -> None:
    """However good its end may be."""
    imds.document_body = b" " * DOCUMENT_BYTES_MAX + json.dumps(imds.document).encode()
    with pytest.raises(NoIdentityError, match="larger than"):
        await ask_identity(imds.environment())
    imds.document_body = b" " * (DOCUMENT_BYTES_MAX // 2) + json.dumps(imds.document).encode()
    assert await read_identity(imds.environment()) == IDENTITY


async def test_what_is_not_said_stays_empty(imds: FakeImds) -> None:
    imds.document |= {"availabilityZone": None, "pendingTime": None, "privateIp": None}
    found = await read_identity(imds.environment())
    assert found is not None
    assert (found.zone, found.launched_at, found.private_ip) == ("", "", "")
    assert found.instance_id == IDENTITY.instance_id


async def test_a_document_cut_off_is_no_identity(imds: FakeImds, hasty: None) -> None:
    imds.truncate = True
    assert await read_identity(imds.environment()) is None
    assert imds.requests["GET 200"] == 2


@pytest.mark.parametrize("token", [b"", b"a b", b"x\r\nX-Other: 1", b"t" * 2000, "tö".encode()])
async def test_a_token_that_could_be_no_header_is_none(imds: FakeImds, hasty: None, token: bytes) -> None:
    imds.token_body = token
    assert await read_identity(imds.environment()) is None
    assert sum(count for what, count in imds.requests.items() if what.startswith("GET")) == 0


def test_the_endpoint_has_the_sdks_own_names() -> None:
    """A given endpoint wins over the mode, as in botocore."""
    given = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1338/"}
    ipv6 = {"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"}
    assert endpoint_of({}) == "http://169.254.169.254"
    assert endpoint_of(ipv6) == "http://[fd00:ec2::254]"
    assert endpoint_of({"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv4"}) == "http://169.254.169.254"
    assert endpoint_of(given | ipv6) == "http://127.0.0.1:1338"


# ---- learning ---------------------------------------------------------------------------------------


async def test_it_learns_once_and_says_so(imds: FakeImds) -> None:
    made = enricher(imds.environment())
    assert node_of(made, "web-1") is None
    assert made.status() == {"state": "starting", "reason": None}
    await made.start()
    await until(lambda: made.identity)
    assert made.identity == IDENTITY
    assert made.status() | {"state": "active", "instance_id": "i-0123456789abcdef0"} == made.status()
    assert node_of(made, "web-1") == {"name": "web-1"} | NODE
    await made.stop()
    assert imds.requests == {"PUT 200": 1, "GET 200": 1}


async def test_start_and_stop_do_not_wait_for_imds(imds: FakeImds) -> None:
    imds.hop_limit_1 = True
    made = enricher(imds.environment())
    async with asyncio.timeout(0.5):
        await made.start()
        await until(lambda: imds.requests["PUT hang"])
        await made.stop()
        await made.stop()
    assert made.identity is None


async def test_switched_off_it_asks_nothing(imds: FakeImds) -> None:
    made = enricher(imds.environment(), enabled=False)
    await made.start()
    await asyncio.sleep(0.05)
    assert made.status() == {"state": "off", "reason": "switched off"}
    assert not imds.requests
    await made.stop()


@pytest.mark.looptime
async def test_without_imds_one_line_and_an_attempt_every_ten_minutes(
    monkeypatch: pytest.MonkeyPatch, log_lines: io.StringIO
) -> None:
    asked: list[float] = []
    now = asyncio.get_running_loop().time

    async def ask(_: object) -> Identity:
        asked.append(now())
        if len(asked) < 4:
            raise NoIdentityError("no answer")
        return IDENTITY

    monkeypatch.setattr(ec2, "ask_identity", ask)
    made = enricher()
    await made.start()
    await asyncio.sleep(1)
    assert made.status() == {"state": "unavailable", "reason": "no answer"}
    await asyncio.sleep(6 * RETRY_SECS)
    pauses = [after - before for before, after in pairwise(asked)]
    assert len(asked) == 4
    assert all(0.9 * RETRY_SECS <= pause <= 1.1 * RETRY_SECS for pause in pauses), pauses
    assert made.identity == IDENTITY
    await made.stop()
    lines = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("no EC2 instance metadata, alerts go without", "info"),
        ("running on an EC2 instance", "info"),
    ]


@pytest.mark.looptime
async def test_a_fault_of_ours_does_not_end_the_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [ZeroDivisionError("ours"), IDENTITY]

    async def ask(_: object) -> Identity:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Identity)
        return answer

    monkeypatch.setattr(ec2, "ask_identity", ask)
    made = enricher()
    await made.start()
    await asyncio.sleep(2 * RETRY_SECS)
    assert made.identity == IDENTITY
    await made.stop()


# ---- which alerts -----------------------------------------------------------------------------------


def test_the_hosts_own_name_proves_it() -> None:
    made = knowing()
    assert node_of(made, "web-1") == {"name": "web-1"} | NODE
    assert node_of(made, "web-2") is None
    assert node_of(made) is None


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "10.0.7.9"])
def test_the_own_addresses_prove_it_outside_kubernetes_and_ecs(peer: str) -> None:
    """Falco's host name may be anything then (a container's id): no name is given."""
    assert node_of(knowing(), "3f4e8a1b2c3d", peer) == NODE
    assert node_of(knowing(), "db7.example.com", peer) is None, "handed on by a proxy of this machine"
    for environment in (KUBERNETES, {"ECS_CONTAINER_METADATA_URI_V4": "http://169.254.170.2/v4/x"}):
        assert node_of(knowing(environment), "3f4e8a1b2c3d", peer) is None


@pytest.mark.parametrize("peer", ["10.0.7.8", "127.0.0.6", "172.17.0.1", "", "nonsense"])
def test_other_addresses_prove_nothing(peer: str) -> None:
    """127.0.0.6 is what Istio's proxy comes from, 172.17.0.1 Docker's, whoever the sender was."""
    assert node_of(knowing(), "other", peer) is None


def test_the_node_name_proves_it_on_kubernetes() -> None:
    made = knowing(KUBERNETES)
    assert node_of(made, "ip-10-0-7-9.ec2.internal") == {"name": "ip-10-0-7-9.ec2.internal"} | NODE
    assert node_of(made, "ip-10-0-7-8.ec2.internal", "127.0.0.1") is None


def test_a_pods_name_is_not_taken_for_a_nodes() -> None:
    """Host name and Falco's are the same in a side-car: the same machine, but not its name."""
    assert node_of(knowing({"KUBERNETES_SERVICE_HOST": "172.20.0.1"}), "web-1") == NODE


def test_the_instance_id_as_host_name_proves_it() -> None:
    assert node_of(knowing(), "i-0123456789abcdef0") == NODE


@pytest.mark.parametrize("hostname", ["localhost", "localhost.localdomain"])
def test_everybodys_name_proves_nothing(hostname: str) -> None:
    """Neither as the host's name nor as the one given; and it is nothing to call a node by."""
    made = Ec2(Ec2Settings(), rng=random.Random(7), environment={}, hostname=hostname)
    made._take(IDENTITY)
    assert node_of(made, hostname, "10.9.9.9") is None
    assert node_of(made, hostname, "127.0.0.1") == NODE
    assert node_of(knowing({"NODE_NAME": hostname}), hostname, "10.9.9.9") is None


def test_the_setting_decides_where_it_is_given() -> None:
    assert (
        node_of(knowing(KUBERNETES, same_node=True), "falco-x7k2p", "10.0.9.9")
        == {"name": "ip-10-0-7-9.ec2.internal"} | NODE
    )
    assert node_of(knowing(same_node=False), "web-1", "127.0.0.1") is None


def test_a_plugins_alert_did_not_happen_on_the_node() -> None:
    assert node_of(knowing(same_node=True), "web-1", source="k8s_audit") is None
    assert node_of(knowing(same_node=True), "web-1", source="internal") is not None


def test_a_node_that_is_there_is_left_alone_unless_it_is_only_a_name() -> None:
    subject = Subject("syscall", "web-1", 1, Fields(), "")
    members = {"node": b'{"name":"from the Node object","instance_id":"i-0"}'}
    assert knowing().enrich(subject, members)
    assert members == {"node": b'{"name":"from the Node object","instance_id":"i-0"}'}
    members = {"node": b'{"name":"web-1"}'}
    assert knowing().enrich(subject, members)
    assert b'"instance_id":"i-0123456789abcdef0"' in members["node"]


# ---- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("no", False)])
def test_settings_take_auto_and_yaml_booleans(tmp_path: Path, text: str, value: object) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"enabled: {text}\n")
    assert load(Ec2Settings, file, {"FORWARDER__SAME_NODE": text}) == Ec2Settings(
        enabled=value,  # type: ignore[arg-type]
        same_node=value,  # type: ignore[arg-type]
    )


def test_settings_refuse_other_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load(Ec2Settings, None, {"FORWARDER__ENABLED": "maybe"})
