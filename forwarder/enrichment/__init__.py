"""The enrichers: name -> import path of the class. A new one is a file and a line here, as a sink is.

Order matters: what an earlier one says, a later one does not overwrite.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

ENRICHERS: dict[str, str] = {
    "kubernetes": "forwarder.enrichment.kubernetes:Kubernetes",
    "ec2": "forwarder.enrichment.ec2:Ec2",
    "ecs": "forwarder.enrichment.ecs:Ecs",
}


def enricher_class(name: str) -> Any:
    """The class of an enricher by its name."""
    module, _, attribute = ENRICHERS[name].partition(":")
    return getattr(import_module(module), attribute)
