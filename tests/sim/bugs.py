"""Bugs on purpose, to check the checkers: each takes away or spoils one thing that the store's correctness rests on.

They live here and are patched in; no production code knows of them. A bug that no seed catches means that the
simulation has gone blind (``test_planted_bugs.py``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from consul_backend import lease as lease_table
from consul_backend import merkle_flush, merkle_pages, recovery, retention
from consul_backend.batching import Packing
from consul_backend.checkpoint import Checkpoint
from consul_backend.errors import Conflict, OutcomeUnknown, Unavailable
from consul_backend.group_commit import GroupCommit
from consul_backend.lease import Action, Event, Phase
from consul_backend.merkle import Forest, bucket_of
from consul_backend.merkle_flush import Flusher
from consul_backend.merkle_pages import ExtentTable
from consul_backend.physical import PhysicalStore, TxnResult
from consul_backend.read_lease import ReadLease
from consul_backend.roll_forward import LargeBatches
from consul_backend.tenure import Tenure
from consul_backend.testing import SimulatedStore
from consul_backend.txn import Cas, CheckNotExists, Op, Set
from consul_backend.value_cache import ValueCache
from consul_backend.wal import Head
from tests.sim.focus import (
    ACQUIRE,
    ANY,
    COLLECTING,
    CROWD,
    DEPOSED,
    LARGE,
    LATE,
    LATE_AND_COLLECTED,
    LAZY,
    LEASE,
    LEASE_LATE,
    LOST,
    LOST_AND_DEPOSED,
    PARTIAL_FLUSH,
    READING,
    RECOVERY,
    SLOW_RECOVERY,
    STALE,
    UNRESOLVED,
    Focus,
)

NOWHERE = CheckNotExists("nowhere")
"""Stands where a guard should be: the positions of the others stay."""

Patch = Callable[[ExitStack], None]


@dataclass(frozen=True, slots=True)
class Bug:
    """How to plant it, what it spoils, and the trouble in which that shows."""

    plant: Patch
    text: str
    focus: Focus


BUGS: dict[str, Bug] = {}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The code with one bug in it."""
    with ExitStack() as stack:
        BUGS[name].plant(stack)
        yield


def bug(name: str, focus: Focus = ANY) -> Callable[[Patch], Patch]:
    """Register a bug; its docstring says what it spoils."""

    def register(plant: Patch) -> Patch:
        BUGS[name] = Bug(plant, (plant.__doc__ or "").strip(), focus)
        return plant

    return register


def _change_commits(stack: ExitStack, change: Callable[[list[Op]], None]) -> None:
    deliver = GroupCommit._deliver

    async def changed(self: GroupCommit, sent: Any) -> int:
        change(sent.ops)
        return await deliver(self, sent)

    stack.enter_context(patch.object(GroupCommit, "_deliver", changed))


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

    async def deliver(self: GroupCommit, sent: Any) -> int:
        try:
            return (await self._physical.txn(sent.ops)).modify_index
        except Conflict as refusal:
            return await self._judge(sent, refusal)
        except OutcomeUnknown:
            raise Unavailable("no answer") from None

    stack.enter_context(patch.object(GroupCommit, "_deliver", deliver))


@bug("lost-answer-is-success", UNRESOLVED)
def lost_answer_is_success(stack: ExitStack) -> None:
    """A transaction whose answer was lost is reported as applied."""
    deliver = GroupCommit._deliver

    async def changed(self: GroupCommit, sent: Any) -> int:
        try:
            return await deliver(self, sent)
        except OutcomeUnknown:
            for batch in sent.packing.batches:
                if hasattr(batch, "future") and not batch.future.done():
                    batch.future.set_result(Head(sent.record.index, sent.record.chain_hash, 0))
            raise

    stack.enter_context(patch.object(GroupCommit, "_deliver", changed))


