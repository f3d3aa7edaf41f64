"""The primary's side of the stream: a hello, then records in order, to any number of secondaries.

The write path knows nothing of this. A stream waits until the head of the log passes what it sent, and reads for
itself: from the store's ring of recent records, else from Consul. What a secondary costs the primary is its window
(:mod:`sidecar.replication.progress`) and one read of ``chunk_records`` records; what it is sent was encoded once for
all (:mod:`sidecar.replication.outgoing`).

Only one task sends on a connection; it is woken by the head, by acknowledgements and by the beat. At each beat the head
and the root are captured together, and the *complete up to* that says so leaves when that very record has been sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from consul_backend.clock import Clock
from consul_backend.errors import BackendError, StoreWentBack
from consul_backend.failpoint import failpoint
from consul_backend.limits import Limits
from consul_backend.wal_reader import RecordGone
from sidecar.replication.asking import Questions, ask_all
from sidecar.replication.channel import Channel, ChannelClosed, hear
from sidecar.replication.denials import Denied, denial, unheard
from sidecar.replication.hello import NO_MATCHING_WALS, LogFacts, Source, answer_hello, contradicts_log
from sidecar.replication.history import FORKED
from sidecar.replication.modes import Mode
from sidecar.replication.outgoing import SharedFrames
from sidecar.replication.parts import parts_of
from sidecar.replication.progress import ClockOffset, Progress
from sidecar.replication.protocol import (
    Ack,
    Bye,
    CompleteUpTo,
    Heartbeat,
    Hello,
    HelloReply,
    ProtocolViolation,
    Told,
    decode_from_secondary,
    encode,
    is_none,
)
from sidecar.replication.selection import EVERYTHING, Partitions
from sidecar.replication.shipped import Shipped
from sidecar.replication.store_view import PrimaryStore

log = logging.getLogger("replication.shipper")

SELECTION_CHANGED = "what travels to this secondary has changed: say hello again"
Select = Callable[[str], Partitions]
"""What travels to a secondary, by its id, at this moment."""


def everything(secondary_id: str) -> Partitions:
    """No filters."""
    return EVERYTHING


@dataclass(frozen=True, slots=True)
class Advertised:
    """What a heartbeat tells the other cluster about this one."""

    api_addr: str = ""
    cluster_addrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShipperOptions:
    """``beat_s``: how often heartbeats go out; a peer silent for ``silent_beats_max`` of them is gone. The window
    bounds what one secondary may have in flight. ``limits`` are those of this cluster's store."""

    beat_s: float = 5.0
    silent_beats_max: int = 3
    window_records: int = 1024
    window_bytes: int = 4 * 1024 * 1024
    chunk_records: int = 16
    limits: Limits = field(default_factory=Limits)


class Peer:
    """One secondary, as this primary knows it. Indexes are 0 and times None until it was first heard. ``skew_ms``: its
    clock minus this one; ``round_trip_ms``: of the newest heartbeat that echoed ours."""

    def __init__(self, secondary_id: str) -> None:
        self.secondary_id = secondary_id
        self.advertised = Advertised()
        self.connected = False
        self.reason = "not connected yet"
        self.heard_at_s: float | None = None
        self.progress: Progress | None = None
        self.skew_ms = 0
        self.round_trip_ms = 0

    @property
    def applied(self) -> int:
        """The newest record it says it applied."""
        return self.progress.applied if self.progress else 0

    @property
    def durable(self) -> int:
        """The newest record it would not ask for again."""
        return self.progress.durable if self.progress else 0

    def lag_s(self, now_s: float) -> float | None:
        """Age of the newest instant whose every write it has; goes on counting while it is away."""
        return self.progress.lag_s(now_s) if self.progress else None


class _Over(Exception):
    """The stream ends with these last words."""

    def __init__(self, bye: Bye) -> None:
        super().__init__(bye.reason)
        self.bye = bye


