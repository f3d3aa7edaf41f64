"""One node: its seal, the role it plays now, and where a request goes because of both.

The role is a value put here by ``roles.py`` for as long as its scope runs; nothing else changes it.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from consul_backend.election import LeaderInfo
from plugin_api.errors import PluginError
from sidecar.api.node_view import (
    InitOptions,
    InitOutcome,
    LeaderStatus,
    Member,
    NodeHealth,
    NotForwarded,
    SealStatus,
)
from sidecar.core.cluster import ClusterInfo
from sidecar.core.metrics import METRICS
from sidecar.core.node_settings import Cors
from sidecar.core.seals import Sealer
from sidecar.forwarding import PEER_TTL_S, Heard, StandbyForwarder
from sidecar.gauges import role_gauges
from sidecar.request.types import HttpRequest, HttpResponse
from sidecar.sealing import Sealing
from sidecar.token_rights import TokenRights
from sidecar.transport.forwarding import EchoReply
from sidecar.version import API_VERSION


class Handler(Protocol):
    """The active node's service."""

    @property
    def cors(self) -> Cors:
        """Which pages of other origins may call."""

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer one request."""


class RoleView(Protocol):
    """What the active role reports of its store and replication."""

    def head_index(self) -> int:
        """The newest WAL index."""

    def modes(self) -> tuple[str, str]:
        """Performance and DR mode, as in sys/health."""

    def gauges(self) -> Mapping[str, float]:
        """Values of this moment, by the names of the telemetry."""

    def totals(self) -> Mapping[str, float]:
        """What only grows during the tenure, likewise."""

    def canary_age_ms(self) -> int:
        """How long ago this cluster had everything of its primary; 0 where it has none, or has not heard of it."""

    def audit_blocked(self) -> bool:
        """Whether requests fail because no audit device works."""

    def stopped_reason(self) -> str:
        """Why nothing is served until an operator decides; or empty."""

    def reopen_audit(self) -> None:
        """Open the audit devices' files and connections again."""


