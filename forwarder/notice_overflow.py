"""The notice that aggregation had to forget issues: its table is full."""

from __future__ import annotations

from forwarder.alert import encode as json_encode
from forwarder.notice import Notice
from forwarder.record import ALERT, Record
from forwarder.timestamp import iso_milliseconds

TITLE = "Falco alerts: the aggregation table overflowed"


def overflow(spool_id: str, entries_max: int, at: float) -> Notice:
    """Key, text and severity; the count of forgotten issues is the finding's."""
    time_ns = int(at * 1e9)
    text = (
        f"More than {entries_max} different issues at a time: those longest without an alert were forgotten, and what comes of them is a "
        "new finding. No alert is lost. Somebody may be producing alerts on purpose; else raise aggregation.entries_max or use a shorter "
        "aggregation.key."
    )
    body = {
        "rule": "Falco AWS Forwarder: aggregation table overflowed",
        "output": text,
        "priority": "Warning",
        "source": "forwarder",
        "time": iso_milliseconds(time_ns),
    }
    record = Record(ALERT, "overflow", 4, time_ns, time_ns, internal=True, body=json_encode(body))
    return Notice(f"{spool_id}/overflow", TITLE, "MEDIUM", active=True, record=record)
