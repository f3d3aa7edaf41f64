"""Commits whose answers are lost, late, repeated or refused: each outcome is resolved, never guessed."""

import asyncio

import pytest

from consul_backend.batching import NeedsParts
from consul_backend.errors import (
    FenceLost,
    NotApplied,
    OutcomeUnknown,
    Overloaded,
    PermissionDenied,
    StoreWentBack,
    TooLarge,
    Unavailable,
)
from consul_backend.limits import Limits
from consul_backend.physical import LOCK_KEY
from consul_backend.position import Position
from consul_backend.replicated import StoreOptions
from consul_backend.txn import Cas, CheckIndex, CheckSession, Delete, Set
from consul_backend.wal import Write, record_key
from tests.support.eventually import eventually
from tests.support.store import GENERATION, OPTIONS, key, memory_cluster, ran

QUIET = StoreOptions(segment_records=8, resolve_timeout_s=2.0, flush_interval_s=3600, collect_interval_s=3600)


@pytest.fixture
async def cluster():
    async with memory_cluster() as made:
        yield made


def once(fate):
    """That fate for the next commit, then none."""
    left = [fate]

    def fault(ops):
        return left.pop() if left and isinstance(ops[-1], Cas) else None

    return fault


async def gather(store, *batches):
    commits = [store.commit(batch) for batch in batches]
    return await asyncio.gather(*commits, return_exceptions=True)


def the_one(group):
    """The single leaf of an exception group."""
    while isinstance(group, BaseExceptionGroup):
        assert len(group.exceptions) == 1, group.exceptions
        group = group.exceptions[0]
    return group


async def ending(store, *batches):
    """Commit concurrently while running; the batches' outcomes, and what ended the store."""
    running = asyncio.create_task(store.run())
    outcomes = await gather(store, *batches)
    with pytest.raises(BaseExceptionGroup) as ended:
        await running
    with pytest.raises(NotApplied):
        await store.commit([Write(key("later"), b"")])
    return outcomes, the_one(ended.value)


async def test_a_transaction_has_fence_chain_data_and_record(cluster):
    async with cluster.running(QUIET) as store:
        before = store.head
        head = await store.commit([Write(key("a b"), b"1"), Write(key("gone"), None)])
        assert head.index == before.index + 1
        fence, chain, put, delete, record = cluster.physical.txns[-1]
        tip = await cluster.inner.get(record_key(GENERATION, before.index, 8))
        assert fence == CheckSession(LOCK_KEY, store.tenure.session)
        assert chain == CheckIndex(tip.key, tip.modify_index)
        assert put == Set(f"g/{GENERATION}/d/r/0b8f2c1e/a_20b", b"1")
        assert delete == Delete(f"g/{GENERATION}/d/r/0b8f2c1e/gone")
        assert record.key == record_key(GENERATION, head.index, 8)
        assert record.index == 0
        await cluster.check(store)


async def test_one_in_flight_and_the_next_fills_up(cluster):
    async with cluster.running(QUIET) as store:
        cluster.physical.txns.clear()
        cluster.physical.gate.clear()
        first = asyncio.create_task(store.commit([Write(key("first"), b"")]))
        await eventually(lambda: len(cluster.physical.txns) == 1)
        others = [asyncio.create_task(store.commit([Write(key(f"k{n}"), b"")])) for n in range(130)]
        await eventually(lambda: store.statistics()["commit_queue"] == 130)
        assert len(cluster.physical.txns) == 1, "one transaction is in flight"
        assert store.statistics()["commit_queue"] == 130
        cluster.physical.gate.set()
        heads = await asyncio.gather(first, *others)
        assert [len(ops) for ops in cluster.physical.txns] == [4, 64, 64, 11]
        assert [head.index for head in heads] == [3] + [4] * 61 + [5] * 61 + [6] * 8
        assert store.statistics()["commit_queue_peak"] == 130
        await cluster.check(store)


