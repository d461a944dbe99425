"""The contract between sinks and delivery: three verbs, and a closed taxonomy of what can go wrong.

A sink declares its limits as data, encodes purely and makes one call; retry, back-off, batching and cursors are
the worker's (``delivery``). ``aws.translate`` is the one place that turns the SDK's errors into these; a sink may look at
them where it makes what is missing (a log stream), all else is the worker's to decide. A failure's ``code`` is a metric
label and one of ``metrics.ERROR_CODES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from forwarder.asff_context import Occurrences
from forwarder.batch import Item, Limits
from forwarder.issues_settings import AggregationSettings
from forwarder.pace import Pace
from forwarder.record import Record


class DeliveryError(Exception):
    """A call failed. ``code`` is one of ``metrics.ERROR_CODES``."""

    code: str = "unknown"

    def __init__(self, message: str, *, code: str | None = None, delay_secs: float = 0.0) -> None:
        super().__init__(message)
        self.code = code or self.code
        self.delay_secs = delay_secs
        """The service's own wish, a lower bound for the back-off."""


class Transient(DeliveryError):  # noqa: N818 - the taxonomy's words
    """Trying again helps."""

    code = "unavailable"


class TooLarge(DeliveryError):  # noqa: N818
    """The call was too big."""

    code = "too_large"


class Permanent(DeliveryError):  # noqa: N818
    """The service will never accept this call."""

    code = "invalid"


class Permission(DeliveryError):  # noqa: N818
    """No permission, for the call or for one of its records."""

    code = "permission"


class Blocked(DeliveryError):  # noqa: N818
    """The service is off or forbidden for us; only a person can change that."""

    code = "disabled"


class Again(Enum):
    """What to do with a record refused inside an accepted call."""

    NEVER = "never"
    LIMITED = "limited"
    ALWAYS = "always"
    BLOCKED = "blocked"


class Reject(Exception):  # noqa: N818
    """The service (or the mapping) refuses one record. ``reason`` is one of ``metrics.DEAD_LETTER_REASONS``."""

    def __init__(self, reason: str, detail: str, again: Again = Again.NEVER) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.again = again


class Service(Protocol):
    """An AWS destination: limits as data, one call. Everything else is the worker's."""

    name: str
    limits: Limits
    linger_secs: float
    minimum_rank: int
    findings_only: bool
    """True: takes decoded alerts that are not Falco's internal messages, nothing else."""
    pace: Pace

    async def open(self) -> None:
        """Get ready to encode and deliver; raises ``DeliveryError``."""

    async def deliver(self, items: Sequence[Item]) -> dict[int, Reject]:
        """One call. Refused records by position in ``items``; raises ``DeliveryError``."""


class Sink(Service, Protocol):
    """Takes every record, in order, by a pure encoding."""

    def encode(self, record: Record, index: int) -> Item:
        """One record as part of a call; raises ``Reject``."""


class FindingSink(Service, Protocol):
    """Takes findings: one for each issue, told again while its count moves."""

    aggregation: AggregationSettings
    aging_secs: float
    severities: tuple[str, ...]
    """Label by syslog rank."""

    def encode(self, record: Record, index: int, seen: Occurrences | None = None) -> Item:
        """One finding as part of a call: the latest alert and what was seen with it; raises ``Reject``."""
