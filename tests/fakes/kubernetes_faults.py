"""Planned misbehaviour of the fake Kubernetes: refused, slow, hanging and broken answers, poisoned watches."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tests.fakes.kubernetes_common import RESOURCES, KubeError, details_of, too_large
from tests.fakes.kubernetes_watch import End, line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.fakes.kubernetes_watch import Watch

Verb = Literal["list", "watch", "get", "create"]
Mode = Literal["status", "hang", "reset", "truncate", "body", "silent"]

_REASONS = {
    400: ("BadRequest", "injected"),
    401: ("Unauthorized", "Unauthorized"),
    403: ("Forbidden", "forbidden"),
    404: ("NotFound", "the server could not find the requested resource"),
    410: ("Expired", "too old resource version: 1 (1000)"),
    429: ("TooManyRequests", "storage is (re)initializing"),
    500: ("InternalError", "Internal error occurred: etcdserver: request timed out"),
    503: ("ServiceUnavailable", "the server is currently unable to handle the request"),
    504: ("Timeout", "Timeout: request did not complete within the allotted timeout"),
}
OVERSIZE = 5 * 1024 * 1024


@dataclass(eq=False, slots=True)
class KubeFault:
    """A planned misbehaviour; it wears off after `times` hits, or with `clear()`."""

    mode: Mode
    verb: str
    times: int | None = 1
    kinds: tuple[str, ...] | None = None
    code: int = 500
    reason: str | None = None
    message: str | None = None
    retry_after: int | None = None
    plain: bool = False
    body: bytes = b""
    hits: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def clear(self) -> None:
        """End the fault; a request that hangs on it is served now."""
        self.times = self.hits
        self.released.set()

    def matches(self, verb: str, kind: str, modes: Iterable[Mode]) -> bool:
        return (
            self.mode in modes
            and (self.times is None or self.hits < self.times)
            and self.verb in ("*", verb)
            and (self.kinds is None or kind in self.kinds)
        )


class Faults:
    """What a test may plan (`api.fail`); the first matching fault of a request is played."""

    def __init__(self, watches: Callable[[str | None], list[Watch]]) -> None:
        self._planned: list[KubeFault] = []
        self._watches = watches

    # --- answers to requests -----------------------------------------------------------------------

    def next(
        self,
        verb: Verb | Literal["*"],
        code: int,
        *,
        times: int | None = 1,
        kinds: Iterable[str] | None = None,
        reason: str | None = None,
        message: str | None = None,
        retry_after: int | None = None,
        plain: bool = False,
    ) -> KubeFault:
        """Answer with an error; `plain` without a Status object, as flow control and proxies do."""
        fault = self._fault("status", verb, times, kinds)
        fault.code, fault.reason, fault.message = code, reason, message
        fault.retry_after, fault.plain = retry_after, plain
        return fault

    def hang(
        self, verb: Verb | Literal["*"], *, times: int | None = 1, kinds: Iterable[str] | None = None
    ) -> KubeFault:
        """Accept and never answer, until the fault is cleared."""
        return self._fault("hang", verb, times, kinds)

    def reset(
        self, verb: Verb | Literal["*"], *, times: int | None = 1, kinds: Iterable[str] | None = None
    ) -> KubeFault:
        """Break the connection without an answer."""
        return self._fault("reset", verb, times, kinds)

    def truncate(
        self, verb: Verb | Literal["*"], *, times: int | None = 1, kinds: Iterable[str] | None = None
    ) -> KubeFault:
        """Send half of the answer to a list or get, then hang up."""
        return self._fault("truncate", verb, times, kinds)

    def body(
        self,
        verb: Verb | Literal["*"],
        body: bytes = b"<html><body>proxy login</body></html>",
        *,
        code: int = 200,
        times: int | None = 1,
        kinds: Iterable[str] | None = None,
    ) -> KubeFault:
        """Answer something that is not from an API server at all."""
        fault = self._fault("body", verb, times, kinds)
        fault.code, fault.body = code, body
        return fault

    def silent(self, *, times: int | None = 1, kinds: Iterable[str] | None = None) -> KubeFault:
        """Open a watch that never says anything and never ends, whatever its timeoutSeconds."""
        return self._fault("silent", "watch", times, kinds)

    # --- inside open watches -----------------------------------------------------------------------

    def event(self, kind: str, status: dict[str, Any]) -> None:
        """An ERROR event in all open watches of a kind, which then end; `status` needs `code` only."""
        code = status["code"]
        reason, message = _REASONS.get(code, ("", "injected"))
        error = KubeError(code, status.get("reason", reason), status.get("message", message))
        full = error.status() | {key: value for key, value in status.items() if key != "code"}
        full["code"] = full.pop("code")
        for watch in self._open(kind):
            watch.fail(full)

    def garbage(self, kind: str, data: bytes = b'{"type":"ADDED","object":{nonsense}}\n') -> None:
        """A line that is not JSON; the watch goes on."""
        self._spoil(kind, data)

    def unknown(self, kind: str, event: str = "SURPRISE") -> None:
        """An event of a type nobody has heard of; the watch goes on."""
        self._spoil(kind, line(event, b'{"kind":"Surprise","apiVersion":"v9","metadata":{}}'))

    def oversized(self, kind: str, size: int = OVERSIZE, *, endless: bool = False) -> None:
        """A well-formed event of at least `size` bytes; or, `endless`, one whose end never comes."""
        resource = RESOURCES[kind]
        obj = f'{{"kind":"{resource.kind}","apiVersion":"{resource.api_version}","metadata":{{"name":"big",'
        obj += f'"annotations":{{"big":"{"x" * size}"}}}}}}'
        whole = line("MODIFIED", obj.encode())
        self._spoil(kind, whole[:-4] if endless else whole)

    def truncated(self, kind: str) -> None:
        """Half a line, then a normal end of the stream."""
        for watch in self._open(kind):
            watch.end(End("normal", b'{"type":"MODIFIED","object":{"kind":"Pod","apiVersion":"v1","meta'))

    # --- used by the server ------------------------------------------------------------------------

    def take(self, verb: str, kind: str, *modes: Mode) -> KubeFault | None:
        """The first planned fault that applies; it counts as hit."""
        for fault in self._planned:
            if fault.matches(verb, kind, modes):
                fault.hits += 1
                return fault
        return None

    def _fault(self, mode: Mode, verb: str, times: int | None, kinds: Iterable[str] | None) -> KubeFault:
        chosen = tuple(kinds) if kinds is not None else None
        if isinstance(kinds, str):
            raise TypeError("kinds is a tuple of resources")
        fault = KubeFault(mode, verb, times, chosen)
        self._planned.append(fault)
        return fault

    def _open(self, kind: str) -> list[Watch]:
        found = self._watches(kind)
        if not found:
            raise LookupError(f"no open watch of {kind}")
        return found

    def _spoil(self, kind: str, data: bytes) -> None:
        for watch in self._open(kind):
            watch.raw(data)


def refusal(fault: KubeFault, *, forbidden: KubeError, name: str, kind: str, version: int) -> KubeError:
    """The error a planned fault stands for, in the words of the real server."""
    if fault.code == 403 and fault.message is None:
        return forbidden
    if fault.code == 504 and fault.message is None:
        return too_large(version + 1000, version)
    reason, message = _REASONS.get(fault.code, ("", "injected"))
    details: dict[str, Any] | None = None
    resource = RESOURCES.get(kind)
    if fault.code == 404:
        details = {}
        if name and resource is not None:
            message = f'{kind} "{name}" not found'
            details = details_of(resource.group, kind, name)
    elif fault.code == 429 and fault.plain:
        message = "Too many requests, please try again later."
    elif fault.code == 500:
        details = {"causes": [{"message": "etcdserver: request timed out"}]}
    return KubeError(
        fault.code,
        fault.reason if fault.reason is not None else reason,
        fault.message if fault.message is not None else message,
        details=details,
        plain=fault.plain,
        retry_after=fault.retry_after,
    )
