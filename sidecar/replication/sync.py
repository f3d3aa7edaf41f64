"""Merkle sync: brings a secondary in step in two round trips while its primary goes on writing.

1. The secondary sends its partition roots and page digests; the primary answers with what differs, and with the *base*,
   its newest record when the comparison began.
2. The secondary sends the entries it has where trees differ; the primary streams what it lacks, then its records since
   the base, then the *guard*: the newest record when the last entry had been sent, and the root at exactly that record.

Entries are as of some moment between base and guard; the records in between bring every key to its value at the guard.

What fits one commit becomes one commit, together with the position: readers see the old prefix, then the new one. More
than that cannot be atomic here. Then the first commit sets the position to *none* and the gate refuses reads, until
everything is there and the roots agree; a crash in between finds *none* and starts over with what still differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from consul_backend.clock import Clock
from consul_backend.errors import BackendError, PermissionDenied, TooLarge
from consul_backend.limits import Limits
from consul_backend.merkle import entry_digest
from consul_backend.position import Position
from consul_backend.wal import Write
from consul_backend.wal_reader import RecordGone
from sidecar.replication.channel import ChannelClosed
from sidecar.replication.committer import commit, stored_position
from sidecar.replication.diff import Differences, SyncPlan, compare, diff_request, differing_entries
from sidecar.replication.hello import NO_MATCHING_WALS, Identity, Source, fork_problem
from sidecar.replication.intake import KEYRING_KEY, REPLICATED, Budget, Intake, checked_writes, split_writes
from sidecar.replication.protocol import (
    DIGEST_BYTES,
    NONE_POSITION,
    Bye,
    DiffReply,
    DiffRequest,
    Entries,
    Extent,
    FetchRequest,
    Frame,
    FromFetch,
    Guard,
    ProtocolViolation,
    RecordFrame,
    Skip,
    Unframer,
    decode_from_fetch,
    encode,
    is_none,
    with_length,
)
from sidecar.replication.shipper import frames_of
from sidecar.replication.states import Event
from sidecar.replication.store_view import PrimaryStore, SecondaryStore

log = logging.getLogger("replication.sync")

FETCH_REQUEST_BYTES = 4 * 1024 * 1024
"""About the size of one fetch request; a larger difference takes more of them."""

_ENTRIES_FRAME_BYTES = 256 * 1024
_READS_AT_ONCE = 32
_RECORDS_AT_ONCE = 16
_PAGES_BETWEEN_TURNS = 4

_T = TypeVar("_T")


# The primary's side.


async def answer_diff(store: PrimaryStore, source: Source, request: DiffRequest, *, hold_as: str) -> DiffReply:
    """The answer to the first round trip. From here on the WAL after the base is held for ``hold_as``."""
    head, root = store.head, store.forest.root(REPLICATED)  # no await between: both are of one instant
    store.hold(hold_as, head.index)
    found = Differences()
    equal = request.root == root
    if not equal:
        await _last(compare(store.forest, request, found))
    return DiffReply(
        cluster_id=source.cluster_id,
        set_id=source.set_id,
        generation=source.generation,
        epoch=source.epoch,
        epoch_id=source.epoch_id,
        base_index=head.index,
        base_hash=head.chain_hash,
        equal=equal,
        whole=found.whole,
        gone=found.gone,
        pages=found.pages,
        subpages=found.subpages,
    )


async def answer_fetch(store: PrimaryStore, request: FetchRequest) -> AsyncIterator[bytes]:
    """The streamed body of the second round trip, in chunks of whole frames. When the store fails, the last frame says
    so; the secondary comes again."""
    try:
        async for frame in _fetched_entries(store, request.extents):
            yield with_length(encode(frame))
        guard = Guard(request.base_index, request.base_hash, bytes(DIGEST_BYTES))
        if request.final:
            head, root = store.head, store.forest.root(REPLICATED)  # of one instant, as above
            guard = Guard(head.index, head.chain_hash, root)
            async for record in _records_since(store, request, head.index):
                yield with_length(encode(record))
        last: Frame = guard
    except RecordGone:
        last = Bye("need-diff", f"{NO_MATCHING_WALS}: the records since {request.base_index} were collected meanwhile")
    except BackendError as error:
        log.warning("a merkle sync was cut short: %s", error)
        last = Bye("closing", str(error)[:512])
    yield with_length(encode(last))


async def _fetched_entries(store: PrimaryStore, extents: Sequence[Extent]) -> AsyncIterator[Entries]:
    """The keyring first, and again before any frame that may hold entries under a newer one."""
    keyring: bytes | None = None
    async for frame in _differing_entries(store, extents):
        digest = store.forest.digest_of(KEYRING_KEY)
        if digest != keyring and (value := await store.get(KEYRING_KEY)) is not None:
            keyring = digest
            yield Entries([(KEYRING_KEY, value)], [], 0)
        yield frame


async def _differing_entries(store: PrimaryStore, extents: Sequence[Extent]) -> AsyncIterator[Entries]:
    puts: list[tuple[str, bytes]] = []
    deletes: list[str] = []
    size_bytes = 0
    for done, extent in enumerate(extents):
        prefix = f"{REPLICATED}/{extent.partition}/"
        wanted, extra = differing_entries(store.forest, extent)
        deletes += [prefix + path for path in extra]
        size_bytes += sum(map(len, extra))
        for start in range(0, len(wanted), _READS_AT_ONCE):
            keys = [prefix + path for path in wanted[start : start + _READS_AT_ONCE]]
            for key, value in zip(keys, await asyncio.gather(*map(store.get, keys)), strict=True):
                if value is None:  # deleted since the digest was read: its record follows
                    continue
                if puts and size_bytes + len(value) > _ENTRIES_FRAME_BYTES:
                    yield Entries(puts, deletes, done)
                    puts, deletes, size_bytes = [], [], 0
                puts.append((key, value))
                size_bytes += len(value) + len(key)
        if size_bytes > _ENTRIES_FRAME_BYTES:
            yield Entries(puts, deletes, done + 1)
            puts, deletes, size_bytes = [], [], 0
        await asyncio.sleep(0)
    yield Entries(puts, deletes, len(extents))


async def _records_since(store: PrimaryStore, request: FetchRequest, last: int) -> AsyncIterator[RecordFrame | Skip]:
    at = request.base_index
    while at < last:
        for frame, covered in frames_of(await store.records(at + 1, min(_RECORDS_AT_ONCE, last - at))):
            yield frame
            at = covered


async def _last(steps: Iterator[_T]) -> _T | None:
    """Run a generator to its end, letting other tasks run now and then; its last item."""
    last: _T | None = None
    for count, item in enumerate(steps):
        last = item
        if count % _PAGES_BETWEEN_TURNS == 0:
            await asyncio.sleep(0)
    return last


# The secondary's side.


class SyncRefused(Exception):
    """The primary does not speak to this secondary; ``request`` and ``fetch`` may raise it."""


@dataclass(frozen=True, slots=True)
class SyncProgress:
    """``done`` of ``total`` extents are received; 0 of 0 before the diff is known."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class SyncResult:
    """``event`` goes into ``states.step``: EQUAL, SYNCED, MISMATCH, LOST or REFUSED. ``keys`` were written or deleted;
    ``bytes`` travelled, both ways together."""

    event: Event
    reason: str
    position: Position | None
    round_trips: int
    bytes: int
    keys: int
    seconds: float


