"""Between the nodes of one cluster: a standby hands requests to the active node over the cluster port.

Each tenure has its own trust root. Its client certificate reaches the standbys through the store, encrypted by the
barrier, so whoever can open it is an unsealed node of this cluster; its SNI name stands in the lock's value.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from consul_backend.deadline import time_limit
from consul_backend.election import LeaderInfo
from consul_backend.physical import PhysicalStore
from consul_backend.replicated import read_entry
from plugin_api.errors import PluginError
from sidecar.api.node_view import NotForwarded
from sidecar.core.barrier import load_barrier
from sidecar.core.cluster import ClusterInfo
from sidecar.core.metrics import METRICS
from sidecar.core.node_settings import Cors
from sidecar.request.types import HttpRequest, HttpResponse
from sidecar.sealing import Opened
from sidecar.transport.certificates import Credentials, issue_client, issue_server, make_authority
from sidecar.transport.forwarding import (
    ECHO_PATH,
    FORWARD_PATH,
    KEYS_PATH,
    Echo,
    EchoReply,
    ForwardNotSent,
    ForwardOutcomeUnknown,
    ForwardRequest,
    ForwardResponse,
    KeysReply,
    KeysRequest,
    MalformedMessage,
    decode,
    encode,
    forwarded,
    header_pairs,
    send_echo,
    send_forward,
    send_keys,
)
from sidecar.transport.listener import Purpose
from sidecar.transport.peer import PeerClient, PeerIdentity
from sidecar.transport.trail import INNER, LoopRefused, arrived, extend, trail_of

log = logging.getLogger("core.request-forwarding")

ALPN = "req_fw_sb-act_v1"
LEADER_KEY = "c/core/leader"
PEER_TTL_S = 15.0
"""A standby not heard of for this long is no longer named as an address of this cluster."""


class LeaderRecord(msgspec.Struct, frozen=True):
    """What a standby needs to dial the active node of one tenure (PEM), and to say which cluster it belongs to."""

    sni: str
    cluster_id: str
    cluster_name: str
    authority_pem: bytes
    certificate_pem: bytes
    key_pem: bytes

    def __repr__(self) -> str:
        return f"LeaderRecord({self.sni})"


@dataclass(frozen=True, slots=True)
class TenureCredentials:
    """One tenure's forwarding trust: the server half stays here, the record goes to the standbys."""

    sni: str
    authority_pem: bytes = field(repr=False)
    server: Credentials = field(repr=False)
    client: Credentials = field(repr=False)

    @classmethod
    def make(cls) -> TenureCredentials:
        """A fresh trust root, P-521 throughout."""
        sni = f"fw-{uuid.uuid4()}"
        authority = make_authority(sni)
        return cls(sni, authority.certificate_pem, issue_server(authority, sni), issue_client(authority, "standby"))

    def record(self, cluster: ClusterInfo) -> LeaderRecord:
        """What the standbys of ``cluster`` read."""
        return LeaderRecord(
            self.sni,
            cluster.cluster_id,
            cluster.cluster_name,
            self.authority_pem,
            self.client.certificate_pem,
            self.client.key_pem,
        )


@dataclass(frozen=True, slots=True)
class Heard:
    """A standby's newest heartbeat, and when it came by both clocks (seconds)."""

    echo: Echo
    monotonic_s: float
    unix_s: float

    @property
    def skew_ms(self) -> int:
        """How far the standby's wall clock is ahead of this node's; half of the way there and back is the way here."""
        if not self.echo.clock_ms:
            return 0
        return self.echo.clock_ms + self.echo.echo_ms // 2 - int(self.unix_s * 1000)


@dataclass(frozen=True, slots=True)
class Told:
    """What the active node tells the standbys of its cluster with every heartbeat."""

    modes: tuple[str, str]
    head_index: int
    canary_age_ms: int
    cors: Cors
    head_hash: bytes = b""


def from_message(message: ForwardRequest) -> HttpRequest:
    """The request as the sender had it; identity and trail come from the message, never from a header."""
    return HttpRequest(
        method=message.method,
        path=message.path,
        query=message.query,
        headers=CIMultiDict(message.headers),
        body=message.body,
        remote_address=message.remote_address,
        remote_port=message.remote_port,
        raw_target=message.raw_target,
        trail=tuple((hop.cluster_id, hop.kind) for hop in message.trail),
    )


