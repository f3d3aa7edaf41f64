"""Cluster ports and what lies between them: the sockets of replication, simulated.

Production code dials with a ``PeerClient`` and serves on a ``ClusterListener``; here are both without TCP, TLS and HTTP
(:mod:`tests.sim.clusters.seams` puts them in). What TLS decides is decided here the same way: a certificate of another
authority, an SNI name that nobody serves, or a fingerprint that the purpose does not allow, ends the connection.

A connection keeps order and loses nothing while it lives, as TCP does: what a cut link holds back arrives when it
heals, unless somebody gave up first. Damage to frames of the log happens above that (``tampering``).
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import struct
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from consul_backend.errors import BackendError
from sidecar.replication.channel import ChannelClosed
from sidecar.replication.protocol import CHECKSUM_BYTES
from sidecar.transport.listener import Peer, Purpose
from sidecar.transport.peer import (
    PeerAnswer,
    PeerIdentity,
    PeerOutcomeUnknown,
    PeerRefused,
    PeerStream,
    PeerUnreachable,
    parse_address,
)
from tests.sim.clusters.papers import fingerprint, name_in, vouches
from tests.sim.loop import PROCESS, Process, SimLoop

if TYPE_CHECKING:
    from tests.sim.clusters.node import SetNode

BUFFER_BYTES = 64 * 1024
"""What one direction of a connection holds before its sender waits."""
REQUEST_BYTES = 200
TICK_S = 1e-6
SLOW_BYTES_PER_S = 20_000.0
LOG_TAGS = (3, 4, 9)
"""Records, skips and parts: frames that may be damaged."""


class Watcher(Protocol):
    """Who sees what travels."""

    def crashed(self, process: Process, error: BaseException) -> None:
        """A handler of the cluster port let an error out."""

    def opened(self, server: SetNode, fingerprint: str) -> None:
        """A connection was let in."""

    def sent(self, end: Channel, payload: Any) -> None:
        """An end hands over a frame, undamaged yet."""

    def arrived(self, end: Channel, payload: Any) -> None:
        """A frame reached the process of ``end``."""


@dataclass(slots=True)
class Link:
    """Between two clusters. ``cut`` holds the directions (from, to) that pass nothing."""

    delay_s: float
    cut: set[tuple[str, str]] = field(default_factory=set)
    slow: bool = False
    connections: list[Connection] = field(default_factory=list)


class Links:
    """All links, all cluster ports, and all that is under way. ``tampering``: chance per frame of each damage."""

    def __init__(
        self, loop: SimLoop, seed: int, *, delay_s: float, tampering: Mapping[str, float], watcher: Watcher
    ) -> None:
        self.loop = loop
        self.watcher = watcher
        self.random = random.Random(f"links {seed}")
        self.counts: dict[str, int] = {}
        self.tampering: Mapping[str, float] = {}
        self._wanted = dict(tampering)
        self._delay_s = delay_s
        self._links: dict[frozenset[str], Link] = {}
        self._where: dict[Process, str] = {}
        self._nodes: dict[str, SetNode] = {}
        self._context = contextvars.Context()

    # -- who is where

    def place(self, process: Process, cluster: str) -> None:
        """A process runs in that cluster."""
        self._where[process] = cluster

    def listen(self, host: str, node: SetNode) -> None:
        """From now on ``host`` is that node."""
        self._nodes[host] = node

    def cluster_of(self, process: Process) -> str:
        """Where a process runs."""
        return self._where[process]

    def node_at(self, address: str) -> SetNode | None:
        """Who listens there."""
        return self._nodes.get(parse_address(address)[0])

    def link(self, one: str, other: str) -> Link:
        """Between two clusters, both ways."""
        found = self._links.get(frozenset((one, other)))
        if found is None:
            found = self._links[frozenset((one, other))] = Link(self._delay_s)
        return found

    # -- trouble

    def begin_tampering(self) -> None:
        """From here on frames of the log may be damaged."""
        self.tampering = self._wanted

    def cut(self, one: str, other: str, *, both: bool) -> None:
        """Nothing passes from ``one`` to ``other``; with ``both`` nor back."""
        self.link(one, other).cut |= {(one, other), (other, one)} if both else {(one, other)}

    def mend(self, one: str, other: str) -> None:
        """Everything passes again, what waited first."""
        link = self.link(one, other)
        link.cut.clear()
        link.slow = False
        for connection in list(link.connections):
            connection.flush()

    def reset(self, one: str, other: str) -> None:
        """Every connection between two clusters breaks."""
        for connection in list(self.link(one, other).connections):
            connection.abort()

    def heal(self) -> None:
        """No trouble from here on."""
        self.tampering = {}
        for pair in sorted(self._links, key=sorted):
            self.mend(*sorted(pair))
            for connection in list(self._links[pair].connections):
                if connection.damaged:  # TCP would not keep one that lost something
                    connection.abort()

    def died(self, process: Process) -> None:
        """A process was killed: its host resets what it had open."""
        for link in list(self._links.values()):
            for connection in list(link.connections):
                for end in (connection.client, connection.server):
                    if end.process is process:
                        connection.abort(by=end)

    # -- carrying

    def carry(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """One packet, lost if the link is cut when it arrives."""

        def arrive() -> None:
            if (source, target) not in self.link(source, target).cut:
                deliver()

        self.loop.call_later(self.delay_s(source, target), arrive, context=self._context.copy())

    def delay_s(self, source: str, target: str) -> float:
        """Of the next packet."""
        return 0.5 * self.link(source, target).delay_s + self.random.expovariate(2 / self.link(source, target).delay_s)

    def later(self, at_s: float, deliver: Callable[[], None]) -> None:
        """Outside every process."""
        self.loop.call_at(at_s, deliver, context=self._context.copy())

    async def dial(self, identity: PeerIdentity, address: str, timeout_s: float) -> Connection:
        """A connection past handshake and allow list. Raises PeerUnreachable."""
        me = PROCESS.get()
        if me is None:
            raise AssertionError("only a process dials")
        node = self.node_at(address)
        if node is None:
            raise PeerUnreachable(f"{address}: unknown host")
        mine, theirs = self._where[me], self._where[node.process]
        answer: asyncio.Future[Connection | str] = self.loop.create_future()

        def settle(outcome: Connection | str) -> None:
            if not answer.done():
                answer.set_result(outcome)
            elif isinstance(outcome, Connection):
                outcome.abort(by=outcome.client)

        async def accept() -> None:
            await asyncio.sleep(0)
            outcome = node.port.admit(self, identity, me, (mine, theirs))
            self.carry(theirs, mine, lambda: settle(outcome))

        def knock() -> None:
            if node.process.killed:
                self.carry(theirs, mine, lambda: settle("connection refused"))
            else:
                node.process.spawn(accept())

        self.carry(mine, theirs, knock)
        try:
            outcome = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise PeerUnreachable(f"{address}: no connection within {timeout_s:g} s") from None
        if isinstance(outcome, str):
            raise PeerUnreachable(f"{address}: {outcome}")
        return outcome


class _End:
    """A word about the connection, behind the last frame."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Channel:
    """One end of a connection (:class:`sidecar.replication.channel.Channel`). Payloads are frames, or tuples that an
    exchange of HTTP would be."""

    def __init__(self, connection: Connection, process: Process, cluster: str, *, is_server: bool) -> None:
        self.connection = connection
        self.process = process
        self.cluster = cluster
        self.is_server = is_server
        self.carries_log = False
        self.peer: Channel = self
        self.closed = ""
        self._frames: deque[Any] = deque()
        self._changed = asyncio.Event()
        self._unread_bytes = 0
        self._stalled: deque[tuple[Any, int]] = deque()
        self._last_at_s = 0.0
        self._swapped: bytes | None = None

    @property
    def socket(self) -> Channel:
        """Where production code wants the response of the upgrade."""
        return self

    async def send(self, frame: Any) -> None:
        """As a websocket's."""
        await asyncio.sleep(0)
        if self.closed:
            raise ChannelClosed(self.closed)
        links = self.connection.links
        links.watcher.sent(self, frame)
        for one in self._damaged(frame):
            while self.peer._unread_bytes >= BUFFER_BYTES:
                self.peer._changed.clear()
                await self.peer._changed.wait()
                if self.closed:
                    raise ChannelClosed(self.closed)
            self.push(one)

    def push(self, payload: Any) -> None:
        """Let something travel to the other end, in order."""
        links, size = self.connection.links, len(payload) if isinstance(payload, bytes) else REQUEST_BYTES
        self.peer._unread_bytes += size
        link = links.link(self.cluster, self.peer.cluster)
        ready_s = links.loop.time() + links.delay_s(self.cluster, self.peer.cluster)
        behind_s = self._last_at_s + TICK_S  # what is ready in one moment runs in any order
        self._last_at_s = max(ready_s, behind_s) + (size / SLOW_BYTES_PER_S if link.slow else 0.0)
        links.later(self._last_at_s, lambda: self._arrive(payload, size))

    def _arrive(self, payload: Any, size: int) -> None:
        if self._stalled or (self.cluster, self.peer.cluster) in self.connection.link.cut:
            self._stalled.append((payload, size))
        else:
            self.peer._deliver(payload, size)

    def flush(self) -> None:
        """What a cut link held back goes on."""
        while self._stalled:
            self.peer._deliver(*self._stalled.popleft())

    def _deliver(self, payload: Any, size: int) -> None:
        if self.closed:  # nobody is there any more: the host says so
            self.connection.links.carry(self.cluster, self.peer.cluster, lambda: self.peer.broken("connection reset"))
            return
        if isinstance(payload, bytes):
            self.connection.links.watcher.arrived(self, payload)
        self._frames.append((payload, size))
        self._changed.set()

    async def recv(self) -> Any:
        """As a websocket's."""
        while not self._frames:
            if self.closed:
                raise ChannelClosed(self.closed)
            self._changed.clear()
            await self._changed.wait()
        payload, size = self._frames.popleft()
        self._unread_bytes -= size
        self._changed.set()
        if isinstance(payload, _End):
            self.broken(payload.reason)
            raise ChannelClosed(payload.reason)
        return payload

    async def close(self, reason: str) -> None:
        """End it in order: what was sent still arrives."""
        await asyncio.sleep(0)
        if not self.closed:
            self.push(_End(f"the peer closed the stream: {reason}"))
            self.broken(reason or "closed")

    def broken(self, reason: str) -> None:
        """This end is of no use any more."""
        if not self.closed:
            self.closed = reason
            self._changed.set()
            self.peer._changed.set()
        if self.peer.closed and self.connection in self.connection.link.connections:
            self.connection.link.connections.remove(self.connection)

    def _damaged(self, frame: Any) -> list[Any]:
        """What becomes of a frame of the log above TLS."""
        links = self.connection.links
        if not links.tampering or not self.carries_log or not isinstance(frame, bytes) or tag_of(frame) not in LOG_TAGS:
            return [frame]
        rnd = links.random
        kind = next((kind for kind, chance in links.tampering.items() if rnd.random() < chance), "")
        before, self._swapped = self._swapped, None
        self.connection.damaged = self.connection.damaged or bool(kind)
        if kind == "swap" and before is None:
            self._swapped = frame
            links.counts[kind] = links.counts.get(kind, 0) + 1
            return []
        out = {"drop": [], "duplicate": [frame, frame]}.get(kind, [frame])
        if kind in ("flip", "forge"):
            out = [damaged(frame, rnd, forged=kind == "forge")]
        if kind:
            links.counts[kind] = links.counts.get(kind, 0) + 1
        return [*out, before] if before is not None else out


