"""Large batches in the replicated store: whole to every reader, in the data keys at last, and kind to small writes."""

import asyncio
import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consul_backend.batching import MANIFEST_MAGIC
from consul_backend.chunks import chunk_prefix, decode_manifest
from consul_backend.embedded import EmbeddedStore
from consul_backend.errors import NotApplied, OutcomeUnknown, Overloaded, PermissionDenied, TooLarge, Unavailable
from consul_backend.generation import drop_generation, physical_key, read_entry
from consul_backend.limits import Limits, excess
from consul_backend.replicated import StoreOptions
from consul_backend.txn import Cas, CheckIndex, CheckSession, Set
from consul_backend.wal import Record, Write
from tests.support.store import GENERATION, PARTITION, Cluster, key, memory_cluster

QUIET = StoreOptions(segment_records=8, flush_interval_s=3600, collect_interval_s=3600, resolve_timeout_s=2.0)
BUSY = StoreOptions(segment_records=8, wal_keep_records=4, flush_interval_s=0.01, collect_interval_s=0.01)
SMALL = Limits(ops_max=8, body_bytes_max=48 * 1024, value_bytes_max=16 * 1024)
"""A store so small that a few kilobytes are a large batch."""


@pytest.fixture
async def cluster():
    async with memory_cluster(SMALL) as made:
        yield made


def batch(count, value=b"new", cls="r"):
    return [Write(key(f"k{number}", cls), value) for number in range(count)]


def kinds(records):
    return [record.header.kind for record in records]


async def test_a_batch_of_many_entries_is_whole_and_ends_in_its_data_keys(cluster):
    async with cluster.running(QUIET) as store:
        head = await store.commit([*batch(500), Write(key("k7", "l"), b"local"), Write(key("k3"), None)])
        assert head.index == store.head.index or store.head.index > head.index
        assert await store.get(key("k0")) == b"new"
        assert await store.get(key("k3")) is None
        assert [await store.exists(key(name)) for name in ("k0", "k3", "none")] == [True, False, False]
        assert await store.get(key("k7", "l")) == b"local"
        assert await store.list(f"r/{PARTITION}/") == sorted(f"k{n}" for n in range(500) if n != 3)
        await store.rolled()
        assert store.statistics()["large_overlay_entries"] == 0
        await cluster.check(store)
        found = kinds(await cluster.records())
        assert found.count("commit") == 1
        assert found[-1] == "roll"
        assert (store.statistics()["large_batches"], store.statistics()["large_aborted"]) == (1, 0)


async def test_big_values_are_chunked_read_replaced_and_collected(cluster):
    big = random.Random(1).randbytes(200_000)
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("big"), big), Write(key("odd"), MANIFEST_MAGIC + b"client's"), *batch(3)])
        assert await store.get(key("big")) == big
        await store.rolled()
        assert decode_manifest((await cluster.inner.get(physical_key(GENERATION, key("big")))).value) is not None
        assert await store.get(key("big")) == big
        assert await store.get(key("odd")) == MANIFEST_MAGIC + b"client's"
        assert await store.list(f"r/{PARTITION}/") == ["big", "k0", "k1", "k2", "odd"]
        await cluster.check(store)
    assert await read_entry(cluster.inner, GENERATION, key("big")) == big
    async with cluster.running(BUSY) as store:
        assert await store.get(key("big")) == big
        newer = random.Random(2).randbytes(30_000)
        await store.commit([Write(key("big"), newer)])
        await store.commit([Write(key("odd"), b"short")])
        await store.rolled()
        folders = await eventually(lambda: cluster.inner.list(chunk_prefix(GENERATION)), lambda found: len(found) == 1)
        assert len(folders) == 1
        assert await store.get(key("big")) == newer
        await store.commit([Write(key("big"), None)])
        await eventually(lambda: cluster.inner.list(chunk_prefix(GENERATION)), lambda found: found == [])
        assert await store.get(key("big")) is None
        await cluster.check(store, whole_log=False)
    await drop_generation(cluster.inner, GENERATION, cluster.tenure)
    assert await cluster.inner.list("g/") == []


async def eventually(read, holds):
    async with asyncio.timeout(120):
        while not holds(found := await read()):  # noqa: ASYNC110  # the store tells nobody
            await asyncio.sleep(0.005)
    return found


