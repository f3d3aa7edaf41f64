"""Listed names kept in memory: against the store they were read from, whatever happens meanwhile."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from consul_backend.name_cache import NameCache
from consul_backend.wal import Write
from tests.support.store import PARTITION, key, memory_cluster

ROOT = f"r/{PARTITION}/"
NAMES = st.sampled_from(["a", "b", "d/a", "d/b", "d/e/a", "x/y/z"])
PREFIXES = st.sampled_from(["", "d/", "d/e/", "x/", "x/y/"])


def listed(keys: set[str], prefix: str) -> list[str]:
    found = set()
    for name in keys:
        if name.startswith(prefix):
            head, slash, _ = name[len(prefix) :].partition("/")
            found.add(head + slash)
    return sorted(found)


class NameCacheMachine(RuleBasedStateMachine):
    """Reads that take their time beside changes: what is kept must be what a fresh read would find."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = NameCache(1500)
        self.keys: set[str] = set()
        self.under_way: dict[str, tuple[list[str], object]] = {}

    @rule(prefix=PREFIXES)
    def begin(self, prefix: str) -> None:
        mark = self.cache.reading(ROOT + prefix)
        self.under_way[prefix] = (listed(self.keys, prefix), mark)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        prefix = data.draw(st.sampled_from(sorted(self.under_way)))
        names, mark = self.under_way.pop(prefix)
        self.cache.put(ROOT + prefix, names, mark)

    @rule(name=NAMES)
    def change(self, name: str) -> None:
        self.keys ^= {name}
        if self.cache.concerns(ROOT + name):
            self.cache.changed(ROOT + name)

    @rule(names=st.sets(NAMES))
    def change_many(self, names: set[str]) -> None:
        self.keys ^= names
        self.cache.clear()

    @invariant()
    def exact_and_bounded(self) -> None:
        for prefix in ("", "d/", "d/e/", "x/", "x/y/"):
            names = self.cache.get(ROOT + prefix)
            assert names is None or list(names) == listed(self.keys, prefix)
        assert 0 <= self.cache.size_bytes <= 1500


TestNameCache = NameCacheMachine.TestCase
TestNameCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.fixture
async def cluster():
    async with memory_cluster() as made:
        yield made


async def test_a_folder_is_read_once_until_a_key_comes_or_goes(cluster) -> None:
    async with cluster.running() as store:
        await store.commit([Write(key("d/a"), b"1"), Write(key("b"), b"1")])
        for _ in range(3):
            assert await store.list(ROOT) == ["b", "d/"]
            assert await store.list(ROOT + "d/") == ["a"]
        assert store.statistics()["names_misses"] == 2
        await store.commit([Write(key("d/a"), b"another value of the same key")])
        await store.list(ROOT)
        assert store.statistics()["names_misses"] == 2
        await store.commit([Write(key("d/c"), b"1")])
        assert await store.list(ROOT + "d/") == ["a", "c"]
        await store.commit([Write(key("d/a"), None), Write(key("d/c"), None)])
        assert await store.list(ROOT) == ["b"]
        assert await store.list(ROOT + "d/") == []


async def test_what_a_caller_does_with_the_names_is_its_own_affair(cluster) -> None:
    async with cluster.running() as store:
        await store.commit([Write(key("a"), b"1")])
        (await store.list(ROOT)).append("z")
        (await store.list(ROOT)).clear()
        assert await store.list(ROOT) == ["a"]


async def test_lists_beside_writes_and_large_batches_are_never_behind(cluster) -> None:
    async with cluster.running() as store:
        done = False

        async def look() -> None:
            while not done:
                await store.list(ROOT)
                await asyncio.sleep(0)

        watching = asyncio.create_task(look())
        for number in range(20):
            await store.commit([Write(key(f"n{number}"), b"1")])
            assert f"n{number}" in await store.list(ROOT)
        await store.commit([Write(key(f"big/{number}"), b"1") for number in range(300)])
        assert len(await store.list(ROOT + "big/")) == 300
        await store.commit([Write(key(f"big/{number}"), None) for number in range(300)])
        assert await store.list(ROOT + "big/") == []
        done = True
        await watching
