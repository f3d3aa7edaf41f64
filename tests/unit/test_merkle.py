"""The merkle forest against a dumb oracle, and its layout in extents against the forest."""

import random
import tracemalloc
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.checkpoint import Checkpoint, CheckpointLeaf, decode_checkpoint, encode_checkpoint
from consul_backend.errors import Corrupt
from consul_backend.merkle import Forest, bucket_of, entry_digest, pack_entries, unpack_entries
from consul_backend.merkle_pages import (
    EXTENT_BYTES_MAX,
    ExtentTable,
    decode_extent,
    encode_extent,
    extent_key,
    parse_extent_name,
    range_of,
)

PATHS = [f"p{number}" for number in range(40)] + ["é/ü", "a/b", "a", "x" * 300]
changes = st.lists(
    st.tuples(
        st.sampled_from("rlc"),
        st.sampled_from(["one", "two"]),
        st.sampled_from(PATHS),
        st.none() | st.binary(min_size=20, max_size=20),
    ),
    max_size=80,
)


def h(person, data):
    return blake2b(data, digest_size=20, person=person).digest()


def oracle_partition(entries):
    """From the definition, without any cleverness."""
    pages = {}
    for path, digest in entries.items():
        bucket = bucket_of(path)
        pages.setdefault(bucket >> 8, {}).setdefault(bucket & 255, []).append((path.encode(), digest))
    page_digests = {}
    for page, subpages in pages.items():
        total = b""
        for number in sorted(subpages):
            blob = b"".join(len(p).to_bytes(2, "big") + p + d for p, d in sorted(subpages[number]))
            total += bytes((number,)) + h(b"subpage", blob)
        page_digests[page] = h(b"page", total)
    return h(b"partition", b"".join(bytes((page,)) + page_digests[page] for page in sorted(page_digests)))


def oracle_root(state, pairs):
    total = b""
    for cls, partition in sorted(pairs):
        entries = {path: digest for (c, p, path), digest in state.items() if (c, p) == (cls, partition)}
        if entries:
            name = f"{cls}/{partition}".encode()
            total += len(name).to_bytes(2, "big") + name + oracle_partition(entries)
    return h(b"set", total)


@given(changes, st.sets(st.integers(0, 80), max_size=4))
def test_the_forest_is_what_the_definition_says(steps, looks):
    forest, state = Forest(), {}
    for at, (cls, partition, path, digest) in enumerate(steps):
        forest.apply([(f"{cls}/{partition}/{path}", digest)])
        if digest is None:
            state.pop((cls, partition, path), None)
        else:
            state[cls, partition, path] = digest
        if at in looks:  # digests computed in between must not go stale
            assert forest.root("r") == oracle_root(state, [("r", "one"), ("r", "two")])
    pairs = [(cls, partition) for cls in "rlc" for partition in ("one", "two")]
    for cls in "rlc":
        assert forest.root(cls) == oracle_root(state, [pair for pair in pairs if pair[0] == cls])
    assert forest.root_of(pairs) == oracle_root(state, pairs)
    for cls, partition in pairs:
        entries = {path: digest for (c, p, path), digest in state.items() if (c, p) == (cls, partition)}
        assert dict(forest.keys(cls, partition)) == entries
        assert forest.count(cls, partition) == len(entries)
        assert (partition in forest.partitions(cls)) == bool(entries), "an empty partition vanishes"
        found = [
            entry
            for page in forest.page_digests(cls, partition)
            for subpage in forest.subpage_digests(cls, partition, page)
            for entry in forest.entries(cls, partition, page, subpage)
        ]
        assert dict(found) == entries
    for cls, partition, path, _ in steps:
        assert forest.digest_of(f"{cls}/{partition}/{path}") == state.get((cls, partition, path))


@given(st.permutations([("a", b"1"), ("b", b"2"), ("c", b"3"), ("d", b"4")]))
def test_the_root_does_not_depend_on_the_order(entries):
    forest, other = Forest(), Forest()
    forest.apply([("r/p/gone", b"x" * 20), *((f"r/p/{path}", entry_digest(path, value)) for path, value in entries)])
    forest.apply([("r/p/gone", None)])
    other.apply((f"r/p/{path}", entry_digest(path, value)) for path, value in sorted(entries))
    assert forest.root("r") == other.root("r")


def test_the_entry_digest_binds_key_and_value():
    assert entry_digest("r/p/a", b"bc") != entry_digest("r/p/ab", b"c")
    big = b"v" * 5000
    framed = (5).to_bytes(4, "big") + b"r/p/a" + big
    assert entry_digest("r/p/a", big) == h(b"entry", framed), "big values are hashed without a copy, but the same"


def test_subpages_refuse_malformed_bytes():
    blob = pack_entries([("b", b"2" * 20), ("a", b"1" * 20)])
    assert list(unpack_entries(blob)) == [("a", b"1" * 20), ("b", b"2" * 20)]
    for bad in (blob[:-1], blob[23:] + blob[:23], blob + b"\0"):
        with pytest.raises(Corrupt):
            list(unpack_entries(bad))


