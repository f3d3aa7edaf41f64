"""What the table says of extents that are known by name, before and after they were read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend import merkle_pages
from consul_backend.extents import CHECKSUM_BYTES, Extent
from consul_backend.limits import base64_bytes
from consul_backend.merkle import SUBPAGES, Forest, bucket_of
from consul_backend.merkle_pages import DirtyLeaf, ExtentTable, FlushPlan, extent_key

P = ("r", "p")


def extent(checksum, lsn=1):
    return Extent(lsn, ((0, b"x"),), checksum.to_bytes(CHECKSUM_BYTES, "big"))


def test_extents_above_others_are_splits_that_are_not_complete():
    table = ExtentTable("g1")
    assert table.add_names(*P, [(1, 0), (1, 0x8000)]) == []
    assert table.add_names("r", "q", [(0, 0), (1, 0)]) == [(0, 0)]
    assert sorted(table.add_names("r", "s", [(0, 0), (1, 0), (1, 0x8000), (2, 0)])) == [(0, 0), (1, 0)]


def test_number_and_sum_are_those_of_what_was_read():
    table = ExtentTable("g1")
    table.add_names(*P, [(1, 0), (1, 0x8000)])
    table.add_names("r", "q", [(0, 0)])
    table.set_loaded(*P, 1, 0, extent(2**128 - 1))
    table.set_loaded(*P, 1, 0x8000, extent(5))
    table.set_loaded("r", "q", 0, 0, extent(7))
    table.recount()
    assert table.count == 3
    assert table.total == (11).to_bytes(CHECKSUM_BYTES, "big")
    table.resume(9, (2**128 - 1).to_bytes(CHECKSUM_BYTES, "big"))
    assert (table.count, table.total) == (9, b"\xff" * CHECKSUM_BYTES)
    table.mark(*P, 5, 1)
    table.mark("r", "q", 5, 1)
    assert table.statistics() == {"index_dirty_extents": 2, "index_stored_extents": 9}


def test_pages_are_loaded_together_with_their_shallowest_extent():
    table = ExtentTable("g1")
    table.add_names(*P, [(1, 0), (2, 0x4000), (3, 0x8000), (8, 0xFF00)])
    assert table.unit_of(*P, 5) == (0, 128)
    assert table.unit_of(*P, 127) == (0, 128), "the shallowest one, also where there are deeper ones"
    assert table.unit_of(*P, 128) == (128, 160)
    assert table.unit_of(*P, 159) == (128, 160)
    assert table.unit_of(*P, 160) == (160, 161)
    assert table.unit_of(*P, 255) == (255, 256), "one page alone"
    assert table.unit_of("r", "none", 7) == (7, 8)


def test_what_is_stored_over_a_range_is_told_from_the_shallow_to_the_deep():
    table = ExtentTable("g1")
    table.add_names(*P, [(8, 0x0100), (1, 0), (3, 0x8000), (16, 0xFFFF)])
    assert table.stored_over(*P, 0, 1) == [(1, 0)]
    assert table.stored_over(*P, SUBPAGES, 2 * SUBPAGES) == [(1, 0), (8, 0x0100)]
    assert table.stored_over(*P, 0x8000, 0x8001) == [(3, 0x8000)]
    assert table.stored_over(*P, 0x7FFF, 0x8001) == [(1, 0), (3, 0x8000)]
    assert table.stored_over(*P, 0xA000, 0xFFFF) == []
    assert table.stored_over(*P, 0xFFFF, 0x10000) == [(16, 0xFFFF)]
    assert table.stored_over("r", "none", 0, 0x10000) == []


def test_checksums_are_known_of_what_is_stored_and_clean():
    table = ExtentTable("g1")
    table.add_names(*P, [(1, 0), (1, 0x8000)])
    table.set_loaded(*P, 1, 0, extent(3))
    table.set_loaded(*P, 1, 0x8000, extent(4))
    assert table.stored_checksum(*P, 1, 0) == (3).to_bytes(CHECKSUM_BYTES, "big")
    assert table.stored_checksum(*P, 2, 0) is None
    assert table.stored_checksum("r", "none", 1, 0) is None
    assert sorted(table.clean_leaves(*P)) == [(1, 0), (1, 0x8000)]
    table.mark(*P, 0x8001, 7)
    assert table.stored_checksum(*P, 1, 0x8000) is None, "about to be written anew"
    assert list(table.clean_leaves(*P)) == [(1, 0)]


def test_what_a_split_left_unwritten_is_dirty_since_the_record_after_the_old_extent():
    for redo_from, first in ((3, 8), (8, 8), (12, 12)):
        table = ExtentTable("g1")
        table.add_stored(*P, 0, 0, extent(1, lsn=7))
        table.add_stored(*P, 1, 0, extent(2, lsn=9))
        table.settle(redo_from)
        assert list(table.dirty_leaves()) == [DirtyLeaf(*P, 0x8000, 1, first)]
        assert table.lsn_of(*P, 0) == 9
        assert table.lsn_of(*P, 0x8000) == 7, "the old extent counts there"
        assert table.lsn_of("r", "none", 0) == 0
        table.mark("r", "new", 5, 13)
        assert table.lsn_of("r", "new", 5) == 0, "changed, but nothing is stored"


def add_stored(table, extents):
    for depth, start, found in extents:
        table.add_stored(*P, depth, start, found)
    table.settle(3)


def set_loaded(table, extents):
    table.add_names(*P, [(depth, start) for depth, start, _ in extents])
    for depth, start, found in extents:
        table.set_loaded(*P, depth, start, found)
    table.settle_partition(*P, 3)


@pytest.mark.parametrize("load", [add_stored, set_loaded])
@pytest.mark.parametrize("hides", [True, False])
def test_an_empty_leaf_goes_with_the_old_extent_that_it_hid(load, hides):
    table, forest = ExtentTable("g1"), Forest()
    left = Extent(9, () if hides else ((0, b"x"),), bytes(CHECKSUM_BYTES))
    load(table, [(0, 0, extent(1, lsn=7)), (1, 0, left)])
    assert list(table.dirty_leaves()) == [DirtyLeaf(*P, 0x8000, 1, 8)]
    plan = table.plan(forest, 10, extents_max=4, ops_max=9, body_bytes_max=10_000)
    assert plan.deletes == [extent_key("g1", *P, 0, 0)]
    table.flushed(plan)
    assert {leaf.start: leaf.first for leaf in table.dirty_leaves()} == {0x8000: 11, **({0: 11} if hides else {})}


def test_a_partition_that_has_nothing_stored_is_not_kept():
    table = ExtentTable("g1")
    for name, stored in ((P, [(0, 0)]), (("r", "q"), [])):
        table.add_names(*name, stored)
        table.settle_partition(*name, 1)
    assert table.names == [P]


def test_what_is_being_flushed_is_not_known_until_the_flush_is_over():
    table = ExtentTable("g1")
    set_loaded(table, [(2, 0, extent(3)), (2, 0x4000, extent(4))])
    table.recount()
    assert table.clean_leaves(*P) == [(2, 0), (2, 0x4000)], "the other half has nothing stored"
    table.mark(*P, 5, 12)
    plan = table.plan(Forest(), 12, extents_max=4, ops_max=9, body_bytes_max=10_000)
    assert plan.deletes == [extent_key("g1", *P, 2, 0)]
    assert table.clean_leaves(*P) == [(2, 0x4000)]
    assert table.stored_checksum(*P, 2, 0) is None
    assert table.stored_checksum(*P, 2, 0x4000) == (4).to_bytes(CHECKSUM_BYTES, "big")
    table.failed(plan)
    table.mark(*P, 0x4000, 13)
    table.flushed(table.plan(Forest(), 13, extents_max=4, ops_max=9, body_bytes_max=10_000))
    assert (table.names, table.count, table.total) == ([], 0, bytes(CHECKSUM_BYTES))


def test_whether_a_partition_keeps_extents_once_a_plan_is_applied():
    table, forest = ExtentTable("g1"), Forest()
    forest.change(*P, "path", b"d" * 20)
    set_loaded(table, [(0, 0, extent(3))])
    assert table.keeps_extents(FlushPlan(1), P), "the plan does not touch it"
    assert not table.keeps_extents(FlushPlan(1), ("r", "none"))
    table.mark(*P, 5, 12)
    table.mark("r", "new", 5, 12)
    limits = {"extents_max": 4, "ops_max": 9, "body_bytes_max": 10_000}
    emptied = table.plan(Forest(), 12, **limits)
    assert not table.keeps_extents(emptied, P)
    table.failed(emptied)
    written = table.plan(forest, 12, **limits)
    assert table.keeps_extents(written, P)
    assert not table.keeps_extents(written, ("r", "new")), "nothing was stored, and there is nothing to store"


@pytest.mark.parametrize(("page", "flushed"), [(0, 0x8000), (127, 0x8000), (128, 0), (255, 0)])
def test_a_leaf_with_a_damaged_page_is_not_flushed_the_others_are(page, flushed):
    table, forest = ExtentTable("g1"), Forest()
    forest.add_cold(*P, page, None, 1)
    set_loaded(table, [(1, 0, extent(3)), (1, 0x8000, extent(4))])
    table.mark_all(*P, [0, 0x8000], 5)
    plan = table.plan(forest, 5, extents_max=4, ops_max=9, body_bytes_max=10_000)
    assert [leaf.start for leaf in plan.leaves] == [flushed]


def quarters(*, emptied=False):
    """A table of four stored leaves, all of them dirty, and the forest they belong to."""
    table, forest = ExtentTable("g1"), Forest()
    set_loaded(table, [(2, n << 14, extent(n)) for n in range(4)])
    for number in range(0 if emptied else 50):
        forest.change(*P, f"path-{number}", b"d" * 20)
    table.mark_all(*P, [n << 14 for n in range(4)], 5)
    return table, forest


def json_bytes(plan):
    """What the operations are at least: keys, values, and a frame of 100 bytes each."""
    keys = sum(map(len, [*plan.writes, *plan.deletes]))
    return keys + sum(base64_bytes(len(blob)) for blob in plan.writes.values()) + 100 * plan.ops


@pytest.mark.parametrize("emptied", [True, False])
@pytest.mark.parametrize("ops_max", [1, 2, 3, 4, 5])
def test_a_plan_has_as_many_operations_as_it_may_have(emptied, ops_max):
    table, forest = quarters(emptied=emptied)
    plan = table.plan(forest, 6, extents_max=9, ops_max=ops_max, body_bytes_max=100_000)
    assert plan.ops == len(plan.leaves) == len(plan.deletes if emptied else plan.writes) == min(ops_max, 4)
    assert table.dirty_count == 4 - plan.ops
    assert plan.body_bytes >= json_bytes(plan)


@pytest.mark.parametrize(("ops_max", "ops"), [(1, 0), (2, 2)])
def test_the_end_of_a_split_keeps_an_operation_for_the_old_extent(ops_max, ops):
    table = ExtentTable("g1")
    set_loaded(table, [(0, 0, extent(1)), (1, 0, extent(2))])
    plan = table.plan(Forest(), 6, extents_max=9, ops_max=ops_max, body_bytes_max=100_000)
    assert plan.ops == ops
    assert table.dirty_count == (0 if ops else 1)
    if ops:
        assert plan.body_bytes >= json_bytes(plan)


def test_an_old_extent_goes_though_a_split_below_it_is_not_complete():
    table = ExtentTable("g1")
    set_loaded(table, [(0, 0, extent(1, lsn=4)), (1, 0, extent(2, lsn=6)), (2, 0, extent(3, lsn=8))])
    assert sorted(leaf.start for leaf in table.dirty_leaves()) == [0x4000, 0x8000]
    plan = table.plan(Forest(), 9, extents_max=1, ops_max=9, body_bytes_max=100_000)
    assert (list(plan.writes), plan.deletes) == ([extent_key("g1", *P, 1, 0x8000)], [extent_key("g1", *P, 0, 0)])


def test_a_plan_ends_with_the_first_leaf_that_does_not_fit():
    """Smaller ones that are younger wait for their turn."""
    table, forest = ExtentTable("g1"), Forest()
    set_loaded(table, [(2, n << 14, extent(n)) for n in range(3)])
    paths = [f"path-{number}" for number in range(200)]
    for quarter, count in enumerate((20, 30, 1)):
        for path in [path for path in paths if bucket_of(path) >> 14 == quarter][:count]:
            forest.change(*P, path, b"d" * 20)
        table.mark(*P, quarter << 14, 5 + quarter)
    first = table.plan(forest, 9, extents_max=1, ops_max=9, body_bytes_max=100_000)
    table.failed(first)
    plan = table.plan(forest, 9, extents_max=9, ops_max=9, body_bytes_max=first.body_bytes + 1000)
    assert list(plan.writes) == list(first.writes)
    assert table.dirty_count == 2


def test_a_plan_takes_as_many_bytes_as_it_may_and_one_extent_in_any_case():
    table, forest = quarters()
    whole = table.plan(forest, 6, extents_max=9, ops_max=9, body_bytes_max=100_000)
    for body_bytes_max, count in ((whole.body_bytes, 4), (whole.body_bytes - 1, 3), (1, 1)):
        table, forest = quarters()
        plan = table.plan(forest, 6, extents_max=9, ops_max=9, body_bytes_max=body_bytes_max)
        assert len(plan.writes) == count


@pytest.mark.parametrize("extents_max", [1, 2, 3])
def test_a_leaf_that_is_split_does_not_exceed_the_extents_of_a_plan(extents_max, monkeypatch):
    monkeypatch.setattr(merkle_pages, "EXTENT_BYTES_MAX", 300)
    table, forest = ExtentTable("g1"), Forest()
    for number in range(200):
        table.mark(*P, forest.change(*P, f"path-{number}", b"d" * 20), 5)
    plan = table.plan(forest, 6, extents_max=extents_max, ops_max=9, body_bytes_max=100_000)
    assert len(plan.leaves) == extents_max


def test_a_plan_counts_writes_and_deletes_as_operations():
    assert FlushPlan(1, writes={"a": b""}, deletes=["b", "c"]).ops == 3


@given(
    st.sets(st.sampled_from([(2, n << 14) for n in range(4)] + [(8, n << 8) for n in range(64)])),
    st.lists(st.tuples(st.lists(st.integers(0, 0xFFFF), max_size=6), st.integers(1, 9)), max_size=4),
)
def test_marking_many_buckets_is_marking_each(stored, marked):
    each, many = ExtentTable("g1"), ExtentTable("g1")
    for table in (each, many):
        table.add_names(*P, sorted(stored))
    for buckets, index in marked:
        for bucket in buckets:
            each.mark(*P, bucket, index)
        many.mark_all(*P, sorted(buckets), index)
    assert set(many.dirty_leaves()) == set(each.dirty_leaves())
    assert many.dirty_count == each.dirty_count == len(list(each.dirty_leaves()))
