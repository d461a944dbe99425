"""The oracle of counts: what each finding says against the alerts that were stored, after a run with aggregation.

Which alerts are about the same thing is written down a second time, in ``tests.counted.about``. Nobody repeats an
alert here, so each was stored once or never, and its id tells it: a finding's count must be the number of different
ids of its key at CloudWatch Logs, where each stored alert arrives at least once. Of an alert whose connection broke
nobody knows whether it was stored; the logs tell.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from tests.counted import about
from tests.crash.senders import Ledger, is_finding

NEVER_SENT = "ConnectionRefusedError"

Key = tuple[Any, ...]


class Version(NamedTuple):
    """A finding as it was accepted once."""

    created: str
    updated: str
    says: int
    """Its count."""
    ids: tuple[str, ...]
    """The latest alerts it names."""


class Counts(NamedTuple):
    """Numbers of a run and every broken promise."""

    acknowledged: int
    unanswered: int
    """Sent, and nobody knows what became of them."""
    stored_unanswered: int
    stored: int
    """Alerts that became part of a finding."""
    findings: int
    updates: int
    retold: int
    """Versions that say what the one before said: told, and the process died before it knew."""
    wrong: list[str]

    def __str__(self) -> str:
        numbers = {name: value for name, value in self._asdict().items() if isinstance(value, int)}
        lines = [f"{value} {name}" for name, value in numbers.items()]
        lines += [f"{len(self.wrong)} WRONG {self.wrong[:5]}"] * bool(self.wrong)
        return ", ".join(lines)


class Journal:
    """What the fake AWS wrote down."""

    def __init__(self, path: Path) -> None:
        self.events: Counter[str] = Counter()
        """How often each alert arrived at CloudWatch Logs, by id."""
        self.history: dict[str, list[Version]] = defaultdict(list)
        self.ignored: list[str] = []
        for line in path.read_bytes().splitlines():
            entry = json.loads(line)
            if entry["kind"] == "event":
                self.events[json.loads(entry["message"])["id"]] += 1
            elif entry["kind"] == "ignored":
                self.ignored.append(f"{entry['Id']}: {entry['UpdatedAt']} is not newer")
            else:
                product = entry["ProductFields"]
                ids = tuple(product["falco/alert_ids"].split(","))
                version = Version(entry["CreatedAt"], entry["UpdatedAt"], int(product["falco/count"]), ids)
                self.history[entry["Id"]].append(version)


def count(ledger: Ledger, path: Path) -> Counts:
    """Judge a run that has told all it has counted."""
    journal = Journal(path)
    keys = {item.id: about(json.loads(item.body)) for item in ledger.attempts if is_finding(item.body)}
    acknowledged = {item.id for item in ledger.attempts if item.status == 200}
    unanswered = {item.id for item in ledger.attempts if not item.status and item.error != NEVER_SENT}
    stored = Counter(keys[identity] for identity in journal.events if identity in keys)
    sure = Counter(keys[identity] for identity in acknowledged & keys.keys())
    unsure = Counter(keys[identity] for identity in unanswered & keys.keys())

    wrong = list(journal.ignored)
    wrong += [f"{identity} is not in the logs" for identity in acknowledged - journal.events.keys()]
    wrong += [
        f"{identity} is in the logs, and was never sent"
        for identity in journal.events.keys() - acknowledged - unanswered
    ]
    told: dict[Key, str] = {}
    for finding, versions in journal.history.items():
        wrong += [f"{finding}: {fault}" for fault in faults_of(versions)]
        named = {identity for version in versions for identity in version.ids}
        of_keys = {keys.get(identity) for identity in named}
        key = next(iter(of_keys))
        if len(of_keys) != 1 or key is None:
            wrong.append(f"{finding} names alerts of {of_keys}")
            continue
        if key in told:
            wrong.append(f"{key} has two findings: {told[key]}, {finding}")
        told[key] = finding
        last = versions[-1].says
        if last != stored[key]:
            wrong.append(f"{finding} says {last}, {stored[key]} alerts were stored")
        if not sure[key] <= last <= sure[key] + unsure[key]:
            wrong.append(f"{finding} says {last} of {sure[key]} acknowledged, {unsure[key]} unanswered")
    wrong += [f"no finding for {key}" for key in stored.keys() - told.keys()]
    pairs = [pair for found in journal.history.values() for pair in itertools.pairwise(found)]
    return Counts(
        acknowledged=len(acknowledged),
        unanswered=len(unanswered),
        stored_unanswered=len(unanswered & journal.events.keys()),
        stored=sum(stored.values()),
        findings=len(journal.history),
        updates=sum(map(len, journal.history.values())),
        retold=sum(before.says == after.says for before, after in pairs),
        wrong=wrong,
    )


def faults_of(versions: list[Version]) -> list[str]:
    """What is wrong with a finding's history."""
    updated = [version.updated for version in versions]
    counts = [version.says for version in versions]
    faults = []
    if sorted(set(updated)) != updated:
        faults.append(f"UpdatedAt does not grow: {updated}")
    if sorted(counts) != counts:
        faults.append(f"the count falls: {counts}")
    if len({version.created for version in versions}) != 1:
        faults.append("CreatedAt changes")
    return faults
