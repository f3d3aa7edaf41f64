"""The checkpoint: what recovery may rely on, written in the same transaction as every index flush. Pure.

Because it changes with the extents, atomically, it describes them exactly: their number and the sum of their
checksums. A missing, swapped or older extent therefore shows at recovery, and so does an older checkpoint put back.
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from consul_backend.errors import Corrupt
from consul_backend.position import Position

CHECKPOINT_VERSION = 1
DIRTY_MAX = 256
"""Dirty leaves that a checkpoint lists, the oldest: those left out need no earlier redo than those listed."""

_CHECKSUM_BYTES = 16


class CheckpointLeaf(msgspec.Struct, frozen=True, array_like=True):
    """A leaf of the index whose stored extent lacks changes from record ``first`` on."""

    cls: str
    partition: str
    depth: int
    start: int
    first: int


class Checkpoint(msgspec.Struct, frozen=True, array_like=True):
    """``head_index`` and ``head_hash`` are the newest record when it was written; ``serial`` makes each one's bytes new
    (a same-value write would not move its ModifyIndex); ``segment_bytes`` sizes the log's segments for retention;
    ``heads`` and ``heads_sum`` pin the stored heads of pages; ``batches`` are the first parts of large batches in
    progress, or that a dirty leaf lacks; ``crossings`` are retention's."""

    serial: int
    epoch: int
    head_index: int
    head_hash: bytes
    positions: dict[str, Position]
    dirty: tuple[CheckpointLeaf, ...]
    extents: int
    extents_sum: bytes
    segment_bytes: dict[int, int]
    heads: int = 0
    heads_sum: bytes = b""
    batches: tuple[int, ...] = ()
    crossings: dict[int, int] = {}

    @property
    def redo_from(self) -> int:
        """The first record that some stored extent may lack."""
        return min((leaf.first for leaf in self.dirty), default=self.head_index + 1)

    @property
    def scan_from(self) -> int:
        """The first record that recovery reads: also its own head, to know the log, and the parts of every batch that
        is to be finished or repeated."""
        return min(self.redo_from, self.head_index, *self.batches)


_encode = msgspec.msgpack.Encoder().encode
_decode_outer = msgspec.msgpack.Decoder(tuple[int, bytes, bytes]).decode
_decode_body = msgspec.msgpack.Decoder(Checkpoint).decode


def checkpoint_key(generation: str) -> str:
    """Where a generation's checkpoint is stored."""
    return f"g/{generation}/checkpoint"


def encode_checkpoint(generation: str, checkpoint: Checkpoint) -> bytes:
    """The bytes to store."""
    body = _encode(checkpoint)
    return _encode((CHECKPOINT_VERSION, body, _checksum(generation, body)))


def decode_checkpoint(generation: str, raw: bytes) -> Checkpoint:
    """The checkpoint in ``raw``. Raises Corrupt."""
    key = checkpoint_key(generation)
    try:
        version, body, checksum = _decode_outer(raw)
        if version != CHECKPOINT_VERSION:
            raise Corrupt(f"{key} has version {version}, this program knows {CHECKPOINT_VERSION}")
        if _checksum(generation, body) != checksum:
            raise Corrupt(f"{key} does not have its checksum")
        return _decode_body(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Corrupt(f"{key} is malformed") from None


def _checksum(generation: str, body: bytes) -> bytes:
    key = checkpoint_key(generation).encode()
    return blake2b(key + b"\0" + body, digest_size=_CHECKSUM_BYTES, person=b"checkpoint").digest()
