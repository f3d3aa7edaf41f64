"""How the merkle index is laid out in the store: extents, split by size, each with the WAL index it reflects. Pure.

An *extent* holds the subpages of an aligned power-of-two range of one (class, partition)'s 65,536 buckets. ``depth`` 0
is the whole range, each level halves it. The *leaves* of a partition cover its range without overlap; a leaf whose
bytes pass ``EXTENT_BYTES_MAX`` is split when it is next flushed.

A leaf that was split may be too big for its parts to be written in one transaction. So the old extent stays stored
until every bucket of its range is covered by a deeper stored extent, and for every bucket **the deepest stored extent
counts**. The transaction that completes the cover deletes the old one. While it lasts, empty leaves below it are
stored too (a missing one would let the old content shine through); otherwise an empty extent is not stored.

Redo needs, of each bucket, the records after its extent's LSN. ``dirty`` says from which record on a leaf has changes
that are not stored; the oldest number bounds redo and with it what the log must keep.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from consul_backend.extents import (
    CHECKSUM_BYTES,
    DEPTH_MAX,
    EXTENT_BYTES_MAX,
    Extent,
    decode_extent,
    encode_extent,
    extent_key,
    merkle_prefix,
    parse_extent_name,
    parse_partition_name,
)
from consul_backend.limits import base64_bytes
from consul_backend.merkle import BUCKETS, Forest

__all__ = [
    "EXTENT_BYTES_MAX",
    "Extent",
    "ExtentTable",
    "FlushPlan",
    "decode_extent",
    "encode_extent",
    "extent_key",
    "merkle_prefix",
    "parse_extent_name",
    "parse_partition_name",
    "range_of",
]

_SUM_MODULUS = 1 << (8 * CHECKSUM_BYTES)
_SUBPAGE_FRAME_BYTES = 8
_OP_FRAME_BYTES = 128
_PAGE_DEPTH = 8


@dataclass(frozen=True, slots=True)
class _Stored:
    checksum: int
    lsn: int
    empty: bool


Changes = dict[tuple[int, int], _Stored | None]
"""What a flush plan does to stored extents, by (depth, start); None deletes."""


@dataclass(frozen=True, slots=True)
class DirtyLeaf:
    """A leaf with changes from record ``first`` on that are not stored."""

    cls: str
    partition: str
    start: int
    depth: int
    first: int


class _Layout:
    """One partition: leaves (``starts`` sorted, ``depths`` by start), extents by (depth, start), dirty leaves."""

    __slots__ = ("depths", "dirty", "starts", "stored")

    def __init__(self) -> None:
        self.starts = [0]
        self.depths = {0: 0}
        self.stored: dict[tuple[int, int], _Stored] = {}
        self.dirty: dict[int, int] = {}

    def leaf_of(self, bucket: int) -> int:
        return self.starts[bisect_right(self.starts, bucket) - 1]

    def split(self, start: int, leaves: list[tuple[int, int]]) -> None:
        """Put ``leaves`` (start, depth) in place of the leaf at ``start``; its dirt is theirs."""
        at = bisect_left(self.starts, start)
        self.starts[at : at + 1] = [first for first, _ in leaves]
        self.depths.update(leaves)

    def covering(self, start: int, depth: int, changes: Changes | None = None) -> tuple[int, int] | None:
        """The deepest stored extent above the given one that ``changes`` do not delete, or None."""
        for above in range(depth - 1, -1, -1):
            key = (above, _align(start, above))
            if key in self.stored and (changes is None or changes.get(key, self.stored[key]) is not None):
                return key
        return None

    def derive(self) -> None:
        """The leaves, from what is stored."""
        split = {(depth, _align(start, depth)) for below, start in self.stored for depth in range(below)}
        leaves = list(_derive_leaves(split, 0, 0))
        self.starts = [start for start, _ in leaves]
        self.depths = dict(leaves)

    def mark_unwritten(self, redo_from: int) -> None:
        """Leaves that a split left unwritten are dirty from ``redo_from``."""
        for start, depth in self.depths.items():
            if (depth, start) not in self.stored:
                above = self.covering(start, depth)
                if above is not None:
                    self.dirty[start] = max(self.stored[above].lsn + 1, redo_from)

    def leaves_between(self, start: int, stop: int) -> list[int]:
        return self.starts[bisect_right(self.starts, start) - 1 : bisect_left(self.starts, stop)]

    def leaves_under(self, depth: int, start: int) -> list[tuple[int, int]]:
        low = bisect_left(self.starts, start)
        high = bisect_left(self.starts, start + _width(depth))
        return [(first, self.depths[first]) for first in self.starts[low:high]]


@dataclass(slots=True)
class FlushPlan:
    """One flush transaction: extents to write (key → bytes) and keys to delete; both reflect record ``lsn``."""

    lsn: int
    writes: dict[str, bytes] = field(default_factory=dict)
    deletes: list[str] = field(default_factory=list)
    leaves: list[DirtyLeaf] = field(default_factory=list)
    changes: dict[tuple[str, str], Changes] = field(default_factory=dict)
    body_bytes: int = 0

    @property
    def ops(self) -> int:
        """Operations that writes and deletes need."""
        return len(self.writes) + len(self.deletes)


class ExtentTable:
    """Which extents exist, which leaves are dirty and since when. One flush plan at a time."""

    def __init__(self, generation: str) -> None:
        self._generation = generation
        self._layouts: dict[tuple[str, str], _Layout] = {}
        self._in_flight: FlushPlan | None = None
        self.count = 0
        self._sum = 0

    @property
    def total(self) -> bytes:
        """The sum of all stored extents' checksums: what a checkpoint pins them with."""
        return self._sum.to_bytes(CHECKSUM_BYTES, "big")

    def mark(self, cls: str, partition: str, bucket: int, index: int) -> None:
        """Record ``index`` changed ``bucket``. Pages loaded late bring their records late: the oldest counts."""
        layout = self._layouts.get((cls, partition))
        if layout is None:
            layout = self._layouts[cls, partition] = _Layout()
        starts = layout.starts
        start = starts[bisect_right(starts, bucket) - 1]
        if layout.dirty.get(start, index) >= index:
            layout.dirty[start] = index

    def mark_all(self, cls: str, partition: str, buckets: Sequence[int], index: int) -> None:
        """:meth:`mark` for many buckets, in order: once a leaf."""
        layout = self._layouts.setdefault((cls, partition), _Layout())
        at = 0
        while at < len(buckets):
            self.mark(cls, partition, buckets[at], index)
            after = bisect_right(layout.starts, buckets[at])
            at = bisect_left(buckets, layout.starts[after], at) if after < len(layout.starts) else len(buckets)

    def dirty_leaves(self) -> Iterator[DirtyLeaf]:
        """Every dirty leaf, in no order."""
        for (cls, partition), layout in self._layouts.items():
            for start, first in layout.dirty.items():
                yield DirtyLeaf(cls, partition, start, layout.depths[start], first)

    def oldest(self, count: int) -> list[DirtyLeaf]:
        """The ``count`` leaves that have been dirty longest, oldest first."""
        return heapq.nsmallest(count, self.dirty_leaves(), key=_first)

    @property
    def dirty_count(self) -> int:
        """How many leaves are dirty."""
        return sum([len(layout.dirty) for layout in self._layouts.values()])

    def lsn_of(self, cls: str, partition: str, bucket: int) -> int:
        """The LSN of what is stored for a bucket; 0 when nothing is."""
        layout = self._layouts.get((cls, partition))
        if layout is None:
            return 0
        start = layout.leaf_of(bucket)
        depth = layout.depths[start]
        key: tuple[int, int] | None = (depth, start)
        if key not in layout.stored:
            key = layout.covering(start, depth)
        return layout.stored[key].lsn if key is not None else 0

    # -- recovery

    def add_stored(self, cls: str, partition: str, depth: int, start: int, extent: Extent) -> None:
        """Take note of an extent found in the store. Call :meth:`settle` after the last."""
        layout = self._layouts.setdefault((cls, partition), _Layout())
        stored = _Stored(int.from_bytes(extent.checksum, "big"), extent.lsn, not extent.subpages)
        layout.stored[depth, start] = stored
        self.count += 1
        self._sum = (self._sum + stored.checksum) % _SUM_MODULUS

    def settle(self, redo_from: int) -> None:
        """Derive the leaves from what is stored; leaves that a split left unwritten are dirty from ``redo_from``."""
        for layout in self._layouts.values():
            layout.derive()
            layout.mark_unwritten(redo_from)

    # -- loading a partition's extents one after the other (lazy_index)

    def resume(self, count: int, total: bytes) -> None:
        """Take number and sum of the stored extents from a checkpoint, instead of from :meth:`add_stored`."""
        self.count, self._sum = count, int.from_bytes(total, "big")

    def recount(self) -> None:
        """Compute number and sum anew, once every partition's extents are known."""
        stored = [one for layout in self._layouts.values() for one in layout.stored.values()]
        self.count, self._sum = len(stored), sum([one.checksum for one in stored]) % _SUM_MODULUS

    def add_names(self, cls: str, partition: str, stored: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Note which extents (depth, start) of a partition are stored. Returns those above others: splits that are not
        complete, to be loaded before :meth:`settle_partition`."""
        layout = self._layouts[cls, partition] = _Layout()
        layout.stored = dict.fromkeys(stored, _Stored(0, 0, False))
        layout.derive()
        return [(depth, start) for depth, start in stored if layout.depths.get(start) != depth]

    def set_loaded(self, cls: str, partition: str, depth: int, start: int, extent: Extent) -> None:
        """An extent known by name was read."""
        stored = _Stored(int.from_bytes(extent.checksum, "big"), extent.lsn, not extent.subpages)
        self._layouts[cls, partition].stored[depth, start] = stored

    def settle_partition(self, cls: str, partition: str, redo_from: int) -> None:
        """As :meth:`settle`, for one partition of :meth:`add_names`."""
        layout = self._layouts[cls, partition]
        layout.mark_unwritten(redo_from)
        if not layout.stored:
            del self._layouts[cls, partition]

    def unit_of(self, cls: str, partition: str, page: int) -> tuple[int, int]:
        """The pages (first, after the last) that are stored together with ``page``: its shallowest extent's range."""
        bucket = page * _width(_PAGE_DEPTH)
        layout = self._layouts.get((cls, partition))
        for depth in range(_PAGE_DEPTH):
            start = _align(bucket, depth)
            if layout is not None and (depth, start) in layout.stored:
                return start >> 8, (start + _width(depth)) >> 8
        return page, page + 1

    def stored_over(self, cls: str, partition: str, start: int, stop: int) -> list[tuple[int, int]]:
        """The stored extents (depth, start) that hold any bucket from ``start`` up to ``stop`` (exclusive), the
        shallow ones first."""
        layout = self._layouts.get((cls, partition))
        if layout is None:
            return []
        inside = {(layout.depths[first], first) for first in layout.leaves_between(start, stop)}
        found = inside | {(depth, _align(first, depth)) for below, first in inside for depth in range(below)}
        return sorted(where for where in found if where in layout.stored)

    def stored_checksum(self, cls: str, partition: str, depth: int, start: int) -> bytes | None:
        """The checksum of a clean leaf's stored extent; None when it is dirty or being flushed, no leaf, or nothing is
        stored."""
        if self._being_flushed(cls, partition, depth, start):
            return None
        layout = self._layouts.get((cls, partition))
        stored = layout.stored.get((depth, start)) if layout is not None else None
        if layout is None or stored is None or start in layout.dirty or layout.depths.get(start) != depth:
            return None
        return stored.checksum.to_bytes(CHECKSUM_BYTES, "big")

    def clean_leaves(self, cls: str, partition: str) -> list[tuple[int, int]]:
        """The leaves (depth, start) of a partition whose stored extent is up to date."""
        layout = self._layouts.get((cls, partition))
        if layout is None:
            return []
        leaves = [(depth, start) for start, depth in layout.depths.items() if start not in layout.dirty]
        return [where for where in leaves if where in layout.stored and not self._being_flushed(cls, partition, *where)]

    def _being_flushed(self, cls: str, partition: str, depth: int, start: int) -> bool:
        """Whether the last plan writes this extent: until it is known what became of it, either may be stored."""
        plan = self._in_flight
        return plan is not None and (depth, start) in plan.changes.get((cls, partition), ())

    def keeps_extents(self, plan: FlushPlan, name: tuple[str, str]) -> bool:
        """Whether any extent of a (class, partition) will be stored once the plan is applied."""
        layout, changes = self._layouts.get(name), plan.changes.get(name, {})
        stored = layout.stored.keys() if layout is not None else set()
        return any(changes.get(where, True) for where in stored | changes.keys())

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        return {"index_dirty_extents": self.dirty_count, "index_stored_extents": self.count}

    @property
    def names(self) -> list[tuple[str, str]]:
        """The (class, partition) pairs that have stored or dirty leaves."""
        return list(self._layouts)

    # -- flushing

    def plan(self, forest: Forest, lsn: int, *, extents_max: int, ops_max: int, body_bytes_max: int) -> FlushPlan:
        """The next transaction's worth of the oldest dirty leaves, as ``forest`` is now, at record ``lsn``.

        The plan's leaves are clean from now on: call :meth:`flushed` or :meth:`failed` with it.
        """
        plan = self._in_flight = FlushPlan(lsn)
        for leaf in self.oldest(extents_max):
            if forest.cold_between(leaf.cls, leaf.partition, leaf.start, leaf.start + _width(leaf.depth)):
                continue  # shares its extent with a damaged page: only a repair can write it
            layout = self._layouts[leaf.cls, leaf.partition]
            for start, depth in self._split(layout, leaf, forest):
                part = DirtyLeaf(leaf.cls, leaf.partition, start, depth, leaf.first)
                if len(plan.leaves) >= extents_max or not self._add(plan, part, forest, ops_max, body_bytes_max):
                    return plan
        return plan

    def _split(self, layout: _Layout, leaf: DirtyLeaf, forest: Forest) -> list[tuple[int, int]]:
        """The leaves (start, depth) that take the leaf's place: itself if it is small enough."""
        buckets: list[int] = []
        sizes: list[int] = []
        for bucket, blob in forest.blobs(leaf.cls, leaf.partition, leaf.start, leaf.start + _width(leaf.depth)):
            buckets.append(bucket)
            sizes.append(len(blob) + _SUBPAGE_FRAME_BYTES)
        ends = list(accumulate(sizes, initial=0))

        def size(start: int, depth: int) -> int:
            return ends[bisect_left(buckets, start + _width(depth))] - ends[bisect_left(buckets, start)]

        parts = list(_halve(leaf.start, leaf.depth, size))
        if len(parts) > 1:
            layout.split(leaf.start, parts)
            layout.dirty.update((start, leaf.first) for start, _ in parts)
        return parts

    def _add(self, plan: FlushPlan, leaf: DirtyLeaf, forest: Forest, ops_max: int, body_bytes_max: int) -> bool:
        """Put one leaf into the plan; False, changing nothing, when it does not fit beside what is there."""
        layout = self._layouts[leaf.cls, leaf.partition]
        changes = plan.changes.setdefault((leaf.cls, leaf.partition), {})
        key = extent_key(self._generation, leaf.cls, leaf.partition, leaf.depth, leaf.start)
        subpages = list(forest.blobs(leaf.cls, leaf.partition, leaf.start, leaf.start + _width(leaf.depth)))
        above = layout.covering(leaf.start, leaf.depth, changes)
        where = (leaf.depth, leaf.start)
        if not subpages and above is None:
            if where in layout.stored:
                if plan.ops + 1 > ops_max:
                    return False
                plan.deletes.append(key)
                plan.body_bytes += len(key) + _OP_FRAME_BYTES
                changes[where] = None
        else:
            blob, checksum = encode_extent(key, plan.lsn, subpages)
            size = base64_bytes(len(blob)) + len(key) + _OP_FRAME_BYTES
            # One operation stays free for the deletion of an extent that this leaf's write completes the cover of.
            ops = plan.ops + 1 + (above is not None)
            if ops > ops_max or (plan.writes and plan.body_bytes + size > body_bytes_max):
                return False
            plan.writes[key] = blob
            plan.body_bytes += size
            changes[where] = _Stored(int.from_bytes(checksum, "big"), plan.lsn, not subpages)
        plan.leaves.append(leaf)
        layout.dirty.pop(leaf.start, None)
        if above is not None:
            self._delete_if_covered(plan, leaf, layout, changes, above)
        return True

    def _delete_if_covered(
        self,
        plan: FlushPlan,
        leaf: DirtyLeaf,
        layout: _Layout,
        changes: Changes,
        above: tuple[int, int],
    ) -> None:
        def covered(start: int, depth: int) -> bool:
            # Anything stored on the way from the leaf up to, but without, the old extent.
            for level in range(depth, above[0], -1):
                key = (level, _align(start, level))
                if changes.get(key) is not None or key in layout.stored:
                    return True
            return False

        # Leaves of one split are written from the left, so looking from the right finds a missing one soonest.
        if all(covered(start, depth) for start, depth in reversed(layout.leaves_under(*above))):
            changes[above] = None
            key = extent_key(self._generation, leaf.cls, leaf.partition, *above)
            plan.deletes.append(key)
            plan.body_bytes += len(key) + _OP_FRAME_BYTES

    def total_after(self, plan: FlushPlan) -> tuple[int, bytes]:
        """Count and sum of the stored extents once the plan is applied."""
        count, total = self.count, self._sum
        for name, changes in plan.changes.items():
            stored = self._layouts[name].stored
            for where, new in changes.items():
                old = stored.get(where)
                count += (new is not None) - (old is not None)
                total += (new.checksum if new else 0) - (old.checksum if old else 0)
        return count, (total % _SUM_MODULUS).to_bytes(CHECKSUM_BYTES, "big")

    def flushed(self, plan: FlushPlan) -> None:
        """The plan's transaction was applied."""
        self._in_flight = None
        self.count, total = self.total_after(plan)
        self._sum = int.from_bytes(total, "big")
        for name, changes in plan.changes.items():
            layout = self._layouts[name]
            for where, new in changes.items():
                if new is not None:
                    layout.stored[where] = new
                else:
                    layout.stored.pop(where, None)
                    if layout.depths.get(where[1]) != where[0]:
                        self._forget_empty(layout, where, plan.lsn)
            if not layout.stored and not layout.dirty:
                del self._layouts[name]

    def _forget_empty(self, layout: _Layout, above: tuple[int, int], lsn: int) -> None:
        """An old extent is gone: empty leaves that were stored only to hide it can go with their next flush."""
        for start, depth in layout.leaves_under(*above):
            stored = layout.stored.get((depth, start))
            if stored is not None and stored.empty:
                layout.dirty.setdefault(start, lsn + 1)

    def failed(self, plan: FlushPlan) -> None:
        """The plan's transaction was certainly not applied: its leaves are dirty as before."""
        self._in_flight = None
        for leaf in plan.leaves:
            self._layouts[leaf.cls, leaf.partition].dirty[leaf.start] = leaf.first


def _first(leaf: DirtyLeaf) -> int:
    return leaf.first


def range_of(depth: int, start: int) -> tuple[int, int]:
    """First bucket of an extent, and the one after its last."""
    return start, start + _width(depth)


def _width(depth: int) -> int:
    return BUCKETS >> depth


def _align(start: int, depth: int) -> int:
    return start & ~(_width(depth) - 1)


def _halve(start: int, depth: int, size: Callable[[int, int], int]) -> Iterator[tuple[int, int]]:
    if depth == DEPTH_MAX or size(start, depth) <= EXTENT_BYTES_MAX:
        yield start, depth
        return
    yield from _halve(start, depth + 1, size)
    yield from _halve(start + _width(depth + 1), depth + 1, size)


def _derive_leaves(split: set[tuple[int, int]], start: int, depth: int) -> Iterator[tuple[int, int]]:
    """The fewest leaves (start, depth) when the ranges in ``split`` (depth, start) are none."""
    if (depth, start) not in split:
        yield start, depth
        return
    yield from _derive_leaves(split, start, depth + 1)
    yield from _derive_leaves(split, start + _width(depth + 1), depth + 1)
