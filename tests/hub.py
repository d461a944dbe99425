"""Security Hub inside a test's simulated time: the real sink and mapping, the strict fake of the service, nothing in between.

Keeps every accepted version of every finding, so that a test can look at their history.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

from forwarder.aws import Aws
from forwarder.contract import DeliveryError
from forwarder.sinks.security_hub import SecurityHub, SecurityHubSettings
from tests.fakes.aws_common import Caller
from tests.fakes.aws_security_hub import SecurityHub as FakeHub

ACCOUNT, REGION, CLUSTER = "123456789012", "eu-west-1", "prod"
CALL_SECS = 0.05


class Version:
    """One accepted version of a finding."""

    def __init__(self, at: float, finding: dict[str, Any]) -> None:
        self.at = at
        self.finding = finding

    @property
    def count(self) -> int:
        return int(self.finding["ProductFields"]["falco/count"])

    @property
    def updated(self) -> str:
        return str(self.finding["UpdatedAt"])


class Hub:
    """A hub, its sink, and what came."""

    def __init__(self, *, now: Callable[[], float], **settings: Any) -> None:
        self.now = now
        self.mistakes: list[str] = []
        self.history: dict[str, list[Version]] = defaultdict(list)
        self.calls: list[tuple[float, list[str]]] = []
        self.trouble: Callable[[], DeliveryError | None] = lambda: None
        """Raised by a call instead of asking the service."""
        self.after: Callable[[], BaseException | None] = lambda: None
        """Raised by a call that the service has accepted: its answer is lost."""
        self.fake = FakeHub(
            region=REGION,
            partition="aws",
            clock=now,
            enabled=True,
            on_finding=self._note,
            on_rejected=self.mistakes.append,
        )
        self.sink = SecurityHub(
            SecurityHubSettings(**{"enabled": True} | settings),
            aws=cast("Aws", self),
            cluster=CLUSTER,
            replica="replica-0",
            log_group="",
            log_stream="",
        )

    def _note(self, finding: dict[str, Any]) -> None:
        self.history[finding["Id"]].append(Version(self.now(), json.loads(json.dumps(finding))))

    @property
    def latest(self) -> dict[str, dict[str, Any]]:
        return {identity: versions[-1].finding for identity, versions in self.history.items()}

    def counts(self) -> dict[str, int]:
        """Count by finding."""
        return {identity: versions[-1].count for identity, versions in self.history.items()}

    def broken_promises(self) -> list[str]:
        """Findings whose history is not as it must be."""
        wrong = list(self.mistakes)
        for identity, versions in self.history.items():
            updated = [version.updated for version in versions]
            if sorted(set(updated)) != updated:
                wrong.append(f"{identity}: UpdatedAt {updated}")
            if len({version.finding["CreatedAt"] for version in versions}) > 1:
                wrong.append(f"{identity}: CreatedAt changes")
            counts = [
                version.count for version in versions if "falco/count" in version.finding["ProductFields"]
            ]
            if sorted(counts) != counts:
                wrong.append(f"{identity}: count falls {counts}")
        if self.fake.ignored:
            wrong.append(f"{self.fake.ignored} updates were not newer")
        return wrong

    # ---- what the sink asks of ``Aws`` --------------------------------------------------------------

    region = REGION

    def partition(self) -> str:
        return "aws"

    async def account(self, _role: Any = None) -> str:
        return ACCOUNT

    def client(self, _service: str, _role: Any = None) -> None:
        return None

    async def call(self, _client: None, _operation: str, body: bytes) -> dict[str, Any]:
        await asyncio.sleep(CALL_SECS)
        trouble = self.trouble()
        if trouble is not None:
            raise trouble
        asked = json.loads(body)
        self.calls.append((self.now(), [finding["Id"] for finding in asked["Findings"]]))
        caller = Caller(ACCOUNT, f"arn:aws:iam::{ACCOUNT}:role/falco", "AROA")
        answer = self.fake.batch_import_findings(asked, caller, len(body))
        lost = self.after()
        if lost is not None:
            raise lost
        return answer
