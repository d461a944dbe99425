"""The oracle: what was promised against what can be found, after a run.

An alert answered 200 must be an event at CloudWatch Logs, a dead letter of that sink, or a record in the spool at
or behind that sink's cursor; the same for Security Hub, where it has to become a finding. What arrived must be
what was sent, integers included. The fake AWS writes a line for whatever it stores before it answers, so nothing
it accepted can be missing there.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from forwarder.spool_schema import BROKEN, DATABASE_NAME, decode_block
from tests.crash.senders import Ledger, is_finding

SINKS = ("cloudwatch_logs", "security_hub")


class Spooled(NamedTuple):
    """What a spool directory holds, read from a copy of it."""

    waiting: dict[str, set[str]]
    """Ids each sink has not settled."""
    dead: dict[str, set[str]]
    integrity: str


class Verdict(NamedTuple):
    """Counts of a run and every broken promise."""

    attempted: int
    acknowledged: int
    events: int
    findings: int
    redelivered: int
    """Events that arrived more than once, each repetition counted."""
    waiting: int
    dead: int
    lost: list[str]
    altered: list[str]

    def __str__(self) -> str:
        counts = {name: value for name, value in self._asdict().items() if isinstance(value, int)}
        lines = [f"{value} {name}" for name, value in counts.items()]
        lines += [f"{len(self.lost)} LOST {self.lost[:5]}"] * bool(self.lost)
        lines += [f"{len(self.altered)} ALTERED {self.altered[:3]}"] * bool(self.altered)
        return ", ".join(lines)


def read_spool(directory: Path) -> Spooled:
    """Read a spool whose process has ended; the directory itself is not touched."""
    spooled = Spooled({sink: set() for sink in SINKS}, {sink: set() for sink in SINKS}, "ok")
    if not (directory / DATABASE_NAME).exists():
        return spooled
    with tempfile.TemporaryDirectory(prefix="spool-copy-") as folder:
        for path in directory.glob(f"{DATABASE_NAME}*"):
            shutil.copy(path, folder)
        connection = sqlite3.connect(Path(folder) / DATABASE_NAME)
        try:
            (integrity,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            cursors = dict(connection.execute("SELECT sink, next FROM cursor"))
            for first, codec, crc, payload in connection.execute(
                "SELECT first, codec, crc, payload FROM block"
            ):
                if codec == BROKEN:
                    continue
                for offset, record in enumerate(decode_block(codec, crc, payload), first):
                    for sink in SINKS:
                        if offset >= cursors[sink]:
                            spooled.waiting[sink].add(record.id)
            for sink, identity in connection.execute("SELECT sink, id FROM dead"):
                spooled.dead.setdefault(sink, set()).add(identity)
        finally:
            connection.close()
    return spooled._replace(integrity=str(integrity))


def judge(ledger: Ledger, journal: Path, spool: Path) -> Verdict:
    """Compare the ledger with the fake's journal and the spool of an ended process."""
    messages: dict[str, list[dict[str, Any]]] = defaultdict(list)
    findings: set[str] = set()
    for line in journal.read_bytes().splitlines() if journal.exists() else ():
        entry = json.loads(line)
        if entry["kind"] == "event":
            event = json.loads(entry["message"])
            messages[event["id"]].append(event)
        elif entry["kind"] == "finding":
            findings.add(entry["Id"].rpartition("/")[2])
    spooled = read_spool(spool)
    acknowledged = ledger.acknowledged
    in_logs, in_hub = SINKS
    held_for_logs = messages.keys() | spooled.dead[in_logs] | spooled.waiting[in_logs]
    held_for_hub = findings | spooled.dead[in_hub] | spooled.waiting[in_hub]
    lost = [f"{identity} for {in_logs}" for identity in acknowledged if identity not in held_for_logs]
    lost += [
        f"{identity} for {in_hub}"
        for identity, body in acknowledged.items()
        if identity not in held_for_hub and is_finding(body)
    ]
    sent = {attempt.id: attempt.body for attempt in ledger.attempts}
    altered = [
        f"{identity} was never sent" for identity in messages.keys() | findings if identity not in sent
    ]
    for identity, events in messages.items():
        altered += [f"{identity}: {event}" for event in events if not _contains(event, sent.get(identity))]
    return Verdict(
        attempted=len(sent),
        acknowledged=len(acknowledged),
        events=sum(map(len, messages.values())),
        findings=len(findings),
        redelivered=sum(len(events) - 1 for events in messages.values()),
        waiting=len(set().union(*spooled.waiting.values())),
        dead=sum(map(len, spooled.dead.values())),
        lost=lost,
        altered=altered,
    )


def _contains(event: dict[str, Any], body: bytes | None) -> bool:
    """Whether an event has every member of the alert, unchanged (integers compare exactly)."""
    if body is None:
        return True  # reported as never sent
    alert: dict[str, Any] = json.loads(body)
    return all(key in event and event[key] == value for key, value in alert.items())
