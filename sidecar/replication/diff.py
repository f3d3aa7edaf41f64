"""Comparing two merkle forests over one round trip, and planning the second. Pure.

Both forests may change while this goes on: a digest is read when it is read. That is harmless on the primary, because
whatever changed there after the base record comes again with the records since the base; and on the secondary nobody
but the sync itself writes class ``r``. Generators hand back control after each page, so that a caller on an event loop
may let others run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from consul_backend.merkle import SUBPAGES, bucket_of
from consul_backend.wal import Write
from sidecar.replication.intake import KEYRING_KEY, REPLICATED
from sidecar.replication.protocol import DiffReply, DiffRequest, Extent, PartitionDigests
from sidecar.replication.store_view import Forest

_, _KEYRING_PARTITION, _KEYRING_PATH = KEYRING_KEY.split("/")

DIGESTS_MAX = 1_500_000
"""Subpage digests in one answer, about 36 MB; pages that differ beyond it are compared entry by entry instead."""

_ENTRY_BYTES = 32
"""A digest and msgpack around one entry of an extent."""


def diff_request(forest: Forest) -> Iterator[DiffRequest | None]:
    """None after each partition, at last the request."""
    partitions: dict[str, PartitionDigests] = {}
    for partition, root in forest.partitions(REPLICATED).items():
        partitions[partition] = PartitionDigests(root, dict(forest.page_digests(REPLICATED, partition)))
        yield None
    yield DiffRequest(forest.root(REPLICATED), partitions)


@dataclass(slots=True)
class Differences:
    """The changing part of a :class:`DiffReply`."""

    whole: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    pages: dict[str, list[int]] = field(default_factory=dict)
    subpages: dict[str, dict[int, dict[int, bytes]]] = field(default_factory=dict)
    digests_left: int = DIGESTS_MAX


def compare(forest: Forest, request: DiffRequest, found: Differences) -> Iterator[None]:
    """Fill ``found`` with what differs between the primary's forest and the request."""
    ours = forest.partitions(REPLICATED)
    found.gone.extend(sorted(request.partitions.keys() - ours.keys()))
    for partition, root in sorted(ours.items()):
        theirs = request.partitions.get(partition)
        if theirs is None:
            found.whole.append(partition)
        elif theirs.root != root:
            yield from _compare_pages(forest, partition, theirs.pages, found)
        yield None


def _compare_pages(forest: Forest, partition: str, theirs: Mapping[int, bytes], found: Differences) -> Iterator[None]:
    ours = forest.page_digests(REPLICATED, partition)
    whole = sorted(ours.keys() ^ theirs.keys())
    for page in sorted(ours.keys() & theirs.keys()):
        if ours[page] == theirs[page]:
            continue
        subpages = dict(forest.subpage_digests(REPLICATED, partition, page))
        if len(subpages) > found.digests_left:
            whole.append(page)
        else:
            found.digests_left -= len(subpages)
            found.subpages.setdefault(partition, {})[page] = subpages
        yield None
    if whole:
        found.pages[partition] = whole


@dataclass(frozen=True, slots=True)
class Range:
    """A part of a partition to compare entry by entry: one subpage, a page (``subpage`` None), all (both None)."""

    partition: str
    page: int | None = None
    subpage: int | None = None


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """What a secondary asks for. ``ranges`` begin with the one that holds the replicated keyring, if it differs;
    ``gone`` are partitions to delete without asking."""

    ranges: tuple[Range, ...]
    gone: tuple[str, ...]

    @classmethod
    def of(cls, reply: DiffReply, forest: Forest) -> SyncPlan:
        """The plan that follows from the primary's answer and this cluster's own forest."""
        ranges = [Range(partition) for partition in reply.whole]
        ranges += [Range(partition, page) for partition, pages in reply.pages.items() for page in pages]
        for partition, pages in reply.subpages.items():
            for page, theirs in pages.items():
                ours = forest.subpage_digests(REPLICATED, partition, page)
                differing = [at for at in sorted(ours.keys() | theirs.keys()) if ours.get(at) != theirs.get(at)]
                ranges += [Range(partition, page, subpage) for subpage in differing]
        ranges.sort(key=lambda part: not _holds_keyring(part))
        return cls(tuple(ranges), tuple(reply.gone))

    def deletions(self, forest: Forest) -> list[Write]:
        """Deletes of every entry in the partitions that the primary does not have."""
        return [
            Write(f"{REPLICATED}/{partition}/{path}", None)
            for partition in self.gone
            for path, _ in forest.keys(REPLICATED, partition)
        ]

    def requests(self, forest: Forest, bytes_max: int) -> Iterator[list[Extent]]:
        """The ranges as extents with this cluster's entries, in as few requests of about ``bytes_max`` as it takes, at
        least one. Entries are read when a request is built."""
        extents: list[Extent] = []
        size_bytes = 0
        for part in self.ranges:
            entries = entries_in(forest, part)
            cost = _ENTRY_BYTES + sum([_ENTRY_BYTES + len(path) for path, _ in entries])
            if extents and size_bytes + cost > bytes_max:
                yield extents
                extents, size_bytes = [], 0
            extents.append(Extent(part.partition, part.page, part.subpage, entries))
            size_bytes += cost
        yield extents


def _holds_keyring(part: Range) -> bool:
    page, subpage = divmod(bucket_of(_KEYRING_PATH), SUBPAGES)
    return part.partition == _KEYRING_PARTITION and part.page in {None, page} and part.subpage in {None, subpage}


def entries_in(forest: Forest, part: Range | Extent) -> list[tuple[str, bytes]]:
    """Path and digest of every entry of one range, the replicated keyring first."""
    if part.page is None:
        entries = list(forest.keys(REPLICATED, part.partition))
    elif part.subpage is None:
        entries = [
            entry
            for subpage in sorted(forest.subpage_digests(REPLICATED, part.partition, part.page))
            for entry in forest.entries(REPLICATED, part.partition, part.page, subpage)
        ]
    else:
        entries = list(forest.entries(REPLICATED, part.partition, part.page, part.subpage))
    if part.partition == _KEYRING_PARTITION:
        entries.sort(key=lambda entry: entry[0] != _KEYRING_PATH)
    return entries


def differing_entries(forest: Forest, extent: Extent) -> tuple[list[str], list[str]]:
    """The primary's view of an extent: paths the secondary lacks or has with another digest, and paths it has that are
    not here."""
    theirs = dict(extent.entries)
    ours = entries_in(forest, extent)
    wanted = [path for path, digest in ours if theirs.get(path) != digest]
    here = {path for path, _ in ours}
    return wanted, [path for path in theirs if path not in here]