class Shipper:
    """One per mode and tenure as primary. ``forks``: known secondaries whose history is another, by id, with the
    reason."""

    def __init__(
        self,
        mode: Mode,
        store: PrimaryStore,
        source: Source,
        options: ShipperOptions,
        clock: Clock,
        *,
        advertise: Callable[[], Advertised] = Advertised,
        select: Select = everything,
        denied: Denied = unheard,
    ) -> None:
        self._mode = mode
        self._select = select
        self._denied = denied
        self._store = store
        self._source = source
        self._options = options
        self._clock = clock
        self._advertise = advertise
        self._peers: dict[str, Peer] = {}
        self._streams: dict[str, _Stream] = {}
        self._frames = SharedFrames(mode.classes)
        self.forks: dict[str, str] = {}

    @property
    def peers(self) -> Mapping[str, Peer]:
        """By secondary id: every one expected or served in this tenure, connected or not."""
        return self._peers

    def expect(self, secondary_id: str) -> None:
        """A known secondary, connected or not: its WAL is held from now on. Call for each when a tenure starts."""
        if secondary_id not in self._peers:
            self._peers[secondary_id] = Peer(secondary_id)
            self._store.hold(self.hold_name(secondary_id), self._store.oldest_index)

    def hold_name(self, secondary_id: str) -> str:
        """Under which name the log is held for it: ids are unique in one mode only."""
        return f"{self._mode.name}:{secondary_id}"

    def forget(self, secondary_id: str) -> None:
        """It was revoked: end its stream, and hold nothing for it."""
        self._peers.pop(secondary_id, None)
        self.forks.pop(secondary_id, None)
        self._denied(secondary_id, "")
        stream = self._streams.pop(secondary_id, None)
        if stream is not None:
            stream.end("refuse", "this secondary was revoked")
        self._store.unhold(self.hold_name(secondary_id))

    async def ask(self, wanted: Mapping[str, bytes]) -> dict[str, bytes]:
        """Values by logical key, of those entries (key to digest) that some connected secondary has."""
        found: dict[str, bytes] = {}
        for stream in list(self._streams.values()):  # none is told so much as the name of what it is not sent
            travels = {key: digest for key, digest in wanted.items() if key not in found and stream.takes(key)}
            found |= await ask_all([stream.questions], travels)
        return found

    def reselect(self) -> None:
        """A filter was changed: no stream sends another frame by the old one."""
        for stream in self._streams.values():
            stream.wake()

    async def serve(self, channel: Channel, hello: Hello) -> str:
        """Answer ``hello`` and stream until the connection ends; returns why it did. A new connection of a secondary
        ends its old one. The caller has decoded the hello and checked certificate, revocation and store id. Errors of
        the store end the stream and are in the reason: whether they end the tenure is not decided here."""
        name = hello.secondary_id
        try:
            reply = await self._judge(hello)
            await channel.send(encode(reply))
        except (ChannelClosed, BackendError) as error:
            await channel.close(str(error))
            return str(error)
        if reply.mode == "refuse" and reply.reason.startswith(FORKED):
            self.forks[name] = reply.reason
        else:
            self.forks.pop(name, None)
        if reply.mode != "accept" or hello.position is None:
            log.info("secondary %s: %s: %s", name, reply.mode, reply.reason)
            await channel.close(reply.reason)
            return reply.reason
        self.expect(name)
        older = self._streams.get(name)
        if older is not None:
            older.end("closing", "the secondary opened another stream")
        peer = self._peers[name]
        index = hello.position.index
        stream = _Stream(
            self._store,
            self._options,
            self._clock,
            self._advertise,
            peer,
            channel,
            index,
            mode=self._mode,
            hold_as=self.hold_name(name),
            selection=reply.selection,
            select=self._select,
            frames=self._frames,
        )
        self._streams[name] = stream
        try:
            reason = await stream.run()
        finally:
            if self._streams.get(name) is stream:
                del self._streams[name]
        await channel.close(reason)
        log.info("secondary %s: stream ended at %d: %s", name, peer.applied, reason)
        return reason

    async def _judge(self, hello: Hello) -> HelloReply:
        position = hello.position
        there: bytes | None = None
        head = self._store.head
        if position is not None and not is_none(position) and position.index <= head.index:
            there = await self._hash_at(position.index)
            head = self._store.head
        facts = LogFacts(head.index, head.chain_hash, there)
        if position is not None and contradicts_log(hello, self._source, facts):
            await self._store.require_tenure()  # or else it has them from a successor
            reason = denial(hello, position, facts)
            self._denied(hello.secondary_id, reason)
            raise StoreWentBack(reason)
        self._denied(hello.secondary_id, "")
        selection = self._select(hello.secondary_id)
        return answer_hello(hello, self._source, facts, self._options.limits, selection)

    async def _hash_at(self, index: int) -> bytes | None:
        """The chain hash of record ``index``, which is not after the head; None when the log no longer tells."""
        try:
            if index == self._store.head.index:
                return self._store.head.chain_hash
            return (await self._store.records(index + 1, 1))[0].header.prev_hash
        except RecordGone:
            return None


