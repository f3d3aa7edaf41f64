"""The first records of a generation: once, in as many transactions as it takes, visible last."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from consul_backend.errors import Conflict, OutcomeUnknown, TooLarge, Unavailable
from consul_backend.physical import SENTINEL_KEY
from consul_backend.position import Position
from consul_backend.replicated import ReplicatedStore, StoreOptions, genesis, read_entry
from consul_backend.txn import Cas, CheckIndex, CheckSession, Set
from consul_backend.wal import Write
from tests.support.store import GENERATION, Cluster, key, memory_cluster

FIELDS: dict[str, Any] = {"node_id": "n", "time_ms": 1, "random_bytes": os.urandom}
QUIET = StoreOptions(segment_records=8, resolve_timeout_s=2.0, flush_interval_s=3600, collect_interval_s=3600)
MANY = [Write(key(f"k{n}", "rlc"[n % 3]), b"%d" % n) for n in range(200)]
"""Four transactions of 64 operations."""
BIG = [Write(key(f"v{n}"), b"v" * 60_000) for n in range(8)]


def faulty(cluster: Cluster) -> Any:
    """The store whose answers go wrong."""
    return cluster.physical


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with memory_cluster() as made:
        yield made


async def test_a_genesis_happens_once(cluster: Cluster) -> None:
    writes = [Write(key("a"), b"1"), Write("c/core/seal", b"2")]
    with pytest.raises(Conflict):
        await genesis(cluster.inner, GENERATION, writes, **FIELDS)
    await genesis(cluster.inner, "g2", writes, **FIELDS, guard=[Set(SENTINEL_KEY, b"1")])
    item = await cluster.inner.get(SENTINEL_KEY)
    assert item is not None
    assert await read_entry(cluster.inner, "g2", key("a")) == b"1"
    assert await read_entry(cluster.inner, "g2", key("b")) is None
    with pytest.raises(Conflict):
        await genesis(cluster.inner, "g2", writes, **FIELDS)
    with pytest.raises(ValueError, match="deletes nothing"):
        await genesis(cluster.inner, "g3", [Write(key("a"), None)], **FIELDS)


@pytest.mark.parametrize(("writes", "transactions"), [(MANY, 4), (BIG, 3)], ids=["many", "big"])
async def test_what_fits_no_transaction_goes_in_several_and_recovers(
    cluster: Cluster, writes: Sequence[Write], transactions: int
) -> None:
    tenure, _ = await cluster.lead()
    position = {"performance": Position("set", "g", 1, 7, bytes(32))}
    guard = [Cas(SENTINEL_KEY, b"1", 0)]
    fields = FIELDS | {"positions": position, "guard": guard, "tenure": tenure, "segment_records": 8}
    await genesis(faulty(cluster), "g2", writes, **fields)
    assert len(cluster.physical.txns) == transactions
    for number, ops in enumerate(cluster.physical.txns, 1):
        assert isinstance(ops[0], CheckSession)
        assert isinstance(ops[1], CheckIndex)
        assert (guard[0] in ops) == (number == transactions), "what makes it visible comes last"
    for write in writes:
        assert await read_entry(cluster.inner, "g2", write.key) == write.value
    tenure, lease = await cluster.lead()
    store = await ReplicatedStore.recover(cluster.inner, "g2", tenure, QUIET, clock=cluster.clock, lease=lease)
    assert store.head.index == transactions + 1
    assert store.positions == position
    for write in writes:
        assert store.forest.digest_of(write.key) is not None


@pytest.mark.parametrize("fate", ["lose-before", "lose-after"])
@pytest.mark.parametrize("step", range(4))
async def test_a_lost_answer_is_resolved_at_every_step(cluster: Cluster, fate: str, step: int) -> None:
    fates = iter([*[None] * step, fate])
    cluster.physical.fault = lambda ops: next(fates, None)
    await genesis(faulty(cluster), "g2", MANY, **FIELDS)
    for write in MANY:
        assert await read_entry(cluster.inner, "g2", write.key) == write.value


@pytest.mark.parametrize("step", range(4))
async def test_a_crash_before_the_last_step_leaves_nothing_that_counts(cluster: Cluster, step: int) -> None:
    count = itertools.count()
    cluster.physical.fault = lambda ops: Unavailable("crash") if next(count) == step else None
    with pytest.raises(Unavailable):
        await genesis(faulty(cluster), "g2", MANY, **FIELDS, guard=[Set(SENTINEL_KEY, b"1")])
    assert await cluster.inner.get(SENTINEL_KEY) is None
    assert await read_entry(cluster.inner, GENERATION, key("seal", "c")) == b"seal"


async def test_a_deposed_node_finishes_no_genesis(cluster: Cluster) -> None:
    tenure, _ = await cluster.lead()
    await cluster.lead()
    with pytest.raises(Conflict):
        await genesis(faulty(cluster), "g2", MANY, **FIELDS, tenure=tenure)
    assert await cluster.inner.list("g/") == ["g1/"]


async def test_a_genesis_that_stays_unknown_says_so(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consul_backend.genesis._PAUSE_S", 0)
    cluster.physical.fault = lambda ops: "lose-before"
    with pytest.raises(OutcomeUnknown):
        await genesis(faulty(cluster), "g2", [Write(key("a"), b"1")], **FIELDS)


async def test_what_can_never_fit_is_refused_before_anything_is_written(cluster: Cluster) -> None:
    with pytest.raises(TooLarge, match="an entry of"):
        await genesis(cluster.inner, "g2", [*MANY, Write(key("huge"), b"v" * 300_000)], **FIELDS)
    with pytest.raises(TooLarge, match="transactions"):
        await genesis(cluster.inner, "g2", MANY, **FIELDS, segment_records=4)
    assert await cluster.inner.list("g/") == ["g1/"]