@pytest.mark.parametrize("fate", ["lose-before", "lose-after", "twice", Unavailable("refused")])
async def test_a_lost_answer_is_resolved_by_the_same_transaction(cluster, fate):
    async with cluster.running(QUIET) as store:
        before = store.head.index
        cluster.physical.fault = once(fate)
        heads = await gather(store, [Write(key("a"), b"1")], [Write(key("b"), b"2")])
        assert [head.index for head in heads] == [before + 1, before + 1]
        assert (await store.commit([Write(key("c"), b"3")])).index == before + 2
        await cluster.check(store)


async def test_many_lost_answers_duplicate_and_lose_nothing(cluster):
    fates = ["lose-before", "lose-after", "twice", None, "lose-after", "lose-before", None]
    async with cluster.running(QUIET) as store:
        calls = iter(fates * 60)
        cluster.physical.fault = lambda ops: next(calls)
        for number in range(100):
            await store.commit([Write(key(f"k{number % 7}"), b"%d" % number)])
        records = await cluster.records()
        values = [write.value for record in records for write in record.writes()]
        assert values[1:] == [b"%d" % number for number in range(100)], "each exactly once, in order"
        await cluster.check(store)


async def test_a_late_request_of_an_unresolved_commit_ends_the_tenure_as_unknown(cluster):
    store = await cluster.recover(QUIET)
    cluster.physical.fault = lambda ops: "late"
    outcomes, ended = await ending(store, [Write(key("a"), b"1")])
    assert isinstance(outcomes[0], OutcomeUnknown)
    assert isinstance(ended, OutcomeUnknown)
    assert (await cluster.physical.land()).count(True) == 1, "the attempts carry one id: at most one lands"
    cluster.physical.fault = lambda ops: None
    again = await cluster.recover(QUIET)
    await cluster.check(again)
    assert await again.get(key("a")) == b"1"


async def test_a_late_request_of_a_deposed_tenure_never_lands(cluster):
    store = await cluster.recover(QUIET)
    cluster.physical.fault = lambda ops: "late"
    await ending(store, [Write(key("a"), b"1")])
    cluster.physical.fault = lambda ops: None
    again = await cluster.recover(QUIET)
    assert True not in await cluster.physical.land()
    assert await again.get(key("a")) is None
    await cluster.check(again)


async def test_unreachable_for_the_whole_time_is_not_applied_and_the_tenure_goes_on(cluster):
    async with cluster.running(QUIET) as store:
        cluster.physical.fault = lambda ops: Unavailable("refused")
        outcomes = await gather(store, [Write(key("a"), b"1")], [Write(key("b"), b"1")])
        assert [type(outcome) for outcome in outcomes] == [NotApplied, NotApplied]
        cluster.physical.fault = lambda ops: None
        await store.commit([Write(key("c"), b"1")])
        await cluster.check(store)


async def test_a_deposed_node_is_refused_by_the_store(cluster):
    store = await cluster.recover(QUIET)
    await cluster.depose()
    outcomes, ended = await ending(store, [Write(key("a"), b"1")], [Write(key("b"), b"1")])
    assert [type(outcome) for outcome in outcomes] == [NotApplied, NotApplied]
    assert isinstance(ended, FenceLost)
    assert store.tenure.session not in str(ended), "session ids are capabilities"
    with pytest.raises(FenceLost):
        await store.get(key("a"))


@pytest.mark.parametrize(("fate", "applied"), [("lose-after", True), ("lose-before", False)])
async def test_deposed_after_a_lost_answer_the_log_decides(cluster, fate, applied):
    store = await cluster.recover(QUIET)
    deposing = []

    def fault(ops):
        if not deposing:
            deposing.append(asyncio.get_running_loop().create_task(cluster.depose()))
            return fate
        return None

    cluster.physical.fault = fault
    async with RanToItsEnd(store):
        outcome = (await gather(store, [Write(key("a"), b"1")]))[0]
        assert (not isinstance(outcome, Exception)) if applied else isinstance(outcome, NotApplied)
        assert isinstance((await gather(store, [Write(key("b"), b"1")]))[0], NotApplied)
    cluster.physical.fault = lambda ops: None
    again = await cluster.recover(QUIET)
    assert await again.get(key("a")) == (b"1" if applied else None)
    await cluster.check(again)


