"""The Security Hub part of the fake: import and read findings, switch the hub on and off.

Rules from the Security Hub API reference and the ASFF chapters of the user guide. A bad finding is
reported in `FailedFindings` with HTTP 200; a call with 0 or more than 100 findings, more than 6 MB, or a
finding of another account fails as a whole. Sizes are read as decimal kilobytes, the smaller reading.
Findings are matched on `Id`, and an update whose `UpdatedAt` is not newer is silently ignored.
"""

from __future__ import annotations

import copy
import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from tests.fakes.aws_asff import FORMAT_ERROR, finding_faults
from tests.fakes.aws_asff_checks import parse_timestamp
from tests.fakes.aws_common import AwsError, Caller

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_FINDINGS = 100
MAX_FINDING_BYTES = 240_000
MAX_CALL_BYTES = 6_000_000
# Steady requests per second and burst.
RATES: dict[str, tuple[float, float]] = {"GetFindings": (3, 6)}
OTHER_RATE = (10.0, 30.0)
# Only the initial content counts; later ones belong to the customers of the hub.
FROZEN = ("Note", "UserDefinedFields", "VerificationState", "Workflow", "WorkflowState")
NORMALIZED = {"INFORMATIONAL": 0, "LOW": 1, "MEDIUM": 40, "HIGH": 70, "CRITICAL": 90}
_FILTERS = (
    "Id",
    "AwsAccountId",
    "GeneratorId",
    "ProductArn",
    "ProductName",
    "RecordState",
    "Region",
    "Title",
)


