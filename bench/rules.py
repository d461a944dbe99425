"""What a verdict costs with 100 rules of mixed kinds, in microseconds for each alert: ``python bench/rules.py``.

Over the real alerts as they are, and over alerts of which every one has other values, so that nothing can be remembered.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from forwarder.facts import Facts, facts_of
from forwarder.rules import Rules
from forwarder.rules_settings import RuleSettings
from tests.samples import REAL_BODIES, record_of

RULES = 100
ROUNDS = 5
AT = 1_800_000_000.0


def rules() -> list[RuleSettings]:
    """100 rules that look at everything a rule can look at, and of which hardly one matches: all are tried."""
    kinds: list[Any] = [
        {"rule": "Contact * Server {}*"},
        {"rule": ["Rule {}", "Other rule {}"], "priority": {"at_least": "warning"}},
        {"namespace": "team-{}-*"},
        {"namespace": ["shop-{}", "pay-{}*"], "workload": "Deployment/web-{}*"},
        {"tags": ["T{}*", "tag-{}"], "source": "syscall"},
        {"labels": {"app": "app-{}*"}, "priority": ["error", "critical"]},
        {"image": "docker.io/library/img-{}*"},
        {"fields": {"proc.name": "shell-{}", "fd.name": {"glob": "/etc/{}/*"}}},
        {"fields": {"user.uid": {"one_of": [0, 1000]}, "proc.cmdline": {"glob": "*--flag-{}*"}}},
        {"hostname": "ip-10-{}-*", "container": "c-{}"},
    ]
    found = [_numbered(kinds[number % len(kinds)], number) for number in range(RULES)]
    return [msgspec.convert({"match": match}, RuleSettings) for match in found]


def _numbered(value: Any, number: int) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(inner, number) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbered(inner, number) for inner in value]
    return value.replace("{}", str(number)) if isinstance(value, str) else value


def real() -> list[Facts]:
    """The real alerts, with surroundings as enrichment finds them."""
    around = (
        b'"kubernetes":{"namespace":"shop","pod":"web-7d4b9-x2x1z","workload":{"kind":"Deployment","name":"web"},'
        b'"labels":{"app":"web","team":"shop"},"node":"ip-10-0-1-17"}'
    )
    return [facts_of(record_of(body, enrichment=around)) for body in REAL_BODIES]


def distinct(facts: Sequence[Facts], count: int) -> list[Facts]:
    """Alerts with values that never come again."""
    made = []
    for number in range(count):
        one = facts[number % len(facts)]
        end = f"-{number:x}"
        texts = {
            name: getattr(one, name) + end for name in ("namespace", "pod", "workload", "hostname", "image")
        }
        fields = {
            key: f"{value}{end}" if isinstance(value, str) else value for key, value in one.fields.items()
        }
        made.append(
            one._replace(
                **texts, fields=fields, rule=one.rule + end, tags=[*one.tags, end], labels={"app": end}
            )
        )
    return made


def microseconds(rules: Rules, facts: Sequence[Facts], times: int) -> float:
    """The best of some rounds, for each alert."""
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(times):
            for one in facts:
                rules.decide(one, AT)
        best = min(best, time.perf_counter() - begun)
    return best / times / len(facts) * 1e6


def main() -> None:
    settings, facts = rules(), real()
    print(f"{RULES} rules, {len(facts)} real alerts:  {microseconds(Rules(settings), facts, 100):6.2f} us")
    flood = distinct(facts, 20_000)
    print(f"{RULES} rules, all values distinct: {microseconds(Rules(settings), flood, 1):6.2f} us")


if __name__ == "__main__":
    main()
