"""The index and its stored form, driven at random against a dictionary: writes, bursts, flushes that fail or are cut,
and takeovers that find only what was stored. Extents are made tiny, so that they split all the time."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from consul_backend import merkle_pages
from consul_backend.errors import Corrupt
from consul_backend.merkle import Forest, bucket_of
from consul_backend.merkle_pages import ExtentTable, decode_extent, parse_extent_name, range_of

EXTENT_BYTES = 300
"""About eight entries."""
PATHS = 250
OPS_MAX = 9

partitions = st.sampled_from([("r", "one"), ("r", "two"), ("l", "one")])
paths = st.integers(0, PATHS - 1).map("p{}".format)
digests = st.binary(min_size=20, max_size=20)


class IndexMachine(RuleBasedStateMachine):
    """``state`` is the oracle, ``log`` every write with its record's index, ``disk`` what was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(merkle_pages, "EXTENT_BYTES_MAX", EXTENT_BYTES)
        self.forest, self.table = Forest(), ExtentTable("g1")
        self.state: dict[tuple[str, str, str], bytes] = {}
        self.log: list[tuple[int, str, str, str, bytes | None]] = []
        self.disk: dict[str, bytes] = {}
        self.index = 0

    def teardown(self) -> None:
        self._flush_all()
        for (cls, partition, path), _ in sorted(self.state.items()):
            self._write(cls, partition, path, None)
        self._flush_all()
        self._patch.undo()
        assert self.disk == {}, "an empty index leaves nothing stored"

    @rule(name=partitions, path=paths, digest=digests)
    def put(self, name: tuple[str, str], path: str, digest: bytes) -> None:
        self.index += 1
        self._write(*name, path, digest)

    @rule(name=partitions, path=paths)
    def delete(self, name: tuple[str, str], path: str) -> None:
        self.index += 1
        self._write(*name, path, None)

    @rule(
        name=partitions, seed=st.integers(0, 1000), count=st.integers(10, 120), share=st.sampled_from([0.0, 0.5, 1.0])
    )
    def burst(self, name: tuple[str, str], seed: int, count: int, share: float) -> None:
        """One record of many writes, ``share`` of them deletions."""
        dice = random.Random(seed)
        self.index += 1
        for number in dice.sample(range(PATHS), count):
            self._write(*name, f"p{number}", None if dice.random() < share else dice.randbytes(20))

    @rule(extents_max=st.integers(1, 6), body_bytes_max=st.sampled_from([500, 2_000, 100_000]))
    def flush(self, extents_max: int, body_bytes_max: int) -> None:
        plan = self.table.plan(
            self.forest, self.index, extents_max=extents_max, ops_max=OPS_MAX, body_bytes_max=body_bytes_max
        )
        assert plan.ops <= OPS_MAX
        assert len(plan.leaves) <= extents_max
        assert len(plan.writes) <= 1 or plan.body_bytes <= body_bytes_max + 10 * 128, "deletions are small"
        self._apply(plan)

    @rule(extents_max=st.integers(1, 6))
    def flush_fails(self, extents_max: int) -> None:
        before = sorted(self.table.dirty_leaves(), key=str)
        plan = self.table.plan(
            self.forest, self.index, extents_max=extents_max, ops_max=OPS_MAX, body_bytes_max=100_000
        )
        self.table.failed(plan)
        after = {(leaf.cls, leaf.partition) for leaf in self.table.dirty_leaves()}
        assert after == {(leaf.cls, leaf.partition) for leaf in before}, "what was dirty is dirty again"
        assert min((leaf.first for leaf in self.table.dirty_leaves()), default=0) == min(
            (leaf.first for leaf in before), default=0
        )

    @rule()
    def flush_everything(self) -> None:
        self._flush_all()

    @rule()
    def take_over(self) -> None:
        """Another node finds what is stored, and repeats the log from the oldest dirty record."""
        redo_from = min((leaf.first for leaf in self.table.dirty_leaves()), default=self.index + 1)
        forest, table = self._load(redo_from)
        assert (table.count, table.total) == (self.table.count, self.table.total)
        for index, cls, partition, path, digest in self.log:
            if index >= redo_from and index > table.lsn_of(cls, partition, bucket_of(path)):
                table.mark(cls, partition, forest.change(cls, partition, path, digest), index)
        for cls in "rl":
            assert forest.root(cls) == self.forest.root(cls)
        assert all(leaf.first >= redo_from for leaf in table.dirty_leaves()), "older records may be collected"
        self.forest, self.table = forest, table

    @precondition(lambda self: self.disk)
    @rule(data=st.data())
    def damage_is_seen(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.disk)))
        raw = self.disk[name]
        at = data.draw(st.integers(0, len(raw) - 1))
        with pytest.raises(Corrupt):
            decode_extent(name, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])

    @invariant()
    def the_forest_is_the_dictionary(self) -> None:
        entries: dict[tuple[str, str], dict[str, bytes]] = {}
        for (cls, partition, path), digest in self.state.items():
            entries.setdefault((cls, partition), {})[path] = digest
        for cls, partition in (("r", "one"), ("r", "two"), ("l", "one"), ("c", "none")):
            held = entries.get((cls, partition), {})
            assert dict(self.forest.keys(cls, partition)) == held
            assert self.forest.count(cls, partition) == len(held)
            heads = self.forest.page_heads(cls, partition)
            assert sum(count for _, count in heads.values()) == len(held)
            assert self.forest.page_digests(cls, partition) == {page: digest for page, (digest, _) in heads.items()}
        fresh = Forest()
        fresh.apply((f"{cls}/{partition}/{path}", digest) for (cls, partition, path), digest in self.state.items())
        assert {cls: self.forest.root(cls) for cls in "rlc"} == {cls: fresh.root(cls) for cls in "rlc"}

    @invariant()
    def the_table_knows_what_is_stored(self) -> None:
        assert self.table.count == len(self.disk)
        found, _ = self._load(1)
        for cls, partition in (("r", "one"), ("r", "two"), ("l", "one")):
            for depth, start in self.table.clean_leaves(cls, partition):
                low, high = range_of(depth, start)
                stored = list(found.blobs(cls, partition, low, high))
                assert stored == list(self.forest.blobs(cls, partition, low, high)), "a clean leaf is stored as it is"

    def _write(self, cls: str, partition: str, path: str, digest: bytes | None) -> None:
        self.log.append((self.index, cls, partition, path, digest))
        self.table.mark(cls, partition, self.forest.change(cls, partition, path, digest), self.index)
        self.state.pop((cls, partition, path), None)
        if digest is not None:
            self.state[cls, partition, path] = digest

    def _apply(self, plan: Any) -> None:
        after = self.table.total_after(plan)
        self.disk |= plan.writes
        for name in plan.deletes:
            del self.disk[name]
        self.table.flushed(plan)
        assert (self.table.count, self.table.total) == after

    def _flush_all(self) -> None:
        for _ in range(1000):
            if not self.table.dirty_count:
                break
            self._apply(
                self.table.plan(self.forest, self.index, extents_max=8, ops_max=OPS_MAX, body_bytes_max=100_000)
            )
        assert self.table.dirty_count == 0, "flushing ends"
        assert all(decode_extent(name, raw).subpages for name, raw in self.disk.items()), "no empty extent stays"

    def _load(self, redo_from: int) -> tuple[Forest, ExtentTable]:
        table, forest, extents = ExtentTable("g1"), Forest(), []
        for name, raw in self.disk.items():
            _, _, _, cls, partition, last = name.split("/")
            depth, start = parse_extent_name(last)
            extent = decode_extent(name, raw)
            table.add_stored(cls, partition, depth, start, extent)
            extents.append((depth, start, cls, partition, extent))
        for depth, start, cls, partition, extent in sorted(extents, key=lambda found: found[0]):
            for bucket in [bucket for bucket, _ in forest.blobs(cls, partition, *range_of(depth, start))]:
                forest.load_blob(cls, partition, bucket, b"")
            for bucket, blob in extent.subpages:
                forest.load_blob(cls, partition, bucket, blob)
        table.settle(redo_from)
        return forest, table


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
