"""The command line: what each command prints, and the code it exits with."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Self

import pytest
import structlog
from aiohttp import web

from forwarder import __version__, live_check
from forwarder.__main__ import EXIT_CONFIG, EXIT_FAILED, EXIT_OK, main
from tests.certificates import Authority
from tests.fakes.aws import FakeAws
from tests.samples import REAL_BODIES

ROLE = "arn:aws:iam::444455556666:role/falco"

Check = Callable[..., tuple[int, str]]


@contextlib.contextmanager
def running(service: AbstractAsyncContextManager[Any]) -> Iterator[None]:
    """A service in a thread with its own loop: the command under test has one too."""
    ready, errors = threading.Event(), list[BaseException]()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with service:
            ready.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            errors.append(error)
        finally:
            loop.close()
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        if not errors:
            loop.call_soon_threadsafe(stop.set)
        thread.join(10)
    assert not errors, errors


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAws]:
    """A fake AWS in a thread, and an environment that leads there and nowhere else."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FORWARDER__"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(logging.getLogger("aiobotocore.credentials"), "disabled", True)
    found = FakeAws()
    with running(found):
        files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
        for name, value in (found.environment() | files).items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "forwarder.yaml"
    path.write_text(
        f"""
cluster: {{name: prod}}
spool: {{directory: {tmp_path / "spool"}, bytes_max: 16777216}}
receiver: {{host: 127.0.0.1, port: 0, drain_delay_secs: 0}}
admin: {{host: 127.0.0.1, port: 0}}
aws: {{region: eu-west-1}}
enrichment: {{kubernetes: {{enabled: false}}, ec2: {{enabled: false}}, ecs: {{enabled: false}}}}
sinks:
  cloudwatch_logs: {{enabled: true, log_group: /falco/prod}}
  security_hub: {{enabled: true}}
"""
    )
    return path


