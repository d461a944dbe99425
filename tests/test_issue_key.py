"""What alerts of one issue have in common: each part, the real alerts, and alerts made to be mistaken for others."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwarder.facts import Facts, facts_of
from forwarder.issue_key import DEFAULT_KEY, INTERNAL, KEY_BYTES, PARTS, fault_of, hashed, key_of
from tests.counted import about, alert, is_finding
from tests.samples import REAL_ALERTS, record_of

AUDIT = {
    "rule": "Secret read",
    "priority": "Notice",
    "source": "k8s_audit",
    "hostname": "falco-k8s-audit-0",
    "output": "o",
    "output_fields": {
        "ka.user.name": "eve",
        "ka.target.resource": "secrets",
        "ka.target.name": "db",
        "ka.target.namespace": "shop",
    },
}


def facts(members: dict[str, Any] | None = None, enrichment: dict[str, Any] | None = None) -> Facts:
    around = json.dumps(enrichment, separators=(",", ":"))[1:-1].encode() if enrichment else b""
    return facts_of(record_of(alert() if members is None else members, enrichment=around))


def audit(**fields: Any) -> dict[str, Any]:
    return AUDIT | {"output_fields": AUDIT["output_fields"] | fields}  # type: ignore[operator]


def kubernetes(**members: Any) -> dict[str, Any]:
    return {"kubernetes": {"namespace": "shop", "pod": "web-1", "container": "web"} | members}


@pytest.mark.parametrize(
    ("part", "members", "enrichment", "value"),
    [
        ("rule", alert("A"), None, "A"),
        ("source", alert(), None, "syscall"),
        ("source", AUDIT, None, "k8s_audit"),
        ("cluster", alert(), {"cluster": "prod"}, "prod"),
        ("cluster", alert(), None, ""),
        ("namespace", alert(), None, "shop"),
        ("namespace", alert(), kubernetes(namespace="other"), "other"),
        ("namespace", AUDIT, None, "shop"),
        ("workload", alert(), kubernetes(workload={"kind": "Deployment", "name": "web"}), "Deployment/web"),
        ("workload", alert(), kubernetes(), "Pod/web-1"),
        ("workload", alert(pod=None), None, ""),
        ("workload", alert(pod=None), {"ecs": {"family": "job", "service": "web"}}, "Service/web"),
        ("workload", alert(pod=None), {"ecs": {"family": "job"}}, "Task/job"),
        ("container", alert(), None, "web"),
        ("container", alert(container="host", pod=None), None, ""),
        ("node", alert(pod=None), None, "node-1"),
        ("node", alert(pod=None), {"node": {"name": "ip-1"}}, "ip-1"),
        ("node", alert(), {"node": {"name": "ip-1"}}, ""),
        ("node", AUDIT, None, ""),
        ("user", AUDIT, None, "eve"),
        ("user", alert(fields={"ka.user.name": "eve"}), None, ""),
        ("target", AUDIT, None, '["secrets","db"]'),
        ("target", alert(), None, ""),
        ("pod", alert(), None, "web-1"),
        ("hostname", alert(), None, "node-1"),
        ("priority", alert(), None, "Warning"),
        (
            "image",
            alert(fields={"container.image.repository": "nginx", "container.image.tag": "1"}),
            None,
            "nginx:1",
        ),
    ],
)
def test_what_a_part_is(
    part: str, members: dict[str, Any], enrichment: dict[str, Any] | None, value: str
) -> None:
    assert PARTS[part](facts(members, enrichment)) == value


def test_every_default_part_has_a_name() -> None:
    assert [part for part in DEFAULT_KEY if fault_of(part)] == []
    assert fault_of("output_fields.proc.name") == ""
    for wrong in ("", "rul", "output_fields.", "output_fields", "Rule", "output_fields." + "x" * 257):
        assert fault_of(wrong)


def test_the_real_alerts_group_as_the_documentation_says() -> None:
    """The same grouping as that of a reader of the docs, both ways."""
    key = key_of(DEFAULT_KEY)
    by_key: dict[bytes, set[tuple[Any, ...]]] = defaultdict(set)
    by_meaning: dict[tuple[Any, ...], set[bytes]] = defaultdict(set)
    for members in REAL_ALERTS:
        if is_finding(members):
            by_key[key(facts(members))].add(about(members))
            by_meaning[about(members)].add(key(facts(members)))
    assert all(len(meanings) == 1 for meanings in by_key.values())
    assert all(len(keys) == 1 for keys in by_meaning.values())
    assert {len(found) for found in by_key} == {KEY_BYTES}


def test_a_field_is_a_part() -> None:
    """Numbers and texts alike; what is absent is the same for all."""
    key = key_of(["rule", "output_fields.proc.name"])
    first, same, other = (key(facts(alert(fields={"proc.name": name}))) for name in ("sh", "sh", "bash"))
    assert first == same != other
    absent = [key(facts(alert(fields=fields))) for fields in ({}, {"proc.name": None}, {"proc.name": "<NA>"})]
    assert len(set(absent)) == 1


_text = st.text(st.sampled_from('a/",[]\\ é\0'), max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(_text, min_size=3, max_size=3), st.lists(_text, min_size=3, max_size=3))
def test_no_two_lists_of_values_are_one_key(one: list[str], other: list[str]) -> None:
    assert (hashed(one) == hashed(other)) == (one == other)


def test_a_target_is_not_another_one() -> None:
    """A resource with a slash in it (crafted) is not the resource of another target."""
    key = key_of(DEFAULT_KEY)
    one = audit(**{"ka.target.resource": "pods", "ka.target.name": "exec/web"})
    other = audit(**{"ka.target.resource": "pods/exec", "ka.target.name": "web"})
    assert key(facts(one)) != key(facts(other))


def test_no_alert_is_a_notice() -> None:
    """Whatever the key is made of: an alert of the right words is never counted as what the forwarder itself has to say."""
    members = alert("notice") | {"hostname": "sensor/node-1"}
    assert key_of(["rule", "hostname"])(facts(members)) != hashed([f"{INTERNAL}notice", "sensor/node-1"])


def test_no_group_is_a_single_alert() -> None:
    """Nor as an alert that had a finding of its own before aggregation was turned on."""
    members = alert("alert") | {"hostname": "0123"}
    assert key_of(["rule", "hostname"])(facts(members)) != hashed([f"{INTERNAL}alert", "0123"])