class Connection:
    """Two ends, and who dialled."""

    def __init__(self, links: Links, client: Process, server: Process, ways: tuple[str, str], peer: Peer) -> None:
        self.links = links
        self.link = links.link(*ways)
        self.peer = peer
        self.damaged = False
        self.client = Channel(self, client, ways[0], is_server=False)
        self.server = Channel(self, server, ways[1], is_server=True)
        self.client.peer, self.server.peer = self.server, self.client
        self.link.connections.append(self)

    def abort(self, by: Channel | None = None) -> None:
        """Reset, by one end or by the network: what is under way is lost. An end that a cut link hides from the one
        that reset it learns of it later."""
        for end in (self.client, self.server):
            if end is not by and (end.peer.cluster, end.cluster) in self.link.cut:
                end.peer._stalled.append((_End("connection reset"), 0))
                continue
            end._frames.clear()
            end._unread_bytes = 0
            end.broken("connection reset")

    def flush(self) -> None:
        """The link passes everything again."""
        self.client.flush()
        self.server.flush()


def tag_of(frame: bytes) -> int:
    """The type number of a frame's payload: a msgpack array that begins with it."""
    at = CHECKSUM_BYTES
    first = frame[at]
    at += 1 if first & 0xF0 == 0x90 else 3
    return frame[at]


