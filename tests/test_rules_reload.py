"""Reloading the rules, in simulated time: whole or not at all, by content, and never silently wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from forwarder.rules import RuleBook
from forwarder.rules_reload import MISSING_LOOKS, RulesReload
from forwarder.settings import Settings, load_settings
from tests.samples import REAL_BODIES, record_of

pytestmark = pytest.mark.looptime

PERIOD_SECS = 10.0
BASE = """cluster: {name: prod}
aws: {region: eu-west-1}
sinks: {cloudwatch_logs: {enabled: true, log_group: /falco/prod}}
"""
DROP = BASE + "rules: [{name: all, drop: true}]\n"
LOW = BASE + "rules: [{name: all, severity: low}, {name: more}]\n"
BAD = BASE + "rules:\n- {name: all, drop: true, severity: loud}\n- {name: all}\n"


class Mount:
    """A ConfigMap as the kubelet mounts it: the file is a link into a directory that a link named ..data points to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._version = 0
        self.file = directory / "forwarder.yaml"
        self.file.symlink_to(Path("..data") / self.file.name)

    def write(self, text: str) -> None:
        """Every version has the same times and the swap is one rename."""
        self._version += 1
        target = self._directory / f"..version_{self._version}"
        target.mkdir()
        (target / self.file.name).write_text(text)
        os.utime(target / self.file.name, (1_000_000, 1_000_000))
        link = self._directory / "..data_tmp"
        link.symlink_to(target.name)
        link.rename(self._directory / "..data")

    def take_away(self) -> None:
        (self._directory / "..data").unlink()


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    mount = Mount(tmp_path)
    mount.write(DROP)
    return mount


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with capture_logs() as lines:
        yield lines


class Running:
    """The reload task of a process that started with the mount's file."""

    def __init__(self, mount: Mount, load: Callable[[Path], Settings]) -> None:
        self.started = load_settings(mount.file, {})
        self.book = RuleBook(self.started.rules, now=lambda: 1_800_000_000.0)
        self.told: list[bool] = []
        self.reload = RulesReload(
            mount.file,
            self.book,
            self.started,
            load=load,
            reloaded=self.told.append,
            period_secs=PERIOD_SECS,
            in_thread=at_once,
        )

    @property
    def names(self) -> tuple[str, ...]:
        return self.book.rules.names


async def at_once(work: Callable[..., Any], *arguments: Any) -> Any:
    """In the place of a thread, which has no loop; simulated time would run on while a real one works."""
    loop = asyncio.get_running_loop()
    asyncio._set_running_loop(None)
    try:
        return work(*arguments)
    finally:
        asyncio._set_running_loop(loop)


@contextlib.asynccontextmanager
async def running(mount: Mount, load: Callable[[Path], Settings] | None = None) -> AsyncIterator[Running]:
    it = Running(mount, load or (lambda path: load_settings(path, {})))
    task = asyncio.create_task(it.reload.run())
    try:
        await asyncio.sleep(1)
        yield it
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def periods(count: float = 1) -> None:
    await asyncio.sleep(count * PERIOD_SECS)


async def test_nothing_changed_nothing_told(mount: Mount, logged: list[Any]) -> None:
    async with running(mount) as it:
        rules = it.book.rules
        mount.write(DROP)
        await periods(5)
        assert it.book.rules is rules
        assert (it.told, logged) == ([], [])


async def test_new_rules_are_in_force_within_a_period(mount: Mount, logged: list[Any]) -> None:
    async with running(mount) as it:
        it.book.decide(record_of(REAL_BODIES[0]), "cloudwatch_logs")
        mount.write(LOW)
        await periods()
        assert it.names == ("all", "more")
        assert it.told == [True]
        verdict, _ = it.book.decide(record_of(REAL_BODIES[0]), "cloudwatch_logs")
        assert (verdict.severity, verdict.drop) == ("LOW", False)
        assert it.book.status()["rules"][0] == {"name": "all", "matched": {"cloudwatch_logs": 2}}
        await periods(3)
        assert it.told == [True]
        assert [(entry["event"], entry["rules"]) for entry in logged] == [("rules reloaded", 2)]


async def test_a_change_between_start_and_first_look_is_seen(mount: Mount) -> None:
    def load(path: Path) -> Settings:
        return load_settings(path, {})

    it = Running(mount, load)
    mount.write(LOW)
    await it.reload.look()
    assert (it.names, it.told) == (("all", "more"), [True])


