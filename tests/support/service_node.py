"""A whole active node without cluster, store or disk: Service and Front behind a real HTTP server on loopback."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, NotFound
from plugin_api.request import Response
from plugin_api.testing import SettableClock
from sidecar.api.front import Front
from sidecar.api.node_view import InitOptions, InitOutcome, LeaderStatus, Member, NodeHealth, SealStatus
from sidecar.api.server import ApiServer, ServerLimits
from sidecar.api.service import Service, ServiceOptions
from sidecar.core.audit.options import LocalRules
from sidecar.core.barrier import load_barrier
from sidecar.core.init import Genesis, build_genesis
from sidecar.core.lockout_rules import LockoutSettings
from sidecar.core.node_settings import Cors
from sidecar.core.seal import UnsealAttempt, combine
from sidecar.core.seal_record import SealRecord, open_root_key
from sidecar.core.seals import AutoSeal, Sealer, prepare
from sidecar.core.usage import UsageSettings
from sidecar.request.in_flight import InFlight
from sidecar.request.plugins import PluginRegistry
from sidecar.request.types import ForwardedAuth, HttpRequest, HttpResponse

API_ADDR = "http://127.0.0.1:8200"


@dataclass(frozen=True)
class Head:
    index: int


class MemoryStore:
    """A LogicalStore in a dict, which counts commits as WAL indexes."""

    def __init__(self, writes: Sequence[Write] = ()) -> None:
        self.entries: dict[str, bytes] = {write.key: write.value for write in writes if write.value is not None}
        self.index = 1
        self.fail_next: Exception | None = None
        self._committed = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds after some commit."""
        async with asyncio.timeout(60):
            while not condition():
                self._committed.clear()
                await self._committed.wait()

    async def get(self, key: str) -> bytes | None:
        return self.entries.get(key)

    async def exists(self, key: str) -> bool:
        return key in self.entries

    async def list(self, prefix: str) -> list[str]:
        names = set()
        for key in self.entries:
            if key.startswith(prefix):
                name, slash, _ = key[len(prefix) :].partition("/")
                names.add(name + slash)
        return sorted(names)

    async def commit(self, writes: Sequence[Write]) -> Head:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        for write in writes:
            if write.value is None:
                self.entries.pop(write.key, None)
            else:
                self.entries[write.key] = write.value
        self.index += 1
        self._committed.set()
        return Head(self.index)


@dataclass
class FakeNode:
    """A NodeView whose state a test sets. ``asked`` collects what the service asked of it."""

    genesis: Genesis
    state: NodeHealth = field(default_factory=lambda: NodeHealth(True, False, False, "disabled", "disabled", "c", "id"))
    leading: LeaderStatus = field(
        default_factory=lambda: LeaderStatus(True, True, 1_700_000_000.0, API_ADDR, "https://h:1")
    )
    service: Service | None = None
    dispatched: Callable[[HttpRequest], Any] | None = None
    asked: list[str] = field(default_factory=list)
    version: str = "0.1.0"
    storage_type: str = "inmem"
    attempt: UnsealAttempt | None = None
    nodes: list[Member] = field(default_factory=list)
    auto_seal: AutoSeal | None = None

    def is_sealed(self) -> bool:
        return self.state.sealed or not self.state.initialized

    async def health(self) -> NodeHealth:
        return self.state

    async def seal_status(self) -> SealStatus:
        progress = self.attempt.progress if self.attempt else 0
        return SealStatus(self.state.initialized, self.state.sealed, 2, 3, progress, "n" if progress else "")

    async def leader(self) -> LeaderStatus:
        return self.leading

    async def members(self) -> list[Member]:
        return self.nodes or [Member("h", API_ADDR, "https://h:1", True, self.version)]

    async def init(self, options: InitOptions) -> InitOutcome:
        if self.state.initialized:
            raise InvalidRequest("Vault is already initialized")
        self.asked.append(f"init {options.shares}/{options.threshold}")
        return InitOutcome(tuple(self.genesis.keys), self.genesis.root_token)

    @property
    def seal_kind(self) -> str:
        return self.auto_seal.kind if self.auto_seal else "shamir"

    async def sealer(self) -> Sealer | None:
        return await prepare(self.auto_seal, os.urandom) if self.auto_seal else None

    async def unseal(self, key: bytes, *, migrate: bool) -> SealStatus:
        self.asked.append(f"unseal {len(key)}{' migrate' if migrate else ''}")
        return await self.seal_status()

    async def reset_unseal(self) -> SealStatus:
        if not self.state.sealed:
            raise InvalidRequest("vault is unsealed")
        return await self.seal_status()

    async def seal(self) -> None:
        self.asked.append("seal")
        self.state = replace(self.state, sealed=True, standby=True)

    async def step_down(self) -> None:
        self.asked.append("step-down")

    def cors(self) -> Cors:
        return self.service.cors if self.service is not None and self.is_active() else Cors()

    def is_active(self) -> bool:
        return not self.state.standby and not self.state.sealed

    async def dispatch(self, request: HttpRequest) -> HttpResponse:
        if self.dispatched is not None:
            answer: HttpResponse = await self.dispatched(request)
            return answer
        assert self.service is not None
        return await self.service.handle(request)


