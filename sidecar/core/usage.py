"""Usage gauges: how what was counted is sorted into labels. Pure.

Names, labels and bounds are those of Vault's telemetry: of the values of one label only the most frequent are shown,
and leases are sorted into buckets of time by rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sidecar.core.metrics import Labelled
from sidecar.core.token_entry import CreateToken

NAMESPACE = "root"
"""There is one."""
_TTLS = (
    (60, "1m"),
    (600, "10m"),
    (1200, "20m"),
    (3600, "1h"),
    (7200, "2h"),
    (86400, "1d"),
    (172800, "2d"),
    (604800, "7d"),
    (2592000, "30d"),
)
_ENDLESS = "+Inf"


@dataclass(frozen=True, slots=True)
class UsageSettings:
    """``period_s``: how often is counted, 0 for never. ``label_values_max``: of one label of one gauge.
    ``bucket_s`` and ``buckets``: the counts of leases by when they expire; ``lease_namespace``: with a label for it."""

    period_s: float = 600.0
    label_values_max: int = 500
    bucket_s: float = 3600.0
    buckets: int = 168
    lease_namespace: bool = False


@dataclass(frozen=True, slots=True)
class TokenShape:
    """What one token is counted by; it stays as it is for the token's life."""

    policies: tuple[str, ...]
    method: str
    ttl: str


def ttl_label(ttl_s: int) -> str:
    """The least of Vault's steps that a creation TTL does not exceed; 0 is without end."""
    return next((name for limit_s, name in _TTLS if 0 < ttl_s <= limit_s), _ENDLESS)


def creation_labels(spec: CreateToken, ttl_s: int) -> dict[str, str]:
    """What ``token.creation`` is counted by."""
    return {
        "auth_method": spec.method,
        "creation_ttl": ttl_label(ttl_s),
        "mount_point": spec.mount,
        "namespace": NAMESPACE,
        "token_type": spec.type,
    }


def token_gauges(shapes: Mapping[TokenShape, int], cluster: str, values_max: int) -> dict[str, float]:
    """``token.count`` and what it is made of, from how many tokens have each shape. A token counts once for each of its
    policies."""
    total = 0
    policies: Counter[str] = Counter()
    methods: Counter[str] = Counter()
    ttls: Counter[str] = Counter()
    for shape, count in shapes.items():
        total += count
        for policy in shape.policies:
            policies[policy] += count
        methods[shape.method] += count
        ttls[shape.ttl] += count
    own = {"cluster": cluster, "namespace": NAMESPACE}
    found = token_total(total, cluster)
    for name, label, counts in (
        ("token.count.by_policy", "policy", policies),
        ("token.count.by_auth", "auth_method", methods),
        ("token.count.by_ttl", "creation_ttl", ttls),
    ):
        for value, count in _greatest(counts, values_max):
            found[Labelled(name, **own, **{label: value})] = float(count)
    return found


def token_total(count: int, cluster: str) -> dict[str, float]:
    """``token.count`` alone."""
    return {Labelled("token.count", cluster=cluster, namespace=NAMESPACE): float(count)}


def kv_gauges(secrets: Mapping[str, int], cluster: str, values_max: int) -> dict[str, float]:
    """``secret.kv.count`` by mount."""
    return {
        Labelled("secret.kv.count", cluster=cluster, namespace=NAMESPACE, mount_point=mount): float(count)
        for mount, count in _greatest(secrets, values_max)
    }


def lease_gauges(minutes: Mapping[int, int], now_s: float, settings: UsageSettings) -> dict[str, float]:
    """``expire.leases.by_expiration``: ``minutes`` are the leases by the minute (since 1970) that they expire in."""
    buckets: Counter[int] = Counter()
    for minute, count in minutes.items():
        number = round((minute * 60 + 30 - now_s) / settings.bucket_s)
        if 0 <= number < settings.buckets:
            buckets[number] += count
    namespace = {"namespace": NAMESPACE} if settings.lease_namespace else {}
    start_s = now_s - now_s % settings.bucket_s
    return {
        Labelled(
            "expire.leases.by_expiration", expiring=_moment(start_s + number * settings.bucket_s), **namespace
        ): float(count)
        for number, count in sorted(buckets.items())
    }


def _greatest(counts: Mapping[str, int], most: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def _moment(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S} +0000 UTC"
