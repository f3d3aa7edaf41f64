"""What travels between clusters, watched at both ends of every connection.

* P5: a secondary acknowledges as durable only what its store holds.
* P10: a forecast knows of every record that its secondary was told of.
* P12: nothing goes to a secondary after its revocation was answered, and nobody with its certificate is let in.
* flow: no more is under way to a secondary than its window and one frame.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from consul_backend.wal import Record
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.protocol import (
    Ack,
    Heartbeat,
    PartFrame,
    ProtocolViolation,
    RecordFrame,
    Skip,
    decode_from_primary,
    decode_from_secondary,
)
from tests.sim.clusters.links import Channel, Connection, tag_of
from tests.sim.loop import Process
from tests.sim.witness import Violation

if TYPE_CHECKING:
    from tests.sim.clusters.node import SetNode
    from tests.sim.clusters.world import SetWorld

RECORD, SKIP, ACK, HEARTBEAT, PART = 3, 4, 6, 7, 9


@dataclass(slots=True)
class Flow:
    """What is under way on one stream, by the last record of each frame."""

    frames: deque[tuple[int, int]] = field(default_factory=deque)
    bytes: int = 0
    part_bytes: int = 0


class StreamWatch:
    """One world's; the watcher of its links."""

    def __init__(self, world: SetWorld) -> None:
        self._world = world
        self._revoked: dict[tuple[str, str], float] = {}
        self._flows: dict[Connection, Flow] = {}
        self._heard: dict[object, list[tuple[float, int]]] = {}

    # -- what the links tell

    def crashed(self, process: Process, error: BaseException) -> None:
        """See :class:`tests.sim.clusters.links.Watcher`."""
        self._world.report(Violation("crash", f"{process.name} crashed serving its cluster port: {error!r}"))

    def opened(self, server: SetNode, fingerprint: str) -> None:
        """A connection was let in."""
        if (server.cluster.name, fingerprint) in self._revoked:
            self._world.report(Violation("P12", f"{server.process.name} lets in a certificate that is revoked"))

    def sent(self, end: Channel, payload: Any) -> None:
        """An end hands over a frame."""
        if end.is_server and (end.cluster, end.connection.peer.fingerprint) in self._revoked:
            self._world.report(Violation("P12", f"{end.process.name} goes on sending to a secondary that is revoked"))
        if not isinstance(payload, bytes):
            return
        tag = tag_of(payload)
        if end.is_server and end.carries_log:
            self._shipped(end, payload, tag)
        elif not end.is_server and tag == ACK and end.peer.carries_log:
            self._acknowledged(end, payload)

    def arrived(self, end: Channel, payload: Any) -> None:
        """A frame reached its end."""
        if end.is_server:
            if tag_of(payload) == ACK and end.carries_log:
                self._acked(end, payload)
        elif tag_of(payload) == HEARTBEAT and end.peer.carries_log:
            self._told_head(end, payload)

    # -- judging

    def revoked(self, cluster: str, fingerprints: tuple[str, ...]) -> None:
        """The revocation of these certificates was answered."""
        for one in fingerprints:
            self._revoked[cluster, one] = self._world.loop.time()

    def _shipped(self, end: Channel, raw: bytes, tag: int) -> None:
        if tag not in (RECORD, SKIP, PART):
            return
        flow = self._flows.setdefault(end.connection, Flow())
        frame = decode_from_primary(raw)
        if isinstance(frame, PartFrame):
            flow.part_bytes += len(raw)
            return
        options = self._world.plan.replication
        records = flow.frames[-1][0] - flow.frames[0][0] + 1 if flow.frames else 0
        if flow.frames and (records > options.window_records + 16 or flow.bytes >= options.window_bytes):
            what = f"{end.process.name} has {records} records and {flow.bytes} bytes under way to {end.peer.cluster}"
            self._world.report(Violation("flow", f"{what} and sends another frame"))
        last = Record.decode(frame.raw).index if isinstance(frame, RecordFrame) else 0
        if isinstance(frame, Skip):
            last = frame.last
        size = len(raw) + flow.part_bytes
        flow.part_bytes = 0
        flow.frames.append((last, size))
        flow.bytes += size

    def _acked(self, end: Channel, raw: bytes) -> None:
        flow = self._flows.get(end.connection)
        frame = decode_from_secondary(raw)
        if flow is None or not isinstance(frame, Ack):
            return
        while flow.frames and flow.frames[0][0] <= frame.applied:
            flow.bytes -= flow.frames.popleft()[1]

    def _acknowledged(self, end: Channel, raw: bytes) -> None:
        """P5: durable is what the store holds, in whatever mode this stream is."""
        frame = decode_from_secondary(raw)
        assert isinstance(frame, Ack)
        cluster = self._world.clusters[end.cluster]
        source = self._world.clusters[end.peer.cluster]
        positions = cluster.witness.records[-1].header.positions
        held = [positions[mode.name] for mode in (PERFORMANCE, DR) if mode.name in positions]
        indexes = [one.index for one in held if one.generation == source.generation]
        if frame.durable > max(indexes, default=0):
            what = f"{end.process.name} acknowledges {frame.durable} as durable, its store is at {indexes}"
            self._world.report(Violation("P5", what))

    def _told_head(self, end: Channel, raw: bytes) -> None:
        try:
            frame = decode_from_primary(raw)
        except ProtocolViolation:
            return
        node = next((one for one in self._world.clusters[end.cluster].nodes if one.process is end.process), None)
        if node is None or node.replication is None or not isinstance(frame, Heartbeat):
            return
        for manager in (node.replication.performance, node.replication.dr):
            if manager.secondary is not None:
                heard = self._heard.setdefault(manager.secondary, [])
                heard.append((self._world.loop.time(), frame.head_index))

    def heard_head(self, node: SetNode, mode: Mode, *, before_s: float) -> int:
        """The newest record of its primary that a secondary was told of, by then."""
        manager = node.mode(mode.name)
        heard = self._heard.get(manager.secondary, [])
        return max((index for at_s, index in heard if at_s <= before_s), default=0)