async def test_which_values_may_be_large_is_known_once_they_were_looked_for(cluster):
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("big"), b"b" * 600_000), Write(key("small"), b"s")])
        await store.rolled()
    store = await cluster.recover(QUIET)
    assert store.may_be_large(key("small")), "nobody has looked yet"
    await store._chunks.collect()
    assert not store.may_be_large(key("small"))
    assert store.may_be_large(key("big"))


async def test_chunks_that_nobody_names_are_swept_by_the_next_tenure(cluster):
    await cluster.inner.txn([Set(chunk_prefix(GENERATION, "left") + "000000", b"left by a crash")])
    async with cluster.running(QUIET) as store:
        await store.commit([Write(key("big"), b"v" * 50_000)])
        await store.rolled()
    async with cluster.running(BUSY) as store:
        async with asyncio.timeout(120):
            while not store.statistics()["chunked_values"]:  # noqa: ASYNC110  # the store tells nobody
                await asyncio.sleep(0.005)
        assert len(await cluster.inner.list(chunk_prefix(GENERATION))) == 1
        assert await store.get(key("big")) == b"v" * 50_000


async def test_readers_never_see_a_mix_while_small_writes_go_on(cluster):
    """Every snapshot of reads made between two awaits of the event loop's is of one generation of the batch."""
    count = 120
    async with cluster.running(BUSY) as store:
        done = asyncio.Event()
        seen: set[bytes | None] = set()
        small = itertools.count()
        names = [f"k{number}" for number in range(count)]

        async def watch():
            # Ascending through a descending range of generations would show a mix as an older value after a newer.
            newest = -1
            while not done.is_set():
                await asyncio.sleep(0.0005)
                value = await store.get(key(random.choice(names)))
                seen.add(value)
                number = int(value or b"-1")
                assert number >= newest, "an older value after a newer one: half of the batch was seen"
                newest = number

        async def listing():
            while not done.is_set():
                found = await store.list(f"r/{PARTITION}/")
                assert len([name for name in found if name.startswith("k")]) in (0, count)
                await asyncio.sleep(0)  # a list that is in memory gives nobody else a turn

        async def write():
            while not done.is_set():
                await store.commit([Write(key("small", "l"), b"%d" % next(small))])

        tasks = [asyncio.create_task(work()) for work in (watch, watch, listing, write)]
        for number in range(6):
            await store.commit(batch(count, b"%d" % number))
            assert await store.get(key("k0")) == b"%d" % number
        await store.rolled()
        done.set()
        await asyncio.gather(*tasks)
        assert len(seen) >= 4
        assert store.statistics()["foreign_writes"] == 0
        await cluster.check(store, whole_log=False)


async def test_small_writes_pass_between_the_parts(cluster):
    """A small write never waits for more than one special record."""
    async with cluster.running(QUIET) as store:
        large = asyncio.create_task(store.commit(batch(2000, b"v" * 50)))
        waited = []
        while not large.done():
            before = store.statistics()["commit_specials"]
            await store.commit([Write(key("small", "l"), b"%d" % len(waited))])
            waited.append(store.statistics()["commit_specials"] - before)
        await large
        assert len(waited) > 3
        assert max(waited) <= 2


async def test_later_writes_replace_the_roll_forward(cluster):
    async with cluster.running(QUIET) as store:
        await store.commit(batch(100, b"old"))
        later = [store.commit([Write(key(f"k{n}"), b"later" if n % 2 else None)]) for n in range(0, 100, 3)]
        await asyncio.gather(*later)
        await store.commit(batch(50, b"second")[25:])
        await store.rolled()
        for number in range(100):
            expected = b"old" if number % 3 else (b"later" if number % 2 else None)
            if 25 <= number < 50:
                expected = b"second"
            assert await store.get(key(f"k{number}")) == expected
        await cluster.check(store)


async def test_a_chunked_value_replaced_before_its_roll_forward(cluster):
    async with cluster.running(QUIET) as store:
        cluster.physical.gate.set()
        await store.commit([Write(key("big"), b"v" * 60_000), *batch(60)])
        await store.commit([Write(key("big"), b"small")])
        await store.rolled()
        assert await store.get(key("big")) == b"small"
        await cluster.check(store)


