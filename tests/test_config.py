"""Configuration: every fault is found at once and says what to do, and the environment wins over the file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from forwarder.config import FILE_BYTES_MAX, ConfigError, Fault, documented, load, setting
from forwarder.demo import CONFIGURATION
from forwarder.settings import Settings, enabled_sinks, load_settings
from forwarder.sinks.security_hub import RemediationSettings

MINIMAL = """
cluster: {name: prod}
aws: {region: eu-west-1}
sinks:
  cloudwatch_logs: {enabled: true, log_group: /falco/prod}
"""


@pytest.fixture(autouse=True)
def _no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own region must not decide."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def faults_of(path: Path | None, environment: dict[str, str] | None = None) -> dict[str, str]:
    """Faults by key; the configuration must have some."""
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environment or {})
    assert str(caught.value) == "; ".join(map(str, caught.value.faults))
    return {fault.where: fault.what for fault in caught.value.faults}


def faults_in(file: Path, text: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    file.write_text(text)
    return faults_of(file, environment)


def loaded(file: Path, text: str, environment: dict[str, str] | None = None) -> Settings:
    file.write_text(text)
    return load_settings(file, environment or {})


# ---- what loads -------------------------------------------------------------------------------------


def test_the_smallest_configuration(file: Path) -> None:
    found = loaded(file, MINIMAL)
    assert enabled_sinks(found) == ["cloudwatch_logs"]
    assert found.sinks.cloudwatch_logs.log_group == "/falco/prod"
    assert (found.receiver.port, found.admin.port, found.spool.sync) == (2801, 8080, "full")
    assert found.sinks.cloudwatch_logs.minimum_priority == "debug"
    assert found.sinks.security_hub.minimum_priority == "notice"
    assert (found.sinks.security_hub.rate_per_sec, found.sinks.security_hub.burst) == (10.0, 30)


def test_the_configuration_of_the_demo(file: Path) -> None:
    ports = SimpleNamespace(receiver=2801, admin=8080)
    text = CONFIGURATION.format(
        cluster="demo", directory="/var", ports=ports, region="eu-west-1", group="/falco/demo"
    )
    found = loaded(file, text)
    assert enabled_sinks(found) == ["cloudwatch_logs", "security_hub"]
    assert found.sinks.cloudwatch_logs.retention_days == 90
    assert found.cluster.name == "demo"


def test_without_a_file_the_environment_is_enough() -> None:
    found = load_settings(
        None,
        {
            "FORWARDER__AWS__REGION": "eu-west-1",
            "FORWARDER__SINKS__SECURITY_HUB__ENABLED": "true",
            "FORWARDER__SINKS__SECURITY_HUB__REMEDIATION": "{Some rule: {text: Look, url: https://wiki/x}}",
            "FORWARDER__AWS__ACCOUNT_ID": "012345678901",
            "FORWARDER__RECEIVER__PORT": "2802",
            "FORWARDER__SPOOL__SYNC": "normal",
            "FORWARDER__RECEIVER__HOLD_SECS_MAX": "0.5",
            "PATH": "/bin",
        },
    )
    assert enabled_sinks(found) == ["security_hub"]
    assert found.sinks.security_hub.remediation == {
        "Some rule": RemediationSettings("Look", "https://wiki/x")
    }
    assert found.aws.account_id == "012345678901"
    assert (found.receiver.port, found.spool.sync, found.receiver.hold_secs_max) == (2802, "normal", 0.5)


def test_the_environment_wins_over_the_file(file: Path) -> None:
    found = loaded(
        file,
        MINIMAL,
        {"FORWARDER__CLUSTER__NAME": "stage", "forwarder__sinks__cloudwatch_logs__log_group": "/other"},
    )
    assert (found.cluster.name, found.sinks.cloudwatch_logs.log_group) == ("stage", "/other")


def test_the_real_environment_is_read_where_none_is_given(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDER__CLUSTER__NAME", "from-environment")
    file.write_text(MINIMAL)
    assert load_settings(file).cluster.name == "from-environment"


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_of_the_sdk_is_good_enough(file: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "eu-central-1")
    assert loaded(file, MINIMAL.replace("region: eu-west-1", "")).aws.region == ""


def test_an_empty_file_is_no_configuration(file: Path) -> None:
    assert faults_in(file, "# nothing yet\n").keys() == {"aws.region", "sinks"}


# ---- every fault at once ----------------------------------------------------------------------------


def test_every_fault_is_reported_at_once(file: Path) -> None:
    faults = faults_in(
        file,
        """
        clusters: {}
        cluster: {name: "-bad", nmae: x}
        spool: {bytes_max: 5, sync: sometimes}
        receiver: {port: "2801", hold_secs_max: -1}
        admin: [8080]
        aws: {account_id: 111122223333}
        sinks:
          cloudwatch_logs: {enabled: "yes", retention_days: 2}
          security_hub: {burst: 1.5, minimum_priority: high}
          s3: {}
        """,
        {
            "FORWARDER__RECIEVER__PORT": "1",
            "FORWARDER__LOG__LEVEL": "loud",
            "FORWARDER__SPOOL__BYTES_MAX": "[5",
        },
    )
    assert faults.keys() >= {
        "clusters",
        "cluster.name",
        "cluster.nmae",
        "spool.bytes_max",
        "spool.sync",
        "receiver.port",
        "receiver.hold_secs_max",
        "admin",
        "aws.account_id",
        "sinks.cloudwatch_logs.enabled",
        "sinks.security_hub.burst",
        "sinks.security_hub.minimum_priority",
        "sinks.s3",
        "log.level",
        "FORWARDER__RECIEVER__PORT",
        "FORWARDER__SPOOL__BYTES_MAX",
    }


@pytest.mark.parametrize(
    ("section", "hidden"),
    [
        ("cloudwatch_logs: {enabled: true, linger_secs: 99}", "sinks.cloudwatch_logs.log_group"),
        ("cloudwatch_logs: {linger_secs: 99, retention_days: 2}", "sinks.cloudwatch_logs.retention_days"),
        ("security_hub: {burst: 0, remediation: {r: {}}}", "sinks.security_hub.remediation.r"),
    ],
)
def test_a_fault_of_one_key_does_not_hide_those_of_its_neighbours(
    file: Path, section: str, hidden: str
) -> None:
    """A person fixes what is listed and deploys again: all of it has to be listed."""
    faults = faults_in(file, f"aws: {{region: eu-west-1}}\nsinks:\n  {section}\n")
    assert hidden in faults
    assert len(faults) >= 2


def test_a_fault_elsewhere_does_not_hide_that_no_sink_is_on(file: Path) -> None:
    faults = faults_in(file, "aws: {region: eu-west-1}\nreceiver: {port: 99999}\n")
    assert faults.keys() == {"receiver.port", "sinks"}


@pytest.mark.parametrize(
    ("text", "where", "suggestion"),
    [
        ("sink: {}", "sink", "sinks"),
        ("cluster: {nam: x}", "cluster.nam", "name"),
        ("sinks: {cloudwatch_log: {}}", "sinks.cloudwatch_log", "cloudwatch_logs"),
        ("sinks: {cloudwatch_logs: {group: x}}", "sinks.cloudwatch_logs.group", "log_group"),
    ],
)
def test_unknown_keys_come_with_a_suggestion(file: Path, text: str, where: str, suggestion: str) -> None:
    assert faults_in(file, text)[where] == f"unknown key, did you mean {suggestion}?"


def test_unknown_keys_without_a_like_one(file: Path) -> None:
    assert faults_in(file, "zzzz: 1")["zzzz"] == "unknown key"


def test_unknown_names_in_the_environment() -> None:
    faults = faults_of(None, {"FORWARDER__CLUSTER_NAME": "x", "FORWARDER__": "x", "FORWARDER_X": "fine"})
    assert faults["FORWARDER__CLUSTER_NAME"] == "unknown setting, did you mean FORWARDER__CLUSTER__NAME?"
    assert "FORWARDER__" in faults
    assert "FORWARDER_X" not in faults


# ---- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("receiver: {port: 2801.5}", "receiver.port", "int"),
        ("receiver: {port: null}", "receiver.port", "null"),
        ("receiver: {port: -1}", "receiver.port", ">= 0"),
        ("receiver: {port: 65536}", "receiver.port", "<= 65535"),
        ("receiver: {hold_secs_max: soon}", "receiver.hold_secs_max", "float"),
        ("receiver: {body_secs_max: 0}", "receiver.body_secs_max", "> 0"),
        ("receiver: {bodies_bytes_max: 2000000}", "receiver.bodies_bytes_max", "body_bytes_max (4194304)"),
        ("receiver: {tls: {cert_file: tls.crt}}", "receiver.tls.key_file", "come together"),
        ("receiver: {tls: {key_file: tls.key}}", "receiver.tls.cert_file", "come together"),
        ("receiver: {tls: {client_ca_file: ca.crt}}", "receiver.tls.client_ca_file", "without TLS"),
        ("spool: {directory: ''}", "spool.directory", "length"),
        ("spool: {sync: off}", "spool.sync", "full, normal"),
        ("sinks: {cloudwatch_logs: {enabled: 1}}", "sinks.cloudwatch_logs.enabled", "bool"),
        ("sinks: {cloudwatch_logs: {log_group: 'a b'}}", "sinks.cloudwatch_logs.log_group", "a b"),
        ("sinks: {cloudwatch_logs: {log_stream: ''}}", "sinks.cloudwatch_logs.log_stream", "length"),
        ("sinks: {security_hub: {rate_per_sec: 0}}", "sinks.security_hub.rate_per_sec", "> 0"),
        ("sinks: {security_hub: {role_arn: role}}", "sinks.security_hub.role_arn", "role"),
        ("sinks: {security_hub: {severity: aws}}", "sinks.security_hub.severity", "default, guidance"),
        (
            "sinks: {security_hub: {remediation: {r: {txt: x}}}}",
            "sinks.security_hub.remediation",
            "unknown field",
        ),
    ],
)
def test_types_and_bounds(file: Path, text: str, where: str, words: str) -> None:
    assert words in faults_in(file, text)[where]


def test_an_account_id_as_a_number_is_told_to_be_put_in_quotes(file: Path) -> None:
    assert "put it in quotes" in faults_in(file, "aws: {account_id: 111122223333}")["aws.account_id"]


@pytest.mark.parametrize(
    "key",
    [
        "CLUSTER__NAME",
        "AWS__ACCOUNT_ID",
        "SINKS__CLOUDWATCH_LOGS__LOG_GROUP",
        "SINKS__SECURITY_HUB__ROLE_ARN",
    ],
)
def test_a_line_end_after_a_name_is_refused(key: str) -> None:
    """As an environment variable from a file has it: AWS would refuse the name with every call."""
    value = {
        "CLUSTER__NAME": "prod\n",
        "AWS__ACCOUNT_ID": "111122223333\n",
        "SINKS__CLOUDWATCH_LOGS__LOG_GROUP": "/falco\n",
        "SINKS__SECURITY_HUB__ROLE_ARN": "arn:aws:iam::111122223333:role/x\n",
    }[key]
    assert key.lower().replace("__", ".") in faults_of(None, {f"FORWARDER__{key}": value})


@pytest.mark.parametrize("section", ["cluster", "aws", "sinks"])
@pytest.mark.parametrize("value", ["5", "[a]", "text", "null", ""])
def test_a_section_must_be_a_mapping(file: Path, section: str, value: str) -> None:
    text = faults_in(file, f"{section}: {value}\n", {"FORWARDER__CLUSTER__NAME": "x"})[section]
    assert text.startswith("must be a mapping, not ")


# ---- the file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"a: [", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"\t- x", "not valid YAML"),
        (b"&a [*a, *b]", "not valid YAML"),
        (b"a: !!python/object:os.system {}", "not valid YAML"),
        (b"cluster: {name: a}\ncluster: {name: b}", "'cluster' is given twice"),
        (b"cluster: {name: a, name: b}", "'name' is given twice"),
        (b"1: x", "1 is not text"),
        (b"on: x", "True is not text"),
        (b"? [a]\n: x", "is not text"),
        (b"[" * 2_000, "not valid YAML"),
        (b"receiver: {port: !!int x}", "not valid YAML"),
        (b"receiver: {port: " + b"9" * 5_000 + b"}", "not valid YAML"),
        (b"- a\n- b", "must be a mapping of sections"),
        (b"just text", "must be a mapping of sections"),
        (b"cluster: \xff", "is not UTF-8 text (byte 9)"),
        (b"#" * (FILE_BYTES_MAX + 1), f"larger than {FILE_BYTES_MAX} bytes"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_files_that_are_no_configuration(file: Path, raw: bytes, words: str) -> None:
    file.write_bytes(raw)
    text = faults_of(file)[str(file)]
    assert words in text
    assert "\n" not in text


@pytest.mark.parametrize("value", ["[5", "{a: 1, a: 2}", "!!int x", "[" * 2_000])
def test_bad_yaml_in_the_environment(value: str) -> None:
    name = "FORWARDER__RECEIVER__PORT"
    assert "is not valid YAML" in faults_of(None, {name: value})[name]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert faults_of(missing)[str(missing)] == "cannot be read: No such file or directory"
    assert faults_of(tmp_path)[str(tmp_path)].startswith("cannot be read: ")


# ---- what no single key can tell --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("sinks: {cloudwatch_logs: {enabled: true}}", "sinks.cloudwatch_logs.log_group", "is required"),
        ("sinks: {cloudwatch_logs: {log_group: aws/x}}", "sinks.cloudwatch_logs.log_group", "aws/"),
        ("sinks: {cloudwatch_logs: {log_group: AWS/x}}", "sinks.cloudwatch_logs.log_group", "aws/"),
        (
            "sinks: {cloudwatch_logs: {retention_days: 2}}",
            "sinks.cloudwatch_logs.retention_days",
            "1, 3, 5, 7",
        ),
        (
            "sinks: {security_hub: {remediation: {r: {}}}}",
            "sinks.security_hub.remediation.r",
            "a text or a url",
        ),
        (
            "sinks: {security_hub: {remediation: {r: {text: ' '}}}}",
            "sinks.security_hub.remediation.r",
            "a text or a url",
        ),
        (
            "sinks: {security_hub: {remediation: {r: {url: wiki}}}}",
            "sinks.security_hub.remediation.r.url",
            "https://",
        ),
        (
            "sinks: {security_hub: {remediation: {r: {url: 'https://a b'}}}}",
            "sinks.security_hub.remediation.r.url",
            "",
        ),
        ("receiver: {port: 9000}\nadmin: {port: 9000}", "admin.port", "receiver's port"),
        ("sinks: {}", "sinks", "no sink is enabled (there are: cloudwatch_logs, security_hub)"),
        ("{}", "aws.region", "AWS_REGION"),
    ],
)
def test_faults_of_the_whole(file: Path, text: str, where: str, words: str) -> None:
    assert words in faults_in(file, text)[where]


def test_two_free_ports_are_no_clash(file: Path) -> None:
    found = loaded(file, MINIMAL + "receiver: {port: 0}\nadmin: {port: 0}\n")
    assert found.receiver.port == found.admin.port == 0


@pytest.mark.parametrize("days", [0, 1, 90, 3653])
def test_retention_of_the_service(file: Path, days: int) -> None:
    text = MINIMAL.replace("log_group:", f"retention_days: {days}, log_group:")
    assert loaded(file, text).sinks.cloudwatch_logs.retention_days == days


# ---- schemas of other shapes, and the docs ----------------------------------------------------------


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    """A section with a key that has no default."""

    needed: Annotated[int, setting("Needed.", unit="bytes", ge=1)]
    choice: Literal["a", "b"] = "a"
    plain: str = "x"


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    """A schema of its own."""

    inner: Inner
    names: Annotated[dict[str, Annotated[int, setting("x", ge=0)]], setting("Names.")] = msgspec.field(
        default_factory=dict
    )
    ratio: Annotated[float, setting("Ratio.")] = 0.5


def test_a_key_without_default_is_required() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Outer, None, {})
    assert caught.value.faults == [Fault("inner.needed", "is required")]
    assert load(Outer, None, {"FORWARDER__INNER__NEEDED": "5"}).inner.needed == 5


def test_the_documentation_of_a_schema() -> None:
    leaves = {leaf.key: leaf for leaf in documented(Outer)}
    assert list(leaves) == ["inner.needed", "inner.choice", "inner.plain", "names", "ratio"]
    needed = leaves["inner.needed"]
    assert needed[1:] == ("FORWARDER__INNER__NEEDED", msgspec.NODEFAULT, "bytes", "Needed.", "integer")
    assert leaves["inner.choice"].type == "a \\| b"
    assert (leaves["inner.plain"].meaning, leaves["inner.plain"].unit) == ("", "")
    assert (leaves["names"].default, leaves["ratio"].type) == ({}, "number")
    assert "int" in leaves["names"].type


def test_every_setting_is_documented() -> None:
    leaves = list(documented(Settings))
    assert len({leaf.environment for leaf in leaves}) == len(leaves) > 30
    assert all(leaf.meaning.endswith((".", "`.")) and leaf.type for leaf in leaves)


# ---- properties -------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "port", "x", "enabled", "log_group"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(["cluster", "aws", "sinks", "receiver", "spool", "y"]), TREES, max_size=4
    ),
    st.dictionaries(
        st.sampled_from([leaf.environment for leaf in documented(Settings)] + ["FORWARDER__X"]),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
        max_size=3,
    ),
)
@settings(max_examples=150, deadline=None)
def test_whatever_is_written_there_settings_or_faults_come_out(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], environment: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(tree))
    faults: list[Fault] = []
    sinks: list[str] = []
    try:
        sinks = enabled_sinks(load_settings(path, environment))
    except ConfigError as error:
        faults = error.faults
    assert bool(faults) != bool(sinks)
    assert all(fault.what for fault in faults)


# ---- what a person writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["Warning", "WARNING", "warning"])
def test_choices_may_be_written_in_any_case(file: Path, word: str) -> None:
    found = loaded(
        file,
        "aws: {region: eu-west-1}\nlog: {level: INFO}\n"
        f"sinks: {{security_hub: {{enabled: true, minimum_priority: {word}}}}}",
    )
    assert (found.sinks.security_hub.minimum_priority, found.log.level) == ("warning", "info")


def test_a_fault_of_a_variable_names_the_variable() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(
            None,
            {
                "FORWARDER__RECEIVER__PORT": "99999",
                "FORWARDER__SINKS__SECURITY_HUB__ENABLED": "true",
                "AWS_REGION": "eu-west-1",
            },
        )
    (fault,) = (fault for fault in caught.value.faults if fault.where == "receiver.port")
    assert fault.what.endswith("(from FORWARDER__RECEIVER__PORT)")


def test_a_placeholder_nobody_fills_in_is_a_fault(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(
            file,
            "aws: {region: eu-west-1}\n"
            "sinks: {cloudwatch_logs: {enabled: true, log_group: /falco/x, log_stream: '{host}/{date}'}}",
        )
    assert [str(fault) for fault in caught.value.faults] == [
        "sinks.cloudwatch_logs.log_stream (line 2): {host} is not one of {replica}, {cluster}, {hostname}, {date}"
    ]


@pytest.mark.parametrize(
    ("value", "expected"), [("auto", "auto"), ("Auto", None), ("true", True), ("maybe", None)]
)
def test_a_switch_may_be_left_to_the_program(file: Path, value: str, expected: Any) -> None:
    text = (
        "aws: {region: eu-west-1}\nsinks: {security_hub: {enabled: true}}\n"
        f"enrichment: {{kubernetes: {{enabled: {value}}}}}"
    )
    if expected is not None:
        assert loaded(file, text).enrichment.kubernetes.enabled == expected
        return
    with pytest.raises(ConfigError) as caught:
        loaded(file, text)
    where = "enrichment.kubernetes.enabled (line 3)"
    assert str(caught.value) == f"{where}: '{value}' is not one of auto, true, false"