class ForwardingServer:
    """The active node's end: runs forwarded requests, and keeps the list of this cluster's nodes. ``root_key_of``: of
    the generation by which this tenure replaced the cluster's store; None for any other."""

    def __init__(
        self,
        credentials: TenureCredentials,
        *,
        cluster_id: str,
        own_cluster_addr: str,
        handle: Callable[[HttpRequest], Awaitable[HttpResponse]],
        told: Callable[[], Told],
        root_key_of: Callable[[str], bytes | None] = lambda generation: None,
        first_heard: Callable[[Echo], None] = lambda echo: None,
    ) -> None:
        self._root_key_of = root_key_of
        self._credentials = credentials
        self._cluster_id = cluster_id
        self._own_cluster_addr = own_cluster_addr
        self._handle = handle
        self._told = told
        self._first_heard = first_heard
        self._standbys: dict[str, Heard] = {}

    def purpose(self) -> Purpose:
        """What the cluster port serves for the standbys of this tenure."""
        return Purpose(
            sni=self._credentials.sni,
            alpn=ALPN,
            credentials=self._credentials.server,
            trust_root_pem=self._credentials.authority_pem,
            handler=self._serve,
            allow=lambda _fingerprint: True,
        )

    def standbys(self) -> list[Heard]:
        """The standbys heard of lately, each with its newest heartbeat."""
        cutoff = time.monotonic() - PEER_TTL_S
        self._standbys = {name: heard for name, heard in self._standbys.items() if heard.monotonic_s >= cutoff}
        return list(self._standbys.values())

    def cluster_addresses(self) -> list[str]:
        """This node's cluster address first, then those of the standbys heard of lately."""
        return [self._own_cluster_addr, *(heard.echo.cluster_addr for heard in self.standbys())]

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method != "POST":
            return web.Response(status=405)
        try:
            if request.path == FORWARD_PATH:
                message = decode(await request.read(), ForwardRequest)
                arrived(message.trail, self._cluster_id, INNER)
                async with time_limit(message.time_left_s):
                    answer = await self._handle(from_message(message))
                reply = ForwardResponse(answer.status, header_pairs(answer.headers.items()), answer.body)
                return web.Response(body=encode(reply))
            if request.path == ECHO_PATH:
                return web.Response(body=encode(self._echo(decode(await request.read(), Echo))))
            if request.path == KEYS_PATH:
                return self._keys(decode(await request.read(), KeysRequest))
        except MalformedMessage as error:
            return web.Response(status=400, text=str(error))
        except LoopRefused as error:
            return web.Response(status=error.status, text=str(error))
        except NotForwarded as error:
            return web.Response(status=503, text=str(error))
        except TimeoutError:
            return web.Response(status=504, text="the request took too long here and was given up")
        return web.Response(status=404)

    def _keys(self, asked: KeysRequest) -> web.Response:
        """Whoever is connected held the root key of the store before: it is an unsealed node of this cluster."""
        root_key = self._root_key_of(asked.generation)
        if root_key is None:
            return web.Response(status=409, text="this node did not make that store, or is sealed")
        log.info("a standby was given the root key of store generation %s", asked.generation)
        return web.Response(body=encode(KeysReply(root_key)))

    def _echo(self, echo: Echo) -> EchoReply:
        if echo.node_id not in self._standbys:
            self._first_heard(echo)
        self._standbys[echo.node_id] = Heard(echo, time.monotonic(), time.time())
        told = self._told()
        return EchoReply(
            self.cluster_addresses(),
            *told.modes,
            told.head_index,
            clock_ms=int(time.time() * 1000),
            canary_age_ms=told.canary_age_ms,
            cors_origins=told.cors.origins if told.cors.enabled else (),
            cors_headers=told.cors.headers,
            head_hash=told.head_hash,
        )


