"""One process of one cluster of a set: the node of the single simulation, with the real replication manager in each of
its tenures, put together as ``sidecar/leading.py`` does it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from multidict import CIMultiDict

from consul_backend.errors import (
    BackendError,
    FenceLost,
    NotApplied,
    OutcomeUnknown,
    Overloaded,
    PermissionDenied,
    TooLarge,
    Unavailable,
)
from consul_backend.replicated import ReplicatedStore
from consul_backend.wal import Head
from consul_backend.wal import Write as StoreWrite
from plugin_api.errors import PluginError, ReadOnlyStorage
from plugin_api.errors import Unavailable as NotAvailable
from sidecar.core.write_gate import GatedStore, WriteGate
from sidecar.replication.activation import ActivationResult
from sidecar.replication.history import Epoch
from sidecar.replication.manager import Replication
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.modes import MODES
from sidecar.replication.selection import Mount
from sidecar.replication.upstream import STALL_WARNING
from sidecar.replication.wiring import Callbacks, Executed, ForwardAnswer, NodeInfo, SecretMaterial, Wiring
from sidecar.transport.forwarding import ForwardRequest
from tests.sim.clusters.links import Links
from tests.sim.clusters.port import Port
from tests.sim.node import Node

if TYPE_CHECKING:
    from tests.sim.clusters.cluster import Cluster

MOUNT_1 = "00000000-0000-4000-8000-000000000001"
MOUNT_2 = "00000000-0000-4000-8000-000000000002"
MOUNTS = (Mount("one/", MOUNT_1, "kv"), Mount("two/", MOUNT_2, "kv"))
ROOT_KEY = b"k" * 32
KEYRINGS = ("r/core/keyring", "l/core/keyring")
SEAL_KEY = "c/seal/config"
OK, FAILED, UNKNOWN = 204, 400, 500


class Order(msgspec.Struct, frozen=True):
    """A client's write as it travels: the body of a request."""

    number: int
    entries: dict[str, bytes | None]


@dataclass
class Request:
    """The shape of an API request."""

    body: bytes = field(repr=False)
    method: str = "POST"
    path: str = "sim/write"
    query: dict[str, list[str]] = field(default_factory=dict)
    headers: CIMultiDict[str] = field(default_factory=CIMultiDict)
    remote_address: str = "client"
    remote_port: int = 0
    raw_target: str = "/v1/sim/write"
    trail: tuple[tuple[str, str], ...] = ()


@dataclass
class Caller:
    """Who asks."""

    policies: tuple[str, ...] = ("default",)
    display_name: str = "sim"
    accessor: str = "acc"
    entity_id: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    cluster_id: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """What a client is told. ``outcome``: ok, fail, unknown or refused. ``index``: of the primary's log, where the
    answer says so; ``forwarded``; ``late``: with the warning that this cluster may not show it yet."""

    outcome: str
    index: int = 0
    forwarded: bool = False
    late: bool = False
    value: bytes | None = None
    low: int = 0


class Sealed:
    """Entries without a barrier: what is encrypted is the business of other tests."""

    def __init__(self, store: ReplicatedStore) -> None:
        self._store = store

    async def get(self, key: str) -> bytes | None:
        return await self._store.get(key)

    async def list(self, prefix: str) -> list[str]:
        return list(await self._store.list(prefix))

    def encode(self, write: StoreWrite) -> StoreWrite:
        return write

    async def put(self, key: str, value: bytes) -> Head:
        return await self._store.commit([StoreWrite(key, value)])

    async def delete(self, key: str) -> Head:
        return await self._store.commit([StoreWrite(key, None)])


