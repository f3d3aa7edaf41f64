"""Election over the in-memory store: two nodes, lost answers, operators who meddle."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from consul_backend.clock import Clock, SystemClock
from consul_backend.election import Election, ElectionOptions, LeaderInfo, above, decode_epoch
from consul_backend.embedded import EmbeddedStore
from consul_backend.errors import Conflict, Corrupt, FenceLost, OutcomeUnknown, Unavailable
from consul_backend.lease import Phase
from consul_backend.physical import EPOCH_KEY, LOCK_KEY, Item, TxnResult
from consul_backend.txn import Delete, Lock, Op, Set

FAST = ElectionOptions(
    beat_ttl_s=0.6, beat_interval_s=0.1, lock_delay_s=0.2, retry_s=0.02, watch_wait_s=1.0, step_down_grace_s=0.0
)
STEADY = replace(FAST, beat_ttl_s=600.0)
"""No session ends by itself."""
SOON_S = 60.0
"""On any machine, and before a steady session ends by itself."""


@pytest.fixture
async def physical() -> AsyncIterator[EmbeddedStore]:
    store = EmbeddedStore(None)
    await store.open()
    yield store
    await store.close()


def election(
    physical: EmbeddedStore, name: str, *, options: ElectionOptions = FAST, clock: Clock | None = None
) -> Election:
    advertise = LeaderInfo(node_id=name, api_addr=f"http://{name}", cluster_addr=f"https://{name}")
    return Election(physical, node_id=name, advertise=lambda: advertise, clock=clock or SystemClock(), options=options)


class LossyStore:
    """Delegates to a store, but the answer of the first transaction that takes the lock is lost."""

    def __init__(self, inner: EmbeddedStore, *, applied: bool) -> None:
        self._inner = inner
        self._applied = applied
        self.lost = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        if any(isinstance(op, Lock) for op in ops) and not self.lost:
            self.lost += 1
            if self._applied:
                await self._inner.txn(ops)
            raise OutcomeUnknown("the answer was lost")
        return await self._inner.txn(ops)


async def test_one_leads_and_the_other_takes_over_on_release(physical: EmbeddedStore) -> None:
    first, second = (election(physical, name, options=STEADY) for name in "ab")
    held = await first.campaign()
    waiting = asyncio.create_task(second.campaign())
    await asyncio.sleep(0.3)
    assert not waiting.done()
    assert (await second.leader()) == LeaderInfo("a", "http://a", "https://a")
    await first.release(held)
    taken = await asyncio.wait_for(waiting, SOON_S)
    assert taken.tenure.epoch == held.tenure.epoch + 1
    assert not held.lease.valid()
    await second.release(taken)


async def test_a_node_that_stops_beating_loses_the_lock(physical: EmbeddedStore) -> None:
    """campaign() returned and nobody runs keep(): nothing beats, as after SIGKILL or with a stuck loop."""
    first, second = election(physical, "a"), election(physical, "b")
    held = await first.campaign()
    waiting = asyncio.create_task(second.campaign())
    taken = await asyncio.wait_for(waiting, SOON_S)
    assert taken.tenure.epoch == held.tenure.epoch + 1
    with pytest.raises(FenceLost):
        await first.keep(held)
    await first.lost(held)
    assert first.phase is Phase.STANDBY
    with pytest.raises(FenceLost):
        await held.lease.ensure()
    await second.release(taken)


@pytest.mark.parametrize("applied", [True, False])
async def test_a_lost_answer_to_the_acquire_is_resolved(physical: EmbeddedStore, applied: bool) -> None:
    lossy = LossyStore(physical, applied=applied)
    node = election(lossy, "a")
    held = await asyncio.wait_for(node.campaign(), SOON_S)
    assert lossy.lost == 1
    item: Item | None = await physical.get(LOCK_KEY)
    epoch = await physical.get(EPOCH_KEY)
    assert item is not None
    assert item.session == held.tenure.session
    assert epoch is not None
    assert decode_epoch(epoch).number == held.tenure.epoch == 1
    assert epoch.modify_index == held.tenure.epoch_index
    await node.release(held)


class DoublingStore(LossyStore):
    """The first attempt at the lock is refused, and a double of it lands when the refusal was looked into already."""

    double: Sequence[Op] = ()

    async def get(self, key: str, *, consistent: bool = False) -> Item | None:
        found = await self._inner.get(key, consistent=consistent)
        if self.double and key == EPOCH_KEY:
            ops, self.double = self.double, ()
            await self._inner.txn(ops)
        return found

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        if not self.lost and any(isinstance(op, Lock) for op in ops):
            self.lost, self.double = 1, ops
            raise Conflict("failed to lock key due to lock delay")
        return await super().txn(ops)


async def test_an_attempt_that_lands_after_it_was_refused_locks_nobody_out(physical: EmbeddedStore) -> None:
    doubling = DoublingStore(physical, applied=False)
    node = election(doubling, "a")
    held = await asyncio.wait_for(node.campaign(), SOON_S)
    assert held.tenure.epoch == 2, "the double was numbered 1, and led nothing"
    await node.release(held)


async def test_a_destroyed_session_ends_the_tenure(physical: EmbeddedStore) -> None:
    node = election(physical, "a", options=STEADY)
    held = await node.campaign()
    keeping = asyncio.create_task(node.keep(held))
    await asyncio.sleep(0.05)
    await physical.destroy_session(held.tenure.session)
    with pytest.raises(FenceLost):
        await asyncio.wait_for(keeping, SOON_S)
    assert not held.lease.valid()


async def test_a_deleted_lock_ends_the_tenure(physical: EmbeddedStore) -> None:
    node = election(physical, "a", options=STEADY)
    held = await node.campaign()
    keeping = asyncio.create_task(node.keep(held))
    await asyncio.sleep(0.05)
    await physical.txn([Delete(LOCK_KEY)])
    with pytest.raises(FenceLost):
        await asyncio.wait_for(keeping, SOON_S)


async def test_keeping_beats(physical: EmbeddedStore) -> None:
    options = replace(FAST, beat_ttl_s=3.0)  # a busy machine may be late by most of it
    node = election(physical, "a", options=options)
    held = await node.campaign()
    keeping = asyncio.create_task(node.keep(held))
    await asyncio.sleep(options.beat_ttl_s * 1.5)
    assert not keeping.done()
    assert await held.lease.ensure() is None
    keeping.cancel()
    await asyncio.wait([keeping])
    await node.release(held)


async def test_two_nodes_of_one_name_never_share_an_epoch(physical: EmbeddedStore) -> None:
    first, second = election(physical, "same"), election(physical, "same")
    epochs = []
    for _ in range(5):
        race = [asyncio.create_task(node.campaign()) for node in (first, second)]
        done, pending = await asyncio.wait(race, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)
        held = done.pop().result()
        epochs.append(held.tenure.epoch)
        winner = first if race[0].done() and not race[0].cancelled() else second
        await winner.release(held)
    assert epochs == sorted(set(epochs))


class CutStore:
    """Delegates to a store; while ``cut``, sessions cannot be destroyed, as without a leader. The agent still beats."""

    def __init__(self, inner: EmbeddedStore) -> None:
        self._inner = inner
        self.cut = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def destroy_session(self, session: str) -> None:
        if self.cut:
            raise Unavailable("no leader")
        await self._inner.destroy_session(session)


async def test_a_session_that_could_not_be_destroyed_is_destroyed_before_the_next_one_is_made(
    physical: EmbeddedStore,
) -> None:
    """Else the beat of the next session, which has the same check, keeps the old one alive, and it holds the lock."""
    store = CutStore(physical)
    slow = replace(FAST, beat_ttl_s=30.0, beat_interval_s=10.0)  # so that only the destruction can free the lock
    leader = LeaderInfo("a", "", "")
    node = Election(store, node_id="a", advertise=lambda: leader, clock=SystemClock(), options=slow)
    held = await node.campaign()
    store.cut = True
    store.stop_beat = store.beat  # the agent is cut off as well
    await node.lost(held)
    item = await physical.get(LOCK_KEY)
    assert item is not None
    assert item.session == held.tenure.session, "still there"
    again = asyncio.create_task(node.campaign())
    await asyncio.sleep(0.2)
    assert not again.done()
    store.cut = False
    taken = await asyncio.wait_for(again, SOON_S)
    assert taken.tenure.epoch == held.tenure.epoch + 1
    await node.release(taken)


async def test_a_deleted_epoch_key_does_not_number_a_tenure_below_the_log(physical: EmbeddedStore) -> None:
    """``above`` is what recovery asks with the newest record's epoch."""
    node = election(physical, "a")
    for _ in range(3):
        await node.release(await node.campaign())
    await physical.txn([Delete(EPOCH_KEY)])
    held = await node.campaign()
    assert held.tenure.epoch == 1
    tenure = await above(physical, held.tenure, 3)
    assert (tenure.epoch, tenure.session) == (4, held.tenure.session)
    item = await physical.get(EPOCH_KEY)
    assert item is not None
    assert (decode_epoch(item).number, item.modify_index) == (4, tenure.epoch_index)
    assert await above(physical, tenure, 3) is tenure
    await node.release(held)
    with pytest.raises(FenceLost):
        await above(physical, held.tenure, 3)


async def test_a_foreign_epoch_key_is_named_with_the_way_out(physical: EmbeddedStore) -> None:
    await physical.txn([Set(EPOCH_KEY, b"mine")])
    with pytest.raises(Corrupt, match="once it is deleted"):
        await asyncio.wait_for(election(physical, "a").campaign(), SOON_S)


class Ahead(SystemClock):
    """As far ahead as a test says."""

    by_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.by_s


async def test_the_lease_runs_out_without_proof(physical: EmbeddedStore) -> None:
    clock, options = Ahead(), replace(STEADY, lock_delay_s=60.0)
    node = election(physical, "a", options=options, clock=clock)
    held = await node.campaign()
    assert held.lease.valid()
    clock.by_s = options.lock_delay_s
    assert not held.lease.valid()
    await asyncio.gather(*(held.lease.ensure() for _ in range(10)))
    assert held.lease.valid()
    await node.release(held)
