"""What the API needs of the node it runs on, whatever the node's role. Implemented by ``sidecar/node.py``.

Everything answers from memory or with one bounded store read; nothing here waits for another node except
:meth:`NodeView.dispatch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from sidecar.core.node_settings import Cors
from sidecar.core.seals import Sealer
from sidecar.request.types import HttpRequest, HttpResponse


@dataclass(frozen=True, slots=True)
class SealStatus:
    """``sys/seal-status`` (contract 4.3). ``n``, ``t`` are 0 when uninitialised, and those of the recovery shares with
    an auto seal (``recovery_seal``); ``migration``: the configured seal is to replace the cluster's. Names are empty
    while sealed. ``shares_issued_s``: when the key shares in force were made, in unix seconds, 0 where that is not
    known; a secondary's are its primary's, and were made when those were."""

    initialized: bool
    sealed: bool
    t: int = 0
    n: int = 0
    progress: int = 0
    nonce: str = ""
    type: str = "shamir"
    recovery_seal: bool = False
    migration: bool = False
    cluster_name: str = ""
    cluster_id: str = ""
    warnings: tuple[str, ...] = ()
    shares_issued_s: int = 0


@dataclass(frozen=True, slots=True)
class NodeHealth:
    """``sys/health`` (contract 4.1). Modes: disabled, primary, secondary, bootstrapping, unknown. Uninitialised and
    sealed nodes report ``standby`` True. ``last_wal`` is 0 where it is not known. ``audit_blocked``: unsealed, but
    requests fail because no audit device works. A standby reports how long ago (milliseconds) the active node answered
    its heartbeat (None before the first answer), how long that took and how far its clock is ahead of that node's; not
    ``ha_healthy`` when it is too long ago. ``canary_age_ms``: how far this cluster is behind its primary.
    ``sealed_reason``: why a node sealed itself, for the operator; ``stopped_reason``: why an unsealed one serves
    nothing until an operator has done something."""

    initialized: bool
    sealed: bool
    standby: bool
    performance_mode: str = "unknown"
    dr_mode: str = "unknown"
    cluster_name: str = ""
    cluster_id: str = ""
    last_wal: int = 0
    audit_blocked: bool = False
    sealed_reason: str = ""
    stopped_reason: str = ""
    ha_healthy: bool = True
    heartbeat_age_ms: int | None = None
    echo_ms: int = 0
    clock_skew_ms: int = 0
    canary_age_ms: int = 0


@dataclass(frozen=True, slots=True)
class LeaderStatus:
    """``sys/leader`` (contract 4.2). ``active_since_s``: unix seconds, 0 when this node is not active; addresses are
    URLs or empty when no leader is known."""

    ha_enabled: bool
    is_self: bool
    active_since_s: float = 0.0
    leader_address: str = ""
    leader_cluster_address: str = ""
    last_wal: int = 0


@dataclass(frozen=True, slots=True)
class InitOptions:
    """A checked ``sys/init`` request: of the unseal shares, or with an auto seal of the recovery shares."""

    shares: int
    threshold: int


@dataclass(frozen=True, slots=True)
class InitOutcome:
    """The unseal or recovery shares and the root token, shown once."""

    keys: tuple[bytes, ...] = field(repr=False)
    root_token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Member:
    """One node in ``sys/ha-status`` (contract 4.9). ``last_echo_s``: unix seconds, 0 for the active node itself;
    ``echo_ms``: how long the heartbeat before it took; ``clock_skew_ms``: how far its clock is ahead of the active
    node's; ``canary_age_ms``: how far the cluster is behind its primary."""

    hostname: str
    api_addr: str
    cluster_addr: str
    active: bool
    version: str
    last_echo_s: float = 0.0
    echo_ms: int = 0
    clock_skew_ms: int = 0
    canary_age_ms: int = 0


class NotForwarded(Exception):
    """:meth:`NodeView.dispatch` could not hand the request on and it was certainly not handled: the front answers with
    a redirect, or 503 where no active node is known."""


class NodeView(Protocol):
    """The node as the un-authenticated local endpoints see it."""

    @property
    def version(self) -> str:
        """As in ``sys/health``."""

    @property
    def storage_type(self) -> str:
        """``consul``, ``embedded`` or ``inmem``."""

    @property
    def seal_kind(self) -> str:
        """The configured seal: ``shamir``, or the auto seal's type."""

    async def sealer(self) -> Sealer | None:
        """What puts a root key under the configured auto seal; None without one. Raises Unavailable."""

    def is_sealed(self) -> bool:
        """Whether no request can be served for want of keys: sealed, or not initialised."""

    async def health(self) -> NodeHealth:
        """Never raises for a sealed or unreachable store: it reports what is known."""

    async def seal_status(self) -> SealStatus:
        """Same rule."""

    async def leader(self) -> LeaderStatus:
        """Called on unsealed nodes only."""

    async def members(self) -> list[Member]:
        """The active node first, then the standbys it heard of lately. Called on the active node only."""

    async def init(self, options: InitOptions) -> InitOutcome:
        """Raises InvalidRequest ``Vault is already initialized``, Unavailable."""

    async def unseal(self, key: bytes, *, migrate: bool) -> SealStatus:
        """Take one share (32 or 33 bytes), with ``migrate`` to change the seal. Raises InvalidRequest for a wrong
        combination (progress back to 0). A repeated share and a node unsealed already change nothing. Returns once the
        node is unsealed, not active."""

    async def reset_unseal(self) -> SealStatus:
        """Forget the shares given so far. Raises InvalidRequest ``vault is unsealed``."""

    async def seal(self) -> None:
        """Forget every key; returns once sealed is what :meth:`health` says. May be called from inside
        :meth:`dispatch`: it must not wait for the request that called it."""

    async def step_down(self) -> None:
        """Start to give up leadership and return; a no-op without HA. Same rule as :meth:`seal`."""

    def cors(self) -> Cors:
        """Which pages of other origins may call, on a standby as the active node told it last."""

    def is_active(self) -> bool:
        """Whether :meth:`dispatch` runs requests here."""

    async def dispatch(self, request: HttpRequest) -> HttpResponse:
        """Run the request on this node's Service if active, else forward it over the cluster port. Raises
        :class:`NotForwarded`, plugin_api Unavailable, or PluginError for an unknown outcome."""