@dataclass(eq=False, slots=True)
class ActiveRole:
    """This node runs requests. ``admitting`` turns False on the way down; :meth:`drain` waits for what still runs."""

    service: Handler
    view: RoleView
    cluster: ClusterInfo
    since_s: float
    standbys: Callable[[], Sequence[Heard]] = tuple
    admitting: bool = True
    in_flight: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, request: HttpRequest) -> HttpResponse:
        """Answer ``request``. Raises NotForwarded on the way down: it is for the next active node."""
        if not self.admitting:
            raise NotForwarded("this node is handing over: the request was not run")
        self.in_flight += 1
        self._idle.clear()
        try:
            return await self.service.handle(request)
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Stop admitting and wait for running requests, but not longer than ``timeout_s``."""
        self.admitting = False
        if self.in_flight:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
            except TimeoutError:
                return


@dataclass(eq=False, slots=True)
class StandbyRole:
    """This node forwards requests to ``leader``, once there is one and its credentials could be read."""

    leader: LeaderInfo | None = None
    forwarder: StandbyForwarder | None = None
    modes: tuple[str, str] = ("unknown", "unknown")
    cluster: ClusterInfo | None = None
    ready: bool = False
    since_s: float = field(default_factory=time.monotonic)
    heard_s: float | None = None
    echo_s: float = 0.0
    skew_ms: int = 0
    canary_age_ms: int = 0
    cors: Cors = field(default_factory=Cors)

    def heard(self, reply: EchoReply, took_s: float) -> None:
        """The active node has answered a heartbeat, which took ``took_s``."""
        self.heard_s, self.echo_s = time.monotonic(), took_s
        # By the middle of the heartbeat: how far this node's clock is ahead of the active's.
        self.skew_ms = int((time.time() - took_s / 2) * 1000) - reply.clock_ms if reply.clock_ms else 0
        self.canary_age_ms = reply.canary_age_ms
        self.cors = Cors(bool(reply.cors_origins), reply.cors_origins, reply.cors_headers)

    @property
    def silent_s(self) -> float:
        """For how long the active node has not been heard of."""
        return time.monotonic() - (self.since_s if self.heard_s is None else self.heard_s)


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """How this process is known: a UUID per start, and the addresses others reach it at."""

    node_id: str
    api_addr: str
    cluster_addr: str
    hostname: str = field(default_factory=socket.gethostname)


class Node:
    """Implements :class:`sidecar.api.node_view.NodeView`. ``leader_wait_s`` bounds how long a request is held while the
    cluster has no active node; only requests that certainly reached no handler are held."""

    version = API_VERSION

    def __init__(
        self,
        identity: NodeIdentity,
        sealing: Sealing,
        *,
        storage_type: str,
        ha_enabled: bool,
        leader_wait_s: float = 5.0,
    ) -> None:
        self.identity = identity
        self.sealing = sealing
        self.storage_type = storage_type
        self._ha_enabled = ha_enabled
        self._leader_wait_s = leader_wait_s
        self.rights = TokenRights()
        self._role: ActiveRole | StandbyRole | None = None
        self._role_changed = asyncio.Event()
        self.step_down_asked = asyncio.Event()

    @property
    def role(self) -> ActiveRole | StandbyRole | None:
        """The role of this moment; None while sealed or between roles."""
        return self._role

    def take_role(self, role: ActiveRole | StandbyRole | None) -> None:
        """Called by the role loop alone, also to announce that something inside the role changed."""
        self._role = role
        changed, self._role_changed = self._role_changed, asyncio.Event()
        changed.set()

    def reopen_audit(self) -> None:
        """For SIGHUP; only the active node has audit devices at work."""
        if isinstance(self._role, ActiveRole):
            self._role.view.reopen_audit()

    def is_active(self) -> bool:
        return isinstance(self._role, ActiveRole)

    def is_sealed(self) -> bool:
        return self.sealing.opened is None

    def cors(self) -> Cors:
        role = self._role
        if isinstance(role, ActiveRole):
            return role.service.cors
        return role.cors if role is not None else Cors()

    async def health(self) -> NodeHealth:
        role = self._role
        if self.sealing.opened is None:
            status = await self.sealing.status()
            reason = self.sealing.reason
            return NodeHealth(initialized=status.initialized, sealed=True, standby=True, sealed_reason=reason)
        if isinstance(role, ActiveRole):
            performance, disaster = role.view.modes()
            return NodeHealth(
                initialized=True,
                sealed=False,
                standby=False,
                performance_mode=performance,
                dr_mode=disaster,
                cluster_name=role.cluster.cluster_name,
                cluster_id=role.cluster.cluster_id,
                last_wal=role.view.head_index(),
                audit_blocked=role.view.audit_blocked(),
                canary_age_ms=role.view.canary_age_ms(),
                stopped_reason=role.view.stopped_reason(),
            )
        performance, disaster = role.modes if role else ("unknown", "unknown")
        cluster = role.cluster if role else None
        heard = role is not None and role.heard_s is not None
        return NodeHealth(
            ha_healthy=role is None or role.silent_s < PEER_TTL_S,
            heartbeat_age_ms=int(role.silent_s * 1000) if role and heard else None,
            echo_ms=int(role.echo_s * 1000) if role else 0,
            clock_skew_ms=role.skew_ms if role else 0,
            canary_age_ms=role.canary_age_ms if role else 0,
            initialized=True,
            sealed=False,
            standby=True,
            stopped_reason=self.rights.trouble,
            performance_mode=performance,
            dr_mode=disaster,
            cluster_name=cluster.cluster_name if cluster else "",
            cluster_id=cluster.cluster_id if cluster else "",
        )

    async def seal_status(self) -> SealStatus:
        status = await self.sealing.status()
        cluster = self._role.cluster if self._role else None
        if status.sealed or cluster is None:
            return status
        return replace(status, cluster_name=cluster.cluster_name, cluster_id=cluster.cluster_id)

    async def leader(self) -> LeaderStatus:
        if not self._ha_enabled:
            return LeaderStatus(ha_enabled=False, is_self=False)
        role = self._role
        if isinstance(role, ActiveRole):
            return LeaderStatus(
                ha_enabled=True,
                is_self=True,
                active_since_s=role.since_s,
                leader_address=self.identity.api_addr,
                leader_cluster_address=self.identity.cluster_addr,
                last_wal=role.view.head_index(),
            )
        leader = role.leader if role else None
        if leader is None:
            return LeaderStatus(ha_enabled=True, is_self=False)
        return LeaderStatus(
            ha_enabled=True, is_self=False, leader_address=leader.api_addr, leader_cluster_address=leader.cluster_addr
        )

    def gauges(self) -> dict[str, float]:
        """Values of this moment, by the names of the telemetry."""
        role = self._role
        performance, disaster = ("unknown", "unknown")
        if isinstance(role, ActiveRole):
            performance, disaster = role.view.modes()
        elif role is not None:
            performance, disaster = role.modes
        own = role_gauges(
            unsealed=self.sealing.opened is not None,
            active=isinstance(role, ActiveRole),
            performance_mode=performance,
            dr_mode=disaster,
        )
        return own | dict(role.view.gauges() if isinstance(role, ActiveRole) else {})

    def totals(self) -> Mapping[str, float]:
        """What only grows during a tenure, likewise."""
        return self._role.view.totals() if isinstance(self._role, ActiveRole) else {}

    async def members(self) -> list[Member]:
        own = self.identity
        role = self._role
        heard: Sequence[Heard] = ()
        age_ms = 0
        if isinstance(role, ActiveRole):
            heard, age_ms = role.standbys(), role.view.canary_age_ms()
        active = Member(own.hostname, own.api_addr, own.cluster_addr, True, self.version, canary_age_ms=age_ms)
        members = [active]
        for one in sorted(heard, key=lambda one: one.echo.api_addr):
            echo = one.echo
            members.append(
                Member(
                    echo.hostname,
                    echo.api_addr,
                    echo.cluster_addr,
                    active=False,
                    version=echo.version,
                    last_echo_s=one.unix_s,
                    echo_ms=echo.echo_ms,
                    clock_skew_ms=one.skew_ms,
                    canary_age_ms=age_ms,
                )
            )
        return members

    async def init(self, options: InitOptions) -> InitOutcome:
        return await self.sealing.init(options)

    @property
    def seal_kind(self) -> str:
        return self.sealing.kind

    async def sealer(self) -> Sealer | None:
        return await self.sealing.sealer()

    async def unseal(self, key: bytes, *, migrate: bool) -> SealStatus:
        with METRICS.timer("core.unseal"):
            await self.sealing.unseal(key, migrate=migrate)
        if not self._ha_enabled:
            await self._until_active()
        return await self.seal_status()

    async def _until_active(self) -> None:
        """A store of one node has nobody to be elected against: who has unsealed it uses it with the next request, so
        the answer waits until it serves, but no longer than a request is held."""
        deadline = time.monotonic() + self._leader_wait_s
        while self.sealing.opened is not None and not self.is_active():
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._role_changed.wait()
            except TimeoutError:
                return

    async def reset_unseal(self) -> SealStatus:
        await self.sealing.reset()
        return await self.seal_status()

    async def seal(self) -> None:
        with METRICS.timer("core.seal"):
            self.sealing.seal()

    async def step_down(self) -> None:
        if self._ha_enabled and self.is_active():
            with METRICS.timer("core.step_down"):
                self.step_down_asked.set()

    async def dispatch(self, request: HttpRequest) -> HttpResponse:
        deadline = time.monotonic() + self._leader_wait_s
        refused: NotForwarded | None = None
        while True:
            changed, role = self._role_changed, self._role
            if isinstance(role, ActiveRole) and role.admitting:
                return await role.run(request)
            if isinstance(role, StandbyRole) and role.forwarder is not None:
                if request.trail:
                    raise PluginError("this node is not active: a forwarded request is not forwarded again")
                try:
                    return await role.forwarder.forward(request)
                except NotForwarded as error:
                    refused = error
            try:
                # Held, not refused: nothing has run yet, and the next active node is seconds away.
                async with asyncio.timeout(deadline - time.monotonic()):
                    await changed.wait()
            except TimeoutError:
                raise refused or NotForwarded("no active node is known") from None
