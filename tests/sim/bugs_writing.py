"""Planted bugs of commits, lost answers, guards, leases and the election (``bugs.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from consul_backend import lease as lease_table
from consul_backend import merkle_flush, retention
from consul_backend.delivery import Delivery
from consul_backend.election import Election
from consul_backend.errors import BackendError, Conflict, OutcomeUnknown, Unavailable
from consul_backend.fenced import Newest
from consul_backend.group_commit import GroupCommit
from consul_backend.lease import Action, Event, Phase
from consul_backend.merkle_flush import Flusher
from consul_backend.physical import Item, PhysicalStore, TxnResult
from consul_backend.read_lease import ReadLease
from consul_backend.tenure import Tenure
from consul_backend.testing import SimulatedStore
from consul_backend.txn import Cas, CheckNotExists, Op, Set
from consul_backend.wal import Head
from tests.sim.bugs import bug
from tests.sim.focus import (
    ACQUIRE,
    CALM,
    DEPOSED,
    LATE,
    LATE_AND_COLLECTED,
    LEASE,
    LEASE_LATE,
    LOST,
    LOST_AND_DEPOSED,
    UNRESOLVED,
)

NOWHERE = CheckNotExists("nowhere")
"""Stands where a guard should be: the positions of the others stay."""


def _change_commits(stack: ExitStack, change: Callable[[list[Op]], None]) -> None:
    deliver = Delivery.deliver

    async def changed(self: Delivery, sent: Any) -> int:
        change(sent.ops)
        return await deliver(self, sent)

    stack.enter_context(patch.object(Delivery, "deliver", changed))


# -- the three guards of a commit


@bug("commit-without-fence", DEPOSED)
def commit_without_fence(stack: ExitStack) -> None:
    """A commit does not check the session: a deposed node still writes."""

    def change(ops: list[Op]) -> None:
        ops[0] = NOWHERE

    _change_commits(stack, change)


@bug("commit-without-chain", LATE_AND_COLLECTED)
def commit_without_chain(stack: ExitStack) -> None:
    """A commit does not check the record before it: a late duplicate of a collected record lands."""

    def change(ops: list[Op]) -> None:
        ops[1] = NOWHERE

    _change_commits(stack, change)


@bug("tenure-record-without-chain", LATE_AND_COLLECTED)
def tenure_without_chain(stack: ExitStack) -> None:
    """The first record of a tenure does not check the one before it: its late duplicate lands once it is collected."""

    def change(ops: list[Op]) -> None:
        if len(ops) == 3:  # no data: a tenure record
            ops[1] = NOWHERE

    _change_commits(stack, change)


@bug("data-before-record", CALM)
def data_before_record(stack: ExitStack) -> None:
    """The data is written in a transaction of its own, a moment before its record."""
    deliver = Delivery.deliver

    async def changed(self: Delivery, sent: Any) -> int:
        data = sent.ops[2:-1]
        if data and sent.record.header.large is None:
            with suppress(BackendError):
                await self._physical.txn([sent.ops[0], *data])
                sent.ops[2:-1] = []
        return await deliver(self, sent)

    stack.enter_context(patch.object(Delivery, "deliver", changed))


@bug("commit-overwrites-record", LATE)
def commit_overwrites_record(stack: ExitStack) -> None:
    """A commit sets its record instead of creating it: a duplicate puts old data back."""

    def change(ops: list[Op]) -> None:
        record = ops[-1]
        assert isinstance(record, Cas | Set)
        ops[-1] = Set(record.key, record.value)

    _change_commits(stack, change)


# -- lost answers


@bug("lost-answer-is-failure", LOST)
def lost_answer_is_failure(stack: ExitStack) -> None:
    """A transaction whose answer was lost is reported as not applied."""

    async def deliver(self: Delivery, sent: Any) -> int:
        try:
            return (await self._physical.txn(sent.ops)).modify_index
        except Conflict as refusal:
            return await self._judge(sent, refusal)
        except OutcomeUnknown:
            raise Unavailable("no answer") from None

    stack.enter_context(patch.object(Delivery, "_deliver", deliver))


@bug("lost-answer-is-success", UNRESOLVED)
def lost_answer_is_success(stack: ExitStack) -> None:
    """A transaction whose answer was lost is reported as applied."""
    deliver = Delivery.deliver

    async def changed(self: Delivery, sent: Any) -> int:
        try:
            return await deliver(self, sent)
        except OutcomeUnknown:
            for batch in sent.packing.batches:
                if hasattr(batch, "future") and not batch.future.done():
                    batch.future.set_result(Head(sent.record.index, sent.record.chain_hash, 0))
            raise

    stack.enter_context(patch.object(Delivery, "deliver", changed))


@bug("lost-answer-is-repeated-under-a-new-index", LOST)
def lost_answer_is_repeated(stack: ExitStack) -> None:
    """Instead of resolving a lost answer, its batches are queued again and written as another record."""

    commit = GroupCommit._commit
    owners: dict[Delivery, GroupCommit] = {}

    async def owned(self: GroupCommit, sent: Any) -> None:
        owners[self._delivery] = self
        await commit(self, sent)

    async def deliver(self: Delivery, sent: Any) -> int:
        try:
            return (await self._physical.txn(sent.ops)).modify_index
        except Conflict as refusal:
            return await self._judge(sent, refusal)
        except OutcomeUnknown:
            owners[self]._queue.extendleft(reversed(sent.packing.batches))
            sent.packing.batches = []
            item = await self._physical.get(sent.key, consistent=True)
            if item is not None:
                return item.modify_index
            raise Unavailable("no answer") from None

    stack.enter_context(patch.object(Delivery, "_deliver", deliver))
    stack.enter_context(patch.object(GroupCommit, "_commit", owned))


@bug("deposed-means-not-applied", LOST_AND_DEPOSED)
def deposed_means_not_applied(stack: ExitStack) -> None:
    """A resent commit that the fence refuses is reported as not applied, though its first sending may have been."""
    judge = Delivery._judge

    async def changed(self: Delivery, sent: Any, refusal: Any) -> int:
        if any(failure.op_index == 0 for failure in refusal.failures):
            sent.unknown = False
        return await judge(self, sent, refusal)

    stack.enter_context(patch.object(Delivery, "_judge", changed))


@bug("acknowledged-before-applied")
def acknowledged_before_applied(stack: ExitStack) -> None:
    """Callers are told ok when their transaction is sent."""
    deliver = Delivery.deliver

    async def changed(self: Delivery, sent: Any) -> int:
        for batch in sent.packing.batches:
            if hasattr(batch, "future") and not batch.future.done():
                batch.future.set_result(Head(sent.record.index, sent.record.chain_hash, 0))
        return await deliver(self, sent)

    stack.enter_context(patch.object(Delivery, "deliver", changed))


@bug("flush-forgets-lost-answer", LOST)
def flush_forgets_lost_answer(stack: ExitStack) -> None:
    """A flush whose answer was lost counts as not applied; the next one is built on the old checkpoint."""
    flush = Flusher.flush

    async def changed(self: Flusher) -> int:
        try:
            return await flush(self)
        finally:
            forgotten, self._unresolved = self._unresolved, None
            if forgotten is not None:
                self._table.failed(forgotten.plan)

    stack.enter_context(patch.object(Flusher, "flush", changed))


# -- guards of what carries no record


async def _unguarded(
    physical: PhysicalStore, tenure: Tenure, ops: Sequence[Op], newest: Newest | None = None
) -> TxnResult:
    return await physical.txn(list(ops))


@bug("flush-without-guards", DEPOSED)
def flush_without_guards(stack: ExitStack) -> None:
    """A flush checks neither session nor epoch."""
    stack.enter_context(patch.object(merkle_flush, "fenced_txn", _unguarded))


@bug("collection-without-guards", DEPOSED)
def collection_without_guards(stack: ExitStack) -> None:
    """Collecting the log checks neither session nor epoch."""
    stack.enter_context(patch.object(retention, "fenced_idempotent", _unguarded))


# -- the read lease and the election


@bug("reads-without-lease", LEASE)
def reads_without_lease(stack: ExitStack) -> None:
    """A node serves reads for as long as it has not noticed that it was deposed."""
    stack.enter_context(patch.object(ReadLease, "valid", lambda self: not self._lost))


@bug("lease-proved-when-answered", LEASE_LATE)
def lease_proved_when_answered(stack: ExitStack) -> None:
    """A proof counts from the moment when its answer came, not from when it was sent."""

    def proved(self: ReadLease, sent_at: float) -> None:
        self._proved_at = self._clock.monotonic()

    stack.enter_context(patch.object(ReadLease, "proved", proved))


@bug("lease-longer-than-lock-delay", LEASE)
def lease_longer(stack: ExitStack) -> None:
    """The read lease is four times the lock-delay."""
    init = ReadLease.__init__

    def changed(self: ReadLease, clock: Any, lease_s: float, renew: Any) -> None:
        init(self, clock, 4 * lease_s, renew)

    stack.enter_context(patch.object(ReadLease, "__init__", changed))


@bug("session-without-lock-delay", LEASE)
def session_without_lock_delay(stack: ExitStack) -> None:
    """The lock is free at once when its session ends."""
    create = SimulatedStore.create_session

    async def changed(self: SimulatedStore, name: str, *, beat_ttl_s: float, lock_delay_s: float) -> str:
        return await create(self, name, beat_ttl_s=beat_ttl_s, lock_delay_s=0.0)

    stack.enter_context(patch.object(SimulatedStore, "create_session", changed))


@bug("session-kept-after-lost-acquire", ACQUIRE)
def session_kept_after_lost_acquire(stack: ExitStack) -> None:
    """An acquire without an answer that is not there yet is forgotten; it lands later, nobody leads with it, and the
    node takes its own lock for another's."""
    row = {(Phase.RESOLVING_UNKNOWN, Event.FOUND_FOREIGN): (Phase.STANDBY, Action.WAIT)}
    stack.enter_context(patch.dict(lease_table.TABLE, row))
    watch = Election._watch_lock

    async def watched(self: Election, index: int) -> tuple[Item | None, int]:
        item, index = await watch(self, index)
        own = item is not None and item.session == self._session
        return (replace(item, session="another") if item is not None and item.session and own else item), index

    stack.enter_context(patch.object(Election, "_watch_lock", watched))
