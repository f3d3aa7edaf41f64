"""The checkpoint: what it pins, from where recovery reads, and that no other bytes pass for it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.checkpoint import (
    CHECKPOINT_VERSION,
    Checkpoint,
    CheckpointLeaf,
    _checksum,
    checkpoint_key,
    decode_checkpoint,
    encode_checkpoint,
)
from consul_backend.errors import Corrupt
from consul_backend.position import Position

numbers = st.integers(0, 2**40)
leaves = st.builds(
    CheckpointLeaf, st.sampled_from("rlc"), st.text(max_size=5), st.integers(0, 16), st.integers(0, 65535), numbers
)
positions = st.dictionaries(
    st.sampled_from(["performance", "dr"]),
    st.builds(
        Position, st.text(max_size=5), st.text(max_size=5), numbers, numbers, st.binary(min_size=32, max_size=32)
    ),
)
checkpoints = st.builds(
    Checkpoint,
    serial=numbers,
    epoch=numbers,
    head_index=st.integers(1, 1000),
    head_hash=st.binary(min_size=32, max_size=32),
    positions=positions,
    dirty=st.lists(leaves, max_size=5).map(tuple),
    extents=numbers,
    extents_sum=st.binary(min_size=16, max_size=16),
    segment_bytes=st.dictionaries(numbers, numbers, max_size=3),
    heads=numbers,
    heads_sum=st.binary(max_size=16),
    batches=st.lists(st.integers(1, 1000), max_size=3).map(tuple),
    crossings=st.dictionaries(numbers, numbers, max_size=3),
)


@given(checkpoints)
def test_it_comes_back_and_says_from_where_to_read(checkpoint: Checkpoint) -> None:
    assert decode_checkpoint("g1", encode_checkpoint("g1", checkpoint)) == checkpoint
    needed = [leaf.first for leaf in checkpoint.dirty] or [checkpoint.head_index + 1]
    assert checkpoint.redo_from == min(needed)
    assert checkpoint.scan_from == min([*needed, checkpoint.head_index, *checkpoint.batches])


@given(st.binary(max_size=60))
def test_noise_is_refused_by_name(raw: bytes) -> None:
    with pytest.raises(Corrupt, match="g/g1/checkpoint"):
        decode_checkpoint("g1", raw)


@given(checkpoints)
def test_one_of_another_generation_or_version_is_refused(checkpoint: Checkpoint) -> None:
    raw = encode_checkpoint("g1", checkpoint)
    with pytest.raises(Corrupt, match="checksum"):
        decode_checkpoint("g2", raw)
    _, body, checksum = msgspec.msgpack.decode(raw)
    newer = msgspec.msgpack.encode((CHECKPOINT_VERSION + 1, body, checksum))
    with pytest.raises(Corrupt, match=f"version {CHECKPOINT_VERSION + 1}"):
        decode_checkpoint("g1", newer)


@pytest.mark.parametrize("body", [b"\xc1", msgspec.msgpack.encode([1, 2]), msgspec.msgpack.encode("x")])
def test_a_body_of_another_form_under_a_right_checksum_is_refused(body: bytes) -> None:
    raw = msgspec.msgpack.encode((CHECKPOINT_VERSION, body, _checksum("g1", body)))
    with pytest.raises(Corrupt, match="malformed"):
        decode_checkpoint("g1", raw)


def test_the_stored_form_is_what_older_programs_wrote() -> None:
    """Version 1 is on disks: whatever changes these bytes needs another version."""
    checkpoint = Checkpoint(
        serial=1,
        epoch=2,
        head_index=9,
        head_hash=b"h" * 32,
        positions={},
        dirty=(CheckpointLeaf("r", "p", 3, 4, 5),),
        extents=6,
        extents_sum=b"s" * 16,
        segment_bytes={0: 100},
    )
    raw = encode_checkpoint("g1", checkpoint)
    assert checkpoint_key("g1") == "g/g1/checkpoint"
    assert raw.hex() == (
        "9301c44b9d010209c4206868686868686868686868686868686868686868686868686868686868686868809195a172a17003"
        "040506c4107373737373737373737373737373737381006400c4009080c410d51a89ec3f485770925ba25088a055ec"
    )
    assert (checkpoint.heads, checkpoint.heads_sum, checkpoint.batches, checkpoint.crossings) == (0, b"", (), {})
