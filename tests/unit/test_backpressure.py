"""What waits, waits for a bounded time and leaves in time: fairness, full queues, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any

import pytest

from consul_backend.deadline import deadline, deadline_at, remaining_s, time_limit
from consul_backend.errors import DeadlinePassed, NotApplied, OutcomeUnknown, Overloaded
from consul_backend.limits import Limits, op_bytes
from consul_backend.replicated import ReplicatedStore, StoreOptions
from consul_backend.testing import SimulatedConsul
from consul_backend.testing_faults import Call, Journey
from consul_backend.txn import Cas, Op
from consul_backend.wal import Head, Write
from tests.sim.loop import NodeClock, SimLoop
from tests.support.eventually import eventually
from tests.support.store import Cluster, key, memory_cluster, ran

QUIET = StoreOptions(segment_records=8, resolve_timeout_s=2.0, flush_interval_s=3600, collect_interval_s=3600)
MIB = 2**20


# -- fairness, in simulated time

SECONDS_A_BYTE = 1 / (20 * MIB)
SECONDS_A_CALL = 0.001


class SlowServer:
    """One server that does one call after the other, each for a time that grows with its size."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._free_at_s = 0.0
        self.longest_s = 0.0

    def journey(self, call: Call) -> Journey:
        cost_s = SECONDS_A_CALL + SECONDS_A_BYTE * sum(op_bytes(op) for op in call.ops)
        self.longest_s = max(self.longest_s, cost_s)
        now_s = self._loop.time()
        self._free_at_s = max(self._free_at_s, now_s) + cost_s
        return Journey(request_s=self._free_at_s - now_s)

    def connected(self, node: str) -> bool:
        return True


def simulated(work: Coroutine[Any, Any, None], loop: SimLoop) -> None:
    """Run to the end in virtual time; whatever goes wrong on the way counts."""
    try:
        loop.run_until_complete(work)
        assert loop.errors == []
    finally:
        loop.close()


@pytest.mark.parametrize(
    "batch",
    [
        [Write(key(f"b{n}"), b"v" * 100_000) for n in range(330)],
        [Write(key("b"), b"v" * (32 * MIB))],
        [Write(key(f"b{n}"), b"v" * 100) for n in range(50_000)],
    ],
    ids=["330 values of 100 kB", "one value of 32 MiB", "50,000 small entries"],
)
def test_a_large_batch_delays_a_small_write_by_three_of_its_transactions_at_most(batch: list[Write]) -> None:
    loop = SimLoop(1, shuffle=False)
    server = SlowServer(loop)

    async def work() -> None:
        consul = SimulatedConsul(NodeClock(loop, rate=1.0, started_s=0.0), network=server, limits=Limits(ops_max=128))
        physical = consul.client("node")
        await physical.open()
        cluster = Cluster(physical)
        await cluster.genesis()
        waited: list[float] = []
        async with cluster.running(StoreOptions()) as store:
            await store.commit([Write(key("small", "l"), b"first")])
            alone_s = loop.time()
            await store.commit([Write(key("small", "l"), b"alone")])
            alone_s = loop.time() - alone_s
            large = asyncio.create_task(store.commit(batch))
            rolled = asyncio.create_task(_rolled(store, large))
            while not rolled.done():
                began_s = loop.time()
                await store.commit([Write(key("small", "l"), b"%d" % len(waited))])
                waited.append(loop.time() - began_s)
                await asyncio.sleep(0.05)
            await rolled
        assert large.done()
        assert len(waited) > 10
        assert server.longest_s < 0.04, "of one transaction"
        assert max(waited) <= 3 * server.longest_s + alone_s
        consul.close()

    simulated(work(), loop)


async def _rolled(store: ReplicatedStore, large: Awaitable[Head]) -> None:
    await large
    await store.rolled()


# -- bounded queues


async def test_full_queues_refuse_and_count() -> None:
    small = StoreOptions(segment_records=8, queue_batches_max=2, large_queue_max=1, resolve_timeout_s=2.0)
    async with memory_cluster() as cluster, cluster.running(small) as store:
        cluster.physical.gate.clear()
        commits = [asyncio.create_task(store.commit([Write(key(f"k{n}"), b"v")])) for n in range(6)]
        larges = [asyncio.create_task(store.commit([Write(key(f"l{n}"), b"v" * 400_000)])) for n in range(4)]
        await eventually(lambda: any(one.done() for one in commits) and any(one.done() for one in larges))
        cluster.physical.gate.set()
        outcomes = await asyncio.gather(*commits, *larges, return_exceptions=True)
        refused = [isinstance(outcome, Overloaded) for outcome in outcomes]
        statistics = store.statistics()
        assert statistics["commit_overloaded"] == sum(refused[:6]) > 0
        assert statistics["large_overloaded"] == sum(refused[6:]) > 0
        assert statistics["commit_queue"] == statistics["large_queue"] == statistics["commit_queue_bytes"] == 0
        await store.rolled()
        await cluster.check(store)


# -- deadlines


async def in_time(after_s: float, work: Coroutine[Any, Any, Head]) -> Head:
    with deadline(after_s):
        return await work


