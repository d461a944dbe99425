"""The admin port: probes, status, dead letters, metrics."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from forwarder import app as app_module
from forwarder import spool as spool_module
from tests.fakes.aws import FakeAws
from tests.running import Start
from tests.samples import REAL_BODIES, body_of
from tests.volume import Gate, refusing

pytestmark = pytest.mark.usefixtures("impatient")


async def test_probes_of_a_running_forwarder(forwarder: Start) -> None:
    running = await forwarder()
    for path in ("/livez", "/readyz"):
        answer = await running.get(path)
        assert (answer.status, answer.body) == (200, b"ok\n")
    assert (await running.scrape()).total("ready") == 1


async def test_not_ready_while_draining(forwarder: Start) -> None:
    running = await forwarder()
    running.app._draining = True
    answer = await running.get("/readyz")
    assert (answer.status, answer.body) == (503, b"draining\n")
    assert (await running.json("/status"))["state"] == "draining"
    assert (await running.get("/livez")).status == 200
    assert (await running.scrape()).total("ready") == 0


async def test_not_ready_while_full(aws: FakeAws, forwarder: Start) -> None:
    """And ready again when the sinks have made room."""
    faults = [aws.fail(name, times=None, status=500) for name in ("PutLogEvents", "BatchImportFindings")]
    running = await forwarder({"spool.bytes_max": 1 << 20, "receiver.hold_secs_max": 0})
    status = 200
    while status == 200:
        body = body_of({"rule": "R", "priority": "Critical", "output": os.urandom(9000).hex()})
        status = (await running.post(body))[0].status
    answer = await running.get("/readyz")
    assert answer.status == 503
    assert b"full" in answer.body
    state = await running.json("/status")
    assert state["state"] == "not ready"
    assert "full" in state["reason"]
    for fault in faults:
        fault.clear()
    await running.at_rest()
    await running.until(lambda: not running.app.ready())
    assert (await running.get("/readyz")).status == 200


async def test_not_ready_while_the_volume_takes_nothing(forwarder: Start) -> None:
    running = await forwarder({"receiver.hold_secs_max": 0})
    with refusing(running.app.spool):
        assert (await running.post(REAL_BODIES[0]))[0].status == 503
        answer = await running.get("/readyz")
        assert answer.status == 503
        assert b"readonly" in answer.body
        assert (await running.get("/livez")).status == 200
    await running.until(lambda: not running.app.ready())


async def test_not_ready_without_a_volume_even_if_nobody_posts(forwarder: Start) -> None:
    """Readiness does not wait for the first loss: housekeeping notices."""
    running = await forwarder()
    await running.post(*REAL_BODIES[:3])
    with refusing(running.app.spool):
        await running.until(running.app.ready, 5)


async def test_not_alive_while_the_writer_is_stuck(forwarder: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume that hangs (no error, no progress): a restart may help, waiting does not."""
    monkeypatch.setattr(app_module, "WRITER_SILENCE_SECS_MAX", 0.5)
    running = await forwarder()
    gate = Gate(running.app.spool)
    stuck = running.app.spool.settle("security_hub", running.app.spool.end)
    await running.until(running.app.alive, 5)
    answer = await running.get("/livez")
    assert answer.status == 503
    assert b"writer" in answer.body
    gate.open()
    await stuck
    await running.until(lambda: not running.app.alive(), 5)


