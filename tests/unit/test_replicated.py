"""What a replicated store offers its users: reads, lists, the log, retention, generations."""

import asyncio
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.errors import FenceLost, ForeignWrite
from consul_backend.physical import EPOCH_KEY
from consul_backend.replicated import StoreOptions, drop_generation, genesis, physical_key, read_entry
from consul_backend.retention import HARD_FACTOR, RetentionFacts, collectable, keep_from
from consul_backend.txn import Delete, Set
from consul_backend.value_cache import ValueCache
from consul_backend.wal import Record, Write
from consul_backend.wal_reader import RecordGone, RecordRing
from tests.support.store import GENERATION, OPTIONS, PARTITION, key, memory_cluster

QUIET = StoreOptions(segment_records=8, flush_interval_s=3600, collect_interval_s=3600)
NO_MEMORY = StoreOptions(
    segment_records=8,
    flush_interval_s=3600,
    collect_interval_s=3600,
    cache_bytes_max=0,
    ring_records_max=1,
)


@pytest.fixture
async def cluster():
    async with memory_cluster() as made:
        yield made


# -- reading


async def test_reads_see_what_was_committed_before(cluster):
    async with cluster.running(QUIET) as store:
        assert await store.get(key("a")) is None
        await store.commit([Write(key("a"), b"1"), Write(key("b"), b"2")])
        assert [await store.get(key(name)) for name in "abc"] == [b"1", b"2", None]
        await store.commit([Write(key("a"), None), Write(key("b"), b"")])
        assert [await store.get(key(name)) for name in "ab"] == [None, b""]


async def test_a_miss_is_read_from_the_store_and_kept(cluster):
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("a"), b"1")])
    again = await cluster.recover(QUIET)
    assert [await again.get(key("a")) for _ in range(3)] == [b"1"] * 3
    statistics = again.statistics()
    assert (statistics["cache_hits"], statistics["cache_misses"]) == (2, 1)


async def test_absence_needs_no_read(cluster):
    async with cluster.running(NO_MEMORY) as store:
        cluster.physical.read_fault = AssertionError("the index knows")
        assert await store.get(key("nothing")) is None


async def test_existence_needs_no_read(cluster):
    async with cluster.running(NO_MEMORY) as store:
        await store.commit([Write(key("a"), b"1"), Write(key("b"), b""), Write(key("c"), b"2")])
        await store.commit([Write(key("c"), None)])
        cluster.physical.read_fault = AssertionError("the index knows")
        assert [await store.exists(key(name)) for name in "abcd"] == [True, True, False, False]


async def test_existence_is_told_under_the_read_lease_only(cluster):
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("a"), b"1")])
        store._lease.lost()
        with pytest.raises(FenceLost):
            await store.exists(key("a"))


@pytest.mark.parametrize("op", [Set, Delete])
async def test_a_value_that_nobody_here_wrote_is_never_served(cluster, op):
    async with cluster.running(NO_MEMORY) as store:
        await store.commit([Write(key("a"), b"1")])
        where = physical_key(GENERATION, key("a"))
        await cluster.inner.txn([Set(where, b"foreign") if op is Set else Delete(where)])
        with pytest.raises(ForeignWrite) as raised:
            await store.get(key("a"))
        assert "foreign" not in str(raised.value)
        assert store.statistics()["foreign_writes"] == 1


async def test_a_read_that_races_a_commit_gets_the_old_or_the_new_value(cluster):
    """A value can be seen in the store before the index knows of it: that is no foreign write."""
    async with cluster.running(NO_MEMORY) as store:
        await store.commit([Write(key("hot"), b"0")])
        done = asyncio.Event()
        seen: list[int] = []

        async def read():
            while not done.is_set():
                seen.append(int(await store.get(key("hot"))))

        async def other():
            while not done.is_set():
                await store.commit([Write(key("cold"), os.urandom(4))])

        tasks = [asyncio.create_task(work()) for work in (read, read, other)]
        for number in range(1, 200):
            await store.commit([Write(key("hot"), b"%d" % number)])
            assert int(await store.get(key("hot"))) == number
        done.set()
        await asyncio.gather(*tasks)
        assert store.statistics()["foreign_writes"] == 0
        assert len(set(seen)) > 10