@bug("lost-answer-is-repeated-under-a-new-index", LOST)
def lost_answer_is_repeated(stack: ExitStack) -> None:
    """Instead of resolving a lost answer, its batches are queued again and written as another record."""

    async def deliver(self: GroupCommit, sent: Any) -> int:
        try:
            return (await self._physical.txn(sent.ops)).modify_index
        except Conflict as refusal:
            return await self._judge(sent, refusal)
        except OutcomeUnknown:
            self._queue.extendleft(reversed(sent.packing.batches))
            sent.packing.batches = []
            item = await self._physical.get(sent.key, consistent=True)
            if item is not None:
                return item.modify_index
            raise Unavailable("no answer") from None

    stack.enter_context(patch.object(GroupCommit, "_deliver", deliver))


@bug("deposed-means-not-applied", LOST_AND_DEPOSED)
def deposed_means_not_applied(stack: ExitStack) -> None:
    """A resent commit that the fence refuses is reported as not applied, though its first sending may have been."""
    judge = GroupCommit._judge

    async def changed(self: GroupCommit, sent: Any, refusal: Any) -> int:
        if any(failure.op_index == 0 for failure in refusal.failures):
            sent.unknown = False
        return await judge(self, sent, refusal)

    stack.enter_context(patch.object(GroupCommit, "_judge", changed))


@bug("acknowledged-before-applied")
def acknowledged_before_applied(stack: ExitStack) -> None:
    """Callers are told ok when their transaction is sent."""
    deliver = GroupCommit._deliver

    async def changed(self: GroupCommit, sent: Any) -> int:
        for batch in sent.packing.batches:
            if hasattr(batch, "future") and not batch.future.done():
                batch.future.set_result(Head(sent.record.index, sent.record.chain_hash, 0))
        return await deliver(self, sent)

    stack.enter_context(patch.object(GroupCommit, "_deliver", changed))


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


async def _unguarded(physical: PhysicalStore, tenure: Tenure, ops: Sequence[Op]) -> TxnResult:
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
    """An acquire without an answer that is not there yet is forgotten; it lands later and nobody leads with it."""
    row = {(Phase.RESOLVING_UNKNOWN, Event.FOUND_FOREIGN): (Phase.STANDBY, Action.WAIT)}
    stack.enter_context(patch.dict(lease_table.TABLE, row))


# -- recovery, index, log


@bug("recovery-reads-a-deposed-leader", STALE)
def recovery_reads_stale(stack: ExitStack) -> None:
    """No read is consistent: what a deposed leader of the store says is believed."""
    read = SimulatedStore._read

    async def changed(self: SimulatedStore, verb: str, work: Any, consistent: bool) -> Any:
        return await read(self, verb, work, False)

    stack.enter_context(patch.object(SimulatedStore, "_read", changed))


@bug("redo-begins-one-late", RECOVERY)
def redo_begins_one_late(stack: ExitStack) -> None:
    """Recovery leaves out the first record that the index lacks."""
    plain = Checkpoint.redo_from.fget
    assert plain is not None
    late = property(lambda self: plain(self) + 1)
    stack.enter_context(patch.object(Checkpoint, "redo_from", late))


@bug("extent-claims-more-than-it-holds", RECOVERY)
def extent_claims_more(stack: ExitStack) -> None:
    """An extent is stored as of a record after the one it reflects."""
    encode = merkle_pages.encode_extent
    stack.enter_context(
        patch.object(merkle_pages, "encode_extent", lambda key, lsn, subpages: encode(key, lsn + 3, subpages))
    )


@bug("checkpoint-forgets-dirty-leaves", PARTIAL_FLUSH)
def checkpoint_forgets_dirty(stack: ExitStack) -> None:
    """A checkpoint does not list what the flush left dirty."""
    stack.enter_context(
        patch.object(merkle_flush, "Checkpoint", lambda **fields: Checkpoint(**{**fields, "dirty": ()}))
    )


@bug("late-page-does-not-move-redo-point", LAZY)
def late_page(stack: ExitStack) -> None:
    """Found by this simulation: of the records that wait for pages of a lazy index, the first *marked* counted as the
    oldest."""

    def mark(self: ExtentTable, cls: str, partition: str, bucket: int, index: int) -> None:
        layout = self._layouts.setdefault((cls, partition), merkle_pages._Layout())
        start = layout.starts[bisect_right(layout.starts, bucket) - 1]
        layout.dirty.setdefault(start, index)

    stack.enter_context(patch.object(ExtentTable, "mark", mark))


