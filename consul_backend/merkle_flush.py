"""Writing the merkle index to the store behind the commits' back.

One flush is one transaction: the two guards, a compare-and-swap of the checkpoint, then extents to write and delete.
The checkpoint's compare-and-swap chains flushes to each other, so that a late duplicate of an earlier one is refused,
and makes checkpoint and extents change together. Writers never wait: the extents are cut from memory between two
commits, at the head of that moment, and what changes meanwhile is dirty again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from consul_backend.checkpoint import DIRTY_MAX, Checkpoint, CheckpointLeaf, checkpoint_key, encode_checkpoint
from consul_backend.errors import Conflict, OutcomeUnknown, PermissionDenied, StoreWentBack, TooLarge, Unavailable
from consul_backend.failpoint import failpoint
from consul_backend.fenced import GUARD_OPS, fenced_txn
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

FLUSH_EXTENTS = 16


@dataclass(frozen=True, slots=True)
class FlushView:
    """What the store looks like at the moment of a flush."""

    head: Head
    positions: Mapping[str, Position]
    segment_bytes: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class _Flush:
    plan: FlushPlan
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
        view: Callable[[], FlushView],
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
        self._view = view
        self._checkpoint_index = checkpoint_index
        self._interval_s = interval_s
        self._extents_per_s = extents_per_s
        self._unresolved: _Flush | None = None
        self.checkpoint = checkpoint
        self.extents_written = 0
        self.failures = 0

    @property
    def redo_from(self) -> int:
        """The first record that recovery would need; the log from here on must stay."""
        return self.checkpoint.redo_from if self.checkpoint is not None else 1

    async def flush(self) -> int:
        """One transaction's worth, oldest first; returns how many extents, 0 also when all is stored already.

        Raises FenceLost, StoreWentBack; Unavailable, PermissionDenied, TooLarge, OutcomeUnknown: call again later.
        """
        flush = self._unresolved or self._build()
        if flush is None:
            return 0
        failpoint("flush:before-send")
        try:
            result = await fenced_txn(self._physical, self._tenure, flush.ops)
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
        self.checkpoint = flush.checkpoint
        self._checkpoint_index = index
        self.extents_written += flush.plan.ops
        failpoint("flush:before-ack")
        return flush.plan.ops

    async def flush_all(self) -> None:
        """Flush until nothing is dirty (while nobody commits). Raises as :meth:`flush`."""
        while self._unresolved is not None or self._build_needed():
            await self.flush()

    async def run(self) -> NoReturn:
        """Flush at the configured pace until cancelled. Raises FenceLost, StoreWentBack."""
        pause_s = self._interval_s
        while True:
            await asyncio.sleep(pause_s)
            written = 0
            try:
                written = await self.flush()
            except (Unavailable, PermissionDenied, TooLarge, OutcomeUnknown) as error:
                self.failures += 1
                log.warning("the merkle index could not be flushed, trying again: %s", error)
            behind = written > 0 and self._table.dirty_count > FLUSH_EXTENTS
            pause_s = written / self._extents_per_s if behind else self._interval_s

    def _build_needed(self) -> bool:
        current = self.checkpoint is not None and self.checkpoint.head_index == self._view().head.index
        return not current or self._table.dirty_count > 0

    def _build(self) -> _Flush | None:
        if not self._build_needed():
            return None
        view = self._view()
        limits = self._physical.limits
        plan = self._table.plan(
            self._forest,
            view.head.index,
            extents_max=FLUSH_EXTENTS,
            ops_max=limits.ops_max - GUARD_OPS - 1,
            body_bytes_max=min(FLUSH_BODY_BYTES, limits.body_bytes_max // 3),
        )
        count, total = self._table.total_after(plan)
        checkpoint = Checkpoint(
            serial=self.checkpoint.serial + 1 if self.checkpoint is not None else 1,
            epoch=self._tenure.epoch,
            head_index=view.head.index,
            head_hash=view.head.chain_hash,
            positions=dict(view.positions),
            dirty=tuple(
                CheckpointLeaf(leaf.cls, leaf.partition, leaf.depth, leaf.start, leaf.first)
                for leaf in self._table.oldest(DIRTY_MAX)
            ),
            extents=count,
            extents_sum=total,
            segment_bytes=dict(view.segment_bytes),
        )
        raw = encode_checkpoint(self._generation, checkpoint)
        ops: list[Op] = [Cas(checkpoint_key(self._generation), raw, self._checkpoint_index)]
        ops += [Set(key, blob) for key, blob in plan.writes.items()]
        ops += [Delete(key) for key in plan.deletes]
        return _Flush(plan, checkpoint, raw, ops)

    async def _find_own(self, flush: _Flush) -> int:
        item = await self._physical.get(checkpoint_key(self._generation), consistent=True)
        if item is None or item.value != flush.raw:
            raise StoreWentBack(
                "the checkpoint is not the one this node wrote although it holds the lock: the store was restored or"
                " changed underneath"
            )
        return item.modify_index
