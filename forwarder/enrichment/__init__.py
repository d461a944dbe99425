"""The enrichers: name -> import path of the class, like the sinks. None yet.

An enricher answers from memory what it knows of an alert's surroundings (``ingest.Enricher``); its keys are spooled with the
alert and land at the root of the CloudWatch event.
"""

from __future__ import annotations

ENRICHERS: dict[str, str] = {}