class _Broken(Exception):
    """The sync cannot go on; what is committed stays, the next one starts from it."""


class Syncer:
    """One sync. ``request`` makes the first round trip; ``fetch`` the second, yielding raw chunks of the body. Both
    raise ChannelClosed when the primary cannot be reached. While ``gate`` was last called with progress, reads of class
    ``r`` must be refused; with None they are open. It is the caller who starts with a closed gate when the stored
    position is none."""

    def __init__(
        self,
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
    ) -> None:
        self._store = store
        self._request = request
        self._fetch = fetch
        self._on_event = on_event
        self._clock = clock
        self._identity = identity
        self._budget = Budget.of(limits or Limits())
        self._staging = _Staging(store, self._budget, on_applied, gate)
        self._round_trips = 0
        self._bytes = 0

    async def run(self) -> SyncResult:
        """Diff, and sync what differs; ``on_event`` hears DIFFERS in between. Raises BackendError when this cluster's
        own store fails in a way that ends the tenure."""
        started_s = self._clock.monotonic()
        try:
            event, reason = await self._run()
        except SyncRefused as refused:
            event, reason = Event.REFUSED, str(refused)
        except (ChannelClosed, ProtocolViolation, TooLarge, PermissionDenied, _Broken) as error:
            event, reason = Event.LOST, str(error)
            log.warning("merkle sync ended early: %s", reason)
        return SyncResult(
            event=event,
            reason=reason,
            position=stored_position(self._store),
            round_trips=self._round_trips,
            bytes=self._bytes,
            keys=self._staging.keys,
            seconds=self._clock.monotonic() - started_s,
        )

    async def _run(self) -> tuple[Event, str]:
        log.info("starting merkle diff")
        reply = await self._diff()
        source = Source(reply.cluster_id, reply.set_id, reply.generation, reply.epoch, reply.epoch_id)
        mine = self._identity
        if mine is not None and (problem := fork_problem(mine.set_id, mine.epoch, mine.epoch_id, source)):
            raise SyncRefused(problem)
        base = Position(source.set_id, source.generation, source.epoch, reply.base_index, reply.base_hash)
        if reply.equal:
            await self._staging.finish(base)
            return Event.EQUAL, ""
        self._on_event(Event.DIFFERS)
        plan = SyncPlan.of(reply, self._store.forest)
        log.info("starting merkle sync: %d extents differ, %d partitions are gone", len(plan.ranges), len(plan.gone))
        self._staging.total = len(plan.ranges)
        await self._staging.add(plan.deletions(self._store.forest))
        guard = await self._fetch_all(plan, base)
        end = Position(base.set_id, base.generation, base.epoch, guard.index, guard.chain_hash)
        return await self._conclude(guard, end)

    async def _diff(self) -> DiffReply:
        request = await _last(diff_request(self._store.forest))
        if request is None:
            raise AssertionError("a diff request ends its generator")
        self._round_trips += 1
        reply = await self._request(request)
        self._bytes += len(encode(request)) + len(encode(reply))
        return reply

    async def _fetch_all(self, plan: SyncPlan, base: Position) -> Guard:
        """Every request of the plan, one after the other; the last is the final one."""
        pending: list[Extent] | None = None
        for extents in plan.requests(self._store.forest, FETCH_REQUEST_BYTES):
            if pending is not None:
                await self._fetch_one(FetchRequest(base.index, base.chain_hash, False, pending), base)
            pending = extents
        return await self._fetch_one(FetchRequest(base.index, base.chain_hash, True, pending or []), base)

    async def _fetch_one(self, request: FetchRequest, base: Position) -> Guard:
        self._round_trips += 1
        self._bytes += len(encode(request))
        done_before = self._staging.done
        intake = Intake(base, self._budget)
        guard: Guard | None = None
        unframer = Unframer()
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
                        await self._received(frame, intake, done_before)
        unframer.end()
        if guard is None:
            raise ProtocolViolation("the answer ended without its guard")
        if (guard.index, guard.chain_hash) != (intake.last.index, intake.last.chain_hash):
            raise ProtocolViolation(f"the guard names record {guard.index}, the records end at {intake.last.index}")
        return guard

    async def _received(self, frame: FromFetch, intake: Intake, done_before: int) -> None:
        if isinstance(frame, Entries):
            self._staging.done = max(self._staging.done, done_before + frame.done)
            writes = [Write(key, value) for key, value in frame.puts] + [Write(key, None) for key in frame.deletes]
            await self._staging.add([write for write in checked_writes(writes) if not self._has_keyring(write)])
        elif isinstance(frame, RecordFrame | Skip):
            intake.accept(frame)
            while (batch := intake.take()) is not None:
                await self._staging.add(batch.writes)
        elif isinstance(frame, Bye):
            raise _Broken(frame.reason)

    def _has_keyring(self, write: Write) -> bool:
        """Whether a write is the keyring that is here already: it travels with every answer."""
        if write.key != KEYRING_KEY or write.value is None:
            return False
        return self._store.forest.digest_of(KEYRING_KEY) == entry_digest(write.key, write.value)

    async def _conclude(self, guard: Guard, position: Position) -> tuple[Event, str]:
        if self._staging.fits_one_commit():
            await self._staging.finish(position)
            if self._store.forest.root(REPLICATED) == guard.root:
                return Event.SYNCED, ""
        else:
            await self._staging.flush()
            if self._store.forest.root(REPLICATED) == guard.root:
                await self._staging.finish(position)
                return Event.SYNCED, ""
        return Event.MISMATCH, f"roots still differ at record {guard.index} after everything was fetched"


