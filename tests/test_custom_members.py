"""Custom fields and tags: added to every alert, never over what Falco sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config import ConfigError
from forwarder.custom_members import CustomMembers, fields_of, tags_of
from forwarder.settings import load_settings
from tests.fakes.aws import FakeAws
from tests.running import Start
from tests.samples import REAL_BODIES, body_of
from tests.test_config import MINIMAL

MEMBERS = CustomMembers({"env": "prod", "proc.name": "forged"}, ["prod", "eu"])


def added(body: Any) -> Any:
    return json.loads(MEMBERS.added_to(body_of(body)))


def test_every_real_alert_has_them_and_keeps_its_own() -> None:
    for body in REAL_BODIES:
        before, after = json.loads(body), json.loads(MEMBERS.added_to(body))
        fields = before.get("output_fields") or {}
        assert after["output_fields"] == {"env": "prod", "proc.name": "forged"} | fields
        assert after["tags"][: len(before.get("tags") or [])] == (before.get("tags") or [])
        assert {"prod", "eu"} <= set(after["tags"])
        assert {key: after[key] for key in before.keys() - {"output_fields", "tags"}} == {
            key: before[key] for key in before.keys() - {"output_fields", "tags"}
        }


def test_what_falco_sent_is_not_forged() -> None:
    assert added({"output_fields": {"proc.name": "bash"}})["output_fields"]["proc.name"] == "bash"


def test_a_tag_is_not_repeated() -> None:
    assert added({"tags": ["eu", "x"]})["tags"] == ["eu", "x", "prod"]


@pytest.mark.parametrize("value", ["text", 7, ["a"], True])
def test_fields_of_another_shape_stay(value: Any) -> None:
    assert added({"output_fields": value})["output_fields"] == value


@pytest.mark.parametrize("value", ["a,b", 7, {"a": 1}, [1]])
def test_tags_of_another_shape_stay(value: Any) -> None:
    assert added({"tags": value})["tags"] == value


def test_integers_beyond_64_bits_survive() -> None:
    body = b'{"rule":"R","output_fields":{"n":123456789012345678901234567890,"f":1e400}}'
    assert b'"n":123456789012345678901234567890,"f":1e400' in MEMBERS.added_to(body)


def test_falcosidekicks_text_form() -> None:
    assert fields_of("env:prod, url:http://x:1 ,name:%WHO", {"WHO": "me"}) == {
        "env": "prod",
        "url": "http://x:1",
        "name": "me",
    }
    assert tags_of(" a, b ,,c") == ["a", "b", "c"]


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=5), st.lists(st.text(min_size=1), max_size=5))
def test_any_member_is_valid_json_and_complete(fields: dict[str, str], tags: list[str]) -> None:
    after = json.loads(CustomMembers(fields, tags).added_to(b'{"rule":"R"}'))
    assert after.get("output_fields", {}) == fields
    assert after.get("tags", []) == list(dict.fromkeys(tags))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("customfields: nonsense", "customfields: must be a mapping, or text like key:value,key:value"),
        ("customfields: {a: '%NOT_SET_ANYWHERE'}", "the environment variable NOT_SET_ANYWHERE is not set"),
        ("customfields: {a: " + "x" * 2000 + "}", "customfields.a: longer than"),
        ("customtags: ['']", "customtags: at most 32 tags"),
    ],
)
def test_faults(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL + text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file, {})
    assert fault in str(caught.value).replace(" (line 6)", "")


async def test_log_events_and_findings_show_them(aws: FakeAws, forwarder: Start) -> None:
    """The id is that of the bytes as sent, so that a re-sent alert is a duplicate."""
    running = await forwarder({"customfields": "env:prod", "customtags": ["eu"]})
    body = body_of({"rule": "R", "priority": "Error", "output": "o", "output_fields": {"a": "b"}})
    await running.post(body, body)
    await running.at_rest()
    (event,) = (json.loads(event.message) for event in aws.events())
    assert (event["output_fields"], event["tags"]) == ({"env": "prod", "a": "b"}, ["eu"])
    (finding,) = aws.findings.values()
    assert finding["ProductFields"]["falco/env"] == "prod"
    assert finding["ProductFields"]["falco/tags"] == "eu"
