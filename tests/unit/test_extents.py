"""Extents are stored as these very bytes under these very names, and whatever else is found there is refused."""

from hashlib import blake2b

import msgspec
import pytest

from consul_backend.errors import Corrupt
from consul_backend.extents import (
    CHECKSUM_BYTES,
    DEPTH_MAX,
    EXTENT_BYTES_MAX,
    EXTENT_VERSION,
    Extent,
    decode_extent,
    encode_extent,
    extent_key,
    merkle_prefix,
    parse_extent_name,
    parse_partition_name,
)

KEY = extent_key("g1", "r", "p 1", 8, 0xAB00)
SUBPAGES = [(0xAB00, b"one"), (0xAB07, b"two")]


def checksum_of(body):
    return blake2b(KEY.encode() + b"\0" + body, digest_size=16, person=b"extent").digest()


def stored(version, lsn, subpages):
    body = msgspec.msgpack.encode((version, lsn, subpages))
    return msgspec.msgpack.encode((body, checksum_of(body)))


def test_figures_that_what_is_stored_depends_on():
    assert (EXTENT_VERSION, DEPTH_MAX, CHECKSUM_BYTES) == (1, 16, 16)
    assert EXTENT_BYTES_MAX == 24_576


def test_a_key_has_depth_and_prefix():
    assert merkle_prefix("g1") == "g/g1/merkle/"
    assert KEY == "g/g1/merkle/r/p_201/08-00ab"
    assert extent_key("g1", "r", "p", 0, 0) == "g/g1/merkle/r/p/00-0000"
    assert extent_key("g1", "r", "p", 16, 0xFFFF) == "g/g1/merkle/r/p/16-ffff"


@pytest.mark.parametrize(("depth", "first"), [(0, 0), (1, 0x8000), (8, 0xAB00), (15, 0xFFFE), (16, 0xFFFF)])
def test_a_name_tells_what_made_it(depth, first):
    assert parse_extent_name(extent_key("g1", "r", "p", depth, first).rsplit("/", 1)[1]) == (depth, first)


@pytest.mark.parametrize(
    "name", ["", "08", "08-", "-00ab", "8-00ab", "08-ab", "08-00AB", "17-0000", "-1-0000", "08-0100", "00-0001", "x-y"]
)
def test_no_other_name_is_one(name):
    with pytest.raises(Corrupt):
        parse_extent_name(name)


def test_a_folder_s_name_tells_the_partition():
    assert parse_partition_name("p_201/") == "p 1"
    assert parse_partition_name("p") == "p"


def test_it_is_stored_as_version_record_and_subpages():
    raw, checksum = encode_extent(KEY, 77, SUBPAGES)
    assert raw == stored(1, 77, SUBPAGES)
    assert decode_extent(KEY, raw) == Extent(77, tuple(SUBPAGES), checksum)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode((b"x", b"y")),
        msgspec.msgpack.encode((b"\xc1", checksum_of(b"\xc1"))),
        stored(EXTENT_VERSION + 1, 1, []),
        stored(EXTENT_VERSION, "text", []),
    ],
)
def test_anything_else_is_refused_by_name(raw):
    with pytest.raises(Corrupt, match="g/g1/merkle/r/p_201/08-00ab"):
        decode_extent(KEY, raw)


def test_extents_cannot_be_swapped():
    raw, _ = encode_extent(KEY, 77, SUBPAGES)
    with pytest.raises(Corrupt, match="checksum"):
        decode_extent(extent_key("g1", "r", "p 1", 8, 0xAC00), raw)