async def test_a_read_after_the_value_landed_but_before_its_answer_waits_for_it(cluster):
    async with cluster.running(NO_MEMORY) as store:
        await store.commit([Write(key("a"), b"old")])
        answered = asyncio.Event()
        landed = asyncio.Event()
        apply = cluster.physical.txn

        async def slow(ops):
            result = await apply(ops)
            landed.set()
            await answered.wait()
            return result

        cluster.physical.txn = slow
        commit = asyncio.create_task(store.commit([Write(key("a"), b"new")]))
        await landed.wait()
        read = asyncio.create_task(store.get(key("a")))
        listing = asyncio.create_task(store.list(f"r/{PARTITION}/"))
        await asyncio.wait([read, listing], timeout=0.05)
        assert not read.done()
        assert not listing.done()
        answered.set()
        await commit
        assert await read == b"new"
        assert await listing == ["a"]


async def test_a_successor_s_value_is_no_foreign_write(cluster):
    """Another node leads already and has written: this one must say that it no longer leads."""
    async with cluster.running(NO_MEMORY) as store:
        await store.commit([Write(key("a"), b"1")])
        get = cluster.physical.get

        async def late(where, *, consistent=False):
            if consistent:
                store._lease._proved_at = float("-inf")
                cluster.physical.get = get
                await cluster.depose()
            await cluster.inner.txn([Set(where, b"the successor's")])
            return await get(where, consistent=consistent)

        cluster.physical.get = late
        with pytest.raises(FenceLost):
            await store.get(key("a"))
        assert store.statistics()["foreign_writes"] == 0


async def test_nothing_is_served_after_the_session_ended(cluster):
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("a"), b"1")])
        store._lease._proved_at = float("-inf")
        await cluster.depose()
        with pytest.raises(FenceLost):
            await store.get(key("a"))
        with pytest.raises(FenceLost):
            await store.list(f"r/{PARTITION}/")


async def test_the_lease_is_tested_again_after_a_slow_read(cluster):
    async with cluster.running(NO_MEMORY) as store:
        await store.commit([Write(key("a"), b"1")])
        get = cluster.physical.get

        async def slow(where, *, consistent=False):
            item = await get(where, consistent=consistent)
            store._lease._proved_at = float("-inf")  # the lease ran out while the answer travelled
            await cluster.depose()
            return item

        cluster.physical.get = slow
        with pytest.raises(FenceLost):
            await store.get(key("a"))


@pytest.mark.parametrize("name", ["", "r", "r/p", "r/p/", "x/p/a"])
async def test_malformed_keys_are_refused(cluster, name):
    async with cluster.running(QUIET) as store:
        with pytest.raises(ValueError, match="not a logical key"):
            await store.get(name)
        with pytest.raises(ValueError, match="not a logical key"):
            await store.commit([Write(name, b"")])


# -- listing


async def test_list_is_one_level_decoded_and_sorted(cluster):
    names = ["b", "a", "a/x", "a/é ü", "a/x/deep", "Z", "é", "_", "a-b"]
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key(name), b"") for name in names])
        assert await store.list(f"r/{PARTITION}/") == sorted(["b", "a", "a/", "Z", "é", "_", "a-b"])
        assert await store.list(f"r/{PARTITION}/a/") == ["x", "x/", "é ü"]
        assert await store.list(f"r/{PARTITION}/a/x/") == ["deep"]
        assert await store.list(f"r/{PARTITION}/none/") == []
        assert await store.list("r/other/") == []
        assert await store.list(f"l/{PARTITION}/") == []


async def test_a_key_that_somebody_else_wrote_is_not_listed(cluster):
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("mine"), b"1")])
        await cluster.inner.txn([Set(physical_key(GENERATION, key("planted")), b"1")])
        assert await store.get(key("planted")) is None
        assert await store.list(f"r/{PARTITION}/") == ["mine"]


async def test_a_long_list_leaves_others_their_turn(cluster):
    names = [f"{number:05}" for number in range(5000)]
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key(name), b"") for name in names])
        assert await store.list(f"r/{PARTITION}/") == names