async def test_a_bad_reload_keeps_the_old_rules_and_says_every_fault_once(
    mount: Mount, logged: list[Any]
) -> None:
    async with running(mount) as it:
        mount.write(BAD)
        await periods(5)
        assert (it.names, it.told) == (("all",), [False])
        assert it.book.decide(record_of(REAL_BODIES[0]), "s")[0].drop
        (entry,) = logged
        assert entry["log_level"] == "error"
        assert [fault.split(":")[0] for fault in entry["faults"]] == [
            "rules[0].severity (line 5)",
            "rules[0].drop (line 5)",
            "rules[1].name (line 6)",
        ]
        mount.write(BAD + "# edited, as bad as before\n")
        await periods()
        assert (it.told, len(logged)) == ([False, False], 2)
        mount.write(LOW)
        await periods()
        assert (it.names, it.told) == (("all", "more"), [False, False, True])


async def test_going_back_to_the_rules_in_force_ends_a_bad_state(mount: Mount) -> None:
    async with running(mount) as it:
        rules = it.book.rules
        mount.write("rules: [")
        await periods()
        mount.write(DROP)
        await periods()
        assert it.told == [False, True]
        assert it.book.rules is rules, "what is remembered of them is kept"


async def test_a_fault_elsewhere_in_the_file_keeps_the_old_rules_too(mount: Mount) -> None:
    async with running(mount) as it:
        mount.write(LOW + "receiver: {port: 99999}\n")
        await periods()
        assert (it.names, it.told) == (("all",), [False])


async def test_other_settings_wait_for_the_next_start_and_rules_do_not(
    mount: Mount, logged: list[Any]
) -> None:
    async with running(mount) as it:
        mount.write(LOW.replace("prod}", "other}", 1) + "admin: {port: 9000}\n")
        await periods()
        mount.write(DROP.replace("prod}", "other}", 1) + "admin: {port: 9000}\n")
        await periods()
        assert (it.names, it.told) == (("all",), [True, True])
        said = [entry for entry in logged if entry["log_level"] == "warning"]
        assert [entry["sections"] for entry in said] == [["cluster", "admin"]], "said once"
        mount.write(LOW)
        await periods()
        mount.write(LOW + "admin: {port: 9000}\n")
        await periods()
        said = [entry for entry in logged if entry["log_level"] == "warning"]
        assert [entry["sections"] for entry in said] == [["cluster", "admin"], ["admin"]]


async def test_a_file_that_is_away_for_a_moment_is_no_news(mount: Mount, logged: list[Any]) -> None:
    async with running(mount) as it:
        for _ in range(3):
            mount.take_away()
            await periods(MISSING_LOOKS - 1)
            mount.write(DROP)
            await periods()
        assert (it.told, logged) == ([], [])


async def test_a_file_that_stays_away_is_said_once(mount: Mount, logged: list[Any]) -> None:
    async with running(mount) as it:
        mount.take_away()
        await periods(MISSING_LOOKS + 10)
        assert (it.names, it.told) == (("all",), [False])
        (entry,) = logged
        assert entry["error"] == "No such file or directory"
        mount.write(DROP)
        await periods()
        assert it.told == [False, True]


async def test_a_file_that_goes_while_it_is_loaded_is_read_again(mount: Mount) -> None:
    gone: list[int] = []

    def load(path: Path) -> Settings:
        if len(gone) == 1:
            mount.take_away()
        gone.append(1)
        return load_settings(path, {})

    async with running(mount, load) as it:
        mount.write(LOW)
        await periods()
        assert (it.names, it.told) == (("all",), [])
        mount.write(LOW)
        await periods()
        assert (it.names, it.told) == (("all", "more"), [True])


async def test_a_fault_of_ours_does_not_end_reloading(mount: Mount, logged: list[Any]) -> None:
    fail: list[int] = []

    def load(path: Path) -> Settings:
        if fail:
            raise RuntimeError("bug")
        return load_settings(path, {})

    async with running(mount, load) as it:
        fail.append(1)
        mount.write(LOW)
        await periods(5)
        assert (it.names, it.told, len(logged)) == (("all",), [False], 1)
        fail.clear()
        mount.write(LOW + "# again\n")
        await periods()
        assert (it.names, it.told) == (("all", "more"), [False, True])


@pytest.mark.looptime(False)
async def test_in_a_real_thread(mount: Mount) -> None:
    """As it runs: nothing of it blocks the event loop, which the fixture ``nothing_blocks`` would see."""
    told: list[bool] = []
    started = load_settings(mount.file, {})
    book = RuleBook(started.rules, now=lambda: 0.0)
    reload = RulesReload(
        mount.file, book, started, load=lambda path: load_settings(path, {}), reloaded=told.append
    )
    mount.write(LOW)
    await reload.look()
    assert (book.rules.names, told) == (("all", "more"), [True])
