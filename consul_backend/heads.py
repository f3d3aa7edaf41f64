"""Heads: of every page of a partition its digest and size, in one small stored value. Pure.

They are written in each flush that touches the partition, and are exact as of that flush's record (``lsn``) for
*every* page, also for those whose extents lag behind. So a node that becomes active knows roots and sizes without
reading the extents, and can tell, page by page, whether what it later loads is what was there: extents, repeated up to
``lsn``, must give the page's digest. The checkpoint pins the heads by their number and the sum of their checksums.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from consul_backend.errors import Corrupt
from consul_backend.keys import encode_partition
from consul_backend.merkle import DIGEST_BYTES, PAGES, Forest

HEADS_VERSION = 1
HEADS_BYTES_MAX = PAGES * (1 + 4 + DIGEST_BYTES) + 64
"""Upper bound of one stored value."""

_CHECKSUM_BYTES = 16
_PAGE_BYTES = 1 + 4 + DIGEST_BYTES

_encode = msgspec.msgpack.Encoder().encode
_decode_outer = msgspec.msgpack.Decoder(tuple[bytes, bytes]).decode
_decode_body = msgspec.msgpack.Decoder(tuple[int, int, bytes]).decode


@dataclass(frozen=True, slots=True)
class Heads:
    """``pages``: (digest, number of entries) by page number; ``checksum`` as an integer, for sums."""

    lsn: int
    pages: dict[int, tuple[bytes, int]]
    checksum: int

    @property
    def count(self) -> int:
        """Entries of the partition."""
        return sum([count for _, count in self.pages.values()])


def heads_prefix(generation: str) -> str:
    """What every key of heads begins with."""
    return f"g/{generation}/heads/"


def heads_key(generation: str, cls: str, partition: str) -> str:
    """Where a partition's heads are stored."""
    return heads_prefix(generation) + encode_partition(cls, partition)


def encode_heads(key: str, forest: Forest, cls: str, partition: str, lsn: int) -> tuple[bytes, int]:
    """The bytes to store of a partition as it is now, at record ``lsn``, and their checksum."""
    pages = sorted(forest.page_heads(cls, partition).items())
    packed = b"".join([bytes((page,)) + count.to_bytes(4, "big") + digest for page, (digest, count) in pages])
    body = _encode((HEADS_VERSION, lsn, packed))
    checksum = _checksum(key, body)
    return _encode((body, checksum)), int.from_bytes(checksum, "big")


def decode_heads(key: str, raw: bytes) -> Heads:
    """The heads stored at ``key``. Raises Corrupt naming the key."""
    try:
        body, checksum = _decode_outer(raw)
        if _checksum(key, body) != checksum:
            raise Corrupt(f"heads {key} do not have their checksum")
        version, lsn, packed = _decode_body(body)
    except msgspec.MsgspecError:
        raise Corrupt(f"heads {key} are malformed") from None
    if version != HEADS_VERSION or len(packed) % _PAGE_BYTES:
        raise Corrupt(f"heads {key} have version {version}, this program knows {HEADS_VERSION}")
    pages = {
        packed[at]: (packed[at + 5 : at + _PAGE_BYTES], int.from_bytes(packed[at + 1 : at + 5], "big"))
        for at in range(0, len(packed), _PAGE_BYTES)
    }
    return Heads(lsn, pages, int.from_bytes(checksum, "big"))


def _checksum(key: str, body: bytes) -> bytes:
    return blake2b(key.encode() + b"\0" + body, digest_size=_CHECKSUM_BYTES, person=b"heads").digest()


class HeadsTable:
    """Checksums of the stored heads by (class, partition), and which are missing or not to be trusted (``stale``)."""

    def __init__(self) -> None:
        self.checksums: dict[tuple[str, str], int] = {}
        self.stale: set[tuple[str, str]] = set()

    def after(self, changes: dict[tuple[str, str], int | None]) -> dict[tuple[str, str], int]:
        """What ``checksums`` will be once the changes (None: deleted) are stored."""
        merged = {**self.checksums, **changes}
        return {name: checksum for name, checksum in merged.items() if checksum is not None}

    def apply(self, changes: dict[tuple[str, str], int | None]) -> None:
        """The changes are stored."""
        self.checksums = self.after(changes)
        self.stale.difference_update(changes)


def heads_sum(checksums: dict[tuple[str, str], int]) -> bytes:
    """The sum of checksums."""
    return (sum(checksums.values()) % (1 << 8 * _CHECKSUM_BYTES)).to_bytes(_CHECKSUM_BYTES, "big")
