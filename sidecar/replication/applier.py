"""The secondary's side of the stream: records in order, applied exactly once, merged into this cluster's own commits.

The position is in the same record as the data, so a crash loses both or neither, and the next hello asks for what
follows. One task reads the connection into a bounded inbox, one applies; the commit in flight never depends on the
connection: when that breaks, what was received is still applied.

Roots are compared at one exact index: *complete up to n* comes in order, when everything up to n is committed and
nothing after it, and what travels is written here by nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from consul_backend.clock import Clock
from consul_backend.errors import BackendError, PermissionDenied, TooLarge
from consul_backend.failpoint import failpoint
from consul_backend.limits import Limits
from consul_backend.position import Position
from sidecar.replication.asking import answer_to
from sidecar.replication.channel import Channel, ChannelClosed, hear
from sidecar.replication.committer import commit, positions_at, stored_position
from sidecar.replication.hello import Identity, Source, fork_problem, hello_of, is_on_log, source_of
from sidecar.replication.inbox import Inbox
from sidecar.replication.intake import Batch, Budget, Intake
from sidecar.replication.modes import Mode
from sidecar.replication.progress import ClockOffset, Lag
from sidecar.replication.protocol import (
    Ack,
    Ask,
    Bye,
    CompleteUpTo,
    Heartbeat,
    HelloReply,
    LogFrame,
    PartFrame,
    ProtocolViolation,
    RecordFrame,
    Skip,
    decode_from_primary,
    decode_hello_reply,
    encode,
)
from sidecar.replication.selection import EVERYTHING, Partitions
from sidecar.replication.shipped import Shipped
from sidecar.replication.shipper import Advertised
from sidecar.replication.states import Event
from sidecar.replication.store_view import SecondaryStore

log = logging.getLogger("replication.applier")


class End(enum.Enum):
    """How a stream ended; values are events of the state machine."""

    LOST = Event.LOST
    NEED_DIFF = Event.NEED_DIFF
    REFUSED = Event.REFUSED


@dataclass(frozen=True, slots=True)
class Outcome:
    """``end.value`` goes into ``states.step``, with ``reason``. ``alarm``: the primary sent what no honest one does."""

    end: End
    reason: str
    alarm: bool = False


@dataclass(frozen=True, slots=True)
class ApplierOptions:
    """``queue_bytes_max`` bounds what is received and not yet applied. A position that moved over skipped records only
    is made durable every ``position_interval_s``. ``limits`` are those of this cluster's store."""

    beat_s: float = 5.0
    silent_beats_max: int = 3
    hello_timeout_s: float = 10.0
    queue_bytes_max: int = 8 * 1024 * 1024
    position_interval_s: float = 5.0
    limits: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class Upstream:
    """The primary as this secondary knows it, for the status. ``head_index``: its newest record heard of, 0 before any.
    ``complete_at``: (record, source time in unix ms) of the newest moment everything of which is applied here.
    ``skew_ms``: its clock minus this one; ``round_trip_ms``: of the newest heartbeat that echoed ours."""

    connected: bool = False
    source: Source | None = None
    advertised: Advertised = field(default_factory=Advertised)
    head_index: int = 0
    heard_at_s: float | None = None
    complete_at: tuple[int, int] | None = None
    skew_ms: int = 0
    round_trip_ms: int = 0


class _NeedDiff(Exception):
    """The stream cannot bring this cluster in step."""