def damaged(frame: bytes, rnd: random.Random, *, forged: bool) -> bytes:
    """The frame with one byte changed; ``forged``: and its checksum put right."""
    place = rnd.randrange(CHECKSUM_BYTES + 8, len(frame)) if len(frame) > CHECKSUM_BYTES + 8 else len(frame) - 1
    changed = frame[:place] + bytes([frame[place] ^ (1 << rnd.randrange(8))]) + frame[place + 1 :]
    if not forged or tag_of(frame) == 4:  # a skip has nothing but its hash: whoever forges that forges the log
        return changed
    payload = changed[CHECKSUM_BYTES:]
    return struct.pack(">I", zlib.crc32(payload)) + payload


# ---- the listening side


@dataclass(slots=True)
class _Entry:
    purpose: Purpose
    connections: list[Connection] = field(default_factory=list)
    handlers: set[asyncio.Task[None]] = field(default_factory=set)


class Request:
    """What a handler gets: the part of ``web.BaseRequest`` that production code reads."""

    def __init__(self, method: str, path: str, body: bytes, channel: Channel, peer: Peer) -> None:
        self.method = method
        self.path = path
        self.channel = channel
        self.peer = peer
        self._body = body

    async def read(self) -> bytes:
        """The whole body."""
        return self._body


