"""What the ``sys/`` endpoints work with."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sidecar.api.node_view import NodeView
from sidecar.api.replication_api import ReplicationAPI
from sidecar.core.audit.options import LocalRules
from sidecar.core.audit.registry import AuditRegistry
from sidecar.core.cluster import ClusterInfo
from sidecar.core.leasing import Leasing
from sidecar.core.lockout_rules import LockoutSettings
from sidecar.core.policies import PolicyStore
from sidecar.core.store_view import SealedStore
from sidecar.core.tokens import TokenStore
from sidecar.core.usage import UsageSettings
from sidecar.core.wrapping import Wrapping
from sidecar.request.in_flight import InFlight
from sidecar.request.mount_view import MountView
from sidecar.request.pipeline import Pipeline
from sidecar.request.route_table import Handler, Params, Route

__all__ = ["Handler", "Params", "Route", "ServiceOptions", "SysCore"]


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Settings of the service. TTLs in seconds. ``sanitized_config`` is what ``sys/config/state/sanitized`` shows and
    must hold no secret. ``log_formatters``: how ``sys/monitor`` writes, by the name a client asks for."""

    api_addr: str = ""
    default_lease_ttl_s: int = 2_764_800
    max_lease_ttl_s: int = 2_764_800
    prometheus: bool = True
    sanitized_config: Mapping[str, Any] = field(default_factory=dict)
    audit: LocalRules = field(default_factory=LocalRules)
    log_formatters: Mapping[str, Callable[[], logging.Formatter]] = field(
        default_factory=lambda: {"standard": logging.Formatter, "json": logging.Formatter}
    )
    lockout: LockoutSettings = field(default_factory=LockoutSettings)
    usage: UsageSettings = field(default_factory=UsageSettings)


@dataclass(frozen=True, slots=True)
class SysCore:
    """The parts of one tenure. ``mounts_changed`` wakes the task that deletes what an unmount left. ``seal_lock`` is
    held by who changes the seal record, from reading it on."""

    sealed: SealedStore
    tokens: TokenStore
    leasing: Leasing
    policies: PolicyStore
    mounts: MountView
    wrapping: Wrapping
    pipeline: Pipeline
    node: NodeView
    replication: ReplicationAPI | None
    cluster: ClusterInfo
    options: ServiceOptions
    now: Callable[[], float]
    writable: Callable[[], bool]
    mounts_changed: Callable[[], None]
    audit: AuditRegistry
    random_bytes: Callable[[int], bytes] = os.urandom
    in_flight: InFlight = field(default_factory=InFlight)
    seal_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
