"""A big index is loaded while it is in use: same answers, same roots, and damage found page by page."""

import asyncio
import random
from dataclasses import replace

import pytest

from consul_backend.checkpoint import checkpoint_key
from consul_backend.errors import FenceLost, IndexDamaged, NotApplied, NotLoaded, Unavailable
from consul_backend.failpoint import disarm
from consul_backend.heads import Heads, decode_heads, encode_heads, heads_key, heads_prefix
from consul_backend.merkle import SUBPAGES, Forest, bucket_of
from consul_backend.merkle_pages import merkle_prefix
from consul_backend.replicated import StoreOptions
from consul_backend.txn import CheckIndex, CheckSession, Delete, DeleteTree, Set
from consul_backend.wal import Write
from tests.support.store import GENERATION, PARTITION, key, memory_cluster, ran

EAGER = StoreOptions(segment_records=64, flush_interval_s=3600, collect_interval_s=3600)
LAZY = StoreOptions(segment_records=64, flush_interval_s=3600, collect_interval_s=3600, index_eager_keys=0)


@pytest.fixture
async def cluster(monkeypatch):
    monkeypatch.setattr("tests.support.store.OPTIONS", EAGER)
    async with memory_cluster() as made:
        yield made
    disarm()


async def fill(cluster, commits, *, tail=0, seed=1):
    """A stored index of ``commits`` times 60 keys, then ``tail`` commits that only the log has. Returns the data."""
    rng = random.Random(seed)
    data = {}
    async with cluster.running(EAGER) as store:
        for number in range(commits + tail):
            writes = [Write(key(f"folder-{number}/name-{n}-{'x' * 30}"), rng.randbytes(8)) for n in range(60)]
            if number >= commits:
                known = sorted(data)
                writes = [Write(rng.choice(known), None if rng.random() < 0.3 else b"later") for _ in range(5)]
                writes.append(Write(key(f"new-{number}"), b"new"))
                writes.append(Write(key(f"{number}", "l"), b"local"))
            await store.commit(writes)
            for write in writes:
                data[write.key] = write.value
            if number == commits - 1:
                await store.flush()
    return {name: value for name, value in data.items() if value is not None}


async def loaded_check(cluster, store):
    await store.load_index()
    assert not store.statistics()["index_cold_pages"]
    await cluster.check(store)


@pytest.mark.parametrize("commits", [1, 12, 90])
async def test_a_lazily_recovered_store_answers_as_an_eager_one(cluster, commits):
    data = await fill(cluster, commits, tail=20)
    store = await cluster.recover(LAZY)
    assert store.statistics()["index_cold_pages"]
    for name in random.Random(2).sample(sorted(data), 40):
        assert await store.exists(name)
        assert await store.get(name) == data[name]
    assert await store.get(key("nothing/here")) is None
    assert not await store.exists(key("nothing/there"))
    await loaded_check(cluster, store)


async def test_an_index_of_just_so_many_entries_is_read_whole(cluster):
    data = await fill(cluster, 1)
    entries = len(data) + 1  # and the genesis'
    for eager, lazy in ((entries, False), (entries - 1, True)):
        store = await cluster.recover(replace(LAZY, index_eager_keys=eager))
        assert bool(store.statistics()["index_cold_pages"]) is lazy


async def test_roots_are_exact_as_soon_as_what_the_log_changed_is_loaded(cluster):
    await fill(cluster, 90, tail=3)
    eager = await cluster.recover(EAGER)
    root = eager.forest.root("r")
    store = await cluster.recover(LAZY)
    cold = store.statistics()["index_cold_pages"]
    with pytest.raises(NotLoaded):
        store.forest.root("r")
    await store._lazy.settle()
    assert store.forest.root("r") == root
    assert 0 < store.statistics()["index_cold_pages"] < cold


