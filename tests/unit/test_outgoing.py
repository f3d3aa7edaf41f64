"""Frames made once for many streams, and what a stream may have on its way."""

from __future__ import annotations

import asyncio
import random

import pytest

from consul_backend.clock import SystemClock
from consul_backend.limits import Limits
from consul_backend.position import Position
from sidecar.replication.hello import Identity, Source, hello_of
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.outgoing import SELECTIONS_MAX, SharedFrames, frames_of
from sidecar.replication.protocol import encode
from sidecar.replication.selection import EVERYTHING, partitions
from sidecar.replication.shipper import Shipper, ShipperOptions
from tests.support.replication import MemoryStore, channel_pair

SOURCE = Source("primary-cluster", "set", "generation", 1, "epoch-id")
MOUNT, OTHER = "0b8f2c1e-77aa-4d1c-9d0e-2f6f3a5f9a10", "1b8f2c1e-77aa-4d1c-9d0e-2f6f3a5f9a10"


def some_log(seed: int, records: int = 60) -> MemoryStore:
    store, dice = MemoryStore(), random.Random(seed)
    for number in range(records):
        where = dice.choice([f"r/{MOUNT}", f"r/{OTHER}", "l/token", "c/core", "r/policy"])
        store.write((f"{where}/{number}", dice.randbytes(dice.randint(1, 2000))))
    return store


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mode", [PERFORMANCE, DR])
@pytest.mark.parametrize("bytes_max", [0, 5_000, 10**9])
def test_what_is_shared_is_what_would_have_been_made(seed: int, mode: Mode, bytes_max: int) -> None:
    """For streams with several selections that read in chunks of any size, in any order."""
    log, dice = some_log(seed).log, random.Random(seed)
    shared = SharedFrames(mode.classes, bytes_max)
    for _ in range(60):
        selection = dice.choice([EVERYTHING, partitions([MOUNT]), partitions([OTHER]), partitions([])])
        start = dice.randrange(len(log))
        records = log[start : start + dice.randint(1, 20)]
        made = list(shared.of(records, selection))
        expected = frames_of(records, mode.classes, selection)
        assert [(out.raw, out.last) for out in made] == [(encode(frame), last) for frame, last in expected]
        assert shared._bytes == sum([len(raw) for raw in shared._frames.values()]) <= bytes_max


def test_fifty_streams_cost_one_encoding_and_selections_are_bounded() -> None:
    log = some_log(1).log
    shared = SharedFrames(("r",))
    for _ in range(50):
        frames = list(shared.of(log, EVERYTHING))
    assert shared.encoded == sum([out.record is not None for out in frames]) > 20
    for number in range(SELECTIONS_MAX + 10):
        list(shared.of(log[:2], partitions([str(number)])))
    assert len(shared._numbers) <= SELECTIONS_MAX


@pytest.mark.parametrize("bounded", [True, False])
async def test_a_peer_that_reads_nothing_has_no_more_than_its_window_on_the_way(bounded: bool) -> None:
    """On a channel that takes everything. The control has no window, and everything piles up."""
    store = MemoryStore()
    options = ShipperOptions() if bounded else ShipperOptions(window_bytes=10**12, window_records=10**9)
    shipper = Shipper(PERFORMANCE, store, SOURCE, options, SystemClock())
    ours, theirs = channel_pair()
    position = Position("set", "generation", 1, store.head.index, store.head.chain_hash)
    identity = Identity("eu", "store-id", "set", 1, "epoch-id")
    serving = asyncio.create_task(shipper.serve(ours, hello_of(identity, position, Limits())))
    value = bytes(100_000)
    for number in range(200):
        store.write((f"r/m/{number % 10}", value))
        await asyncio.sleep(0)
    while not bounded and shipper.peers["eu"].progress.sent < store.head.index:  # noqa: ASYNC110 - counters have no event
        await asyncio.sleep(0)
    for _ in range(1000):
        await asyncio.sleep(0)
    on_the_way = sum([len(frame) for frame in theirs._frames._queue if frame])
    progress = shipper.peers["eu"].progress
    assert progress is not None
    if bounded:
        assert 0 < on_the_way <= options.window_bytes + 2 * len(value)
        assert progress.sent < store.head.index
    else:
        assert on_the_way > 200 * len(value)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
