"""An active node in any combination of replication roles: real service, real replication, memory store, no network."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from multidict import CIMultiDict

from consul_backend.clock import SystemClock
from consul_backend.position import Position
from consul_backend.wal import Write
from plugin_api.errors import Unavailable
from sidecar.api.mirror_service import MirrorService
from sidecar.api.service import Service, ServiceOptions
from sidecar.core.barrier import Barrier, load_barrier
from sidecar.core.init import Genesis, build_genesis
from sidecar.core.keys import JWT_KEY
from sidecar.core.rotation import keep_keys
from sidecar.core.seal import combine
from sidecar.core.seal_record import SealRecord, open_root_key
from sidecar.core.store_view import SealedStore
from sidecar.core.wrapping import _encode_key
from sidecar.core.write_gate import GatedStore, WriteGate
from sidecar.replication import roles
from sidecar.replication.history import Promotion
from sidecar.replication.manager import Replication
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.roles import DisabledRole, Role, SecondaryRole
from sidecar.replication.selection import Mount
from sidecar.replication.wiring import Callbacks, NodeInfo, ReplicationOptions, SecretMaterial, Wiring
from sidecar.request.types import HttpRequest
from sidecar.transport.certificates import make_authority
from sidecar.transport.listener import ClusterListener
from tests.support.replication_cluster import Store
from tests.support.service_node import API_ADDR, FakeNode, SettableClock

SET_ID = str(uuid.UUID(int=7))
BEGAN = Promotion(1, "first-epoch", 1000)
AUTHORITY = make_authority("test")


def role_of(kind: str, mode: Mode) -> Role:
    """A role of that kind."""
    if kind == "primary":
        return roles.enable_primary(
            mode, DisabledRole(), set_id=SET_ID, began=BEGAN, cluster_addr="https://us:8201", authority=AUTHORITY
        )
    if kind == "secondary":
        return SecondaryRole(SET_ID, (BEGAN,))
    return DisabledRole()


@dataclass
class Reply:
    """Status and decoded body, None when empty."""

    status: int
    body: Any

    @property
    def errors(self) -> list[str]:
        return list((self.body or {}).get("errors") or [])


@dataclass
class RoleNode:
    """Made by :func:`role_node`. ``restarts`` counts the times that replication ended the tenure."""

    store: Store
    genesis: Genesis
    service: Service | MirrorService
    replication: Replication
    node: FakeNode
    clock: SettableClock
    restarts: list[None] = field(default_factory=list)

    async def call(self, method: str, path: str, body: Any = None, *, token: str | None = "root") -> Reply:
        """One request to ``/v1/<path>`` as root, as another token, or (None) without one."""
        headers: CIMultiDict[str] = CIMultiDict()
        if token is not None:
            headers["X-Vault-Token"] = self.genesis.root_token if token == "root" else token
        raw = b"" if body is None else json.dumps(body).encode()
        answer = await self.service.handle(
            HttpRequest(method, path, headers=headers, body=raw, remote_address="10.0.0.9")
        )
        return Reply(answer.status, json.loads(answer.body) if answer.body else None)


async def _take_roles(
    store: Store, sealed: SealedStore, performance: str, disaster: str, also: Sequence[Write]
) -> None:
    wanted = [
        Write(mode.role_key, roles.encode_role(role_of(kind, mode)))
        for mode, kind in ((PERFORMANCE, performance), (DR, disaster))
    ]
    position = Position(SET_ID, store.generation, 1, store.head.index, store.head.chain_hash)
    if performance == "secondary":  # the token it was activated by was signed with this key
        wanted.append(Write(JWT_KEY, _encode_key(ec.generate_private_key(ec.SECP521R1()))))
    await store.commit(
        [sealed.encode(write) for write in (*wanted, *also)],
        positions={mode.name: position for mode in (PERFORMANCE, DR)},
    )


def _service(
    store: GatedStore,
    barrier: Barrier,
    genesis: Genesis,
    node: FakeNode,
    replication: Replication,
    clock: SettableClock,
) -> Service | MirrorService:
    if replication.mirrors:
        return MirrorService(store, barrier, genesis.cluster, node=node, replication=replication, now=clock)
    options = ServiceOptions(api_addr=API_ADDR)
    return Service(store, barrier, genesis.cluster, options, node=node, replication=replication, now=clock)


async def role_node(performance: str, disaster: str, *, also: Sequence[Write] = ()) -> RoleNode:
    """A node of a cluster with these roles; secondaries hold a whole copy and follow nobody."""
    clock = SettableClock()
    genesis = build_genesis(shares=3, threshold=2, cluster_name="test", now_s=clock.now_s, random_bytes=os.urandom)
    store = Store("here")
    store.writes_max = 1000
    await store.commit(genesis.writes)
    record = SealRecord.decode(store.data["c/core/seal"])
    barrier = await load_barrier(store.get, open_root_key(record, combine(genesis.keys[:2])))
    sealed = SealedStore(store, barrier)
    await _take_roles(store, sealed, performance, disaster, also)
    gate = WriteGate()
    made: list[Service] = []
    restarts: list[None] = []

    async def refuse(*_: Any) -> Any:
        raise Unavailable("not in this test")

    async def nothing(*_: Any) -> Any:
        return []

    async def material(keyrings: Collection[str]) -> SecretMaterial:
        return SecretMaterial(barrier.root_key(), {key: store.data[key] for key in keyrings}, store.data["c/core/seal"])

    replication = Replication(
        Wiring(
            store=store,
            sealed=sealed,
            listener=ClusterListener("127.0.0.1", 0),
            node=NodeInfo("n", genesis.cluster.cluster_id, API_ADDR, "https://us:8201", lambda: ["https://us:8201"]),
            callbacks=Callbacks(
                on_applied=nothing,
                set_gate=lambda reason: None,
                secret_material=material,
                flip=refuse,
                execute=refuse,
                restart=lambda: restarts.append(None),
                keep_keys=lambda: keep_keys(sealed, clock.now_s),
                root_key=barrier.root_key,
                derived_key=barrier.derived_key,
                open_entry=barrier.open_value,
                standalone=nothing,
                gate=gate,
                mounts=lambda: (
                    [Mount(one.full_path, one.uuid, one.type) for one in made[0].mounts.table.replicated()]
                    if made
                    else []
                ),
                reselected=lambda: made[0].reselected() if made else nothing(),
            ),
            clock=SystemClock(),
            options=ReplicationOptions(probe_timeout_s=0.2),
        )
    )
    await replication.load()
    node = FakeNode(genesis)
    service = _service(GatedStore(store, gate), barrier, genesis, node, replication, clock)
    if isinstance(service, Service):
        made.append(service)
    await service.start()
    await asyncio.sleep(0)
    return RoleNode(store, genesis, service, replication, node, clock, restarts)
