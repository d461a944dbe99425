"""The types of a finding refuse what the service would refuse: each kind of violation, by its path."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from forwarder import asff
from forwarder.asff import SEVERITIES
from forwarder.asff_context import Advice, Context
from forwarder.asff_schema import FINDING_BYTES_MAX, KEYS_MAX, faults, product_field_keys
from tests.fakes.aws_asff import finding_faults
from tests.samples import record_of

CONTEXT = Context(
    partition="aws",
    region="eu-west-1",
    account="111122223333",
    cluster="prod",
    cluster_arn="",
    cluster_account="",
    replica="r",
    log_group="/falco/prod",
    log_stream="{replica}",
    severities=SEVERITIES["default"],
    remediation={"Some rule": Advice("Look at it", "https://wiki.example/x")},
)
ALERT = {
    "rule": "Some rule",
    "priority": "Notice",
    "hostname": "node",
    "output": "text",
    "output_fields": {
        "container.id": "abc",
        "container.name": "shop",
        "container.image.repository": "shop",
        "container.image.digest": "sha256:1",
        "container.privileged": True,
        "k8s.pod.name": "p",
        "proc.name": "bash",
        "proc.exepath": "/bin/bash",
        "proc.pid": 1,
        "proc.ppid": 2,
        "evt.type": "connect",
        "fd.name": "10.0.0.5:41000->93.184.216.34:443",
        "fd.l4proto": "tcp",
    },
}
GOOD: dict[str, Any] = json.loads(asff.encode(record_of(ALERT), CONTEXT))
GONE: Any = object()
CONTAINER = "Resources.0.Details.Container"
NETWORK = "Action.NetworkConnectionAction"
SEVERITY = "FindingProviderFields.Severity"
ADVICE = "Remediation.Recommendation"


def changed(path: str, value: Any) -> bytes:
    """The good finding with one member set, added or (``GONE``) taken away."""
    finding = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    target: Any = finding
    for name in parents:
        target = target[int(name)] if isinstance(target, list) else target[name]
    if value is GONE:
        del target[last]
    else:
        target[last] = value
    return json.dumps(finding).encode()


def test_the_good_finding_uses_every_member_and_is_accepted() -> None:
    assert faults(changed("RecordState", "ARCHIVED")) == ""
    assert finding_faults(GOOD) == []
    for part in ("Process", "Action", "Remediation"):
        assert part in GOOD


@pytest.mark.parametrize(
    "path",
    [
        *(
            [
                "SchemaVersion",
                "Id",
                "ProductArn",
                "GeneratorId",
                "AwsAccountId",
                "CreatedAt",
                "UpdatedAt",
                "Title",
                "Description",
            ]
        ),
        *(["Resources", "FindingProviderFields", "Resources.0.Type", "Resources.0.Id"]),
        f"{SEVERITY}.Label",
    ],
)
def test_required_members(path: str) -> None:
    encoded = changed(path, GONE)
    assert path.rsplit(".", 1)[-1] in faults(encoded)
    assert finding_faults(json.loads(encoded))


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("Id", 512),
        ("GeneratorId", 512),
        ("Title", 256),
        ("Description", 1024),
        ("ProductName", 128),
        ("CompanyName", 128),
        (f"{SEVERITY}.Original", 64),
        (f"{ADVICE}.Text", 512),
        ("Resources.0.Region", 16),
        (f"{CONTAINER}.Name", 128),
        (f"{CONTAINER}.ImageName", 128),
        (f"{CONTAINER}.ImageId", 128),
        ("Resources.0.Details.Other.pod", 1023),
        ("ProductFields.falco/source", 2048),
        ("Process.Name", 64),
        ("Process.Path", 512),
        (f"{NETWORK}.Protocol", 64),
    ],
)
def test_lengths_are_counted_in_characters(path: str, limit: int) -> None:
    for character in ("x", "\u4e2d"):
        longest = changed(path, character * limit)
        assert faults(longest) == ""
        assert finding_faults(json.loads(longest)) == []
        assert faults(changed(path, character * (limit + 1)))
        assert faults(changed(path, ""))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("Titel", "unknown member"),
        ("Resources.0.Details.Pod", {}),
        (f"{CONTAINER}.Digest", "x"),
        ("Process.Args", "x"),
        ("SchemaVersion", "2018-10-09"),
        ("Resources.0.Type", "Pod"),
        ("Title", 5),
        ("Title", None),
        ("Title", " \t"),
        ("Description", "\n"),
        ("Id", " "),
        ("AwsAccountId", "11112222333"),
        ("AwsAccountId", 111122223333),
        ("ProductArn", "arn:aws:securityhub:eu-west-1:111122223333:product/999999999999/default"),
        ("ProductArn", "arn:aws:securityhub:eu-west-1:111122223333:product/111122223333/default\n"),
        ("CreatedAt", "yesterday"),
        ("CreatedAt", "2026-11-20"),
        ("CreatedAt", "2026-11-20T09:00:00"),
        ("UpdatedAt", "2026-13-20T09:00:00Z"),
        ("FirstObservedAt", "2026-11-20T25:00:00Z"),
        ("LastObservedAt", 1_800_000_000),
        ("LastObservedAt", ""),
        ("RecordState", "CLOSED"),
        (f"{SEVERITY}.Label", "BOGUS"),
        (f"{SEVERITY}.Label", "medium"),
        ("FindingProviderFields.Types", ["TTPs/a/b/c"]),
        ("FindingProviderFields.Types", ["TTPs/"]),
        ("FindingProviderFields.Types", [""]),
        ("FindingProviderFields.Types", ["Anything/Execution"]),
        ("FindingProviderFields.Types", ["TTPsX"]),
        ("FindingProviderFields.Types", ["TTPs/Execution"] * 51),
        ("Resources", []),
        ("Resources", [{"Type": "Other", "Id": "x"}] * 33),
        ("Resources.0.Partition", "aws-eusc"),
        ("Resources.0.ResourceRole", "Victim"),
        ("Resources.0.Details.Other", {str(number): "x" for number in range(51)}),
        ("Resources.0.Details.Other", {"x" * 128: "x"}),
        (f"{CONTAINER}.Privileged", "true"),
        (f"{CONTAINER}.LaunchedAt", "soon"),
        ("ProductFields", {str(number): "x" for number in range(51)}),
        ("ProductFields", {"x" * 129: "x"}),
        ("ProductFields", {"": "x"}),
        ("ProductFields", {"x": 5}),
        ("ProductFields", {"x": None}),
        ("Process.Pid", -1),
        ("Process.Pid", 2**31),
        ("Process.Pid", "1"),
        ("Process.ParentPid", 1.5),
        ("Action.ActionType", "PORT_SCAN"),
        (f"{NETWORK}.ConnectionDirection", "BOTH"),
        (f"{NETWORK}.RemoteIpDetails.IpAddressV4", "::1"),
        (f"{NETWORK}.RemoteIpDetails.IpAddressV4", "1.2.3"),
        (f"{NETWORK}.RemoteIpDetails.IpAddressV4", "1.2.3.256"),
        (f"{NETWORK}.RemoteIpDetails.IpAddressV4", "1.2.3.4.5"),
        (f"{NETWORK}.RemoteIpDetails.IpAddressV4", "1.2.3.4\n"),
        (f"{NETWORK}.RemotePortDetails.Port", 65536),
        (f"{NETWORK}.LocalPortDetails.Port", -1),
        (f"{ADVICE}.Url", "wiki"),
        (f"{ADVICE}.Url", "ftp://wiki/x"),
        (f"{ADVICE}.Url", "https://a b"),
    ],
)
def test_violations(path: str, value: Any) -> None:
    assert faults(changed(path, value))


@pytest.mark.parametrize(
    "stamp", ["2026-11-20T09:00:00Z", "2026-11-20T09:00:00.123456789Z", "2026-11-20T09:00:00.5+05:30"]
)
def test_timestamps_the_service_takes(stamp: str) -> None:
    assert faults(changed("CreatedAt", stamp)) == ""


def test_an_oversize_finding_is_named_with_its_size() -> None:
    text = faults(b"x" * (FINDING_BYTES_MAX + 1))
    assert "240001" in text
    assert str(FINDING_BYTES_MAX) in text


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"{}"])
def test_what_is_no_finding_at_all(raw: bytes) -> None:
    assert faults(raw)


def test_names_of_fields_are_remembered_within_bounds() -> None:
    """Attackers choose names: neither their number nor their length may pile up."""
    for number in range(2 * KEYS_MAX):
        assert product_field_keys[f"key[{number}]"] == f"falco/key_{number}_"
    for number in range(100):
        assert len(product_field_keys[f"{number}" + "x" * 1_000_000]) == 128
    assert len(product_field_keys) <= KEYS_MAX
    assert sum(len(name) for name in product_field_keys) < 10_000_000
    product_field_keys.clear()
