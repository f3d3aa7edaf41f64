"""Large batches from one replicated store to another: over the stream, over a sync, and through cuts and crashes."""

import asyncio
import os
from contextlib import asynccontextmanager

import pytest

from consul_backend.limits import Limits
from consul_backend.replicated import StoreOptions
from consul_backend.wal import Write
from sidecar.replication import protocol as wire
from sidecar.replication.answers import answer_diff, answer_fetch
from sidecar.replication.applier import Applier, ApplierOptions
from sidecar.replication.committer import stored_position
from sidecar.replication.hello import Identity, Source
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.selection import partitions
from sidecar.replication.shipped import Shipped
from sidecar.replication.shipper import Shipper, ShipperOptions
from sidecar.replication.staging import Staging
from sidecar.replication.states import Event
from sidecar.replication.sync import Syncer
from tests.support.replication import channel_pair
from tests.support.store import GENERATION, PARTITION, Cluster, key, memory_cluster

QUIET = StoreOptions(segment_records=8, flush_interval_s=3600, collect_interval_s=3600)
SOURCE = Source("primary", "set", GENERATION, 1, "epoch")
SMALL = Limits(ops_max=8, body_bytes_max=48 * 1024, value_bytes_max=16 * 1024)


class Pair:
    """A primary's store and a secondary's, running, and one stream at a time between them."""

    def __init__(self, primary, secondary, clock) -> None:
        self.primary, self.secondary = primary, secondary
        self.shipper = Shipper(PERFORMANCE, primary, SOURCE, ShipperOptions(beat_s=0.05, silent_beats_max=400), clock)
        self.applied: list[str] = []
        self.gates: list[object] = []
        self.clock = clock

    async def _on_applied(self, keys) -> None:
        self.applied += keys

    def applier(self, limits: Limits) -> Applier:
        return Applier(
            PERFORMANCE,
            self.secondary,
            stored_position(self.secondary, PERFORMANCE),
            self._on_applied,
            self.clock,
            ApplierOptions(beat_s=0.05, silent_beats_max=400, limits=limits),
            identity=Identity("second", "store", "set", 1, "epoch"),
        )

    async def sync(self, limits: Limits, staging: Staging | None = None):
        async def ask(request):
            return await answer_diff(self.primary, SOURCE, request, mode=PERFORMANCE, hold_as="second")

        async def fetch(request):
            async for chunk in answer_fetch(self.primary, request, mode=PERFORMANCE):
                yield chunk

        syncer = Syncer(
            PERFORMANCE,
            self.secondary,
            ask,
            fetch,
            on_applied=self._on_applied,
            gate=self.gates.append,
            on_event=lambda event: None,
            clock=self.clock,
            limits=limits,
            staging=staging,
        )
        return await syncer.run()

    @asynccontextmanager
    async def streaming(self, limits: Limits, tamper=None):
        """A stream, until the end of the block; yields the applier and our end's channel."""
        ours, theirs = channel_pair()
        if tamper is not None:
            ours.tamper = tamper
        applier = self.applier(limits)

        async def serve():
            return await self.shipper.serve(ours, wire.decode_hello(await ours.recv()))

        tasks = [asyncio.create_task(serve()), asyncio.create_task(applier.run(theirs))]
        try:
            yield applier
        finally:
            await ours.close("over")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def same(self) -> None:
        await self.primary.rolled()
        await self.secondary.rolled()
        assert self.primary.forest.root("r") == self.secondary.forest.root("r")


@asynccontextmanager
async def pair_of(primary: Cluster, secondary: Cluster, options=QUIET):
    async with primary.running(options) as ours, secondary.running(options) as theirs:
        yield Pair(ours, theirs, primary.clock)


@pytest.fixture
async def clusters():
    async with memory_cluster() as primary, memory_cluster(SMALL) as secondary:
        yield primary, secondary


async def test_a_batch_that_is_one_commit_here_is_a_large_one_there(clusters):
    async with pair_of(*clusters) as pair:
        assert (await pair.sync(SMALL)).event is Event.EQUAL
        async with pair.streaming(SMALL) as applier:
            head = await pair.primary.commit([Write(key(f"k{n}"), b"v" * 2000) for n in range(60)])
            assert await applier.wait_applied(head.index, 120)
        await pair.same()
        assert pair.secondary.statistics()["large_batches"] == 1
        await clusters[1].check(pair.secondary)


