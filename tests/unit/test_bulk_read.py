"""Many values in few reads: the same answers as one by one, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random

import pytest

from consul_backend.errors import ForeignWrite
from consul_backend.replicated import StoreOptions, physical_key
from consul_backend.txn import Set
from consul_backend.wal import Write
from tests.support.store import GENERATION, key, memory_cluster

UNCACHED = StoreOptions(segment_records=8, flush_interval_s=3600, collect_interval_s=3600, cache_bytes_max=0)


@pytest.fixture
async def cluster():
    async with memory_cluster() as made:
        yield made


async def test_few_reads_and_nothing_kept(cluster):
    async with cluster.running(UNCACHED) as store:
        names = [key(f"{number}") for number in range(60)]
        await store.commit([Write(name, name.encode()) for name in names])
        calls = []
        inner = cluster.inner.get_many

        async def counted(keys, **options):
            calls.append(len(keys))
            return await inner(keys, **options)

        store._physical = type("Counting", (), {"get_many": staticmethod(counted)})()
        wanted = [*names, key("nothing")]
        assert await store.get_many(wanted) == [*(name.encode() for name in names), None]
        assert calls == [60]
        assert len(store._cache) == 0


@pytest.mark.parametrize("seed", range(3))
async def test_values_written_while_they_are_read_are_the_old_or_the_new(cluster, seed):
    dice = random.Random(seed)
    async with cluster.running(UNCACHED) as store:
        names = [key(f"{number}") for number in range(10)]
        allowed = {name: {None} for name in names}

        async def write() -> None:
            for number in range(25):
                name = dice.choice(names)
                value = None if dice.random() < 0.2 else b"%d" % number
                allowed[name].add(value)
                await store.commit([Write(name, value)])

        writing = asyncio.create_task(write())
        while not writing.done():
            await asyncio.sleep(0)  # nothing here ever waits, and the writer wants its turn
            for name, value in zip(names, await store.get_many(names), strict=True):
                assert value in allowed[name]
        await writing
        assert await store.get_many(names) == [await store.get(name) for name in names]


async def test_large_and_foreign_values_are_left_to_the_one_by_one_way(cluster):
    async with cluster.running(UNCACHED) as store:
        big = random.Random(1).randbytes(700_000)
        await store.commit([Write(key("big"), big)])
        await store.commit([Write(key("small"), b"small")])
        assert await store.get_many([key("big"), key("small")]) == [big, b"small"]
        await cluster.inner.txn([Set(physical_key(GENERATION, key("small")), b"foreign")])
        with pytest.raises(ForeignWrite):
            await store.get_many([key("big"), key("small")])
