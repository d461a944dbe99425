"""The servers under test, each as a process of its own: ``serve.py floor PORT`` or ``serve.py forwarder CONFIG``.

The floor is a bare aiohttp handler that reads the body and answers 200, on the same event loop as the forwarder. The
forwarder is the application as it is in production; beside it a sampler notes how late the event loop is, and both
print one JSON line on SIGTERM.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from pathlib import Path

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from forwarder.app import Application
from forwarder.logs import configure
from forwarder.settings import load_settings

SAMPLE_SECS = 0.002


async def sample(lags: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        before = loop.time()
        await asyncio.sleep(SAMPLE_SECS)
        lags.append(loop.time() - before - SAMPLE_SECS)


def stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


async def floor(port: int) -> None:
    async def handler(request: web.Request) -> web.Response:
        await request.read()
        return web.Response()

    application = web.Application()
    application.router.add_post("/", handler)
    runner = web.AppRunner(application, access_log=None, keepalive_timeout=130)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    await stop_event().wait()
    await runner.cleanup()
    print(json.dumps({"lags": []}), flush=True)


async def forwarder(config: Path, *, sampled: bool) -> None:
    settings = load_settings(config)
    configure(settings.log.level)
    application = Application(settings)
    stop = stop_event()
    await application.start()
    application.tune_interpreter()
    lags: list[float] = []
    sampler = asyncio.create_task(sample(lags)) if sampled else None
    print("ready", flush=True)
    await stop.wait()
    if sampler:
        sampler.cancel()
    await application.stop(delay=False)
    lags.sort()
    print(
        json.dumps({"lags": [lags[int(len(lags) * q)] for q in (0.5, 0.99, 0.999)] if lags else []}),
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1] == "floor":
        asyncio.run(floor(int(sys.argv[2])))
    else:
        asyncio.run(forwarder(Path(sys.argv[2]), sampled="--sample" in sys.argv))