@bug("collection-passes-the-checkpoint", COLLECTING)
def collection_passes(stack: ExitStack) -> None:
    """Collecting the log does not ask what recovery needs."""
    stack.enter_context(patch.object(Flusher, "redo_from", property(lambda self: 1 << 40)))


@bug("collection-keeps-no-checkpoint-head", COLLECTING)
def collection_keeps_no_head(stack: ExitStack) -> None:
    """Found by this simulation: the record that the checkpoint was written after was collected."""
    stack.enter_context(
        patch.object(Flusher, "redo_from", property(lambda self: self.checkpoint.redo_from if self.checkpoint else 1))
    )


@bug("collection-from-the-new-end", COLLECTING)
def collection_reversed(stack: ExitStack) -> None:
    """Segments are collected in the wrong order: a crash leaves a hole."""
    collectable = retention.collectable
    stack.enter_context(patch.object(retention, "collectable", lambda facts: collectable(facts)[::-1]))


@bug("index-keeps-deleted-keys", RECOVERY)
def index_keeps_deleted(stack: ExitStack) -> None:
    """Deletions do not reach the index."""
    change = Forest.change

    def changed(self: Forest, cls: str, partition: str, path: str, digest: bytes | None) -> int:
        if digest is None:
            return bucket_of(path)
        return change(self, cls, partition, path, digest)

    stack.enter_context(patch.object(Forest, "change", changed))


@bug("damage-without-looking-at-the-lock", SLOW_RECOVERY)
def damage_without_looking(stack: ExitStack) -> None:
    """Found by this simulation: a node that lost the lock during its recovery took its successor's flush for damage."""

    async def trust(physical: PhysicalStore, tenure: Tenure) -> None:
        """Whoever asks leads."""

    stack.enter_context(patch.object(recovery, "require_tenure", trust))


# -- reading and packing


@bug("cache-keeps-old-values", READING)
def cache_keeps_old(stack: ExitStack) -> None:
    """A commit does not replace what the cache has."""
    put = ValueCache.put

    def changed(self: ValueCache, key: str, value: bytes | None) -> None:
        if key not in self._values:
            put(self, key, value)

    stack.enter_context(patch.object(ValueCache, "put", changed))


@bug("reads-do-not-wait-for-the-index", READING)
def reads_do_not_wait(stack: ExitStack) -> None:
    """A value that the store has before the index knows of it is taken for a foreign one."""

    async def settled(self: GroupCommit, touches: Any) -> bool:
        return False

    stack.enter_context(patch.object(GroupCommit, "settled", settled))


@bug("list-of-a-deposed-leader", STALE)
def list_stale(stack: ExitStack) -> None:
    """Found by this simulation: folders were listed without asking for consistency."""
    names = SimulatedStore.list

    async def changed(self: SimulatedStore, prefix: str, *, consistent: bool = False) -> list[str]:
        return await names(self, prefix, consistent=consistent and "/d/" not in prefix)

    stack.enter_context(patch.object(SimulatedStore, "list", changed))


@bug("neighbour-lost-in-packing", CROWD)
def neighbour_lost(stack: ExitStack) -> None:
    """The second batch of a transaction is acknowledged with it and not in it."""
    add = Packing.add

    def changed(self: Packing, batch: Any) -> bool:
        if not self.batches:
            return add(self, batch)
        self.batches.append(batch)
        return True

    stack.enter_context(patch.object(Packing, "add", changed))


# -- large batches


@bug("large-batch-forgotten-by-recovery", LARGE)
def large_forgotten(stack: ExitStack) -> None:
    """A new tenure does not finish the batch that the one before it left half rolled forward."""

    async def recover(self: LargeBatches, replay: Any) -> None:
        """Nothing to do."""

    stack.enter_context(patch.object(LargeBatches, "recover", recover))


@bug("large-batch-overwrites-newer-values", LARGE)
def large_overwrites(stack: ExitStack) -> None:
    """A write during the roll-forward does not take its key out of it."""
    stack.enter_context(patch.object(LargeBatches, "replaced", lambda self, keys: None))