class _Staging:
    """What was fetched and is not yet committed: at most one commit's worth."""

    def __init__(
        self,
        store: SecondaryStore,
        budget: Budget,
        on_applied: Callable[[Sequence[str]], Awaitable[None]],
        gate: Callable[[SyncProgress | None], None],
    ) -> None:
        self._store = store
        self._budget = budget
        self._on_applied = on_applied
        self._gate = gate
        self._pending: dict[str, Write] = {}
        self._pending_bytes = 0
        self._mixed = is_none(stored_position(store))
        self.keys = 0
        self.done = 0
        self.total = 0

    def fits_one_commit(self) -> bool:
        """Whether nothing was committed yet and the data is one whole prefix still."""
        return not self._mixed and len(self._pending) <= self._budget.writes_max

    async def add(self, writes: Sequence[Write]) -> None:
        """Stage writes; commits what no longer fits. The keyring is committed, and loaded, before what follows it."""
        for write in writes:
            cost = self._budget.cost_bytes(write)
            known = write.key in self._pending
            full = len(self._pending) + (not known) > self._budget.writes_max
            if self._pending and (full or self._pending_bytes + cost > self._budget.bytes_max):
                await self.flush()
            self._pending.pop(write.key, None)
            self._pending[write.key] = write
            self._pending_bytes += cost
            if write.key == KEYRING_KEY:
                await self.flush()

    async def flush(self) -> None:
        """Commit what is staged, and with it that the data is a mix from here on."""
        if not self._pending and self._mixed:
            return
        self._mixed = True
        self._gate(SyncProgress(self.done, self.total))
        await self._commit(NONE_POSITION)

    async def finish(self, position: Position) -> None:
        """Commit what is staged together with the position, and open the gate."""
        if self._pending or stored_position(self._store) != position:
            await self._commit(position)
        self._mixed = False
        self._gate(None)

    async def _commit(self, position: Position) -> None:
        writes = list(self._pending.values())
        self._pending.clear()
        self._pending_bytes = 0
        pieces: list[list[Write]] = split_writes(writes, self._budget) or [[]]
        while pieces:
            piece = pieces.pop(0)
            try:
                await commit(self._store, piece, NONE_POSITION if pieces else position)
            except TooLarge:
                if len(piece) <= 1:
                    raise
                pieces[:0] = [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
                self._mixed = True
                self._gate(SyncProgress(self.done, self.total))
                continue
            self.keys += len(piece)
            if piece:
                await self._on_applied([write.key for write in piece])


@contextlib.asynccontextmanager
async def _closing(chunks: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """A body that is read no further is let go of at once: its connection is not left to the garbage collector."""
    try:
        yield chunks
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
