"""Writing the merkle index to the store behind the commits' back.

One flush is one transaction: the two guards, a compare-and-swap of the checkpoint, then extents to write and delete,
and the heads of their partitions.
The checkpoint's compare-and-swap chains flushes to each other, so that a late duplicate of an earlier one is refused,
and makes checkpoint and extents change together. Writers never wait: the extents are cut from memory between two
commits, at the head of that moment, and what changes meanwhile is dirty again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from msgspec.structs import replace as replace_fields

from consul_backend.checkpoint import DIRTY_MAX, Checkpoint, CheckpointLeaf, checkpoint_key, encode_checkpoint
from consul_backend.complaints import Complaint
from consul_backend.errors import Conflict, OutcomeUnknown, PermissionDenied, StoreWentBack, TooLarge, Unavailable
from consul_backend.failpoint import failpoint
from consul_backend.fenced import GUARD_OPS, Newest, fenced_txn, require_tenure
from consul_backend.heads import HEADS_BYTES_MAX, HeadsTable, encode_heads, heads_key, heads_sum
from consul_backend.limits import base64_bytes
from consul_backend.merkle import Forest
from consul_backend.merkle_pages import ExtentTable, FlushPlan
from consul_backend.physical import PhysicalStore
from consul_backend.position import Position
from consul_backend.tenure import Tenure
from consul_backend.txn import Cas, Delete, Op, Set
from consul_backend.wal import Head

log = logging.getLogger("core.flush")

FLUSH_BODY_BYTES = 160 * 1024
"""One flush's share of a request body: small enough that a commit queued behind it in Consul does not wait long."""
_BYTES_PER_DIRTY_LEAF = 1024
"""Of a request body, for each dirty leaf that a checkpoint lists: those take a tenth of a small one at most."""

FLUSH_EXTENTS = 16


@dataclass(frozen=True, slots=True)
class FlushView:
    """What the store looks like at the moment of a flush."""

    head: Head
    positions: Mapping[str, Position]
    segment_bytes: Mapping[int, int]
    crossings: Mapping[int, int] = field(default_factory=dict)
    batches_from: Callable[[int], tuple[int, ...]] = lambda redo_from: ()
    """First parts of large batches that a recovery from that record on would need."""


@dataclass(frozen=True, slots=True)
class _Flush:
    plan: FlushPlan
    heads: dict[tuple[str, str], int | None]
    checkpoint: Checkpoint
    raw: bytes
    ops: list[Op]


