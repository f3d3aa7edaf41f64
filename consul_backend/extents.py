"""One stored extent of the index: its name, its bytes, its checksum. Pure. What extents are: ``merkle_pages.py``."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from consul_backend.errors import Corrupt
from consul_backend.keys import decode_segment, encode_partition

EXTENT_VERSION = 1
EXTENT_BYTES_MAX = 24 * 1024
DEPTH_MAX = 16
CHECKSUM_BYTES = 16

_encode = msgspec.msgpack.Encoder().encode
_decode_outer = msgspec.msgpack.Decoder(tuple[bytes, bytes]).decode
_decode_body = msgspec.msgpack.Decoder(tuple[int, int, tuple[tuple[int, bytes], ...]]).decode


def merkle_prefix(generation: str) -> str:
    """What every extent key of a generation begins with."""
    return f"g/{generation}/merkle/"


def extent_key(generation: str, cls: str, partition: str, depth: int, start: int) -> str:
    """Where an extent is stored: ``g/<generation>/merkle/<class>/<partition>/<depth>-<prefix>``."""
    name = f"{depth:02d}-{start >> (DEPTH_MAX - depth):04x}"
    return f"{merkle_prefix(generation)}{encode_partition(cls, partition)}/{name}"


def parse_extent_name(name: str) -> tuple[int, int]:
    """Depth and first bucket from the last segment of an extent key. Raises Corrupt."""
    head, dash, tail = name.partition("-")
    try:
        depth, prefix = int(head), int(tail, 16)
    except ValueError:
        raise Corrupt(f"{name!r} is not the name of an index extent") from None
    if not dash or not 0 <= depth <= DEPTH_MAX or not 0 <= prefix < 1 << depth or name != f"{depth:02d}-{prefix:04x}":
        raise Corrupt(f"{name!r} is not the name of an index extent")
    return depth, prefix << (DEPTH_MAX - depth)


def parse_partition_name(name: str) -> str:
    """The partition from its folder name (with its slash). Raises Corrupt."""
    return decode_segment(name.removesuffix("/"))


@dataclass(frozen=True, slots=True)
class Extent:
    """A decoded extent: subpages as of WAL index ``lsn``."""

    lsn: int
    subpages: tuple[tuple[int, bytes], ...]
    checksum: bytes


def encode_extent(key: str, lsn: int, subpages: list[tuple[int, bytes]]) -> tuple[bytes, bytes]:
    """The stored bytes of an extent and its checksum, which also covers its key: extents cannot be swapped."""
    body = _encode((EXTENT_VERSION, lsn, subpages))
    checksum = _checksum(key, body)
    return _encode((body, checksum)), checksum


def decode_extent(key: str, raw: bytes) -> Extent:
    """The extent stored at ``key``. Raises Corrupt naming the key."""
    try:
        body, checksum = _decode_outer(raw)
        if _checksum(key, body) != checksum:
            raise Corrupt(f"index extent {key} does not have its checksum")
        version, lsn, subpages = _decode_body(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Corrupt(f"index extent {key} is malformed") from None
    if version != EXTENT_VERSION:
        raise Corrupt(f"index extent {key} has version {version}, this program knows {EXTENT_VERSION}")
    return Extent(lsn, subpages, checksum)


def _checksum(key: str, body: bytes) -> bytes:
    return blake2b(key.encode() + b"\0" + body, digest_size=CHECKSUM_BYTES, person=b"extent").digest()