class RanToItsEnd:
    """Run a store that is expected to end with FenceLost within the block."""

    def __init__(self, store):
        self.store = store

    async def __aenter__(self):
        self.running = asyncio.create_task(self.store.run())

    async def __aexit__(self, *exc):
        with pytest.raises(BaseExceptionGroup) as ended:
            await self.running
        assert isinstance(the_one(ended.value), FenceLost)


async def test_a_store_that_went_back_stops_everything(cluster):
    store = await cluster.recover(QUIET)
    newest = record_key(GENERATION, store.head.index, 8)
    item = await cluster.inner.get(newest)
    # As after a restored snapshot: the same record, but written by another transaction.
    await cluster.inner.txn([Delete(newest)])
    await cluster.inner.txn([Cas(newest, item.value, 0)])
    outcomes, ended = await ending(store, [Write(key("a"), b"1")])
    assert isinstance(ended, StoreWentBack)
    assert isinstance(outcomes[0], NotApplied)
    assert await cluster.inner.get(f"g/{GENERATION}/d/r/0b8f2c1e/a") is None


async def test_a_store_that_went_back_after_a_lost_answer_leaves_the_outcome_unknown(cluster):
    store = await cluster.recover(QUIET)
    where = record_key(GENERATION, store.head.index + 1, 8)
    fates = iter(["lose-before", None])
    await cluster.inner.txn([Cas(where, b"foreign", 0)])
    cluster.physical.fault = lambda ops: next(fates)
    outcomes, ended = await ending(store, [Write(key("a"), b"1")])
    assert isinstance(ended, StoreWentBack)
    assert isinstance(outcomes[0], OutcomeUnknown)


async def test_deposed_and_put_back_after_a_lost_answer_leaves_the_outcome_unknown(cluster):
    """It was applied, and others may have heard of it, before an old snapshot took it and the session away."""
    store = await cluster.recover(QUIET)
    newest, own = (record_key(GENERATION, store.head.index + ahead, 8) for ahead in (0, 1))
    restoring = []

    async def restore():
        await cluster.depose()
        await cluster.inner.txn([Delete(own), Delete(newest)])

    def fault(ops):
        if not restoring and isinstance(ops[-1], Cas):
            restoring.append(asyncio.get_running_loop().create_task(restore()))
            return "lose-after"
        return None

    cluster.physical.fault = fault
    outcomes, ended = await ending(store, [Write(key("a"), b"1")])
    assert isinstance(ended, OutcomeUnknown)
    assert isinstance(outcomes[0], OutcomeUnknown)


async def test_a_foreign_record_at_our_index_stops_everything(cluster):
    store = await cluster.recover(QUIET)
    await cluster.inner.txn([Cas(record_key(GENERATION, store.head.index + 1, 8), b"foreign", 0)])
    _, ended = await ending(store, [Write(key("a"), b"1")])
    assert isinstance(ended, StoreWentBack)


@pytest.mark.parametrize("refusal", [PermissionDenied("no right"), TooLarge("413")])
async def test_one_refused_batch_fails_alone(cluster, refusal):
    def fault(ops):
        return refusal if any(isinstance(op, Set) and op.key.endswith("/bad") for op in ops) else None

    async with cluster.running(QUIET) as store:
        cluster.physical.fault = fault
        before = store.head.index
        outcomes = await gather(
            store, [Write(key("a"), b"")], [Write(key("ok"), b""), Write(key("bad"), b"")], [Write(key("c"), b"")]
        )
        assert [getattr(outcome, "index", outcome) for outcome in outcomes] == [before + 1, refusal, before + 2]
        assert store.statistics()["commit_narrowed"] == 1
        assert (await store.commit([Write(key("bad2"), b"")])).index == before + 3
        await cluster.check(store)


