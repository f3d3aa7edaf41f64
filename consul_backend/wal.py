"""The write-ahead log's records: what one commit did, chained by hash. Pure.

A record is stored and shipped as the msgpack array ``[version, header, bodies, chain hash]``:

* *header* (bytes): a msgpack array of the fields of :class:`Header`. It names each group of entries, one per (class,
  partition), by its digest, so the header alone pins the whole record.
* *bodies*: one item per group, in the header's order: the group's msgpack bytes ``[[path, value | nil], ...]`` (nil
  is a deletion), or nil where whoever passed the record on left the group out.
* *chain hash*: BLAKE2b-32 of the header bytes. The header holds the chain hash of the record before, so equal chain
  hashes mean equal histories.

Guarantees of a :class:`Record` that came from :meth:`Record.decode`:

1. The version is known and every field has its type and bounds; the chain hash fits the header.
2. Bodies that are present have the digest, the count and the shape that the header says, and no path twice.
3. With ``expect_prev``, it follows that record: its ``prev_hash`` is that hash.

Each guarantee fails as :class:`CorruptRecord`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Literal

import msgspec

from consul_backend.errors import Corrupt
from consul_backend.keys import CLASSES
from consul_backend.position import Position

RECORD_VERSION = 1
HASH_BYTES = 32
BATCH_ID_BYTES = 16
GENESIS_INDEX = 1
GENESIS_PREV = bytes(HASH_BYTES)
SEGMENT_RECORDS = 512
"""Records of one segment of the log, unless a generation began with another number."""

Kind = Literal["genesis", "tenure", "data", "part", "commit", "abort", "roll"]
"""``genesis`` begins a store generation, ``tenure`` a node's time as active. The last four belong to large batches
(:mod:`consul_backend.large_batch`): a ``part`` holds entries that a later ``commit`` makes true or an ``abort`` voids;
a ``roll`` says that some of them now are in their data keys."""

WRITTEN_KINDS = frozenset({"genesis", "tenure", "data"})
LARGE_KINDS = frozenset({"part", "commit", "abort", "roll"})


class CorruptRecord(Corrupt):
    """The bytes of a write-ahead log record fail their own check."""


class Write(msgspec.Struct, frozen=True, gc=False):
    """One logical change: the whole new value of ``key`` (``<class>/<partition>/<path>``), or None to delete it."""

    key: str
    value: bytes | None


class GroupHead(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a header says of one group: whose entries, the BLAKE2b-32 of its body, how many entries."""

    cls: str
    partition: str
    digest: bytes
    count: int