class FakeFilters:
    """Nothing is filtered; calls are noted."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self._calls = calls

    def hidden(self, mount_uuid: str) -> bool:
        return False

    def not_held(self, mount_uuid: str) -> bool:
        return False

    async def set(self, secondary_id: str, mode: str, paths: Sequence[str]) -> None:
        self._calls.append(("filter", secondary_id, mode, tuple(paths)))

    async def delete(self, secondary_id: str) -> None:
        self._calls.append(("no filter", secondary_id))

    def get(self, secondary_id: str) -> dict[str, Any]:
        raise NotFound

    def dynamic(self, kind: str, secondary_id: str) -> dict[str, Any]:
        return {"dynamic_filtered_mounts": [kind], "dynamic_filtered_namespaces": []}

    def lacking(self) -> dict[str, Any]:
        return {"mounts": ["secret/"]}

    async def accept_empty(self, paths: Sequence[str]) -> None:
        self._calls.append(("accept empty", tuple(paths)))

    async def mount_moved(self, source: str, target: str, move: Callable[[], Awaitable[None]]) -> None:
        self._calls.append(("moved", source, target))
        await move()

    async def mount_removed(self, path: str) -> None:
        self._calls.append(("removed", path))


@dataclass
class FakeFound:
    """What a session has seen, by the test's word."""

    missing: bool = False
    upstream: bool = False
    warnings: Sequence[str] = ()


class FakeSessions:
    """Answers ``found`` and notes what was asked; a header is ``<written>|<answered>|<asked>`` where ``telling``."""

    def __init__(self) -> None:
        self.found = FakeFound()
        self.required: list[list[str]] = []
        self.telling = False

    async def require(self, headers: Sequence[str]) -> FakeFound:
        self.required.append(list(headers))
        return self.found

    def after(self, *, written: int, answered: str, asked: bool) -> str:
        return f"{written}|{answered}|{asked}" if self.telling and (written or answered or asked) else ""


