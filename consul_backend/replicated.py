"""The replicated store of one tenure: committed entries, their log and their index.

Invariants while a :class:`ReplicatedStore` lives:

* ``head``, ``forest``, ``positions`` and the cache change together, once per commit, between two awaits.
* A key exists exactly when the index has it; a value is served only if it has the digest that the index has.
* A value is served only under the read lease, tested again after the value was read.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from consul_backend.batching import NeedsParts, Prepared
from consul_backend.bulk_read import read_many
from consul_backend.chunks import Chunks, read_value
from consul_backend.clock import Clock
from consul_backend.digesting import keep_digested
from consul_backend.failpoint import failpoint
from consul_backend.fenced import require_tenure
from consul_backend.foreign import ForeignWrites
from consul_backend.generation import drop_generation, physical_key, read_entry
from consul_backend.genesis import genesis
from consul_backend.group_commit import Committed, GroupCommit
from consul_backend.index_check import Inspected
from consul_backend.keys import decode_name, encode_partition, encode_path, may_be_ours, split_prefix
from consul_backend.large_batch import BatchBounds, crossing
from consul_backend.listing import corrected, exists, indexed
from consul_backend.merkle import Forest, entry_digest
from consul_backend.merkle_flush import Flusher, FlushView
from consul_backend.merkle_stage import StagedChange
from consul_backend.name_cache import NameCache
from consul_backend.physical import PhysicalStore
from consul_backend.position import Position
from consul_backend.read_lease import ReadLease
from consul_backend.recovery import Recovered, recover
from consul_backend.retention import HARD_FACTOR, Collector, RetentionFacts, keep_from
from consul_backend.roll_forward import LargeBatches
from consul_backend.store_options import StoreOptions
from consul_backend.tenure import Tenure
from consul_backend.value_cache import ValueCache
from consul_backend.wal import CorruptRecord, Head, Record, Write
from consul_backend.wal_reader import RecordGone, RecordRing, read_stored
from consul_backend.went_back import following, watch_tip

__all__ = [
    "Head",
    "ReplicatedStore",
    "StoreOptions",
    "Tenure",
    "Write",
    "drop_generation",
    "genesis",
    "physical_key",
    "read_entry",
]

_MIB = 1024 * 1024


class ReplicatedStore:
    """Made by :meth:`recover`; serves while :meth:`run` runs."""

    def __init__(
        self,
        physical: PhysicalStore,
        generation: str,
        tenure: Tenure,
        options: StoreOptions,
        recovered: Recovered,
        *,
        clock: Clock,
        lease: ReadLease,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self.generation = generation
        self.tenure = tenure
        self.forest: Forest = recovered.forest
        self.head: Head = recovered.tip.head
        self.inherited = self.head
        self.positions: Mapping[str, Position] = recovered.tip.record.header.positions
        self.oldest_index = recovered.oldest_index
        self._physical = physical
        self._options = options
        self._lease = lease
        self._table = recovered.table
        self._lazy = recovered.lazy
        self._segment_bytes = recovered.segment_bytes
        self._recovered_case, self._redone = recovered.case, recovered.redone
        self._random_bytes = random_bytes
        self._cache = ValueCache(options.cache_bytes_max)
        self._names = NameCache(options.names_bytes_max)
        self._ring = RecordRing(options.ring_records_max, options.ring_bytes_max)
        for record in recovered.recent:
            self._ring.append(record)
        self._holds: dict[str, int] = {}
        self._advanced = asyncio.Event()
        self._foreign = ForeignWrites()
        self._group_commit = GroupCommit(
            physical,
            generation,
            tenure,
            recovered.tip,
            options.commit(),
            clock=clock,
            lease=lease,
            random_bytes=random_bytes,
            on_commit=self._on_commit,
        )
        newest = self._group_commit.newest
        self._chunks = Chunks(physical, generation, tenure, recovered.lazy, self.forest.digest_of, newest)
        self._large = LargeBatches(
            physical,
            generation,
            self._group_commit,
            self._chunks,
            stage=lambda: StagedChange(self.forest),
            rolled=self._on_rolled,
            queue_max=options.large_queue_max,
            queue_bytes_max=options.large_queue_bytes_max,
            random_bytes=random_bytes,
        )
        self._crossings = {**recovered.crossings, **crossing(recovered.replay.spans, options.segment_records)}
        self._flusher, self._collector = self._make_flusher(recovered), self._make_collector()

    def _make_collector(self) -> Collector:
        return Collector(
            self._physical,
            self.generation,
            self.tenure,
            facts=self._retention_facts,
            gone=self._segment_gone,
            newest=self._group_commit.newest,
            interval_s=self._options.collect_interval_s,
        )

    def _make_flusher(self, recovered: Recovered) -> Flusher:
        return Flusher(
            self._physical,
            self.generation,
            self.tenure,
            self.forest,
            self._table,
            heads=recovered.heads,
            view=self._flush_view,
            newest=self._group_commit.newest,
            checkpoint=recovered.checkpoint,
            checkpoint_index=recovered.checkpoint_index,
            interval_s=self._options.flush_interval_s,
            extents_per_s=self._options.flush_extents_per_s,
        )

    @classmethod
    async def recover(
        cls,
        physical: PhysicalStore,
        generation: str,
        tenure: Tenure,
        options: StoreOptions,
        *,
        clock: Clock,
        lease: ReadLease,
        random_bytes: Callable[[int], bytes] = os.urandom,
        seen_index: int = 0,
    ) -> ReplicatedStore:
        """Recover a generation and commit the tenure record. The caller holds the lock as ``tenure``. ``seen_index``:
        a record of this generation that is known to have been committed; a log that ends before it went back.

        Raises Corrupt, FenceLost, StoreWentBack, SentinelMissing, OutcomeUnknown, Unavailable, PermissionDenied.
        """
        recovered = await recover(physical, generation, tenure, options.segment_records, options.index_eager_keys)
        tenure = await following(physical, tenure, recovered.tip, seen_index)
        store = cls(
            physical, generation, tenure, options, recovered, clock=clock, lease=lease, random_bytes=random_bytes
        )
        failpoint("recovery:before-tenure")
        await store._group_commit.begin()
        failpoint("recovery:after-tenure")
        await store._large.recover(recovered.replay)
        return store

    async def run(self) -> None:
        """Commit, flush and collect until cancelled. Raises (in an exception group) FenceLost, StoreWentBack,
        SentinelMissing, OutcomeUnknown, Corrupt: whichever it is, this tenure is over."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._group_commit.run(), name="commit")
            tip = watch_tip(self._physical, self.tenure, self._group_commit, self._options.tip_interval_s)
            tasks.create_task(tip, name="watch the newest record")
            tasks.create_task(self._large.run(), name="large batches")
            tasks.create_task(self._chunks.run(self._options.collect_interval_s), name="collect chunks")
            tasks.create_task(self._lazy.run(self._options.index_warm_share), name="load index")
            tasks.create_task(keep_digested(self.forest, self.wait_head), name="compute digests")
            tasks.create_task(self._flush(), name="flush index")
            tasks.create_task(self._collector.run(), name="collect log")

    async def _flush(self) -> None:
        # A checkpoint says from where the log is needed, and records that wait for a page to be loaded are.
        await self._lazy.rooted()
        await self._flusher.run()

    # -- the index

    async def require_tenure(self) -> None:
        """Raises FenceLost unless this tenure still leads: see :func:`~consul_backend.fenced.require_tenure`."""
        await require_tenure(self._physical, self.tenure)

    async def rooted(self) -> None:
        """Wait until every root is known: at once, except shortly after the recovery of a big index."""
        await self._lazy.rooted()

    async def load_index(self, cls: str | None = None) -> None:
        """Have the whole index, or one class of it, in memory: what a comparison of indexes needs first. Raises
        IndexDamaged, and what reading raises."""
        await self._lazy.load_all(cls)

    def inspected(self) -> Inspected:
        """What :func:`~consul_backend.index_check.check` and :func:`~consul_backend.reindex.reindex` need of it."""
        return Inspected(
            self._physical,
            self.generation,
            self.tenure,
            self._chunks,
            self.forest,
            self._table,
            self._lazy,
            head=lambda: self.head,
            oldest=lambda: self.oldest_index,
            newest=self._group_commit.newest,
            stored=lambda index: self._flusher.stored(index),
            records=self.records,
            commit=self.commit,
            value_of=lambda stored: read_value(self._physical, self.generation, stored, consistent=True),
            settled=lambda key: self._group_commit.settled(lambda entries: key in entries),
            pending=lambda key: self._group_commit.pending(key) or self._large.pending(key),
            elsewhere=lambda key: self._large.overlay.get(key) is not None,
            fresh_name=lambda: f"reindex-{self._random_bytes(16).hex()}",
            foreign=self._foreign,
        )

    # -- reading

    async def get(self, key: str) -> bytes | None:
        """The value of a key, or None when it does not exist.

        Raises ValueError (malformed key), FenceLost, Unavailable, PermissionDenied; ForeignWrite when the stored value
        is none that this cluster wrote.
        """
        while True:
            await self._lease.ensure()
            pending = self._large.overlay.get(key)
            if pending is not None:
                return pending.value
            value = self._cache.get(key)
            if value is not None:
                return value
            where = physical_key(self.generation, key)
            if self._lazy.cold:
                await self._lazy.need((key,))
            digest = self.forest.digest_of(key)
            if digest is None:
                return None
            value = await self._read(key, where)
            if value is not None and key not in self._large.overlay:
                self._cache.put(key, value)
            if self._lease.valid():
                return value

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of many keys, read together and not kept in the cache. Raises as :meth:`get`."""
        wanted = [(key, physical_key(self.generation, key)) for key in keys]
        return await read_many(self._physical, self._lease, self._lazy, self.forest, wanted, self._is_far, self.get)

    def _is_far(self, key: str) -> bool:
        return key not in self._cache and self._large.overlay.get(key) is None

    async def exists(self, key: str) -> bool:
        """Whether the key has a value, as the index knows without reading it. Raises as :meth:`get`."""
        return await exists(self._lease, self._lazy, self.forest, self._large.overlay, key)

    def may_be_large(self, key: str) -> bool:
        """Whether the value may be larger than one transaction: what reads many at once reads those one by one. True of
        every key until this tenure has looked for such values."""
        return not self._chunks.swept or key in self._chunks.live

    async def _read(self, key: str, where: str) -> bytes | None:
        """The stored value that has the index's digest; None when the key is gone from the index meanwhile."""
        consistent = False
        while True:
            pending = self._large.overlay.get(key)
            if pending is not None:
                return pending.value
            before = self.forest.digest_of(key)
            item = await self._physical.get(where, consistent=consistent)
            digest = self.forest.digest_of(key)
            if digest is None:
                return None
            if item is not None:
                if entry_digest(key, item.value) == digest:
                    return item.value
                value = await read_value(self._physical, self.generation, item.value, consistent=consistent)
                if value is not None and entry_digest(key, value) == digest:
                    return value
            if await self._group_commit.settled(lambda entries: key in entries) or digest != before:
                continue
            if consistent and self._lease.valid():
                # With the lease valid after the read, no successor of ours can have written it.
                raise self._foreign.read(key)
            await self._lease.ensure()
            consistent = True

    # -- writing

    async def commit(self, writes: Sequence[Write], *, positions: Mapping[str, Position] | None = None) -> Head:
        """Commit ``writes`` atomically, with the newest position of a mode if given; returns the head of the record
        that holds them. Nothing to commit returns the head as it is.

        Raises ValueError, TooLarge, Overloaded, NotApplied, PermissionDenied: nothing was written; OutcomeUnknown.
        """
        if not writes and not positions:
            return self.head
        if self._lazy.cold:
            await self._lazy.need_to_write([write.key for write in writes])
        if len(writes) <= self._group_commit.budget.ops_max:
            try:
                return await self._group_commit.commit(writes, positions)
            except NeedsParts:
                pass
        bounds = BatchBounds(self._options.batch_entries_max, self._options.batch_bytes_max)
        if positions:
            bounds = BatchBounds(self._options.staged_entries_max, self._options.staged_bytes_max)
        bounds.require(writes)
        return await self._large.commit(writes, positions)

    def _on_commit(self, committed: Committed) -> None:
        record = committed.record
        index = record.header.index
        if record.header.large is not None:
            self._on_special(record)
        else:
            self._on_entries(committed.entries, index)
        self.positions = record.header.positions
        self.head = committed.head
        self._ring.append(record)
        segment = index // self._options.segment_records
        self._segment_bytes[segment] = self._segment_bytes.get(segment, 0) + committed.size_bytes
        self._advanced.set()
        self._advanced = asyncio.Event()

    def _on_entries(self, entries: Mapping[str, Prepared], index: int) -> None:
        change, mark, put = self.forest.change, self._table.mark, self._cache.put
        self._large.replaced(entries)
        if self._chunks.live:
            self._chunks.replaced_all(entries)
        for key, write in entries.items():
            if self._names.concerns(key) and (self.forest.digest_of(key) is None) != (write.digest is None):
                self._names.changed(key)
            cls, partition = write.group
            mark(cls, partition, change(cls, partition, write.path, write.digest), index)
            put(key, write.value)

    def _on_special(self, record: Record) -> None:
        staged = self._large.recorded(record)
        if staged is not None:
            self._names.clear()
            staged.apply(self._table, record.index)
            newest = self._large.spans[-1][:2]
            self._crossings = {**self._crossings, **crossing([newest], self._options.segment_records)}

    def _on_rolled(self, key: str) -> None:
        self._cache.put(key, None)  # until now the overlay was asked first: see get

    async def rolled(self) -> None:
        """Wait until no large batch is in progress: every true value is in its data key."""
        await self._large.finished()

    # -- the log

    async def wait_head(self, after: int) -> Head:
        """The head, once its index is greater than ``after``."""
        while self.head.index <= after:
            await self._advanced.wait()
        return self.head

    async def records(self, start: int, limit: int, *, bytes_max: int = 4 * _MIB) -> list[Record]:
        """Up to ``limit`` records from ``start`` on, about ``bytes_max`` bytes of them; empty beyond the head.

        Raises RecordGone when ``start`` was collected, FenceLost, and what reading raises.
        """
        if start > self.head.index or limit < 1:
            return []
        if found := self._ring.read(start, limit, bytes_max):
            return found
        if start < self.oldest_index:
            raise RecordGone(f"record {start} was collected, the oldest is {self.oldest_index}")
        stop, segment_records = min(start + limit - 1, self.head.index), self._options.segment_records
        try:
            return await read_stored(self._physical, self.generation, start, stop, segment_records, bytes_max)
        except CorruptRecord:
            if start < self.oldest_index:
                raise RecordGone(f"record {start} was collected, the oldest is {self.oldest_index}") from None
            await require_tenure(self._physical, self.tenure)  # or else a successor collected it
            raise

    def hold(self, name: str, index: int) -> None:
        """Secondary ``name`` still needs the log from record ``index`` on (up to the hard bound)."""
        self._holds[name] = index

    def unhold(self, name: str) -> None:
        """Secondary ``name`` needs nothing any more."""
        self._holds.pop(name, None)

    def _flush_view(self) -> FlushView:
        checkpoint = self._flusher.checkpoint
        if checkpoint is not None:
            self._large.forget_before(checkpoint.redo_from)
        return FlushView(self.head, self.positions, self._segment_bytes, self._crossings, self._large.firsts)

    def _retention_facts(self) -> RetentionFacts:
        options = self._options
        return RetentionFacts(
            oldest=self.oldest_index,
            head=self.head.index,
            redo_from=self._flusher.redo_from,
            keep_records=options.wal_keep_records,
            keep_bytes=options.wal_keep_bytes,
            segment_records=options.segment_records,
            sizes=self._segment_bytes,
            holds=self._holds,
            crossings=self._crossings,
        )

    def _segment_gone(self, segment: int) -> None:
        self.oldest_index = max(self.oldest_index, (segment + 1) * self._options.segment_records)
        self._segment_bytes.pop(segment, None)
        self._crossings.pop(segment, None)

    # -- upkeep

    async def flush(self) -> None:
        """Store everything of the index that is dirty now. For tests and orderly ends; not beside :meth:`run`."""
        await self._lazy.settle()
        await self._flusher.flush_all()

    async def collect(self) -> int:
        """Collect old log segments now; how many went. Not beside :meth:`run`."""
        return await self._collector.collect()

    def statistics(self) -> dict[str, int | float]:
        """Counters and gauges, by the names of their metrics."""
        found: dict[str, int | float] = {
            "wal_head_index": self.head.index,
            "wal_oldest_index": self.oldest_index,
            "wal_bytes": sum(self._segment_bytes.values()),
            "wal_keep_from": keep_from(self._retention_facts()),
            "wal_hard_records": HARD_FACTOR * self._options.wal_keep_records,
            "recovery_records_redone": self._redone,
            "foreign_writes": self._foreign.count,
        }
        log = (self._collector, self._group_commit, self._large, self._chunks, self._ring)
        for part in (*log, self._cache, self._names, self._table, self._flusher, self._lazy):
            found |= part.statistics()
        return found

    async def _stored_names(self, prefix: str) -> list[str]:
        cls, partition, path = split_prefix(prefix)
        where = f"g/{self.generation}/d/{encode_partition(cls, partition)}/"
        if path or prefix.count("/") > 2:
            where += f"{encode_path(path)}/"
        # Consistent: unlike a value, a name has no digest in the index that would show a deposed leader's answer.
        names = await self._physical.list(where, consistent=True)
        return [decode_name(name) for name in names if may_be_ours(name)]

    async def list(self, prefix: str) -> list[str]:
        """The names one level below ``prefix`` (``<class>/<partition>/`` and perhaps folders), sorted; folders end in a
        slash. Raises as :meth:`get`."""
        cls, partition, _ = split_prefix(prefix)
        while True:
            await self._lease.ensure()
            if not self.forest.count(cls, partition):
                return []
            if (known := self._names.get(prefix)) is not None:
                return list(known)
            mark = self._names.reading(prefix)
            version, changes = self._large.version, self._large.changes(prefix)
            names: Iterable[str] = await self._stored_names(prefix)
            await self._group_commit.settled(lambda entries: any(name.startswith(prefix) for name in entries))
            names = await corrected(self._stored_names, prefix, names, changes)
            exact = not (self._lazy.cold or self._lazy.damaged)
            names = names if self._lazy.cold else await indexed(prefix, names, self.forest.digest_of)
            # A large batch that became true meanwhile may be half in the data keys: then everything again.
            if self._lease.valid() and version == self._large.version:
                found = sorted(names)
                if exact and not changes:
                    self._names.put(prefix, found, mark)
                return list(found)
