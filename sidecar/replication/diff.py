"""Comparing two merkle forests over one round trip, and planning the second. Pure.

The 65,536 buckets of a partition are compared as *ranges* of two sizes, each range by an 8-byte fingerprint:

* the secondary sends one fingerprint for every *group* of about 256 entries (32 KB for a million entries);
* the primary answers, in each group that differs, with one for every *cell* of about 16 entries;
* the secondary sends 8-byte ids of its entries in the cells that differ; the primary sends what is not among them, and
  the ids that it does not have.

So d differing entries of n cost about n/32 + 256 d bytes, however the entries are spread over partitions. Fingerprints
and ids are keyed by a random salt of each diff: what collides once does not collide again, and nobody can prepare it.
A collision hides a difference until the roots are compared in full at the end, and the next diff finds it.

Both forests may change while this goes on: a digest is read when it is read. That is harmless on the primary, because
whatever changed there after the base record comes again with the records since the base; and on the secondary nobody
but the sync itself writes what travels. Generators hand back control now and then, so that a caller on an event loop
may let others run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from consul_backend.merkle import BUCKETS, SUBPAGES, bucket_of
from sidecar.replication.protocol import (
    FINGERPRINT_BYTES,
    Cells,
    DiffReply,
    DiffRequest,
    Entries,
    Extent,
    FetchRequest,
    PartitionDigests,
    ProtocolViolation,
)
from sidecar.replication.shipped import Shipped

_KEYRING_PATH = "keyring"
_KEYRING_PARTITION = "/core"

FINGERPRINTS_MAX = 3_000_000
"""In one answer, 24 MB; groups that differ beyond it are compared entry by entry without looking at cells."""

GROUP_ENTRIES = 256
CELL_ENTRIES = 16
PIECE_ENTRIES = 1024
GROUP_DEPTH_MAX = 12
DEPTH_MAX = 16
_PAGE_DEPTH = 8
_EXTENT_BYTES = 16
_EMPTY = bytes(FINGERPRINT_BYTES)
_BETWEEN_TURNS = 64


@dataclass(frozen=True, slots=True)
class Range:
    """The buckets of a partition (``<class>/<partition>``) whose number begins with the ``depth`` bits ``prefix``; all
    of them at depth 0."""

    partition: str
    depth: int = 0
    prefix: int = 0

    @property
    def buckets(self) -> tuple[int, int]:
        """First bucket, and the one after the last."""
        width = BUCKETS >> self.depth
        return self.prefix * width, (self.prefix + 1) * width


def depth_for(entries: int, each: int, depth_max: int) -> int:
    """How deep to divide a partition so that a range holds about ``each`` entries."""
    return min(depth_max, max(0, (entries - 1) // each).bit_length())


def ranges_of(partition: str, entries: int) -> list[Range]:
    """A whole partition as ranges that are each read, and sent, in one turn of an event loop."""
    depth = depth_for(entries, PIECE_ENTRIES, DEPTH_MAX)
    return [Range(partition, depth, prefix) for prefix in range(1 << depth)]


def fingerprint(salt: bytes, forest: Shipped, part: Range) -> bytes:
    """What a range holds, under a salt; zeros when it is empty."""
    start, stop = part.buckets
    if part.depth <= _PAGE_DEPTH:
        digests = forest.page_digests(part.partition)
        items = [(page, digests[page]) for page in range(start // SUBPAGES, stop // SUBPAGES) if page in digests]
    else:
        page = start // SUBPAGES
        found = forest.subpage_digests(part.partition, page)
        first = start - page * SUBPAGES
        items = [(number, found[number]) for number in range(first, first + stop - start) if number in found]
    if not items:
        return _EMPTY
    packed = b"".join([bytes((number,)) + digest for number, digest in items])
    return blake2b(packed, digest_size=FINGERPRINT_BYTES, key=salt, person=b"range").digest()


def entry_id(salt: bytes, path: str, digest: bytes) -> bytes:
    """An entry of a partition, under a salt."""
    return blake2b(digest + path.encode(), digest_size=FINGERPRINT_BYTES, key=salt, person=b"entry").digest()


def diff_request(forest: Shipped, salt: bytes) -> Iterator[DiffRequest | None]:
    """None now and then, at last the request."""
    partitions: dict[str, PartitionDigests] = {}
    for partition, root in forest.partitions().items():
        depth = depth_for(forest.count(partition), GROUP_ENTRIES, GROUP_DEPTH_MAX)
        groups: list[bytes] = []
        for prefix in range(1 << depth if depth else 0):
            groups.append(fingerprint(salt, forest, Range(partition, depth, prefix)))
            if prefix % _BETWEEN_TURNS == 0:
                yield None
        partitions[partition] = PartitionDigests(root, depth, b"".join(groups))
        yield None
    yield DiffRequest(salt, forest.root(), partitions)


@dataclass(slots=True)
class Differences:
    """The changing part of a :class:`DiffReply`."""

    whole: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    cells: dict[str, Cells] = field(default_factory=dict)
    fingerprints_left: int = FINGERPRINTS_MAX


def compare(forest: Shipped, request: DiffRequest, found: Differences) -> Iterator[None]:
    """Fill ``found`` with what differs between the primary's forest and the request. Raises ProtocolViolation."""
    ours = forest.partitions()
    found.gone.extend(sorted(request.partitions.keys() - ours.keys()))
    for partition, root in sorted(ours.items()):
        theirs = request.partitions.get(partition)
        if theirs is None:
            found.whole.append(partition)
        elif theirs.root != root:
            yield from _compare_groups(forest, partition, request.salt, theirs, found)
        yield None


