"""What several tests share: the real alerts, and records made of bodies as ingest makes them."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from forwarder import alert
from forwarder.record import ALERT, Record

RECEIVED_NS = 1_800_000_000_123_456_789
REAL_BODIES: list[bytes] = (
    (resources.files("forwarder") / "data" / "falco_alerts.ndjson").read_bytes().splitlines()
)
REAL_ALERTS: list[dict[str, Any]] = [json.loads(body) for body in REAL_BODIES]
TEXT_LINES: list[bytes] = (
    (Path(__file__).parent / "data" / "falco" / "falco_text_alerts.txt").read_bytes().splitlines()
)


def body_of(members: Any, *, ascii_only: bool = False) -> bytes:
    """JSON as Falco writes it: no spaces, raw UTF-8."""
    return json.dumps(members, ensure_ascii=ascii_only, separators=(",", ":")).encode()


def record_of(body: bytes | dict[str, Any], **changes: Any) -> Record:
    """The record ingest makes of one alert's body (or members), with ``changes``."""
    raw = body if isinstance(body, bytes) else body_of(body)
    found = alert.decode(raw).alerts[0]
    values: dict[str, Any] = {
        "kind": ALERT,
        "id": found.id or hashlib.sha256(found.body + found.sender_keys).hexdigest()[:32],
        "priority": found.rank,
        "time_ns": RECEIVED_NS if found.time_ns is None else found.time_ns,
        "received_ns": RECEIVED_NS,
        "internal": found.internal,
        "body": found.body,
        "notes": b'"sender_keys":' + found.sender_keys if found.sender_keys else b"",
        "hostname": found.hostname,
    }
    return Record(**values | changes)