class SecurityHub:
    """State and operations of one account's hub in one Region."""

    def __init__(
        self,
        *,
        region: str,
        partition: str,
        clock: Callable[[], float],
        enabled: bool,
        on_finding: Callable[[dict[str, Any]], None],
        on_rejected: Callable[[str], None],
    ) -> None:
        self._region = region
        self._partition = partition
        self._clock = clock
        self._on_finding = on_finding
        self._on_rejected = on_rejected
        self.enabled = enabled
        self.disabled_shape: Literal["call", "finding"] = "call"
        self.findings: dict[str, dict[str, Any]] = {}
        self.writes = 0
        self.ignored = 0
        # Told of an update that came too late or twice.
        self.on_ignored: Callable[[dict[str, Any]], None] = lambda _: None
        # Gives (code, message) for a finding that a test wants to see failed.
        self.injected: Callable[[dict[str, Any]], tuple[str, str] | None] = lambda _: None
        self.operations: dict[str, Callable[[dict[str, Any], Caller, int], dict[str, Any]]] = {
            "BatchImportFindings": self.batch_import_findings,
            "GetFindings": self.get_findings,
            "DescribeHub": self.describe_hub,
            "EnableSecurityHub": self.enable_security_hub,
            "DisableSecurityHub": self.disable_security_hub,
            "ListEnabledProductsForImport": self.list_enabled_products_for_import,
        }

    def _need_hub(self, caller: Caller) -> None:
        if not self.enabled:
            raise AwsError("InvalidAccessException", self._disabled_text(caller), 401)

    def _disabled_text(self, caller: Caller) -> str:
        return f"Account {caller.account} is not subscribed to AWS Security Hub"

    def batch_import_findings(self, body: dict[str, Any], caller: Caller, size: int) -> dict[str, Any]:
        findings = body.get("Findings")
        if unknown := sorted(set(body) - {"Findings"}):
            raise _invalid_input(f"data should NOT have additional properties: {unknown}")
        if not isinstance(findings, list):
            raise _invalid_input("Invalid parameter 'Findings'. data.Findings should be array")
        if not findings:
            raise _invalid_input(
                "Invalid parameter 'Findings'. data.Findings should NOT have fewer than 1 items"
            )
        if len(findings) > MAX_FINDINGS:
            raise _invalid_input(
                f"Invalid parameter 'Findings'. data.Findings should NOT have more than {MAX_FINDINGS} items"
            )
        if size > MAX_CALL_BYTES:
            raise _invalid_input(f"Request of {size} bytes is larger than 6 MB")
        for finding in findings:
            self._check_account(finding, caller)
        if self.disabled_shape == "call":
            self._need_hub(caller)

        failed: list[dict[str, str]] = []
        seen: set[str] = set()
        for finding in findings:
            problem = self._problem(finding, caller, seen, check_size=size > MAX_FINDING_BYTES)
            if problem is None:
                self._upsert(finding)
                continue
            given = finding.get("Id") if isinstance(finding, dict) else None
            finding_id = given if isinstance(given, str) else ""
            failed.append({"Id": finding_id, "ErrorCode": problem[0], "ErrorMessage": problem[1]})
        return {
            "SuccessCount": len(findings) - len(failed),
            "FailedCount": len(failed),
            "FailedFindings": failed,
        }

    def _check_account(self, finding: Any, caller: Caller) -> None:
        """One finding for a foreign account is enough to have the whole call refused."""
        if not isinstance(finding, dict):
            return
        account, arn = finding.get("AwsAccountId"), finding.get("ProductArn")
        product = re.fullmatch(r"arn:[^:]*:securityhub:[^:]*:(\d{12}):product/(\d{12})/[^/]*", str(arn))
        owners = {account, *product.groups()} if product else {account}
        foreign = [
            o for o in owners if isinstance(o, str) and re.fullmatch(r"\d{12}", o) and o != caller.account
        ]
        if foreign:
            raise AwsError(
                "AccessDeniedException",
                f"User: {caller.arn} is not authorized to perform: securityhub:BatchImportFindings on "
                f"resource: arn:{self._partition}:securityhub:{self._region}:{foreign[0]}"
                f":product/{foreign[0]}/default",
                403,
            )

    def _problem(
        self, finding: Any, caller: Caller, seen: set[str], *, check_size: bool
    ) -> tuple[str, str] | None:
        if isinstance(finding, dict) and (injected := self.injected(finding)) is not None:
            return injected
        if not self.enabled:
            return "InvalidAccess", self._disabled_text(caller)
        problem = self._mistake(finding, caller, seen, check_size=check_size)
        if problem is not None:
            name = finding.get("Id") if isinstance(finding, dict) else None
            self._on_rejected(f"finding {name}: {problem[0]}: {problem[1]}")
        return problem

    def _mistake(
        self, finding: Any, caller: Caller, seen: set[str], *, check_size: bool
    ) -> tuple[str, str] | None:
        if check_size:
            size = len(
                json.dumps(finding, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
            )
            if size > MAX_FINDING_BYTES:
                return "FindingSizeExceeded", f"Finding of {size} bytes is larger than 240 KB"
        faults = finding_faults(finding)
        own = f"arn:{self._partition}:securityhub:{self._region}:{caller.account}:product/{caller.account}/default"
        if isinstance(finding, dict):
            arn = finding.get("ProductArn")
            partner = f"arn:{self._partition}:securityhub:{self._region}::product/"
            if not faults and isinstance(arn, str) and arn.startswith(partner):
                return "InvalidAccess", f"Account {caller.account} has not enabled the product {arn}"
            if isinstance(arn, str) and arn != own:
                faults.append(f"data.ProductArn should be equal to constant {own}")
        if faults:
            return "InvalidInput", f"{FORMAT_ERROR} {', '.join(faults)}"
        if finding["Id"] in seen:
            return "DuplicatedFindingIdentifier", f"The call has more than one finding {finding['Id']}"
        seen.add(finding["Id"])
        return None

    def _upsert(self, finding: dict[str, Any]) -> None:
        stored = self.findings.get(finding["Id"])
        if stored is not None:
            old, new = parse_timestamp(stored["UpdatedAt"]), parse_timestamp(finding["UpdatedAt"])
            assert old is not None
            assert new is not None
            if new <= old:
                self.ignored += 1
                self.on_ignored(finding)
                return
        fresh = copy.deepcopy(finding)
        if stored is None:
            workflow = fresh.setdefault("Workflow", {})
            workflow.setdefault("Status", "NEW")
            fresh["WorkflowState"] = "NEW"
        else:
            for name in FROZEN:
                fresh.pop(name, None)
                if name in stored:
                    fresh[name] = stored[name]
        fresh.setdefault("RecordState", "ACTIVE")
        reopened = (
            stored is not None and stored["RecordState"] == "ARCHIVED" and fresh["RecordState"] == "ACTIVE"
        )
        if reopened and fresh["Workflow"]["Status"] in ("NOTIFIED", "RESOLVED"):
            fresh["Workflow"] = {"Status": "NEW"}
        self._spread_provider_fields(fresh)
        fresh.setdefault("ProductName", "Default")
        fresh.setdefault("CompanyName", "Personal")
        fresh["Region"] = self._region
        now = datetime.fromtimestamp(self._clock(), UTC)
        fresh["ProcessedAt"] = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.findings[fresh["Id"]] = fresh
        self.writes += 1
        self._on_finding(fresh)

    @staticmethod
    def _spread_provider_fields(finding: dict[str, Any]) -> None:
        """What the provider says and what the hub shows start out the same."""
        provider = finding.setdefault("FindingProviderFields", {})
        for name in ("Severity", "Types", "Confidence", "Criticality", "RelatedFindings"):
            if name in provider:
                finding[name] = copy.deepcopy(provider[name])
            elif name in finding:
                provider[name] = copy.deepcopy(finding[name])
        severity = finding["Severity"]
        if "Label" in severity:
            severity.setdefault("Normalized", NORMALIZED[severity["Label"]])
        else:
            level = severity["Normalized"]
            severity["Label"] = next(label for label, n in reversed(NORMALIZED.items()) if level >= n)
        kept = {"Label", "Original"}
        provider["Severity"] = {n: v for n, v in provider["Severity"].items() if n in kept}
        provider["Severity"].setdefault("Label", severity["Label"])

    def get_findings(self, body: dict[str, Any], caller: Caller, size: int) -> dict[str, Any]:
        self._need_hub(caller)
        if unknown := sorted(set(body) - {"Filters", "SortCriteria", "NextToken", "MaxResults"}):
            raise _invalid_input(f"data should NOT have additional properties: {unknown}")
        limit, token = body.get("MaxResults", 100), body.get("NextToken", "")
        if type(limit) is not int or not 1 <= limit <= 100:
            raise _invalid_input("Invalid parameter 'MaxResults'. data.MaxResults should be >= 1 and <= 100")
        if not isinstance(token, str) or not re.fullmatch(r"\d*", token):
            raise _invalid_input("Invalid parameter 'NextToken'.")
        found = [f for f in self.findings.values() if _wanted(f, body.get("Filters") or {})]
        for criterion in reversed(body.get("SortCriteria") or []):
            field_name, order = criterion.get("Field", ""), criterion.get("SortOrder", "asc")
            found.sort(key=lambda f, n=field_name: str(f.get(n, "")), reverse=order == "desc")  # type: ignore[misc]
        first = int(token or 0)
        answer: dict[str, Any] = {"Findings": found[first : first + limit]}
        if first + limit < len(found):
            answer["NextToken"] = str(first + limit)
        return answer

    def describe_hub(self, body: dict[str, Any], caller: Caller, size: int) -> dict[str, Any]:
        self._need_hub(caller)
        return {
            "HubArn": f"arn:{self._partition}:securityhub:{self._region}:{caller.account}:hub/default",
            "SubscribedAt": "2024-01-01T00:00:00.000Z",
            "AutoEnableControls": True,
            "ControlFindingGenerator": "SECURITY_CONTROL",
        }

    def enable_security_hub(self, body: dict[str, Any], caller: Caller, size: int) -> dict[str, Any]:
        if self.enabled:
            raise AwsError("ResourceConflictException", "Account is already subscribed to Security Hub", 409)
        self.enabled = True
        return {}

    def disable_security_hub(self, body: dict[str, Any], caller: Caller, size: int) -> dict[str, Any]:
        self._need_hub(caller)
        self.enabled = False
        return {}

    def list_enabled_products_for_import(
        self, body: dict[str, Any], caller: Caller, size: int
    ) -> dict[str, Any]:
        self._need_hub(caller)
        return {"ProductSubscriptions": []}


def _invalid_input(text: str) -> AwsError:
    return AwsError("InvalidInputException", text)


def _wanted(finding: dict[str, Any], filters: dict[str, Any]) -> bool:
    """Whether a finding passes the string filters: values of one attribute are alternatives."""
    for name, alternatives in filters.items():
        if name not in _FILTERS:
            raise _invalid_input(f"The fake does not play the filter {name}")
        text = str(finding.get(name, ""))
        if not any(_compare(text, a.get("Comparison", "EQUALS"), a.get("Value", "")) for a in alternatives):
            return False
    return True


def _compare(text: str, comparison: str, value: str) -> bool:
    results = {
        "EQUALS": text == value,
        "NOT_EQUALS": text != value,
        "PREFIX": text.startswith(value),
        "PREFIX_NOT_EQUALS": not text.startswith(value),
        "CONTAINS": value in text,
        "NOT_CONTAINS": value not in text,
    }
    if comparison not in results:
        raise _invalid_input("data.Comparison should be equal to one of the allowed values")
    return results[comparison]
