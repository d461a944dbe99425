"""The values for Falco's chart: that Falco takes them, and that the chart's notes say the same. Run by `make chart-test`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml

from tests.chart import falco
from tests.chart.rendering import CHART, IMAGE, LOGS, NAMESPACE, RELEASE, ROOT, Object, objects_of, one, tool

SCHEMA = yaml.safe_load((Path(__file__).parent / "falco_schema.yaml").read_text())
OF_THE_CHART = {
    "falco",
    "metrics",
    "mounts",
    "extra",
    "driver",
    "collectors",
    "controller",
    "services",
    "falcoctl",
}
"""Keys of Falco's chart 9.1 that we use."""
TLS = "tls.enabled=true,tls.existingSecret=falco-aws-forwarder-tls"
MTLS = f"{TLS},tls.clientAuth=true"
BASIC = "auth.existingSecret=senders"
VARIANTS = pytest.mark.parametrize("variant", falco.VARIANTS)


@VARIANTS
def test_falco_takes_it(variant: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(falco.configuration(variant), SCHEMA)
    assert falco.values(variant).keys() <= OF_THE_CHART


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("http_output", {"enabled": True, "uri": "http://x/"}),
        ("http_output", {"enabled": "yes"}),
        ("http_output", {"max_consecutive_timeouts": "0"}),
        ("json_outputs", True),
        ("outputs_queue", {"capacity": "many"}),
        ("append_output", [{"extra_field": ["a"]}]),
        ("plugins", [{"name": "json"}]),
        ("metrics", {"outputRule": True}),
    ],
)
def test_the_schema_refuses_what_falco_would(key: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**falco.configuration("plain"), key: value}, SCHEMA)


@VARIANTS
def test_falco_becomes_a_good_sender(variant: str) -> None:
    """JSON with text and tags, no waiting in Falco for an answer that is late, a bounded queue, a sign of life."""
    made = falco.configuration(variant)
    assert (
        made["json_output"]
        is made["json_include_output_property"]
        is made["json_include_tags_property"]
        is True
    )
    assert made["http_output"]["enabled"] is True
    assert made["http_output"]["max_consecutive_timeouts"] == 0
    assert made["outputs_queue"]["capacity"] > 0
    assert made["metrics"] == {"enabled": True, "interval": "15m", "output_rule": True}
    assert {"suggested_output": True} in made["append_output"]


@VARIANTS
def test_url_is_that_of_the_service(variant: str) -> None:
    url = urlsplit(falco.configuration(variant)["http_output"]["url"])
    service = one(objects_of(None, sets=[LOGS]), "Service", RELEASE)
    assert url.hostname == f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    assert url.port == service["spec"]["ports"][0]["port"]
    assert url.scheme == ("https" if {"tls", "mtls", "basic"} & set(variant.split()) else "http")
    assert (url.username, url.password) == (
        ("falco", "${FALCO_FORWARDER_PASSWORD}") if "basic" in variant else (None, None)
    )


@VARIANTS
def test_every_file_is_mounted_and_every_variable_set(variant: str) -> None:
    values, http = falco.values(variant), falco.configuration(variant)["http_output"]
    mounts = values.get("mounts", {"volumes": [], "volumeMounts": []})
    secrets = {it["name"]: it["secret"] for it in mounts["volumes"]}
    there = {
        f"{it['mountPath']}/{item['path']}"
        for it in mounts["volumeMounts"]
        for item in secrets[it["name"]]["items"]
    }
    assert {http[key] for key in ("ca_cert", "client_cert", "client_key") if key in http} == there
    assert len(there) == (0 if http["url"].startswith("http:") else 3 if "mtls" in http else 1)
    variables = set(re.findall(r"\$\{(\w+)\}", http["url"]))
    assert variables == {it["name"] for it in values.get("extra", {}).get("env", [])}
    if "tls" in variant:
        objects = objects_of(CHART / "ci/mtls-certmanager-values.yaml")
        ours = {it["spec"]["secretName"] for it in objects if it["kind"] == "Certificate"}
        assert {it["secretName"] for it in secrets.values()} <= ours


def test_k8saudit_reads_audit_events_only() -> None:
    values = falco.values("k8saudit")
    assert values["driver"]["enabled"] is values["collectors"]["enabled"] is False
    assert values["controller"] == {"kind": "deployment", "deployment": {"replicas": 1}}
    named = [it["name"] for it in values["falco"]["plugins"]]
    assert named == values["falco"]["load_plugins"] == ["k8saudit", "json"]
    port = values["services"][0]["ports"][0]["port"]
    assert values["falco"]["plugins"][0]["open_params"] == f"http://:{port}/k8s-audit"
    assert values["falco"]["append_output"][1]["match"] == {"source": "k8s_audit"}


@pytest.mark.parametrize(
    ("sets", "variant"),
    [
        ("", "plain"),
        ("mode=daemonset", "plain"),
        ("persistence.enabled=true,replicas=1", "plain"),
        (TLS, "tls"),
        (MTLS, "mtls"),
        (f"{TLS},{BASIC}", "basic"),
        (f"{MTLS},{BASIC}", "mtls and basic"),
    ],
)
def test_notes_say_the_values_of_falco(sets: str, variant: str, tmp_path: Path) -> None:
    said_all = _notes(sets, tmp_path)
    block = re.search(r"\n\n((?:  .*\n)+)", said_all)
    assert block, said_all
    assert "helm test" in said_all
    assert ("With one replica" in said_all) == ("replicas=1" in sets)
    said: Object = yaml.safe_load(block[1])
    ours = falco.values(variant)
    assert said == {key: ours[key] for key in ("falco", "metrics")}
    assert ("falco-aws-forwarder-tls" in said_all) == ("tls" in sets)
    assert ("FALCO_FORWARDER_PASSWORD from a Secret" in said_all) == (BASIC in sets)


def test_every_file_is_a_variant() -> None:
    files = {it.stem.removeprefix("falco-values") for it in (ROOT / "helm").glob("falco-values*.yaml")}
    assert files == {ending for endings in falco.VARIANTS.values() for ending in endings}


def _notes(sets: str, folder: Path) -> str:
    """Helm renders notes only for an installation, which asks a cluster: so here they are put into an object."""
    shutil.copytree(CHART, folder / CHART.name)
    templates = folder / CHART.name / "templates"
    notes = (templates / "NOTES.txt").read_text()
    (templates / "_notes.tpl").write_text(f'{{{{- define "notes" -}}}}\n{notes}\n{{{{- end }}}}\n')
    (templates / "notes.yaml").write_text('notes: |\n{{ include "notes" . | indent 2 }}\n')
    arguments = [
        "--namespace",
        NAMESPACE,
        "--show-only",
        "templates/notes.yaml",
        "--set",
        f"{IMAGE},{LOGS},{sets}".strip(","),
    ]
    done = tool("helm", "template", RELEASE, folder / CHART.name, *arguments)
    assert done.returncode == 0, done.stderr
    said: str = yaml.safe_load(done.stdout)["notes"]
    return said
