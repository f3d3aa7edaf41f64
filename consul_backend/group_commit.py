"""Group commit: the only code path that writes a data key. One transaction is in flight, what arrives queues.

A transaction is ``[fence, chain, data operations..., record]`` (architecture 3.2). With one in flight, the store's
order *is* the log's order. The next one is sent at once, as full as the queue makes it; the effects of the one before
(index, cache, acknowledgements) are worked off while it travels, so nobody waits for the other.

How a transaction ends:

==========================================  ===========================================================================
acknowledged                                index, cache and head advance, then its callers are acknowledged
answer lost                                 the identical transaction again, for ``resolve_timeout_s``: chain and
                                            ``cas 0`` let at most one land; then the record is read, consistently
refused by the fence                        NotApplied to its callers; :class:`FenceLost` from :meth:`GroupCommit.run`.
                                            After that refusal no earlier attempt can land: a session serves one tenure
refused by chain or record                  the record is read: byte for byte ours → it had landed; else StoreWentBack
refused otherwise (rights, size)            each batch alone under the same index, so one bad batch fails alone
certainly not applied, for the whole time   NotApplied to its callers; the tenure goes on
still unknown                               OutcomeUnknown to its callers and from :meth:`GroupCommit.run`
==========================================  ===========================================================================

Whatever ends :meth:`GroupCommit.run`, queued batches fail as NotApplied.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from consul_backend.batching import Batch, Budget, Packing, Prepared, Preparer, require_fits_alone, take
from consul_backend.clock import Clock
from consul_backend.errors import (
    BackendError,
    Conflict,
    FenceLost,
    NotApplied,
    OutcomeUnknown,
    Overloaded,
    PermissionDenied,
    StoreWentBack,
    TooLarge,
    Unavailable,
)
from consul_backend.failpoint import failpoint
from consul_backend.physical import LOCK_KEY, PhysicalStore
from consul_backend.position import Position
from consul_backend.read_lease import ReadLease
from consul_backend.tenure import Tenure
from consul_backend.txn import Cas, CheckIndex, CheckSession, Op
from consul_backend.wal import BATCH_ID_BYTES, Head, Kind, Record, Write, record_key

_FENCE_OP = 0
_CHAIN_OP = 1
_RESEND_PAUSE_S = 0.01
_RESEND_PAUSE_MAX_S = 0.5


@dataclass(frozen=True, slots=True)
class Tip:
    """The newest record as the next transaction's chain check needs it."""

    record: Record
    key: str
    modify_index: int

    @property
    def head(self) -> Head:
        """The same, for readers."""
        header = self.record.header
        return Head(header.index, self.record.chain_hash, header.time_ms)


@dataclass(frozen=True, slots=True)
class Committed:
    """What one acknowledged transaction did. ``size_bytes`` is the stored record's size."""

    record: Record
    head: Head
    entries: Mapping[str, Prepared]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CommitOptions:
    """Bounds of the queue, and how long a lost answer is pursued."""

    queue_batches_max: int
    queue_bytes_max: int
    resolve_timeout_s: float
    segment_records: int


@dataclass(slots=True)
class CommitCounts:
    """Since the tenure began. ``queue_peak`` is in batches."""

    transactions: int = 0
    batches: int = 0
    resent: int = 0
    narrowed: int = 0
    queue_peak: int = 0


class _Pending(Batch):
    """A queued batch and the caller that waits for it."""

    __slots__ = ("future",)

    def __init__(
        self, writes: dict[str, Prepared], positions: Mapping[str, Position] | None, future: asyncio.Future[Head]
    ) -> None:
        super().__init__(writes, positions)
        self.future = future

    def fail(self, error: BackendError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class _Sent:
    """One transaction from its building until its effects are worked off."""

    packing: Packing
    record: Record
    raw: bytes
    key: str
    ops: list[Op]
    unknown: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, error: BackendError) -> None:
        for batch in self.packing.batches:
            if isinstance(batch, _Pending):
                batch.fail(error)


