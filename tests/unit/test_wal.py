"""The record codec: round trips, and that damage of any kind is seen."""

from hashlib import blake2b

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.position import Position
from consul_backend.wal import (
    GENESIS_PREV,
    RECORD_VERSION,
    SEGMENT_RECORDS,
    CorruptRecord,
    Large,
    PartRef,
    Record,
    Write,
    digest32,
    record_key,
    segment_prefix,
)

paths = st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable())
groups = st.dictionaries(
    st.tuples(st.sampled_from("rlc"), st.sampled_from(["core", "a-b", "mount é"])),
    st.dictionaries(paths, st.none() | st.binary(max_size=40), min_size=1, max_size=6).map(lambda d: list(d.items())),
    max_size=4,
)
positions = st.dictionaries(
    st.sampled_from(["performance", "dr"]),
    st.builds(
        Position,
        st.text(max_size=4),
        st.just("g"),
        st.integers(0, 9),
        st.integers(0, 2**40),
        st.binary(min_size=32, max_size=32),
    ),
)


FIELDS = {
    "index": 7,
    "prev_hash": b"p" * 32,
    "epoch": 3,
    "writer": "node-1",
    "batch_id": b"b" * 16,
    "time_ms": 1_700_000_000_000,
    "kind": "data",
    "positions": {},
    "groups": {("r", "core"): [("a", b"1"), ("b", None)], ("l", "core"): [("a", b"2")]},
}


def build(**changes):
    return Record.build(**(FIELDS | changes))


def test_what_stored_logs_are_laid_out_by_does_not_change() -> None:
    """Another length or digest is another format: it wants another RECORD_VERSION, and code that reads both."""
    assert (RECORD_VERSION, SEGMENT_RECORDS) == (1, 512)
    large = Large(b"l" * 16, parts=(PartRef(5, b"c" * 32, "lr"),))
    raw = build(kind="commit", positions={"dr": Position("set", "g", 2, 40, b"h" * 32)}, large=large).encode()
    assert (len(raw), blake2b(raw, digest_size=16).hexdigest()) == (335, "be28be87a7eaf55430db1a6e6112daf6")


@given(groups, positions, st.integers(1, 2**40), st.integers(0, 2**40))
def test_a_record_survives_its_encoding(entries, at, index, epoch):
    record = build(groups=entries, positions=at, index=index, epoch=epoch)
    assert record.index == index
    found = Record.decode(record.encode(), expect_prev=b"p" * 32)
    assert found.header == record.header
    assert found.chain_hash == record.chain_hash == digest32(record.header_bytes)
    assert {(cls, name): list(items) for cls, name, items in found.groups()} == entries
    assert found.encode() == record.encode()
    assert record.size_bytes <= len(record.encode()) <= record.size_bytes + 16 + 5 * len(entries)


@given(st.data())
def test_any_changed_byte_is_seen(data):
    raw = build(positions={"dr": Position("s", "g", 1, 2, b"h" * 32)}).encode()
    at = data.draw(st.integers(0, len(raw) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != raw[at]))
    with pytest.raises(CorruptRecord):
        Record.decode(raw[:at] + bytes((other,)) + raw[at + 1 :])


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_else(raw):
    with pytest.raises(CorruptRecord):
        Record.decode(raw)


@pytest.mark.parametrize("length", [0, 1, 50, -1])
def test_a_torn_record_is_seen(length):
    with pytest.raises(CorruptRecord):
        Record.decode(build().encode()[:length])


def test_omitted_groups_leave_the_chain_hash_alone():
    record = build()
    part = Record.decode(record.only({"l"}).encode(), expect_prev=b"p" * 32)
    assert part.chain_hash == record.chain_hash
    assert part.bodies[0] is None
    assert part.writes() == [Write("l/core/a", b"2")]
    assert record.writes() == [Write("r/core/a", b"1"), Write("r/core/b", None), Write("l/core/a", b"2")]


def test_the_least_that_a_header_may_say_is_read():
    record = build(index=1, epoch=0, time_ms=0)
    assert Record.decode(record.encode()).header == record.header


def test_a_foreign_body_under_a_true_header_is_seen():
    record, other = build(), build(groups={("r", "core"): [("a", b"X"), ("b", None)], ("l", "core"): [("a", b"2")]})
    forged = Record(record.header, record.header_bytes, record.chain_hash, other.bodies)
    with pytest.raises(CorruptRecord, match=r"record 7, class r, partition 'core'"):
        Record.decode(forged.encode())


def test_the_chain_must_fit():
    with pytest.raises(CorruptRecord, match="hash chain"):
        Record.decode(build().encode(), expect_prev=GENESIS_PREV)


def test_an_unknown_version_is_named_even_if_its_shape_is_unknown():
    later = msgspec.msgpack.encode((RECORD_VERSION + 1, {"new": 1}, [], "shape"))
    with pytest.raises(CorruptRecord, match="version 2"):
        Record.decode(later)


