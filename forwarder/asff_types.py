"""Finding types from Falco's tags, in the taxonomy of Security Hub. Pure.

The taxonomy has five namespaces and no place for every MITRE tactic: reconnaissance goes to Discovery, exfiltration and
impact to Effects. A technique is the classifier where there is one tactic, so that it cannot be put under a wrong one.
Only about half of the rules Falco ships carry MITRE tags; the others get a type by their source.
"""

from __future__ import annotations

import re
from functools import lru_cache

from forwarder.asff_schema import TYPES_MAX

USUAL_TAGS_MAX, USUAL_CHARACTERS_MAX = 32, 1024
"""What rules really have; the tags of anything larger are not remembered."""

_TACTICS = {
    "mitre_initial_access": "TTPs/Initial Access",
    "mitre_execution": "TTPs/Execution",
    "mitre_persistence": "TTPs/Persistence",
    "mitre_privilege_escalation": "TTPs/Privilege Escalation",
    "mitre_defense_evasion": "TTPs/Defense Evasion",
    "mitre_credential_access": "TTPs/Credential Access",
    "mitre_discovery": "TTPs/Discovery",
    "mitre_reconnaissance": "TTPs/Discovery",
    "mitre_lateral_movement": "TTPs/Lateral Movement",
    "mitre_collection": "TTPs/Collection",
    "mitre_command_and_control": "TTPs/Command and Control",
    "mitre_exfiltration": "Effects/Data Exfiltration",
    "mitre_impact": "Effects/Resource Consumption",
    "mitre_data_destruction": "Effects/Data Destruction",
    "TA0043": "TTPs/Discovery",
    "TA0001": "TTPs/Initial Access",
    "TA0002": "TTPs/Execution",
    "TA0003": "TTPs/Persistence",
    "TA0004": "TTPs/Privilege Escalation",
    "TA0005": "TTPs/Defense Evasion",
    "TA0006": "TTPs/Credential Access",
    "TA0007": "TTPs/Discovery",
    "TA0008": "TTPs/Lateral Movement",
    "TA0009": "TTPs/Collection",
    "TA0011": "TTPs/Command and Control",
    "TA0010": "Effects/Data Exfiltration",
    "TA0040": "Effects/Resource Consumption",
}
_MITRE_ID = re.compile(r"(TA\d{4}|T\d{4}(?:\.\d{3})?)(?:-.*)?\Z", re.ASCII)
_BEHAVIOURS = {"k8s_audit": "User", "aws_cloudtrail": "User"}


def finding_types(tags: tuple[str, ...], source: str, in_container: bool) -> list[str]:
    """``Types`` of a finding: at least one, at most 50."""
    if len(tags) <= USUAL_TAGS_MAX and len(source) + sum(map(len, tags)) <= USUAL_CHARACTERS_MAX:
        return _remembered(tags, source, in_container)
    return _types(tags, source, in_container)


def _types(tags: tuple[str, ...], source: str, in_container: bool) -> list[str]:
    tactics: dict[str, None] = {}
    techniques: dict[str, None] = {}
    for tag in tags:
        match = _MITRE_ID.match(tag)
        identity = match.group(1) if match else tag
        if identity in _TACTICS:
            tactics[_TACTICS[identity]] = None
        elif match:
            techniques[identity] = None
    if len(tactics) == 1 and techniques:
        (tactic,) = tactics
        return [f"{tactic}/{technique}" for technique in techniques][:TYPES_MAX]
    if tactics:
        return list(tactics)[:TYPES_MAX]
    if source.startswith("syscall"):
        return ["Unusual Behaviors/Container" if in_container else "Unusual Behaviors/Process"]
    return [f"Unusual Behaviors/{_BEHAVIOURS.get(source, 'Application')}"]


_remembered = lru_cache(maxsize=2048)(_types)
