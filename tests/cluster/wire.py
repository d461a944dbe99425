"""A way to the API server that a test can cut: a TCP relay on 127.0.0.1, in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

CHUNK_BYTES = 65_536


class Wire:
    """Passes bytes on. What is cut is reset on both sides, wherever it just was."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = True
        self._server: asyncio.Server | None = None
        self.port = 0
        self.cuts = 0
        """Connections that were reset."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.unplug()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Reset every connection; new ones are passed on."""
        for writer in self._writers:
            writer.transport.abort()
            self.cuts += 1

    def unplug(self) -> None:
        """Cut, and pass nothing on from now."""
        self._open = False
        self.cut()

    def plug(self) -> None:
        self._open = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        ours = {writer}
        self._writers |= ours
        try:
            if self._open:
                with contextlib.suppress(OSError):
                    there = await asyncio.open_connection("127.0.0.1", self._target)
                    ours.add(there[1])
                    self._writers |= ours
                    await asyncio.gather(_pass_on(reader, there[1]), _pass_on(there[0], writer))
        finally:
            self._writers -= ours
            for each in ours:
                each.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until either side ends; then both do."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()