@pytest.mark.parametrize(
    "changes",
    [
        {"index": 0},
        {"prev_hash": b"short"},
        {"epoch": -1},
        {"batch_id": b""},
        {"time_ms": -1},
        {"kind": "part"},
        {"kind": "other"},
        {"groups": {("x", "core"): [("a", b"")]}},
        {"groups": {("r", ""): [("a", b"")]}},
        {"groups": {("r", "a/b"): [("a", b"")]}},
        {"groups": {("r", "core"): []}},
        {"groups": {("r", "core"): [("", b"")]}},
        {"groups": {("r", "core"): [("a", b"1"), ("a", b"2")]}},
        {"positions": {"dr": Position("s", "g", 1, 2, b"short")}},
    ],
)
def test_fields_out_of_bounds_are_refused(changes):
    with pytest.raises(CorruptRecord):
        Record.decode(build(**changes).encode())


def test_names_sort_as_numbers():
    indexes = [1, 9, 10, 511, 512, 99_999, 10**9]
    keys = [record_key("g1", index, 512) for index in indexes]
    assert keys == sorted(keys)
    assert all(name.startswith(segment_prefix("g1", index // 512)) for name, index in zip(keys, indexes, strict=True))


SOME = {("r", "core"): [("a", b"1")]}
BATCH = b"i" * 16
PART = PartRef(3, b"h" * 32, "lr")


@pytest.mark.parametrize(
    ("kind", "groups", "large"),
    [
        ("part", SOME, Large(BATCH)),
        ("part", SOME, Large(BATCH, continued=True)),
        ("commit", {}, Large(BATCH, parts=(PART,))),
        ("commit", {}, Large(BATCH, parts=(PART, PartRef(6, b"h" * 32, "r")))),
        ("abort", {}, Large(BATCH)),
        ("roll", {}, Large(BATCH)),
        ("roll", {}, Large(BATCH, done=True)),
    ],
)
def test_the_records_of_a_large_batch_come_back(kind, groups, large):
    record = build(kind=kind, groups=groups, large=large)
    found = Record.decode(record.encode())
    assert (found.header.kind, found.header.large) == (kind, large)
    assert found.header.large.continued is large.continued, "a flag that is not given is False"
    assert Large(BATCH) == Large(BATCH, False, (), False)


@pytest.mark.parametrize(
    ("kind", "groups", "large"),
    [
        ("data", SOME, Large(BATCH)),
        ("tenure", {}, Large(BATCH)),
        ("commit", {}, None),
        ("part", SOME, Large(b"short")),
        ("part", {}, Large(BATCH)),
        ("part", SOME, Large(BATCH, parts=(PART,))),
        ("part", SOME, Large(BATCH, done=True)),
        ("commit", {}, Large(BATCH)),
        ("commit", SOME, Large(BATCH, parts=(PART,))),
        ("commit", {}, Large(BATCH, continued=True, parts=(PART,))),
        ("commit", {}, Large(BATCH, parts=(PART, PART))),
        ("commit", {}, Large(BATCH, parts=(PartRef(6, b"h" * 32, "r"), PART))),
        ("commit", {}, Large(BATCH, parts=(PartRef(7, b"h" * 32, "r"),))),
        ("commit", {}, Large(BATCH, parts=(PartRef(3, b"h" * 31, "r"),))),
        ("commit", {}, Large(BATCH, parts=(PartRef(3, b"h" * 32, ""),))),
        ("abort", {}, Large(BATCH, continued=True)),
        ("abort", SOME, Large(BATCH)),
        ("abort", {}, Large(BATCH, done=True)),
        ("roll", {}, Large(BATCH, parts=(PART,))),
    ],
)
def test_unsound_records_of_a_large_batch_are_refused(kind, groups, large):
    with pytest.raises(CorruptRecord, match=r"bad (large|kind)"):
        Record.decode(build(kind=kind, groups=groups, large=large).encode())


def test_a_header_names_each_group_once_and_every_body():
    record = build()
    twice = Record.build(**{**FIELDS, "groups": {("r", "core"): [("a", b"1")]}})
    header = msgspec.structs.replace(twice.header, groups=twice.header.groups * 2)
    raw = msgspec.msgpack.encode(header)
    with pytest.raises(CorruptRecord, match="bad groups"):
        Record.decode(Record(header, raw, digest32(raw), twice.bodies * 2).encode())
    missing = Record(record.header, record.header_bytes, record.chain_hash, record.bodies[:1])
    with pytest.raises(CorruptRecord, match="bad groups"):
        Record.decode(missing.encode())


def test_what_is_malformed_is_called_so_without_its_content():
    for raw in (b"", b"\xc1", msgspec.msgpack.encode(["secret"]), msgspec.msgpack.encode([RECORD_VERSION, 1, 2, 3])):
        with pytest.raises(CorruptRecord, match=r"^a record is malformed$"):
            Record.decode(raw)
