"""Paths that concern one cluster only. An honest secondary runs these itself; another one must not run them here.
Pure."""

from __future__ import annotations

_OWN_CLUSTER = (
    "auth/token/",
    "cubbyhole/",
    "sys/generate-root/",
    "sys/host-info",
    "sys/in-flight-req",
    "sys/leases",
    "sys/locked-users",
    "sys/loggers",
    "sys/metrics",
    "sys/monitor",
    "sys/pprof",
    "sys/rekey",
    "sys/renew",
    "sys/replication/",
    "sys/revoke",
    "sys/rotate",
    "sys/seal",
    "sys/step-down",
    "sys/wrapping/",
)
_ROLES_OF_ALL = "auth/token/roles/"


def is_own_clusters(path: str) -> bool:
    """Whether ``path`` is one of them."""
    return path.startswith(_OWN_CLUSTER) and not path.startswith(_ROLES_OF_ALL)