@pytest.mark.parametrize("prefix", ["", "r/", "r/p", "r/p/a", "x/p/", "r//"])
async def test_malformed_prefixes_are_refused(cluster, prefix):
    store = await cluster.recover(QUIET)
    with pytest.raises(ValueError, match="list prefix"):
        await store.list(prefix)


# -- the log


async def test_readers_are_woken_and_read_for_themselves(cluster):
    async with cluster.running(QUIET) as store:
        start = store.head.index
        waiting = [asyncio.create_task(store.wait_head(start + n)) for n in (0, 1)]
        await asyncio.sleep(0)
        first = await store.commit([Write(key("a"), b"1")])
        assert await waiting[0] == first == store.head
        assert not waiting[1].done()
        second = await store.commit([Write(key("a"), b"2")])
        assert await waiting[1] == second
        assert await store.wait_head(0) == second
        found = await store.records(start + 1, 10)
        assert [record.index for record in found] == [first.index, second.index]
        assert [record.writes() for record in found] == [[Write(key("a"), b"1")], [Write(key("a"), b"2")]]
        assert await store.records(second.index + 1, 10) == []


async def test_records_come_from_the_store_when_memory_has_them_no_more(cluster):
    async with cluster.running(NO_MEMORY) as store:
        for number in range(40):
            await store.commit([Write(key(f"{number}"), b"v" * 100)])
        found = await store.records(1, 100)
        assert [record.index for record in found] == list(range(1, store.head.index + 1))
        for before, after in itertools.pairwise(found):
            assert after.header.prev_hash == before.chain_hash
        assert [record.index for record in await store.records(5, 3)] == [5, 6, 7]
        assert 1 < len(await store.records(5, 100, bytes_max=1200)) < 10
        assert len(await store.records(5, 100, bytes_max=1)) == 1


async def test_collected_records_are_said_to_be_gone(cluster):
    options = StoreOptions(segment_records=8, wal_keep_records=8, flush_interval_s=3600, collect_interval_s=3600)
    async with cluster.running(options) as store:
        for number in range(40):
            await store.commit([Write(key(f"{number}"), b"")])
        await store.flush()
        assert await store.collect()
    again = await cluster.recover(options)
    assert again.oldest_index == store.oldest_index > 8
    with pytest.raises(RecordGone):
        await again.records(again.oldest_index - 1, 5)
    assert (await again.records(again.oldest_index, 5))[0].index == again.oldest_index


async def test_what_a_successor_collected_is_no_damage_to_a_deposed_node(cluster):
    options = StoreOptions(
        segment_records=8, wal_keep_records=8, ring_records_max=1, flush_interval_s=3600, collect_interval_s=3600
    )
    async with cluster.running(options) as old:
        for number in range(40):
            await old.commit([Write(key(f"{number}"), b"")])
    async with cluster.running(options) as store:
        await store.flush()
        assert await store.collect()
    with pytest.raises(FenceLost):
        await old.records(2, 5)


async def test_a_log_bounded_by_bytes_only(cluster):
    options = StoreOptions(segment_records=8, wal_keep_bytes=9_000, flush_interval_s=3600, collect_interval_s=3600)
    async with cluster.running(options) as store:
        for number in range(60):
            await store.commit([Write(key(f"{number}"), b"v" * 500)])
        await store.flush()
        await store.collect()
        assert store.statistics()["wal_bytes"] < 9_000 + 8 * 800
    again = await cluster.recover(options)
    assert again.statistics()["wal_bytes"] == pytest.approx(store.statistics()["wal_bytes"], abs=400)


async def test_the_background_work_flushes_and_collects(cluster):
    options = StoreOptions(
        segment_records=8, wal_keep_records=8, flush_interval_s=0.005, collect_interval_s=0.005, flush_extents_per_s=1e6
    )
    async with cluster.running(options) as store:
        for number in range(60):
            await store.commit([Write(key(f"{number % 9}"), b"%d" % number)])
        async with asyncio.timeout(120):
            while store.statistics()["index_dirty_extents"] or store.oldest_index < store.head.index - 16:
                cluster.physical.applied.clear()
                await cluster.physical.applied.wait()
        await cluster.check(store, whole_log=False)
    again = await cluster.recover(OPTIONS)
    assert again.statistics()["recovery_records_redone"] <= 1
    await cluster.check(again, whole_log=False)