class _Stream:
    """One connection of one secondary. Its tasks end by raising; the first to do so says why."""

    def __init__(
        self,
        store: PrimaryStore,
        options: ShipperOptions,
        clock: Clock,
        advertise: Callable[[], Advertised],
        peer: Peer,
        channel: Channel,
        index: int,
        *,
        mode: Mode,
        hold_as: str,
        selection: Partitions,
        select: Select,
        frames: SharedFrames,
    ) -> None:
        self._frames = frames
        self._classes = mode.classes
        self._selection = selection
        self._select = select
        self._hold_as = hold_as
        self._store = store
        self._options = options
        self._clock = clock
        self._advertise = advertise
        self._peer = peer
        self._channel = channel
        self._progress = Progress(index, window_records=options.window_records, window_bytes=options.window_bytes)
        self._wake = asyncio.Event()
        self._beat_due = True
        self._canary: tuple[CompleteUpTo, float] | None = None
        self.questions = Questions(self._wake.set)
        self._echo: tuple[int, float] | None = None  # the peer's clock in ms, when it arrived on ours
        self._offset = ClockOffset()
        self._told: asyncio.Future[Bye] = asyncio.get_running_loop().create_future()

    async def run(self) -> str:
        """Stream until something ends it; returns what. The peer shows as connected meanwhile; the hold on its WAL
        stays afterwards."""
        peer = self._peer
        peer.progress = self._progress
        peer.connected, peer.reason, peer.heard_at_s = True, "", self._clock.monotonic()
        self._store.hold(self._hold_as, self._progress.durable)
        bye = Bye("closing", "the primary ended the stream")
        try:
            bye = await self._run()
        finally:
            self.questions.close()
            if peer.progress is self._progress:
                peer.connected, peer.reason = False, bye.reason
        with contextlib.suppress(ChannelClosed, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._channel.send(encode(bye))
        return bye.reason

    async def _run(self) -> Bye:
        ends: list[BaseException] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(), name="listen")
                tasks.create_task(self._follow_head(), name="follow head")
                tasks.create_task(self._beat(), name="beat")
                tasks.create_task(self._obey(), name="obey")
                tasks.create_task(self._send(), name="send")
        except* (_Over, ChannelClosed, ProtocolViolation, BackendError) as group:
            ends.extend(group.exceptions)
        first = ends[0]
        if isinstance(first, _Over):
            return first.bye
        if isinstance(first, RecordGone):
            return Bye("need-diff", f"{NO_MATCHING_WALS}: record {self._progress.sent + 1} was collected")
        if isinstance(first, ProtocolViolation):
            log.warning("secondary %s: %s", self._peer.secondary_id, first)
        return Bye("closing", str(first)[:512])

    def end(self, code: str, reason: str) -> None:
        """Make :meth:`run` say so to the peer and return."""
        if not self._told.done():
            self._told.set_result(Bye(code, reason))

    def wake(self) -> None:
        """Have it look at its selection again."""
        self._wake.set()

    def takes(self, key: str) -> bool:
        """Whether an entry travels on this stream."""
        cls, partition, _ = key.split("/", 2)
        return cls in self._classes and self._selection.takes(cls, partition)

    def _check_selection(self) -> None:
        """Before each frame: what is withheld since the hello must not leave, and what is new needs another hello."""
        selection = self._select(self._peer.secondary_id)
        if selection is not self._selection and selection != self._selection:
            raise _Over(Bye("closing", SELECTION_CHANGED))

    async def _obey(self) -> NoReturn:
        raise _Over(await self._told)

    async def _send(self) -> NoReturn:
        """The only task that sends, but for the last word."""
        while True:
            self._wake.clear()
            self._check_selection()
            if self._beat_due:
                await self._send_beat()
            while (question := self.questions.next()) is not None:
                self._check_selection()
                await self._channel.send(encode(question))
            if not await self._send_records():
                await self._wake.wait()

    async def _send_beat(self) -> None:
        self._beat_due = False
        advertised = self._advertise()
        now_ms, now_s = self._clock.time_ms(), self._clock.monotonic()
        echo_ms, echo_age_ms = (self._echo[0], int((now_s - self._echo[1]) * 1000)) if self._echo else (0, 0)
        head = self._store.head
        if self._canary is None:
            shipped = Shipped(self._store.forest, self._classes, self._selection)
            root = shipped.root()  # no await since head was read: both are of one instant
            self._canary = (CompleteUpTo(head.index, head.chain_hash, root, now_ms), now_s)
        self._offset.sent(now_ms, now_s)
        beat = Heartbeat(now_ms, echo_ms, echo_age_ms, head.index, advertised.api_addr, advertised.cluster_addrs)
        await self._channel.send(encode(beat))

    async def _send_records(self) -> bool:
        """Send one chunk, or the canary that is due; whether there was anything to do."""
        progress = self._progress
        if self._canary is not None and self._canary[0].index <= progress.sent:
            canary, captured_at_s = self._canary
            self._canary = None
            progress.promised(canary.index, captured_at_s)
            await self._channel.send(encode(canary))
            return True
        target = self._canary[0].index if self._canary is not None else self._store.head.index
        if progress.sent >= target or not progress.has_room():
            return False
        limit = min(self._options.chunk_records, target - progress.sent)
        records = await self._store.records(progress.sent + 1, limit)
        for raw, last, record in self._frames.of(records, self._selection):
            self._check_selection()
            if not progress.has_room():
                return False  # the rest is read again: to hold it would cost memory for as long as the peer is slow
            parts_bytes = 0
            if record is not None and record.header.large is not None:
                async for part in parts_of(self._store, record, self._classes, self._selection):
                    self._check_selection()
                    part_raw = encode(part)
                    parts_bytes += len(part_raw)
                    await self._channel.send(part_raw)
            failpoint("ship:before-send")
            progress.sending(last, parts_bytes + len(raw))
            await self._channel.send(raw)
        await asyncio.sleep(0)  # neither reading nor sending need ever wait; other tasks get their turn all the same
        return bool(records)

    async def _follow_head(self) -> NoReturn:
        seen = self._store.head.index
        while True:
            seen = (await self._store.wait_head(seen)).index
            self._wake.set()

    async def _beat(self) -> NoReturn:
        while True:
            await asyncio.sleep(self._options.beat_s)
            self._beat_due = True
            self._wake.set()

    async def _listen(self) -> NoReturn:
        """Acknowledgements and heartbeats."""
        options = self._options
        while True:
            self._heard(
                decode_from_secondary(await hear(self._channel, options.beat_s, options.silent_beats_max, self._sign))
            )

    def _sign(self) -> None:
        self._peer.heard_at_s = self._clock.monotonic()

    def _heard(self, frame: Ack | Heartbeat | Told | Bye) -> None:
        now_s = self._clock.monotonic()
        self._peer.heard_at_s = now_s
        if isinstance(frame, Ack):
            self._progress.acked(frame.applied, frame.durable)
            if not self._told.done():  # nothing is held for a secondary that was just revoked
                self._store.hold(self._hold_as, frame.durable)
            if self._progress.sent < self._store.head.index:  # or else there is nothing that the window held back
                self._wake.set()
        elif isinstance(frame, Heartbeat):
            self._echo = (frame.clock_ms, now_s)
            self._offset.observe(
                their_clock_ms=frame.clock_ms,
                echo_ms=frame.echo_ms,
                echo_age_ms=frame.echo_age_ms,
                now_ms=self._clock.time_ms(),
                now_s=now_s,
            )
            peer = self._peer
            peer.skew_ms, peer.round_trip_ms = int(self._offset.offset_ms), int(self._offset.round_trip_ms)
            peer.advertised = Advertised(frame.api_addr, frame.cluster_addrs)
        elif isinstance(frame, Told):
            self.questions.told(frame)
        else:
            raise ChannelClosed(f"the secondary ended the stream: {frame.reason}")
