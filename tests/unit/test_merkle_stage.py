"""A batch's changes of the index, staged beside it, are the same as if they were made at once."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from consul_backend.batching import Prepared, Preparer
from consul_backend.digesting import compute_digests
from consul_backend.limits import Limits
from consul_backend.merkle import BUCKETS, Forest, bucket_of
from consul_backend.merkle_pages import ExtentTable
from consul_backend.merkle_stage import StagedChange
from consul_backend.replicated import StoreOptions
from consul_backend.wal import Write
from tests.support.store import key, memory_cluster
from tests.support.turns import watched_turns

Changes = dict[str, bytes | None]

names = st.sampled_from([f"{cls}/{partition}/k{n}" for cls in "rl" for partition in "ab" for n in range(12)])
values = st.one_of(st.none(), st.binary(max_size=3))
changes = st.dictionaries(names, values, max_size=30)


def prepared(writes: dict[str, bytes | None]) -> list[Prepared]:
    preparer = Preparer("g", Limits())
    return [preparer.prepare(Write(name, value)) for name, value in writes.items()]


def change(forest: Forest, table: ExtentTable, entries: list[Prepared], index: int) -> None:
    for entry in entries:
        table.mark(*entry.group, forest.change(*entry.group, entry.path, entry.digest), index)


def state(forest: Forest) -> object:
    return {
        (cls, name): (dict(forest.keys(cls, name)), forest.count(cls, name), forest.page_heads(cls, name))
        for cls in "rl"
        for name in forest.names(cls)
    }


@given(changes, changes, st.lists(changes, max_size=4), st.booleans())
def test_staged_is_as_if_changed_at_the_commit(
    before: dict[str, bytes | None],
    batch: dict[str, bytes | None],
    meanwhile: list[dict[str, bytes | None]],
    root: bool,
) -> None:
    forest, expected = Forest(), Forest()
    table, marked = ExtentTable("g"), ExtentTable("g")
    for one, its in ((forest, table), (expected, marked)):
        change(one, its, prepared(before), 1)
    if root:
        forest.root("r")
    staged = StagedChange(forest)
    entries = prepared(batch)
    steps = max(1, len(entries) // (len(meanwhile) + 1))
    index = 1
    rest = list(entries)
    for writes in meanwhile:
        for entry in rest[:steps]:
            staged.add(entry)
        rest = rest[steps:]
        index += 1
        others = prepared(writes)
        staged.follow(others)
        for one, its in ((forest, table), (expected, marked)):
            change(one, its, others, index)
    for entry in rest:
        staged.add(entry)
    list(staged.digest())
    staged.apply(table, index + 1)
    change(expected, marked, entries, index + 1)
    assert state(forest) == state(expected)
    assert (forest.root("r"), forest.root("l")) == (expected.root("r"), expected.root("l"))
    assert sorted(table.dirty_leaves(), key=str) == sorted(marked.dirty_leaves(), key=str)


@given(st.lists(st.integers(0, BUCKETS - 1), max_size=60), st.sets(st.integers(1, 200), max_size=20))
def test_marking_many_buckets_is_marking_each(buckets: list[int], splits: set[int]) -> None:
    one, other = ExtentTable("g"), ExtentTable("g")
    for table in (one, other):
        table.mark("r", "p", 0, 5)
        layout = table._layouts["r", "p"]
        layout.starts = [0, *(start * 256 for start in sorted(splits))]
        layout.depths = dict.fromkeys(layout.starts, 8)
    one.mark_all("r", "p", sorted(buckets), 9)
    for bucket in buckets:
        other.mark("r", "p", bucket, 9)
    assert set(one.dirty_leaves()) == set(other.dirty_leaves())


async def test_digests_are_computed_up_to_the_partitions_roots_and_cold_pages_are_left() -> None:
    forest, expected = Forest(), Forest()
    for one in (forest, expected):
        one.apply((f"{cls}/{name}/k{n}", bytes([n % 250]) * 20) for cls in "rl" for name in "ab" for n in range(500))
    forest.add_cold("r", "cold", 7, None, 3)
    await compute_digests(forest)
    assert forest.undigested() == [("r", "cold")]
    assert forest.partitions("l") == expected.partitions("l")
    assert forest.root_of([("r", "a"), ("r", "b")]) == expected.root("r")


def test_pages_without_digests_are_those_that_changed() -> None:
    forest = Forest()
    forest.apply((f"r/p/k{n}", bytes([n % 250]) * 20) for n in range(2000))
    assert forest.undigested() == [("r", "p")]
    assert len(forest.undigested_pages("r", "p")) == 256
    forest.root("r")
    assert forest.undigested() == []
    forest.change("r", "p", "k1", b"x" * 20)
    assert forest.undigested_pages("r", "p") == [bucket_of("k1") // 256]


async def test_a_batch_of_60_000_entries_holds_up_the_loop_neither_at_its_commit_nor_in_recovery() -> None:
    """Measured against the same changes made at once, in CPU time: how the machine is loaded does not decide."""
    quiet = StoreOptions(flush_interval_s=3600, collect_interval_s=3600)
    writes = {key(f"folder/{n}"): b"x" * 50 for n in range(60_000)}
    entries = prepared(dict(writes))
    forest, table = Forest(), ExtentTable("g")
    began_s = time.thread_time()
    change(forest, table, entries, 1)
    forest.root("r")
    at_once_s = time.thread_time() - began_s
    async with memory_cluster(Limits(ops_max=128)) as cluster:
        async with cluster.running(quiet) as store:
            async with watched_turns() as turns:
                await store.commit([Write(name, value) for name, value in writes.items()])
                store.forest.root("r")
            assert turns.longest_s < at_once_s / 3
            assert store.forest.root("r") == forest.root("r")
        async with watched_turns() as turns:
            again = await cluster.recover(quiet)
        assert turns.longest_s < at_once_s / 2
        assert again.forest.root("r") == forest.root("r")
