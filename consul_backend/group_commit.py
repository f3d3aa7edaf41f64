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
                                            After that refusal no earlier attempt can land: a session serves one tenure.
                                            Unknown where an answer was lost and by now the chain is refused as well
refused by chain or record                  the record is read: byte for byte ours → it had landed; else StoreWentBack
refused otherwise (rights, size)            each batch alone under the same index, so one bad batch fails alone; a size
                                            that the server refused is learnt first, and batches are packed anew
refused for its size after a lost answer    a record without entries takes its place; then it cannot land any more, and
                                            its batches are packed anew (``delivery.py``)
certainly not applied, for the whole time   NotApplied to its callers; the tenure goes on
still unknown                               OutcomeUnknown to its callers and from :meth:`GroupCommit.run`
==========================================  ===========================================================================

Whatever ends :meth:`GroupCommit.run`, queued batches fail as NotApplied.

A *special* record (of a large batch) is a transaction of its own. Specials and what is queued take turns, so neither
waits for more than one of the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import NoReturn

from consul_backend.batching import Batch, Budget, NeedsParts, Packing, Prepared, Preparer, require_fits_alone, take
from consul_backend.clock import Clock
from consul_backend.commits import CommitCounts, CommitOptions, Committed, MakeSpecial, Special, Tip
from consul_backend.deadline import at_deadline, passed, passed_under_way
from consul_backend.delivery import Delivery, Sent, Superseded
from consul_backend.errors import (
    BackendError,
    Conflict,
    DeadlinePassed,
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
from consul_backend.wal import BATCH_ID_BYTES, Groups, Head, Kind, Large, Record, Write, record_key

__all__ = ["CommitOptions", "Committed", "GroupCommit", "MakeSpecial", "Special", "Tip"]


class _Pending(Batch):
    """A queued batch and the caller that waits for it."""

    __slots__ = ("future", "timer")

    def __init__(
        self, writes: dict[str, Prepared], positions: Mapping[str, Position] | None, future: asyncio.Future[Head]
    ) -> None:
        super().__init__(writes, positions)
        self.future = future
        self.timer: asyncio.TimerHandle | None = None

    def fail(self, error: BackendError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _PendingSpecial(_Pending):
    """A special record and the runner that waits for it."""

    __slots__ = ("make",)

    def __init__(self, make: MakeSpecial, future: asyncio.Future[Head]) -> None:
        super().__init__({}, None, future)
        self.make = make


def _fail(sent: Sent, error: BackendError) -> None:
    for batch in sent.packing.batches:
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
        self._random_bytes = random_bytes
        self._on_commit = on_commit
        self._preparer = Preparer(generation, physical.limits)
        self._fence = CheckSession(LOCK_KEY, tenure.session)
        self._limits = physical.limits
        self.budget = Budget(physical.limits, session=tenure.session, record_key=tip.key, writer=tenure.node_id)
        self.counts = CommitCounts()
        self._delivery = Delivery(
            physical,
            clock=clock,
            lease=lease,
            resolve_timeout_s=options.resolve_timeout_s,
            counts=self.counts,
            filler=lambda: self._build(Packing(self.budget, self._tip.record.header.positions), "data"),
        )
        self._queue: deque[Batch] = deque()
        self._specials: deque[_PendingSpecial] = deque()
        self._special_turn = True
        self._queue_bytes = 0
        self._arrived = asyncio.Event()
        self._in_flight: Sent | None = None
        self._acknowledged: tuple[Sent, Committed] | None = None
        self._closed = False

    # -- callers

    async def commit(self, writes: Sequence[Write], positions: Mapping[str, Position] | None) -> Head:
        """Commit ``writes`` atomically; returns the head of the record that holds them.

        Raises ValueError (malformed key), NeedsParts, TooLarge, Overloaded, NotApplied, PermissionDenied: nothing was
        written; OutcomeUnknown: read before repeating. Cancelling withdraws a batch that is still queued, and so does
        the caller's deadline (:mod:`consul_backend.deadline`).
        """
        pending = self._enqueue(writes, positions)
        try:
            pending.timer = at_deadline(partial(self._overdue, pending))
            return await pending.future
        except (asyncio.CancelledError, DeadlinePassed):
            self._withdraw(pending)
            raise
        finally:
            if pending.timer is not None:
                pending.timer.cancel()

    def _overdue(self, pending: _Pending) -> None:
        if self._withdraw(pending):
            self.counts.overdue += 1
            pending.fail(passed())
        else:
            pending.fail(passed_under_way())

    def _enqueue(self, writes: Sequence[Write], positions: Mapping[str, Position] | None) -> _Pending:
        if self._closed:
            raise NotApplied("this tenure has ended: nothing was written")
        future = asyncio.get_running_loop().create_future()
        pending = _Pending(self._preparer.prepare_all(writes), positions, future)
        require_fits_alone(pending, self.budget, self._tip.record.header.positions)
        queue, options = self._queue, self._options
        if len(queue) >= options.queue_batches_max or self._queue_bytes + pending.size_bytes > options.queue_bytes_max:
            self.counts.overloaded += 1
            raise Overloaded(f"{len(queue)} batches of {self._queue_bytes} bytes wait to be committed already")
        queue.append(pending)
        self._queue_bytes += pending.size_bytes
        self.counts.queue_peak = max(self.counts.queue_peak, len(queue))
        self._arrived.set()
        return pending

    async def special(self, make: MakeSpecial) -> Head:
        """Commit a special record in its turn. Raises as :meth:`commit`, and what ``make`` raises."""
        if self._closed:
            raise NotApplied("this tenure has ended: nothing was written")
        pending = _PendingSpecial(make, asyncio.get_running_loop().create_future())
        self._specials.append(pending)
        self._arrived.set()
        return await pending.future

    async def special_now(self, make: MakeSpecial) -> Head:
        """The same before :meth:`run`. Raises FenceLost, StoreWentBack, OutcomeUnknown, Unavailable, PermissionDenied,
        TooLarge."""
        sent = self._build_special(make(), [])
        try:
            self._advance(sent, await self._delivery.deliver(sent))
        except TooLarge as refusal:
            self._supersede(refusal)
            self._relimited()
            raise
        finally:
            self._settle()
        return self._tip.head

    def _withdraw(self, pending: _Pending) -> bool:
        """Take a batch out of the queue; whether it was there."""
        try:
            self._queue.remove(pending)
        except ValueError:
            return False
        self._queue_bytes -= pending.size_bytes
        return True

    @property
    def closed(self) -> bool:
        """Whether :meth:`run` has ended."""
        return self._closed

    def newest(self) -> CheckIndex:
        """Passes as long as the log has the newest record as it was written."""
        return CheckIndex(self._tip.key, self._tip.modify_index)

    @property
    def tip(self) -> Tip:
        """The newest record that the store acknowledged."""
        return self._tip

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        counts = {f"commit_{name}": count for name, count in asdict(self.counts).items()}
        return counts | {"commit_queue": len(self._queue), "commit_queue_bytes": self._queue_bytes}

    def pending(self, key: str) -> bool:
        """Whether a write of the key is queued, in flight, or acknowledged and not in the index yet."""
        sent = [self._in_flight, self._acknowledged and self._acknowledged[0]]
        return any(key in batch.writes for batch in self._queue) or any(
            one is not None and key in one.packing.entries for one in sent
        )

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
        sent = self._build(Packing(self.budget, self._tip.record.header.positions), "tenure")
        self._advance(sent, await self._delivery.deliver(sent))
        self._settle()

    async def run(self) -> NoReturn:
        """Commit what arrives until cancelled. Raises FenceLost, StoreWentBack, OutcomeUnknown."""
        try:
            while True:
                if self._specials and (self._special_turn or not self._queue):
                    self._special_turn = False
                    await self._commit_special(self._specials.popleft())
                    continue
                self._special_turn = True
                if not self._queue:
                    self._settle()
                    self._arrived.clear()
                    await self._arrived.wait()
                    continue
                failpoint("commit:before-build")
                packing = take(self._queue, self.budget, self._tip.record.header.positions)
                self._queue_bytes -= sum([batch.size_bytes for batch in packing.batches])
                if packing.batches:
                    await self._commit(self._build(packing, "data"))
                else:
                    self._refuse_first()
        finally:
            self._close()

    async def _commit_special(self, pending: _PendingSpecial) -> None:
        self._settle()
        try:
            special = pending.make()
        except BackendError as error:
            pending.fail(error)
            return
        self.counts.specials += 1
        await self._commit(self._build_special(special, [pending]))

    def _refuse_first(self) -> None:
        """A position that grew since the batch was checked can make it too large after all."""
        batch = self._queue.popleft()
        self._queue_bytes -= batch.size_bytes
        if isinstance(batch, _Pending):
            batch.fail(NeedsParts("the batch and the positions to record with it exceed one transaction"))

    def _close(self) -> None:
        self._closed = True
        try:
            self._settle()
        finally:
            for batch in (*self._queue, *self._specials):
                if isinstance(batch, _Pending):
                    batch.fail(NotApplied("this node is no longer active: the write was queued and never sent"))
            self._queue.clear()
            self._specials.clear()
            self._queue_bytes = 0

    def _build(self, packing: Packing, kind: Kind) -> Sent:
        sent = self._assemble(packing, kind, packing.groups(), [write.op for write in packing.entries.values()])
        if len(sent.raw) > packing.record_bytes:
            raise AssertionError(f"a record of {len(sent.raw)} bytes was sized as {packing.record_bytes}")
        return sent

    def _build_special(self, special: Special, waiting: list[Batch]) -> Sent:
        packing = Packing(self.budget, {**self._tip.record.header.positions, **(special.positions or {})})
        packing.batches = waiting
        return self._assemble(packing, special.kind, special.groups, special.ops, special.large)

    def _assemble(
        self, packing: Packing, kind: Kind, groups: Groups, data: Sequence[Op], large: Large | None = None
    ) -> Sent:
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
            groups=groups,
            large=large,
        )
        raw = record.encode()
        key = record_key(self._generation, record.index, self._options.segment_records)
        ops: list[Op] = [self._fence, CheckIndex(tip.key, tip.modify_index)]
        ops += data
        ops.append(Cas(key, raw, 0))
        return Sent(packing, record, raw, key, ops)

    async def _commit(self, sent: Sent) -> None:
        """Send one transaction, settle the one before meanwhile, and deal with the answer."""
        self._in_flight = sent
        try:
            if self._acknowledged is None:
                modify_index = await self._delivery.deliver(sent)
            else:
                modify_index = await self._deliver_and_settle(sent)
        except (PermissionDenied, TooLarge, Conflict, Unavailable) as refusal:
            sent.settled.set()
            self._supersede(refusal)
            self._refused(sent, refusal)
            return
        except BaseException as error:
            sent.settled.set()
            if isinstance(error, FenceLost) or (isinstance(error, StoreWentBack) and not sent.unknown):
                _fail(sent, NotApplied("this node is no longer active: nothing was written"))
            else:
                _fail(sent, OutcomeUnknown("this node is no longer active: the write may have been applied"))
            raise
        finally:
            self._in_flight = None
        self._advance(sent, modify_index)

    async def _deliver_and_settle(self, sent: Sent) -> int:
        delivery = asyncio.create_task(self._delivery.deliver(sent), name="commit")
        try:
            await asyncio.sleep(0)  # the request leaves first
            self._settle()
            return await delivery
        finally:
            if not delivery.done():
                delivery.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await delivery

    def _advance(self, sent: Sent, modify_index: int) -> None:
        self._tip = Tip(sent.record, sent.key, modify_index)
        committed = Committed(sent.record, self._tip.head, sent.packing.entries, len(sent.raw))
        self._acknowledged = (sent, committed)

    def _supersede(self, refusal: BackendError) -> None:
        if isinstance(refusal, Superseded):
            self._advance(refusal.filler, refusal.modify_index)

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
            _fail(sent, OutcomeUnknown("the write was applied, but this node failed before it could say so"))

    def _refused(self, sent: Sent, refusal: BackendError) -> None:
        batches = sent.packing.batches
        if isinstance(refusal, Unavailable):
            _fail(sent, NotApplied("the store could not be reached: nothing was written"))
        elif isinstance(refusal, TooLarge) and self._relimited():
            self._repack(batches)
        elif len(batches) == 1:
            _fail(sent, refusal)
        else:
            self.counts.narrowed += 1
            for batch in batches:
                batch.alone = True
            alive = [batch for batch in batches if not isinstance(batch, _Pending) or not batch.future.done()]
            self._queue.extendleft(reversed(alive))
            self._queue_bytes += sum([batch.size_bytes for batch in alive])

    def _relimited(self) -> bool:
        """Whether the store has learnt other limits since the transactions were last sized; sizes them anew if so."""
        limits = self._physical.limits
        if limits == self._limits:
            return False
        self._limits = limits
        self.counts.relimited += 1
        self.budget = Budget(
            limits, session=self._tenure.session, record_key=self._tip.key, writer=self._tenure.node_id
        )
        self._preparer = Preparer(self._generation, limits)
        return True

    def _repack(self, batches: Sequence[Batch]) -> None:
        """Queue batches again, the oldest first; those that now need parts, queued ones too, are told so."""
        kept: deque[Batch] = deque()
        for batch in (*batches, *self._queue):
            if isinstance(batch, _PendingSpecial):
                batch.fail(TooLarge("the store takes less than this record was made for"))
            elif not isinstance(batch, _Pending) or not batch.future.done():
                try:
                    require_fits_alone(batch, self.budget, self._tip.record.header.positions)
                    kept.append(batch)
                except NeedsParts as error:
                    if isinstance(batch, _Pending):
                        batch.fail(error)
        self._queue = kept
        self._queue_bytes = sum([batch.size_bytes for batch in kept])