class Applier:
    """One per mode and tenure as secondary; :meth:`run` once per connection, again and again.

    ``on_source`` hears whom a hello was answered by, what travels, and whether that primary knows our position, before
    anything of it is applied: it may keep what would be lost, drops what may not stay, and returns who this secondary
    is from now on."""

    def __init__(
        self,
        mode: Mode,
        store: SecondaryStore,
        position: Position | None,
        on_applied: Callable[[Sequence[str]], Awaitable[None]],
        clock: Clock,
        options: ApplierOptions,
        *,
        identity: Identity,
        advertise: Callable[[], Advertised] = Advertised,
        on_event: Callable[[Event], None] = lambda event: None,
        on_source: Callable[[Source, Partitions, bool], Awaitable[Identity]] | None = None,
    ) -> None:
        self._mode = mode
        self._on_source = on_source
        self._store = store
        self._on_applied = on_applied
        self._clock = clock
        self._options = options
        self._advertise = advertise
        self._on_event = on_event
        self._durable = stored_position(store, mode)
        self._position = position if position is not None else self._durable
        self._advanced = asyncio.Event()
        self._lag = Lag()
        self.identity = identity
        self.selection = EVERYTHING
        self.upstream = Upstream()

    @property
    def position(self) -> Position | None:
        """What is applied, skipped records included."""
        return self._position

    def lag_s(self) -> float | None:
        """Age of the newest instant whose every write is applied here; None before the first."""
        return self._lag.lag_s(self._clock.monotonic())

    def resume(self, head_index: int, heard_age_s: float, complete_age_s: float | None) -> None:
        """Before the first :meth:`run`: what was known of the primary before this node restarted, and how old it is."""
        now_s = self._clock.monotonic()
        self.upstream.head_index, self.upstream.heard_at_s = head_index, now_s - heard_age_s
        if complete_age_s is not None:
            self._lag.resume(complete_age_s, now_s)

    async def wait_applied(self, index: int, timeout_s: float, *, generation: str = "") -> bool:
        """Whether the primary's record ``index`` is applied within the time: the stall of a forwarded write.
        ``generation`` is the primary's store: a position in another one, as after a promotion, tells nothing of it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._reached(index, generation):
                    await self._advanced.wait()
                return True
        return False

    async def wait_moved(self, timeout_s: float) -> None:
        """Return when something more is applied, or after the time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._advanced.wait()

    def _reached(self, index: int, generation: str) -> bool:
        position = self._position
        return position is not None and position.index >= index and generation in ("", position.generation)

    async def run(self, channel: Channel) -> Outcome:
        """Say hello and apply until the stream ends; closes the channel. ``on_event`` hears ACCEPTED and IN_STEP
        meanwhile. Raises BackendError when this cluster's own store fails in a way that ends the tenure."""
        await self._take_stock()
        try:
            outcome = await self._run(channel)
        finally:
            self.upstream.connected = False
        level = logging.ERROR if outcome.alarm else logging.INFO
        log.log(level, "stream from the primary ended (%s): %s", outcome.end.name.lower(), outcome.reason)
        await channel.close(outcome.reason)
        return outcome

    def look(self) -> None:
        """A sync may have moved the stored position: from now on it is this one's too, connected or not."""
        stored = stored_position(self._store, self._mode)
        if stored != self._durable:
            self._durable = stored
            self._moved(stored)

    async def _take_stock(self) -> None:
        """Make the position and the durable one agree: a hello promises that nothing before it is asked for again."""
        stored = stored_position(self._store, self._mode)
        if stored != self._durable:  # a commit that outlived a cancelled run moved it
            self._moved(stored)
        elif self._position is not None and self._position != stored:
            await commit(self._store, [], positions_at(self._mode, self._position))
        self._durable = self._position

    async def _run(self, channel: Channel) -> Outcome:
        try:
            async with asyncio.timeout(self._options.hello_timeout_s):
                await channel.send(encode(hello_of(self.identity, self._position, self._options.limits)))
                reply = decode_hello_reply(await channel.recv())
        except TimeoutError:
            return Outcome(End.LOST, "the primary did not answer the hello in time")
        except ChannelClosed as closed:
            return Outcome(End.LOST, str(closed))
        except ProtocolViolation as violation:
            return Outcome(End.LOST, str(violation), alarm=True)
        source = source_of(reply)
        if problem := self._problem(reply, source):
            return problem
        self.upstream.head_index, self.upstream.heard_at_s = reply.head_index, self._clock.monotonic()
        if self._on_source is not None:
            try:
                self.identity = await self._on_source(source, reply.selection, is_on_log(reply))
            except ChannelClosed as later:
                return Outcome(End.LOST, str(later))
        self.selection = reply.selection
        if reply.mode == "need-diff":
            return Outcome(End.NEED_DIFF, reply.reason)
        if self._position is None:
            return Outcome(End.LOST, "the primary accepted a stream without a position", alarm=True)
        self.upstream.connected, self.upstream.source = True, source
        self._on_event(Event.ACCEPTED)
        return await _Reception(self, channel, self._position).run()

    def _problem(self, reply: HelloReply, source: Source) -> Outcome | None:
        known = self.identity
        if fork := fork_problem(known.set_id, known.epoch, known.epoch_id, source):
            return Outcome(End.REFUSED, fork)
        if reply.mode == "refuse":
            return Outcome(End.REFUSED, reply.reason)
        return None

    def _moved(self, position: Position | None) -> None:
        self._position = position
        self._advanced.set()
        self._advanced = asyncio.Event()

    async def _apply(self, batch: Batch, *, durable_now: bool) -> None:
        """Make one batch true here, and then known to the readers. Raises TooLarge when it is not one commit."""
        if batch.writes or durable_now:
            failpoint("applier:before-commit")
            positions = positions_at(self._mode, batch.position, batch.source_positions)
            await commit(self._store, batch.writes, positions)
            failpoint("applier:after-commit")
            self._durable = batch.position
        if batch.writes:
            await self._on_applied([write.key for write in batch.writes])
        self._moved(batch.position)