class StreamResponse:
    """A long answer: pieces behind a status."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.status = 200
        self._channel: Channel | None = None

    async def prepare(self, request: Request) -> None:
        self._channel = request.channel
        await request.channel.send(("status", 200, b""))

    async def write(self, piece: bytes) -> None:
        assert self._channel is not None
        try:
            await self._channel.send(piece)
        except ChannelClosed as closed:
            raise ConnectionResetError(str(closed)) from None

    async def write_eof(self) -> None:
        assert self._channel is not None
        await self._channel.close("eof")


class Port:
    """One process's ``ClusterListener``."""

    def __init__(self, links: Links, node: SetNode) -> None:
        self._links = links
        self._node = node
        self._entries: dict[str, _Entry] = {}

    def add(self, purpose: Purpose) -> None:
        """Serve it from now on."""
        if purpose.sni in self._entries:
            raise ValueError(f"the cluster port serves {purpose.sni} already")
        self._entries[purpose.sni] = _Entry(purpose)

    def renew(self, sni: str, credentials: object, trust_root_pem: bytes) -> None:
        """Certificates do not age here."""

    async def remove(self, sni: str) -> None:
        """Stop serving it: abort, cancel."""
        entry = self._entries.pop(sni, None)
        if entry is None:
            return
        for connection in list(entry.connections):
            connection.abort(by=connection.server)
        handlers = sorted(entry.handlers, key=hash)
        for handler in handlers:
            handler.cancel()
        if handlers:
            await asyncio.wait(handlers, timeout=1.0)

    def cut(self, client_fingerprint: str) -> int:
        """Abort what was opened with that certificate."""
        doomed = [
            connection
            for entry in self._entries.values()
            for connection in entry.connections
            if connection.peer.fingerprint == client_fingerprint
        ]
        for connection in doomed:
            connection.abort(by=connection.server)
        return len(doomed)

    def admit(self, links: Links, identity: PeerIdentity, client: Process, ways: tuple[str, str]) -> Connection | str:
        """What the handshake and the allow list say to whoever dials."""
        entry = self._entries.get(identity.sni)
        if entry is None or entry.purpose.alpn != identity.alpn:
            return "the TLS handshake was refused"
        if not vouches(identity.authority_pem, entry.purpose.credentials.certificate_pem):
            return "the server's certificate is not of the expected authority or name"
        shown = identity.credentials.certificate_pem
        if not vouches(entry.purpose.trust_root_pem, shown) or not entry.purpose.allow(fingerprint(shown)):
            return "the connection was ended without an answer"
        peer = Peer(fingerprint(shown), name_in(shown), ways[0])
        connection = Connection(links, client, self._node.process, ways, peer)
        entry.connections.append(connection)
        links.watcher.opened(self._node, peer.fingerprint)
        handler = self._node.process.spawn(self._serve(entry, connection))
        entry.handlers.add(handler)
        handler.add_done_callback(entry.handlers.discard)
        return connection

    async def _serve(self, entry: _Entry, connection: Connection) -> None:
        channel = connection.server
        try:
            method, path, body = await channel.recv()
            request = Request(method, path, body, channel, connection.peer)
            if not entry.purpose.allow(connection.peer.fingerprint):
                connection.abort(by=channel)
                return
            response = await entry.purpose.handler(request)  # type: ignore[arg-type]  # the part of one that is read
            if isinstance(response, web.Response):
                raw = response.body
                await channel.send(("status", response.status, bytes(raw) if isinstance(raw, bytes) else b""))
                await channel.close("done")
        except (ChannelClosed, ConnectionError, BackendError):
            connection.abort(by=channel)  # as aiohttp does with a handler that failed, once it has begun to answer
        except Exception as error:  # whatever it is, production code let it out
            connection.abort(by=channel)
            self._links.watcher.crashed(self._node.process, error)
        finally:
            entry.connections.remove(connection)


