"""F16: the log is collected while a secondary is slow, in simulated time. P13: nothing it still needs goes, within the
hard bound; beyond it the secondary is told, and never shown a hole."""

from __future__ import annotations

import asyncio
import random

import pytest

from consul_backend.replicated import ReplicatedStore, StoreOptions
from consul_backend.retention import HARD_FACTOR
from consul_backend.testing import SimulatedConsul
from consul_backend.testing_faults import Call, Journey
from consul_backend.txn import DeleteTree
from consul_backend.wal import Write
from consul_backend.wal_reader import RecordGone
from tests.sim.loop import NodeClock, SimLoop
from tests.support.store import GENERATION, Cluster, key

KEEP = 40
OPTIONS = StoreOptions(
    segment_records=8,
    wal_keep_records=KEEP,
    ring_records_max=4,
    flush_interval_s=0.5,
    collect_interval_s=0.5,
    resolve_timeout_s=5.0,
)


class Jittery:
    """Every call takes its time; some deletions of segments are answered late, when the next is due already."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def journey(self, call: Call) -> Journey:
        collects = any(isinstance(op, DeleteTree) for op in call.ops)
        late_s = 2.0 if collects and self._random.random() < 0.3 else 0.0
        return Journey(request_s=0.001, answer_s=0.001 + late_s)

    def connected(self, node: str) -> bool:
        return True


class Secondary:
    """Reads the log as the shipper does for it: in order, from where it was, and acknowledges what it has."""

    def __init__(self, store: ReplicatedStore) -> None:
        self.store = store
        self.at = store.head.index
        self.gone = 0
        store.hold("slow", self.at + 1)

    async def catch_up(self) -> None:
        """Read to the head, a few records at a time. Raises RecordGone."""
        while self.at < self.store.head.index:
            records = await self.store.records(self.at + 1, 5)
            assert [record.index for record in records] == list(range(self.at + 1, self.at + 1 + len(records)))
            assert records
            self.at = records[-1].index
            self.store.hold("slow", self.at + 1)


def stored_indexes(consul: SimulatedConsul) -> list[int]:
    """At one moment."""
    root = f"g/{GENERATION}/wal/"
    return [int(name) for segment in consul.names(root, False) for name in consul.names(root + segment, False)]


async def slow_secondary(loop: SimLoop, seed: int, behind_s: float) -> None:
    """20 writes a second; the secondary sleeps for ``behind_s`` each time, then reads what there is."""
    consul = SimulatedConsul(NodeClock(loop, rate=1.0, started_s=0.0), network=Jittery(seed), seed=seed)
    physical = consul.client("node")
    await physical.open()
    cluster = Cluster(physical)
    await cluster.genesis()
    hard = HARD_FACTOR * KEEP
    async with cluster.running(OPTIONS) as store:
        secondary = Secondary(store)
        stopped = asyncio.Event()

        async def write() -> None:
            for number in range(800):
                await store.commit([Write(key(f"k{number % 30}"), b"%d" % number)])
                await asyncio.sleep(0.05)
            stopped.set()

        writing = asyncio.create_task(write())
        while not stopped.is_set():
            await asyncio.sleep(behind_s)
            lag = store.head.index - secondary.at
            indexes = stored_indexes(consul)
            assert indexes == list(range(indexes[0], indexes[-1] + 1)), "a hole"
            if lag < hard:
                assert indexes[0] <= secondary.at + 1, "what a known secondary needs, within the hard bound"
            try:
                await secondary.catch_up()
            except RecordGone:
                assert lag >= hard, "gone too early"
                secondary.gone += 1
                secondary.at = store.head.index  # a merkle sync
                store.hold("slow", secondary.at + 1)
        await writing
        assert store.oldest_index > 100, "it was collected all the while"
        assert (secondary.gone > 0) == (behind_s * 20 > hard)
    consul.close()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("behind_s", [1.0, 6.0, 15.0])
def test_collection_and_a_slow_secondary(seed: int, behind_s: float) -> None:
    loop = SimLoop(seed, shuffle=True)
    try:
        loop.run_until_complete(slow_secondary(loop, seed, behind_s))
        assert loop.errors == []
    finally:
        loop.close()
