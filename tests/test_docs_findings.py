"""docs/findings.md shows a real finding: it is made here, anew, and must be the one on the page, with every field explained."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any, cast

import pytest

from forwarder.aws import Aws
from forwarder.enricher import Enrichment, Subject
from forwarder.ingest import Ingest
from forwarder.issue_key import DEFAULT_KEY, PARTS
from forwarder.sinks.security_hub import RemediationSettings, SecurityHub, SecurityHubSettings
from tests.counted import STARTED_AT, Pipeline, moved
from tests.fakes.aws_asff import finding_faults
from tests.samples import REAL_ALERTS

PAGE = (Path(__file__).parent.parent / "docs" / "findings.md").read_text()
RULE = "Contact cloud metadata service from container"
PODS = ("payments-api-7d4b9c6f58-x2x9k", "payments-api-7d4b9c6f58-hq4wd")
AT_SECS = (0.0, 12.4, 25.1, 31.7, 40.2, 44.9, 55.3)


class Surroundings:
    """Enrichment's answer for ``payments-api``, as ``make demo`` has it in its log events; of two pods by turns."""

    name = "surroundings"

    def __init__(self) -> None:
        self.asked = 0

    def enrich(self, _: Subject, members: dict[str, bytes]) -> bool:
        number = self.asked % len(PODS)
        self.asked += 1
        kubernetes = {
            "namespace": "shop",
            "pod": PODS[number],
            "pod_uid": f"0a031575-7fd4-5c6a-94f1-7dafbabe4d6{number:x}",
            "container": "payments-api",
            "container_id": "3ad7b26ded6d8e7b23da7d48fe889434573036c27ae5a74837233de441c3601e",
            "image": "111122223333.dkr.ecr.eu-west-1.amazonaws.com/shop/payments-api:1.4.2",
            "container_started": "2027-01-14T16:02:11Z",
            "workload": {"kind": "Deployment", "name": "payments-api"},
            "service_account": "payments-api",
            "labels": {"app": "payments-api", "team": "payments"},
            "namespace_labels": {"team": "payments"},
            "node": "vm",
            "resolved_by": "container_id",
            "stale": False,
        }
        node = {
            "name": "vm",
            "instance_id": "i-5bce98f73f3ed0c83",
            "instance_type": "r6i.large",
            "zone": "eu-west-1a",
            "region": "eu-west-1",
        }
        members["kubernetes"] = json.dumps(kubernetes).encode()
        members["node"] = json.dumps(node).encode()
        return True


@pytest.fixture(autouse=True)
def nothing_blocks() -> None:
    """Replaces the check for blocking calls: in simulated time the spool writes on the loop."""


async def example(directory: Path) -> dict[str, Any]:
    """A real alert, seven times within a minute: the finding as it is after its first update."""
    pipeline = Pipeline(directory)
    sent: list[dict[str, Any]] = []
    ask = pipeline.hub.call

    async def call(_client: None, _operation: str, body: bytes) -> dict[str, Any]:
        sent.extend(json.loads(body)["Findings"])
        return await ask(_client, _operation, body)

    pipeline.hub.call = call  # type: ignore[method-assign]
    pipeline.hub.sink = SecurityHub(
        SecurityHubSettings(
            enabled=True,
            remediation={
                RULE: RemediationSettings("Set the hop limit to 1.", "https://wiki.example.com/imds")
            },
        ),
        aws=cast("Aws", pipeline.hub),
        cluster="shop-prod",
        replica="falco-aws-forwarder-0",
        log_group="/falco/shop-prod",
        log_stream="{replica}",
    )
    await pipeline.start()
    try:
        pipeline.spool.id = "8cf11abb1fb4"
        loop = asyncio.get_running_loop()
        pipeline.ingest = Ingest(
            spool=pipeline.spool,
            metrics=pipeline.metrics,
            hold_secs_max=0,
            now_ns=lambda: int(pipeline.now() * 1e9),
            now_monotonic=loop.time,
            enrichment=Enrichment([cast("Any", Surroundings())], now=loop.time),
        )
        alert = [members for members in REAL_ALERTS if members["rule"] == RULE][-1]
        began = loop.time()
        for number, secs in enumerate(AT_SECS):
            await asyncio.sleep(began + secs - loop.time())
            await pipeline.post(happened(alert, STARTED_AT + secs, 62_379_000 + number))
        await pipeline.told()
        assert pipeline.hub.broken_promises() == []
        assert [finding["ProductFields"]["falco/count"] for finding in sent] == ["1", str(len(AT_SECS))]
        return sent[-1]
    finally:
        await pipeline.kill()


def happened(alert: dict[str, Any], at: float, nanoseconds: int) -> dict[str, Any]:
    """The alert at another time, wherever it says so."""
    members = moved(alert, at, nanoseconds)
    fields = alert["output_fields"] | {"evt.time": int(at) * 1_000_000_000 + nanoseconds}
    output = alert["output"].replace(alert["time"][11:-1], members["time"][11:-1])
    return members | {"output": output, "output_fields": fields}


def shown() -> dict[str, Any]:
    """The page's JSON."""
    (block,) = re.findall(r"```json\n(\{\n.*?\n\})\n```", PAGE, re.DOTALL)
    return dict(json.loads(block))


def explained(heading: str) -> list[str]:
    """What the first column of the section's first table names."""
    section = PAGE.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    assert section, heading
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def paths(finding: dict[str, Any]) -> set[str]:
    """Members by path, down to where the page explains them: product fields of Falco's own are one."""
    found = set()
    for key, value in finding.items():
        if key == "Resources":
            found |= {f"Resources: {resource['Type']}" for resource in value}
        elif key == "ProductFields":
            ours = {name for name in value if not is_falcos(name)}
            found |= ours | ({"falco/<field>"} if len(ours) < len(value) else set())
        elif key == "FindingProviderFields":
            found |= {f"Severity.{member}" for member in value["Severity"]} | {"Types"}
        else:
            found.add(key)
    return found


def is_falcos(name: str) -> bool:
    """Whether a product field is one of Falco's output fields: they have a dot in their name."""
    return "." in name


@pytest.mark.looptime
async def test_the_page_shows_what_the_code_makes(tmp_path: Path) -> None:
    made = await example(tmp_path)
    said = shown()
    assert said == made, f"put this on the page:\n{json.dumps(made, indent=2)}"


def test_the_finding_on_the_page_is_a_good_one() -> None:
    assert finding_faults(shown()) == []


def test_the_query_on_the_page_is_for_its_finding() -> None:
    assert f'filter id = "{shown()["ProductFields"]["falco/id"]}"' in PAGE
    assert f'filter rule = "{shown()["Title"]}"' in PAGE


def test_the_table_explains_every_field_of_the_example_and_no_other() -> None:
    named = explained("## Field by field")
    assert len(named) == len(set(named)), "explained twice"
    assert set(named) == paths(shown())


def test_the_page_names_every_part_of_the_key() -> None:
    assert set(explained("## What one issue is")) == {*PARTS, "output_fields.NAME"}
    assert f"key: [{', '.join(DEFAULT_KEY)}]" in PAGE