def _compare_groups(
    forest: Shipped, partition: str, salt: bytes, theirs: PartitionDigests, found: Differences
) -> Iterator[None]:
    depth = theirs.depth
    if len(theirs.groups) != (FINGERPRINT_BYTES << depth if depth else 0):
        raise ProtocolViolation("a diff request has another number of groups than its depth says")
    differing = [0] if depth == 0 else []
    for prefix in range(1 << depth if depth else 0):
        if fingerprint(salt, forest, Range(partition, depth, prefix)) != _part(theirs.groups, prefix):
            differing.append(prefix)
        if prefix % _BETWEEN_TURNS == 0:
            yield None
    below = max(depth, depth_for(forest.count(partition), CELL_ENTRIES, DEPTH_MAX))
    split = below - depth
    if split == 0 or (len(differing) << split) > found.fingerprints_left:
        found.cells[partition] = Cells(depth, differing, b"")
        return
    found.fingerprints_left -= len(differing) << split
    cells: list[bytes] = []
    for count, group in enumerate(differing):
        cells += [
            fingerprint(salt, forest, Range(partition, below, group << split | cell)) for cell in range(1 << split)
        ]
        if count % 4 == 0:
            yield None
    found.cells[partition] = Cells(below, differing, b"".join(cells))


def _part(fingerprints: bytes, number: int) -> bytes:
    return fingerprints[number * FINGERPRINT_BYTES : (number + 1) * FINGERPRINT_BYTES]


def _ids(packed: bytes) -> set[bytes]:
    return {packed[at : at + FINGERPRINT_BYTES] for at in range(0, len(packed), FINGERPRINT_BYTES)}


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """What a secondary asks for. ``ranges`` begin with those that hold a keyring, if they differ;
    ``gone`` are partitions to delete without asking."""

    salt: bytes
    ranges: tuple[Range, ...]
    gone: tuple[str, ...]

    @classmethod
    def of(cls, request: DiffRequest, reply: DiffReply, forest: Shipped) -> SyncPlan:
        """The plan that follows from the primary's answer and this cluster's own forest. Raises ProtocolViolation."""
        for name in (*reply.whole, *reply.gone):
            forest.resolve(name)  # refuses what does not travel: a deletion could follow from it
        ranges = [part for partition in reply.whole for part in ranges_of(partition, reply.counts.get(partition, 0))]
        for partition, cells in reply.cells.items():
            asked = request.partitions.get(partition)
            if asked is None:
                raise ProtocolViolation("a diff answer has cells of a partition that was not asked about")
            ranges += _differing_cells(request.salt, forest, partition, asked.depth, cells)
        ranges.sort(key=lambda part: not _holds_keyring(part))
        return cls(request.salt, tuple(ranges), tuple(reply.gone))

    def deletions(self, forest: Shipped) -> Iterator[list[str]]:
        """The keys of every entry in the partitions that the primary does not have, in pieces. Each is read when it is
        asked for; those before may have been deleted by then."""
        for partition in self.gone:
            for part in ranges_of(partition, forest.count(partition)):
                yield [f"{partition}/{path}" for path, _ in entries_in(forest, part)]

    def requests(self, forest: Shipped, bytes_max: int) -> Iterator[tuple[list[str], list[Extent]]]:
        """Partition names and the ranges as extents with ids of this cluster's entries, in as few requests of about
        ``bytes_max`` as it takes, at least one. Entries are read when a request is built."""
        names: dict[str, int] = {}
        extents: list[Extent] = []
        size_bytes = 0
        for part in self.ranges:
            ids = b"".join([entry_id(self.salt, path, digest) for path, digest in entries_in(forest, part)])
            cost = _EXTENT_BYTES + len(ids) + (0 if part.partition in names else len(part.partition))
            if extents and size_bytes + cost > bytes_max:
                yield list(names), extents
                names, extents, size_bytes = {}, [], 0
            number = names.setdefault(part.partition, len(names))
            extents.append(Extent(number, part.depth, part.prefix, ids))
            size_bytes += cost
        yield list(names), extents


