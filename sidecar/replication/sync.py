"""Merkle sync: brings a secondary in step in two round trips while its primary goes on writing.

1. The secondary sends fingerprints of its partitions; the primary answers with what differs, and with the *base*,
   its newest record when the comparison began.
2. The secondary sends ids of the entries it has where trees differ; the primary streams what it lacks, then its records
   since the base, then the *guard*: the newest record when the last entry had been sent, and the root at exactly that
   record.

Entries are as of some moment between base and guard; the records in between bring every key to its value at the guard.

What fits the staging bound becomes one commit (a large batch if need be), together with the position: readers see the
old prefix, then the new one. More than that is not held in memory. Then the first commit sets the position to *none*
and the gate refuses reads, until everything is there and the roots agree; a crash in between finds *none* and starts
over with what still differs. So does a first fill, whose position is *none* from the start.

Deletions that follow from the comparison are bounded by a brake (:mod:`sidecar.replication.brake`). The primary's
counts tell at once whether it has much less than this cluster: then nothing is fetched. What would be replaced rather
than lost is counted when everything was received, because the records since the base may have deleted it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from consul_backend.allowance import DeleteAllowance
from consul_backend.clock import Clock
from consul_backend.errors import IndexDamaged, PermissionDenied, TooLarge
from consul_backend.failpoint import failpoint
from consul_backend.limits import Limits
from consul_backend.merkle import entry_digest
from consul_backend.position import Position
from consul_backend.wal import Write
from sidecar.replication.answers import last_of
from sidecar.replication.brake import COUNTED_CLASS, Brake, Shrink, by_class
from sidecar.replication.channel import ChannelClosed
from sidecar.replication.committer import stored_position
from sidecar.replication.diff import SyncPlan, diff_request, dropped_keys
from sidecar.replication.filling import Filling, SyncProgress
from sidecar.replication.hello import Identity, Source, fork_problem
from sidecar.replication.intake import Budget, Intake, checked_writes
from sidecar.replication.modes import PERFORMANCE, Mode
from sidecar.replication.protocol import (
    FETCH_FRAME_BYTES_MAX,
    SALT_BYTES,
    Bye,
    DiffReply,
    DiffRequest,
    Entries,
    FetchRequest,
    FromFetch,
    Guard,
    PartFrame,
    ProtocolViolation,
    RecordFrame,
    Skip,
    Unframer,
    decode_from_fetch,
    encode,
)
from sidecar.replication.selection import EVERYTHING, Partitions
from sidecar.replication.shipped import Shipped, load_indexes
from sidecar.replication.staging import Stage, Staging
from sidecar.replication.states import Event
from sidecar.replication.store_view import SecondaryStore
from sidecar.replication.withheld import withheld_partitions

log = logging.getLogger("replication.sync")

FETCH_REQUEST_BYTES = 4 * 1024 * 1024
"""About the size of one fetch request; a larger difference takes more of them."""


class SyncRefused(Exception):
    """The primary does not speak to this secondary; ``request`` and ``fetch`` may raise it."""


@dataclass(frozen=True, slots=True)
class SyncResult:
    """``event`` goes into ``states.step``: EQUAL, SYNCED, MISMATCH, BRAKED, LOST or REFUSED. ``keys`` were written or
    deleted; ``bytes`` travelled, both ways together. ``shrink``: what the brake stopped."""

    event: Event
    reason: str
    position: Position | None
    round_trips: int
    bytes: int
    keys: int
    seconds: float
    shrink: Shrink | None = None


class _Broken(Exception):
    """The sync cannot go on; what is committed stays, the next one starts from it."""


class _Braked(Exception):
    """The comparison would delete more than it may unasked."""

    def __init__(self, shrink: Shrink) -> None:
        super().__init__(shrink.text)
        self.shrink = shrink


class Syncer:
    """One sync. ``request`` makes the first round trip; ``fetch`` the second, yielding raw chunks of the body. Both
    raise ChannelClosed when the primary cannot be reached. While ``gate`` was last called with progress, reads of what
    travels must be refused; with None they are open. It is the caller who starts with a closed gate when the stored
    position is none."""

    def __init__(
        self,
        mode: Mode,
        store: SecondaryStore,
        request: Callable[[DiffRequest], Awaitable[DiffReply]],
        fetch: Callable[[FetchRequest], AsyncIterator[bytes]],
        *,
        on_applied: Callable[[Sequence[str]], Awaitable[None]],
        gate: Callable[[SyncProgress | None], None],
        on_event: Callable[[Event], None],
        clock: Clock,
        limits: Limits | None = None,
        identity: Identity | None = None,
        staging: Staging | None = None,
        allowance: DeleteAllowance | None = None,
        accepted_deletions: int = 0,
        selection: Partitions = EVERYTHING,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._mode = mode
        self._store = store
        self._selection = selection
        self._shipped = Shipped(store.forest, mode.classes, selection)
        self._request = request
        self._fetch = fetch
        self._on_event = on_event
        self._clock = clock
        self._identity = identity
        self._random_bytes = random_bytes
        self._budget = Budget.of(limits or Limits())
        self._allowance = allowance or DeleteAllowance()
        self._accepted = accepted_deletions
        self._brake = Brake(self._allowance, {}, {})
        self._filling = Filling((), {}, kept=0, started_s=clock.monotonic())
        self._bounds = staging or Staging()
        self._on_applied = on_applied
        self._gate = gate
        self._staging = self._stage()
        self._round_trips = 0
        self._bytes = 0
        self._extents_done = 0

    def _stage(self) -> Stage:
        return Stage(
            self._mode,
            self._store,
            self._budget,
            self._bounds,
            self._on_applied,
            self._gate,
            self.progress,
            self._brake,
        )

    def progress(self) -> SyncProgress:
        """How far it has come."""
        return self._filling.progress(self._bytes, self._clock.monotonic())

    async def run(self) -> SyncResult:
        """Diff, and sync what differs; ``on_event`` hears DIFFERS in between. Raises BackendError when this cluster's
        own store fails in a way that ends the tenure."""
        started_s = self._clock.monotonic()
        shrink: Shrink | None = None
        try:
            event, reason = await self._run()
        except _Braked as braked:
            event, reason, shrink = Event.BRAKED, str(braked), braked.shrink
            log.error("%s", reason)
        except SyncRefused as refused:
            event, reason = Event.REFUSED, str(refused)
        except (ChannelClosed, ProtocolViolation, TooLarge, PermissionDenied, _Broken) as error:
            event, reason = Event.LOST, str(error)
            log.warning("merkle sync ended early: %s", reason)
        finally:
            await self._staging.abandon()
        return SyncResult(
            event=event,
            reason=reason,
            position=stored_position(self._store, self._mode),
            round_trips=self._round_trips,
            bytes=self._bytes,
            keys=self._staging.keys,
            seconds=self._clock.monotonic() - started_s,
            shrink=shrink,
        )

    async def _run(self) -> tuple[Event, str]:
        log.info("starting merkle diff")
        try:
            await load_indexes(self._store, self._mode)
        except IndexDamaged as error:
            raise _Broken(str(error)) from error
        request, reply = await self._diff()
        source = Source(reply.cluster_id, reply.set_id, reply.generation, reply.epoch, reply.epoch_id)
        mine = self._identity
        if mine is not None and (problem := fork_problem(mine.set_id, mine.epoch, mine.epoch_id, source)):
            raise SyncRefused(problem)
        if mine is not None and mine.epoch_id and (mine.epoch, mine.epoch_id) != (source.epoch, source.epoch_id):
            raise _Broken("the primary's replication epoch changed: a new hello comes first")
        base = Position(source.set_id, source.generation, source.epoch, reply.base_index, reply.base_hash)
        if reply.equal:
            await self._staging.finish(base, reply.positions)
            return Event.EQUAL, ""
        self._on_event(Event.DIFFERS)
        failpoint("sync:after-diff")
        plan = SyncPlan.of(request, reply, self._shipped)
        log.info("starting merkle sync: %d extents differ, %d partitions are gone", len(plan.ranges), len(plan.gone))
        self._measure(plan, reply)
        if self._brake.on:
            raise _Braked(self._brake.shrink())
        for keys in plan.deletions(self._shipped):
            await self._staging.drop(keys)
            await asyncio.sleep(0)
        guard = await self._fetch_all(plan, base)
        await self._staging.settle()
        if self._brake.on:
            raise _Braked(self._brake.shrink())
        end = Position(base.set_id, base.generation, base.epoch, guard.index, guard.chain_hash)
        return await self._conclude(guard, end)

    def _measure(self, plan: SyncPlan, reply: DiffReply) -> None:
        """What there is to do, and what may be deleted: from the counts of both ends."""
        here = {name: self._shipped.count(name) for name in self._shipped.partitions()}
        kept = sum(here.values()) - sum([here[name] for name in plan.gone])
        # What a filter withholds goes when the sync is done: an empty table of mounts would withhold everything.
        withheld = withheld_partitions(self._store, self._selection) if self._mode is PERFORMANCE else {}
        mine = by_class(here | {f"{COUNTED_CLASS}/{name}": count for name, count in withheld.items()})
        self._brake = Brake(self._allowance, mine, by_class(reply.counts), self._accepted)
        self._brake.count(sum(withheld.values()))
        self._filling = Filling(plan.ranges, reply.counts, kept=kept, started_s=self._clock.monotonic())
        self._staging = self._stage()

    async def _diff(self) -> tuple[DiffRequest, DiffReply]:
        request = await last_of(diff_request(self._shipped, self._random_bytes(SALT_BYTES)))
        if request is None:
            raise AssertionError("a diff request ends its generator")
        request = msgspec.structs.replace(request, selection=self._selection)
        self._round_trips += 1
        reply = await self._request(request)
        self._bytes += len(encode(request)) + len(encode(reply))
        return request, reply

    async def _fetch_all(self, plan: SyncPlan, base: Position) -> Guard:
        """Every request of the plan, one after the other; the last is the final one."""
        pending: FetchRequest | None = None
        for names, extents in plan.requests(self._shipped, FETCH_REQUEST_BYTES):
            if pending is not None:
                await self._fetch_one(pending, base)
            pending = FetchRequest(base.index, base.chain_hash, False, plan.salt, names, extents, self._selection)
        if pending is None:
            raise AssertionError("a plan makes at least one request")
        return await self._fetch_one(msgspec.structs.replace(pending, final=True), base)

    async def _fetch_one(self, request: FetchRequest, base: Position) -> Guard:
        self._round_trips += 1
        self._bytes += len(encode(request))
        done_before = self._extents_done
        intake = Intake(self._mode, base, self._budget, self._selection)
        guard: Guard | None = None
        unframer = Unframer(FETCH_FRAME_BYTES_MAX)
        async with _closing(self._fetch(request)) as chunks:
            async for chunk in chunks:
                self._bytes += len(chunk)
                for raw in unframer.feed(chunk):
                    if guard is not None:
                        raise ProtocolViolation("the answer goes on after its guard")
                    frame = decode_from_fetch(raw)
                    if isinstance(frame, Guard):
                        guard = frame
                    else:
                        await self._received(frame, intake, done_before, request)
        unframer.end()
        if guard is None:
            raise ProtocolViolation("the answer ended without its guard")
        self._extents_done = done_before + len(request.extents)
        if (guard.index, guard.chain_hash) != (intake.last.index, intake.last.chain_hash):
            raise ProtocolViolation(f"the guard names record {guard.index}, the records end at {intake.last.index}")
        return guard

    async def _received(self, frame: FromFetch, intake: Intake, done_before: int, request: FetchRequest) -> None:
        if isinstance(frame, Entries):
            self._filling.advance(done_before + frame.done, len(frame.puts))
            puts = [Write(key, value) for key, value in frame.puts]
            writes = checked_writes(puts, self._mode.classes, self._selection)
            await self._staging.add([write for write in writes if not self._has_keyring(write)])
            # Of an id that was an old version's the put came before: it is staged, or committed and has another id. All
            # are judged at one instant, because staging a deletion may commit what is staged.
            dropped = [key for key in dropped_keys(self._shipped, request, frame) if not self._staging.holds(key)]
            await self._staging.drop(dropped)
        elif isinstance(frame, RecordFrame | Skip | PartFrame):
            intake.accept(frame)
            while (batch := intake.take()) is not None:
                await self._staging.add(batch.writes)
        elif isinstance(frame, Bye):
            raise _Broken(frame.reason)

    def _has_keyring(self, write: Write) -> bool:
        """Whether a write is the keyring that is here already: it travels with every answer."""
        if write.key not in self._mode.keyrings or write.value is None:
            return False
        return self._store.forest.digest_of(write.key) == entry_digest(write.key, write.value)

    async def _conclude(self, guard: Guard, position: Position) -> tuple[Event, str]:
        if self._staging.is_whole():
            await self._staging.finish(position, guard.positions)
            if self._shipped.root() == guard.root:
                return Event.SYNCED, ""
        else:
            await self._staging.flush()
            if self._shipped.root() == guard.root:
                await self._staging.finish(position, guard.positions)
                return Event.SYNCED, ""
        return Event.MISMATCH, f"roots still differ at record {guard.index} after everything was fetched"


@contextlib.asynccontextmanager
async def _closing(chunks: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """A body that is read no further is let go of at once: its connection is not left to the garbage collector."""
    try:
        yield chunks
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