class FakeReplication:
    """A ReplicationAPI. With ``primary`` set this is a performance secondary that forwards to that service."""

    def __init__(self, primary: Service | None = None) -> None:
        self.primary = primary
        self.calls: list[tuple[Any, ...]] = []
        self.filters = FakeFilters(self.calls)
        self.sessions = FakeSessions()
        self.lacking: list[str] = []
        self.forwarded: list[tuple[HttpRequest, ForwardedAuth]] = []

    def is_primary_writable(self) -> bool:
        return self.primary is None

    async def forward_to_primary(self, request: HttpRequest, auth: ForwardedAuth) -> HttpResponse:
        assert self.primary is not None
        self.forwarded.append((request, auth))
        return await self.primary.handle(replace(request, forwarded_auth=auth))

    async def lacking_record(self, index: int) -> list[str]:
        self.calls.append(("lacking_record", index))
        return self.lacking

    def require_steady(self) -> None:
        """Never in between."""

    async def status(self, mode: str | None) -> dict[str, Any]:
        one = {"mode": "primary"}
        return {"dr": {"mode": "disabled"}, "performance": one} if mode is None else one

    async def primary_enable(self, mode: str, primary_cluster_addr: str) -> Response:
        self.calls.append(("primary_enable", mode, primary_cluster_addr))
        return Response(warnings=["This cluster is being enabled as a primary for replication."])

    async def primary_disable(self, mode: str) -> Response:
        self.calls.append(("primary_disable", mode))
        return Response(warnings=["disabled"])

    async def secondary_token(
        self,
        mode: str,
        id: str,  # noqa: A002 - the API's own name
        ttl_s: int,
        public_key: str,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        self.calls.append(("secondary_token", mode, id, ttl_s))
        return {"id": id, "client_key": "secret"}, {"ca_sha256": "ab" * 32}

    async def revoke_secondary(self, mode: str, id: str) -> None:  # noqa: A002 - the API's own name
        self.calls.append(("revoke_secondary", mode, id))

    async def merkle_check(self) -> Response:
        self.calls.append(("merkle_check",))
        return Response(data={"merkle_corruption_report": {"corrupted_root": False}})

    async def reindex(self, diff: bool, force: bool, skip_flush: bool, deletions: int) -> Response:
        self.calls.append(("reindex", diff, force, skip_flush, deletions))
        return Response(warnings=["background"])

    async def accept_deletions(self, mode: str, deletions: int) -> Response:
        self.calls.append(("accept_deletions", mode, deletions))
        return Response(warnings=["begins anew"])

    async def recover(self, *, force: bool = False) -> Response:
        self.calls.append(("recover", force))
        return Response(warnings=["recovering"])

    async def secondary_enable(
        self, mode: str, token: str, primary_api_addr: str, ca_file: str, ca_path: str
    ) -> Response:
        self.calls.append(("secondary_enable", mode, token, primary_api_addr))
        return Response(warnings=["found secondary information"])

    async def secondary_preflight(
        self, mode: str, token: str, primary_api_addr: str, ca_file: str, ca_path: str
    ) -> Response:
        self.calls.append(("secondary_preflight", mode, token, primary_api_addr))
        return Response(data={"ready": True, "checks": []})

    async def secondary_public_key(self, mode: str) -> Response:
        self.calls.append(("secondary_public_key", mode))
        return Response(data={"secondary_public_key": "ork1.AA"})

    async def rotate_authority(self, mode: str, overlap_s: float, *, force: bool) -> Response:
        self.calls.append(("rotate_authority", mode, overlap_s, force))
        return Response(warnings=["rotating"])

    async def secondary_disable(self, mode: str) -> Response:
        self.calls.append(("secondary_disable", mode))
        return Response(warnings=["disabled"])

    async def primary_demote(self, mode: str) -> Response:
        self.calls.append(("primary_demote", mode))
        return Response(warnings=["demoted"])

    async def secondary_promote(self, mode: str, primary_cluster_addr: str, *, force: bool, preview: bool) -> Response:
        self.calls.append(("secondary_promote", mode, primary_cluster_addr, force, preview))
        return Response(data={"progress": 0, "required": 1, "complete": False}, warnings=["promoted"])

    async def secondary_update_primary(
        self,
        mode: str,
        token: str,
        *,
        primary_api_addr: str = "",
        ca_file: str = "",
        ca_path: str = "",
        addresses: Sequence[str] = (),
    ) -> Response:
        self.calls.append(("secondary_update_primary", mode, token, primary_api_addr, tuple(addresses)))
        return Response(warnings=["updated"])

    async def lost_writes(self, mode: str) -> Response:
        return Response(data={"lost_writes": []})

    async def lost_writes_read(self, mode: str, name: str, page: str, *, values: bool) -> Response:
        self.calls.append(("lost_writes_read", mode, name, page, values))
        return Response(data={"lost_entries": []})

    async def lost_writes_delete(self, mode: str, name: str) -> None:
        self.calls.append(("lost_writes_delete", mode, name))


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; ``body`` is decoded JSON, None when empty."""

    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def data(self) -> Any:
        return self.body["data"]

    @property
    def errors(self) -> list[str]:
        return list((self.body or {}).get("errors") or [])


@dataclass
class Harness:
    """Everything of one node, with an HTTP client for it."""

    store: MemoryStore
    node: FakeNode
    service: Service
    clock: SettableClock
    address: str
    root: str
    keys: list[bytes]
    replication: FakeReplication | None
    session: aiohttp.ClientSession
    gate: list[str]

    async def call(
        self, method: str, path: str, body: Any = None, *, token: str | None = "root", **headers: str
    ) -> Reply:
        """One request to ``/v1/<path>`` as root, as another token, or (None) without one."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent["X-Vault-Token"] = self.root if token == "root" else token
        async with self.session.request(
            method, f"{self.address}/v1/{path}", json=body, headers=sent, allow_redirects=False
        ) as answer:
            raw = await answer.read()
            return Reply(answer.status, await answer.json() if raw.strip() else None, answer.headers)

    async def token(self, policy: str, **fields: Any) -> str:
        """A token that holds exactly ``policy`` (its HCL text) and the default policy."""
        name = f"p{self.store.index}"
        assert (await self.call("PUT", f"sys/policies/acl/{name}", {"policy": policy})).status == 204
        reply = await self.call("POST", "auth/token/create", {"policies": [name], **fields})
        assert reply.status == 200, reply.errors
        return str(reply.body["auth"]["client_token"])


@asynccontextmanager
async def running(
    *,
    replication: FakeReplication | None = None,
    store: MemoryStore | None = None,
    genesis: Genesis | None = None,
    limits: ServerLimits | None = None,
    api_addr: str = API_ADDR,
    audit: LocalRules | None = None,
    prometheus: bool = True,
    plugins: PluginRegistry | None = None,
    lockout: LockoutSettings | None = None,
    usage: UsageSettings | None = None,
    header_forwarding: bool = False,
    now: Callable[[], float] | None = None,
    wall: Callable[[], float] | None = None,
) -> AsyncIterator[Harness]:
    """A started service behind an HTTP server on a free port. ``now`` in the place of the harness's own clock."""
    clock = SettableClock()
    genesis = genesis or build_genesis(
        shares=3, threshold=2, cluster_name="test", now_s=clock.now_s, random_bytes=os.urandom
    )
    store = store or MemoryStore(genesis.writes)
    unseal_key = combine(genesis.keys[:2])
    record = SealRecord.decode(store.entries["c/core/seal"])
    barrier = await load_barrier(store.get, open_root_key(record, unseal_key))
    node = FakeNode(genesis)
    gate: list[str] = []
    service = Service(
        store,
        barrier,
        genesis.cluster,
        ServiceOptions(
            api_addr=api_addr,
            audit=audit or LocalRules(timeout_s=5.0),
            prometheus=prometheus,
            lockout=lockout or LockoutSettings(),
            usage=usage or UsageSettings(),
        ),
        node=node,
        replication=replication,
        now=now or clock,
        wall=wall,
        gate=lambda: gate[0] if gate else None,
        plugins=plugins,
    )
    node.service = service
    await service.start()
    front = Front(node, now=clock, prometheus=prometheus, header_forwarding=header_forwarding, in_flight=InFlight())
    server = ApiServer(front.handle, limits=limits)
    host, port = await server.listen("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession() as session:
            yield Harness(
                store,
                node,
                service,
                clock,
                f"http://{host}:{port}",
                genesis.root_token,
                genesis.keys,
                replication,
                session,
                gate,
            )
    finally:
        await server.close()
        await service.aclose()


JOINED = "1 error occurred:\n\t* {}\n\n"
DENIED = JOINED.format("permission denied")


async def with_kv(harness: Harness, version: str = "2") -> None:
    """Mount a kv engine at ``secret/``."""
    reply = await harness.call("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": version}})
    assert reply.status == 204, reply.errors


