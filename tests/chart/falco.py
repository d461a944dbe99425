"""Falco's side: the values in helm/falco-values*.yaml, put together as Helm does."""

from __future__ import annotations

from typing import Any

import yaml

from tests.chart.rendering import ROOT, Object

VARIANTS = {
    "plain": [""],
    "tls": ["", "-tls"],
    "mtls": ["", "-tls", "-mtls"],
    "basic": ["", "-tls", "-basic"],
    "mtls and basic": ["", "-tls", "-mtls", "-basic"],
    "k8saudit": ["", "-k8saudit"],
    "k8saudit and tls": ["", "-tls", "-k8saudit"],
}
"""Files in the order they are given with -f, without what all names begin with."""


def values(variant: str) -> Object:
    merged: Object = {}
    for ending in VARIANTS[variant]:
        merged = _over(merged, yaml.safe_load((ROOT / f"helm/falco-values{ending}.yaml").read_text()))
    return merged


def configuration(variant: str) -> Object:
    """What Falco's chart writes into falco.yaml of it: `falco:` word for word, and `metrics:`."""
    given = values(variant)
    metrics = given["metrics"]
    made = {
        "enabled": metrics["enabled"],
        "interval": metrics["interval"],
        "output_rule": metrics["outputRule"],
    }
    return {**given["falco"], "metrics": made}


def _over(below: Any, above: Any) -> Any:
    """Objects key by key; lists and all else as a whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}