@pytest.mark.parametrize("kind", ["part", "commit"])
@pytest.mark.parametrize("refusal", [PermissionDenied("no right"), Unavailable("away")])
async def test_a_batch_that_fails_before_its_commit_record_is_aborted(cluster, kind, refusal):
    async with cluster.running(QUIET) as store:
        await store.commit(batch(3, b"old"))
        refused = itertools.count()

        def fault(ops):
            if record_kind(ops) != kind:
                return None
            return None if kind == "part" and next(refused) == 0 else refusal

        cluster.physical.fault = fault
        with pytest.raises((PermissionDenied, NotApplied)):
            await store.commit(batch(800, b"v" * 50))
        cluster.physical.fault = lambda ops: None
        await store.rolled()
        assert await store.get(key("k1")) == b"old"
        assert await store.list(f"r/{PARTITION}/") == ["k0", "k1", "k2"]
        assert store.statistics()["large_aborted"] == 1
        await store.commit(batch(300))
        await store.rolled()
        await cluster.check(store)


def record_kind(ops):
    if isinstance(ops[-1], Cas) and "/wal/" in ops[-1].key:
        return Record.decode(ops[-1].value).header.kind
    return ""


@pytest.mark.parametrize("kind", ["part", "commit", "roll", "abort"])
@pytest.mark.parametrize("fate", ["lose-before", "lose-after", "twice"])
async def test_lost_answers_of_special_records_are_resolved(cluster, kind, fate):
    async with cluster.running(QUIET) as store:
        hits = itertools.count()

        def fault(ops):
            found = record_kind(ops)
            if kind == "abort" and found == "commit":
                return PermissionDenied("no right")
            return fate if found == kind and next(hits) % 2 == 0 else None

        cluster.physical.fault = fault
        outcome = await asyncio.gather(store.commit(batch(200)), return_exceptions=True)
        assert isinstance(outcome[0], PermissionDenied) == (kind == "abort")
        await store.rolled()
        assert next(hits) > 0
        await cluster.check(store)


async def test_the_order_of_an_unknown_roll_and_a_later_write_is_the_log_s(cluster):
    """The duplicate of a roll-forward that lands late must not bring an older value back."""
    async with cluster.running(QUIET) as store:
        rolled = itertools.count()
        cluster.physical.fault = lambda ops: "late" if record_kind(ops) == "roll" and next(rolled) == 0 else None
        await store.commit(batch(30, b"old"))
        await store.rolled()
        await store.commit([Write(key("k0"), b"later")])
        assert await cluster.physical.land() == [False]
        await cluster.check(store)


async def test_the_outcome_of_a_lost_commit_record_is_unknown_and_the_tenure_ends(cluster):
    store = await cluster.recover(QUIET)
    running = asyncio.create_task(store.run())
    cluster.physical.fault = lambda ops: "lose-after" if record_kind(ops) == "commit" else None
    cluster.physical.read_fault = Unavailable("away")
    store._group_commit._options = type(store._group_commit._options)(10, 10**6, 0.05, 8)
    with pytest.raises(OutcomeUnknown):
        await store.commit(batch(100))
    with pytest.raises(BaseExceptionGroup):
        await running
    with pytest.raises(NotApplied):
        await store.commit(batch(100))
    cluster.physical.fault, cluster.physical.read_fault = lambda ops: None, None
    again = await cluster.recover(QUIET)
    assert await again.get(key("k0")) == b"new"
    await cluster.check(again)


async def test_every_special_record_is_fenced_and_chained(cluster):
    async with cluster.running(QUIET) as store:
        await store.commit(batch(100))
        await store.rolled()
    special = [ops for ops in cluster.physical.txns if record_kind(ops) in {"part", "commit", "roll"}]
    assert len(special) > 10
    for ops in special:
        assert isinstance(ops[0], CheckSession)
        assert isinstance(ops[1], CheckIndex)
        data = ops[2:-1]
        assert bool(data) == (record_kind(ops) == "roll")


