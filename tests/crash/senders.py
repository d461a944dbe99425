"""Senders that behave like Falco, and the ledger of what they were promised.

Falco posts one alert a request on a kept-alive connection, waits for the answer, never looks at its status and
never repeats an alert because of it. A broken or refused connection costs the alert in hand; the next one opens
a new connection. As libcurl does, a connection the other side has closed meanwhile is noticed before its use.

Every alert is made of a real one and is unique: its uuid is the ledger's id, a marker and an integer beyond 2^53
are in its output fields. An alert counts as acknowledged when a 200 was read to its end.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import select
import socket
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from importlib import resources
from types import TracebackType
from typing import Any, NamedTuple, Self

ANSWER_SECS_MAX = 30.0
REFUSED_PAUSE_SECS = 0.02
FINDING_PRIORITIES = frozenset({"Emergency", "Alert", "Critical", "Error", "Warning", "Notice"})


class Attempt(NamedTuple):
    """One alert posted, and how that ended."""

    id: str
    body: bytes
    status: int
    """Of an answer read to its end; 0 where there was none."""
    error: str
    """Name of the connection's error, or nothing."""
    started: float
    """Monotonic time."""
    ended: float


class Ledger:
    """Issues unique alerts and remembers every attempt, over all restarts of a test."""

    def __init__(self, rng: random.Random) -> None:
        lines = resources.files("forwarder").joinpath("data/falco_alerts.ndjson").read_bytes().splitlines()
        self._templates: list[dict[str, Any]] = [json.loads(line) for line in lines if line]
        self._run = f"{rng.getrandbits(48):012x}"
        self._start_ns = time.time_ns()
        self._issued = 0
        self._lock = threading.Lock()
        self.attempts: list[Attempt] = []

    def issue(self, *, priority: str | None = None, filler_bytes: int = 0) -> tuple[str, bytes]:
        """Id and body of a new alert; ``filler_bytes`` of it do not compress."""
        with self._lock:
            number = self._issued
            self._issued += 1
        alert = dict(self._templates[number % len(self._templates)])
        identity = f"{self._run}-{number:07d}"
        happened_ns = self._start_ns + number * 1_000_003
        alert["uuid"] = identity
        alert["time"] = f"{_second(happened_ns)}.{happened_ns % 1_000_000_000:09d}Z"
        if priority is not None:
            alert |= {"priority": priority, "source": "syscall", "rule": "Crash test"}
        fields = dict(alert.get("output_fields") or {})
        fields["evt.time"] = happened_ns
        fields["crash.marker"] = hashlib.sha256(identity.encode()).hexdigest()
        fields["crash.number"] = 2**63 - 1 - number
        if filler_bytes:
            noise = random.Random(number).randbytes(filler_bytes * 3 // 4)
            fields["crash.filler"] = base64.b64encode(noise).decode()
        alert["output_fields"] = fields
        return identity, json.dumps(alert, separators=(",", ":"), ensure_ascii=False).encode()

    def note(self, attempt: Attempt) -> None:
        with self._lock:
            self.attempts.append(attempt)

    @property
    def acknowledged(self) -> dict[str, bytes]:
        """Bodies of the acknowledged alerts by id."""
        return {attempt.id: attempt.body for attempt in list(self.attempts) if attempt.status == 200}

    @property
    def statuses(self) -> Counter[int]:
        """How many answers of each status; 0 counts the broken connections."""
        return Counter(attempt.status for attempt in list(self.attempts))


def _second(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def is_finding(body: bytes) -> bool:
    """Whether an alert must become a finding: Notice and higher, and not Falco about itself."""
    alert = json.loads(body)
    internal = alert.get("source") == "internal" or alert["rule"].startswith("Falco internal: ")
    return alert["priority"] in FINDING_PRIORITIES and not internal


class Connection:
    """A kept-alive connection that heals itself, for one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def post(self, body: bytes) -> int:
        """Send one body and read the whole answer; returns its status. Raises ``OSError``."""
        if self._socket is not None and select.select((self._socket,), (), (), 0)[0]:
            self.close()
        try:
            return self._exchange(body)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None

    def _exchange(self, body: bytes) -> int:
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), ANSWER_SECS_MAX)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(
            b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: falcosecurity/falco\r\nAccept: */*\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._receive()
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        while len(rest) < length:
            rest += self._receive()
        if b"connection: close" in lines:
            self.close()
        return int(head.split(b" ", 2)[1])

    def _receive(self) -> bytes:
        if self._socket is None:
            raise ConnectionError("no connection")
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError("closed before the answer")
        return data


def post_one(ledger: Ledger, connection: Connection, **options: Any) -> Attempt:
    """Post a new alert and note how it went; ``options`` are those of ``Ledger.issue``."""
    identity, body = ledger.issue(**options)
    started = time.monotonic()
    status, error = 0, ""
    try:
        status = connection.post(body)
    except OSError as failure:
        error = type(failure).__name__
    attempt = Attempt(identity, body, status, error, started, time.monotonic())
    ledger.note(attempt)
    return attempt


class Load:
    """Serial senders in threads, for the length of a ``with`` block."""

    def __init__(
        self, ledger: Ledger, port: int, *, senders: int = 8, rate: float = 440.0, **options: Any
    ) -> None:
        """``rate`` is that of all senders together, in alerts a second."""
        self._ledger = ledger
        self._port = port
        self._options = options
        self._interval = senders / rate
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(index * self._interval / senders,), daemon=True)
            for index in range(senders)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * ANSWER_SECS_MAX)

    def _run(self, delay: float) -> None:
        connection = Connection(self._port)
        due = time.monotonic() + delay
        try:
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                attempt = post_one(self._ledger, connection, **self._options)
                # A sender that fell behind catches up, but only by a second.
                due = max(due + self._interval, attempt.ended - 1.0)
                if attempt.error:
                    due = max(due, attempt.ended + REFUSED_PAUSE_SECS)
        finally:
            connection.close()
