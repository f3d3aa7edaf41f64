"""What another node of the cluster saw in the log tells whether the store was put back."""

import pytest

from consul_backend.errors import FenceLost, StoreWentBack
from consul_backend.replicated import StoreOptions
from consul_backend.wal import Write
from consul_backend.went_back import require_record
from tests.support.store import key, memory_cluster

FORGETFUL = StoreOptions(
    segment_records=4, wal_keep_records=4, ring_records_max=1, flush_interval_s=3600, collect_interval_s=3600
)


@pytest.fixture
async def cluster():
    async with memory_cluster() as made:
        yield made


async def written(store, count):
    return [await store.commit([Write(key(f"k{n}"), b"1")]) for n in range(count)]


async def test_a_record_of_this_log_is_no_sign_of_anything(cluster):
    async with cluster.running(FORGETFUL) as store:
        heads = await written(store, 10)
        for head in heads:
            await require_record(store, head.index, head.chain_hash)
    async with cluster.running(FORGETFUL) as store:
        for head in heads:
            await require_record(store, head.index, head.chain_hash)
        await store.flush()
        assert await store.collect()
        assert store.oldest_index > heads[0].index
        await require_record(store, heads[0].index, heads[0].chain_hash)


@pytest.mark.parametrize("further", [-3, 0, 1, 5])
async def test_a_record_that_is_another_or_lies_ahead_stops_the_node_if_it_still_leads(cluster, further):
    async with cluster.running(FORGETFUL) as store:
        await written(store, 10)
        index = store.head.index + further
        with pytest.raises(StoreWentBack, match=f"saw record {index}, .* ends at {store.head.index}"):
            await require_record(store, index, bytes(32))
        await cluster.depose()
        with pytest.raises(FenceLost):
            await require_record(store, index, bytes(32))
