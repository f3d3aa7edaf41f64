"""``telemetry {}``: what is measured and under which names. Nothing is pushed anywhere."""

from __future__ import annotations

import re

from sidecar.config.ineffective import IN_TELEMETRY
from sidecar.config.reader import Reader
from sidecar.config.values import TelemetrySettings

_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_NONE = "none"
PERIOD_S_MIN = 1.0
BUCKETS_MAX = 10_000


def read_telemetry(top: Reader) -> TelemetrySettings:
    """The stanza, or its defaults. Raises ConfigError."""
    stanza = top.block("telemetry", labels=0)
    usual = TelemetrySettings()
    if stanza is None:
        return usual
    reader = top.inner(stanza)
    settings = TelemetrySettings(
        prometheus_retention_s=reader.duration_s("prometheus_retention_time", usual.prometheus_retention_s),
        prefix=_prefix(reader, usual.prefix),
        filters=_filters(reader),
        filter_default=reader.boolean("filter_default", usual.filter_default),
        usage_period_s=_usage_period_s(reader, usual.usage_period_s),
        label_values_max=reader.integer("maximum_gauge_cardinality", usual.label_values_max),
        lease_bucket_s=reader.duration_s("lease_metrics_epsilon", usual.lease_bucket_s, minimum=1.0),
        lease_buckets=reader.integer("num_lease_metrics_buckets", usual.lease_buckets),
        lease_namespace_label=reader.boolean("add_lease_metrics_namespace_labels"),
    )
    if settings.lease_buckets > BUCKETS_MAX:
        raise reader.error("num_lease_metrics_buckets", f"must be at most {BUCKETS_MAX}")
    if not reader.boolean("disable_hostname", True):
        reader.warn(f'{reader.place("disable_hostname")}: "disable_hostname" in telemetry: names never hold a host')
    reader.no_effect(IN_TELEMETRY)
    reader.finish()
    return settings


def _prefix(reader: Reader, default: str) -> str:
    prefix = reader.text("metrics_prefix", default) or default
    if not _PREFIX.fullmatch(prefix):
        raise reader.error("metrics_prefix", "must be letters, digits, - . and _, and begin with a letter")
    return prefix


def _filters(reader: Reader) -> tuple[str, ...]:
    filters = reader.texts("prefix_filter")
    if any(len(rule) < 2 or rule[0] not in "+-" for rule in filters):
        raise reader.error("prefix_filter", 'must hold prefixes with + or - before them, as "-vault.expire"')
    return filters


def _usage_period_s(reader: Reader, default: float) -> float:
    """``none`` and 0 are never."""
    name = "usage_gauge_period"
    if reader.is_text(name, _NONE):
        return 0.0
    period_s = reader.duration_s(name, default)
    if 0 < period_s < PERIOD_S_MIN:
        raise reader.error(name, f"must be at least {PERIOD_S_MIN:g} seconds")
    return period_s
