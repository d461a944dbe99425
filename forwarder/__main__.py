"""The command line: arguments, signals, exit codes. Everything else is elsewhere."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from forwarder import __version__

if TYPE_CHECKING:
    from forwarder.settings import Settings

T = TypeVar("T")

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    root = argparse.ArgumentParser(
        prog="falco-forwarder",
        description="Carries Falco alerts to AWS. Nothing that was acknowledged is lost.",
    )
    root.add_argument("--version", action="version", version=f"falco-forwarder {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run the service")
    run.add_argument("--config", type=Path, metavar="FILE", help="configuration (YAML)")
    check = commands.add_parser("check", help="list every fault of the configuration")
    check.add_argument("--config", type=Path, metavar="FILE", help="configuration (YAML)")
    further = check.add_mutually_exclusive_group()
    further.add_argument(
        "--live", action="store_true", help="also try AWS, the Kubernetes API and instance metadata"
    )
    further.add_argument(
        "--explain",
        metavar="ALERT",
        help="which rule the alerts of this file meet (JSON, NDJSON or an array; - for standard input), and where they go",
    )
    replay = commands.add_parser("replay", help="post stored Falco alerts (NDJSON) to a receiver")
    replay.add_argument("file", metavar="FILE", help="NDJSON file, or - for standard input")
    replay.add_argument("--url", default="http://127.0.0.1:2801/", help="receiver (%(default)s)")
    replay.add_argument(
        "--senders", type=int, default=1, metavar="N", help="connections at a time (%(default)s)"
    )
    demo = commands.add_parser("demo", help="run the main job on an embedded AWS, with real Falco alerts")
    mode = demo.add_mutually_exclusive_group()
    mode.add_argument("--once", action="store_true", help="stop when all is delivered (the default)")
    mode.add_argument("--keep", action="store_true", help="stay up and print commands to look around with")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    if options.command == "run":
        return _run(options.config)
    if options.command == "check":
        return _check(options.config, live=options.live, explained=options.explain)
    if options.command == "replay":
        return _replay(options.file, options.url, max(1, min(options.senders, 64)))
    return _demo(keep=options.keep)


def _leave(*_: object) -> None:
    raise SystemExit(EXIT_OK)


def _run(config: Path | None) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        # The first process of a container ignores what it does not handle: also while the imports below take their time.
        signal.signal(number, _leave)
    from forwarder.app import Application  # noqa: PLC0415 - --version stays fast
    from forwarder.config import ConfigError  # noqa: PLC0415
    from forwarder.logs import LoopFaults, configure  # noqa: PLC0415
    from forwarder.settings import load_settings  # noqa: PLC0415
    from forwarder.spool_schema import SpoolUnusableError  # noqa: PLC0415

    try:
        settings = _with_region(lambda: load_settings(config))
    except ConfigError as error:
        return _report(error, in_one_line=True)
    configure(settings.log.level)

    async def serve() -> None:
        stop = asyncio.Event()
        application = Application(settings, config=config)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(LoopFaults())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await application.run(stop)

    try:
        asyncio.run(serve())
    except (SpoolUnusableError, OSError) as error:
        print(f"falco-forwarder: cannot start: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _check(config: Path | None, *, live: bool, explained: str | None) -> int:
    from forwarder.config import ConfigError  # noqa: PLC0415
    from forwarder.settings import load_settings  # noqa: PLC0415

    try:
        settings = _with_region(lambda: load_settings(config)) if live else load_settings(config)
    except ConfigError as error:
        return _report(error)
    print("configuration ok")
    if explained is not None:
        return _explain(settings, explained)
    if not live:
        return EXIT_OK
    from forwarder.live_check import live_check, table  # noqa: PLC0415

    steps = asyncio.run(live_check(settings))
    print(table(steps))
    return EXIT_OK if all(step.ok for step in steps) else EXIT_FAILED


def _explain(settings: Settings, file: str) -> int:
    from forwarder.alert import Unparsable  # noqa: PLC0415
    from forwarder.explain import explain  # noqa: PLC0415

    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        print(explain(settings, data, time.time()))
    except OSError as error:
        print(f"falco-forwarder: {file} cannot be read: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    except Unparsable as error:
        print(f"falco-forwarder: {file} has no alert that can be explained: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _with_region(load: Callable[[], T]) -> T:
    """The settings; where they lack a region, the instance this runs on may know it."""
    from forwarder.config import ConfigError  # noqa: PLC0415
    from forwarder.enrichment.ec2 import read_identity  # noqa: PLC0415

    try:
        return load()
    except ConfigError as error:
        if not any(fault.where == "aws.region" for fault in error.faults):
            raise
        identity = asyncio.run(read_identity(os.environ))
        if identity is None:
            raise
        os.environ["AWS_REGION"] = identity.region
        return load()


def _report(error: Exception, *, in_one_line: bool = False) -> int:
    """``in_one_line``: the last line has everything once more. It may be all that somebody sees of a pod."""
    faults = getattr(error, "faults", [])
    for fault in faults:
        print(fault, file=sys.stderr)
    count = len(faults)
    rest = f": {'; '.join(map(str, faults))}" if in_one_line else ""
    print(
        f"falco-forwarder: {count} fault{'s' if count != 1 else ''} in the configuration{rest}",
        file=sys.stderr,
    )
    return EXIT_CONFIG


def _replay(file: str, url: str, senders: int) -> int:
    from forwarder.replay import Bar, replay  # noqa: PLC0415

    try:
        with contextlib.ExitStack() as stack:
            source = sys.stdin.buffer if file == "-" else stack.enter_context(Path(file).open("rb"))
            bodies = [line for line in (line.strip() for line in source) if line]
    except OSError as error:
        print(f"falco-forwarder: {file} cannot be read: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    report = asyncio.run(replay(bodies, url, senders=senders, progress=Bar(len(bodies), "replay")))
    print(f"sent {report.sent}\nacknowledged {report.acknowledged}")
    for why, count in report.refused.most_common():
        print(f"refused {count}: {why}", file=sys.stderr)
    return EXIT_OK if report.acknowledged == report.sent else EXIT_FAILED


def _demo(*, keep: bool) -> int:
    from forwarder.demo import demo  # noqa: PLC0415

    return demo(keep=keep)


if __name__ == "__main__":
    sys.exit(main())
