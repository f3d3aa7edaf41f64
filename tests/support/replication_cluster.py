"""One-node clusters over in-memory stores with the real cluster port and manager, and an API to unwrap from."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from multidict import CIMultiDict

from consul_backend.clock import Clock, SystemClock
from consul_backend.wal import Write
from sidecar.core.write_gate import WriteGate
from sidecar.replication.activation import ActivationResult
from sidecar.replication.manager import Replication
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.modes import PERFORMANCE, Mode
from sidecar.replication.selection import Mount
from sidecar.replication.states import Phase
from sidecar.replication.texts import ENABLING_SECONDARY, PLAIN_HTTP
from sidecar.replication.wiring import Callbacks, Executed, NodeInfo, ReplicationOptions, SecretMaterial, Wiring
from sidecar.transport.forwarding import ForwardRequest
from sidecar.transport.listener import ClusterListener
from tests.support.replication import MemoryStore

OPTIONS = ReplicationOptions(
    beat_s=0.1,
    silent_beats_max=30,
    wal_wait_s=1.0,
    reconnect_min_s=0.02,
    reconnect_max_s=0.1,
    activation_timeout_s=60.0,
)
"""Quick about everything but silence: all clusters of a test share one event loop, which a busy machine holds up."""
KEYRINGS = {"r/core/keyring": b"raw keyring", "l/core/keyring": b"raw local keyring"}
MATERIAL = SecretMaterial(b"k" * 32, KEYRINGS, b"raw seal")
JWT_KEY = ec.generate_private_key(ec.SECP521R1())
TIMEOUT_S = 120


class Store(MemoryStore):
    """With the names that the manager needs beyond what shipper and applier do; nothing is encrypted."""

    def __init__(self, writer: str = "node", writes_max: int = 61) -> None:
        super().__init__(writer, writes_max)
        self.generation = f"generation-of-{writer}"

    async def put(self, key: str, value: bytes) -> None:
        await self.commit([Write(key, value)])

    async def delete(self, key: str) -> None:
        await self.commit([Write(key, None)])

    async def list(self, prefix: str) -> list[str]:
        names: set[str] = set()
        for key in self.data:
            if key.startswith(prefix):
                head, slash, _ = key[len(prefix) :].partition("/")
                names.add(head + slash)
        return sorted(names)

    def encode(self, write: Write) -> Write:
        return write


@dataclass
class Request:
    """The shape of an API request."""

    method: str = "POST"
    path: str = "secret/data/a"
    query: dict[str, list[str]] = field(default_factory=dict)
    headers: CIMultiDict[str] = field(default_factory=CIMultiDict)
    body: bytes = b"{}"
    remote_address: str = "10.1.1.1"
    remote_port: int = 0
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
    """One node of one cluster, with its manager running; a tenure that is to begin anew does."""

    def __init__(self, name: str, store: Store | None = None, options: ReplicationOptions = OPTIONS) -> None:
        self.name = name
        self.store = store or Store(name)
        self.listener = ClusterListener("127.0.0.1", 0)
        self.gates: list[str | None] = []
        self.writes = WriteGate()
        self.applied: list[str] = []
        self.flipped: list[ActivationResult] = []
        self.executed: list[ForwardRequest] = []
        self.execute: Callable[[ForwardRequest], Awaitable[Executed]] = self._execute
        self.kept_keys = 0
        self.clock: Clock = SystemClock()
        self.reselections = 0
        self.tenures = 0
        self._options = options
        self._restart = asyncio.Event()
        self._started = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Cluster:
        await self.listener.start()
        self.address = f"https://127.0.0.1:{self.listener.port}"
        self.addresses = [self.address]
        self._task = asyncio.create_task(self._run())
        started = asyncio.create_task(self._started.wait())
        await asyncio.wait([self._task, started], return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()
        for manager in (self.manager.dr, self.manager.performance):
            if manager.role.kind == "secondary" and (manager is self.manager.dr or not self.manager.mirrors):
                await until(lambda manager=manager: manager.secondary is not None)
        return self

    async def _run(self) -> None:
        while True:
            self._restart.clear()
            self.manager = self._make()
            await self.manager.load()
            self.tenures += 1
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(self.manager.run())
                self._started.set()
                await self._restart.wait()
                running.cancel()

    def _make(self) -> Replication:
        return Replication(
            Wiring(
                store=self.store,
                sealed=self.store,
                listener=self.listener,
                node=NodeInfo(
                    f"{self.name}-0",
                    f"cluster-{self.name}",
                    f"https://{self.name}:8200",
                    self.address,
                    lambda: self.addresses,
                ),
                callbacks=Callbacks(
                    on_applied=self._on_applied,
                    set_gate=self.gates.append,
                    secret_material=self._material,
                    flip=self._flip,
                    execute=self._do,
                    restart=self._restart.set,
                    keep_keys=self._keep_keys,
                    root_key=lambda: MATERIAL.root_key,
                    derived_key=lambda label: hashlib.sha256(MATERIAL.root_key + label).digest(),
                    open_entry=self._open,
                    standalone=self._standalone,
                    gate=self.writes,
                    mounts=self._mounts,
                    reselected=self._reselected,
                ),
                clock=self.clock,
                options=self._options,
            )
        )

    def of(self, mode: Mode) -> ModeManager:
        """The manager of one mode."""
        return self.manager.performance if mode is PERFORMANCE else self.manager.dr

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.listener.close()

    async def _on_applied(self, keys: Sequence[str]) -> None:
        self.applied.extend(keys)

    async def _material(self, keyrings: Collection[str]) -> SecretMaterial:
        return replace(MATERIAL, keyrings={key: KEYRINGS[key] for key in keyrings})

    async def _flip(self, result: ActivationResult) -> None:
        self.flipped.append(result)

    def _mounts(self) -> list[Mount]:
        """Of the entries ``r/core/mounts/<uuid>``, which hold the path."""
        prefix = "r/core/mounts/"
        found = {key[len(prefix) :]: value for key, value in self.store.data.items() if key.startswith(prefix)}
        return [Mount(path.decode(), mount_uuid, "kv") for mount_uuid, path in found.items()]

    async def _reselected(self) -> None:
        self.reselections += 1

    async def _keep_keys(self) -> None:
        self.kept_keys += 1

    async def _open(self, key: str, raw: bytes) -> bytes:
        return raw

    async def _standalone(self) -> Sequence[Write]:
        return []

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
        self.creation_path = ""
        self.paths: dict[str, str] = {}
        self.calls: list[str] = []
        self.address = ""
        self.status_of: Cluster | None = None
        self.status: dict[str, Any] = {}
        self.leader: dict[str, Any] = {}
        self.health: dict[str, Any] = {"version": "0.1.0"}
        self.skew_s = 0

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        self._runner = web.ServerRunner(web.Server(self._handle))
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        self.address = f"http{'s' if tls else ''}://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    def wrap(self, payload: dict[str, Any], claims: dict[str, Any], mode: Mode = PERFORMANCE) -> str:
        jti = f"hvs.{len(self.paths)}"
        self.wrapped[jti] = payload
        self.paths[jti] = mode.creation_path
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
        if request.method == "GET":
            return await self._look(request.path)
        body = json.loads(await request.read())
        token = body.get("token") or request.headers.get("X-Vault-Token", "")
        if token not in self.wrapped:
            return web.json_response({"errors": ["wrapping token is not valid or does not exist"]}, status=400)
        if request.path.endswith("/lookup"):
            return web.json_response({"data": {"creation_path": self.creation_path or self.paths[token]}})
        return web.json_response({"data": self.wrapped.pop(token)})

    async def _look(self, path: str) -> web.StreamResponse:
        """What anybody may see; ``status`` is laid over that of the cluster ``status_of``, None removes a field."""
        if path == "/v1/sys/health":
            now_s = SystemClock().time_ms() // 1000 + self.skew_s
            return web.json_response({"server_time_utc": now_s, **self.health})
        if path == "/v1/sys/leader":
            return web.json_response(self.leader)
        cluster, mode = self.status_of, path.split("/")[4]
        shown = (await cluster.manager.status(mode) if cluster else {}) | self.status
        return web.json_response({"data": {key: value for key, value in shown.items() if value is not None}})


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

    async def token(self, secondary_id: str = "eu", mode: Mode = PERFORMANCE, of: Cluster | None = None) -> str:
        manager = (of or self.primary).manager
        payload, claims = await manager.secondary_token(mode.name, secondary_id, 1800, "")
        return self.api.wrap(payload, claims, mode)

    async def activate(
        self,
        secondary_id: str = "eu",
        options: ReplicationOptions = OPTIONS,
        *,
        mode: Mode = PERFORMANCE,
        of: Cluster | None = None,
    ) -> Cluster:
        """A cluster that was activated, as it is after the flip."""
        fresh = await self.start(f"{secondary_id}-fresh")
        response = await fresh.manager.secondary_enable(mode.name, await self.token(secondary_id, mode, of), "", "", "")
        assert response.warnings == [ENABLING_SECONDARY, PLAIN_HTTP]
        await fresh.stop()
        store = Store(secondary_id)
        store.write(*fresh.flipped[0].entries.items())
        return await self.start(secondary_id, store, options)


@contextlib.asynccontextmanager
async def primary_in(*modes: Mode, primary: Cluster | None = None) -> AsyncIterator[Pair]:
    """A started cluster ``us`` that is primary in ``modes``. All that is started from it is stopped at the end."""
    primary = await (primary or Cluster("us")).start()
    api = PrimaryApi()
    await api.start()
    for mode in modes:
        await primary.manager.primary_enable(mode.name, "")
    pair = Pair(primary, api, [])
    yield pair
    for cluster in (*pair.started, primary):
        await cluster.stop()
    await api.stop()


async def until(what: Callable[[], bool]) -> None:
    """Poll: what is waited for happens in another cluster, which has no event for this one."""
    async with asyncio.timeout(TIMEOUT_S):
        while not what():  # noqa: ASYNC110 - any condition, of other processes too
            await asyncio.sleep(0.01)


def in_step(primary: Cluster, secondary: Cluster, mode: Mode = PERFORMANCE) -> bool:
    """Whether the secondary is connected, streams and holds exactly what travels."""
    service = secondary.of(mode).secondary
    return (
        primary.store.of_classes(mode.classes) == secondary.store.of_classes(mode.classes)
        and service is not None
        and bool(service.connected_to)
        and service.machine.phase is Phase.STREAM_WALS
    )