async def test_large_batches_travel_whole_between_small_ones(clusters):
    big = os.urandom(1_500_000)
    async with pair_of(*clusters) as pair:
        await pair.sync(SMALL)
        mixes: list[set[str]] = []
        async with pair.streaming(SMALL) as applier:
            large = asyncio.create_task(
                pair.primary.commit(
                    [Write(key("big"), big), Write(key("local", "l"), b"x"), Write(key("gone"), None)]
                    + [Write(key(f"many/{n}"), b"1" * 100) for n in range(5000)]
                )
            )
            while not large.done():
                await pair.primary.commit([Write(key("small"), os.urandom(4))])
                found = await pair.secondary.list(f"r/{PARTITION}/many/")
                mixes.append({str(len(found))})
            head = await large
            while not await applier.wait_applied(head.index, 0.01):
                mixes.append({str(len(await pair.secondary.list(f"r/{PARTITION}/many/")))})
            mixes.append({str(len(await pair.secondary.list(f"r/{PARTITION}/many/")))})
        assert set().union(*mixes) <= {"0", "5000"}
        assert mixes[-1] == {"5000"}
        assert await pair.secondary.get(key("big")) == big
        assert await pair.secondary.get(key("local", "l")) is None
        await pair.same()
        await clusters[1].check(pair.secondary)


async def test_a_large_batch_is_stripped_of_what_a_filter_withholds(clusters):
    sent, withheld = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"
    selection = partitions([sent])
    secret = b"secret" * 50_000
    async with pair_of(*clusters) as pair:
        await pair.sync(SMALL)
        pair.shipper = Shipper(
            PERFORMANCE,
            pair.primary,
            SOURCE,
            ShipperOptions(beat_s=0.05, silent_beats_max=400),
            pair.clock,
            select=lambda secondary_id: selection,
        )
        frames: list[bytes] = []

        def tamper(frame: bytes) -> list[bytes]:
            frames.append(frame)
            return [frame]

        async with pair.streaming(SMALL, tamper) as applier:
            head = await pair.primary.commit(
                [Write(f"r/{withheld}/big", secret), Write(f"r/{sent}/big", os.urandom(300_000)), Write(key("x"), b"1")]
            )
            assert await applier.wait_applied(head.index, 120)
            await pair.primary.commit([Write(f"r/{withheld}/small", b"secret")])
            after = await pair.primary.commit([Write(f"r/{sent}/small", b"2"), Write(f"r/{withheld}/small", b"secret")])
            assert await applier.wait_applied(after.index, 120)
        assert not any(b"secret" in frame for frame in frames)
        for name in (f"r/{sent}/big", f"r/{sent}/small", key("x")):
            assert await pair.secondary.get(name) == await pair.primary.get(name) is not None
        assert pair.secondary.forest.count("r", withheld) == 0
        shipped = [Shipped(store.forest, ("r",), selection).root() for store in (pair.primary, pair.secondary)]
        assert shipped[0] == shipped[1]


@pytest.mark.parametrize("cut_at", [1, 2, 4])
async def test_a_batch_cut_between_its_parts_is_asked_for_again(clusters, cut_at):
    async with pair_of(*clusters) as pair:
        await pair.sync(SMALL)
        before = stored_position(pair.secondary, PERFORMANCE)
        sent = 0

        def tamper(frame: bytes) -> list[bytes]:
            nonlocal sent
            with_part = len(frame) > 5000
            sent += with_part
            return [] if with_part and sent >= cut_at else [frame]

        head = await pair.primary.commit([Write(key(f"k{n}"), b"v" * 3000) for n in range(400)])
        async with pair.streaming(SMALL, tamper) as applier:
            assert not await applier.wait_applied(head.index, 0.3)
        assert await pair.secondary.list(f"r/{PARTITION}/") == []
        position = stored_position(pair.secondary, PERFORMANCE)
        assert position is not None
        assert before is not None
        assert position.index < head.index
        async with pair.streaming(SMALL) as applier:
            assert await applier.wait_applied(head.index, 120)
        await pair.same()


