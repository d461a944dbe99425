"""The admin port while the rest still starts: a spool or a table of issues may take its time to load."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from forwarder.app import Application
from forwarder.delivery_findings import FindingsWorker
from tests.fakes.aws import FakeAws
from tests.falco import get
from tests.running import Running, settings_of


async def test_probes_are_answered_during_a_start(
    aws: FakeAws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alive, not ready, and no fault of ours: a kubelet and a Prometheus do not wait."""
    loading, go = asyncio.Event(), asyncio.Event()
    load = FindingsWorker.load

    async def slow(worker: FindingsWorker) -> None:
        loading.set()
        await go.wait()
        await load(worker)

    monkeypatch.setattr(FindingsWorker, "load", slow)
    app = Application(settings_of(tmp_path), validate=True)
    starting = asyncio.create_task(app.start())
    try:
        await asyncio.wait_for(loading.wait(), 10)
        paths = ("/livez", "/readyz", "/status", "/metrics", "/sensors")
        answers = {path: (await get(app.admin.port, path)).status for path in paths}
    finally:
        go.set()
        await starting
        await Running(app).stop()
    assert (answers["/livez"], answers["/readyz"]) == (200, 503)
    assert 500 not in answers.values(), answers
