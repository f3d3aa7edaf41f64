"""The messages two clusters exchange, as bytes. Pure. ``docs/cluster-port.md`` says what each is for.

Every message is a *frame*: the CRC-32 of the payload, four bytes, big-endian; then the payload, one msgpack array whose
first item numbers its type. TLS keeps strangers out; the checksum keeps out damage between TLS and the other codec.
A frame is checked once, in :func:`decode_from_primary` and its siblings, which know the direction. Past them:

1. the payload is what the sender encoded, and of a type its side may send;
2. lengths, signs and hash sizes are right, no field is unknown, and nothing was allocated that the bytes did not fill;
3. record bytes are *not* yet checked: :mod:`sidecar.replication.intake` does that, with the chain.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Annotated, TypeVar

import msgspec

from consul_backend.position import Position
from sidecar.replication.history import Promotion
from sidecar.replication.selection import EVERYTHING, Partitions

PROTOCOL_VERSIONS = (7,)
"""Versions of this protocol that this program speaks. A change of any frame is a new version."""

FRAME_BYTES_MAX = 2 * 1024 * 1024
"""One frame. A store transaction is 512 KiB by default and a record is smaller than that; four times as much leaves
room for a store with raised limits."""

FETCH_FRAME_BYTES_MAX = 48 * 1024 * 1024
"""One frame of an answer to a fetch, which is an HTTP body: the largest value there can be, in one piece."""

DIFF_BYTES_MAX = 64 * 1024 * 1024
"""A diff request, a diff answer or a fetch request, each of which is one HTTP body."""

HASH_BYTES = 32
DIGEST_BYTES = 20
CHECKSUM_BYTES = 4
LENGTH_BYTES = 4
FINGERPRINT_BYTES = 8
SALT_BYTES = 16

NONE_POSITION = Position(set_id="", generation="", epoch=0, index=0, chain_hash=bytes(HASH_BYTES))
"""Where a secondary stands while its data is a mix, or nothing: it must diff before it may stream or serve reads."""


def is_none(position: Position | None) -> bool:
    """Whether a stored position says that a diff must come first."""
    return position is None or position.index == 0


class ProtocolViolation(Exception):
    """The peer sent what nobody following this protocol sends. The connection is closed; nothing was applied."""


Hash = Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Index = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Depth = Annotated[int, msgspec.Meta(ge=0, le=16)]
Prefix = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Salt = Annotated[bytes, msgspec.Meta(min_length=SALT_BYTES, max_length=SALT_BYTES)]
Fingerprints = Annotated[bytes, msgspec.Meta(max_length=FINGERPRINT_BYTES << 16)]
Name = Annotated[str, msgspec.Meta(max_length=300)]
Address = Annotated[str, msgspec.Meta(max_length=1024)]
Text = Annotated[str, msgspec.Meta(max_length=1024)]


class Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Root of all messages."""


class Hello(Frame, frozen=True, tag=1):
    """The secondary's first frame. ``position`` None: no data yet. ``epoch_id`` names the replication epoch beyond its
    number; empty strings mean *not known yet*. Limits are those of the secondary's store. ``held``: the partitions
    whose data is here; a filter, or a primary that lacks some, leaves others out."""

    versions: tuple[Index, ...]
    secondary_id: Name
    store_id: Name
    set_id: Name
    epoch: Index
    epoch_id: Name
    position: Position | None
    ops_max: Index
    body_bytes_max: Index
    prefix_bytes: Index
    held: Partitions = EVERYTHING


class HelloReply(Frame, frozen=True, tag=2):
    """The primary's first frame. ``mode`` is ``accept``, ``need-diff`` or ``refuse``; ``reason`` is for people. After
    ``accept`` the stream begins with the record after the position in the hello; else the connection ends. ``history``
    are the set's replication epochs as the primary knows them, the newest last. ``selection``: the partitions that
    travel on this connection; what its ``only`` leaves out the secondary may not keep, what is ``without`` the primary
    does not hold itself."""

    version: Index
    mode: Name
    reason: Text
    cluster_id: Name
    set_id: Name
    generation: Name
    epoch: Index
    epoch_id: Name
    head_index: Index
    head_hash: Hash
    ops_max: Index
    body_bytes_max: Index
    prefix_bytes: Index
    history: tuple[Promotion, ...] = ()
    selection: Partitions = EVERYTHING


class RecordFrame(Frame, frozen=True, tag=3):
    """One record: header whole, bodies of what travels only. Its index is the last one handled plus one."""

    raw: bytes


class Skip(Frame, frozen=True, tag=4):
    """Records ``first``..``last`` hold nothing for this secondary; ``prev_hash`` is the chain hash that ``first``
    follows, ``chain_hash`` that of ``last``."""

    first: Index
    last: Index
    prev_hash: Hash
    chain_hash: Hash


class CompleteUpTo(Frame, frozen=True, tag=5):
    """In order with the records: at ``source_time_ms`` the primary's newest record was ``index`` and the root over this
    secondary's partitions was ``root``. The lag canary, and the secondary's chance to compare."""

    index: Index
    chain_hash: Hash
    root: Digest
    source_time_ms: Milliseconds


