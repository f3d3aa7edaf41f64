"""The whole store, in memory, driven at random against a dictionary: batches of any size, reads, lists and takeovers at
any moment, with an index that is not read as a whole, tiny segments and a busy collector."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from consul_backend.limits import Limits
from consul_backend.replicated import ReplicatedStore, StoreOptions
from consul_backend.wal import Write
from consul_backend.wal_reader import RecordGone
from tests.support.store import PARTITION, Cluster, key, memory_cluster, ran

SMALL = Limits(ops_max=10, body_bytes_max=48 * 1024, value_bytes_max=16 * 1024)
EAGER = StoreOptions(
    segment_records=8,
    wal_keep_records=4,
    flush_interval_s=0.002,
    flush_extents_per_s=10_000,
    collect_interval_s=0.002,
    tip_interval_s=3600,
    cache_bytes_max=600,
)
LAZY = replace(EAGER, index_eager_keys=0)
NAMES = [f"{folder}k{n}" for folder in ("", "f/", "f/g/", "h i/", "f//") for n in range(12)]

names = st.sampled_from(NAMES)
values = st.none() | st.binary(max_size=30) | st.integers(0, 40_000).map(lambda size: b"v" * size)


class StoreMachine(RuleBasedStateMachine):
    """``true`` is the oracle: values by name."""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._contexts = contextlib.AsyncExitStack()
        self.true: dict[str, bytes] = {}
        self.cluster: Cluster = self._do(self._contexts.enter_async_context(memory_cluster(SMALL)))
        self.store: ReplicatedStore
        self._tenure = contextlib.AsyncExitStack()
        self._lead(EAGER)

    def teardown(self) -> None:
        try:
            self._do(self._settled())
            data = self._do(self.cluster.data())
            data.pop(key("seal", "c"), None)
            assert data == {key(name): value for name, value in self.true.items()}
        finally:
            self._do(self._tenure.aclose())
            self._do(self._contexts.aclose())
            self._runner.close()

    @rule(writes=st.dictionaries(names, values, min_size=1, max_size=7))
    def commit(self, writes: dict[str, bytes | None]) -> None:
        self._commit(writes)

    @rule(seed=st.integers(0, 1000), share=st.sampled_from([0.1, 0.9]))
    def commit_many(self, seed: int, share: float) -> None:
        """More entries than one transaction takes: parts and roll-forward."""
        dice = random.Random(seed)
        self._commit({name: None if dice.random() < share else dice.randbytes(50) for name in NAMES})

    @rule(batches=st.lists(st.dictionaries(names, values, min_size=1, max_size=3), min_size=2, max_size=6))
    def commit_at_once(self, batches: list[dict[str, bytes | None]]) -> None:
        """Several callers; small batches keep the order in which they came."""
        small = [{name: value and value[:100] for name, value in batch.items()} for batch in batches]

        async def all_of_them() -> None:
            async with asyncio.TaskGroup() as tasks:
                for batch in small:
                    tasks.create_task(self.store.commit([Write(key(name), value) for name, value in batch.items()]))

        self._do(all_of_them())
        for batch in small:
            self._note(batch)

    @rule(name=names)
    def get(self, name: str) -> None:
        assert self._do(self.store.get(key(name))) == self.true.get(name)

    @rule(folder=st.sampled_from(["", "f/", "f/g/", "h i/", "f//", "none/"]))
    def list(self, folder: str) -> None:
        below = [name.removeprefix(folder) for name in self.true if name.startswith(folder)]
        expected = {rest.partition("/")[0] + ("/" if "/" in rest else "") for rest in below}
        assert self._do(self.store.list(f"r/{PARTITION}/{folder}")) == sorted(expected)

    @rule(options=st.sampled_from([EAGER, LAZY]))
    def take_over(self, options: StoreOptions) -> None:
        """The node stops where it is; another one recovers from what is stored."""
        self._do(self._tenure.aclose())
        self._lead(options)

    @rule()
    def settle(self) -> None:
        self._do(self._settled())

    @rule(share=st.integers(0, 100))
    def log_and_head(self, share: int) -> None:
        """What the log still has is dense and reaches the head. How much that is depends on time, so no draw may."""
        oldest, head = self.store.oldest_index, self.store.head.index
        start = oldest + (head - oldest) * share // 100
        try:
            found = self._do(self.store.records(start, 10_000))
        except RecordGone:
            assert self.store.oldest_index > start, "collected meanwhile"
            return
        assert [record.index for record in found] == list(range(start, start + len(found)))
        assert start + len(found) > head

    @invariant()
    def sizes_are_bounded(self) -> None:
        assert self.store.statistics()["cache_bytes"] <= EAGER.cache_bytes_max

    def _commit(self, writes: dict[str, bytes | None]) -> None:
        self._do(self.store.commit([Write(key(name), value) for name, value in writes.items()]))
        self._note(writes)

    def _note(self, writes: dict[str, bytes | None]) -> None:
        for name, value in writes.items():
            self.true.pop(name, None)
            if value is not None:
                self.true[name] = value

    def _lead(self, options: StoreOptions) -> None:
        self._tenure = contextlib.AsyncExitStack()
        self.store = self._do(self._tenure.enter_async_context(self.cluster.running(options)))

    async def _settled(self) -> None:
        """Log, data and index agree; looked at between two tenures, since a collector would go on collecting."""
        await self.store.rolled()
        await self._tenure.aclose()
        self._tenure = contextlib.AsyncExitStack()
        self.store = await self.cluster.recover(EAGER)
        await self.cluster.check(self.store, whole_log=False)
        await self._tenure.enter_async_context(ran(self.store))

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
