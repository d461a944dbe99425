"""A cluster's node list as a test writes it, and messages of its Falcos."""

from __future__ import annotations

import json
from typing import Any

from forwarder.alert import Alert, decode
from forwarder.sensors import DROP_RULE, SNAPSHOT_RULE

WALL = 1_795_215_424.0
"""Seconds since 1970 at loop time 0."""


class Cluster:
    """Nodes by name; a Falco pod is called ``falco-<node>``."""

    def __init__(self, *names: str) -> None:
        self.uids: dict[str, str] | None = {name: f"uid-{name}" for name in names}
        self.current = True
        self.asked = 0

    def node_of(self, hostname: str, peer: str) -> str:
        self.asked += 1
        for name in (hostname, hostname.removeprefix("falco-"), peer.removeprefix("10.0.0.")):
            if name in (self.uids or {}) or name == "not-selected":
                return name
        return ""

    def sensor_nodes(self) -> dict[str, str] | None:
        return None if self.uids is None else dict(self.uids)

    def nodes_are_current(self) -> bool:
        return self.current

    def node_enrichment(self, name: str) -> bytes:
        return b'"node":{"name":"%b","instance_id":"i-0123456789abcdef0"}' % name.encode()


def message(hostname: str = "", **keys: Any) -> Alert:
    """An alert of a Falco's own source."""
    body = {
        "rule": "R",
        "priority": "Warning",
        "output": "o",
        "time": "2026-11-20T22:57:04.395364197Z",
        "source": "syscall",
        "hostname": hostname,
        "output_fields": {},
    } | keys
    (found,) = decode(json.dumps(body).encode()).alerts
    return found


def snapshot(hostname: str = "", **fields: Any) -> Alert:
    """A metrics snapshot."""
    return message(hostname, rule=SNAPSHOT_RULE, source="internal", output_fields=fields)


def drop(hostname: str, count: Any) -> Alert:
    """Falco's complaint of dropped events."""
    return message(hostname, rule=DROP_RULE, source="internal", output_fields={"n_drops": count})
