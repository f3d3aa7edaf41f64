"""``sys/metrics`` (contract 4.10): the process's metrics as JSON or in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sidecar.api import json_codec
from sidecar.core.metrics import METRICS

JSON_AS_TEXT = "text/plain; charset=utf-8"
"""What clients of this endpoint know, although the body is JSON."""
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class MetricsAnswer:
    """One answer."""

    status: int
    content_type: str
    body: bytes


def metrics_answer(query: Mapping[str, object], *, prometheus: bool) -> MetricsAnswer:
    """In the form that ``format`` of ``query`` asks for; ``prometheus`` says whether that one is kept."""
    asked = query.get("format")
    if (asked[0] if isinstance(asked, list) and asked else asked) != "prometheus":
        return MetricsAnswer(200, JSON_AS_TEXT, json_codec.encode(METRICS.as_json()))
    if not prometheus:
        return MetricsAnswer(400, JSON_AS_TEXT, b"prometheus is not enabled")
    return MetricsAnswer(200, PROMETHEUS, METRICS.as_prometheus().encode())