class Ack(Frame, frozen=True, tag=6):
    """Every record up to ``applied`` is handled; up to ``durable`` the secondary would survive a crash without asking
    again. They differ only across skipped records."""

    applied: Index
    durable: Index


class Heartbeat(Frame, frozen=True, tag=7):
    """Both ways, at any time. ``echo_ms`` is the ``clock_ms`` of the peer's last heartbeat, received ``echo_age_ms``
    before this one was sent (0 and 0: none yet). ``head_index`` is the sender's newest record, or what it applied."""

    clock_ms: Milliseconds
    echo_ms: Milliseconds
    echo_age_ms: Milliseconds
    head_index: Index
    api_addr: Address
    cluster_addrs: Annotated[tuple[Address, ...], msgspec.Meta(max_length=64)]


class Bye(Frame, frozen=True, tag=8):
    """The sender's last frame. ``code`` is ``closing`` (come again), ``need-diff`` or ``refuse``."""

    code: Name
    reason: Text


class PartFrame(Frame, frozen=True, tag=9):
    """One part of a large batch, header whole, bodies of the classes that travel only. It comes right before the frame
    of the commit record that names it; where it stands in the log, a skip came."""

    raw: bytes


class Ask(Frame, frozen=True, tag=10):
    """The primary lost these entries, logical keys with their digests, or found them damaged: who has them?"""

    number: Index
    wanted: Annotated[list[tuple[str, Digest]], msgspec.Meta(max_length=128)]


class Told(Frame, frozen=True, tag=11):
    """The secondary's answer to the question of that number: whole ciphertexts by their place in it. What it does not
    have, or what would make the answer too large, is left out."""

    number: Index
    values: Annotated[list[tuple[Index, bytes]], msgspec.Meta(max_length=128)]