def test_a_key_costs_at_most_150_bytes():
    count = 150_000
    forest = Forest()
    tracemalloc.start()
    for number in range(count):
        forest.change("r", "p", f"team/application/secret-{number:07d}", b"d" * 20)
    forest.root("r")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / count < 150


def test_a_path_too_long_for_its_frame_is_refused():
    with pytest.raises(ValueError, match="65536 bytes"):
        Forest().change("r", "p", "x" * 65536, b"d" * 20)


# -- extents


class Disk:
    """Applies flush plans and, like recovery, builds a forest from what is stored."""

    def __init__(self):
        self.blobs = {}

    def apply(self, plan):
        self.blobs |= plan.writes
        for name in plan.deletes:
            del self.blobs[name]

    def load(self, redo_from=1):
        table, extents = ExtentTable("g1"), []
        for name, raw in self.blobs.items():
            _, _, _, cls, partition, last = name.split("/")
            depth, start = parse_extent_name(last)
            extent = decode_extent(name, raw)
            table.add_stored(cls, partition, depth, start, extent)
            extents.append((depth, start, cls, partition, extent))
        forest = Forest()
        for depth, start, cls, partition, extent in sorted(extents, key=lambda found: found[0]):
            low, high = range_of(depth, start)
            for bucket in [bucket for bucket, _ in forest.blobs(cls, partition, low, high)]:
                forest.load_blob(cls, partition, bucket, b"")
            for bucket, blob in extent.subpages:
                forest.load_blob(cls, partition, bucket, blob)
        table.settle(redo_from)
        return forest, table


def write(forest, table, index, path, digest):
    table.mark("r", "p", forest.change("r", "p", path, digest), index)


def flush(forest, table, disk, index, extents_max=4):
    plan = table.plan(forest, index, extents_max=extents_max, ops_max=61, body_bytes_max=120_000)
    count, total = table.total_after(plan)
    disk.apply(plan)
    table.flushed(plan)
    assert (table.count, table.total) == (count, total)
    return plan


def flush_all(forest, table, disk, index):
    while table.dirty_count:
        flush(forest, table, disk, index)


@pytest.mark.parametrize("seed", range(4))
def test_extents_follow_a_growing_and_shrinking_partition(seed):
    rng = random.Random(seed)
    forest, table, disk = Forest(), ExtentTable("g1"), Disk()
    log = []
    for index in range(1, 60):
        for _ in range(rng.choice([5, 60, 400])):
            path = f"team/{rng.randrange(6000)}"
            digest = None if rng.random() < (0.1 if index < 40 else 0.9) else rng.randbytes(20)
            write(forest, table, index, path, digest)
            log.append((index, path, digest))
        for _ in range(rng.randrange(3)):
            flush(forest, table, disk, index)
        # A crash here: what is stored plus the log from the oldest dirty record is the forest.
        redo_from = min((leaf.first for leaf in table.dirty_leaves()), default=index + 1)
        found, again = disk.load(redo_from)
        assert (again.count, again.total) == (table.count, table.total)
        assert all(leaf.first >= redo_from for leaf in again.dirty_leaves()), "older records may be collected"
        for at, path, digest in log:
            if at >= redo_from and at > again.lsn_of("r", "p", bucket_of(path)):
                found.change("r", "p", path, digest)
        assert found.root("r") == forest.root("r")
        if rng.random() < 0.2:  # and sometimes go on from there, as after a takeover
            for at, path, _ in log:
                if at >= redo_from and at > again.lsn_of("r", "p", bucket_of(path)):
                    again.mark("r", "p", bucket_of(path), at)
            forest, table = found, again
    flush_all(forest, table, disk, 60)
    assert disk.load()[0].root("r") == forest.root("r")
    for path, _ in list(forest.keys("r", "p")):
        write(forest, table, 61, path, None)
    flush_all(forest, table, disk, 61)
    assert disk.blobs == {}, "an empty partition leaves no extent"
    assert table.count == 0
    assert table.total == bytes(16)


def test_a_split_deletes_the_old_extent_with_the_last_part():
    forest, table, disk = Forest(), ExtentTable("g1"), Disk()
    write(forest, table, 1, "first", b"1" * 20)
    flush_all(forest, table, disk, 1)
    whole = extent_key("g1", "r", "p", 0, 0)
    assert list(disk.blobs) == [whole]
    for number in range(8000):
        write(forest, table, 2, f"path-{number}", b"2" * 20)
    flush(forest, table, disk, 2, extents_max=3)
    assert whole in disk.blobs, "its range is not covered yet"
    flush_all(forest, table, disk, 2)
    assert whole not in disk.blobs
    assert len(disk.blobs) > 8
    assert max(map(len, disk.blobs.values())) < EXTENT_BYTES_MAX + 4096
    assert disk.load()[0].root("r") == forest.root("r")