class SetNode(Node):
    """``cluster`` is the one it belongs to; ``host`` the name in its addresses."""

    def __init__(self, cluster: Cluster, links: Links, host: str, **parts: Any) -> None:
        super().__init__(cluster, **parts)
        self.cluster = cluster
        self.host = host
        self.port = Port(links, self)
        self.replication: Replication | None = None
        self.gate: str | None = None
        self._writes = WriteGate()
        self._gated: GatedStore | None = None

    @property
    def address(self) -> str:
        """Where its cluster port is."""
        return f"https://{self.host}:8201"

    @property
    def manager(self) -> Replication:
        """The manager of both modes. Raises NotAvailable when this node does not lead."""
        if self.replication is None:
            raise NotAvailable("this node does not lead")
        return self.replication

    def mode(self, mode: str) -> ModeManager:
        """The manager of one mode. Raises NotAvailable when this node does not lead."""
        return self.manager.dr if mode == "dr" else self.manager.performance

    async def _ride(self, tasks: asyncio.TaskGroup, store: ReplicatedStore) -> Sequence[asyncio.Task[None]]:
        self.gate = None
        self._writes = WriteGate()
        replication = Replication(
            Wiring(
                store=store,
                sealed=Sealed(store),
                listener=self.port,  # type: ignore[arg-type]  # the part of a listener that replication uses
                node=NodeInfo(
                    self.host,
                    f"cluster-{self.cluster.name}",
                    f"https://{self.host}:8200",
                    self.address,
                    self._addresses,
                ),
                callbacks=self._callbacks(),
                clock=self.clock,
                options=self.cluster.plan.replication,
            )
        )
        await replication.load()
        self.replication = replication
        self._gated = GatedStore(store, self._writes)
        return [tasks.create_task(replication.run(), name="replication")]

    def _leave(self) -> None:
        super()._leave()
        self.replication = self._gated = None

    def _addresses(self) -> Sequence[str]:
        others = [node.address for node in self.cluster.nodes if node is not self]
        return [self.address, *others]

    def _callbacks(self) -> Callbacks:
        return Callbacks(
            on_applied=self._on_applied,
            set_gate=self._set_gate,
            secret_material=self._material,
            flip=self._flip,
            execute=self._execute,
            restart=self._begin_anew,
            keep_keys=self._nothing,
            root_key=lambda: ROOT_KEY,
            derived_key=lambda label: ROOT_KEY,
            open_entry=self._open_entry,
            standalone=self._standalone,
            gate=self._writes,
            mounts=lambda: MOUNTS,
            reselected=self._nothing,
        )

    async def _on_applied(self, keys: Sequence[str]) -> None:
        await asyncio.sleep(0)

    def _set_gate(self, reason: str | None) -> None:
        self.gate = reason

    def _begin_anew(self) -> None:
        self.gate = "the role of this cluster is being changed; try again shortly"
        self.step_down()

    async def _material(self, keyrings: Collection[str]) -> SecretMaterial:
        if self.store is None:
            raise NotAvailable("this node does not lead")
        found: Mapping[str, bytes] = {key: await self.store.get(key) or b"" for key in sorted(keyrings)}
        return SecretMaterial(ROOT_KEY, found, await self.store.get(SEAL_KEY) or b"")

    async def _flip(self, result: ActivationResult) -> None:
        raise NotAvailable("clusters of this world are activated when they are built")

    async def _nothing(self) -> None:
        await asyncio.sleep(0)

    async def _open_entry(self, key: str, raw: bytes) -> bytes | None:
        return raw

    async def _standalone(self) -> Sequence[StoreWrite]:
        return []

    # -- what clients ask

    async def order(self, order: Order) -> Told:
        """One batch, here or on the primary."""
        replication = self.replication
        if replication is None or self.gate is not None or replication.mirrors:
            return Told("refused")
        self._running += 1
        try:
            status, index = await self._commit(order)
        except ReadOnlyStorage:
            return await self._forward(replication, order)
        finally:
            self._running -= 1
        return Told({OK: "ok", FAILED: "fail"}.get(status, "unknown"), index)

    async def _commit(self, order: Order) -> tuple[int, int]:
        gated = self._gated
        if gated is None:
            return FAILED, 0
        writes = [StoreWrite(key, value) for key, value in order.entries.items()]
        try:
            self._writes.check(writes)
        except NotApplied:
            return FAILED, 0
        self.cluster.begin(order.number)
        status, index = UNKNOWN, 0
        try:
            status, index = OK, (await gated.commit(writes)).index
        except (Overloaded, NotApplied, TooLarge, PermissionDenied):
            status = FAILED
        except OutcomeUnknown:
            pass
        except BackendError as error:
            self.cluster.surprised(f"commit raised {error!r}")
        finally:
            self.cluster.done(order.number, {OK: "ok", FAILED: "fail"}.get(status, "unknown"), index)
        return status, index

    async def _forward(self, replication: Replication, order: Order) -> Told:
        try:
            answer: ForwardAnswer = await replication.forward_to_primary(
                Request(msgspec.msgpack.encode(order)), Caller()
            )
        except NotAvailable:
            return Told("fail", forwarded=True)
        except PluginError:
            return Told("unknown", forwarded=True)
        late = STALL_WARNING.encode() in answer.body
        outcome = {OK: "ok", 200: "ok", FAILED: "fail"}.get(answer.status, "unknown")
        return Told(outcome, answer.position, forwarded=True, late=late)

    async def _execute(self, message: ForwardRequest) -> Executed:
        replication = self.replication
        if replication is None or self.gate is not None:
            raise NotAvailable("this node does not serve now")
        order = msgspec.msgpack.decode(message.body, type=Order)
        self._running += 1
        try:
            status, index = await self._commit(order)
        except ReadOnlyStorage:
            status, index = FAILED, 0
        finally:
            self._running -= 1
        return Executed(status, [("Content-Type", "application/json")], b"", index)

    async def show(self, key: str) -> Told:
        """One key, as this cluster's readers see it. ``low``: the oldest state of this cluster's log it may be of."""
        store, replication = self.store, self.replication
        if store is None or replication is None or self.gate is not None or replication.mirrors:
            return Told("refused")
        low = max(store.head.index, self.cluster.acknowledged)
        mixed = self.cluster.is_mix
        try:
            value = await store.get(key)
        except (FenceLost, Unavailable):
            return Told("unknown")
        if mixed and self.cluster.is_mix and self.gate is None and self.replication is replication:
            self.cluster.mixed_read(self.process.name, key)
        return Told("ok", value=value, low=low)

    async def holds(self, mode: str, index: int) -> bool:
        """Whether this cluster is at or past that record of its primary."""
        service = self.mode(mode).secondary
        position = service.applier.position if service is not None else None
        return position is not None and position.index >= index


def epoch_text(epoch: Epoch) -> str:
    """For the log."""
    return f"{epoch.number}-{epoch.id[:4]}"


CallMade = Callable[[SetNode], Any]
__all__ = ["MODES", "Order", "SetNode", "Told"]