async def test_writing_to_a_cold_page_loads_it_and_a_flush_keeps_everything(cluster):
    data = await fill(cluster, 60, tail=4)
    store = await cluster.recover(LAZY)
    async with ran(store):
        await store.rooted()
        victim = sorted(data)[7]
        await store.commit([Write(victim, b"changed"), Write(key("brand-new"), b"1")])
        assert await store.get(victim) == b"changed"
    await store.flush()
    for options in (LAZY, EAGER):
        again = await cluster.recover(options)
        assert await again.get(victim) == b"changed"
        await loaded_check(cluster, again)
        assert again.statistics()["recovery_records_redone"] <= 2


async def test_warming_ends_and_leaves_nothing_to_wait_for(cluster):
    await fill(cluster, 30, tail=2)
    store = await cluster.recover(LAZY)
    await store._lazy.run(1.0)
    assert not store.statistics()["index_cold_pages"]
    await cluster.check(store)


@pytest.mark.parametrize("flushes", [1, 2, 5])
async def test_a_split_cut_short_is_finished_by_a_lazy_successor(cluster, flushes):
    async with cluster.running(EAGER) as store:
        await store.commit([Write(key(f"first-{n}"), b"1") for n in range(50)])
        await store.flush()
        for number in range(60):
            await store.commit([Write(key(f"team/application/{number}-{n}" + "x" * 40), b"") for n in range(60)])
        for _ in range(flushes):
            await store._flusher.flush()
    store = await cluster.recover(LAZY)
    await store.flush()
    await loaded_check(cluster, store)
    again = await cluster.recover(EAGER)
    await cluster.check(again)
    assert again.statistics()["recovery_records_redone"] <= 1


@pytest.mark.parametrize("seed", range(6))
async def test_random_tenures_agree_with_the_data(cluster, seed):
    rng = random.Random(seed)
    names = [key(f"{n % 7}/{n}-{'y' * 60}", rng.choice("rlc")) for n in range(900)]
    for _ in range(8):
        store = await cluster.recover(rng.choice([LAZY, LAZY, EAGER]))
        async with ran(store):
            for _ in range(rng.randrange(30)):
                writes = {name: rng.randbytes(3) if rng.random() < 0.7 else None for name in rng.sample(names, 50)}
                await store.commit([Write(name, value) for name, value in writes.items()])
                if rng.random() < 0.2:
                    await store.rooted()
                    await store._flusher.flush()
        if rng.random() < 0.5:
            await store.flush()
    await loaded_check(cluster, await cluster.recover(LAZY))
    await cluster.check(await cluster.recover(EAGER))


async def test_a_partition_that_empties_leaves_neither_extents_nor_heads(cluster):
    data = await fill(cluster, 8)
    store = await cluster.recover(LAZY)
    async with ran(store):
        names = [name for name in data if name.startswith("r/")]
        for start in range(0, len(names), 50):
            await store.commit([Write(name, None) for name in names[start : start + 50]])
            if start == 100:
                await store.rooted()
                await store._flusher.flush()
    await store.flush()
    assert await cluster.inner.list(f"{merkle_prefix(GENERATION)}r/") == []
    assert await cluster.inner.list(f"{heads_prefix(GENERATION)}r/") == []
    await loaded_check(cluster, await cluster.recover(LAZY))


async def damage(cluster, ops):
    tenure, _ = await cluster.lead()
    guards = [CheckSession("lock", tenure.session), CheckIndex("epoch", tenure.epoch_index)]
    await cluster.inner.txn([*guards, *ops])


async def extent_keys(cluster):
    prefix = f"{merkle_prefix(GENERATION)}r/{PARTITION}/"
    return [prefix + name for name in await cluster.inner.list(prefix)]


