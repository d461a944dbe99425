"""Whether the spool that the chart configures has room where it puts it. Run by `make chart-test`."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from forwarder.record import ALERT, Record
from forwarder.spool_ballast import fitting_bytes
from forwarder.spool_store import Store, is_full
from forwarder.spool_values import Batch
from tests.chart.rendering import LOGS, configuration, objects_of

BODY_BYTES = 1 << 20
EXT4_SHARE = 0.972
"""What `statvfs` says of 8 GiB of ext4: the rest is inodes and journal (`dumpe2fs -h`, overhead clusters)."""


def test_the_smallest_empty_dir_is_never_outgrown(tmp_path: Path) -> None:
    """Filled far beyond its quota, until SQLite takes no more: the kubelet counts database, log and ballast."""
    size_bytes = 512 << 20
    spool = configuration(objects_of(None, sets=[LOGS, "spool.size=512Mi"]))["spool"]
    store = Store(
        tmp_path,
        full_sync=False,
        bytes_max=spool["bytes_max"],
        dead_retention_secs=60.0,
        unparsed_bytes_max=64 << 20,
    )
    store.open({"cloudwatch_logs"})
    noise, largest, fault = random.Random(1), 0, None
    for number in range(size_bytes // BODY_BYTES):
        body = noise.randbytes(BODY_BYTES)
        written = store.write(
            Batch([Record(ALERT, str(number), 5, 0, 0, internal=False, body=body)], {}, []), 0.0
        )
        largest = max(largest, sum(it.stat().st_blocks * 512 for it in tmp_path.iterdir()))
        fault = written.error
        if fault is not None:
            break
    store.close()
    assert fault is not None
    assert is_full(fault), fault
    assert spool["bytes_max"] < largest < 0.9 * size_bytes, largest / size_bytes


def test_the_quota_is_one_the_forwarder_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the volume of the default size, as it is with a file system on it: or every start would warn of a quota that was lowered."""
    config = configuration(objects_of(None, sets=[LOGS, "persistence.enabled=true"]))
    blocks = int((8 << 30) * EXT4_SHARE) // 4096
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=blocks, f_frsize=4096))
    assert fitting_bytes(tmp_path, config["spool"]["bytes_max"]) == config["spool"]["bytes_max"]
