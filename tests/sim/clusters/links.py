"""What lies between clusters: links with their troubles, connections, and the frames on their way.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sidecar.replication.channel import ChannelClosed
from sidecar.replication.protocol import CHECKSUM_BYTES
from sidecar.transport.listener import Peer
from sidecar.transport.peer import (
    PeerIdentity,
    PeerUnreachable,
    parse_address,
)
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
        self._under_way = 0
        self._heard_at_s = connection.links.loop.time()

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
        self._under_way += 1
        links.later(self._last_at_s, lambda: self._arrive(payload, size))

    def _arrive(self, payload: Any, size: int) -> None:
        self._under_way -= 1
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
        self._heard_at_s = self.connection.links.loop.time()
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

    def silent_s(self) -> float:
        """As of a socket: over a slow link something comes in all the time."""
        link = self.connection.link
        if link.slow and self.peer._under_way and (self.peer.cluster, self.cluster) not in link.cut:
            return 0.0
        return self.connection.links.loop.time() - self._heard_at_s

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
