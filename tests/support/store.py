"""A replicated store on an in-memory physical store, tenures to order, and a physical store whose answers go wrong."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager

from consul_backend.chunks import read_value
from consul_backend.clock import SystemClock
from consul_backend.embedded import EmbeddedStore
from consul_backend.errors import Conflict, OutcomeUnknown
from consul_backend.keys import decode_path
from consul_backend.large_batch import Replay
from consul_backend.limits import Limits
from consul_backend.merkle import Forest, entry_digest
from consul_backend.physical import EPOCH_KEY, LOCK_KEY, Item, PhysicalStore, TxnResult
from consul_backend.read_lease import ReadLease
from consul_backend.replicated import ReplicatedStore, StoreOptions, genesis
from consul_backend.tenure import Tenure
from consul_backend.txn import Cas, Lock, Op, Unlock
from consul_backend.wal import CorruptRecord, Record, Write
from consul_backend.wal_reader import list_segment, list_segments, scan_records

GENERATION = "g1"
PARTITION = "0b8f2c1e"
OPTIONS = StoreOptions(segment_records=8, resolve_timeout_s=0.4, flush_interval_s=0.01, collect_interval_s=0.01)


def committed_writes(records: Iterable[Record]) -> Iterator[tuple[Record, list[Write]]]:
    """Each record with the entries that it made true."""
    replay = Replay()
    for record in records:
        yield record, replay.feed(record)


def key(path: str, cls: str = "r") -> str:
    """A logical key of the partition that tests use."""
    return f"{cls}/{PARTITION}/{path}"


class FaultyStore:
    """A physical store in front of another one. ``fault`` sees each transaction and may replace its fate."""

    def __init__(self, inner: PhysicalStore) -> None:
        self.inner = inner
        self.fault: Callable[[Sequence[Op]], str | Exception | None] = lambda ops: None
        self.txns: list[tuple[Op, ...]] = []
        self.late: list[Sequence[Op]] = []
        self.read_fault: Exception | None = None
        self.applied = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def limits(self) -> Limits:
        return self.inner.limits

    async def get(self, key: str, *, consistent: bool = False) -> Item | None:
        if self.read_fault is not None:
            raise self.read_fault
        return await self.inner.get(key, consistent=consistent)

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        """Fates: an exception instead of applying; ``lose-before``: not applied; ``lose-after``: applied; ``late``:
        applied when :meth:`land` is called; all three answer OutcomeUnknown. ``twice``: applied, and again by a
        duplicate."""
        self.txns.append(tuple(ops))
        fate = self.fault(ops)
        if isinstance(fate, Exception):
            raise fate
        if fate == "lose-before":
            raise OutcomeUnknown("lost")
        if fate == "late":
            self.late.append(ops)
            raise OutcomeUnknown("lost")
        await self.gate.wait()
        result = await self.inner.txn(ops)
        self.applied.set()
        if fate == "twice":
            self.late.append(ops)
            await self.land()
        if fate == "lose-after":
            raise OutcomeUnknown("lost")
        return result

    async def land(self) -> list[bool]:
        """Deliver what is late; whether each was applied."""
        landed = []
        late, self.late = self.late, []
        for ops in late:
            try:
                await self.inner.txn(ops)
            except Conflict:
                landed.append(False)
            else:
                landed.append(True)
        return landed

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


class Cluster:
    """One physical store and the tenures on it, each with a session of its own."""

    def __init__(self, physical: PhysicalStore) -> None:
        self.inner = physical
        self.physical = FaultyStore(physical)
        self.clock = SystemClock()
        self.tenure: Tenure | None = None
        self._ids = itertools.count(1)

    async def genesis(self, *writes: Write) -> None:
        """Begin the generation."""
        await genesis(
            self.inner,
            GENERATION,
            writes or [Write(key("seal", "c"), b"seal")],
            node_id="node",
            time_ms=self.clock.time_ms(),
            random_bytes=os.urandom,
        )

    async def lead(self) -> tuple[Tenure, ReadLease]:
        """End the tenure that is and begin another."""
        if self.tenure is not None:
            await self.depose()
        session = await self.inner.create_session("test", beat_ttl_s=3600, lock_delay_s=0)
        found = await self.inner.get(EPOCH_KEY)
        number = int(found.value) + 1 if found else 1
        index = found.modify_index if found else 0
        result = await self.inner.txn([Lock(LOCK_KEY, b"", session), Cas(EPOCH_KEY, b"%d" % number, index)])
        tenure = Tenure(number, f"node-{number}", session, result.modify_index)
        self.tenure = tenure

        async def renew() -> bool:
            item = await self.inner.get(LOCK_KEY)
            return item is not None and item.session == session

        return tenure, ReadLease(self.clock, 10.0, renew)

    async def depose(self) -> None:
        """Take the lock away from the current tenure."""
        assert self.tenure is not None
        await self.inner.txn([Unlock(LOCK_KEY, b"", self.tenure.session)])
        await self.inner.destroy_session(self.tenure.session)
        self.tenure = None

    async def recover(self, options: StoreOptions = OPTIONS) -> ReplicatedStore:
        """A new tenure's store, not running."""
        tenure, lease = await self.lead()
        return await ReplicatedStore.recover(self.physical, GENERATION, tenure, options, clock=self.clock, lease=lease)

    @asynccontextmanager
    async def running(self, options: StoreOptions = OPTIONS) -> AsyncIterator[ReplicatedStore]:
        """A new tenure's store, running. Its task must still be alive at the end."""
        store = await self.recover(options)
        async with ran(store):
            yield store

    # -- checkers

    async def records(self) -> list[Record]:
        """The stored log, proved dense and chained."""
        while True:
            indexes = await self._indexes()
            found: list[Record] = []
            try:
                async for piece in scan_records(
                    self.inner, GENERATION, indexes[0], indexes[-1], OPTIONS.segment_records
                ):
                    found += [record for record, _ in piece]
            except CorruptRecord:
                if (await self._indexes())[0] == indexes[0]:
                    raise
                continue  # old segments were collected meanwhile
            assert indexes == list(range(indexes[0], indexes[-1] + 1)), "the log has a hole"
            return found

    async def _indexes(self) -> list[int]:
        return [
            index
            for segment in await list_segments(self.inner, GENERATION)
            for index in await list_segment(self.inner, GENERATION, segment, OPTIONS.segment_records)
        ]

    async def data(self) -> dict[str, bytes]:
        """Every stored entry by logical key."""
        found: dict[str, bytes] = {}

        async def walk(prefix: str) -> None:
            for name in await self.inner.list(prefix):
                if name.endswith("/"):
                    await walk(prefix + name)
                    continue
                item = await self.inner.get(prefix + name)
                assert item is not None
                value = await read_value(self.inner, GENERATION, item.value, consistent=True)
                assert value is not None, "chunks are missing"
                found[decode_path((prefix + name).removeprefix(f"g/{GENERATION}/d/"))] = value

        await walk(f"g/{GENERATION}/d/")
        return found

    async def check(self, store: ReplicatedStore, *, whole_log: bool = True) -> None:
        """Data = fold of the log; index = recomputed from data. No large batch may be in progress."""
        data = await self.data()
        forest = Forest()
        forest.apply((name, entry_digest(name, value)) for name, value in data.items())
        for cls in "rlc":
            assert store.forest.root(cls) == forest.root(cls), f"the index of class {cls} is not that of the data"
            assert {name: store.forest.count(cls, name) for name in store.forest.names(cls)} == {
                name: forest.count(cls, name) for name in forest.names(cls)
            }
        records = await self.records()
        assert records[-1].index == store.head.index
        assert records[-1].chain_hash == store.head.chain_hash
        if whole_log:
            folded: dict[str, bytes] = {}
            for _, writes in committed_writes(records):
                for write in writes:
                    if write.value is None:
                        folded.pop(write.key, None)
                    else:
                        folded[write.key] = write.value
            assert folded == data


@asynccontextmanager
async def ran(store: ReplicatedStore) -> AsyncIterator[ReplicatedStore]:
    """Run a store for the length of a block; what it raises meanwhile is raised here."""
    running = asyncio.create_task(store.run())
    try:
        yield store
        if running.done():
            running.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def memory_cluster(limits: Limits | None = None) -> AsyncIterator[Cluster]:
    """A cluster in memory, after its genesis."""
    physical = EmbeddedStore(None, limits=limits)
    await physical.open()
    try:
        cluster = Cluster(physical)
        await cluster.genesis()
        yield cluster
    finally:
        await physical.close()