class PartRef(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A part as its commit record names it; ``classes`` are the letters of the classes it has entries of, sorted."""

    index: int
    chain_hash: bytes
    classes: str


class Large(msgspec.Struct, frozen=True, array_like=True):
    """What a record has to do with the large batch ``id`` (16 random bytes).

    ``part``: ``continued`` says that the first entry's value goes on where the part before ended. ``commit``: ``parts``
    are all of them, in order. ``roll``: ``done`` says that no data key of the batch is left to write."""

    id: bytes
    continued: bool = False
    parts: tuple[PartRef, ...] = ()
    done: bool = False


class Header(msgspec.Struct, frozen=True, array_like=True):
    """``index`` is dense; ``epoch`` numbers the writer's tenure; ``batch_id`` (16 random bytes) tells two attempts of
    one writer apart; ``positions`` repeats the newest position of each mode; ``large`` is there for the kinds of a
    large batch only."""

    index: int
    prev_hash: bytes
    epoch: int
    writer: str
    batch_id: bytes
    time_ms: int
    kind: Kind
    positions: dict[str, Position]
    groups: tuple[GroupHead, ...]
    large: Large | None = None


class Head(msgspec.Struct, frozen=True, gc=False):
    """The newest committed record: its number, its chain hash, and when its writer made it."""

    index: int
    chain_hash: bytes
    time_ms: int


Groups = Mapping[tuple[str, str], Sequence[tuple[str, bytes | None]]]
"""Entries (path, value) by (class, partition)."""

_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # all that msgspec's decoders raise

_encode = msgspec.msgpack.Encoder().encode
_decode_outer = msgspec.msgpack.Decoder(tuple[int, bytes, tuple[bytes | None, ...], bytes]).decode
_decode_version = msgspec.msgpack.Decoder(tuple[int, msgspec.Raw, msgspec.Raw, msgspec.Raw]).decode
_decode_header = msgspec.msgpack.Decoder(Header).decode
_decode_body = msgspec.msgpack.Decoder(tuple[tuple[str, bytes | None], ...]).decode


def digest32(data: bytes) -> bytes:
    """BLAKE2b with 32 bytes of output."""
    return blake2b(data, digest_size=HASH_BYTES).digest()


class Record:
    """One record, immutable. ``chain_hash`` identifies it together with everything before it."""

    __slots__ = ("bodies", "chain_hash", "header", "header_bytes")

    def __init__(
        self, header: Header, header_bytes: bytes, chain_hash: bytes, bodies: tuple[bytes | None, ...]
    ) -> None:
        self.header = header
        self.header_bytes = header_bytes
        self.chain_hash = chain_hash
        self.bodies = bodies

    @classmethod
    def build(
        cls,
        *,
        index: int,
        prev_hash: bytes,
        epoch: int,
        writer: str,
        batch_id: bytes,
        time_ms: int,
        kind: Kind,
        positions: Mapping[str, Position],
        groups: Groups,
        large: Large | None = None,
    ) -> Record:
        """A new record over ``groups``, whose entries must have distinct paths."""
        heads: list[GroupHead] = []
        bodies: list[bytes | None] = []
        for (class_, partition), entries in groups.items():
            body = _encode(entries)
            heads.append(GroupHead(class_, partition, digest32(body), len(entries)))
            bodies.append(body)
        header = Header(index, prev_hash, epoch, writer, batch_id, time_ms, kind, dict(positions), tuple(heads), large)
        header_bytes = _encode(header)
        return cls(header, header_bytes, digest32(header_bytes), tuple(bodies))

    @property
    def index(self) -> int:
        """Its number in the log."""
        return self.header.index

    @property
    def size_bytes(self) -> int:
        """Bytes of :meth:`encode`, but for a few of framing."""
        return len(self.header_bytes) + HASH_BYTES + sum([len(body) for body in self.bodies if body is not None])

    def encode(self) -> bytes:
        """The bytes to store or send."""
        return _encode((RECORD_VERSION, self.header_bytes, self.bodies, self.chain_hash))

    @classmethod
    def decode(cls, raw: bytes, *, expect_prev: bytes | None = None) -> Record:
        """The record in ``raw``, checked as the module text says. Raises CorruptRecord."""
        try:
            version, header_bytes, bodies, chain_hash = _decode_outer(raw)
            if version != RECORD_VERSION:
                raise CorruptRecord(f"record of version {version}, this program knows {RECORD_VERSION}")
            header = _decode_header(header_bytes)
        except _MALFORMED:
            raise CorruptRecord(_describe_malformed(raw)) from None
        if digest32(header_bytes) != chain_hash:
            raise CorruptRecord("a record's header does not have the record's chain hash")
        record = cls(header, header_bytes, chain_hash, bodies)
        record._check_header()
        for head, body in zip(header.groups, bodies, strict=True):
            if body is not None:
                record._decode_group(head, body)
        if expect_prev is not None and header.prev_hash != expect_prev:
            raise CorruptRecord(f"record {header.index} does not follow the record before it: the hash chain is broken")
        return record

    def groups(self) -> Iterator[tuple[str, str, tuple[tuple[str, bytes | None], ...]]]:
        """Class, partition and entries (path, value or None for a deletion) of every group that is present."""
        for head, body in zip(self.header.groups, self.bodies, strict=True):
            if body is not None:
                yield head.cls, head.partition, self._decode_group(head, body)

    def writes(self) -> list[Write]:
        """The entries that are present, as logical writes."""
        return [
            Write(f"{class_}/{partition}/{path}", value)
            for class_, partition, entries in self.groups()
            for path, value in entries
        ]

    def only(self, classes: Collection[str]) -> Record:
        """The same record without the bodies of other classes; it keeps its chain hash."""
        return self.picked(lambda cls, partition: cls in classes)

    def picked(self, takes: Callable[[str, str], bool]) -> Record:
        """The same record with the bodies of those groups alone whose class and partition are taken."""
        bodies = tuple(
            body if takes(head.cls, head.partition) else None
            for head, body in zip(self.header.groups, self.bodies, strict=True)
        )
        return Record(self.header, self.header_bytes, self.chain_hash, bodies)

    def _check_header(self) -> None:
        header = self.header
        names = [(head.cls, head.partition) for head in header.groups]
        problems = {
            "index": header.index < GENESIS_INDEX,
            "prev_hash": len(header.prev_hash) != HASH_BYTES,
            "epoch": header.epoch < 0,
            "batch_id": len(header.batch_id) != BATCH_ID_BYTES,
            "time_ms": header.time_ms < 0,
            "kind": header.kind not in (WRITTEN_KINDS if header.large is None else LARGE_KINDS),
            "large": header.large is not None and not _is_sound(header, header.large),
            "groups": len(names) != len(self.bodies) or len(set(names)) != len(names),
            "group": any(
                head.cls not in CLASSES
                or not head.partition
                or "/" in head.partition
                or len(head.digest) != HASH_BYTES
                or head.count < 1
                for head in header.groups
            ),
            "positions": any(len(position.chain_hash) != HASH_BYTES for position in header.positions.values()),
        }
        for name, wrong in problems.items():
            if wrong:
                raise CorruptRecord(f"record {header.index} has a bad {name}")

    def _decode_group(self, head: GroupHead, body: bytes) -> tuple[tuple[str, bytes | None], ...]:
        where = f"record {self.header.index}, class {head.cls}, partition {head.partition!r}"
        if digest32(body) != head.digest:
            raise CorruptRecord(f"{where}: the entries do not have the digest in the header")
        try:
            entries = _decode_body(body)
        except _MALFORMED:
            raise CorruptRecord(f"{where}: the entries are malformed") from None
        paths = {path for path, _ in entries}
        if len(entries) != head.count or len(paths) != len(entries) or "" in paths:
            raise CorruptRecord(f"{where}: the entries are not what the header says")
        return entries


def _is_sound(header: Header, large: Large) -> bool:
    """Whether a record of a large batch has what its kind needs, and nothing else."""
    indexes = [part.index for part in large.parts]
    return (
        len(large.id) == BATCH_ID_BYTES
        and bool(header.groups) == (header.kind == "part")
        and bool(indexes) == (header.kind == "commit")
        and (header.kind == "part" or not large.continued)
        and (header.kind == "roll" or not large.done)
        and all(before < after for before, after in zip(indexes, [*indexes[1:], header.index], strict=False))
        and all(len(part.chain_hash) == HASH_BYTES and part.classes for part in large.parts)
    )


def _describe_malformed(raw: bytes) -> str:
    """Without the decoder's own text, which may quote what it read."""
    try:
        version = _decode_version(raw)[0]
    except _MALFORMED:
        return "a record is malformed"
    if version != RECORD_VERSION:
        return f"record of version {version}, this program knows {RECORD_VERSION}"
    return "a record is malformed"


def record_key(generation: str, index: int, segment_records: int) -> str:
    """Where record ``index`` is stored: ``g/<generation>/wal/<segment>/<index>``, both numbers of fixed width, so that
    names sort by number."""
    return f"g/{generation}/wal/{index // segment_records:010d}/{index:014d}"


def segment_prefix(generation: str, segment: int) -> str:
    """What every record of a segment begins with."""
    return f"g/{generation}/wal/{segment:010d}/"
