"""Pages of the forest that come and go one by one: loaded, cold, copied, adopted. Against plain dictionaries."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.errors import Corrupt
from consul_backend.merkle import (
    BUCKETS,
    DIGEST_BYTES,
    PATH_BYTES_MAX,
    SUBPAGES,
    Forest,
    bucket_of,
    count_entries,
    entry_digest,
    pack_entries,
    unpack_entries,
)

P = ("r", "p")


def digest(text):
    return hashlib.blake2b(str(text).encode(), digest_size=DIGEST_BYTES).digest()


def forest_of(count, start=0):
    forest = Forest()
    forest.apply((f"r/p/{n}", digest(n)) for n in range(start, start + count))
    return forest


def by_bucket(count):
    found = {}
    for n in range(count):
        found.setdefault(bucket_of(str(n)), []).append((str(n), digest(n)))
    return found


PATHS = by_bucket(3000)


@given(st.integers(0, BUCKETS), st.integers(0, BUCKETS))
def test_blobs_of_a_range_are_those_of_its_buckets(start, stop):
    forest = FULL
    expected = {bucket: pack_entries(entries) for bucket, entries in PATHS.items() if start <= bucket < stop}
    found = list(forest.blobs(*P, start, stop))
    assert found == sorted(expected.items())


FULL = forest_of(3000)


def test_blobs_at_the_edges_of_a_range():
    """Of few pages and of many: a bucket at the start belongs to it, one at the stop does not."""
    for forest, paths in ((FULL, PATHS), (forest_of(3), by_bucket(3))):
        for bucket in list(paths)[:40]:
            assert [one for one, _ in forest.blobs(*P, bucket, bucket + 1)] == [bucket]
            assert bucket not in dict(forest.blobs(*P, 0, bucket))
            assert bucket not in dict(forest.blobs(*P, bucket + 1, BUCKETS))
    assert list(Forest().blobs(*P, 0, BUCKETS)) == []


def test_names_are_those_of_the_class():
    forest = forest_of(3)
    forest.apply([("r/q/x", digest(1)), ("l/p/x", digest(2))])
    assert sorted(forest.names("r")) == ["p", "q"]
    assert (forest.names("l"), forest.names("c")) == (["p"], [])


def test_a_loaded_subpage_takes_the_place_of_what_the_bucket_held():
    forest = Forest()
    for bucket, entries in PATHS.items():
        forest.load_blob(*P, bucket, pack_entries(entries))
    assert forest.count(*P) == 3000
    assert forest.root("r") == FULL.root("r")
    bucket, entries = max(PATHS.items(), key=lambda item: (len(item[1]), item[0]))
    fewer = pack_entries(entries[:1])
    forest.load_blob(*P, bucket, fewer)
    assert forest.count(*P) == 3000 - len(entries) + 1
    assert dict(forest.blobs(*P, bucket, bucket + 1)) == {bucket: fewer}
    forest.load_blob(*P, bucket, b"")
    assert forest.count(*P) == 3000 - len(entries)
    assert dict(forest.blobs(*P, bucket, bucket + 1)) == {}
    only = Forest()
    only.load_blob(*P, 5, pack_entries([("x", digest(1))]))
    only.load_blob(*P, 5, b"")
    assert only.names("r") == []
    only.load_blob(*P, 5, b"")
    assert only.names("r") == []


def test_cold_pages_count_by_what_is_said_of_them():
    forest = forest_of(0)
    assert not forest.is_cold(*P, 3)
    assert not forest.cold_between(*P, 0, BUCKETS)
    forest.add_cold(*P, 3, digest("three"), 10)
    assert forest.count(*P) == 10
    forest.add_cold(*P, 3, digest("three"), 4)
    assert forest.count(*P) == 4
    forest.add_cold(*P, 5, None, 2)
    assert forest.count(*P) == 6
    assert [page for page in range(8) if forest.is_cold(*P, page)] == [3, 5]
    forest.load_blob(*P, 7 * SUBPAGES, pack_entries([("x", digest(1))]))
    assert not forest.is_cold(*P, 7)
    assert not forest.is_cold("r", "other", 3)
    assert forest.page_digest(*P, 3) == digest("three")
    assert forest.page_digest(*P, 4) is None
    assert forest.undigested_pages(*P) == [7]
    assert forest.undigested() == [P]


@pytest.mark.parametrize(
    ("start", "stop", "cold"),
    [
        (0, BUCKETS, True),
        (3 * SUBPAGES, 3 * SUBPAGES + 1, True),
        (3 * SUBPAGES + 255, 4 * SUBPAGES, True),
        (0, 3 * SUBPAGES, False),
        (0, 3 * SUBPAGES + 1, True),
        (4 * SUBPAGES, 5 * SUBPAGES, False),
        (4 * SUBPAGES, 5 * SUBPAGES + 1, True),
        (6 * SUBPAGES, BUCKETS, False),
    ],
)
def test_which_ranges_hold_a_cold_page(start, stop, cold):
    forest = Forest()
    forest.add_cold(*P, 3, digest("three"), 10)
    forest.add_cold(*P, 5, None, 2)
    forest.load_blob(*P, 7 * SUBPAGES, pack_entries([("x", digest(1))]))
    assert forest.cold_between(*P, start, stop) is cold


def test_a_page_is_copied_with_all_that_it_holds():
    source, copy = forest_of(3000), Forest()
    source.root("r")
    for page in range(SUBPAGES):
        copy.copy_page(source, *P, page)
        copy.copy_page(source, "r", "none", page)
    assert copy.names("r") == ["p"]
    assert copy.count(*P) == 3000
    assert copy.page_heads(*P) == source.page_heads(*P)
    assert copy.root("r") == source.root("r")
    copy.apply([("r/p/0", None)])
    assert source.digest_of("r/p/0") == digest(0), "it is a copy"
    assert copy.count(*P) == 2999
    assert copy.root("r") != source.root("r")


def test_a_page_is_adopted_in_place_of_another_and_an_empty_one_too():
    mine, theirs = forest_of(3000), forest_of(3000)
    page = bucket_of("7") // SUBPAGES
    held = mine.page_heads(*P)[page][1]
    theirs.apply([("r/p/7", digest("other"))])
    mine.root("r")
    mine.adopt(*P, page, theirs)
    assert mine.digest_of("r/p/7") == digest("other")
    assert mine.count(*P) == 3000
    assert mine.root("r") == theirs.root("r")
    mine.adopt(*P, page, Forest())
    assert mine.count(*P) == 3000 - held
    assert mine.page_digest(*P, page) is None
    assert mine.root("r") != theirs.root("r")
    alone = forest_of(1)
    alone.adopt(*P, bucket_of("0") // SUBPAGES, Forest())
    assert alone.names("r") == []
    alone.adopt(*P, bucket_of("0") // SUBPAGES, forest_of(1))
    assert alone.count(*P) == 1
    assert alone.root("r") == forest_of(1).root("r")


def test_a_page_with_the_same_digest_costs_no_other_digest():
    mine, theirs = forest_of(500), forest_of(500)
    mine.root("r")
    theirs.root("r")
    for page in theirs.page_digests(*P):
        mine.adopt(*P, page, theirs)
    assert mine.undigested() == []
    mine.apply([("r/p/x", digest("x"))])
    assert mine.undigested() == [P]
    assert mine.undigested_pages(*P) == [bucket_of("x") // SUBPAGES]
    assert mine.undigested_pages("r", "none") == []


def test_sizes_and_digests_of_pages():
    heads = FULL.page_heads(*P)
    assert sum(count for _, count in heads.values()) == 3000
    assert {page: one for page, (one, _) in heads.items()} == FULL.page_digests(*P)
    assert all(FULL.page_digest(*P, page) == one for page, (one, _) in heads.items())
    assert FULL.page_heads("r", "none") == {}
    assert FULL.page_digest("r", "none", 0) is None
    assert FULL.subpage_digests("r", "none", 0) == {}
    assert FULL.subpage_digests(*P, 300) == {}
    bucket = bucket_of("7")
    assert FULL.entries(*P, bucket // SUBPAGES, bucket % SUBPAGES) == sorted(PATHS[bucket])
    assert FULL.entries("r", "none", 0, 0) == []
    assert FULL.entries(*P, 300, 0) == []


def test_a_key_without_an_entry_has_no_digest():
    assert FULL.digest_of("r/p/7") == digest(7)
    for n in range(3000, 9000):
        assert FULL.digest_of(f"r/p/{n}") is None
    assert FULL.digest_of("r/none/7") is None


def test_the_longest_path_is_taken_and_one_longer_is_not():
    forest, longest = Forest(), "x" * PATH_BYTES_MAX
    forest.change(*P, longest, digest(1))
    assert forest.digest_of(f"r/p/{longest}") == digest(1)
    with pytest.raises(ValueError, match=r"."):
        forest.change(*P, longest + "x", digest(1))


def test_the_first_and_the_last_bucket_belong_to_a_partition():
    forest, entry = Forest(), pack_entries([("x", digest(1))])
    assert forest.cold_between(*P, 0, BUCKETS) is False
    assert forest.count(*P) == 0
    for bucket in (0, BUCKETS - 1):
        forest.load_blob(*P, bucket, entry)
    assert list(forest.keys(*P)) == [("x", digest(1))] * 2


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_paths_of_any_length_are_counted_and_read(size):
    entries = [("a" * size, digest(1)), ("b" * size, digest(2))]
    assert count_entries(pack_entries(entries)) == 2
    assert list(unpack_entries(pack_entries(entries))) == entries


def test_a_subpage_names_no_path_twice_and_all_in_order():
    one, two = pack_entries([("a", digest(1))]), pack_entries([("b", digest(2))])
    assert list(unpack_entries(one + two)) == [("a", digest(1)), ("b", digest(2))]
    assert count_entries(one + two) == 2
    for wrong in (one + one, two + one, one[:-1], one + b"\0", b"\0"):
        with pytest.raises(Corrupt):
            list(unpack_entries(wrong))
    for cut in (one[:-1], one + b"\0", b"\0", one + two[:2]):
        with pytest.raises(Corrupt):
            count_entries(cut)


def test_an_entry_s_digest_is_the_same_however_it_is_computed():
    for size in (0, 1, 2047, 2048, 2049, 5000):
        value = bytes(size)
        assert entry_digest("r/p/x", value) != entry_digest("r/p/y", value)
        assert entry_digest("r/p/x", value) == entry_digest("r/p/x", bytearray(value))
