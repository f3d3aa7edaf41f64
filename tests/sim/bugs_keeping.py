"""Planted bugs of recovery, index, log, reading and large batches (``bugs.py``)."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from consul_backend import (
    index_check,
    merkle,
    merkle_flush,
    merkle_pages,
    recovery,
    reindex,
    replicated,
    retention,
    went_back,
)
from consul_backend.batching import Packing
from consul_backend.checkpoint import Checkpoint
from consul_backend.errors import Conflict
from consul_backend.fenced import Newest
from consul_backend.group_commit import GroupCommit
from consul_backend.index_check import Inspected
from consul_backend.merkle import Forest, bucket_of
from consul_backend.merkle_flush import Flusher
from consul_backend.merkle_pages import ExtentTable
from consul_backend.physical import PhysicalStore, TxnResult
from consul_backend.replicated import ReplicatedStore
from consul_backend.roll_forward import LargeBatches
from consul_backend.tenure import Tenure
from consul_backend.testing import SimulatedStore
from consul_backend.txn import Op
from consul_backend.value_cache import ValueCache
from consul_backend.wal_reader import RecordRing
from tests.sim.bugs import bug
from tests.sim.focus import (
    CALM,
    CALM_COLLECTING,
    CHECKING,
    CHECKING_DEPOSED,
    CHECKING_LOST,
    COLLECTING,
    CROWD,
    FOREIGN,
    LARGE,
    LAZY,
    LAZY_DEPOSED,
    PARTIAL_FLUSH,
    READING,
    RECOVERY,
    RESTORED,
    RESTORED_QUIET,
    SLOW_RECOVERY,
    STALE,
)


def _inspected_without_waiting(init: Callable[..., None]) -> Callable[..., None]:
    async def settled(key: str) -> bool:
        return False

    def changed(self: Inspected, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **{**named, "settled": settled})

    return changed


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


@bug("log-is-read-one-off", CALM)
def log_one_off(stack: ExitStack) -> None:
    """The records that are kept in memory are found at the wrong place."""
    read = RecordRing.read
    stack.enter_context(patch.object(RecordRing, "read", lambda self, start, *bounds: read(self, start + 1, *bounds)))


@bug("collection-from-the-new-end", CALM_COLLECTING)
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


@bug("root-is-not-computed-anew", CALM)
def stale_root(stack: ExitStack) -> None:
    """A change leaves the digests above it as they were."""
    set_blob = merkle._Partition.set_blob

    def changed(self: merkle._Partition, bucket: int, blob: bytes, grown: int) -> None:
        digest = self.digest
        set_blob(self, bucket, blob, grown)
        self.digest = digest

    stack.enter_context(patch.object(merkle._Partition, "set_blob", changed))


@bug("page-is-damaged-without-looking-at-the-lock", LAZY_DEPOSED)
def page_damaged_without_looking(stack: ExitStack) -> None:
    """Found by this simulation: a deposed node took its successor's flush for damage to a page it had yet to load."""

    async def trust(physical: PhysicalStore, tenure: Tenure) -> None:
        """Whoever asks leads."""

    stack.enter_context(patch.object(recovery, "require_tenure", trust))


@bug("flush-in-flight-is-damage", CHECKING_LOST)
def flush_in_flight_is_damage(stack: ExitStack) -> None:
    """Found by this simulation: a check called the extents of a flush whose answer was lost damaged."""
    stack.enter_context(patch.object(ExtentTable, "_being_flushed", lambda self, *where: False))


@bug("check-does-not-wait-for-commits", CHECKING)
def check_does_not_wait(stack: ExitStack) -> None:
    """A check that meets a key between its transaction and the index calls it damaged."""
    stack.enter_context(patch.object(Inspected, "__init__", _inspected_without_waiting(Inspected.__init__)))


@bug("check-of-a-deposed-node", CHECKING_DEPOSED)
def check_of_a_deposed_node(stack: ExitStack) -> None:
    """Found by this simulation: what a successor wrote was reported as damage by the node that it had deposed."""

    async def trust(physical: PhysicalStore, tenure: Tenure) -> None:
        """Whoever asks leads."""

    async def not_fenced(
        physical: PhysicalStore, tenure: Tenure, ops: Sequence[Op], newest: Newest | None = None
    ) -> TxnResult:
        raise Conflict("not now")

    stack.enter_context(patch.object(index_check, "require_tenure", trust))
    stack.enter_context(patch.object(reindex, "fenced_txn", not_fenced))


# -- a store that went back


@bug("restored-store-is-recovered", RESTORED)
def restored_is_recovered(stack: ExitStack) -> None:
    """A node does not compare what it recovers with what it knows: it leads again on an old snapshot."""
    stack.enter_context(patch.object(went_back, "require_seen", lambda tip, seen_index: None))


@bug("newest-record-is-not-watched", RESTORED_QUIET)
def newest_not_watched(stack: ExitStack) -> None:
    """Nobody notices that the store was put back as long as nobody writes."""

    async def watch(*arguments: Any) -> None:
        await asyncio.Event().wait()

    stack.enter_context(patch.object(replicated, "watch_tip", watch))


# -- reading and packing


@bug("foreign-values-are-served", FOREIGN)
def foreign_served(stack: ExitStack) -> None:
    """Whatever a data key holds is believed."""

    async def read(self: ReplicatedStore, key: str, where: str) -> bytes | None:
        item = await self._physical.get(where)
        return item.value if item is not None else None

    stack.enter_context(patch.object(ReplicatedStore, "_read", read))


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
