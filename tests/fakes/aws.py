"""A strict fake of the AWS services the forwarder talks to, for tests only.

One server on 127.0.0.1 plays CloudWatch Logs, Security Hub and STS and says no wherever the real
services do: signatures are verified, documented limits, name patterns and rates are enforced, and errors
have the code, HTTP status and shape of the service's protocol. It is written from the AWS API references,
user guides and service models, and shares no code with the client, so that one mistake cannot hide in both.

A request passes these stations: route (X-Amz-Target, form `Action` or path), signature, planned faults,
rate limit, operation. `hang`, `reset` and `truncate` play a bad network, `fail` an unwell service.
The fake's clock decides about signatures, rates and the accepted window of log events.

`python -m tests.fakes.aws --port N --state FILE` runs it as a program that writes what it stores to FILE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web

from tests.fakes import aws_logs, aws_security_hub
from tests.fakes.aws_common import AwsError, Call, Caller, LogEvent, LogGroup, TokenBucket
from tests.fakes.aws_faults import Fault, FaultPlan
from tests.fakes.aws_sigv4 import Credential, RawRequest, scope_of, verify
from tests.fakes.aws_sts import Sts
from tests.fakes.aws_wire import Route, count_of, cut_short, drop, identify, parse, respond

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

__all__ = ["Call", "FakeAws", "Fault", "LogEvent", "LogGroup"]

_PARAMETER_ERRORS = frozenset(
    (
        "InvalidInputException",
        "InvalidParameterException",
        "SerializationException",
        "ValidationError",
        "UnknownOperationException",
        "UnsupportedMediaTypeException",
        "AccessDeniedException",
    )
)
_BODY_LIMIT = 32 * 1024 * 1024
_CALLS_KEPT = 100_000
_JOURNAL_PRODUCT_FIELDS = ("falco/count", "falco/alert_ids")


class FakeAws(FaultPlan):
    """The server, its state, and the handles a test pulls."""

    def __init__(
        self,
        *,
        account: str = "111122223333",
        region: str = "eu-west-1",
        partition: str = "aws",
        access_key: str = "AKIAFAKEFAKEFAKEFAKE",
        secret_key: str = "fakesecretfakesecretfakesecretfakesecret",
        clock: Callable[[], float] = time.time,
        rate_limits: bool = True,
        verify_signatures: bool = True,
        hub_enabled: bool = True,
    ) -> None:
        super().__init__()
        self.account, self.region, self.partition = account, region, partition
        self.access_key, self.secret_key = access_key, secret_key
        self.clock = clock
        self.rate_limits = rate_limits
        self.verify_signatures = verify_signatures
        self.max_clock_skew = 300.0
        self.url = ""
        self.calls: list[Call] = []
        self.validation_errors: list[str] = []
        self.journal: Callable[[list[dict[str, Any]]], None] | None = None
        arn = f"arn:{partition}:iam::{account}:user/fake"
        self._owner = Caller(account, arn, "AIDAFAKEFAKEFAKEFAKE")
        self.credentials = {access_key: Credential(secret_key, self._owner)}
        self._sts = Sts(partition=partition, clock=self._now, known=self.credentials)
        self._logs = aws_logs.Logs(
            arn_prefix=f"arn:{partition}:logs:{region}:{account}", clock=self._now, on_events=self._on_events
        )
        self._hub = aws_security_hub.SecurityHub(
            region=region,
            partition=partition,
            clock=self._now,
            enabled=hub_enabled,
            on_finding=self._on_finding,
            on_rejected=self.validation_errors.append,
        )
        self._hub.injected = self._injected_finding_failure
        self._hub.on_ignored = self._on_ignored
        self._buckets: dict[str, TokenBucket] = {}
        self._runner: web.AppRunner | None = None
        self._stopping = asyncio.Event()

    # --- state -------------------------------------------------------------------------------------

    @property
    def groups(self) -> dict[str, LogGroup]:
        return self._logs.groups

    @property
    def findings(self) -> dict[str, dict[str, Any]]:
        return self._hub.findings

    @property
    def finding_writes(self) -> int:
        return self._hub.writes

    @property
    def finding_ignored(self) -> int:
        return self._hub.ignored

    @property
    def hub_enabled(self) -> bool:
        return self._hub.enabled

    @hub_enabled.setter
    def hub_enabled(self, value: bool) -> None:
        self._hub.enabled = value

    @property
    def hub_disabled_shape(self) -> Literal["call", "finding"]:
        return self._hub.disabled_shape

    @hub_disabled_shape.setter
    def hub_disabled_shape(self, value: Literal["call", "finding"]) -> None:
        self._hub.disabled_shape = value

    @property
    def roles(self) -> dict[str, str | None]:
        """Role ARN -> external id its trust policy demands; while empty every role may be assumed."""
        return self._sts.roles

    def events(self, group: str | None = None, stream: str | None = None) -> list[LogEvent]:
        """Stored log events in order of arrival per stream."""
        return [
            event
            for group_name, found in self.groups.items()
            if group in (None, group_name)
            for stream_name, events in found.streams.items()
            if stream in (None, stream_name)
            for event in events
        ]

    def messages(self) -> list[Any]:
        """All log messages, decoded from JSON."""
        return [json.loads(event.message) for event in self.events()]

    def environment(self) -> dict[str, str]:
        """The environment variables that lead an SDK here."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    # --- life --------------------------------------------------------------------------------------

    async def start(self, port: int = 0) -> str:
        """Listen on 127.0.0.1; the state survives stop and start."""
        if self._runner is not None:
            raise RuntimeError("already started")
        self._stopping = asyncio.Event()
        app = web.Application(client_max_size=_BODY_LIMIT)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=0.2)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return self.url

    async def stop(self) -> None:
        """Close the listener and every connection, also those with a request in the works."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        self._stopping.set()
        for site in list(runner.sites):
            await site.stop()
        for connection in runner.server.connections if runner.server else ():
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    # --- requests ----------------------------------------------------------------------------------

    def _now(self) -> float:
        return self.clock()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        headers: dict[str, list[str]] = {}
        for name, value in request.headers.items():
            headers.setdefault(name.lower(), []).append(value)
        wire = RawRequest(request.method, request.raw_path, headers, raw)
        route = identify(wire)
        count = 0
        fault: Fault | None = None
        error: AwsError | None = None
        answer: dict[str, Any] | str = {}
        try:
            caller = self._authenticate(wire, route)
            body = parse(wire, route)
            count = count_of(body)
            fault = self._next_fault(route.operation, body)
            if fault is not None and not await self._play(fault, request):
                self._record(route, 0, fault.kind, count, raw)
                return drop(request)
            self._throttle(route)
            answer = self._serve(route, body, caller, len(raw))
        except AwsError as refusal:
            error = refusal
            if error.code in _PARAMETER_ERRORS and not (fault and fault.kind == "fail"):
                self.validation_errors.append(str(error))
        except Exception as bug:
            self.validation_errors.append(f"the fake itself is broken: {bug!r}")
            raise
        response = respond(route, answer, error)
        if fault is not None and fault.kind == "reset-after":
            self._record(route, 0, "reset", count, raw)
            return drop(request)
        if fault is not None and fault.kind == "truncate":
            self._record(route, response.status, "truncate", count, raw)
            return cut_short(request, response)
        self._record(route, response.status, error.code if error else None, count, raw)
        return response

    def _authenticate(self, wire: RawRequest, route: Route) -> Caller | None:
        if route.service == "sts" and route.operation == "AssumeRoleWithWebIdentity":
            return None  # the token is the proof
        if self.verify_signatures:
            return verify(
                wire,
                service=route.service,
                region=self.region,
                credentials=self.credentials,
                now=self.clock(),
                max_skew=self.max_clock_skew,
                protocol=route.protocol,
            )
        scope = scope_of(wire)
        known = self.credentials.get(scope[0]) if scope else None
        return known.caller if known else self._owner

    async def _play(self, fault: Fault, request: web.Request) -> bool:
        """Act out a fault before processing; False means that no answer will be given."""
        if fault.kind == "fail":
            raise AwsError(fault.code, fault.message, fault.status)
        if fault.kind == "reset":
            return False
        if fault.kind == "hang":
            ends = [asyncio.ensure_future(end.wait()) for end in (fault.released, self._stopping)]
            try:
                await asyncio.wait(ends, timeout=fault.secs, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for end in ends:
                    end.cancel()
            transport = request.transport
            return not (self._stopping.is_set() or transport is None or transport.is_closing())
        return True

    def _throttle(self, route: Route) -> None:
        if not self.rate_limits:
            return
        name = route.operation
        if route.service == "logs" and name in aws_logs.RATES:
            rate, burst = float(aws_logs.RATES[name]), float(aws_logs.RATES[name])
            refusal = AwsError("ThrottlingException", "Rate exceeded", 400)
        elif route.service == "securityhub":
            rate, burst = aws_security_hub.RATES.get(name, aws_security_hub.OTHER_RATE)
            refusal = AwsError("TooManyRequestsException", "Too Many Requests", 429)
        else:
            return
        if name not in self._buckets:
            self._buckets[name] = TokenBucket(rate, burst, self._now)
        if not self._buckets[name].take():
            raise refusal

    def _serve(
        self, route: Route, body: dict[str, Any], caller: Caller | None, size: int
    ) -> dict[str, Any] | str:
        if route.operation == "AssumeRoleWithWebIdentity" and route.service == "sts":
            return self._sts.assume_role_with_web_identity(body)
        assert caller is not None
        if route.service == "logs" and route.operation in self._logs.operations:
            return self._logs.operations[route.operation](body)
        if route.service == "securityhub" and route.operation in self._hub.operations:
            return self._hub.operations[route.operation](body, caller, size)
        if route.service == "sts" and route.operation in self._sts.operations:
            return self._sts.operations[route.operation](body, caller)
        status = 400 if route.protocol == "json" else 404
        raise AwsError("UnknownOperationException", f"No operation {route.operation} here", status)

    def _record(self, route: Route, status: int, error: str | None, count: int, raw: bytes) -> None:
        self.calls.append(Call(route.service, route.operation, status, error, count, len(raw), self.clock()))
        if len(self.calls) > _CALLS_KEPT:
            del self.calls[: _CALLS_KEPT // 2]

    def _on_events(self, group: str, stream: str, events: list[LogEvent]) -> None:
        if self.journal is not None:
            self.journal(
                [
                    {"kind": "event", "message": event.message, "group": group, "stream": stream}
                    for event in events
                ]
            )

    def _on_finding(self, finding: dict[str, Any]) -> None:
        """Every accepted version: what its history must obey."""
        if self.journal is not None:
            product = finding.get("ProductFields") or {}
            said = {name: product[name] for name in _JOURNAL_PRODUCT_FIELDS if name in product}
            self.journal(
                [
                    {"kind": "finding"}
                    | {name: finding[name] for name in ("Id", "CreatedAt", "UpdatedAt")}
                    | {"ProductFields": said}
                ]
            )

    def _on_ignored(self, finding: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal([{"kind": "ignored", "Id": finding["Id"], "UpdatedAt": finding["UpdatedAt"]}])


async def _main(port: int, state: Path | None, *, rate_limits: bool) -> None:
    fake = FakeAws(rate_limits=rate_limits)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    file = state.open("a", encoding="utf-8") if state else None

    def journal(lines: list[dict[str, Any]]) -> None:
        if file is not None:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()

    fake.journal = journal
    try:
        print(f"ready {await fake.start(port)}", flush=True)  # noqa: T201 - told to the starting test
        await stop.wait()
        await fake.stop()
    finally:
        if file is not None:
            file.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fakes.aws", description="Run the fake AWS until SIGTERM.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--state", type=Path, help="file to append a JSON line to per stored event, stored or ignored finding"
    )
    parser.add_argument("--no-rate-limits", action="store_true")
    options = parser.parse_args()
    asyncio.run(_main(options.port, options.state, rate_limits=not options.no_rate_limits))


if __name__ == "__main__":
    main()
