"""Heads are stored as these very bytes, and whatever else is found in their place is refused."""

from hashlib import blake2b

import msgspec
import pytest

from consul_backend.errors import Corrupt
from consul_backend.heads import (
    HEADS_BYTES_MAX,
    HEADS_VERSION,
    HeadsTable,
    decode_heads,
    encode_heads,
    heads_key,
    heads_sum,
)
from consul_backend.merkle import DIGEST_BYTES, PAGES, Forest, entry_digest

KEY = heads_key("g1", "r", "p 1")


def checksum_of(body):
    return blake2b(KEY.encode() + b"\0" + body, digest_size=16, person=b"heads").digest()


def stored(version, lsn, packed):
    body = msgspec.msgpack.encode((version, lsn, packed))
    return msgspec.msgpack.encode((body, checksum_of(body)))


def test_the_key_names_class_and_partition():
    assert KEY == "g/g1/heads/r/p_201"


def test_they_are_stored_as_version_record_and_pages():
    forest = Forest()
    forest.apply((f"r/p 1/{n}", entry_digest(f"r/p 1/{n}", b"")) for n in range(300))
    raw, checksum = encode_heads(KEY, forest, "r", "p 1", 77)
    pages = forest.page_heads("r", "p 1")
    assert len(pages) > 100
    packed = b"".join(bytes([page]) + b"\0\0\0" + bytes([pages[page][1]]) + pages[page][0] for page in sorted(pages))
    assert raw == stored(1, 77, packed)
    heads = decode_heads(KEY, raw)
    assert (heads.lsn, heads.pages, heads.count) == (77, pages, 300)
    body, stored_sum = msgspec.msgpack.decode(raw)
    assert heads.checksum == checksum == int.from_bytes(stored_sum, "big") == int.from_bytes(checksum_of(body), "big")


def test_no_partition_s_heads_are_larger_than_said():
    largest = {page: (bytes([page]) * DIGEST_BYTES, 2**32 - 1) for page in range(PAGES)}

    class Full:
        def page_heads(self, cls, partition):
            return largest

    raw, _ = encode_heads(KEY, Full(), "r", "p 1", 2**63)
    assert HEADS_BYTES_MAX - 64 < len(raw) <= HEADS_BYTES_MAX <= 6_464
    assert decode_heads(KEY, raw).pages == largest


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode((b"x", b"y")),
        msgspec.msgpack.encode((b"\xc1", checksum_of(b"\xc1"))),
        stored(HEADS_VERSION + 1, 1, b""),
        stored(HEADS_VERSION, 1, b"1"),
        stored(HEADS_VERSION + 1, 1, b"1"),
        stored(HEADS_VERSION, 1, bytes(4 + DIGEST_BYTES)),
        stored(HEADS_VERSION, 1, bytes(6 + DIGEST_BYTES)),
    ],
)
def test_anything_else_is_refused_by_name(raw):
    with pytest.raises(Corrupt, match="g/g1/heads/r/p_201"):
        decode_heads(KEY, raw)


def test_heads_of_one_key_are_none_of_another():
    raw = stored(HEADS_VERSION, 5, b"")
    assert decode_heads(KEY, raw).pages == {}
    with pytest.raises(Corrupt, match="checksum"):
        decode_heads(heads_key("g1", "r", "p2"), raw)


def test_changes_are_merged_and_what_is_deleted_goes():
    table = HeadsTable()
    one, two, three = ("r", "1"), ("r", "2"), ("l", "3")
    table.stale = {one, two, three}
    table.apply({one: 1, two: 2})
    assert table.checksums == {one: 1, two: 2}
    assert table.stale == {three}
    assert table.after({two: None, three: 3}) == {one: 1, three: 3}
    assert table.checksums == {one: 1, two: 2}
    table.apply({two: None, three: 0})
    assert table.checksums == {one: 1, three: 0}
    assert table.stale == set()


def test_the_sum_wraps_at_its_width():
    assert heads_sum({}) == bytes(16)
    assert heads_sum({("r", "1"): 1, ("r", "2"): 2}) == bytes(15) + b"\x03"
    assert heads_sum({("r", "1"): 2**128 - 1, ("r", "2"): 2}) == bytes(15) + b"\x01"
    assert heads_sum({("r", "1"): 2**128 - 1}) == b"\xff" * 16