# More than these are left unread: reading waits, and so does whoever asks.
_QUESTIONS_MAX = 4


class _Reception:
    """One connection."""

    def __init__(self, applier: Applier, channel: Channel, position: Position) -> None:
        self._applier = applier
        self._channel = channel
        self._clock = applier._clock
        self._options = applier._options
        self._selection = applier.selection
        self._intake = Intake(applier._mode, position, Budget.of(self._options.limits), self._selection)
        self._inbox: Inbox[LogFrame | CompleteUpTo | Bye] = Inbox(self._options.queue_bytes_max)
        self._questions: asyncio.Queue[Ask] = asyncio.Queue(_QUESTIONS_MAX)
        self._offset = ClockOffset()
        self._echo: tuple[int, float] | None = None
        self._durable_at_s = self._clock.monotonic()

    async def run(self) -> Outcome:
        failure: BackendError | None = None
        outcome: Outcome | None = None
        async with asyncio.TaskGroup() as tasks:
            helpers = (
                tasks.create_task(self._read(), name="read"),
                tasks.create_task(self._beat(), name="beat"),
                tasks.create_task(self._answer(), name="answer"),
            )
            try:
                outcome = await self._act()
            except BackendError as error:  # kept out of the group, which would wrap it
                failure = error
            finally:
                for helper in helpers:
                    helper.cancel()
        if failure is not None or outcome is None:
            raise failure or AssertionError("a reception ends with an outcome or an error")
        return outcome

    async def _read(self) -> None:
        """Fill the inbox until the connection ends; what ended it reaches the other task behind the last frame."""
        options = self._options
        try:
            while True:
                raw = await hear(self._channel, options.beat_s, options.silent_beats_max, self._sign)
                frame = decode_from_primary(raw)
                self._sign()
                if isinstance(frame, Heartbeat):
                    self._heard(frame)
                elif isinstance(frame, Ask):
                    await self._questions.put(frame)
                else:
                    await self._inbox.put(frame, len(raw))
        except (ChannelClosed, ProtocolViolation) as error:
            self._inbox.fail(error)

    def _sign(self) -> None:
        self._applier.upstream.heard_at_s = self._clock.monotonic()

    def _heard(self, beat: Heartbeat) -> None:
        now_s, upstream = self._clock.monotonic(), self._applier.upstream
        self._offset.observe(
            their_clock_ms=beat.clock_ms,
            echo_ms=beat.echo_ms,
            echo_age_ms=beat.echo_age_ms,
            now_ms=self._clock.time_ms(),
            now_s=now_s,
        )
        self._echo = (beat.clock_ms, now_s)
        upstream.head_index = beat.head_index
        upstream.advertised = Advertised(beat.api_addr, beat.cluster_addrs)
        upstream.skew_ms, upstream.round_trip_ms = int(self._offset.offset_ms), int(self._offset.round_trip_ms)

    async def _answer(self) -> None:
        """What the primary lost and asks for."""
        with contextlib.suppress(ChannelClosed):
            while True:
                question = await self._questions.get()
                try:
                    told = await answer_to(self._applier._store, self._applier._mode.classes, question)
                except ProtocolViolation as violation:
                    self._inbox.fail(violation)
                    return
                await self._channel.send(encode(told))

    async def _beat(self) -> None:
        with contextlib.suppress(ChannelClosed):
            while True:
                advertised = self._applier._advertise()
                now_s = self._clock.monotonic()
                echo_ms, echo_age_ms = (self._echo[0], int((now_s - self._echo[1]) * 1000)) if self._echo else (0, 0)
                position = self._applier.position
                now_ms = self._clock.time_ms()
                self._offset.sent(now_ms, now_s)
                await self._channel.send(
                    encode(
                        Heartbeat(
                            clock_ms=now_ms,
                            echo_ms=echo_ms,
                            echo_age_ms=echo_age_ms,
                            head_index=position.index if position else 0,
                            api_addr=advertised.api_addr,
                            cluster_addrs=advertised.cluster_addrs,
                        )
                    )
                )
                await asyncio.sleep(self._options.beat_s)

    async def _act(self) -> Outcome:
        try:
            while True:
                frame = await self._inbox.get()
                if isinstance(frame, RecordFrame | Skip | PartFrame):
                    self._intake.accept(frame)
                    if not (self._intake.wants_more() and self._inbox.next_is((RecordFrame, Skip, PartFrame))):
                        await self._apply_accepted()
                elif isinstance(frame, CompleteUpTo):
                    await self._compare(frame)
                else:
                    return _farewell(frame)
        except ProtocolViolation as violation:
            with contextlib.suppress(TooLarge, ChannelClosed):  # what came before the bad frame is good
                await self._apply_accepted()
            return Outcome(End.LOST, str(violation), alarm=True)
        except ChannelClosed as closed:
            return Outcome(End.LOST, str(closed))
        except PermissionDenied as denied:
            return Outcome(End.LOST, f"this cluster's own store refused a write: {denied}", alarm=True)
        except _NeedDiff as need:
            return Outcome(End.NEED_DIFF, str(need))

    async def _apply_accepted(self) -> None:
        steps_max: int | None = None
        while (batch := self._intake.take(steps_max=steps_max)) is not None:
            now_s = self._clock.monotonic()
            durable_now = now_s - self._durable_at_s >= self._options.position_interval_s
            try:
                await self._applier._apply(batch, durable_now=durable_now)
            except TooLarge as too_large:
                if len(batch.steps) == 1:
                    # A record is never split here; a sync commits entry by entry, with reads refused meanwhile.
                    raise _NeedDiff(f"record {batch.position.index} is no single commit here: {too_large}") from None
                self._intake.give_back(batch)
                steps_max = len(batch.steps) // 2
                continue
            steps_max = None
            if batch.writes or durable_now:
                self._durable_at_s = now_s
            failpoint("applier:before-ack")
            await self._acknowledge()

    async def _acknowledge(self) -> None:
        position, durable = self._applier.position, self._applier._durable
        applied = position.index if position else 0
        ack = Ack(applied, min(applied, durable.index if durable else 0))
        with contextlib.suppress(ChannelClosed):  # what was received is applied all the same; the reader says it ended
            await self._channel.send(encode(ack))

    async def _compare(self, frame: CompleteUpTo) -> None:
        position = self._applier.position
        if position is None or (frame.index, frame.chain_hash) != (position.index, position.chain_hash):
            raise ProtocolViolation(f"complete up to {frame.index} came out of order")
        if Shipped(self._applier._store.forest, self._applier._mode.classes, self._selection).root() != frame.root:
            raise _NeedDiff(f"roots differ at record {frame.index}")
        self._applier.upstream.complete_at = (frame.index, frame.source_time_ms)
        self._applier._lag.complete(
            source_time_ms=frame.source_time_ms,
            now_ms=self._clock.time_ms(),
            offset_ms=self._offset.offset_ms,
            now_s=self._clock.monotonic(),
        )
        self._applier._on_event(Event.IN_STEP)
        await self._acknowledge()


def _farewell(bye: Bye) -> Outcome:
    ends = {"need-diff": End.NEED_DIFF, "refuse": End.REFUSED}
    return Outcome(ends.get(bye.code, End.LOST), bye.reason)
