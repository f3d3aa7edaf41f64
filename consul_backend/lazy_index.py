"""Loading the index while it is in use, so that becoming active does not take longer the more keys there are.

At recovery only the *heads* are read: roots and sizes are known, every stored page is cold. Records of the log that
change a cold page wait here until it is loaded. What needs a page awaits :meth:`LazyIndex.need`; meanwhile
:meth:`LazyIndex.run` loads first the pages that records wait for (then roots are exact and flushes begin), and after
that the rest, at a bounded share of the event loop's time. A page that was loaded never becomes cold again.

What is loaded is proved: a page's extents, repeated up to its head's record, must give the head's digest. A page that
fails is *damaged*: whoever needs it gets IndexDamaged, everything else goes on, and a reindex repairs it.

Nobody but this tenure writes extents, and a flush touches loaded pages only, so what is cold cannot change underneath;
unless the tenure is over: before a page is called damaged it is proved that this tenure still leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence

from consul_backend.complaints import Complaint
from consul_backend.digesting import compute_digests
from consul_backend.errors import Corrupt, FenceLost, IndexDamaged, NotApplied, PermissionDenied, Unavailable
from consul_backend.heads import Heads
from consul_backend.keys import encode_partition
from consul_backend.merkle import SUBPAGES, Forest, bucket_of
from consul_backend.merkle_pages import (
    Extent,
    ExtentTable,
    decode_extent,
    extent_key,
    merkle_prefix,
    parse_extent_name,
    range_of,
)
from consul_backend.physical import PhysicalStore

log = logging.getLogger("core.index")

Name = tuple[str, str]
"""Class and partition."""

_RETRY_S = 0.5
_KEYS_BETWEEN_TURNS = 1000


def apply_redo(
    forest: Forest, table: ExtentTable, cls: str, partition: str, path: str, digest: bytes | None, index: int
) -> None:
    """Repeat one change of record ``index``, unless what is stored reflects it already."""
    bucket = bucket_of(path)
    if index > table.lsn_of(cls, partition, bucket):
        forest.change(cls, partition, path, digest)
        table.mark(cls, partition, bucket, index)


def put_extent(forest: Forest, cls: str, partition: str, depth: int, start: int, extent: Extent) -> None:
    """An extent's subpages in place of what its range holds. Raises Corrupt."""
    first, stop = range_of(depth, start)
    for bucket in [bucket for bucket, _ in forest.blobs(cls, partition, first, stop)]:
        forest.load_blob(cls, partition, bucket, b"")
    for bucket, blob in extent.subpages:
        if not first <= bucket < stop:
            raise Corrupt(f"an index extent of class {cls}, partition {partition!r} holds another's subpages")
        forest.load_blob(cls, partition, bucket, blob)


