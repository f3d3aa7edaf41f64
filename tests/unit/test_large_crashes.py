"""A node that dies at any step of a large batch, and again while it recovers: the batch is whole or not at all."""

import asyncio
import itertools

import pytest

from consul_backend.errors import BackendError, PermissionDenied
from consul_backend.failpoint import LARGE_POINTS, POINTS, FailpointHit, arm, disarm
from consul_backend.limits import Limits
from consul_backend.recovery import recover
from consul_backend.replicated import ReplicatedStore, StoreOptions
from consul_backend.wal import Record, Write
from tests.support.store import GENERATION, PARTITION, key, memory_cluster

OPTIONS = StoreOptions(segment_records=8, wal_keep_records=8, resolve_timeout_s=2.0, flush_interval_s=3600)
SMALL = Limits(ops_max=8, body_bytes_max=48 * 1024, value_bytes_max=16 * 1024)
OLD = {f"k{n}": b"old" for n in range(20)}
NEW = {**{f"k{n}": b"new" * 80 for n in range(10, 130)}, "k3": None, "big": b"v" * 60_000}
RECOVERY = [*(point for point in POINTS if point.startswith("recovery:")), *LARGE_POINTS]


@pytest.fixture
async def cluster():
    async with memory_cluster(SMALL) as made:
        yield made
    disarm()


def merged(before, changes):
    return {name: value for name, value in {**before, **changes}.items() if value is not None}


async def contents(store):
    names = await store.list(f"r/{PARTITION}/")
    return {name: await store.get(key(name)) for name in names}


async def run_until_crash(store: ReplicatedStore, work) -> bool:
    """Whether ``work`` or the store died of a failpoint. What the caller is told does not matter here."""
    running = asyncio.create_task(store.run())
    working = asyncio.create_task(work())
    await asyncio.wait({running, working}, return_when=asyncio.FIRST_COMPLETED)
    crashed = running.done()
    if not crashed:
        rolled = asyncio.create_task(store.rolled())
        await asyncio.wait({running, rolled}, return_when=asyncio.FIRST_COMPLETED)
        crashed = running.done()
        rolled.cancel()
    running.cancel()
    working.cancel()
    ended = await asyncio.gather(running, working, return_exceptions=True)
    if crashed:
        assert isinstance(ended[0], BaseExceptionGroup)
        assert ended[0].subgroup(FailpointHit) is not None
    return crashed


async def recover_through(cluster, points):
    """Recover, dying at each of ``points`` that is on the way."""
    died = []
    for point in points:
        arm(f"{point}=raise")
        try:
            store = await cluster.recover(OPTIONS)
        except FailpointHit:
            died.append(point)
        else:
            disarm()
            return store, died
        disarm()
    return await cluster.recover(OPTIONS), died


async def begin(cluster, point, hit, *, flush):
    """A tenure that dies at ``point``; whether it was reached, and whether a caller was told *done*."""
    acknowledged = []
    store = await cluster.recover(OPTIONS)

    async def work():
        await store.commit([Write(key(name), value) for name, value in OLD.items()][:7])
        await asyncio.gather(*[store.commit([Write(key(name), value)]) for name, value in OLD.items()])
        if "abort" in point:
            cluster.physical.fault = refuse_commit_record
        arm(f"{point}=raise:{hit}")
        try:
            large = asyncio.create_task(store.commit([Write(key(name), value) for name, value in NEW.items()]))
            while not large.done():
                await store.commit([Write(key("small", "l"), b"x")])
                if flush:
                    await store._flusher.flush()
            await large
            acknowledged.append(True)
        except BackendError:
            pass

    crashed = await run_until_crash(store, work)
    cluster.physical.fault = lambda ops: None
    disarm()
    return crashed, bool(acknowledged)


def refuse_commit_record(ops):
    value = getattr(ops[-1], "value", None)
    if value and "/wal/" in ops[-1].key and Record.decode(value).header.kind == "commit":
        return PermissionDenied("no right")
    return None


