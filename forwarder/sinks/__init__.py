"""The sinks: name -> import path of the class, imported on first use.

A new sink is one file beside this one and one line here; see docs/sinks.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

SINKS = {
    "cloudwatch_logs": "forwarder.sinks.cloudwatch_logs:CloudWatchLogs",
    "security_hub": "forwarder.sinks.security_hub:SecurityHub",
}


def sink_class(name: str) -> Any:
    """The class of a sink. Its ``settings_type`` is the struct of the section ``sinks.<name>``."""
    module, _, attribute = SINKS[name].partition(":")
    return getattr(import_module(module), attribute)