@pytest.fixture
def check(config: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs ``check --live``: exit code and the table."""

    def run(*, changes: tuple[str, str] = ("", "")) -> tuple[int, str]:
        config.write_text(config.read_text().replace(*changes))
        code = main(["check", "--config", str(config), "--live"])
        return code, capsys.readouterr().out

    return run


def bad_lines(table: str) -> list[str]:
    return [
        line.removeprefix("FAIL").strip().split("  ")[0]
        for line in table.splitlines()
        if line.startswith("FAIL")
    ]


# ---- arguments --------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"falco-forwarder {__version__}\n"


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "forwarder", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"falco-forwarder {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["start"], ["check", "--cofnig", "x"], ["demo", "--once", "--keep"], ["replay"]]
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: falco-forwarder" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [True, False])
def test_the_demos_result_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """The demo itself is run by its own test."""
    told: list[bool] = []

    def demo(*, keep: bool) -> int:
        told.append(keep)
        return 7

    monkeypatch.setattr("forwarder.demo.demo", demo)
    assert main(["demo", "--keep"] if keep else ["demo"]) == 7
    assert told == [keep]


# ---- check ------------------------------------------------------------------------------------------


def test_check_of_a_good_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", str(config)]) == EXIT_OK
    assert capsys.readouterr() == ("configuration ok\n", "")


@pytest.mark.parametrize("command", ["check", "run"])
def test_every_fault_is_printed(command: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("/falco/prod", "a b").replace("port: 0", "prot: 0", 1))
    assert main([command, "--config", str(config)]) == EXIT_CONFIG == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert re.search(r"^receiver\.prot \(line \d+\): unknown key, did you mean port\?$", err, re.MULTILINE)
    assert any(line.startswith("sinks.cloudwatch_logs.log_group (line ") for line in lines)
    summary = f"falco-forwarder: {len(lines) - 1} faults in the configuration"
    assert lines[-1] == (summary if command == "check" else f"{summary}: {'; '.join(lines[:-1])}")


def test_one_fault_is_counted_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.yaml"
    main(["check", "--config", str(missing)])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{missing}: cannot be read: No such file or directory"
    config = tmp_path / "one.yaml"
    config.write_text("aws: {region: x}\nsinks: {cloudwatch_logs: {enabled: true}}")
    assert main(["check", "--config", str(config)]) == EXIT_CONFIG
    assert capsys.readouterr().err.splitlines()[-1] == "falco-forwarder: 1 fault in the configuration"


# ---- check --live -----------------------------------------------------------------------------------


def test_a_good_set_up(check: Check, fake: FakeAws) -> None:
    """Twice: what the first check made is no fault for the second."""
    code, table = check()
    assert code == EXIT_OK, table
    assert table.startswith("configuration ok\nok    region ")
    assert "111122223333" in table
    code, table = check()
    assert code == EXIT_OK, table
    assert "exists" in table
    (finding,) = fake.findings.values()
    assert (finding["RecordState"], finding["Severity"]["Label"]) == ("ARCHIVED", "INFORMATIONAL")
    assert list(fake.groups["/falco/prod"].streams) == [live_check.TEST_STREAM]
    assert len(fake.events()) == 2
    assert fake.validation_errors == []


def test_the_files_of_the_receiver_are_read(
    check: Check, fake: FakeAws, config: Path, tmp_path: Path
) -> None:
    assert fake.hub_enabled
    pair = Authority(tmp_path).pair()
    (tmp_path / "users").write_text("falco:secret")
    tls = f"tls: {{cert_file: {pair.cert}, key_file: {pair.key}}}, auth: {{credentials_file: {tmp_path}/users}}}}"
    config.write_text(config.read_text().replace("drain_delay_secs: 0}", f"drain_delay_secs: 0, {tls}"))
    code, table = check()
    assert code == EXIT_OK, table
    assert re.search(
        r"ok    receiver: TLS and passwords +certificate until 20\d\d-\d\d-\d\d, 1 passwords", table
    )
    pair.key.unlink()
    (tmp_path / "users").write_text("")
    code, table = check()
    assert code == EXIT_FAILED
    assert bad_lines(table) == ["receiver: TLS and passwords"]
    assert "receiver.tls.key_file" in table
    assert "receiver.auth.credentials_file" in table


@pytest.mark.parametrize("off", ["cloudwatch_logs", "security_hub"])
def test_only_what_is_enabled_is_tried(check: Check, fake: FakeAws, off: str) -> None:
    code, table = check(changes=(f"{off}: {{enabled: true", f"{off}: {{enabled: false"))
    assert code == EXIT_OK
    assert off not in table


@pytest.mark.parametrize("shape", ["call", "finding"])
def test_a_hub_that_is_off(check: Check, fake: FakeAws, shape: Any) -> None:
    fake.hub_enabled = False
    fake.hub_disabled_shape = shape
    code, table = check()
    assert code == EXIT_FAILED
    assert bad_lines(table) == ["security_hub: hub enabled", "security_hub: test finding"]
    assert "not subscribed to AWS Security Hub" in table
    assert "-> enable Security Hub (CSPM) in this account and region" in table
    assert "-> allow securityhub:BatchImportFindings" in table


@pytest.mark.parametrize("code", ["InvalidInput", "Unknown"])
def test_a_refused_test_finding(check: Check, fake: FakeAws, code: str) -> None:
    fake.fail_findings(lambda _: True, code=code, message="because")
    exit_code, table = check()
    assert (exit_code, bad_lines(table)) == (EXIT_FAILED, ["security_hub: test finding"])
    assert f"{code}: because" in table


def test_wrong_credentials(check: Check, fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    code, table = check()
    assert code == EXIT_FAILED
    assert len(bad_lines(table)) == 6
    assert "-> the credentials are missing, expired or wrong" in table
    assert "wrong" not in table.replace("or wrong", "")


def test_no_credentials(check: Check, fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    code, table = check()
    assert (code, len(bad_lines(table))) == (EXIT_FAILED, 6)
    assert "NoCredentialsError" in table


def test_a_pod_identity_agent_that_is_away(
    check: Check, fake: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table says so; a traceback would not help anybody."""
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.RETRY_ATTEMPTS", 1)
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/credentials")
    code, table = check()
    assert (code, len(bad_lines(table))) == (EXIT_FAILED, 6)
    assert "-> the credentials are missing, expired or wrong" in table


def test_an_endpoint_that_cannot_be_reached(
    check: Check, fake: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:1")
    code, table = check()
    assert code == EXIT_FAILED
    assert bad_lines(table)[0] == "credentials and account"
    assert "-> the endpoint cannot be reached" in table


@pytest.mark.parametrize(
    ("operation", "step", "advice"),
    [
        ("CreateLogStream", "log stream", "allow logs:CreateLogStream on the group"),
        ("PutLogEvents", "test event", "allow logs:PutLogEvents on the group"),
        ("BatchImportFindings", "test finding", "allow securityhub:BatchImportFindings"),
        ("DescribeHub", "hub enabled", "or allow securityhub:DescribeHub"),
        ("GetCallerIdentity", "credentials and account", "give the pod a role"),
    ],
)
def test_a_missing_permission_is_named(
    check: Check, fake: FakeAws, operation: str, step: str, advice: str
) -> None:
    fake.fail(operation, code="AccessDeniedException", status=403, times=None)
    code, table = check()
    assert code == EXIT_FAILED
    assert step in bad_lines(table)[0]
    assert advice in table


def test_without_any_group_its_creation_must_be_allowed(check: Check, fake: FakeAws) -> None:
    fake.fail("CreateLogGroup", code="AccessDeniedException", status=400, times=None)
    code, table = check()
    assert code == EXIT_FAILED
    assert "allow logs:CreateLogGroup, or create the group yourself" in table


def test_a_group_made_by_somebody_else_is_enough(check: Check, fake: FakeAws) -> None:
    """As for the service itself: where events arrive, nobody needs the right to make the group."""
    check()
    fake.fail("CreateLogGroup", code="AccessDeniedException", status=400, times=None)
    code, table = check()
    assert code == EXIT_OK, table


def test_a_service_in_trouble(check: Check, fake: FakeAws) -> None:
    fake.fail("DescribeHub", code="InternalException", status=500, times=None)
    code, table = check()
    assert (code, bad_lines(table)) == (EXIT_FAILED, ["security_hub: hub enabled"])
    assert "-> try again later" in table


def test_a_role_of_another_account(check: Check, fake: FakeAws) -> None:
    fake.roles[ROLE] = "shared"
    wrong = f"security_hub: {{enabled: true, role_arn: '{ROLE}', external_id: wrong"
    code, table = check(changes=("security_hub: {enabled: true", wrong))
    assert (code, len(bad_lines(table))) == (EXIT_FAILED, 2)
    assert "AssumeRole" in table
    code, table = check(changes=("external_id: wrong", "external_id: shared"))
    assert code == EXIT_OK, table
    assert [finding["AwsAccountId"] for finding in fake.findings.values()] == ["444455556666"]


# ---- replay -----------------------------------------------------------------------------------------


class Receiver(contextlib.AbstractAsyncContextManager["Receiver"]):
    """Takes alerts, refuses one rule."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.url = ""

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.bodies.append(body)
        return web.Response(status=400, text="no") if body == b"bad" else web.Response()

    async def __aenter__(self) -> Self:
        self._server = web.ServerRunner(web.Server(self._handle))
        await self._server.setup()
        await web.TCPSite(self._server, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._server.addresses[0][1]}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.cleanup()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    with running(found):
        yield found


@pytest.mark.parametrize("senders", ["-5", "1", "4", "1000"])
def test_replay_of_a_file(
    receiver: Receiver, tmp_path: Path, senders: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "alerts.ndjson"
    file.write_bytes(b"\n".join(REAL_BODIES) + b"\n\n  \n")
    assert main(["replay", str(file), "--url", receiver.url, "--senders", senders]) == EXIT_OK
    assert capsys.readouterr() == ("sent 119\nacknowledged 119\n", "")
    assert sorted(receiver.bodies) == sorted(REAL_BODIES)


def test_replay_of_standard_input(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"rule":"a"}\r\nbad\nbad\n{"rule":"\xff"}'))
    )
    assert main(["replay", "-", "--url", receiver.url]) == EXIT_FAILED
    out, err = capsys.readouterr()
    assert out == "sent 4\nacknowledged 2\n"
    assert err == "refused 2: 400 no\n"
    assert receiver.bodies == [b'{"rule":"a"}', b"bad", b"bad", b'{"rule":"\xff"}']


def test_replay_of_nothing(receiver: Receiver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "empty"
    file.write_bytes(b"")
    assert main(["replay", str(file), "--url", receiver.url]) == EXIT_OK
    assert capsys.readouterr().out == "sent 0\nacknowledged 0\n"


def test_replay_of_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none", tmp_path):
        assert main(["replay", str(path)]) == EXIT_FAILED
        assert f"{path} cannot be read: " in capsys.readouterr().err


# ---- run --------------------------------------------------------------------------------------------


@pytest.fixture
def _own_process() -> Iterator[None]:
    """What ``run`` does to its process is undone: logging, signals, the frozen collector."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    gc.unfreeze()
    for number, handler in signals.items():
        signal.signal(number, handler)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("_own_process")
def test_run_where_the_spool_cannot_be(
    config: Path, fake: FakeAws, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spool").write_text("a file, not a directory")
    assert main(["run", "--config", str(config)]) == EXIT_FAILED
    assert "falco-forwarder: cannot start: " in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it(
    config: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is open yet: exit 0 at once, also as the first process of a container, which ignores what it does not handle."""
    monkeypatch.setattr("forwarder.settings.load_settings", lambda _: os.kill(os.getpid(), number))
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    try:
        with pytest.raises(SystemExit) as left:
            main(["run", "--config", str(config)])
    finally:
        for each, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(each, handler)
    assert left.value.code == EXIT_OK


@pytest.mark.usefixtures("_own_process")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_until_the_signal(
    config: Path, fake: FakeAws, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was acknowledged before the signal is delivered when the command returns."""
    port = free_port()
    config.write_text(config.read_text().replace("port: 0", f"port: {port}", 1))
    answers: list[int] = []

    def falco() -> None:
        try:
            for _ in range(200):
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", REAL_BODIES[0], timeout=5) as answer,
                ):
                    answers.append(answer.status)
                    return
                threading.Event().wait(0.05)
        finally:
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=falco)
    hold = signal.signal(number, lambda *_: None)
    sender.start()
    try:
        assert main(["run", "--config", str(config)]) == EXIT_OK
    finally:
        sender.join()
        signal.signal(number, hold)
    assert answers == [200]
    assert len(fake.events()) == len(fake.findings) == 1
    assert '"event":"stopped"' in capsys.readouterr().err.replace(" ", "")