async def test_bounds_and_queues(cluster):
    options = StoreOptions(
        segment_records=8, flush_interval_s=3600, batch_entries_max=50, batch_bytes_max=40_000, large_queue_max=1
    )
    async with cluster.running(options) as store:
        with pytest.raises(TooLarge, match="51 entries in one batch, the limit is 50"):
            await store.commit(batch(51))
        with pytest.raises(TooLarge, match="the limit is 40000"):
            await store.commit([Write(key("big"), b"v" * 40_200)])
        tasks = [asyncio.create_task(store.commit(batch(50, b"%d" % n))) for n in range(6)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(outcome, Overloaded) for outcome in outcomes)
        assert not isinstance(outcomes[0], BaseException)
        held = [asyncio.create_task(store.commit(batch(50, b"%d" % n))) for n in range(2)]
        while not store.statistics()["large_queue"]:  # noqa: ASYNC110  # the store tells nobody
            await asyncio.sleep(0)
        held[1].cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await store.rolled()
        await cluster.check(store)


async def test_the_log_keeps_a_commit_record_together_with_its_parts(cluster):
    async with cluster.running(BUSY) as store:
        for number in range(4):
            large = asyncio.create_task(store.commit(batch(300, b"%d" % number * 100)))
            while not large.done():
                await store.commit([Write(key("small"), b"x")])
            for _ in range(10):
                await store.commit([Write(key("small"), b"%d" % number)])
                records = await store.records(store.oldest_index, 10_000, bytes_max=1 << 30)
                there = {record.index for record in records}
                for record in records:
                    assert record.header.large is None or {part.index for part in record.header.large.parts} <= there
        await store.rolled()
        assert store.oldest_index > 1


class Shrinking(EmbeddedStore):
    """A store whose server turns out to take less than it seemed; it learns from the refusal, as ConsulStore does."""

    real: Limits | None = None
    learnt: Limits | None = None

    @property
    def limits(self):
        return self.learnt or super().limits

    async def txn(self, ops):
        if self.real is not None and (problem := excess(ops, self.real)) is not None:
            self.learnt = self.real
            raise TooLarge(problem)
        return await super().txn(ops)


async def test_limits_learnt_from_a_refusal_never_fail_a_write():
    physical = Shrinking(None, limits=Limits(ops_max=128))
    await physical.open()
    try:
        cluster = Cluster(physical)
        await cluster.genesis()
        async with cluster.running(QUIET) as store:
            await store.commit(batch(120))
            assert kinds(await cluster.records())[-1] == "data"
            physical.real = SMALL
            one = [store.commit([Write(key(f"s{n}"), b"1")]) for n in range(60)]
            await asyncio.gather(*one, store.commit(batch(120, b"two")), store.commit([Write(key("v"), b"v" * 20_000)]))
            await store.rolled()
            assert store.statistics()["commit_relimited"] == 1
            assert await store.get(key("v")) == b"v" * 20_000
            await cluster.check(store)
            physical.real = Limits(ops_max=5, body_bytes_max=16 * 1024, value_bytes_max=9 * 1024)
            await store.commit([*batch(300, b"three"), Write(key("v"), b"w" * 30_000)])
            await store.rolled()
            await cluster.check(store)
    finally:
        await physical.close()


values = st.one_of(st.none(), st.binary(max_size=20), st.integers(0, 40_000).map(lambda size: b"v" * size))
commits = st.lists(st.dictionaries(st.integers(0, 25), values, min_size=1, max_size=26), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(commits, st.booleans())
async def test_any_batches_agree_with_a_dictionary(batches, takeover):
    async with memory_cluster(SMALL) as cluster:
        true: dict[str, bytes] = {}
        async with cluster.running(BUSY) as store:
            for writes in batches:
                await store.commit([Write(key(f"f{n % 3}/k{n}"), value) for n, value in writes.items()])
                for n, value in writes.items():
                    true.pop(f"f{n % 3}/k{n}", None)
                    if value is not None:
                        true[f"f{n % 3}/k{n}"] = value
                for n in writes:
                    assert await store.get(key(f"f{n % 3}/k{n}")) == true.get(f"f{n % 3}/k{n}")
                folders = {name.split("/")[0] + "/" for name in true}
                assert await store.list(f"r/{PARTITION}/") == sorted(folders)
            if not takeover:
                await store.rolled()
                await cluster.check(store, whole_log=False)
        again = await cluster.recover(BUSY)
        await cluster.check(again, whole_log=False)
        for n in range(26):
            assert await again.get(key(f"f{n % 3}/k{n}")) == true.get(f"f{n % 3}/k{n}")
