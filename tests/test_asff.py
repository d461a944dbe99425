"""The mapping to findings: each rule of the decisions, the limits of the format, and any alert whatever."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forwarder import asff
from forwarder.alert import PRIORITIES
from forwarder.asff import SEVERITIES
from forwarder.asff_context import Advice, Context, UnmappableError, cut
from forwarder.asff_schema import FINDING_BYTES_MAX, faults
from forwarder.record import Record
from tests.fakes.aws_asff import finding_faults
from tests.samples import REAL_ALERTS, REAL_BODIES, RECEIVED_NS, record_of

CONTEXT = Context(
    partition="aws",
    region="eu-west-1",
    account="111122223333",
    cluster="prod",
    cluster_arn="",
    cluster_account="",
    replica="falco-aws-forwarder-0",
    log_group="/falco/prod",
    log_stream="{replica}",
    severities=SEVERITIES["default"],
    remediation={},
)
BARE = CONTEXT._replace(cluster="", log_group="", log_stream="")
SYSCALL = {"evt.type": "connect", "fd.name": "10.0.0.5:41000->93.184.216.34:443", "fd.l4proto": "tcp"}


def finding(
    members: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    context: Context = CONTEXT,
    **changes: Any,
) -> dict[str, Any]:
    """The finding of an alert, judged by both validators."""
    alert = {"rule": "Some rule", "priority": "Warning", "output": "text"} | (members or {})
    if fields is not None:
        alert["output_fields"] = fields
    encoded = asff.encode(record_of(alert, **changes), context)
    found: dict[str, Any] = json.loads(encoded)
    assert faults(encoded) == ""
    assert finding_faults(found) == []
    return found


def units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


# ---- real alerts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(119))
def test_every_real_alert_gives_a_good_finding(number: int) -> None:
    sent = REAL_ALERTS[number]
    record = record_of(REAL_BODIES[number])
    found = json.loads(asff.encode(record, CONTEXT))
    assert finding_faults(found) == []
    assert found["Title"] == sent["rule"]
    assert found["GeneratorId"] == f"falco/{sent['rule']}"
    assert found["Id"] == f"falco/eu-west-1/111122223333/prod/{record.id}"
    assert found["FindingProviderFields"]["Severity"]["Original"] == sent["priority"]
    for key, value in (sent.get("output_fields") or {}).items():
        if isinstance(value, int) and not isinstance(value, bool) and len(sent["output_fields"]) < 40:
            assert found["ProductFields"][f"falco/{key.replace('[', '_').replace(']', '_')}"] == str(value)


@pytest.mark.parametrize("partition", ["aws-cn", "aws-eusc"])
def test_real_alerts_in_other_partitions(partition: str) -> None:
    context = CONTEXT._replace(partition=partition, region="cn-north-1")
    for body in REAL_BODIES:
        assert finding_faults(json.loads(asff.encode(record_of(body), context))) == []


@pytest.mark.parametrize("number", [0, 50, 118])
def test_the_same_record_always_gives_the_same_bytes(number: int) -> None:
    """Also after it was written down and read again: a repeated call must be a no-op."""
    record = record_of(REAL_BODIES[number])
    stored = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Record)
    assert asff.encode(record, CONTEXT) == asff.encode(stored, CONTEXT) == asff.encode(record, CONTEXT)


# ---- head of the finding ----------------------------------------------------------------------------


def test_times_are_fixed_by_the_record() -> None:
    found = finding({"time": "2026-11-20T09:00:00.123456789Z"})
    assert found["FirstObservedAt"] == found["LastObservedAt"] == "2026-11-20T09:00:00.123Z"
    assert found["CreatedAt"] == found["UpdatedAt"] == "2027-01-15T08:00:00.123Z"
    assert RECEIVED_NS == 1_800_000_000_123_456_789


@pytest.mark.parametrize("time_ns", [-1, 0, -(10**18), 10**19, 2**64 - 1])
def test_odd_times_still_give_a_good_finding(time_ns: int) -> None:
    assert finding(time_ns=time_ns)["FirstObservedAt"].endswith("Z")


@pytest.mark.parametrize(
    ("preset", "labels"),
    [
        ("default", "CRITICAL CRITICAL CRITICAL HIGH MEDIUM LOW INFORMATIONAL INFORMATIONAL"),
        ("guidance", "CRITICAL CRITICAL CRITICAL HIGH HIGH MEDIUM INFORMATIONAL INFORMATIONAL"),
    ],
)
def test_severity_by_priority(preset: asff.SeverityPreset, labels: str) -> None:
    context = CONTEXT._replace(severities=SEVERITIES[preset])
    for priority, label in zip(PRIORITIES, labels.split(), strict=True):
        found = finding({"priority": priority}, context=context)
        assert found["FindingProviderFields"]["Severity"] == {"Label": label, "Original": priority}


def test_severity_and_types_are_only_in_the_providers_fields() -> None:
    """Top-level ones, notes and workflow belong to the customer."""
    found = finding()
    assert not found.keys() & {"Severity", "Types", "Note", "Workflow", "UserDefinedFields", "Confidence"}
    assert found["RecordState"] == "ACTIVE"
    assert (found["ProductName"], found["CompanyName"]) == ("Falco", "Falco")


def test_unknown_priority_is_a_warning_and_keeps_its_name() -> None:
    severity = finding({"priority": "Fatal"})["FindingProviderFields"]["Severity"]
    assert severity == {"Label": "MEDIUM", "Original": "Fatal"}
    assert finding({"priority": None})["FindingProviderFields"]["Severity"]["Original"] == "unknown"


def test_rule_and_output_stand_in_for_each_other() -> None:
    found = finding({"rule": None, "output": "what happened"})
    assert (found["Title"], found["GeneratorId"]) == ("what happened", "falco/unknown")
    found = finding({"output": "<NA>"})
    assert found["Description"] == "Some rule"
    assert finding({"output": "", "message": "m"})["Description"] == "m"
    assert finding({"output": "<NA>", "message": "m"})["Description"] == "m"


@pytest.mark.parametrize(
    ("partition", "region", "named"),
    [
        ("aws", "eu-west-1", "aws"),
        ("aws-cn", "cn-north-1", "aws-cn"),
        ("aws-us-gov", "us-gov-west-1", "aws-us-gov"),
        ("aws-eusc", "eusc-de-east-1", None),
        ("aws-iso-e", "eu-isoe-west-1", None),
    ],
)
def test_partitions(partition: str, region: str, named: str | None) -> None:
    found = finding(
        fields={"container.id": "abc"}, context=CONTEXT._replace(partition=partition, region=region)
    )
    product = f"arn:{partition}:securityhub:{region}:111122223333:product/111122223333/default"
    assert found["ProductArn"] == product
    assert found["Resources"][1]["Id"] == f"arn:{partition}:eks:{region}:111122223333:cluster/prod"
    assert {resource.get("Partition") for resource in found["Resources"]} == {named}
    assert {resource["Region"] for resource in found["Resources"]} == {region}


def test_finding_id_without_a_cluster() -> None:
    assert finding({"uuid": "u-1"}, context=BARE)["Id"] == "falco/eu-west-1/111122223333/-/u-1"


# ---- types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "types"),
    [
        (["mitre_execution"], ["TTPs/Execution"]),
        (["T1059", "container", "mitre_execution"], ["TTPs/Execution/T1059"]),
        (["T1059.004", "T1555", "mitre_execution"], ["TTPs/Execution/T1059.004", "TTPs/Execution/T1555"]),
        (
            ["T1555", "mitre_credential_access", "mitre_execution"],
            ["TTPs/Credential Access", "TTPs/Execution"],
        ),
        (["mitre_persistence", "TA0003"], ["TTPs/Persistence"]),
        (["TA0005-defense-evasion", "T1562-impair-defenses"], ["TTPs/Defense Evasion/T1562"]),
        (["mitre_reconnaissance"], ["TTPs/Discovery"]),
        (["TA0043"], ["TTPs/Discovery"]),
        (["mitre_exfiltration"], ["Effects/Data Exfiltration"]),
        (["TA0010", "T1567-exfiltration-to-Cloud-Storage"], ["Effects/Data Exfiltration/T1567"]),
        (["mitre_impact"], ["Effects/Resource Consumption"]),
        (["mitre_data_destruction", "T1485-data-destruction"], ["Effects/Data Destruction/T1485"]),
        (["mitre_command_and_control", "TA0011"], ["TTPs/Command and Control"]),
        (["maturity_stable", "T1059"], ["Unusual Behaviors/Process"]),
        (["", "/", "a/b/c/d", "T1059/x"], ["Unusual Behaviors/Process"]),
        ([], ["Unusual Behaviors/Process"]),
        (None, ["Unusual Behaviors/Process"]),
    ],
)
def test_types_from_tags(tags: list[str] | None, types: list[str]) -> None:
    assert finding({"tags": tags})["FindingProviderFields"]["Types"] == types


@pytest.mark.parametrize(
    ("source", "container", "kind"),
    [
        ("syscall", "abc", "Container"),
        ("syscall", "host", "Process"),
        ("syscall", None, "Process"),
        ("syscalls", "abc", "Container"),
        (None, "<NA>", "Process"),
        ("k8s_audit", None, "User"),
        ("aws_cloudtrail", None, "User"),
        ("okta", None, "Application"),
        ("github", "abc", "Application"),
    ],
)
def test_types_without_tags_by_source(source: str | None, container: str | None, kind: str) -> None:
    found = finding({"source": source}, {"container.id": container})
    assert found["FindingProviderFields"]["Types"] == [f"Unusual Behaviors/{kind}"]


@pytest.mark.parametrize("tactics", [["mitre_execution"], ["mitre_execution", "mitre_impact"]])
def test_no_more_types_than_the_service_takes(tactics: list[str]) -> None:
    tags = [f"T{number}" for number in range(1000, 1100)]
    assert 1 <= len(finding({"tags": tags + tactics})["FindingProviderFields"]["Types"]) <= 50


# ---- resources --------------------------------------------------------------------------------------


def test_container_resource_has_what_falco_knows() -> None:
    fields = {
        "container.id": "0123456789ab",
        "container.full_id": "0123456789ab" * 5,
        "container.name": "shop",
        "container.image.repository": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/shop",
        "container.image.tag": "1.2",
        "container.image.digest": "sha256:" + "a" * 64,
        "container.privileged": True,
        "k8s.pod.name": "shop-1",
        "k8s.ns.name": "web",
    }
    container, node, cluster = finding({"hostname": "node-1"}, fields)["Resources"]
    assert (container["Type"], container["Id"]) == ("Container", "0123456789ab" * 5)
    assert container["ResourceRole"] == "Target"
    assert container["Details"] == {
        "Container": {
            "Name": "shop",
            "ImageName": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/shop:1.2",
            "ImageId": "sha256:" + "a" * 64,
            "Privileged": True,
        },
        "Other": {"pod": "shop-1", "namespace": "web"},
    }
    assert (node["Type"], node["Id"]) == ("Other", "node-1")
    assert (cluster["Type"], cluster["Details"]["AwsEksCluster"]["Name"]) == ("AwsEksCluster", "prod")
    assert not {"ResourceRole"} & (node.keys() | cluster.keys())


@pytest.mark.parametrize(
    ("fields", "details"),
    [
        ({}, None),
        ({"container.image": "nginx:1"}, {"Container": {"ImageName": "nginx:1"}}),
        ({"container.image.tag": "1"}, None),
        ({"container.privileged": False}, {"Container": {"Privileged": False}}),
        ({"container.image.id": "f00"}, {"Container": {"ImageId": "f00"}}),
        ({"k8smeta.pod.name": "p", "k8smeta.ns.name": "n"}, {"Other": {"pod": "p", "namespace": "n"}}),
        ({"container.name": "<NA>", "k8s.pod.name": None, "k8s.ns.name": ""}, None),
    ],
)
def test_container_details_leave_out_what_is_absent(
    fields: dict[str, Any], details: dict[str, Any] | None
) -> None:
    resource = finding(fields={"container.id": "abc"} | fields)["Resources"][0]
    assert resource.get("Details") == details


def test_host_is_no_container() -> None:
    found = finding({"hostname": "node-1"}, {"container.id": "host", "container.name": "host"})
    assert [resource["Type"] for resource in found["Resources"]] == ["Other", "AwsEksCluster"]
    assert found["Resources"][0]["ResourceRole"] == "Target"


def test_without_anything_known_the_source_is_the_resource() -> None:
    assert [r["Id"] for r in finding({"source": "okta"}, context=BARE)["Resources"]] == ["falco/okta"]


# ---- process, network, remediation ------------------------------------------------------------------


def test_process() -> None:
    fields = {"proc.name": "bash", "proc.exepath": "/bin/bash", "proc.pid": 12, "proc.ppid": "7"}
    process = {"Name": "bash", "Path": "/bin/bash", "Pid": 12, "ParentPid": 7}
    assert finding(fields=fields)["Process"] == process
    assert "Process" not in finding(fields={"proc.name": "<NA>", "proc.exepath": None})


@pytest.mark.parametrize("pid", [-1, 2**31, 2**64, "x", "1.0", 1.5, True, "9" * 5000, None, [1]])
def test_impossible_process_ids_are_left_out(pid: Any) -> None:
    assert "Process" not in finding(fields={"proc.pid": pid})


@pytest.mark.parametrize(
    ("event", "direction", "remote", "local"),
    [
        ("connect", "OUT", ("93.184.216.34", 443), 41000),
        ("sendto", "OUT", ("93.184.216.34", 443), 41000),
        ("sendmsg", "OUT", ("93.184.216.34", 443), 41000),
        ("accept", "IN", ("10.0.0.5", 41000), 443),
        ("accept4", "IN", ("10.0.0.5", 41000), 443),
    ],
)
def test_network_action(event: str, direction: str, remote: tuple[str, int], local: int) -> None:
    action = finding(fields=SYSCALL | {"evt.type": event})["Action"]
    assert action == {
        "ActionType": "NETWORK_CONNECTION",
        "NetworkConnectionAction": {
            "ConnectionDirection": direction,
            "RemoteIpDetails": {"IpAddressV4": remote[0]},
            "RemotePortDetails": {"Port": remote[1]},
            "LocalPortDetails": {"Port": local},
            "Protocol": "TCP",
        },
    }


@pytest.mark.parametrize(
    "change",
    [
        {"evt.type": "execve"},
        {"evt.type": None},
        {"fd.name": None},
        {"fd.name": "/etc/shadow"},
        {"fd.name": "::1:41000->::1:443"},
        {"fd.name": "10.0.0.5:41000->999.1.1.1:443"},
        {"fd.name": "10.0.0.5:41000->01.02.03.04:443"},
        {"fd.name": "10.0.0.5:41000->1.2.3.4:65536"},
        {"fd.name": "10.0.0.5:41000->1.2.3.4:443 "},
        {"fd.name": ["10.0.0.5:41000->1.2.3.4:443"]},
    ],
)
def test_no_network_action_without_a_known_remote(change: dict[str, Any]) -> None:
    assert "Action" not in finding(fields=SYSCALL | change)


def test_network_action_without_protocol_and_own_port() -> None:
    fields = SYSCALL | {"fd.name": "10.0.0.5:99999->1.2.3.4:53", "fd.l4proto": None}
    action = finding(fields=fields)["Action"]["NetworkConnectionAction"]
    assert action.keys() == {"ConnectionDirection", "RemoteIpDetails", "RemotePortDetails"}


@pytest.mark.parametrize(
    ("advice", "shown"),
    [
        (Advice("Look", "https://wiki/x"), {"Text": "Look", "Url": "https://wiki/x"}),
        (Advice(None, "https://wiki/x"), {"Url": "https://wiki/x"}),
        (Advice("x" * 600, None), {"Text": "x" * 511 + "\u2026"}),
    ],
)
def test_remediation_of_a_rule(advice: Advice, shown: dict[str, str]) -> None:
    context = CONTEXT._replace(remediation={"Some rule": advice})
    assert finding(context=context)["Remediation"] == {"Recommendation": shown}
    assert "Remediation" not in finding({"rule": "another"}, context=context)


# ---- product fields ---------------------------------------------------------------------------------


def test_product_fields_name_the_event_in_the_log() -> None:
    record = {"uuid": "u-1", "hostname": "h:1", "time": "2026-11-20T00:00:00Z", "tags": ["a", "b"]}
    context = CONTEXT._replace(log_stream="{cluster}/{hostname}/{date}/{replica}")
    fields = finding(record, context=context)["ProductFields"]
    assert fields == {
        "falco/id": "u-1",
        "falco/priority": "Warning",
        "falco/source": "syscall",
        "falco/time": "2026-11-20T00:00:00Z",
        "falco/hostname": "h:1",
        "falco/tags": "a,b",
        "falco/cluster": "prod",
        "falco/log_group": "/falco/prod",
        "falco/log_stream": "prod/h_1/2026-11-20/falco-aws-forwarder-0",
    }
    assert not {"falco/log_group", "falco/log_stream", "falco/cluster"} & (
        finding(context=BARE)["ProductFields"].keys()
    )


def test_fields_become_texts_and_absent_ones_vanish() -> None:
    sent = {"i": 2**63 + 1, "b": True, "f": 1.50, "l": [1, "a"], "o": {"k": None}, "s": "x"}
    absent = {"n": None, "e": "", "a": "<NA>", "w": " \t"}
    fields = finding(fields=sent | absent)["ProductFields"]
    assert {key[6:]: value for key, value in fields.items() if len(key) == 7} == {
        "i": "9223372036854775809",
        "b": "true",
        "f": "1.5",
        "l": '[1,"a"]',
        "o": '{"k":null}',
        "s": "x",
    }


def test_odd_keys_are_made_fit() -> None:
    names = ["proc.aname[2]", "json.value[/a b]", "\u00e4", "", "x" * 500, "aws/x"]
    fields = finding(fields=dict.fromkeys(names, "v"))["ProductFields"]
    shown = {"falco/proc.aname_2_", "falco/json.value_/a b_", "falco/_", "falco/", "falco/aws/x"}
    assert shown | {"falco/" + "x" * 122} == {key for key, value in fields.items() if value == "v"}


def test_our_own_names_win_over_fields_of_that_name() -> None:
    fields = finding({"uuid": "u-1"}, {"id": "forged", "log_group": "forged"})["ProductFields"]
    assert (fields["falco/id"], fields["falco/log_group"]) == ("u-1", "/falco/prod")


def test_of_too_many_fields_the_longest_go() -> None:
    fields = {f"short{number}": "x" for number in range(30)} | {f"long{n}": "y" * 500 for n in range(30)}
    product = finding(fields=fields)["ProductFields"]
    assert len(product) == 50
    assert all(f"falco/short{number}" in product for number in range(30))


@pytest.mark.parametrize("character", ["\u4e2d", "\x01", "\U0001f600", '"'], ids=repr)
def test_many_long_values_stay_within_the_size_of_a_finding(character: str) -> None:
    """240 KB are bytes, the limits of the fields are characters: both must hold."""
    record = record_of({"rule": "r", "output_fields": {f"key{n}": character * 4000 for n in range(60)}})
    assert len(asff.encode(record, CONTEXT)) <= FINDING_BYTES_MAX


def test_a_huge_integer_does_not_spoil_the_finding() -> None:
    fields = '{"container.id":"abc","proc.name":"bash","huge":%s}' % ("9" * 5000)
    record = record_of(b'{"rule":"r","output_fields":%b}' % fields.encode())
    found = json.loads(asff.encode(record, CONTEXT))
    assert (found["Resources"][0]["Id"], found["Process"]["Name"]) == ("abc", "bash")


def test_what_would_be_refused_is_told_instead_of_sent() -> None:
    with pytest.raises(UnmappableError, match=r"AwsAccountId|ProductArn"):
        asff.encode(record_of({"rule": "r"}), CONTEXT._replace(account="123"))


# ---- cutting ----------------------------------------------------------------------------------------


@given(st.text(max_size=60), st.integers(2, 40))
@example("\U0001f600" * 20, 39)
@example("a" * 19 + "\U0001f600", 20)
@settings(max_examples=300, deadline=None)
def test_cut_keeps_whole_characters_within_utf16_units(text: str, length_max: int) -> None:
    result = cut(text, length_max)
    assert units(result) <= length_max
    if units(text) <= length_max:
        assert result == text
    else:
        assert result[-1] == "\u2026"
        assert text.startswith(result[:-1])
        assert units(result) >= length_max - 1


# ---- any alert --------------------------------------------------------------------------------------

LONG = st.builds(
    lambda character, count: character * count,
    st.sampled_from(["x", "\u00e4", "\u4e2d", "\U0001f600", "\x01", "\n", " ", '"', "\u2028", "\ufeff."]),
    st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1024, 3000]),
)
TEXTS = st.text(max_size=20) | LONG | st.sampled_from(["<NA>", "host", "-1", "443", "1.2.3.4", "aws/x", "/"])
SCALARS = TEXTS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)
FIELD_NAMES = st.sampled_from(
    [
        "container.id",
        "container.full_id",
        "container.name",
        "container.image",
        "container.image.repository",
        "container.image.tag",
        "container.image.digest",
        "container.privileged",
        "k8s.pod.name",
        "k8s.ns.name",
        "proc.name",
        "proc.exepath",
        "proc.pid",
        "proc.ppid",
        "fd.name",
        "evt.type",
        "fd.l4proto",
        "proc.aname[2]",
        "id",
    ]
)
ALERTS = st.fixed_dictionaries(
    {"rule": TEXTS.map(lambda text: f"r{text}")},
    optional={
        "output": VALUES,
        "priority": VALUES | st.sampled_from(PRIORITIES),
        "time": VALUES,
        "source": VALUES,
        "hostname": VALUES,
        "tags": VALUES
        | st.lists(TEXTS | st.sampled_from(["mitre_execution", "T1059", "TA0040"]), max_size=9),
        "uuid": VALUES,
        "output_fields": st.dictionaries(FIELD_NAMES | st.text(max_size=200), VALUES, max_size=12) | VALUES,
    },
)


@given(ALERTS, st.sampled_from([CONTEXT, BARE]), st.integers(0, 60))
@example({"rule": "r", "output_fields": SYSCALL | {"fd.l4proto": "\u00df" * 64}}, CONTEXT, 60)
@settings(max_examples=250, deadline=None)
def test_any_alert_gives_a_finding_that_the_service_takes(
    alert: dict[str, Any], context: Context, more_fields: int
) -> None:
    if more_fields and isinstance(alert.get("output_fields"), dict):
        more = {f"field{number}": "x" * number for number in range(more_fields)}
        alert = alert | {"output_fields": alert["output_fields"] | more}
    found = finding(alert, context=context)
    assert units(found["Title"]) <= 256
    assert units(found["Description"]) <= 1024
    assert all(units(value) <= 2048 for value in found["ProductFields"].values())