class PartitionDigests(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One partition as the secondary has it: one fingerprint of each of 2^``depth`` groups, in order;
    none at depth 0, where the root says it all."""

    root: Digest
    depth: Depth
    groups: Fingerprints


class DiffRequest(Frame, frozen=True, tag=16):
    """First round trip: what the secondary has, by ``<class>/<partition>``. ``salt`` is random and keys every
    fingerprint and id of this diff. Only what is in ``selection``, of the last hello, is compared."""

    salt: Salt
    root: Digest
    partitions: dict[Name, PartitionDigests]
    selection: Partitions = EVERYTHING


class Cells(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a partition differs: ``groups`` of the request, and the primary's fingerprints of their cells, which are
    those ranges of ``depth`` bits that lie in them, in order. No fingerprints: compare the groups entry by entry."""

    depth: Depth
    groups: Annotated[list[Prefix], msgspec.Meta(max_length=65_536)]
    fingerprints: bytes


class DiffReply(Frame, frozen=True, tag=17):
    """``base`` is the primary's newest record when the comparison began. ``equal``: roots were equal at exactly that
    record, nothing else to do. Else ``whole``: partitions that the secondary lacks; ``gone``: partitions the primary
    does not have; ``cells``: where each other partition differs. ``positions`` are those of the primary's own base
    record: where it stands as a secondary in another mode, which a DR secondary takes over. ``counts``: how many
    entries the primary has in each partition that travels; none if equal. The secondary's brake judges by them."""

    cluster_id: Name
    set_id: Name
    generation: Name
    epoch: Index
    epoch_id: Name
    base_index: Index
    base_hash: Hash
    equal: bool
    whole: list[Name]
    gone: list[Name]
    cells: dict[Name, Cells]
    positions: dict[Name, Position]
    counts: dict[Name, Index] = {}


class Extent(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The buckets of one partition (a place in the request's list) that begin with the ``depth`` bits ``prefix``, and
    the ids of all entries that the secondary has there."""

    partition: Index
    depth: Depth
    prefix: Prefix
    ids: bytes


class FetchRequest(Frame, frozen=True, tag=18):
    """Second round trip. ``final``: after the entries, send the records since the base and the guard."""

    base_index: Index
    base_hash: Hash
    final: bool
    salt: Salt
    partitions: list[Name]
    extents: list[Extent]
    selection: Partitions = EVERYTHING


class Entries(Frame, frozen=True, tag=19):
    """Entries by logical key, with their whole ciphertext; and by extent (its place in the request) those of its ids
    that the primary does not have: an entry there that still has such an id is to be deleted, unless this answer put it
    before. ``done`` extents of the request are complete with this frame."""

    puts: list[tuple[str, bytes]]
    dropped: list[tuple[Index, bytes]]
    done: Index


class Guard(Frame, frozen=True, tag=20):
    """The last frame of an answer to a fetch: everything asked for was sent. After a final fetch ``index`` is the last
    record sent, ``root`` the root and ``positions`` the primary's own positions at exactly that record; else the base
    again, zeros, and none."""

    index: Index
    chain_hash: Hash
    root: Digest
    positions: dict[Name, Position]


LogFrame = RecordFrame | Skip | PartFrame
FromPrimary = RecordFrame | Skip | PartFrame | CompleteUpTo | Heartbeat | Ask | Bye
FromSecondary = Ack | Heartbeat | Told | Bye
FromFetch = Entries | RecordFrame | Skip | PartFrame | Guard | Bye

_T = TypeVar("_T")
_ENCODER = msgspec.msgpack.Encoder()
_FROM_PRIMARY: msgspec.msgpack.Decoder[FromPrimary] = msgspec.msgpack.Decoder(FromPrimary)
_FROM_SECONDARY: msgspec.msgpack.Decoder[FromSecondary] = msgspec.msgpack.Decoder(FromSecondary)
_FROM_FETCH: msgspec.msgpack.Decoder[FromFetch] = msgspec.msgpack.Decoder(FromFetch)
_HELLO = msgspec.msgpack.Decoder(Hello)
_HELLO_REPLY = msgspec.msgpack.Decoder(HelloReply)
_DIFF_REQUEST = msgspec.msgpack.Decoder(DiffRequest)
_DIFF_REPLY = msgspec.msgpack.Decoder(DiffReply)
_FETCH_REQUEST = msgspec.msgpack.Decoder(FetchRequest)


def encode(frame: Frame) -> bytes:
    """The frame as it travels."""
    payload = _ENCODER.encode(frame)
    return zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "big") + payload


def _decode(decoder: msgspec.msgpack.Decoder[_T], raw: bytes, bytes_max: int = FRAME_BYTES_MAX) -> _T:
    if not CHECKSUM_BYTES < len(raw) <= bytes_max:
        raise ProtocolViolation(f"a frame of {len(raw)} bytes, allowed are up to {bytes_max}")
    payload = memoryview(raw)[CHECKSUM_BYTES:]
    if zlib.crc32(payload) != int.from_bytes(raw[:CHECKSUM_BYTES], "big"):
        raise ProtocolViolation("a frame's checksum does not match its bytes")
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # The decoder's own text may quote the payload, which belongs in no log.
        raise ProtocolViolation("a frame does not decode as any message allowed here") from None


def decode_from_primary(raw: bytes) -> FromPrimary:
    """What a secondary may receive after the hello. Raises ProtocolViolation, as all decoders here."""
    return _decode(_FROM_PRIMARY, raw)


def decode_from_secondary(raw: bytes) -> FromSecondary:
    """What a primary may receive after the hello."""
    return _decode(_FROM_SECONDARY, raw)


def decode_from_fetch(raw: bytes) -> FromFetch:
    """One frame of an answer to a fetch."""
    frame = _decode(_FROM_FETCH, raw, FETCH_FRAME_BYTES_MAX)
    if isinstance(frame, Guard):
        _check_positions(frame.positions.values())
    return frame


def decode_hello(raw: bytes) -> Hello:
    """The first frame on a stream, as the primary receives it."""
    hello = _decode(_HELLO, raw)
    _check_positions([hello.position] if hello.position is not None else [])
    return hello


def _check_positions(positions: Iterable[Position]) -> None:
    for position in positions:
        if len(position.chain_hash) != HASH_BYTES or not 0 <= position.index < 2**63:
            raise ProtocolViolation("a position in a message is malformed")


def decode_hello_reply(raw: bytes) -> HelloReply:
    """The first frame on a stream, as the secondary receives it."""
    reply = _decode(_HELLO_REPLY, raw)
    if reply.mode not in {"accept", "need-diff", "refuse"}:
        raise ProtocolViolation("the primary answered the hello with an unknown mode")
    _check_positions([one.fork for one in reply.history if one.fork is not None])
    return reply


def decode_diff_request(raw: bytes) -> DiffRequest:
    """The body of a diff request."""
    return _decode(_DIFF_REQUEST, raw, DIFF_BYTES_MAX)


def decode_diff_reply(raw: bytes) -> DiffReply:
    """The body of the answer to a diff request."""
    reply = _decode(_DIFF_REPLY, raw, DIFF_BYTES_MAX)
    _check_positions(reply.positions.values())
    return reply


def decode_fetch_request(raw: bytes) -> FetchRequest:
    """The body of a fetch request."""
    return _decode(_FETCH_REQUEST, raw, DIFF_BYTES_MAX)


def with_length(frame: bytes) -> bytes:
    """A frame inside an HTTP body: its length, four bytes, big-endian, goes before it."""
    return struct.pack(">I", len(frame)) + frame


class Unframer:
    """Cuts a byte stream of :func:`with_length` frames. Holds at most one frame and one chunk."""

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The frames that are complete now. Raises ProtocolViolation on a length over the limit, before its bytes."""
        self._buffer += chunk
        while len(self._buffer) >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
            if length > self._frame_bytes_max:
                raise ProtocolViolation(f"a frame of {length} bytes, allowed are up to {self._frame_bytes_max}")
            end = LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[LENGTH_BYTES:end])
            del self._buffer[:end]
            yield frame

    def end(self) -> None:
        """Call at the end of the body. Raises ProtocolViolation when a frame was cut."""
        if self._buffer:
            raise ProtocolViolation("the answer ended in the middle of a frame")
