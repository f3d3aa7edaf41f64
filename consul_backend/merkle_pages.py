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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate

import msgspec

from consul_backend.errors import Corrupt
from consul_backend.keys import decode_segment, encode_partition
from consul_backend.limits import base64_bytes
from consul_backend.merkle import BUCKETS, Forest

EXTENT_VERSION = 1
EXTENT_BYTES_MAX = 24 * 1024
DEPTH_MAX = 16
CHECKSUM_BYTES = 16
_SUM_MODULUS = 1 << (8 * CHECKSUM_BYTES)
_SUBPAGE_FRAME_BYTES = 8
_OP_FRAME_BYTES = 128

_encode = msgspec.msgpack.Encoder().encode
_decode_outer = msgspec.msgpack.Decoder(tuple[bytes, bytes]).decode
_decode_body = msgspec.msgpack.Decoder(tuple[int, int, tuple[tuple[int, bytes], ...]]).decode


def merkle_prefix(generation: str) -> str:
    """What every extent key of a generation begins with."""
    return f"g/{generation}/merkle/"


def extent_key(generation: str, cls: str, partition: str, depth: int, start: int) -> str:
    """Where an extent is stored: ``g/<generation>/merkle/<class>/<partition>/<depth>-<prefix>``."""
    name = f"{depth:02d}-{start >> (DEPTH_MAX - depth):04x}"
    return f"{merkle_prefix(generation)}{encode_partition(cls, partition)}/{name}"


def parse_extent_name(name: str) -> tuple[int, int]:
    """Depth and first bucket from the last segment of an extent key. Raises Corrupt."""
    head, dash, tail = name.partition("-")
    try:
        depth, prefix = int(head), int(tail, 16)
    except ValueError:
        raise Corrupt(f"{name!r} is not the name of an index extent") from None
    if not dash or not 0 <= depth <= DEPTH_MAX or not 0 <= prefix < 1 << depth or name != f"{depth:02d}-{prefix:04x}":
        raise Corrupt(f"{name!r} is not the name of an index extent")
    return depth, prefix << (DEPTH_MAX - depth)


def parse_partition_name(name: str) -> str:
    """The partition from its folder name (with its slash). Raises Corrupt."""
    return decode_segment(name.removesuffix("/"))


@dataclass(frozen=True, slots=True)
class Extent:
    """A decoded extent: subpages as of WAL index ``lsn``."""

    lsn: int
    subpages: tuple[tuple[int, bytes], ...]
    checksum: bytes


def encode_extent(key: str, lsn: int, subpages: list[tuple[int, bytes]]) -> tuple[bytes, bytes]:
    """The stored bytes of an extent and its checksum, which also covers its key: extents cannot be swapped."""
    body = _encode((EXTENT_VERSION, lsn, subpages))
    checksum = _checksum(key, body)
    return _encode((body, checksum)), checksum


def decode_extent(key: str, raw: bytes) -> Extent:
    """The extent stored at ``key``. Raises Corrupt naming the key."""
    try:
        body, checksum = _decode_outer(raw)
        if _checksum(key, body) != checksum:
            raise Corrupt(f"index extent {key} does not have its checksum")
        version, lsn, subpages = _decode_body(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Corrupt(f"index extent {key} is malformed") from None
    if version != EXTENT_VERSION:
        raise Corrupt(f"index extent {key} has version {version}, this program knows {EXTENT_VERSION}")
    return Extent(lsn, subpages, checksum)


def _checksum(key: str, body: bytes) -> bytes:
    return blake2b(key.encode() + b"\0" + body, digest_size=CHECKSUM_BYTES, person=b"extent").digest()


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
        self.count = 0
        self._sum = 0

    @property
    def total(self) -> bytes:
        """The sum of all stored extents' checksums: what a checkpoint pins them with."""
        return self._sum.to_bytes(CHECKSUM_BYTES, "big")

    def mark(self, cls: str, partition: str, bucket: int, index: int) -> None:
        """Record ``index`` changed ``bucket``."""
        layout = self._layouts.get((cls, partition))
        if layout is None:
            layout = self._layouts[cls, partition] = _Layout()
        starts = layout.starts
        layout.dirty.setdefault(starts[bisect_right(starts, bucket) - 1], index)

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
            split = {(depth, _align(start, depth)) for below, start in layout.stored for depth in range(below)}
            leaves = list(_derive_leaves(split, 0, 0))
            layout.starts = [start for start, _ in leaves]
            layout.depths = dict(leaves)
            for start, depth in leaves:
                if (depth, start) not in layout.stored:
                    above = layout.covering(start, depth)
                    if above is not None:
                        layout.dirty[start] = max(layout.stored[above].lsn + 1, redo_from)

    # -- flushing

    def plan(self, forest: Forest, lsn: int, *, extents_max: int, ops_max: int, body_bytes_max: int) -> FlushPlan:
        """The next transaction's worth of the oldest dirty leaves, as ``forest`` is now, at record ``lsn``.

        The plan's leaves are clean from now on: call :meth:`flushed` or :meth:`failed` with it.
        """
        plan = FlushPlan(lsn)
        for leaf in self.oldest(extents_max):
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