async def with_bob(harness: Harness, **fields: object) -> None:
    """Enable userpass with a user ``bob``, password ``pw``."""
    assert (await harness.call("POST", "sys/auth/userpass", {"type": "userpass"})).status == 204
    reply = await harness.call("POST", "auth/userpass/users/bob", {"password": "pw", **fields})
    assert reply.status == 204, reply.errors


async def log_in(harness: Harness, **headers: str) -> Reply:
    """Log in as ``bob``."""
    return await harness.call("POST", "auth/userpass/login/bob", {"password": "pw"}, token=None, **headers)


@asynccontextmanager
async def primary_and_secondary(*, header_forwarding: bool = False) -> AsyncIterator[tuple[Harness, Harness]]:
    """Two clusters of one set; the secondary forwards to the primary, and :func:`replicate` brings it up to date."""
    async with running() as primary:
        store = MemoryStore()
        store.entries = dict(primary.store.entries)
        upstream = FakeReplication(primary.service)
        async with running(
            replication=upstream, store=store, genesis=primary.node.genesis, header_forwarding=header_forwarding
        ) as secondary:
            yield primary, secondary


async def replicate(primary: Harness, secondary: Harness) -> None:
    """Apply every replicated entry that differs, and tell the secondary's service, as the applier does."""
    old, new = secondary.store.entries, primary.store.entries
    keys = sorted(key for key in {*old, *new} if key.startswith("r/") and old.get(key) != new.get(key))
    for key in keys:
        old.pop(key, None)
        if key in new:
            old[key] = new[key]
    await secondary.service.invalidate(keys)