@pytest.mark.parametrize("kind", ["flip", "missing", "older", "swapped"])
async def test_a_damaged_extent_is_refused_where_it_matters_and_nowhere_else(cluster, kind):
    data = await fill(cluster, 90)
    keys = await extent_keys(cluster)
    older = {name: (await cluster.inner.get(name)).value for name in keys}
    async with cluster.running(EAGER) as store:
        for name in list(data)[::7]:
            await store.commit([Write(name, b"newer")])
            data[name] = b"newer"
        await store.flush()
    where, other = keys[3], keys[4]
    raw = (await cluster.inner.get(where)).value
    swapped = (await cluster.inner.get(other)).value
    ops = {
        "flip": [Set(where, raw[:60] + bytes((raw[60] ^ 4,)) + raw[61:])],
        "missing": [Delete(where)],
        "older": [Set(where, older[where])],
        "swapped": [Set(where, swapped)],
    }[kind]
    await damage(cluster, ops)
    store = await cluster.recover(LAZY)
    refused = served = 0
    for name, value in data.items():
        try:
            assert await store.get(name) == value
            served += 1
        except IndexDamaged:
            refused += 1
    assert refused
    assert served > 2 * refused
    assert store.statistics()["index_damaged_pages"]
    async with ran(store):
        await store.rooted()
        good = next(name for name in data if not store._lazy.lacks("r", PARTITION, page_of(name)))
        await store.commit([Write(good, b"goes on")])
        assert await store.get(good) == b"goes on"
        await store._flusher.flush()


def page_of(name):
    return bucket_of(name.split("/", 2)[2]) // SUBPAGES


@pytest.mark.parametrize("kind", ["flip", "missing", "foreign", "no checkpoint"])
async def test_heads_that_are_not_the_checkpoint_s_cost_only_time(cluster, kind, caplog):
    await fill(cluster, 10, tail=2)
    where = heads_key(GENERATION, "r", PARTITION)
    raw = (await cluster.inner.get(where)).value
    ops = {
        "flip": [Set(where, raw[:30] + bytes((raw[30] ^ 4,)) + raw[31:])],
        "missing": [DeleteTree(heads_prefix(GENERATION))],
        "foreign": [Set(heads_key(GENERATION, "r", "other"), raw)],
        "no checkpoint": [Delete(checkpoint_key(GENERATION))],
    }[kind]
    await damage(cluster, ops)
    store = await cluster.recover(LAZY)
    assert ("will be read whole" in caplog.text) == (kind in {"flip", "foreign"}), "an operator must know"
    assert store.statistics()["index_cold_pages"] == 0, "it was read whole"
    await cluster.check(store)
    await store.flush()
    again = await cluster.recover(LAZY)
    assert again.statistics()["index_cold_pages"], "the heads were written anew"
    await loaded_check(cluster, again)


async def test_heads_that_were_there_before_the_first_flush_go_with_it(cluster):
    where = heads_key(GENERATION, "r", "other")
    await damage(cluster, [Set(where, b"junk")])
    store = await cluster.recover(LAZY)
    await store.flush()
    assert await cluster.inner.get(where) is None


async def test_a_store_that_cannot_be_read_for_a_while_is_asked_again(cluster):
    await fill(cluster, 30, tail=3)
    store = await cluster.recover(LAZY)
    many = cluster.inner.get_many
    failures = 2

    async def get_many(keys, *, consistent=False):
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise Unavailable("away")
        return await many(keys, consistent=consistent)

    cluster.physical.get_many = get_many
    async with ran(store):
        await asyncio.wait_for(store.rooted(), 120)
    assert failures < 0


async def test_a_deposed_node_does_not_take_its_successor_s_flush_for_damage(cluster):
    names = sorted(name for name in await fill(cluster, 30, tail=3) if name.startswith("r/"))
    old = await cluster.recover(LAZY)
    async with cluster.running(EAGER) as successor:
        for start in range(0, len(names), 50):
            await successor.commit([Write(name, b"newer") for name in names[start : start + 50]])
        await successor.flush()
    name = next(name for name in names if old._lazy.lacks("r", PARTITION, page_of(name)))
    with pytest.raises(NotApplied):
        await old.commit([Write(name, b"of a deposed node")])
    with pytest.raises(FenceLost):
        await old._lazy.need([name])
    assert not old._lazy.damaged


def test_heads_say_what_the_forest_is():
    forest = Forest()
    for number in range(300):
        forest.change("r", "p", f"k{number}", bytes(20))
    where = heads_key("g", "r", "p")
    raw, checksum = encode_heads(where, forest, "r", "p", 7)
    heads = decode_heads(where, raw)
    assert heads == Heads(7, forest.page_heads("r", "p"), checksum)
    assert heads.count == 300
