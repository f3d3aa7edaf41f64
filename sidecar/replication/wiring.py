"""What replication is given by whoever builds it: node facts, callbacks, options. No behaviour."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from consul_backend.allowance import DeleteAllowance
from consul_backend.clock import Clock
from consul_backend.index_check import Inspected
from consul_backend.limits import Limits
from consul_backend.wal import Write
from sidecar.replication.activation import ActivationResult
from sidecar.replication.selection import Mount
from sidecar.replication.staging import Staging
from sidecar.replication.store_view import PrimaryStore, SecondaryStore
from sidecar.transport.forwarding import ForwardRequest
from sidecar.transport.listener import ClusterListener


class ClusterStore(PrimaryStore, SecondaryStore, Protocol):
    """The active node's replicated store; it is shipped or follows, as the role has it."""

    @property
    def generation(self) -> str:
        """The store generation's id."""

    def inspected(self) -> Inspected:
        """What a check of the index looks at."""


class SealedEntries(Protocol):
    """Plaintext entries on logical keys, encrypted by the barrier. Classes ``l`` and ``c`` are written here, and
    whatever class a role entry is of; no write gate lies in between."""

    async def get(self, key: str) -> bytes | None:
        """The entry, or None."""

    async def list(self, prefix: str) -> list[str]:
        """Names one level below ``prefix``; folders end in ``/``."""

    def encode(self, write: Write) -> Write:
        """``write`` as the store takes it."""

    async def put(self, key: str, value: bytes) -> object:
        """Returns once the entry is durable."""

    async def delete(self, key: str) -> object:
        """Returns once the entry is gone."""


class WriteGate(Protocol):
    """Between the rest of the node and the store: what only replication may write."""

    def restrict(self, classes: Collection[str]) -> None:
        """From now on nobody but replication commits entries of exactly these classes."""

    async def settled(self) -> None:
        """Wait until no commit that was let in before is still under way."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """This node. ``local_cluster_id`` is this cluster's own id (sys/health), unlike the replication set's, which both
    ends share. ``cluster_addresses`` returns the cluster addresses of all nodes of this cluster, the active first."""

    node_id: str
    local_cluster_id: str
    api_addr: str
    cluster_addr: str
    cluster_addresses: Callable[[], Sequence[str]]


@dataclass(frozen=True, slots=True)
class SecretMaterial:
    """What a new secondary receives: the bare root key, raw keyrings by logical key, and the raw seal record."""

    root_key: bytes = field(repr=False)
    keyrings: Mapping[str, bytes] = field(repr=False)
    seal: bytes = field(repr=False)


class Executed(NamedTuple):
    """A forwarded request's answer; ``wal_index`` is its last write's record, 0 if it wrote nothing."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes
    wal_index: int


@dataclass(frozen=True, slots=True)
class Callbacks:
    """The rest of the node.

    ``on_applied`` hears the logical keys of every applied batch, after the commit. ``set_gate`` closes reads of
    replicated data with a text for people, None opens them. ``secret_material`` is asked at a bootstrap for the given
    keyrings. ``flip`` builds a new store generation from an activation and points the cluster at it; when it returns,
    this tenure is about to end. ``execute`` runs a forwarded request on this node's service; its errors are its
    answers. ``restart`` ends this tenure soon, for the next one to begin in the role that was committed. ``keep_keys``
    commits that every data key in use now stays usable here, whatever keyrings arrive. ``root_key`` is in use now.
    ``derived_key``: 32 bytes for the use that a label names, the same on every cluster under this root key.
    ``open_entry`` decrypts a stored entry, None for what nobody is shown. ``standalone``: entries that make a mirror a
    cluster of its own. ``mounts`` are the replicated mounts of the moment, those hidden by a filter too.
    ``reselected``: what is hidden or not held has changed; when it returns, nothing reads mounts that are hidden now.
    """

    on_applied: Callable[[Sequence[str]], Awaitable[None]]
    set_gate: Callable[[str | None], None]
    secret_material: Callable[[Collection[str]], Awaitable[SecretMaterial]]
    flip: Callable[[ActivationResult], Awaitable[None]]
    execute: Callable[[ForwardRequest], Awaitable[Executed]]
    restart: Callable[[], None]
    keep_keys: Callable[[], Awaitable[None]]
    root_key: Callable[[], bytes]
    derived_key: Callable[[bytes], bytes]
    open_entry: Callable[[str, bytes], Awaitable[bytes | None]]
    standalone: Callable[[], Awaitable[Sequence[Write]]]
    gate: WriteGate
    mounts: Callable[[], Sequence[Mount]]
    reselected: Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ReplicationOptions:
    """Times in seconds. ``wal_wait_s`` is Vault's ``best_effort_wal_wait_duration``. ``probe_timeout_s``: how long a
    promotion looks for a primary that still lives. ``demote_drain_s``: how long a demotion waits for connected
    secondaries to have everything. ``promotion_lag_max_s``: a promotion that may lose more than this needs ``force``;
    0 for no such limit. ``certificate_ttl_s``: life of a secondary's certificate, renewed at two thirds of it;
    ``certificate_check_s``: how often both ends look whether something is due. ``allowance``: what a merkle sync or a
    forced reindex deletes without being asked for the number."""

    beat_s: float = 5.0
    silent_beats_max: int = 3
    wal_wait_s: float = 2.0
    forward_timeout_s: float = 60.0
    activation_timeout_s: float = 30.0
    reconnect_min_s: float = 0.25
    reconnect_max_s: float = 15.0
    connect_timeout_s: float = 5.0
    probe_timeout_s: float = 2.0
    demote_drain_s: float = 5.0
    promotion_lag_max_s: float = 0.0
    certificate_ttl_s: float = 365 * 24 * 60 * 60.0
    certificate_check_s: float = 60.0
    fetch_idle_timeout_s: float = 30.0
    window_records: int = 1024
    window_bytes: int = 4 * 1024 * 1024
    limits: Limits = field(default_factory=Limits)
    staging: Staging = field(default_factory=Staging)
    allowance: DeleteAllowance = field(default_factory=DeleteAllowance)

    def __post_init__(self) -> None:
        if not 0 < self.reconnect_min_s <= self.reconnect_max_s:
            raise ValueError("reconnect_min_s must be positive and at most reconnect_max_s")
        if self.beat_s <= 0 or self.silent_beats_max < 1 or self.wal_wait_s < 0:
            raise ValueError("beat_s must be positive, silent_beats_max at least 1, wal_wait_s not negative")


@dataclass(frozen=True, slots=True)
class Wiring:
    """What replication acts on in one tenure, whatever the mode. ``store`` is the raw replicated store, ``sealed`` the
    same through the barrier."""

    store: ClusterStore
    sealed: SealedEntries
    listener: ClusterListener
    node: NodeInfo
    callbacks: Callbacks
    clock: Clock
    options: ReplicationOptions = field(default_factory=ReplicationOptions)


class AuthLike(Protocol):
    """Who the caller is (``sidecar.request.types.ForwardedAuth``)."""

    @property
    def policies(self) -> tuple[str, ...]: ...

    @property
    def display_name(self) -> str: ...

    @property
    def accessor(self) -> str: ...

    @property
    def entity_id(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def cluster_id(self) -> str: ...


@dataclass(slots=True)
class ForwardAnswer:
    """What came back from the primary, complete; any caller of ``forward_to_primary`` copies it to its client."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    position: int = 0
