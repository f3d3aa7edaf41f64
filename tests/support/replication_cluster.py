"""One-node clusters over in-memory stores with the real cluster port and manager, and an API to unwrap from."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from multidict import CIMultiDict

from consul_backend.clock import SystemClock
from consul_backend.wal import Write
from sidecar.replication.activation import CREATION_PATH, ActivationResult
from sidecar.replication.manager import ENABLING_SECONDARY, PLAIN_HTTP, PerformanceReplication
from sidecar.replication.states import Phase
from sidecar.replication.wiring import Callbacks, Executed, NodeInfo, ReplicationOptions, SecretMaterial
from sidecar.transport.forwarding import ForwardRequest
from sidecar.transport.listener import ClusterListener
from tests.support.replication import MemoryStore

OPTIONS = ReplicationOptions(
    beat_s=0.1, wal_wait_s=1.0, reconnect_min_s=0.02, reconnect_max_s=0.1, activation_timeout_s=5.0
)
MATERIAL = SecretMaterial(b"k" * 32, b"raw keyring", b"raw seal")
JWT_KEY = ec.generate_private_key(ec.SECP521R1())
TIMEOUT_S = 15


class Store(MemoryStore):
    """With the names that the manager needs beyond what shipper and applier do."""

    generation = "generation-1"

    async def put(self, key: str, value: bytes) -> None:
        await self.commit([Write(key, value)])


@dataclass
class Request:
    """The shape of an API request."""

    method: str = "POST"
    path: str = "secret/data/a"
    query: dict[str, list[str]] = field(default_factory=dict)
    headers: CIMultiDict[str] = field(default_factory=CIMultiDict)
    body: bytes = b"{}"
    remote_address: str = "10.1.1.1"
    raw_target: str = "/v1/secret/data/a"
    trail: tuple[tuple[str, str], ...] = ()


@dataclass
class Auth:
    """The shape of a forwarded identity."""

    policies: tuple[str, ...] = ("default",)
    display_name: str = "userpass-ann"
    accessor: str = "acc"
    entity_id: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    cluster_id: str = ""


class Cluster:
    """One node of one cluster, with its manager running."""

    def __init__(self, name: str, store: Store | None = None, options: ReplicationOptions = OPTIONS) -> None:
        self.name = name
        self.store = store or Store(name)
        self.listener = ClusterListener("127.0.0.1", 0)
        self.gates: list[str | None] = []
        self.applied: list[str] = []
        self.flipped: list[ActivationResult] = []
        self.executed: list[ForwardRequest] = []
        self.execute: Callable[[ForwardRequest], Awaitable[Executed]] = self._execute
        self._options = options
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Cluster:
        await self.listener.start()
        address = f"https://127.0.0.1:{self.listener.port}"
        self.addresses = [address]
        self.manager = PerformanceReplication(
            store=self.store,
            sealed=self.store,
            listener=self.listener,
            node=NodeInfo(
                f"{self.name}-0", f"cluster-{self.name}", f"https://{self.name}:8200", address, lambda: self.addresses
            ),
            callbacks=Callbacks(self._on_applied, self.gates.append, self._material, self._flip, self._do),
            clock=SystemClock(),
            options=self._options,
        )
        await self.manager.load()
        self._task = asyncio.create_task(self.manager.run())
        if self.manager.mode == "secondary":
            await until(lambda: self.manager._secondary is not None)
        return self

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.listener.close()

    async def _on_applied(self, keys: Sequence[str]) -> None:
        self.applied.extend(keys)

    async def _material(self) -> SecretMaterial:
        return MATERIAL

    async def _flip(self, result: ActivationResult) -> None:
        self.flipped.append(result)

    async def _do(self, request: ForwardRequest) -> Executed:
        self.executed.append(request)
        return await self.execute(request)

    async def _execute(self, request: ForwardRequest) -> Executed:
        head = await self.store.commit([Write(f"r/m/{request.path}", request.body)])
        return Executed(204, [("Content-Type", "application/json")], b"", head.index)


class PrimaryApi:
    """Just enough of the primary's API for the unwrap: tokens are single use."""

    def __init__(self) -> None:
        self.wrapped: dict[str, dict[str, Any]] = {}
        self.creation_path = CREATION_PATH
        self.calls: list[str] = []
        self.address = ""

    async def start(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._handle))
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    def wrap(self, payload: dict[str, Any], claims: dict[str, Any]) -> str:
        jti = f"hvs.{len(self.wrapped)}"
        self.wrapped[jti] = payload
        now_s = SystemClock().time_ms() // 1000
        return jwt.encode(
            {
                "jti": jti,
                "iat": now_s,
                "nbf": now_s - 5,
                "exp": now_s + 1800,
                "accessor": "",
                "addr": self.address,
                "type": "wrapping",
            }
            | claims,
            JWT_KEY,
            algorithm="ES512",
        )

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.calls.append(request.path)
        body = json.loads(await request.read())
        token = body.get("token") or request.headers.get("X-Vault-Token", "")
        if token not in self.wrapped:
            return web.json_response({"errors": ["wrapping token is not valid or does not exist"]}, status=400)
        if request.path.endswith("/lookup"):
            return web.json_response({"data": {"creation_path": self.creation_path}})
        return web.json_response({"data": self.wrapped.pop(token)})


@dataclass
class Pair:
    """A primary with its API, and what was started besides."""

    primary: Cluster
    api: PrimaryApi
    started: list[Cluster]

    async def start(self, name: str, store: Store | None = None, options: ReplicationOptions = OPTIONS) -> Cluster:
        cluster = await Cluster(name, store, options).start()
        self.started.append(cluster)
        return cluster

    async def token(self, secondary_id: str = "eu") -> str:
        payload, claims = await self.primary.manager.secondary_token("performance", secondary_id, 1800, "")
        return self.api.wrap(payload, claims)

    async def activate(self, secondary_id: str = "eu", options: ReplicationOptions = OPTIONS) -> Cluster:
        """A cluster that was activated, as it is after the flip."""
        fresh = await self.start(f"{secondary_id}-fresh")
        response = await fresh.manager.secondary_enable("performance", await self.token(secondary_id), "", "", "")
        assert response.warnings == [ENABLING_SECONDARY, PLAIN_HTTP]
        await fresh.stop()
        store = Store(secondary_id)
        store.write(*fresh.flipped[0].entries.items())
        return await self.start(secondary_id, store, options)


async def until(what: Callable[[], bool]) -> None:
    """Poll: what is waited for happens in another cluster, which has no event for this one."""
    async with asyncio.timeout(TIMEOUT_S):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def in_step(primary: Cluster, secondary: Cluster) -> bool:
    return (
        primary.store.replicated() == secondary.store.replicated()
        and secondary.manager._secondary is not None
        and (secondary.manager._secondary.machine.phase is Phase.STREAM_WALS)
    )
