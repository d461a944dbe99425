"""What `helm test` runs, against a running forwarder. Run by `make chart-test`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.chart.rendering import CHART
from tests.crash.harness import free_ports
from tests.fakes.aws import FakeAws
from tests.running import Running, Start

PROGRAM = CHART / "files/helm_test.py"
BOTH = """
import socket
real = socket.getaddrinfo
def dual(host, port, *more, **named):
    names = ("127.0.0.1", "::1") if host == "both" else (host,)
    return [it for name in names for it in real(name, port, *more, **named)]
socket.getaddrinfo = dual
"""
"""DNS that knows one replica by an address of either family."""


async def test_says_that_the_alert_was_delivered(aws: FakeAws, forwarder: Start) -> None:
    """By both sinks, and what arrived is the alert."""
    running = await forwarder()
    code, said = await _helm_test(running, "127.0.0.1", 20)
    assert code == 0, said
    assert "127.0.0.1 cloudwatch_logs: 1 delivered, 0 filtered" in said
    assert "127.0.0.1 security_hub: 1 delivered, 0 filtered" in said
    assert "1 of 1 replicas delivered the test alert" in said
    assert [json.loads(it.message)["rule"] for it in aws.events()] == ["Test of falco-aws-forwarder"]
    assert [it["Title"] for it in aws.findings.values()] == ["Test of falco-aws-forwarder"]


async def test_can_be_run_again(aws: FakeAws, forwarder: Start) -> None:
    """With aggregation the second alert waits for the finding's next update: that is no failure."""
    running = await forwarder({"sinks.security_hub.aggregation": {"enabled": True}})
    for _ in range(2):
        code, said = await _helm_test(running, "127.0.0.1", 20)
        assert code == 0, said
    assert len(aws.events()) == 2
    assert len(aws.findings) == 1


async def test_says_what_aws_says(aws: FakeAws, forwarder: Start) -> None:
    """An alert that is stored but not delivered is a failure, with the sink's state and last error."""
    aws.fail("PutLogEvents", times=None, status=500)
    running = await forwarder()
    code, said = await _helm_test(running, "127.0.0.1", 1)
    assert code == 1
    assert "127.0.0.1 FAILED: cloudwatch_logs is retrying, 1 wait: " in said, said
    assert "0 of 1 replicas delivered the test alert" in said


async def test_says_who_cannot_be_asked(forwarder: Start) -> None:
    running = await forwarder()
    code, said = await _helm_test(running, "nowhere.invalid", 1)
    assert code == 1
    assert "nowhere.invalid: " in said
    await running.stop()
    code, said = await _helm_test(running, "127.0.0.1", 1)
    assert code == 1
    assert "127.0.0.1 FAILED: ConnectionRefusedError" in said


async def test_says_every_fault_of_the_configuration(
    forwarder: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pods that do not start answer nobody: why, is in the configuration. The region alone may come from elsewhere."""
    running = await forwarder()
    await running.stop()
    file = tmp_path / "broken.yaml"
    file.write_text("sinks: {cloudwatch_logs: {enabled: true}}\nspool: {bytes_maxx: 1}\n")
    monkeypatch.setenv("CONFIG_FILE", str(file))
    monkeypatch.delenv("AWS_REGION")
    for host in ("127.0.0.1", "nowhere.invalid"):
        code, said = await _helm_test(running, host, 1)
        assert code == 1
        assert "spool.bytes_maxx (line 2): unknown key, did you mean bytes_max?" in said
        assert "sinks.cloudwatch_logs.log_group" in said
        assert "falco-forwarder: 2 faults in the configuration" in said
    file.write_text("cluster: {name: a}\nsinks: {security_hub: {enabled: true}}\n")
    assert "fault" not in (await _helm_test(running, "127.0.0.1", 1))[1]


async def test_says_which_replicas_are_missing(forwarder: Start) -> None:
    """A pod that is not scheduled has no address: those that have one may all deliver, and it is a failure still."""
    running = await forwarder()
    code, said = await _helm_test(running, "127.0.0.1", 20, replicas=2)
    assert code == 1, said
    assert "127.0.0.1 cloudwatch_logs: 1 delivered, 0 filtered" in said
    assert "1 of 2 replicas have no address" in said
    assert "1 of 2 replicas delivered the test alert" in said
    code, said = await _helm_test(running, "127.0.0.1", 20, replicas=0)  # a daemon set: as many as DNS says
    assert code == 0, said
    assert "1 of 1 replicas delivered the test alert" in said


async def test_reaches_a_replica_by_ipv6(forwarder: Start) -> None:
    running = await forwarder({"receiver.host": "::1", "admin.host": "::1"})
    code, said = await _helm_test(running, "::1", 20)
    assert code == 0, said
    assert "::1 cloudwatch_logs: 1 delivered, 0 filtered" in said


async def test_a_replica_of_two_families_is_one(aws: FakeAws, forwarder: Start) -> None:
    """It has an address of each, and must answer at both."""
    ports = free_ports()
    both = {"receiver": {"host": "", "port": ports.receiver}, "admin": {"host": "", "port": ports.admin}}
    running = await forwarder(both)
    code, said = await _helm_test(running, "both", 20, prelude=BOTH)
    assert code == 0, said
    for address in ("127.0.0.1", "::1"):
        assert f"{address} cloudwatch_logs: 1 delivered, 0 filtered" in said
    assert "1 of 1 replicas delivered the test alert" in said
    assert len(aws.events()) == 2
    code, said = await _helm_test(running, "both", 20, replicas=2, prelude=BOTH)
    assert code == 1, said
    assert "1 of 2 replicas delivered the test alert" in said


async def test_one_family_is_not_both(forwarder: Start) -> None:
    running = await forwarder()
    code, said = await _helm_test(running, "both", 20, prelude=BOTH)
    assert code == 1, said
    assert "127.0.0.1 cloudwatch_logs: 1 delivered, 0 filtered" in said
    assert "::1 FAILED: ConnectionRefusedError" in said
    assert "0 of 1 replicas delivered the test alert" in said


async def _helm_test(
    running: Running, host: str, secs: int, *, replicas: int = 1, prelude: str = ""
) -> tuple[int | None, str]:
    """As the pod runs it: `python -u -c PROGRAM HOST PORT ADMIN SECONDS REPLICAS`."""
    arguments = [host, str(running.port), str(running.app.admin.port), str(secs), str(replicas)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-u",
        "-c",
        prelude + PROGRAM.read_text(),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()