def _differing_cells(salt: bytes, forest: Shipped, partition: str, depth: int, cells: Cells) -> list[Range]:
    split = cells.depth - depth
    count = len(cells.groups) << split if split > 0 else 0
    if split < 0 or len(cells.fingerprints) != count * FINGERPRINT_BYTES or any(at >> depth for at in cells.groups):
        raise ProtocolViolation("a diff answer has other cells than were asked for")
    if not count:
        return [Range(partition, depth, group) for group in cells.groups]
    ranges = []
    for at, group in enumerate(cells.groups):
        for cell in range(1 << split):
            part = Range(partition, cells.depth, group << split | cell)
            if fingerprint(salt, forest, part) != _part(cells.fingerprints, (at << split) + cell):
                ranges.append(part)
    return ranges


def _holds_keyring(part: Range) -> bool:
    start, stop = part.buckets
    return part.partition.endswith(_KEYRING_PARTITION) and start <= bucket_of(_KEYRING_PATH) < stop


def entries_in(forest: Shipped, part: Range) -> list[tuple[str, bytes]]:
    """Path and digest of every entry of one range, a keyring first."""
    start, stop = part.buckets
    if part.depth == 0:
        entries = list(forest.keys(part.partition))
    else:
        entries = []
        for page in range(start // SUBPAGES, (stop + SUBPAGES - 1) // SUBPAGES):
            for subpage in sorted(forest.subpage_digests(part.partition, page)):
                if start <= page * SUBPAGES + subpage < stop:
                    entries += forest.entries(part.partition, page, subpage)
    if part.partition.endswith(_KEYRING_PARTITION):
        entries.sort(key=lambda entry: entry[0] != _KEYRING_PATH)
    return entries


def range_of(request: FetchRequest, extent: Extent) -> Range:
    """The range that an extent of a fetch request names. Raises ProtocolViolation."""
    known = extent.partition < len(request.partitions)
    if not known or extent.prefix >> extent.depth or len(extent.ids) % FINGERPRINT_BYTES:
        raise ProtocolViolation("an extent of a fetch request is malformed")
    return Range(request.partitions[extent.partition], extent.depth, extent.prefix)


def differing_entries(forest: Shipped, salt: bytes, part: Range, ids: bytes) -> tuple[list[str], bytes]:
    """The primary's view of an extent: paths the secondary lacks or has otherwise, and ids that nothing here has."""
    theirs = _ids(ids)
    wanted: list[str] = []
    for path, digest in entries_in(forest, part):
        known = entry_id(salt, path, digest)
        if known in theirs:
            theirs.discard(known)
        else:
            wanted.append(path)
    return wanted, b"".join(sorted(theirs))


def dropped_keys(forest: Shipped, request: FetchRequest, frame: Entries) -> Iterator[str]:
    """The secondary's view of the ids that the primary does not have: the keys of those entries that it still has just
    so. What was put and committed meanwhile has another id by now. Raises ProtocolViolation."""
    for number, ids in frame.dropped:
        if number >= len(request.extents):
            raise ProtocolViolation("the answer drops entries of an extent that was not asked for")
        part = range_of(request, request.extents[number])
        gone = _ids(ids)
        for path, digest in entries_in(forest, part):
            if entry_id(request.salt, path, digest) in gone:
                yield f"{part.partition}/{path}"