@pytest.mark.parametrize("flush", [False, True], ids=["no-checkpoint", "checkpoints"])
@pytest.mark.parametrize("hit", [1, 2, 3])
@pytest.mark.parametrize("point", [point for point in LARGE_POINTS if point != "large:recovered"])
async def test_a_crash_at_any_step_leaves_the_old_or_the_new(cluster, point, hit, flush):
    crashed, acknowledged = await begin(cluster, point, hit, flush=flush)
    once = point in {"large:before-commit", "large:after-commit", "large:before-abort", "large:after-abort"}
    assert crashed == (hit == 1 or not once), f"{point} was not reached {hit} times"
    store = await cluster.recover(OPTIONS)
    await cluster.check(store, whole_log=False)
    found = await contents(store)
    assert found in (OLD, merged(OLD, NEW))
    if acknowledged or point in {"large:after-commit", "large:before-roll", "large:after-roll", "large:after-chunk"}:
        assert found == merged(OLD, NEW)
    if "abort" in point or (crashed and point in {"large:after-part", "large:before-commit"}):
        assert found == OLD
    assert (await cluster.records())[-1].header.large is None or store._large._open is None


@pytest.mark.parametrize("point", ["large:after-part", "large:after-roll"])
@pytest.mark.parametrize("again", list(itertools.permutations(RECOVERY, 2)))
async def test_crashes_during_the_recovery_of_a_crash_change_nothing(cluster, point, again):
    await begin(cluster, point, 2, flush=again[0] < again[1])
    store, died = await recover_through(cluster, [*again, *again])
    await cluster.check(store, whole_log=False)
    assert await contents(store) == (OLD if point == "large:after-part" else merged(OLD, NEW))
    if point != "large:after-part" and again[0] == "large:recovered":
        assert died[:1] == ["large:recovered"]


async def test_recovery_may_begin_inside_a_batch_that_was_voided(cluster):
    """Small writes between the parts of one big value keep their leaves dirty while older ones are flushed: then the
    redo point lies between the parts. It does so at each of them here."""
    store = await cluster.recover(OPTIONS)

    async def work():
        arm("large:after-part=raise:6")
        large = asyncio.create_task(store.commit([Write(key("big"), b"v" * 400_000)]))
        try:
            for number in itertools.count():
                await store.commit([Write(f"r/partition-{number}/x", b"1")])
        finally:
            await asyncio.gather(large, return_exceptions=True)

    assert await run_until_crash(store, work)
    disarm()
    store = await cluster.recover(OPTIONS)
    records = await cluster.records()
    continued = {one.index for one in records if one.header.large is not None and one.header.large.continued}
    begun: set[int] = set()
    while await store._flusher.flush():
        begun.add(store._flusher.redo_from)
        tenure = cluster.tenure
        found = await recover(cluster.inner, GENERATION, tenure, OPTIONS.segment_records)
        assert found.forest.root("r") == store.forest.root("r")
    assert len([index for index in continued if index - 1 in begun]) > 2, "the redo point never lay between two parts"
    await cluster.check(await cluster.recover(OPTIONS))


@pytest.mark.parametrize("point", ["large:after-part", "large:after-roll"])
async def test_recovery_from_a_checkpoint_finds_batches_in_progress(cluster, point):
    """The checkpoint names them, so that recovery reads their first part although no dirty leaf needs it."""
    store = await cluster.recover(OPTIONS)

    async def work():
        await store.commit([Write(key(name), value) for name, value in OLD.items()][:5])
        arm(f"{point}=raise:6")  # late enough for a flush between two parts
        large = asyncio.create_task(store.commit([Write(key(name), value) for name, value in NEW.items()]))
        while not large.done():
            await store.commit([Write(key("small", "l"), b"x")])
            await store._flusher.flush_all()
        await large

    assert await run_until_crash(store, work)
    checkpoint = store._flusher.checkpoint
    assert checkpoint is not None
    assert checkpoint.batches
    assert checkpoint.scan_from <= checkpoint.batches[0] < checkpoint.redo_from
    again = await cluster.recover(OPTIONS)
    await cluster.check(again, whole_log=False)
    found = await contents(again)
    assert ("k100" in found) == (point == "large:after-roll")


async def test_which_commit_records_need_parts_of_older_segments_is_known_again(cluster):
    """From the checkpoint: the commit record itself is not read any more."""
    async with cluster.running(OPTIONS) as store:
        await store.commit([Write(key(name), value) for name, value in NEW.items()])
        await store.rolled()
        await store.flush()
        crossings = dict(store._crossings)
    assert crossings
    assert (await cluster.recover(OPTIONS))._crossings == crossings