async def test_a_write_whose_deadline_passes_in_the_queue_is_never_applied() -> None:
    async with memory_cluster() as cluster, cluster.running(QUIET) as store:
        cluster.physical.gate.clear()
        first = asyncio.create_task(store.commit([Write(key("first"), b"1")]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        late = asyncio.create_task(in_time(0.02, store.commit([Write(key("late"), b"1")])))
        patient = asyncio.create_task(in_time(60.0, store.commit([Write(key("patient"), b"1")])))
        with pytest.raises(DeadlinePassed, match="nothing was written"):
            await late
        assert not first.done()
        cluster.physical.gate.set()
        await asyncio.gather(first, patient)
        assert await store.get(key("late")) is None
        assert store.statistics()["commit_overdue"] == 1
        with pytest.raises(DeadlinePassed):
            await in_time(0.0, store.commit([Write(key("late"), b"1")]))
        await cluster.check(store)


async def test_a_write_whose_deadline_passes_under_way_is_unknown_to_its_caller_only() -> None:
    async with memory_cluster() as cluster, cluster.running(QUIET) as store:
        cluster.physical.gate.clear()
        under_way = asyncio.create_task(in_time(0.05, store.commit([Write(key("k"), b"1")])))
        with pytest.raises(OutcomeUnknown, match="may have been applied"):
            await under_way
        cluster.physical.gate.set()
        await store.commit([Write(key("other"), b"1")])
        assert await store.get(key("k")) == b"1"
        assert store.statistics()["commit_overdue"] == 0
        await cluster.check(store)


@pytest.mark.parametrize("kind", ["part", "commit"])
async def test_a_large_batch_is_voided_at_its_deadline_unless_its_commit_record_was_sent(kind: str) -> None:
    async with memory_cluster() as cluster, cluster.running(QUIET) as store:

        def held(ops: Sequence[Op]) -> None:
            if isinstance(ops[-1], Cas) and kind.encode() in ops[-1].value:
                cluster.physical.gate.clear()

        cluster.physical.fault = held
        batch = [Write(key(f"b{n}"), b"v" * 100) for n in range(3000)]
        with pytest.raises((DeadlinePassed, OutcomeUnknown)) as caught:
            await in_time(2.0, store.commit(batch))  # all its parts are written in that time, on a busy machine too
        cluster.physical.fault = lambda ops: None
        cluster.physical.gate.set()
        await store.commit([Write(key("other"), b"1")])
        await store.rolled()
        if kind == "part":
            assert caught.type is DeadlinePassed
            assert await store.get(key("b0")) is None
            assert store.statistics()["large_overdue"] == 1
            assert store.statistics()["large_aborted"] == 1
        else:
            assert caught.type is OutcomeUnknown
            assert await store.get(key("b0")) == b"v" * 100
        await cluster.check(store)


async def test_a_large_batch_leaves_the_queue_at_its_deadline() -> None:
    async with memory_cluster() as cluster, cluster.running(QUIET) as store:
        cluster.physical.gate.clear()
        batches = [[Write(key(f"{name}{n}"), b"v") for n in range(200)] for name in "ab"]
        first = asyncio.create_task(store.commit(batches[0]))
        with pytest.raises(DeadlinePassed):
            await in_time(0.1, store.commit(batches[1]))
        cluster.physical.gate.set()
        await first
        await store.rolled()
        assert await store.get(key("b0")) is None
        await cluster.check(store)


async def test_a_large_batch_that_nobody_waits_for_is_voided() -> None:
    async with memory_cluster() as cluster, cluster.running(QUIET) as store:
        cluster.physical.gate.clear()
        begun = asyncio.Event()
        cluster.physical.fault = lambda ops: begun.set()
        gone = asyncio.create_task(store.commit([Write(key(f"b{n}"), b"v" * 100) for n in range(3000)]))
        await begun.wait()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        cluster.physical.gate.set()
        await store.rolled()
        assert await store.get(key("b0")) is None
        await cluster.check(store)


async def test_what_a_request_left_behind_is_not_bound_by_its_deadline() -> None:
    async with memory_cluster() as cluster, cluster.running(QUIET) as store:
        ended = asyncio.Event()

        async def behind() -> Head:
            await ended.wait()
            return await store.commit([Write(key("behind"), b"1")])

        with deadline(0.0):
            task = asyncio.create_task(behind())
            await asyncio.sleep(0)
        ended.set()
        await task


async def test_the_earlier_deadline_holds_and_ends_with_its_block() -> None:
    assert deadline_at() is None
    assert remaining_s() is None
    with deadline(10.0):
        outer = deadline_at()
        with deadline(20.0):
            assert deadline_at() == outer
        with deadline(5.0):
            assert (remaining_s() or 99.0) <= 5.0
        assert deadline_at() == outer
    assert deadline_at() is None


async def test_what_outlives_its_deadline_is_cancelled_after_a_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consul_backend.deadline.GRACE_S", 0.05)
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(TimeoutError):
        async with time_limit(0.01):
            await asyncio.Event().wait()
    assert asyncio.get_running_loop().time() - began_s >= 0.06


async def test_a_cancellation_from_elsewhere_passes_a_time_limit() -> None:
    begun = asyncio.Event()

    async def limited() -> None:
        async with time_limit(60.0):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(limited())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_time_limit_that_ended_the_block_leaves_the_task_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consul_backend.deadline.GRACE_S", 0.0)
    with pytest.raises(TimeoutError):
        async with time_limit(0.01):
            await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0

    async def of_its_own() -> None:
        async with time_limit(0.01):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("own") from None

    with pytest.raises(ValueError, match="own"):
        await of_its_own()
    assert task.cancelling() == 0


async def test_an_ended_tenure_says_not_applied_whatever_the_deadline() -> None:
    async with memory_cluster() as cluster:
        store = await cluster.recover(QUIET)
        async with ran(store):
            await store.commit([Write(key("k"), b"1")])
        with pytest.raises(NotApplied) as caught, deadline(10.0):
            await store.commit([Write(key("k"), b"2")])
        assert caught.type is NotApplied