class GroupCommit:
    """One tenure's commits. ``on_commit`` is called once per acknowledged transaction, in log order, before the
    callers are acknowledged; it must neither wait nor fail."""

    def __init__(
        self,
        physical: PhysicalStore,
        generation: str,
        tenure: Tenure,
        tip: Tip,
        options: CommitOptions,
        *,
        clock: Clock,
        lease: ReadLease,
        random_bytes: Callable[[int], bytes],
        on_commit: Callable[[Committed], None],
    ) -> None:
        self._physical = physical
        self._generation = generation
        self._tenure = tenure
        self._tip = tip
        self._options = options
        self._clock = clock
        self._lease = lease
        self._random_bytes = random_bytes
        self._on_commit = on_commit
        self._preparer = Preparer(generation, physical.limits)
        self._fence = CheckSession(LOCK_KEY, tenure.session)
        self._budget = Budget(physical.limits, session=tenure.session, record_key=tip.key, writer=tenure.node_id)
        self._queue: deque[Batch] = deque()
        self._queue_bytes = 0
        self._arrived = asyncio.Event()
        self._in_flight: _Sent | None = None
        self._acknowledged: tuple[_Sent, Committed] | None = None
        self._closed = False
        self.counts = CommitCounts()

    # -- callers

    async def commit(self, writes: Sequence[Write], positions: Mapping[str, Position] | None) -> Head:
        """Commit ``writes`` atomically; returns the head of the record that holds them.

        Raises ValueError (malformed key), TooLarge, Overloaded, NotApplied, PermissionDenied: nothing was written;
        OutcomeUnknown: read before repeating. Cancelling withdraws a batch that is still queued.
        """
        pending = self._enqueue(writes, positions)
        try:
            return await pending.future
        except asyncio.CancelledError:
            self._withdraw(pending)
            raise

    def _enqueue(self, writes: Sequence[Write], positions: Mapping[str, Position] | None) -> _Pending:
        if self._closed:
            raise NotApplied("this tenure has ended: nothing was written")
        future = asyncio.get_running_loop().create_future()
        pending = _Pending(self._preparer.prepare_all(writes), positions, future)
        require_fits_alone(pending, self._budget, self._tip.record.header.positions)
        queue, options = self._queue, self._options
        if len(queue) >= options.queue_batches_max or self._queue_bytes + pending.size_bytes > options.queue_bytes_max:
            raise Overloaded(f"{len(queue)} batches of {self._queue_bytes} bytes wait to be committed already")
        queue.append(pending)
        self._queue_bytes += pending.size_bytes
        self.counts.queue_peak = max(self.counts.queue_peak, len(queue))
        self._arrived.set()
        return pending

    def _withdraw(self, pending: _Pending) -> None:
        with contextlib.suppress(ValueError):
            self._queue.remove(pending)
            self._queue_bytes -= pending.size_bytes

    @property
    def queued(self) -> int:
        """Batches that wait."""
        return len(self._queue)

    async def settled(self, touches: Callable[[Mapping[str, Prepared]], bool]) -> bool:
        """Wait until no unsettled transaction that ``touches`` approves is left; whether there was one.

        Between the store's applying a transaction and the index' learning of it, a reader can see its values early.
        """
        waited = False
        for sent in (self._acknowledged and self._acknowledged[0], self._in_flight):
            if sent and not sent.settled.is_set() and touches(sent.packing.entries):
                waited = True
                await sent.settled.wait()
        return waited

    # -- the loop

    async def begin(self) -> None:
        """Commit the tenure record, the first of a tenure. Raises FenceLost, StoreWentBack, OutcomeUnknown,
        Unavailable, PermissionDenied."""
        sent = self._build(Packing(self._budget, self._tip.record.header.positions), "tenure")
        self._advance(sent, await self._deliver(sent))
        self._settle()

    async def run(self) -> NoReturn:
        """Commit what arrives until cancelled. Raises FenceLost, StoreWentBack, OutcomeUnknown."""
        try:
            while True:
                if not self._queue:
                    self._settle()
                    self._arrived.clear()
                    await self._arrived.wait()
                    continue
                failpoint("commit:before-build")
                packing = take(self._queue, self._budget, self._tip.record.header.positions)
                self._queue_bytes -= sum([batch.size_bytes for batch in packing.batches])
                if packing.batches:
                    await self._commit(self._build(packing, "data"))
                else:
                    self._refuse_first()
        finally:
            self._close()

    def _refuse_first(self) -> None:
        """A position that grew since the batch was checked can make it too large after all."""
        batch = self._queue.popleft()
        self._queue_bytes -= batch.size_bytes
        if isinstance(batch, _Pending):
            batch.fail(TooLarge("the batch and the positions to record with it exceed one transaction"))

    def _close(self) -> None:
        self._closed = True
        try:
            self._settle()
        finally:
            for batch in self._queue:
                if isinstance(batch, _Pending):
                    batch.fail(NotApplied("this node is no longer active: the write was queued and never sent"))
            self._queue.clear()
            self._queue_bytes = 0

    def _build(self, packing: Packing, kind: Kind) -> _Sent:
        tip = self._tip
        before = tip.record.header
        record = Record.build(
            index=before.index + 1,
            prev_hash=tip.record.chain_hash,
            epoch=self._tenure.epoch,
            writer=self._tenure.node_id,
            batch_id=self._random_bytes(BATCH_ID_BYTES),
            time_ms=max(self._clock.time_ms(), before.time_ms),
            kind=kind,
            positions=packing.positions,
            groups=packing.groups(),
        )
        raw = record.encode()
        if len(raw) > packing.record_bytes:
            raise AssertionError(f"a record of {len(raw)} bytes was sized as {packing.record_bytes}")
        key = record_key(self._generation, record.index, self._options.segment_records)
        ops: list[Op] = [self._fence, CheckIndex(tip.key, tip.modify_index)]
        ops += [write.op for write in packing.entries.values()]
        ops.append(Cas(key, raw, 0))
        return _Sent(packing, record, raw, key, ops)

    async def _commit(self, sent: _Sent) -> None:
        """Send one transaction, settle the one before meanwhile, and deal with the answer."""
        self._in_flight = sent
        try:
            if self._acknowledged is None:
                modify_index = await self._deliver(sent)
            else:
                modify_index = await self._deliver_and_settle(sent)
        except (PermissionDenied, TooLarge, Conflict, Unavailable) as refusal:
            sent.settled.set()
            self._refused(sent, refusal)
            return
        except BaseException as error:
            sent.settled.set()
            if isinstance(error, FenceLost) or (isinstance(error, StoreWentBack) and not sent.unknown):
                sent.fail(NotApplied("this node is no longer active: nothing was written"))
            else:
                sent.fail(OutcomeUnknown("this node is no longer active: the write may have been applied"))
            raise
        finally:
            self._in_flight = None
        self._advance(sent, modify_index)

    async def _deliver_and_settle(self, sent: _Sent) -> int:
        delivery = asyncio.create_task(self._deliver(sent), name="commit")
        try:
            await asyncio.sleep(0)  # the request leaves first
            self._settle()
            return await delivery
        finally:
            if not delivery.done():
                delivery.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await delivery

    def _advance(self, sent: _Sent, modify_index: int) -> None:
        self._tip = Tip(sent.record, sent.key, modify_index)
        committed = Committed(sent.record, self._tip.head, sent.packing.entries, len(sent.raw))
        self._acknowledged = (sent, committed)

    def _settle(self) -> None:
        """Work off the effects of the transaction that the store acknowledged last."""
        if self._acknowledged is None:
            return
        sent, committed = self._acknowledged
        self._acknowledged = None
        try:
            self._on_commit(committed)
            self.counts.transactions += 1
            self.counts.batches += len(sent.packing.batches)
            failpoint("commit:before-ack")
            for batch in sent.packing.batches:
                if isinstance(batch, _Pending) and not batch.future.done():
                    batch.future.set_result(committed.head)
        finally:
            sent.settled.set()
            sent.fail(OutcomeUnknown("the write was applied, but this node failed before it could say so"))

    def _refused(self, sent: _Sent, refusal: BackendError) -> None:
        batches = sent.packing.batches
        if isinstance(refusal, Unavailable):
            sent.fail(NotApplied("the store could not be reached: nothing was written"))
        elif len(batches) == 1:
            sent.fail(refusal)
        else:
            self.counts.narrowed += 1
            for batch in batches:
                batch.alone = True
            alive = [batch for batch in batches if not isinstance(batch, _Pending) or not batch.future.done()]
            self._queue.extendleft(reversed(alive))
            self._queue_bytes += sum([batch.size_bytes for batch in alive])

    # -- one transaction's fate

    async def _deliver(self, sent: _Sent) -> int:
        """The ModifyIndex of the record, once it is certain that it was written. Raises as the module text says."""
        deadline = self._clock.monotonic() + self._options.resolve_timeout_s
        pause_s = _RESEND_PAUSE_S
        while True:
            failpoint("commit:before-send")
            sent_at = self._lease.now()
            try:
                result = await self._physical.txn(sent.ops)
            except Conflict as refusal:
                return await self._judge(sent, refusal)
            except (PermissionDenied, TooLarge):
                if not sent.unknown:
                    raise
            except OutcomeUnknown:
                sent.unknown = True
            except Unavailable:
                pass
            else:
                failpoint("commit:after-reply")
                self._lease.proved(sent_at)
                return result.modify_index
            if self._clock.monotonic() + pause_s >= deadline:
                break
            self.counts.resent += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RESEND_PAUSE_MAX_S)
        if not sent.unknown:
            raise Unavailable("the store could not be reached: nothing was written")
        found = await self._find_own(sent)
        if found is None:
            # Not there *yet*: a request that was given up on may still land.
            raise OutcomeUnknown(f"record {sent.record.index} may have been written: the store did not answer in time")
        return found

    async def _judge(self, sent: _Sent, refusal: Conflict) -> int:
        failed = {failure.op_index for failure in refusal.failures}
        fence = _FENCE_OP in failed
        if fence:
            self._lease.lost()
        elif failed and not sent.unknown and not failed & {_CHAIN_OP, len(sent.ops) - 1}:
            raise refusal
        if fence and not sent.unknown:
            raise FenceLost("the store refused a commit: this node's session no longer holds the lock")
        found = await self._find_own(sent)
        if found is not None:
            return found
        if fence:
            raise FenceLost("the store refused a commit: this node's session no longer holds the lock")
        raise StoreWentBack(
            f"the store refused record {sent.record.index} although this node holds the lock: the record before it was"
            " changed, or another one is there. The store was restored or changed underneath"
        )

    async def _find_own(self, sent: _Sent) -> int | None:
        """The ModifyIndex of our record if it is stored. Raises OutcomeUnknown when that cannot be read."""
        try:
            item = await self._physical.get(sent.key, consistent=True)
        except BackendError as error:
            raise OutcomeUnknown(f"record {sent.record.index} may have been written: {error}") from error
        return item.modify_index if item is not None and item.value == sent.raw else None
