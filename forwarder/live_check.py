"""``falco-forwarder check --live``: tries what the configuration needs at AWS, and says what to do about it.

The files of the receiver's TLS and passwords are read. Each step makes the same calls the service will make: identity, group and stream, a harmless test event, and for
Security Hub a test finding marked as such (INFORMATIONAL, archived, one fixed Id), because nothing less proves the
permission.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from forwarder.alert import encode
from forwarder.aws import Aws, Client, role_of
from forwarder.contract import Blocked, DeliveryError, Permanent, Permission
from forwarder.live_check_step import Step
from forwarder.live_check_surroundings import surroundings
from forwarder.metrics import Metrics
from forwarder.receiver_files import ReceiverFiles, ReceiverFilesError
from forwarder.settings import Settings, enabled_sinks
from forwarder.timestamp import iso_milliseconds

TEST_STREAM = "falco-forwarder-check"


async def live_check(settings: Settings) -> list[Step]:
    """All steps for the enabled sinks; never raises for what AWS says."""
    aws = Aws(settings.aws)
    steps: list[Step] = [*await _receiver(settings), Step("region", ok=True, finding=aws.region)]
    sinks = [name for name in enabled_sinks(settings) if name in _CHECKS]
    try:
        await aws.open_clients([(_CHECKS[name][0], role_of(getattr(settings.sinks, name))) for name in sinks])
        identity = await _step(
            "credentials and account",
            aws.account,
            "give the pod a role (IRSA or Pod Identity), or set aws.account_id if STS cannot be reached",
        )
        steps.append(identity)
        for name in sinks:
            steps += await _CHECKS[name][1](settings, aws)
        steps += await surroundings(settings, aws)
    finally:
        await aws.close()
    return steps


def table(steps: list[Step]) -> str:
    """The steps for a person to read."""
    width = max(len(step.what) for step in steps)
    lines = []
    for step in steps:
        lines.append(f"{'ok   ' if step.ok else 'FAIL '} {step.what:<{width}}  {step.finding}")
        if not step.ok and step.advice:
            lines.append(f"      {'':<{width}}  -> {step.advice}")
    return "\n".join(lines)


async def _step(what: str, call: Callable[[], Awaitable[Any]], advice: str) -> Step:
    try:
        result = await call()
    except DeliveryError as error:
        if "ResourceAlreadyExistsException" in str(error):
            return Step(what, ok=True, finding="exists")
        return Step(what, ok=False, finding=f"{error.code}: {error}", advice=_advice(error, advice))
    return Step(what, ok=True, finding=result if isinstance(result, str) else "done")


def _advice(error: DeliveryError, advice: str) -> str:
    if error.code == "credentials":
        return "the credentials are missing, expired or wrong: check the role of the service account"
    if error.code in {"network", "timeout"}:
        return "the endpoint cannot be reached: check DNS, egress rules, VPC endpoints"
    if isinstance(error, Permission | Blocked | Permanent):
        return advice
    return "try again later"


async def _receiver(settings: Settings) -> list[Step]:
    """The files of TLS and passwords, where there are any: with a fault in them the service does not start."""
    own = settings.receiver
    if not (own.tls.cert_file or own.auth.credentials_file):
        return []
    files = ReceiverFiles(own, Metrics([]))
    try:
        await files.load()
    except ReceiverFilesError as error:
        return [Step("receiver: TLS and passwords", ok=False, finding=str(error))]
    found = []
    if files.tls is not None:
        found.append(f"certificate until {iso_milliseconds(int(files.tls.expires_at * 1e9))[:10]}")
    if files.credentials is not None:
        found.append(f"{len(files.credentials)} passwords")
    return [Step("receiver: TLS and passwords", ok=True, finding=", ".join(found))]


async def _cloudwatch_logs(settings: Settings, aws: Aws) -> list[Step]:
    own = settings.sinks.cloudwatch_logs
    client = aws.client("logs", role_of(own))
    group = own.log_group
    event = encode({"rule": "falco-forwarder check", "output": "test event of falco-forwarder check --live"})
    body = encode(
        {
            "logGroupName": group,
            "logStreamName": TEST_STREAM,
            "logEvents": [{"timestamp": int(time.time() * 1000), "message": event.decode()}],
        }
    )
    group_step = await _step(
        f"cloudwatch_logs: log group {group}",
        lambda: aws.call(client, "create_log_group", logGroupName=group),
        "allow logs:CreateLogGroup, or create the group yourself",
    )
    stream_step = await _step(
        f"cloudwatch_logs: log stream {TEST_STREAM}",
        lambda: aws.call(client, "create_log_stream", logGroupName=group, logStreamName=TEST_STREAM),
        "allow logs:CreateLogStream on the group",
    )
    event_step = await _step(
        "cloudwatch_logs: test event",
        lambda: aws.call(client, "put_log_events", body),
        "allow logs:PutLogEvents on the group",
    )
    if stream_step.ok and not group_step.ok:  # a stream was made in it
        group_step = group_step._replace(
            ok=True, finding="exists; making groups is not permitted, nor needed"
        )
    return [group_step, stream_step, event_step]


async def _security_hub(settings: Settings, aws: Aws) -> list[Step]:
    own = settings.sinks.security_hub
    client = aws.client("securityhub", role_of(own))
    enabled = await _step(
        "security_hub: hub enabled",
        lambda: aws.call(client, "describe_hub"),
        "enable Security Hub (CSPM) in this account and region, or allow securityhub:DescribeHub",
    )
    imported = await _step(
        "security_hub: test finding",
        lambda: _import_test_finding(settings, aws, client),
        "allow securityhub:BatchImportFindings on the default product",
    )
    return [enabled, imported]


async def _import_test_finding(settings: Settings, aws: Aws, client: Client) -> None:
    account = await aws.account(role_of(settings.sinks.security_hub))
    now = iso_milliseconds(time.time_ns())
    finding = {
        "SchemaVersion": "2018-10-08",
        "Id": f"falco/{aws.region}/{account}/{settings.cluster.name or '-'}/check",
        "ProductArn": f"arn:{aws.partition()}:securityhub:{aws.region}:{account}:product/{account}/default",
        "GeneratorId": "falco/falco-forwarder check",
        "AwsAccountId": account,
        "CreatedAt": now,
        "UpdatedAt": now,
        "Title": "Test finding of falco-forwarder check --live",
        "Description": "Shows that findings can be imported. Archived from the start; nothing to do.",
        "FindingProviderFields": {
            "Severity": {"Label": "INFORMATIONAL"},
            "Types": ["Unusual Behaviors/Application"],
        },
        "Resources": [{"Type": "Other", "Id": "falco-forwarder-check"}],
        "RecordState": "ARCHIVED",
    }
    answer = await aws.call(client, "batch_import_findings", encode({"Findings": [finding]}))
    for failed in answer.get("FailedFindings") or ():
        text = f"{failed.get('ErrorCode')}: {failed.get('ErrorMessage')}"
        raise Blocked(text) if failed.get("ErrorCode") == "InvalidAccess" else Permanent(text)


_Check = Callable[[Settings, Aws], Awaitable[list[Step]]]
_CHECKS: dict[str, tuple[str, _Check]] = {
    "cloudwatch_logs": ("logs", _cloudwatch_logs),
    "security_hub": ("securityhub", _security_hub),
}
