"""Fixtures for all tests: the fake AWS, a running forwarder, and a watch on the event loop."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from blockbuster import BlockBuster, BlockingError
from blockbuster import blockbuster as blockbuster_module
from botocore.loaders import JSONFileLoader

from forwarder import app, delivery_calls, delivery_telling, logs, receiver, receiver_connection, spool
from forwarder.app import Application
from forwarder.receiver_files import ReceiverFiles
from forwarder.rules_reload import RulesReload
from forwarder.settings import load_settings
from tests.fakes.aws import FakeAws
from tests.running import Running, Start, configure

# looptime asks the policy for a loop, which would make one in each process that nobody closes.
asyncio.set_event_loop(None)


@pytest.fixture(scope="session", autouse=True)
def _models_read_once() -> Iterator[None]:
    """The SDK parses its service models again for every session: a third of the time of all tests."""
    patch = pytest.MonkeyPatch()
    patch.setattr(JSONFileLoader, "load_file", cache(JSONFileLoader.load_file))
    # One loader for all: what is remembered is remembered by loader and path.
    patch.setattr(JSONFileLoader, "__hash__", lambda _: 0, raising=False)
    patch.setattr(JSONFileLoader, "__eq__", lambda _, other: isinstance(other, JSONFileLoader), raising=False)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def nothing_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test in which code of ``forwarder`` blocks the event loop. Tests themselves may block.

    SQLite is not in the way: it runs in the spool's writer thread, which has no loop.
    """
    calls: list[str] = []

    class NotedError(BlockingError):
        """Also seen where the code under test swallows it."""

        def __init__(self, func: str) -> None:
            super().__init__(func)
            ours = [
                frame for frame in traceback.extract_stack() if f"{os.sep}forwarder{os.sep}" in frame.filename
            ]
            calls.append(f"{func} in {ours[-1].name}, line {ours[-1].lineno}" if ours else func)

    monkeypatch.setattr(blockbuster_module, "BlockingError", NotedError)
    watch = BlockBuster("forwarder")
    for function in watch.functions.values():
        # The SDK reads its service models and credential files once, before the listener opens.
        function.can_block_in("forwarder/aws.py", {"_create"})
        # The configuration is read before there is a loop; only tests read it later.
        function.can_block_in("forwarder/config.py", {"_read"})
        # Coverage has a lock of its own, taken wherever it happens to look.
        function.can_block_in("coverage/collector.py", {"lock_data", "unlock_data"})
        # A traceback is rendered with its source lines.
        function.can_block_in("structlog/_base.py", {"_proxy_to_logger"})
    watch.activate()
    try:
        yield
    finally:
        watch.deactivate()
    assert not calls, f"blocked the event loop: {calls}"


@pytest.fixture
async def aws(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeAws]:
    """A started fake, and an environment that leads the SDK there and nowhere else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    async with FakeAws(rate_limits=False) as fake:
        settings = fake.environment() | dict.fromkeys(
            ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull
        )
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        yield fake


@pytest.fixture
async def forwarder(aws: FakeAws, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts forwarders on this test's spool; the second one after the first was stopped."""
    started: list[Running] = []

    async def start(changes: Mapping[str, Any] | None = None, *, reloads: bool = False) -> Running:
        file = configure(tmp_path, changes)
        # The environment is read again with the file.
        settings = load_settings(file, os.environ if reloads else {})
        running = Running(Application(settings, config=file if reloads else None, validate=True))
        await running.app.start()
        started.append(running)
        return running

    yield start
    for running in started:
        await running.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Periods that nobody configures, shortened: back-off, probe, sweep, housekeeping, lingering close, reload."""
    monkeypatch.setattr(delivery_calls, "BACKOFF_BASE_SECS", 0.02)
    monkeypatch.setattr(delivery_calls, "BACKOFF_MAX_SECS", 0.2)
    monkeypatch.setattr(delivery_calls, "PROBE_SECS", 0.1)
    monkeypatch.setattr(delivery_telling, "BACKOFF_BASE_SECS", 0.02)
    monkeypatch.setattr(delivery_telling, "BACKOFF_MAX_SECS", 0.2)
    monkeypatch.setattr(receiver, "SWEEP_SECS", 0.05)
    monkeypatch.setattr(receiver_connection, "LINGER_SECS", 0.1)
    monkeypatch.setattr(spool, "HOUSEKEEPING_SECS", 0.05)
    monkeypatch.setattr(app, "RulesReload", partial(RulesReload, period_secs=0.05))
    monkeypatch.setattr(app, "ReceiverFiles", partial(ReceiverFiles, period_secs=0.05))


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    """Everything that is logged, as the program writes it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("info", stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