class StandbyForwarder:
    """A standby's end, for one leader. Made when its record can be read; closed when the leader changes."""

    def __init__(self, leader: LeaderInfo, record: LeaderRecord, *, timeout_s: float) -> None:
        self.leader = leader
        self.cluster = ClusterInfo(record.cluster_id, record.cluster_name)
        self._timeout_s = timeout_s
        self._client = PeerClient(_identity(record), leader.cluster_addr)
        self._in_flight = 0
        self._retiring = False
        self._idle = asyncio.Event()

    async def forward(self, request: HttpRequest) -> HttpResponse:
        """Run ``request`` on the active node, once. Raises NotForwarded (certainly not handled), PluginError (unknown
        outcome)."""
        if self._retiring:
            raise NotForwarded(f"the active node {self.leader.node_id} is being left")
        self._in_flight += 1
        try:
            with METRICS.timer("ha.rpc.client.forward"):
                return await self._forward(request)
        except (PluginError, NotForwarded):
            METRICS.increment("ha.rpc.client.forward.errors")
            raise
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def _forward(self, request: HttpRequest) -> HttpResponse:
        try:
            trail = extend(trail_of(request.trail), self.cluster.cluster_id, INNER)
            answer = await send_forward(self._client, forwarded(request, trail), timeout_s=self._timeout_s)
        except LoopRefused as error:
            raise PluginError(str(error)) from error
        except ForwardNotSent as error:
            raise NotForwarded(f"the active node {self.leader.node_id} did not take the request: {error}") from error
        except ForwardOutcomeUnknown as error:
            raise PluginError(
                f"the request was forwarded and its answer was lost ({error}): the outcome is unknown, "
                "read before you repeat it"
            ) from error
        return HttpResponse(answer.status, CIMultiDict(answer.headers), answer.body)

    async def echo(self, echo: Echo) -> EchoReply:
        """One heartbeat. Raises ForwardNotSent."""
        try:
            with METRICS.timer("ha.rpc.client.echo"):
                return await send_echo(self._client, echo)
        except ForwardNotSent:
            METRICS.increment("ha.rpc.client.echo.errors")
            raise

    async def retire(self, linger_s: float) -> None:
        """Forward nothing more, wait for the answers under way, but not longer than ``linger_s``, and close."""
        self._retiring = True
        self._idle.clear()
        try:
            if self._in_flight:
                async with asyncio.timeout(linger_s):
                    await self._idle.wait()
        except TimeoutError:
            log.warning("left the node %s with %d requests unanswered", self.leader.node_id, self._in_flight)
        finally:
            await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()


class KeySource:
    """Where a standby gets the root key from when the active node it followed has replaced their cluster's store. That
    node answers by the credentials of the tenure in which it did, also after that has ended."""

    def __init__(self, leader: LeaderInfo, record: LeaderRecord) -> None:
        self._leader = leader
        self._record = record

    async def root_key_of(self, generation: str, *, timeout_s: float, retry_s: float = 0.2) -> bytes | None:
        """Ask until it answers, bounded; None when it did not."""
        client = PeerClient(_identity(self._record), self._leader.cluster_addr)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await send_keys(client, generation)
                    except ForwardNotSent as error:  # it may not have noticed yet that its change was carried out
                        log.debug("no root key from %s: %s", self._leader.node_id, error)
                    await asyncio.sleep(retry_s)
        except TimeoutError:
            return None
        finally:
            await client.close()


def _identity(record: LeaderRecord) -> PeerIdentity:
    return PeerIdentity(
        sni=record.sni,
        alpn=ALPN,
        credentials=Credentials(record.certificate_pem, record.key_pem),
        authority_pem=record.authority_pem,
    )


async def read_leader_record(physical: PhysicalStore, opened: Opened, sni: str) -> LeaderRecord | None:
    """The record of the tenure named ``sni``, or None while the new leader has not written it yet.

    Raises BackendError, and DecryptionFailed where the entry is not this cluster's.
    """

    async def read(key: str) -> bytes | None:
        return await read_entry(physical, opened.generation.id, key)

    blob = await read(LEADER_KEY)
    if blob is None:
        return None
    barrier = await load_barrier(read, opened.root_key)
    record = msgspec.msgpack.decode(barrier.open(LEADER_KEY, blob), type=LeaderRecord)
    return record if record.sni == sni else None