class Flusher:
    """``checkpoint`` is the durable one and ``checkpoint_index`` its ModifyIndex (None and 0 before the first)."""

    def __init__(
        self,
        physical: PhysicalStore,
        generation: str,
        tenure: Tenure,
        forest: Forest,
        table: ExtentTable,
        *,
        heads: HeadsTable,
        view: Callable[[], FlushView],
        newest: Newest,
        checkpoint: Checkpoint | None,
        checkpoint_index: int,
        interval_s: float,
        extents_per_s: float,
    ) -> None:
        self._physical = physical
        self._generation = generation
        self._tenure = tenure
        self._forest = forest
        self._table = table
        self._heads = heads
        self._view = view
        self._newest = newest
        self._checkpoint_index = checkpoint_index
        self._interval_s = interval_s
        self._extents_per_s = extents_per_s
        self._unresolved: _Flush | None = None
        self._flushed = asyncio.Event()
        self.checkpoint = checkpoint
        self.extents_written = 0
        self.failures = 0

    @property
    def redo_from(self) -> int:
        """The first record that recovery would need; the log from here on must stay. Recovery reads the checkpoint's
        head as well, to see that the log is the one which the checkpoint was written after."""
        return self.checkpoint.scan_from if self.checkpoint is not None else 1

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        return {
            "index_extents_written": self.extents_written,
            "index_flush_failures": self.failures,
            "index_redo_from": self.redo_from,
        }

    async def flush(self) -> int:
        """One transaction's worth, oldest first; returns how many extents, 0 also when all is stored already.

        Raises FenceLost, StoreWentBack; Unavailable, PermissionDenied, TooLarge, OutcomeUnknown: call again later.
        """
        flush = self._unresolved or self._build()
        if flush is None:
            return 0
        failpoint("flush:before-send")
        try:
            result = await fenced_txn(self._physical, self._tenure, flush.ops, self._newest)
            index = result.modify_index
        except Conflict:
            self._unresolved = flush
            index = await self._find_own(flush)
        except OutcomeUnknown:
            self._unresolved = flush
            raise
        except (Unavailable, PermissionDenied, TooLarge):
            if self._unresolved is None:
                self._table.failed(flush.plan)
            raise
        failpoint("flush:after-reply")
        self._unresolved = None
        self._table.flushed(flush.plan)
        self._heads.apply(flush.heads)
        self.checkpoint = flush.checkpoint
        self._checkpoint_index = index
        self.extents_written += flush.plan.ops
        self._flushed.set()
        self._flushed = asyncio.Event()
        failpoint("flush:before-ack")
        return flush.plan.ops

    async def flush_all(self) -> None:
        """Flush until nothing is dirty (while nobody commits). Raises as :meth:`flush`."""
        while self._unresolved is not None or self._build_needed():
            if not await self.flush() and not self._heads.stale:
                return

    async def stored(self, index: int) -> None:
        """Wait until :meth:`run` has stored everything up to record ``index``."""
        while self._lacks(index):
            await self._flushed.wait()

    def _lacks(self, index: int) -> bool:
        checkpoint = self.checkpoint
        if checkpoint is None or checkpoint.head_index < index:
            return True
        waiting = [leaf.first for leaf in checkpoint.dirty] + [leaf.first for leaf in self._table.oldest(1)]
        return min(waiting, default=index + 1) <= index

    async def run(self) -> NoReturn:
        """Flush at the configured pace until cancelled. Raises FenceLost, StoreWentBack, OutcomeUnknown."""
        pause_s = self._interval_s
        complaint = Complaint()
        while True:
            await asyncio.sleep(pause_s)
            written = 0
            try:
                written = await self.flush()
                if complaint.over():
                    log.info("the merkle index is flushed again")
            except (Unavailable, PermissionDenied, TooLarge, OutcomeUnknown) as error:
                if isinstance(error, TooLarge) and self._unresolved is not None:
                    # It can neither be sent again nor left out: only the fence of another tenure settles it.
                    raise OutcomeUnknown(f"an index flush may have been stored, and now is refused: {error}") from error
                self.failures += 1
                if complaint.due(error):
                    log.warning(
                        "the merkle index could not be flushed (time %d), trying again: %s", complaint.times, error
                    )
            behind = written > 0 and self._table.dirty_count > FLUSH_EXTENTS
            pause_s = written / self._extents_per_s if behind else self._interval_s

    def _build_needed(self) -> bool:
        current = self.checkpoint is not None and self.checkpoint.head_index == self._view().head.index
        return not current or self._table.dirty_count > 0 or bool(self._heads.stale)

    def _build(self) -> _Flush | None:
        if not self._build_needed():
            return None
        view = self._view()
        limits = self._physical.limits
        ops_max = limits.ops_max - GUARD_OPS - 1
        body_bytes_max = min(FLUSH_BODY_BYTES, limits.body_bytes_max // 3)
        # Each extent may be of another partition, whose heads then travel with it.
        extents_max = max(1, min(FLUSH_EXTENTS, ops_max // 3, body_bytes_max // base64_bytes(HEADS_BYTES_MAX)))
        plan = self._table.plan(
            self._forest,
            view.head.index,
            extents_max=extents_max,
            ops_max=ops_max - extents_max,
            body_bytes_max=body_bytes_max,
        )
        count, total = self._table.total_after(plan)
        heads, head_ops = self._build_heads(plan, extents_max)
        checkpoint = Checkpoint(
            serial=self.checkpoint.serial + 1 if self.checkpoint is not None else 1,
            epoch=self._tenure.epoch,
            head_index=view.head.index,
            head_hash=view.head.chain_hash,
            positions=dict(view.positions),
            dirty=tuple(
                CheckpointLeaf(leaf.cls, leaf.partition, leaf.depth, leaf.start, leaf.first)
                for leaf in self._table.oldest(min(DIRTY_MAX, limits.body_bytes_max // _BYTES_PER_DIRTY_LEAF))
            ),
            extents=count,
            extents_sum=total,
            segment_bytes=dict(view.segment_bytes),
            heads=len(self._heads.after(heads)),
            heads_sum=heads_sum(self._heads.after(heads)),
            crossings=dict(view.crossings),
        )
        checkpoint = replace_fields(checkpoint, batches=view.batches_from(checkpoint.redo_from))
        raw = encode_checkpoint(self._generation, checkpoint)
        ops: list[Op] = [Cas(checkpoint_key(self._generation), raw, self._checkpoint_index)]
        ops += [Set(key, blob) for key, blob in plan.writes.items()]
        ops += [Delete(key) for key in plan.deletes]
        return _Flush(plan, heads, checkpoint, raw, ops + head_ops)

    def _build_heads(self, plan: FlushPlan, count_max: int) -> tuple[dict[tuple[str, str], int | None], list[Op]]:
        """The heads of the plan's partitions as they are now, and of stale ones while there is room: checksums by name
        (None: deleted), and the operations that store them."""
        names = [*plan.changes, *(name for name in sorted(self._heads.stale) if name not in plan.changes)]
        heads: dict[tuple[str, str], int | None] = {}
        ops: list[Op] = []
        for cls, partition in names[: max(count_max, len(plan.changes))]:
            key = heads_key(self._generation, cls, partition)
            if self._table.keeps_extents(plan, (cls, partition)):
                raw, checksum = encode_heads(key, self._forest, cls, partition, plan.lsn)
                heads[cls, partition] = checksum
                ops.append(Set(key, raw))
            else:
                heads[cls, partition] = None
                ops.append(Delete(key))
        return heads, ops

    async def _find_own(self, flush: _Flush) -> int:
        item = await self._physical.get(checkpoint_key(self._generation), consistent=True)
        if item is None or item.value != flush.raw:
            await require_tenure(self._physical, self._tenure)  # or else it is a successor's
            raise StoreWentBack(
                "the checkpoint is not the one this node wrote although it holds the lock: the store was restored or"
                " changed underneath"
            )
        return item.modify_index