async def test_status_has_its_documented_shape(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    status = await running.json("/status")
    assert status["state"] == "running"
    assert status["sinks"].keys() == {"cloudwatch_logs", "security_hub"}
    for sink in status["sinks"].values():
        assert sink["last_success"] is None
    before = time.time()
    await running.post(*REAL_BODIES, b"{")
    await running.at_rest()
    status = await running.json("/status")
    spool = status["spool"]
    assert spool.keys() >= {"alerts", "bytes", "bytes_max", "oldest_secs"}
    assert all(isinstance(spool[key], int) for key in ("alerts", "bytes", "bytes_max"))
    assert isinstance(spool["oldest_secs"], int | float)
    for sink in status["sinks"].values():
        assert sink.keys() >= {
            "state",
            "pending",
            "delivered",
            "filtered",
            "dead_letters",
            "retries",
            "last_success",
            "last_error",
            "last_error_code",
        }
        assert (sink["state"], sink["pending"], sink["last_error"]) == ("delivering", 0, None)
        assert sink["delivered"] + sink["filtered"] == len(REAL_BODIES)
        assert (sink["dead_letters"], sink["retries"]) == (0, 0)
        assert before - 1 <= sink["last_success"] <= time.time() + 1
    json.loads((await running.get("/status")).body)


async def test_status_tells_the_age_of_what_waits(aws: FakeAws, forwarder: Start) -> None:
    aws.fail("PutLogEvents", times=None, status=500)
    running = await forwarder()
    await running.post(*REAL_BODIES[:3])
    await running.until(lambda: running.app.status()["spool"]["oldest_secs"] > 0)
    status = await running.json("/status")
    assert 0 < status["spool"]["oldest_secs"] < 30
    assert status["spool"]["alerts"] == status["sinks"]["cloudwatch_logs"]["pending"] == 3


async def test_dead_letters_are_paged_newest_first(forwarder: Start) -> None:
    running = await forwarder()
    bodies = [b"not an alert %d" % n for n in range(7)]
    await running.post(*bodies)
    everything = await running.json("/dead-letters")
    assert [letter["body"] for letter in everything] == [body.decode() for body in reversed(bodies)]
    assert all(one["number"] > two["number"] for one, two in pairwise(everything))
    first = everything[0]
    assert first.keys() >= {"id", "sink", "reason", "detail", "time", "body"}
    assert abs(datetime.fromisoformat(first["time"]).timestamp() - time.time()) < 60
    pages: list[str] = []
    before = ""
    while page := await running.json(f"/dead-letters?limit=3{before}"):
        assert len(page) <= 3
        pages += [letter["body"] for letter in page]
        before = f"&before={page[-1]['number']}"
    assert pages == [letter["body"] for letter in everything]


async def test_a_long_dead_letter_is_shown_cut(forwarder: Start) -> None:
    running = await forwarder()
    await running.post("\N{GRINNING FACE}".encode() * 50_000)
    (letter,) = await running.json("/dead-letters")
    assert letter["body_bytes"] == 200_000
    assert 10_000 < len(letter["body"].encode()) <= 70_000


async def test_bad_parameters_of_dead_letters(forwarder: Start) -> None:
    running = await forwarder()
    bad = [
        "limit=abc",
        "before=abc",
        "limit=",
        "limit=1.5",
        "before=1e3",
        "limit=0x10",
        f"limit={'9' * 5000}",
    ]
    for query in bad:
        answer = await running.get(f"/dead-letters?{query}")
        assert (query, answer.status) == (query, 400)
        assert list(json.loads(answer.body)) == ["error"]


async def test_numbers_out_of_range_are_no_fault_of_ours(forwarder: Start) -> None:
    running = await forwarder()
    await running.post(b"{")
    for query in ("limit=-1", "limit=0", "before=-5", "before=0", f"before={10**30}"):
        assert (query, (await running.get(f"/dead-letters?{query}")).status in {200, 400}) == (query, True)


async def test_no_more_dead_letters_than_a_thousand_at_once(aws: FakeAws, forwarder: Start) -> None:
    running = await forwarder()
    await running.post(*[b"x %d" % n for n in range(1005)])
    assert len(await running.json("/dead-letters")) == 100
    assert len(await running.json("/dead-letters?limit=1000000")) == 1000


async def test_the_number_of_dead_letters_falls_with_their_removal(
    aws: FakeAws, forwarder: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unparsable bodies beyond their share go, oldest first; the gauge is what is on disk."""
    monkeypatch.setattr(spool_module, "EXPIRY_SECS", 0.1)
    running = await forwarder({"spool.unparsed_bytes_max": 1 << 16})
    bodies = [b"x%d" % n * 10_000 for n in range(10)]
    await running.post(*bodies)
    await running.at_rest()
    removed = running.app.metrics.dead_removed._value.get
    await running.until(lambda: removed() > 0)
    await running.until(lambda: running.app.status()["spool"]["alerts"] == 0)
    left = await running.json("/dead-letters")
    assert 0 < len(left) < 10
    assert left[0]["body_bytes"] == len(bodies[-1])
    scrape = await running.scrape()
    assert scrape.total("dead_letters_removed_total") == 10 - len(left)
    assert scrape.total("dead_letter_events", sink="receiver") == len(left)
    used = sum(letter["body_bytes"] for letter in left)
    assert running.app.status()["spool"]["bytes"] == used


async def test_metrics_in_both_formats(forwarder: Start) -> None:
    running = await forwarder()
    plain = await running.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert "charset=utf-8" in plain.headers["content-type"]
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    answer = await running.get("/metrics", f"Accept: {accept}")
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")
    parse: Any = text_string_to_metric_families
    assert "falco_forwarder_received_events" in {family.name for family in parse(answer.body.decode())}


async def test_gauges_are_fresh_at_each_scrape(aws: FakeAws, forwarder: Start) -> None:
    """What is pending, on disk and set aside now, not at the last housekeeping."""
    aws.fail("PutLogEvents", times=None, status=500)
    running = await forwarder()
    await running.post(*REAL_BODIES[:5], b"{")
    scrape = await running.scrape()
    assert scrape.total("sink_pending", sink="cloudwatch_logs") == 5
    assert scrape.total("sink_pending_unparsed", sink="cloudwatch_logs") == 1
    assert scrape.total("spool_events") == 6
    assert scrape.total("spool_bytes") > 0
    assert scrape.total("dead_letter_events", sink="receiver") == 1


async def test_alerts_are_not_taken_here(forwarder: Start) -> None:
    running = await forwarder()
    assert (await running.get("/")).status == 404
    assert (await running.get("/nothing")).status == 404
    for path in ("/metrics", "/status", "/livez", "/readyz", "/dead-letters"):
        assert (await running.get(path, "Content-Length: 0", method="POST")).status == 405