async def accept_websocket(request: Request) -> Channel:
    """The server's side of an upgrade."""
    await request.channel.send(("status", 101, b""))
    request.channel.carries_log = True
    return request.channel


# ---- the dialling side


def make_client(links: Links) -> type:
    """The class that stands for ``PeerClient`` in this world."""

    class Client:
        def __init__(
            self, identity: PeerIdentity, address: str, *, connect_timeout_s: float = 5.0, connections_max: int = 64
        ) -> None:
            parse_address(address)
            self.address = address
            self._identity = identity
            self._timeout_s = connect_timeout_s
            self._open: list[Connection] = []

        async def _dial(self) -> Connection:
            connection = await links.dial(self._identity, self.address, self._timeout_s)
            self._open = [one for one in self._open if not one.client.closed] + [connection]
            return connection

        async def post(
            self, path: str, body: bytes, *, timeout_s: float, answer_bytes_max: int = 0, headers: object = None
        ) -> PeerAnswer:
            try:
                async with asyncio.timeout(timeout_s):
                    connection = await self._dial()
                    try:
                        await connection.client.send(("POST", path, body))
                        _, status, answer = await connection.client.recv()
                        return PeerAnswer(status, answer)
                    finally:
                        await connection.client.close("done")
            except TimeoutError:
                raise PeerOutcomeUnknown(f"{self.address}: no answer within {timeout_s:g} s") from None
            except ChannelClosed as closed:
                raise PeerOutcomeUnknown(f"{self.address}: {closed}") from None

        @asynccontextmanager
        async def stream(self, path: str, body: bytes, *, idle_timeout_s: float) -> AsyncIterator[PeerStream]:
            connection = await self._dial()
            channel = connection.client
            try:
                try:
                    await channel.send(("POST", path, body))
                    async with asyncio.timeout(idle_timeout_s):
                        _, status, _ = await channel.recv()
                except (ChannelClosed, TimeoutError) as error:
                    raise PeerOutcomeUnknown(f"{self.address}: {error}") from None
                yield PeerStream(status, self._pieces(channel, idle_timeout_s))
            finally:
                await channel.close("done")

        async def _pieces(self, channel: Channel, idle_timeout_s: float) -> AsyncIterator[bytes]:
            while True:
                try:
                    async with asyncio.timeout(idle_timeout_s):
                        piece = await channel.recv()
                except (ChannelClosed, TimeoutError) as error:
                    if str(error).endswith("eof"):
                        return
                    raise PeerOutcomeUnknown(f"{self.address}: {error}") from None
                yield piece

        async def websocket(
            self, path: str, *, message_bytes_max: int, open_timeout_s: float = 10.0, headers: object = None
        ) -> Channel:
            connection = await self._dial()
            try:
                async with asyncio.timeout(open_timeout_s):
                    await connection.client.send(("GET", path, b""))
                    _, status, _ = await connection.client.recv()
            except (ChannelClosed, TimeoutError) as error:
                connection.abort(by=connection.client)
                raise PeerUnreachable(f"{self.address}: {error}") from None
            if status != 101:
                await connection.client.close("refused")
                raise PeerRefused(status, f"{self.address} answered {status} to {path}")
            return connection.client

        async def close(self) -> None:
            for connection in self._open:
                if not connection.client.closed:
                    await connection.client.close("the client was closed")

    return Client
