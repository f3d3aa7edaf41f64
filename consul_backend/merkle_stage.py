"""A batch's changes of the index, worked out before they are true. Pure.

A large batch becomes true with one record, and the index is exact after every record. To change 100,000 entries at that
moment would hold up the event loop for half a second. So the pages that the batch will change are copied aside and
changed there, a few entries at a time (:meth:`StagedChange.add`, :meth:`StagedChange.digest`); what others commit
meanwhile goes into the copies as well (:meth:`StagedChange.follow`). When the batch is true, the copies take the pages'
places (:meth:`StagedChange.apply`): work for each page, none for each entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from consul_backend.batching import Prepared
from consul_backend.merkle import SUBPAGES, Forest, bucket_of
from consul_backend.merkle_pages import ExtentTable

Place = tuple[str, str, int]
"""Class, partition and page."""


class StagedChange:
    """Of one batch. The pages that it changes are in memory, and stay there."""

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._copies = Forest()
        self._keys: set[str] = set()
        self._buckets: dict[Place, set[int]] = {}

    def add(self, entry: Prepared) -> None:
        """One entry of the batch."""
        bucket = bucket_of(entry.path)
        place = (*entry.group, bucket // SUBPAGES)
        buckets = self._buckets.get(place)
        if buckets is None:
            buckets = self._buckets[place] = set()
            self._copies.copy_page(self._forest, *place)
        buckets.add(bucket)
        self._keys.add(entry.key)
        self._copies.change(*entry.group, entry.path, entry.digest)

    def follow(self, entries: Iterable[Prepared]) -> None:
        """What an ordinary commit has changed, after :meth:`add` of some entries: the batch's own values come later."""
        for entry in entries:
            if entry.key not in self._keys and (*entry.group, bucket_of(entry.path) // SUBPAGES) in self._buckets:
                self._copies.change(*entry.group, entry.path, entry.digest)

    def digest(self) -> Iterator[None]:
        """Compute the copies' digests, so that the roots after the batch cost little; yields after every page."""
        for place in self._buckets:
            self._copies.page_digest(*place)
            yield

    def apply(self, table: ExtentTable, index: int) -> None:
        """The batch is true with record ``index``: put the copies in place, and mark what is to be stored anew. The
        object is of no further use."""
        for place, buckets in self._buckets.items():
            self._forest.adopt(*place, self._copies)
            table.mark_all(place[0], place[1], sorted(buckets), index)
