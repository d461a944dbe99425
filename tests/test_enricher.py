"""Enrichers put together: who speaks first, who fails, what a second look may change."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from forwarder.alert import decode
from forwarder.enricher import FAULT_LINE_SECS, Enrichment, Fields, Subject, subject_of
from forwarder.record import ALERT, Record
from tests.enriched import alert


class Knows:
    """An enricher that says what a test tells it to."""

    name = "knows"

    def __init__(self, complete: bool = True, **members: Any) -> None:
        self.complete = complete
        self.members = members
        self.subjects: list[Subject] = []
        self.fail = False

    def enrich(self, subject: Subject, members: dict[str, bytes]) -> bool:
        if self.fail:
            raise RuntimeError("broken")
        self.subjects.append(subject)
        for key, value in self.members.items():
            members.setdefault(key, json.dumps(value).encode())
        return self.complete


def asked(enrichment: Enrichment, body: bytes = b"", peer: str = "10.0.0.1") -> tuple[Any, bool]:
    (decoded,) = decode(body or alert({})).alerts
    found, complete = enrichment.of(decoded, 7, peer)
    return json.loads(b"{%b}" % found), complete


def of(*enrichers: Any, **options: Any) -> Enrichment:
    return Enrichment(enrichers, **({"now": lambda: 0.0} | options))


def test_what_an_earlier_one_says_stands() -> None:
    first, second = Knows(node={"name": "a"}), Knows(node={"name": "b"}, ecs={"family": "f"})
    assert asked(of(first, second)) == ({"node": {"name": "a"}, "ecs": {"family": "f"}}, True)
    assert asked(of(second, first))[0]["node"] == {"name": "b"}


def test_all_of_them_have_to_be_sure() -> None:
    assert asked(of(Knows(), Knows(complete=False)))[1] is False
    assert asked(of(Knows(complete=False), Knows()))[1] is False
    assert asked(of()) == ({}, True)


def test_they_see_the_alert_as_it_was_sent() -> None:
    knows = Knows()
    asked(of(knows), alert({"container.id": "0" * 12, "k8s.ns.name": None, "k8smeta.pod.ip": "10.9.9.9"}))
    (subject,) = knows.subjects
    assert (subject.source, subject.peer, subject.time_ns) == ("syscall", "10.0.0.1", 7)
    assert subject.fields == Fields(container_id="0" * 12, plugin_pod_ip="10.9.9.9")
    assert subject.on_a_node
    (decoded,) = decode(alert({}, source="okta")).alerts
    assert not subject_of(decoded, 0, "").on_a_node


def test_a_failing_one_does_not_fail_the_alert() -> None:
    """What the others said stays, the fault is counted each time and logged now and then."""
    now, failures = 0.0, []
    broken = Knows(node={"name": "b"})
    broken.fail = True
    enrichment = of(Knows(ecs={"family": "f"}), broken, now=lambda: now, failed=lambda: failures.append(1))
    with capture_logs() as lines:
        for _ in range(3):
            assert asked(enrichment)[0] == {"ecs": {"family": "f"}}
        now = FAULT_LINE_SECS
        asked(enrichment)
    assert len(failures) == 4
    assert [line["log_level"] for line in lines] == ["error", "error"]


def record(enrichment: bytes = b"", *, unresolved: bool = True, body: bytes | None = None) -> Record:
    return Record(
        ALERT,
        "id",
        4,
        1,
        2,
        False,
        alert({}) if body is None else body,
        enrichment,
        b"",
        "",
        unresolved,
        "10.0.0.9",
    )


def test_the_second_look_replaces_what_was_there() -> None:
    completed: list[int] = []
    knows = Knows(kubernetes={"pod": "web", "resolved_by": "name"})
    enrichment = of(knows, completed=lambda: completed.append(1))
    again = enrichment.again(record(b'"kubernetes":{"namespace":"a name that is longer than all"}'))
    assert json.loads(b"{%b}" % again.enrichment) == {"kubernetes": {"pod": "web", "resolved_by": "name"}}
    assert (knows.subjects[0].peer, knows.subjects[0].again) == ("10.0.0.9", True)
    assert completed == [1]


def test_a_second_look_that_finds_nothing_new_is_not_counted() -> None:
    completed: list[int] = []
    enrichment = of(Knows(node={"name": "n"}), completed=lambda: completed.append(1))
    kept = record(b'"node":{"name":"n","zone":"z"}')
    assert enrichment.again(kept) is kept
    assert completed == []


def test_what_was_known_at_ingest_outlives_the_pod_and_the_cache() -> None:
    """Hours in the spool, or a restart: the cache knows nothing of the pod any more."""
    whole = b'"kubernetes":{"pod":"web","resolved_by":"name"},"node":{"name":"n","instance_id":"i-0"}'
    later = of(
        Knows(kubernetes={"namespace": "shop", "pod": "web", "pod_ip": "10.0.0.1"}, node={"name": "n"})
    )
    assert later.again(record(whole)).enrichment == whole


def test_a_record_that_lacks_nothing_is_left_alone() -> None:
    knows = Knows(node={"name": "n"})
    whole = record(unresolved=False)
    assert of(knows).again(whole) is whole
    assert knows.subjects == []


def test_nothing_found_keeps_what_was_there() -> None:
    kept = record(b'"node":{"name":"n"}')
    assert of(Knows()).again(kept).enrichment == b'"node":{"name":"n"}'


@pytest.mark.parametrize("body", [b"not an alert", b"", b"[]"])
def test_a_body_nobody_can_read_is_no_obstacle(body: bytes) -> None:
    kept = record(b'"node":{}', body=body)
    assert of(Knows(node={"name": "n"})).again(kept) == kept


def test_the_clusters_name_is_that_of_the_first_look() -> None:
    """It is part of the finding's Id: found later, it must not make a second finding."""
    cluster = ""
    enrichment = of(Knows(node={"name": "n"}), cluster=lambda: cluster)
    assert "cluster" not in asked(enrichment)[0]
    cluster = "prod"
    assert asked(enrichment)[0]["cluster"] == "prod"
    assert b"cluster" not in enrichment.again(record(b'"node":{}')).enrichment
    cluster = "other"
    named = enrichment.again(record(b'"cluster":"prod","node":{}'))
    assert json.loads(b"{%b}" % named.enrichment) == {"cluster": "prod", "node": {"name": "n"}}
