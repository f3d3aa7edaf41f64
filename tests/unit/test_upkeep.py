"""merkle-check and reindex as the API shows them, on a real store in memory."""

import asyncio
import base64

import pytest

from consul_backend.clock import SystemClock
from consul_backend.merkle import SUBPAGES, bucket_of
from consul_backend.reindex import ReindexOptions
from consul_backend.replicated import StoreOptions, physical_key
from consul_backend.txn import Set
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest
from sidecar.replication.status import index_fields
from sidecar.replication.upkeep import HEALTH_KEY, IndexUpkeep, rfc3339_nanoseconds
from tests.support.store import GENERATION, PARTITION, key, memory_cluster

KEEP = StoreOptions(segment_records=8, flush_interval_s=0.01, collect_interval_s=3600)


class Sealed:
    def __init__(self):
        self.entries = {}
        self.put_one = asyncio.Event()

    async def get(self, name):
        return self.entries.get(name)

    async def put(self, name, value):
        self.entries[name] = value
        self.put_one.set()


@pytest.fixture
async def cluster():
    async with memory_cluster() as made:
        yield made


async def test_a_check_reports_pages_and_a_reindex_heals_them(cluster):
    sealed = Sealed()
    async with cluster.running(KEEP) as store:
        upkeep = IndexUpkeep(store, sealed, SystemClock())
        await upkeep.load()
        assert index_fields(upkeep.facts())["last_corruption_check_epoch"] == "-62135596800"
        await store.commit([Write(key(f"k{n}"), b"1") for n in range(50)])
        report = (await upkeep.check())["merkle_corruption_report"]
        assert report["corrupted_root"] is False
        assert set(report["corrupted_tree_map"]) == {"1", "2"}
        tree = report["corrupted_tree_map"]["1"]
        assert (tree["tree_type"], tree["corrupted_index_tuples_map"]) == ("replicated", None)
        assert base64.b64decode(tree["root_hash"]) == store.forest.root("r")

        await cluster.inner.txn([Set(physical_key(GENERATION, key("k7")), b"foreign")])
        report = (await upkeep.check())["merkle_corruption_report"]
        page, subpage = divmod(bucket_of("k7"), SUBPAGES)
        tree = report["corrupted_tree_map"]["1"]
        assert report["corrupted_root"] is tree["corrupted_subtree_root"] is True
        assert tree["corrupted_index_tuples_map"] == {str(page): {"corrupted": True, "subpages": [subpage]}}
        assert tree["partitions"] == {PARTITION: {str(page): [subpage]}}
        assert report["corrupted_tree_map"]["2"]["corrupted_subtree_root"] is False
        assert index_fields(upkeep.facts())["corrupted_merkle_tree"] is True

        later = IndexUpkeep(store, sealed, SystemClock())
        await later.load()
        assert index_fields(later.facts())["corrupted_merkle_tree"] is True, "the next tenure knows"

        running = asyncio.create_task(later.run())
        sealed.put_one.clear()
        later.start(ReindexOptions())
        assert index_fields(later.facts())["reindex_in_progress"] is True
        with pytest.raises(InvalidRequest, match="running already"):
            later.start(ReindexOptions())
        with pytest.raises(InvalidRequest, match="running already"):
            await later.check()
        await asyncio.wait_for(sealed.put_one.wait(), 120)
        fields = index_fields(later.facts())
        assert fields["corrupted_merkle_tree"] is False
        assert int(fields["last_reindex_epoch"]) > 0
        assert (await store.get(key("k7"))) == b"1"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_reindex_can_be_cancelled_and_started_again(cluster):
    sealed = Sealed()
    async with cluster.running(KEEP) as store:
        await store.commit([Write(key(f"k{n}"), b"1") for n in range(50)])
        upkeep = IndexUpkeep(store, sealed, SystemClock())
        assert not upkeep.cancel()
        running = asyncio.create_task(upkeep.run())
        blocked, go = asyncio.Event(), asyncio.Event()
        many = cluster.inner.get_many

        async def get_many(keys, *, consistent=False):
            blocked.set()
            await go.wait()
            return await many(keys, consistent=consistent)

        cluster.physical.get_many = get_many
        upkeep.start(ReindexOptions())
        await asyncio.wait_for(blocked.wait(), 120)
        fields = index_fields(upkeep.facts())
        assert fields["reindex_stage"] == "building"
        assert fields["reindex_building_total"] == 51
        assert upkeep.cancel()
        go.set()
        for _ in range(20):  # turns of the loop that a task group takes to end
            await asyncio.sleep(0)
        assert "reindex_in_progress" not in index_fields(upkeep.facts())
        assert HEALTH_KEY not in sealed.entries
        upkeep.start(ReindexOptions(skip_flush=True))
        await asyncio.wait_for(sealed.put_one.wait(), 120)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_the_time_of_a_report_has_nanoseconds():
    assert rfc3339_nanoseconds(1_709_564_756_789) == "2024-03-04T15:05:56.789000000Z"
