"""What the chart sets up on both sides, at work: a forwarder process, curl with Falco's settings, `helm test`. Run by `make chart-test`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.chart import falco
from tests.chart.rendering import objects_of
from tests.chart.secured import ALONE, SINGLE, Forwarder, forwarder, issue
from tests.fakes.aws import FakeAws
from tests.samples import REAL_BODIES

OWN = "tls.enabled=true,tls.existingSecret=x"
BASIC = "auth.existingSecret=x"
SIDES = {
    "plain": "",
    "tls": OWN,
    "mtls": f"{OWN},tls.clientAuth=true,tls.testClientSecret=y",
    "basic": f"{OWN},{BASIC}",
    "mtls and basic": f"{OWN},{BASIC},tls.clientAuth=true,tls.testClientSecret=y",
}
"""Values of our chart for each variant of Falco's."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    issue(tmp_path)
    return tmp_path


def objects(variant: str) -> list[dict[str, object]]:
    return objects_of(None, sets=[SINGLE, ALONE, *filter(None, [SIDES[variant]])])


@pytest.mark.parametrize("variant", SIDES)
async def test_falco_reaches_the_forwarder(variant: str, folder: Path, aws: FakeAws) -> None:
    """And the alert is delivered; so is the one of `helm test`."""
    rendered = objects(variant)
    async with forwarder(folder, aws, rendered) as running:
        http_output = falco.configuration(variant)["http_output"]
        assert await running.falco(http_output, REAL_BODIES[0]) == (0, "200")
        code, said = await running.helm_test(rendered)
        assert code == 0, said
        assert "1 of 1 replicas delivered the test alert" in said
    rules = [json.loads(it.message)["rule"] for it in aws.events()]
    assert rules == [json.loads(REAL_BODIES[0])["rule"], "Test of falco-aws-forwarder"]


@pytest.mark.parametrize(
    ("variant", "without", "codes", "said"),
    [
        ("tls", "ca_cert", {60}, "certificate"),
        # Closed by the receiver: after TLS 1.3's handshake, so curl sees it when it sends or when it reads.
        ("mtls", "client_cert", {52, 55, 56}, "000"),
        ("basic", "", {0}, "401"),
    ],
)
async def test_who_lacks_something_stays_outside(
    variant: str, without: str, codes: set[int], said: str, folder: Path, aws: FakeAws
) -> None:
    async with forwarder(folder, aws, objects(variant)) as running:
        http_output = dict(falco.configuration(variant)["http_output"])
        http_output.pop(without, None)
        if without == "client_cert":
            http_output.pop("client_key")
        answered, told = await running.falco(http_output, REAL_BODIES[0], password="wrong")
        assert answered in codes, told
        assert said in told
    assert aws.events() == []


async def test_the_name_in_the_url_must_be_in_the_certificate(folder: Path, aws: FakeAws) -> None:
    """Those of the chart's certificate are taken, others are not."""
    async with forwarder(folder, aws, objects("tls")) as running:
        http_output = falco.configuration("tls")["http_output"]
        names = (
            "falco-aws-forwarder",
            "falco-aws-forwarder.falco",
            "falco-aws-forwarder.falco.svc.cluster.local",
            "falco-aws-forwarder-0.falco-aws-forwarder-headless.falco.svc",
        )
        for name in names:
            assert await running.falco(http_output, REAL_BODIES[0], host=name) == (0, "200"), name
        answered, _ = await running.falco(http_output, REAL_BODIES[0], host="falco-aws-forwarder.other.svc")
        assert answered == 60


async def test_helm_test_says_what_it_lacks(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, aws: FakeAws
) -> None:
    """A client certificate where the receiver wants one; the authority, without which only public ones are trusted."""
    rendered = objects_of(None, sets=[SINGLE, ALONE, OWN, "tls.clientAuth=true"])
    async with forwarder(folder, aws, rendered) as running:
        code, said = await running.helm_test(rendered)
        assert code == 1
        assert "set tls.testClientSecret" in said
        other = _other(running, tmp_path_factory)
        (other.folder / "falco-forwarder-tls/ca.crt").unlink()
        code, said = await other.helm_test(objects("mtls"))
        assert code == 1
        assert "CERTIFICATE_VERIFY_FAILED" in said
    assert aws.events() == []


async def test_helm_test_says_that_it_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, aws: FakeAws
) -> None:
    rendered = objects("basic")
    async with forwarder(folder, aws, rendered) as running:
        other = _other(running, tmp_path_factory)
        (other.folder / "falco-forwarder-auth/credentials").write_text("falco:changed\n")
        code, said = await other.helm_test(rendered)
    assert code == 1
    assert "the alert was answered 401" in said
    assert aws.events() == []


def _other(running: Forwarder, folders: pytest.TempPathFactory) -> Forwarder:
    """The same forwarder, seen by one with Secrets of its own."""
    folder = folders.mktemp("other") / "secrets"
    shutil.copytree(running.folder, folder, ignore=shutil.ignore_patterns("spool"))
    return running._replace(folder=folder)
