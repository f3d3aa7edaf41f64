"""The replicated store on a real Consul: what the in-memory store promises holds there too."""

import asyncio
import os

import pytest

from consul_backend.batching import NeedsParts
from consul_backend.errors import ForeignWrite, NotApplied, StoreWentBack
from consul_backend.limits import Limits
from consul_backend.replicated import StoreOptions, drop_generation, physical_key
from consul_backend.txn import Cas, Delete, Set
from consul_backend.wal import Write, record_key
from tests.support.store import GENERATION, PARTITION, Cluster, key

OPTIONS = StoreOptions(segment_records=8, wal_keep_records=16, flush_interval_s=0.05, collect_interval_s=0.05)
STILL = StoreOptions(segment_records=8, flush_interval_s=3600, collect_interval_s=3600, cache_bytes_max=0)


@pytest.fixture
async def cluster(consul_store_factory):
    made = Cluster(await consul_store_factory())
    await made.genesis()
    yield made
    if made.tenure is not None:
        await made.inner.destroy_session(made.tenure.session)


async def test_commits_flushes_collections_and_takeovers(cluster):
    for life in range(3):
        async with cluster.running(OPTIONS) as store:
            batches = [
                [Write(key(f"k {n % 50}"), b"%d-%d" % (life, n)), Write(key(f"t{n}", "l"), b"")] for n in range(300)
            ]
            await asyncio.gather(*[store.commit(batch) for batch in batches])
            assert await store.get(key("k 49")) == b"%d-299" % life
            await cluster.check(store, whole_log=False)
    assert store.oldest_index > 1
    assert store.statistics()["index_stored_extents"] > 0


async def test_the_fence_and_the_chain_are_consul_s(cluster):
    store = await cluster.recover(STILL)
    await cluster.depose()
    running = asyncio.create_task(store.run())
    with pytest.raises(NotApplied):
        await store.commit([Write(key("a"), b"1")])
    with pytest.raises(BaseExceptionGroup):
        await running
    store = await cluster.recover(STILL)
    newest = record_key(GENERATION, store.head.index, 8)
    item = await cluster.inner.get(newest)
    await cluster.inner.txn([Delete(newest)])
    await cluster.inner.txn([Cas(newest, item.value, 0)])
    running = asyncio.create_task(store.run())
    with pytest.raises(NotApplied):
        await store.commit([Write(key("a"), b"1")])
    with pytest.raises(BaseExceptionGroup) as ended:
        await running
    assert ended.value.subgroup(StoreWentBack) is not None


@pytest.mark.parametrize("fate", ["lose-after", "lose-before", "twice"])
async def test_lost_answers_are_resolved(cluster, fate):
    async with cluster.running(STILL) as store:
        fates = iter([fate, None, fate, None])
        cluster.physical.fault = lambda ops: next(fates, None)
        for number in range(4):
            await store.commit([Write(key("a"), b"%d" % number)])
        await cluster.check(store)


async def passes(store, size):
    try:
        await store._group_commit.commit([Write(key("big"), b"v" * size)], None)
    except NeedsParts:
        return False
    return True


async def test_what_passes_our_check_passes_consul_s(cluster):
    """Up to the last byte: a batch that our arithmetic lets through is never answered with 413."""
    async with cluster.running(STILL) as store:
        low, high = 100_000, 300_000
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if await passes(store, middle) else (low, middle)
        assert 190_000 < low < 200_000
        assert await store.get(key("big")) == b"v" * low
        many = cluster.inner.limits.ops_max - 3
        await store.commit([Write(key(f"{n}"), b"v" * 1000) for n in range(many)])
        with pytest.raises(NeedsParts):
            await store._group_commit.commit([Write(key(f"{n}"), b"") for n in range(many + 1)], None)
        assert store.statistics()["commit_narrowed"] == 0
        await cluster.check(store)


async def test_foreign_values_and_dropping(cluster):
    async with cluster.running(STILL) as store:
        await store.commit([Write(key("a b"), b"1")])
        await cluster.inner.txn([Set(physical_key(GENERATION, key("a b")), b"2")])
        with pytest.raises(ForeignWrite):
            await store.get(key("a b"))
    await drop_generation(cluster.inner, GENERATION, cluster.tenure)
    assert await cluster.inner.list("g/") == []


async def test_large_batches_and_values_on_consul(cluster):
    """5 MB in one value, 20,000 entries in one batch, and small writes that go on meanwhile."""
    big = os.urandom(5_000_000)
    async with cluster.running(STILL) as store:
        await store.commit([Write(key("big"), big), Write(key("beside"), b"1")])
        assert await store.get(key("big")) == big
        await store.rolled()
        assert await store.get(key("big")) == big
        large = asyncio.create_task(store.commit([Write(key(f"many/{n}"), b"%d" % n) for n in range(20_000)]))
        small = 0
        while not large.done():
            await store.commit([Write(key("small", "l"), b"%d" % small)])
            small += 1
        await large
        assert small > 3
        assert len(await store.list(f"r/{PARTITION}/many/")) == 20_000
        assert await store.get(key("many/19999")) == b"19999"
    again = await cluster.recover(STILL)
    assert again.statistics()["large_overlay_entries"] == 0
    assert len(await again.list(f"r/{PARTITION}/many/")) == 20_000
    assert await again.get(key("many/12345")) == b"12345"
    assert await again.get(key("big")) == big
    assert [await again.get(key(name)) for name in ("beside", "many/0")] == [b"1", b"0"]


async def test_limits_are_learnt_from_consul_s_refusal(cluster):
    """Sized for a newer Consul than answers: the refusal teaches the real limit, and no write fails of it."""
    limits = cluster.inner.limits
    cluster.inner._probe.limits = Limits(ops_max=2 * limits.ops_max, prefix_bytes=limits.prefix_bytes)
    async with cluster.running(STILL) as store:
        await store.commit([Write(key(f"k{n}"), b"1") for n in range(cluster.inner.limits.ops_max - 3)])
        await store.rolled()
        assert cluster.inner.limits.ops_max == limits.ops_max
        assert store.statistics()["commit_relimited"] == 1
        await cluster.check(store)