def half_split(extents_max):
    """A stored partition that grew, with only its first leaves written since."""
    forest, table, disk = Forest(), ExtentTable("g1"), Disk()
    for number in range(50):
        write(forest, table, 1, f"old-{number}", b"1" * 20)
    flush_all(forest, table, disk, 1)
    for number in range(8000):
        write(forest, table, 5, f"path-{number}", b"2" * 20)
    flush(forest, table, disk, 5, extents_max)
    return forest, table, disk


def test_a_leaf_emptied_during_a_split_hides_the_old_extent_s_content():
    forest, table, disk = half_split(3)
    last = max(leaf.start for leaf in table.dirty_leaves())
    for path, _ in list(forest.keys("r", "p")):
        if bucket_of(path) >= last:
            write(forest, table, 6, path, None)
    table._layouts["r", "p"].dirty[last] = 0  # first in line
    flush(forest, table, disk, 6, extents_max=1)
    assert extent_key("g1", "r", "p", 0, 0) in disk.blobs
    found, _ = disk.load()
    assert [path for path, _ in found.keys("r", "p") if bucket_of(path) >= last] == []
    flush_all(forest, table, disk, 6)
    assert disk.load()[0].root("r") == forest.root("r")
    assert all(decode_extent(name, raw).subpages for name, raw in disk.blobs.items()), "no empty extent stays"


def test_a_split_ends_in_the_middle_of_a_plan():
    forest, table, disk = half_split(3)
    while table.dirty_count > 1:
        flush(forest, table, disk, 5, extents_max=1)
    write(forest, table, 6, "path-1", b"3" * 20)
    write(forest, table, 6, "path-2", b"3" * 20)
    plan = flush(forest, table, disk, 6, extents_max=9)
    assert plan.deletes == [extent_key("g1", "r", "p", 0, 0)]
    assert disk.load()[0].root("r") == forest.root("r")


def test_recovery_in_the_middle_of_a_split_finishes_it():
    forest, _, disk = half_split(3)
    found, again = disk.load(redo_from=5)
    assert min(leaf.first for leaf in again.dirty_leaves()) == 5
    for path, digest in forest.keys("r", "p"):
        write(found, again, 5, path, digest)
    flush_all(found, again, disk, 5)
    assert extent_key("g1", "r", "p", 0, 0) not in disk.blobs
    assert disk.load()[0].root("r") == forest.root("r")


def test_unwritten_leaves_are_dirty_after_recovery_even_without_changes():
    _, _, disk = half_split(3)
    found, again = disk.load(redo_from=9)
    flush_all(found, again, disk, 9)
    assert extent_key("g1", "r", "p", 0, 0) not in disk.blobs


def test_a_failed_flush_leaves_its_leaves_dirty_since_then():
    forest, table, disk = Forest(), ExtentTable("g1"), Disk()
    write(forest, table, 3, "a", b"1" * 20)
    plan = table.plan(forest, 3, extents_max=4, ops_max=61, body_bytes_max=10**6)
    write(forest, table, 4, "a", b"2" * 20)
    assert [leaf.first for leaf in table.dirty_leaves()] == [4]
    table.failed(plan)
    assert [leaf.first for leaf in table.dirty_leaves()] == [3]
    flush_all(forest, table, disk, 4)
    assert table.dirty_count == 0


@given(st.data())
def test_a_damaged_or_moved_extent_is_seen(data):
    name = extent_key("g1", "r", "p", 3, 0x2000)
    raw, _ = encode_extent(name, 9, [(0x2001, b"blob"), (0x2002, b"blob")])
    assert decode_extent(name, raw).lsn == 9
    at = data.draw(st.integers(0, len(raw) - 1))
    bad = raw[:at] + bytes((raw[at] ^ (1 << data.draw(st.integers(0, 7))),)) + raw[at + 1 :]
    with pytest.raises(Corrupt, match="merkle/r/p/03-0001"):
        decode_extent(name, bad)
    with pytest.raises(Corrupt):
        decode_extent(extent_key("g2", "r", "p", 3, 0x2000), raw)


@pytest.mark.parametrize("name", ["", "00", "0-0", "00-0000x", "17-0000", "03-0008", "-1-0000", "03-000g", "03-01"])
def test_foreign_extent_names_are_refused(name):
    with pytest.raises(Corrupt):
        parse_extent_name(name)


@given(st.data())
def test_a_damaged_checkpoint_is_seen(data):
    checkpoint = Checkpoint(
        serial=1,
        epoch=2,
        head_index=9,
        head_hash=b"h" * 32,
        positions={},
        dirty=(CheckpointLeaf("r", "p", 0, 0, 5),),
        extents=1,
        extents_sum=b"s" * 16,
        segment_bytes={0: 100},
    )
    raw = encode_checkpoint("g1", checkpoint)
    assert decode_checkpoint("g1", raw) == checkpoint
    assert checkpoint.redo_from == 5
    with pytest.raises(Corrupt):
        decode_checkpoint("g2", raw)
    at = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(Corrupt):
        decode_checkpoint("g1", raw[:at] + bytes((raw[at] ^ 1,)) + raw[at + 1 :])
