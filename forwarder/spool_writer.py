"""The spool's writer: one thread that owns the database connection and does one job at a time.

Results come back to the event loop; when that is closed, nobody waits for them any more and they are let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import structlog

log = structlog.get_logger("spool")
T = TypeVar("T")


class Writer:
    """A thread with a queue of jobs, fed from the event loop that started it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.beat = 0.0
        """Loop time at which the thread last finished something."""

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="spool-writer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the jobs that wait."""
        self._jobs.put(None)

    def put(self, job: Callable[[], None]) -> None:
        """A job that reports by ``call_loop`` itself."""
        self._jobs.put(job)

    def call_loop(self, callback: Callable[..., Any], *values: Any) -> None:
        """From the thread: call back in the event loop."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._called, callback, values)

    async def run(self, function: Callable[[], T]) -> T:
        """Result of a function that ran in the thread."""
        done: asyncio.Future[T] = self._loop.create_future()

        def finish(result: T | None, error: BaseException | None) -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - carried to whoever waits
                self.call_loop(finish, None, error)
            else:
                self.call_loop(finish, result, None)

        self._jobs.put(job)
        return await done

    def _called(self, callback: Callable[..., Any], values: tuple[Any, ...]) -> None:
        self.beat = self._loop.time()
        callback(*values)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                # No job should raise; but the thread is the spool, and must outlive a fault of ours.
                log.exception("spool job failed")