def record(index, size=10):
    return Record.build(
        index=index,
        prev_hash=b"p" * 32,
        epoch=1,
        writer="n",
        batch_id=b"b" * 16,
        time_ms=0,
        kind="data",
        positions={},
        groups={("r", "p"): [("a", b"v" * size)]},
    )


def test_the_ring_is_bounded_and_dense():
    ring = RecordRing(4, 10_000)
    for index in range(5, 20):
        ring.append(record(index))
    assert [found.index for found in ring.read(16, 9, 10**6)] == [16, 17, 18, 19]
    assert ring.read(15, 9, 10**6) == []
    assert [found.index for found in ring.read(18, 1, 10**6)] == [18]
    assert ring.read(20, 9, 10**6) == []
    ring.append(record(20, 9_900))
    assert len(ring) == 1, "bytes count too, but the newest stays"


def test_the_cache_is_bounded_and_drops_the_longest_unused():
    cache = ValueCache(3 * 302)
    for name in "abc":
        cache.put(name, b"v" * 100)
    assert cache.get("a")
    cache.put("d", b"v" * 100)
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, True]
    cache.put("a", None)
    assert cache.get("a") is None
    cache.put("big", b"v" * 1000)
    assert (len(cache), cache.size_bytes) == (0, 0)


# -- retention


facts = st.builds(
    RetentionFacts,
    oldest=st.integers(0, 30).map(lambda n: max(1, n * 8)),
    head=st.integers(240, 600),
    redo_from=st.integers(200, 601),
    keep_records=st.integers(1, 300),
    keep_bytes=st.integers(0, 5000),
    segment_records=st.just(8),
    sizes=st.dictionaries(st.integers(0, 75), st.integers(0, 500)),
    holds=st.dictionaries(st.sampled_from("ab"), st.integers(1, 600)),
)


@given(facts)
def test_nothing_needed_is_ever_collected(found):
    doomed = collectable(found)
    last = max((segment * 8 + 7 for segment in doomed), default=-1)
    assert last < found.head
    assert last < found.redo_from
    assert last < keep_from(found)
    assert doomed == list(range(found.oldest // 8, found.oldest // 8 + len(doomed))), "oldest first, no hole"
    for index in found.holds.values():
        within_hard_count = index > found.head - HARD_FACTOR * found.keep_records
        total = sum(size for segment, size in found.sizes.items() if segment >= index // 8)
        if within_hard_count and total <= HARD_FACTOR * found.keep_bytes:
            assert last < index, "held within the hard bound"


# -- generations


async def test_a_dropped_generation_is_gone_and_its_neighbour_is_not(cluster):
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("a"), b"1"), Write(key("b", "l"), b"1")])
        await store.flush()
    tenure, _ = await cluster.lead()
    await genesis(cluster.inner, "g10", [Write(key("a"), b"1")], node_id="n", time_ms=1, random_bytes=os.urandom)
    cluster.physical.fault = lambda ops: "lose-after" if len(cluster.physical.txns) % 2 else None
    await drop_generation(cluster.physical, GENERATION, tenure)
    assert await cluster.inner.list("g/") == ["g10/"]
    assert await read_entry(cluster.inner, "g10", key("a")) == b"1"
    await drop_generation(cluster.physical, GENERATION, tenure)


async def test_only_the_leader_drops_a_generation(cluster):
    tenure, _ = await cluster.lead()
    await cluster.inner.txn([Set(EPOCH_KEY, b"99")])
    with pytest.raises(FenceLost):
        await drop_generation(cluster.inner, GENERATION, tenure)
    assert await cluster.inner.list("g/") == [f"{GENERATION}/"]


async def test_statistics_are_numbers(cluster):
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("a"), b"1")])
        statistics = store.statistics()
        assert all(type(value) in (int, float) for value in statistics.values())
        assert statistics["commit_batches"] == 1
        assert statistics["wal_head_index"] == store.head.index
