"""The wire: what is encoded comes back, and nothing else gets in."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.limits import Limits
from consul_backend.position import Position
from sidecar.replication import protocol as wire
from sidecar.replication.hello import Identity, LogFacts, Source, answer_hello, contradicts_log, fork_problem, hello_of

HASH = bytes(range(32))
DIGEST = bytes(20)
SOURCE = Source("cluster", "set", "generation", 3, "epoch-id")

FROM_PRIMARY = [
    wire.RecordFrame(b"raw"),
    wire.Skip(4, 9, HASH, HASH),
    wire.CompleteUpTo(9, HASH, DIGEST, 1_700_000_000_000),
    wire.Heartbeat(1, 2, 3, 4, "https://a:8200", ("https://a:8201",)),
    wire.Bye("closing", "why"),
]
FROM_SECONDARY = [wire.Ack(9, 8), FROM_PRIMARY[3], FROM_PRIMARY[4]]
FROM_FETCH = [
    wire.Entries([("r/p/a", b"v")], [(0, b"8 bytes.")], 1),
    wire.Guard(9, HASH, DIGEST, {}),
    FROM_PRIMARY[0],
    FROM_PRIMARY[1],
    FROM_PRIMARY[4],
]
HELLO = hello_of(
    Identity("id", "store", "set", 3, "epoch-id"), Position("set", "generation", 3, 7, HASH), Limits(prefix_bytes=9)
)
REPLY = answer_hello(HELLO, SOURCE, LogFacts(9, HASH, HASH), Limits())
SALT = b"s" * 16
DIFF_REQUEST = wire.DiffRequest(SALT, DIGEST, {"p": wire.PartitionDigests(DIGEST, 1, bytes(16))})
DIFF_REPLY = wire.DiffReply(
    "c", "s", "g", 1, "e", 9, HASH, False, ["w"], ["x"], {"r/p": wire.Cells(4, [1], bytes(64))}, {}
)
FETCH = wire.FetchRequest(9, HASH, True, SALT, ["p"], [wire.Extent(0, 0, 0, bytes(8)), wire.Extent(0, 4, 2, b"")])


@pytest.mark.parametrize(
    ("decode", "frames"),
    [
        (wire.decode_from_primary, FROM_PRIMARY),
        (wire.decode_from_secondary, FROM_SECONDARY),
        (wire.decode_from_fetch, FROM_FETCH),
        (wire.decode_hello, [HELLO]),
        (wire.decode_hello_reply, [REPLY]),
        (wire.decode_diff_request, [DIFF_REQUEST]),
        (wire.decode_diff_reply, [DIFF_REPLY]),
        (wire.decode_fetch_request, [FETCH]),
    ],
)
def test_every_frame_comes_back_and_only_where_its_side_may_send_it(decode, frames):
    everything = [*FROM_PRIMARY, *FROM_SECONDARY, *FROM_FETCH, HELLO, REPLY, DIFF_REQUEST, DIFF_REPLY, FETCH]
    for frame in everything:
        if type(frame) in {type(allowed) for allowed in frames}:
            assert decode(wire.encode(frame)) == frame
        else:
            with pytest.raises(wire.ProtocolViolation):
                decode(wire.encode(frame))


@given(st.sampled_from([*FROM_PRIMARY, *FROM_FETCH]), st.data())
def test_any_changed_byte_is_refused(frame, data):
    raw = bytearray(wire.encode(frame))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    for decode in (wire.decode_from_primary, wire.decode_from_fetch):
        with pytest.raises(wire.ProtocolViolation):
            decode(bytes(raw))


@given(st.binary(max_size=300))
def test_noise_is_refused(noise):
    for payload in (noise, zlib.crc32(noise).to_bytes(4, "big") + noise):
        for decode in (wire.decode_from_primary, wire.decode_hello, wire.decode_fetch_request):
            try:
                decode(payload)
            except wire.ProtocolViolation:
                continue


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=40), st.lists, max_leaves=12))
def test_well_formed_nonsense_is_refused_or_a_message(value):
    payload = msgspec.msgpack.encode(value) if _fits(value) else b"\xc0"
    with pytest.raises(wire.ProtocolViolation):
        wire.decode_hello(zlib.crc32(payload).to_bytes(4, "big") + payload)


def _fits(value):
    if isinstance(value, list):
        return all(map(_fits, value))
    return not isinstance(value, int) or -(2**63) <= value < 2**63


@pytest.mark.parametrize(
    "payload",
    [
        b"\x92\x10\xdf" + struct.pack(">I", 10**9),  # a map of a billion entries
        b"\x92\x03\xc6" + struct.pack(">I", 2**31),  # bytes of two gibibytes
        b"\x94\x13\xdd" + struct.pack(">I", 2**32 - 1),  # an array of four billion
        b"\x91" * 100_000,  # deep nesting
        b"\x92\xcc\xff\x01",  # an unknown type
    ],
)
def test_a_length_that_lies_costs_nothing(payload):
    raw = zlib.crc32(payload).to_bytes(4, "big") + payload
    tracemalloc.start()
    try:
        for decode in (wire.decode_from_primary, wire.decode_from_fetch, wire.decode_diff_request):
            with pytest.raises(wire.ProtocolViolation):
                decode(raw)
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024
    finally:
        tracemalloc.stop()


def test_26_control_a_reader_that_believes_the_length_allocates_it():
    believed = 256 * 1024 * 1024
    tracemalloc.start()
    try:
        bytearray(struct.unpack(">I", struct.pack(">I", believed))[0])
        assert tracemalloc.get_traced_memory()[1] >= believed, "what the bound of the test above would notice"
    finally:
        tracemalloc.stop()


def test_frames_over_the_limit_are_refused():
    with pytest.raises(wire.ProtocolViolation, match="allowed are up to"):
        wire.decode_from_primary(wire.encode(wire.RecordFrame(bytes(wire.FRAME_BYTES_MAX))))


def test_fields_have_bounds():
    for frame in (
        wire.Skip(-1, 2, HASH, HASH),
        wire.Skip(1, 2, HASH, b"short"),
        wire.Skip(1, 2, b"short", HASH),
        wire.CompleteUpTo(1, HASH, b"", 1),
        wire.Heartbeat(1, 0, 0, 1, "x" * 2000, ()),
        wire.Heartbeat(1, 0, 0, 1, "", ("x",) * 65),
    ):
        with pytest.raises(wire.ProtocolViolation):
            wire.decode_from_primary(wire.encode(frame))
    with pytest.raises(wire.ProtocolViolation):
        wire.decode_hello(wire.encode(msgspec.structs.replace(HELLO, position=Position("s", "g", 1, 1, b"short"))))
    with pytest.raises(wire.ProtocolViolation):
        wire.decode_hello_reply(wire.encode(msgspec.structs.replace(REPLY, mode="maybe")))


@given(st.lists(st.binary(min_size=5, max_size=40), max_size=8), st.integers(1, 30))
def test_unframer_cuts_where_the_sender_did(frames, chunk_bytes):
    body = b"".join(map(wire.with_length, frames))
    unframer = wire.Unframer()
    found = [frame for at in range(0, len(body), chunk_bytes) for frame in unframer.feed(body[at : at + chunk_bytes])]
    unframer.end()
    assert found == frames


def test_unframer_refuses_long_and_cut_frames():
    with pytest.raises(wire.ProtocolViolation):
        list(wire.Unframer(10).feed(struct.pack(">I", 2**31)))
    unframer = wire.Unframer()
    assert list(unframer.feed(wire.with_length(b"12345678")[:-1])) == []
    with pytest.raises(wire.ProtocolViolation, match="middle of a frame"):
        unframer.end()


# The hello: position against log.

AT_7 = Position("set", "generation", 3, 7, HASH)


@pytest.mark.parametrize(
    ("position", "facts", "mode", "word"),
    [
        (AT_7, LogFacts(9, HASH, HASH), "accept", ""),
        (None, LogFacts(9, HASH, HASH), "need-diff", "no position"),
        (wire.NONE_POSITION, LogFacts(9, HASH, None), "need-diff", "no position"),
        (AT_7, LogFacts(6, HASH, None), "need-diff", "after the primary's newest"),
        (AT_7, LogFacts(9, HASH, None), "need-diff", "no matching WALs available"),
        (AT_7, LogFacts(9, HASH, bytes(32)), "need-diff", "diverged"),
        (msgspec.structs.replace(AT_7, generation="old"), LogFacts(9, HASH, HASH), "need-diff", "another store"),
        (msgspec.structs.replace(AT_7, epoch=2), LogFacts(9, HASH, HASH), "need-diff", "another store or epoch"),
    ],
)
def test_hello(position, facts, mode, word):
    reply = answer_hello(msgspec.structs.replace(HELLO, position=position), SOURCE, facts, Limits())
    assert reply.mode == mode
    assert word in reply.reason
    denied = contradicts_log(msgspec.structs.replace(HELLO, position=position), SOURCE, facts)
    assert denied == (word in {"after the primary's newest", "diverged"})


@pytest.mark.parametrize(
    ("set_id", "epoch", "epoch_id", "word"),
    [
        ("set", 3, "epoch-id", ""),
        ("", 0, "", ""),
        ("set", 2, "older", ""),
        ("other", 3, "epoch-id", "another replication set"),
        ("set", 3, "twin", "fork"),
        ("set", 4, "newer", "older than the other cluster's"),
    ],
)
def test_forks_are_refused_by_both_ends(set_id, epoch, epoch_id, word):
    problem = fork_problem(set_id, epoch, epoch_id, SOURCE)
    assert (word in problem) if word else not problem
    hello = msgspec.structs.replace(HELLO, set_id=set_id, epoch=epoch, epoch_id=epoch_id)
    reply = answer_hello(hello, SOURCE, LogFacts(9, HASH, HASH), Limits())
    assert (reply.mode == "refuse") == bool(word)


def test_no_common_version_is_refused():
    reply = answer_hello(msgspec.structs.replace(HELLO, versions=(99,)), SOURCE, LogFacts(9, HASH, HASH), Limits())
    assert reply.mode == "refuse"
    assert "upgrade" in reply.reason
