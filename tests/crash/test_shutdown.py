"""SIGTERM: a rolling restart costs no alert, whatever AWS does meanwhile.

After SIGTERM the listener stays up for ``receiver.drain_delay_secs`` while endpoints are withdrawn; senders are
told to reconnect with ``Connection: close``. What is not delivered in time stays in the spool.
"""

from __future__ import annotations

import random
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.crash.harness import STOP_SECS_MAX, Stage, say, seeded
from tests.crash.senders import Attempt, Load

pytestmark = pytest.mark.crash

DELAY_SECS = 1.0
DRAIN_SECS = 10.0
MARGIN_SECS = 10.0
STALL_SECS = 6.0
"""Below the time for which the receiver waits for requests it believes to be under way."""


@pytest.fixture
def rng() -> random.Random:
    return seeded()


def test_sigterm_under_load_refuses_nobody_before_the_listener_closes(
    tmp_path: Path, rng: random.Random
) -> None:
    """Three restarts under load: no connection fails during the delay, exit code 0 in time, nothing is lost."""
    with Stage(tmp_path, rng, drain_delay_secs=DELAY_SECS, drain_secs_max=DRAIN_SECS) as stage:
        stage.aws.start()
        during: list[str] = []
        answered = 0
        with Load(stage.ledger, stage.ports.receiver):
            for _ in range(3):
                stage.forwarder.start()
                time.sleep(rng.uniform(1.0, 2.0))
                started = time.monotonic()
                code, secs = stage.forwarder.terminate(DELAY_SECS + DRAIN_SECS + MARGIN_SECS)
                say(f"ended with {code} after {secs:.2f} s")
                assert code == 0, stage.forwarder.tail()
                assert secs < DELAY_SECS + STALL_SECS, "with AWS up and fast senders, something stalled"
                attempts = list(stage.ledger.attempts)
                meanwhile = [item for item in attempts if started <= item.ended < started + DELAY_SECS]
                during += [item.error for item in meanwhile if item.error]
                answered += len(meanwhile)
                cut_off = [item for item in attempts if item.error and item.error != "ConnectionRefusedError"]
                say(f"{len(meanwhile)} requests in the delay, {len(cut_off)} connections cut so far")
        stage.forwarder.start()
        stage.forwarder.drain()
        verdict = stage.judge()
        assert answered > 100, "hardly a request fell into the delay"
        assert not during, during
        assert set(stage.ledger.statuses) == {0, 200}, stage.ledger.statuses
        assert verdict.redelivered == 0, "an orderly stop repeats no delivery"
        assert verdict.waiting == verdict.dead == 0, verdict


def test_sigterm_answers_what_is_half_received(tmp_path: Path, rng: random.Random) -> None:
    """A request whose body is under way when the listener closes is stored and answered, and does not stall."""
    with Stage(tmp_path, rng, drain_delay_secs=DELAY_SECS, drain_secs_max=DRAIN_SECS) as stage:
        stage.aws.start()
        stage.forwarder.start()
        process = stage.forwarder.process
        assert process is not None
        identity, body = stage.ledger.issue()
        head = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", stage.ports.receiver), 30.0) as sender:
            sender.sendall(head + body[:100])
            time.sleep(0.5)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            time.sleep(DELAY_SECS + 0.5)
            sender.sendall(body[100:])
            answer = sender.recv(4096)
            ended = time.monotonic()
        status = int(answer.split(b" ", 2)[1]) if answer else 0
        stage.ledger.note(Attempt(identity, body, status, "", started, ended))
        say(f"answered {status} {ended - started:.2f} s after SIGTERM")
        assert process.wait(STOP_SECS_MAX) == 0
        assert status == 200, "the alert was dropped without an answer"
        assert ended - started < DELAY_SECS + 4.0, "the answer came late"
        stage.judge()


def test_sigterm_while_aws_is_down_leaves_the_rest_to_the_next_start(
    tmp_path: Path, rng: random.Random
) -> None:
    """With AWS refusing connections the process ends well in time, and the next start delivers what waited."""
    with Stage(tmp_path, rng, drain_delay_secs=DELAY_SECS, drain_secs_max=DRAIN_SECS) as stage:
        stage.forwarder.start()
        with Load(stage.ledger, stage.ports.receiver):
            time.sleep(2.0)
            code, secs = stage.forwarder.terminate(DELAY_SECS + DRAIN_SECS + MARGIN_SECS)
        say(f"ended with {code} after {secs:.2f} s, {len(stage.ledger.acknowledged)} acknowledged")
        assert code == 0, stage.forwarder.tail()
        assert secs < DELAY_SECS + DRAIN_SECS, "it waited for AWS in vain"
        stage.aws.start()
        stage.forwarder.start()
        stage.forwarder.drain()
        verdict = stage.judge()
        assert verdict.events >= verdict.acknowledged
        assert verdict.waiting == verdict.dead == 0, verdict


def test_sigterm_while_aws_hangs_ends_in_time(tmp_path: Path, rng: random.Random) -> None:
    """With AWS accepting connections but never answering, the drain limit holds and nothing is lost."""
    with Stage(tmp_path, rng, drain_delay_secs=0, drain_secs_max=2) as stage:
        with socket.create_server(("127.0.0.1", stage.ports.aws)):
            stage.forwarder.start()
            with Load(stage.ledger, stage.ports.receiver):
                time.sleep(1.5)
                code, secs = stage.forwarder.terminate(2 + 2 * MARGIN_SECS)
        say(f"ended with {code} after {secs:.2f} s, {len(stage.ledger.acknowledged)} acknowledged")
        assert code == 0, stage.forwarder.tail()
        assert secs < 2 + MARGIN_SECS, "the drain limit did not hold"
        stage.aws.start()
        stage.forwarder.start()
        stage.forwarder.drain()
        verdict = stage.judge()
        assert verdict.waiting == verdict.dead == 0, verdict