async def test_a_sync_within_the_staging_bound_needs_no_gate(clusters):
    async with pair_of(*clusters) as pair:
        await pair.primary.commit([Write(key(f"k{n}"), b"old") for n in range(300)])
        await pair.sync(SMALL)
        await pair.secondary.rolled()
        pair.gates.clear()
        await pair.primary.commit([Write(key(f"k{n}"), b"new" * 100) for n in range(250)])
        await pair.primary.commit([Write(key("big"), b"v" * 2_500_000), Write("r/core/keyring", b"newer")])
        seen: set[bytes | None] = set()
        syncing = asyncio.create_task(pair.sync(SMALL))
        while not syncing.done():
            seen.add(await pair.secondary.get(key("k0")))
            found = [await pair.secondary.get(key(f"k{n}")) for n in (1, 249)]
            assert found in ([b"old"] * 2, [b"new" * 100] * 2) or found[0] == b"old"
            await asyncio.sleep(0)
        result = await syncing
        assert (result.event, result.keys) == (Event.SYNCED, 252)
        assert pair.gates == [None]
        assert b"old" in seen
        assert pair.applied[-252] == "r/core/keyring"
        await pair.same()
        pair.gates.clear()
        await pair.primary.commit([Write(key(f"k{n}"), b"more" * 10) for n in range(250)])
        assert (await pair.sync(SMALL, Staging(entries_max=100))).event is Event.SYNCED
        assert any(gate is not None for gate in pair.gates)
        await pair.same()


@asynccontextmanager
async def dying(store):
    """A running store that may die inside the block."""
    running = asyncio.create_task(store.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_secondary_that_restarts_in_the_middle_has_the_old_or_the_new(clusters):
    primary, secondary = clusters
    async with primary.running(QUIET) as ours:
        theirs = await secondary.recover(QUIET)
        async with dying(theirs):
            pair = Pair(ours, theirs, primary.clock)
            await pair.sync(SMALL)
            head = await ours.commit([Write(key(f"k{n}"), b"v" * 300) for n in range(2000)])
            async with pair.streaming(SMALL):
                while not theirs.statistics()["large_parts"]:  # noqa: ASYNC110  # nothing announces this step
                    await asyncio.sleep(0)
                crashed_at = stored_position(theirs, PERFORMANCE)
                await secondary.depose()
        async with secondary.running(QUIET) as theirs:
            assert await theirs.list(f"r/{PARTITION}/") in ([], sorted(f"k{n}" for n in range(2000)))
            assert theirs.statistics()["large_overlay_entries"] == 0
            assert crashed_at is not None
            pair = Pair(ours, theirs, primary.clock)
            async with pair.streaming(SMALL) as applier:
                assert await applier.wait_applied(head.index, 120)
            await pair.same()
            await secondary.check(theirs)


async def test_5_mb_and_20000_entries_through_replication_on_consul(consul_store_factory, consul_path):
    primary = Cluster(await consul_store_factory())
    secondary = Cluster(await consul_store_factory(path=f"{consul_path}second/"))
    for cluster in (primary, secondary):
        await cluster.genesis()
    big = os.urandom(5_000_000)
    try:
        async with pair_of(primary, secondary) as pair:
            limits = secondary.inner.limits
            await pair.sync(limits)
            async with pair.streaming(limits) as applier:
                await pair.primary.commit([Write(key("big"), big)])
                head = await pair.primary.commit([Write(key(f"many/{n}"), b"%d" % n) for n in range(20_000)])
                assert await applier.wait_applied(head.index, 300)
                assert await pair.secondary.get(key("big")) == big
                assert len(await pair.secondary.list(f"r/{PARTITION}/many/")) == 20_000
            await pair.same()
            assert await pair.secondary.get(key("big")) == big
    finally:
        for cluster in (primary, secondary):
            if cluster.tenure is not None:
                await cluster.inner.destroy_session(cluster.tenure.session)