async def test_a_refusal_after_a_lost_answer_decides_nothing(cluster):
    """The first attempt may have landed: a later denial only speaks of the later attempt."""
    fates = iter(["lose-after", PermissionDenied("gone"), None])
    async with cluster.running(QUIET) as store:
        cluster.physical.fault = lambda ops: next(fates)
        head = await store.commit([Write(key("a"), b"1")])
        assert head == store.head
        await cluster.check(store)


async def test_unknown_when_even_the_record_cannot_be_read(cluster):
    store = await cluster.recover(QUIET)
    cluster.physical.fault = lambda ops: "lose-after"
    cluster.physical.read_fault = Unavailable("down")
    outcomes, ended = await ending(store, [Write(key("a"), b"1")])
    assert isinstance(outcomes[0], OutcomeUnknown)
    assert isinstance(ended, OutcomeUnknown)


async def test_the_queue_is_bounded_by_count_and_bytes():
    options = StoreOptions(segment_records=8, queue_batches_max=3, queue_bytes_max=50_000)
    async with memory_cluster() as cluster:
        store = await cluster.recover(options)
        waiting = [asyncio.create_task(store.commit([Write(key(f"k{n}"), b"")])) for n in range(4)]
        await asyncio.sleep(0)
        assert isinstance(waiting[3].exception(), Overloaded)
        waiting[0].cancel()
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await store.commit([Write(key("big"), b"v" * 40_000)])
        async with ran(store):
            assert len(await asyncio.gather(*waiting[1:3])) == 2
            assert await store.get(key("k0")) is None, "a cancelled caller withdrew its batch"


async def test_a_batch_over_the_limit_is_refused_before_it_is_sent():
    async with memory_cluster(Limits(ops_max=8)) as cluster, cluster.running(OPTIONS) as store:
        sent = len(cluster.physical.txns)
        with pytest.raises(NeedsParts, match="6 keys, one transaction of this store takes 5"):
            await store._group_commit.commit([Write(key(str(n)), b"") for n in range(6)], None)
        with pytest.raises(NeedsParts, match="the store takes 524288"):
            await store._group_commit.commit([Write(key("a"), b"v" * 300_000)], None)
        assert all(not isinstance(ops[-1], Cas) for ops in cluster.physical.txns[sent:])


async def test_cancelling_the_store_tells_who_is_in_flight_and_who_is_not(cluster):
    store = await cluster.recover(QUIET)
    running = asyncio.create_task(store.run())
    cluster.physical.gate.clear()
    sent = len(cluster.physical.txns)
    flying = asyncio.create_task(store.commit([Write(key("a"), b"")]))
    await eventually(lambda: len(cluster.physical.txns) > sent)
    queued = asyncio.create_task(store.commit([Write(key("b"), b"")]))
    await asyncio.sleep(0)
    running.cancel()
    outcomes = await asyncio.gather(flying, queued, running, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown, NotApplied, asyncio.CancelledError]


async def test_positions_ride_in_every_record(cluster):
    first = Position("set", "g", 1, 5, b"a" * 32)
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("a"), b"")], positions={"performance": first})
        await store.commit([Write(key("b"), b"")])
        assert store.positions == {"performance": first}
        head = await store.commit([], positions={"dr": first})
        assert (await store.records(head.index, 1))[0].header.positions == {"performance": first, "dr": first}
        assert await store.commit([]) == head, "nothing to commit is no record"
    again = await cluster.recover(QUIET)
    assert again.positions == {"performance": first, "dr": first}


async def test_record_times_never_go_back(cluster):
    async with cluster.running(QUIET) as store:
        first = await store.commit([Write(key("a"), b"1")])
        cluster.clock.time_ms = lambda: first.time_ms - 60_000
        assert (await store.commit([Write(key("a"), b"2")])).time_ms == first.time_ms


async def test_an_acknowledged_commit_proves_the_lease(cluster):
    async with cluster.running(QUIET) as store:
        lease = store._lease
        lease._proved_at = float("-inf")
        assert not lease.valid()
        await store.commit([Write(key("a"), b"")])
        assert lease.valid()