class LazyIndex:
    """The cold part of one tenure's index. Without ``heads`` there is none and everything here is at once done."""

    def __init__(
        self,
        physical: PhysicalStore,
        generation: str,
        forest: Forest,
        table: ExtentTable,
        heads: Mapping[Name, Heads],
        redo_from: int,
        *,
        prove_tenure: Callable[[], Awaitable[None]],
    ) -> None:
        self._prove_tenure = prove_tenure
        self._physical = physical
        self._generation = generation
        self._forest = forest
        self._table = table
        self._heads = dict(heads)
        self._redo_from = redo_from
        self._unlisted = set(heads)
        self._cold: dict[Name, set[int]] = {name: set(head.pages) for name, head in heads.items()}
        self._pending: dict[Name, dict[int, list[tuple[int, str, bytes | None]]]] = {}
        self._lock = asyncio.Lock()
        self._settled = asyncio.Event()
        self._repaired = asyncio.Event()
        self.damaged: dict[tuple[str, str, int], str] = {}
        self.loaded_pages = 0
        for (cls, partition), head in heads.items():
            for page, (digest, count) in head.pages.items():
                forest.add_cold(cls, partition, page, digest, count)

    # -- recovery

    def redo(self, cls: str, partition: str, path: str, digest: bytes | None, index: int) -> None:
        """Repeat one change of the log: at once, or when its page is loaded."""
        heads = self._heads.get((cls, partition))
        if heads is None:
            apply_redo(self._forest, self._table, cls, partition, path, digest, index)
            return
        page = bucket_of(path) // SUBPAGES
        pages = self._pending.setdefault((cls, partition), {})
        pages.setdefault(page, []).append((index, path, digest))
        self._cold[cls, partition].add(page)
        if index > heads.lsn:
            self._forest.add_cold(cls, partition, page, None, heads.pages.get(page, (b"", 0))[1])

    # -- what is there

    @property
    def cold(self) -> bool:
        """Whether anything is not in memory yet."""
        return bool(self._cold)

    @property
    def cold_pages(self) -> int:
        """How many pages are not in memory yet."""
        return sum([len(pages) for pages in self._cold.values()])

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        return {"index_cold_pages": self.cold_pages, "index_damaged_pages": len(self.damaged)}

    def lacks(self, cls: str, partition: str, page: int) -> bool:
        """Whether a page must be loaded before its entries are read or changed."""
        pages = self._cold.get((cls, partition))
        return pages is not None and ((cls, partition) in self._unlisted or page in pages)

    # -- waiting

    async def need(self, keys: Iterable[str]) -> None:
        """Load what the entries of ``keys`` are looked up in. Raises IndexDamaged, FenceLost, and what reading
        raises."""
        for number, key in enumerate(keys, 1):
            cls, partition, path = key.split("/", 2)
            page = bucket_of(path) // SUBPAGES
            if self.lacks(cls, partition, page):
                await self._load((cls, partition), page)
            if number % _KEYS_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)

    async def need_to_write(self, keys: Iterable[str]) -> None:
        """As :meth:`need`, for a commit: what keeps it from loading means that nothing was written. Raises NotApplied,
        IndexDamaged, PermissionDenied."""
        try:
            await self.need(keys)
        except (FenceLost, Unavailable) as error:
            raise NotApplied(f"nothing was written: the index could not be read ({error})") from error

    async def load_all(self, cls: str | None = None) -> None:
        """Load everything, or one class, without pauses. Raises IndexDamaged, and what reading raises."""
        for name, page in self._todo():
            if cls in (None, name[0]):
                await self._load(name, page)
                await asyncio.sleep(0)
        await compute_digests(self._forest)

    async def load_undamaged(self, only: Collection[Name] | None = None) -> None:
        """As :meth:`load_all`, of all partitions or ``only`` some, leaving out what is damaged; :attr:`damaged` has
        all of that afterwards."""
        for name, page in self._todo():
            if only is not None and name not in only:
                continue
            with contextlib.suppress(IndexDamaged):
                await self._load(name, page)
            await asyncio.sleep(0)

    async def rooted(self) -> None:
        """Wait until every root is known."""
        if self._pending:
            await self._settled.wait()

    async def settle(self) -> None:
        """Load the pages that records of the log wait for. Raises IndexDamaged, and what reading raises."""
        for name, pages in list(self._pending.items()):
            for page in sorted(pages):
                await self._load(name, page)
                await asyncio.sleep(0)
        self._settled.set()

    async def run(self, share: float) -> None:
        """Load everything, using about ``share`` (0..1) of the time, until it is done; damaged pages are left out.
        Raises SentinelMissing, FenceLost; failures that time mends are logged."""
        await self._settle_undamaged()
        for name, page in self._todo():
            if (*name, page) in self.damaged:
                continue
            started_s = time.monotonic()
            await self._persistently(name, page)
            await asyncio.sleep((time.monotonic() - started_s) * (1 / share - 1))

    async def _settle_undamaged(self) -> None:
        while True:
            for name, pages in list(self._pending.items()):
                for page in sorted(pages):
                    if (*name, page) not in self.damaged:
                        await self._persistently(name, page)
                        await asyncio.sleep(0)
            if not self._pending:
                self._settled.set()
                return
            await self._repaired.wait()
            self._repaired.clear()

    async def _persistently(self, name: Name, page: int) -> None:
        complaint = Complaint()
        while True:
            try:
                await self._load(name, page)
            except IndexDamaged:
                return
            except (Unavailable, PermissionDenied) as error:
                if complaint.due(error):
                    log.warning("the merkle index could not be loaded further, trying again: %s", error)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    def _todo(self) -> Iterator[tuple[Name, int]]:
        """Pages still to load; a partition without any, which must be listed all the same, counts as its page 0."""
        for name in list(self._cold):
            for page in sorted(self._cold.get(name, ())) or [0]:
                yield name, page

    # -- loading

    async def _load(self, name: Name, page: int) -> None:
        async with self._lock:
            if self.lacks(*name, page) and (*name, page) not in self.damaged:
                if name in self._unlisted:
                    await self._list(name)
                if page in self._cold.get(name, ()):
                    await self._load_unit(name, *self._table.unit_of(*name, page))
                self._forget_if_done(name)
        problem = self.damaged.get((*name, page))
        if problem is not None:
            raise IndexDamaged(f"page {page} of the index of class {name[0]}, partition {name[1]}: {problem}")

    def _forget_if_done(self, name: Name) -> None:
        if name not in self._unlisted and not self._cold.get(name, True):
            del self._cold[name]
            if not self._cold:
                # Checksums of extents that were damaged were not known before; now those of all are.
                self._table.recount()

    async def _list(self, name: Name) -> None:
        """Learn which extents a partition has. Splits that are not complete are loaded now: the flusher goes on with
        them at once."""
        prefix = f"{merkle_prefix(self._generation)}{encode_partition(*name)}/"
        stored: list[tuple[int, int]] = []
        for found in await self._physical.list(prefix, consistent=True):
            try:
                stored.append(parse_extent_name(found))
            except Corrupt as error:
                log.error("class %s, partition %s: %s", *name, error)
        for depth, start in self._table.add_names(*name, stored):
            first, stop = range_of(depth, start)
            low, high = self._table.unit_of(*name, first // SUBPAGES)
            await self._load_unit(name, min(low, first // SUBPAGES), max(high, -(-stop // SUBPAGES)))
        self._table.settle_partition(*name, self._redo_from)
        self._unlisted.discard(name)

    async def _load_unit(self, name: Name, low: int, high: int) -> None:
        """Load the pages ``low`` up to ``high`` (exclusive), which are stored together."""
        where = self._table.stored_over(*name, low * SUBPAGES, high * SUBPAGES)
        keys = [extent_key(self._generation, *name, depth, start) for depth, start in where]
        items = await self._physical.get_many(keys, consistent=True)
        scratch, problem = Forest(), ""
        for (depth, start), key, item in zip(where, keys, items, strict=True):
            try:
                if item is None:
                    raise Corrupt(f"index extent {key} is gone")
                extent = decode_extent(key, item.value)
                put_extent(scratch, *name, depth, start, extent)
                self._table.set_loaded(*name, depth, start, extent)
            except Corrupt as error:
                problem = str(error)
        pages = [page for page in range(low, high) if page in self._cold.get(name, ())]
        unproven = [page for page in pages if not self._finish(name, page, scratch)]
        if unproven:
            await self._prove_tenure()  # or else it is a successor's page that was read
        for page in unproven:
            if (*name, page) not in self.damaged:
                found = problem or "its stored entries do not have its digest"
                log.error("page %d of the index of class %s, partition %s is damaged: %s", page, *name, found)
                self.damaged[*name, page] = found

    def _finish(self, name: Name, page: int, scratch: Forest) -> bool:
        """Prove a page and take it over, with the records that waited for it; whether it was proved."""
        heads = self._heads[name]
        waiting = self._pending.get(name, {}).get(page, [])
        for index, path, digest in waiting:
            if heads.lsn >= index > self._table.lsn_of(*name, bucket_of(path)):
                scratch.change(*name, path, digest)
        proved = scratch.page_digest(*name, page) == heads.pages.get(page, (None, 0))[0]
        if proved:
            self._take_over(name, page, scratch)
        return proved

    def _take_over(self, name: Name, page: int, scratch: Forest) -> None:
        heads = self._heads[name]
        waiting = self._pending.get(name, {}).pop(page, [])
        self._forest.adopt(*name, page, scratch)
        for index, path, digest in waiting:
            bucket = bucket_of(path)
            if index > self._table.lsn_of(*name, bucket):
                if index > heads.lsn:
                    self._forest.change(*name, path, digest)
                self._table.mark(*name, bucket, index)
        if not self._pending.get(name, True):
            del self._pending[name]
        self._cold[name].discard(page)
        self.loaded_pages += 1

    # -- repair

    def proves(self, name: Name, page: int, entries: Sequence[tuple[str, bytes]]) -> bool:
        """Whether ``entries`` are what a damaged page holds now, beyond doubt: they have its head's digest, and no
        record changed the page since."""
        heads = self._heads[name]
        waiting = self._pending.get(name, {}).get(page, [])
        scratch = Forest()
        for path, digest in entries:
            scratch.change(*name, path, digest)
        same = scratch.page_digest(*name, page) == heads.pages.get(page, (None, 0))[0]
        return same and all(index <= heads.lsn for index, _, _ in waiting)

    def repair(self, name: Name, page: int, entries: Sequence[tuple[str, bytes]], index: int) -> None:
        """Put ``entries`` in place of a damaged page; its extents are stored anew. ``index`` is the newest record."""
        waiting = self._pending.get(name, {}).get(page, [])
        scratch = Forest()
        for path, digest in entries:
            scratch.change(*name, path, digest)
        for _, path, newest in waiting:
            scratch.change(*name, path, newest)
        first = min([index, *(found for found, _, _ in waiting)])
        self._pending.get(name, {}).pop(page, None)
        if not self._pending.get(name, True):
            del self._pending[name]
        self._forest.adopt(*name, page, scratch)
        for bucket in range(page * SUBPAGES, (page + 1) * SUBPAGES):
            self._table.mark(*name, bucket, first)
        self.damaged.pop((*name, page), None)
        self._cold[name].discard(page)
        self._forget_if_done(name)
        self._repaired.set()
