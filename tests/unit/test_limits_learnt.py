"""A server that takes less than it did: no client write fails for it, and no outcome is guessed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from consul_backend.embedded import EmbeddedStore
from consul_backend.errors import OutcomeUnknown, TooLarge
from consul_backend.limits import Limits
from consul_backend.replicated import ReplicatedStore, StoreOptions
from consul_backend.store import ConsulStore
from consul_backend.txn import Cas, Set
from consul_backend.wal import Write
from tests.support.http_consul import HttpConsul, http_consul
from tests.support.store import Cluster, key, ran

QUIET = StoreOptions(segment_records=8, resolve_timeout_s=5.0, flush_interval_s=3600, collect_interval_s=3600)
BIG = 120_000
"""Bytes of a value that fits one transaction of 524,288 bytes, and none of 131,072."""


def small(count: int) -> list[Write]:
    return [Write(key(f"s{n}"), b"x" * 500) for n in range(count)]


@asynccontextmanager
async def served() -> AsyncIterator[tuple[HttpConsul, ConsulStore, Cluster, ReplicatedStore]]:
    """A running store whose physical store is ConsulStore, over HTTP."""
    inner = EmbeddedStore(None, limits=Limits(ops_max=128))
    await inner.open()
    try:
        cluster = Cluster(inner)
        await cluster.genesis()
        async with http_consul(inner) as (consul, client):
            tenure, lease = await cluster.lead()
            store = await ReplicatedStore.recover(client, "g1", tenure, QUIET, clock=cluster.clock, lease=lease)
            async with ran(store):
                yield consul, client, cluster, store
    finally:
        await inner.close()


@pytest.mark.parametrize("closes", [False, True], ids=["answers 413", "closes"])
async def test_a_lowered_body_limit_is_learnt_and_no_write_fails(closes: bool) -> None:
    async with served() as (consul, client, cluster, store):
        assert client.limits.body_bytes_max == 524_288
        await store.commit([Write(key("v"), b"1" * BIG)])
        consul.body_bytes_max, consul.closes = 131_072, closes
        await asyncio.gather(
            store.commit([Write(key("v"), b"2" * BIG)]),
            store.commit(small(100)),
            *[store.commit([write]) for write in small(20)],
        )
        assert client.limits.body_bytes_max <= 131_072
        await store.rolled()
        assert await store.get(key("v")) == b"2" * BIG
        assert (store.statistics()["commit_superseded"] > 0) == closes
        await cluster.check(store)


async def test_a_write_that_was_applied_before_the_connection_closed_is_found() -> None:
    async with served() as (consul, _, cluster, store):
        consul.body_bytes_max, consul.closes, consul.applies_first = 131_072, True, 1
        head = store.head.index
        done = await store.commit([Write(key("v"), b"1" * BIG)])
        assert done.index == head + 1
        assert store.statistics()["commit_superseded"] == 1
        assert await store.get(key("v")) == b"1" * BIG
        await cluster.check(store)
        await store.commit([Write(key("v"), b"2" * BIG)])
        await store.rolled()
        await cluster.check(store)


async def test_a_lost_answer_for_another_reason_costs_no_limit() -> None:
    async with served() as (consul, client, cluster, store):
        consul.lose = 2
        await store.commit([Write(key("v"), b"1" * BIG)])
        assert client.limits.body_bytes_max == 524_288
        assert store.statistics()["commit_superseded"] == 0
        await cluster.check(store)


async def test_fewer_operations_than_were_probed_are_learnt_by_writes_and_by_reads() -> None:
    async with served() as (consul, client, cluster, store):
        assert client.limits.ops_max == 128
        consul.ops_max = 64
        assert await client.get_many([f"none-{n}" for n in range(150)]) == [None] * 150
        assert client.limits.ops_max == 64
        await store.commit(small(100))
        await store.rolled()
        await cluster.check(store)
    async with served() as (consul, client, cluster, store):
        consul.ops_max = 64
        await store.commit(small(100))
        assert client.limits.ops_max == 64
        await store.rolled()
        await cluster.check(store)


async def test_a_filler_that_cannot_be_sent_either_leaves_the_outcome_unknown() -> None:
    """The negative control: without a record in its place nobody may say that the big one was not applied."""
    inner = EmbeddedStore(None)
    await inner.open()
    cluster = Cluster(inner)
    await cluster.genesis()
    store = await cluster.recover(StoreOptions(segment_records=8, resolve_timeout_s=2.0))
    fates: list[str | Exception] = ["lose-before", TooLarge("too large (9 > 5 bytes)")]
    cluster.physical.fault = lambda ops: (
        None if not isinstance(ops[-1], Cas) else fates.pop(0) if fates else "lose-before"
    )
    running = asyncio.create_task(store.run())
    with pytest.raises(OutcomeUnknown):
        await store.commit([Write(key("v"), b"1")])
    with pytest.raises(BaseExceptionGroup) as ended:
        await running
    assert ended.value.subgroup(OutcomeUnknown) is not None
    await inner.close()


async def test_the_superseded_transaction_never_lands_late() -> None:
    inner = EmbeddedStore(None)
    await inner.open()
    cluster = Cluster(inner)
    await cluster.genesis()
    async with cluster.running(StoreOptions(segment_records=8, resolve_timeout_s=2.0)) as store:
        fates: list[str | Exception] = ["late", TooLarge("too large (9 > 5 bytes)")]
        cluster.physical.fault = lambda ops: fates.pop(0) if fates and isinstance(ops[-1], Cas) else None
        with pytest.raises(TooLarge):  # this store learns nothing, so there is nothing smaller to try
            await store.commit([Write(key("v"), b"1")])
        assert store.statistics()["commit_superseded"] == 1
        assert await cluster.physical.land() == [False]
        await store.commit([Write(key("w"), b"2")])
        assert await store.get(key("v")) is None
        await cluster.check(store)
    await inner.close()


async def test_only_sizes_that_can_be_the_reason_are_doubted() -> None:
    inner = EmbeddedStore(None, limits=Limits(ops_max=128))
    await inner.open()
    async with http_consul(inner) as (consul, client):
        consul.body_bytes_max, consul.closes = 0, True
        with pytest.raises(OutcomeUnknown):
            await client.txn([Set("a", b"x")])
        consul.body_bytes_max = 524_288
        await client.txn([Set("a", b"x" * 30_000)])
        assert consul.closed == 1, "a small request's lost connection says nothing of sizes"
    await inner.close()
