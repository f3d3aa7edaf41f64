"""Recovery: the table is total, every crash ends in the same state, and damage is named instead of served."""

import asyncio
import contextlib
import itertools
import random
from dataclasses import replace

import pytest

from consul_backend import recovery
from consul_backend.checkpoint import checkpoint_key, decode_checkpoint
from consul_backend.errors import Corrupt, FenceLost, OutcomeUnknown, StoreWentBack, TooLarge, Unavailable
from consul_backend.failpoint import ELECTION_POINTS, LARGE_POINTS, POINTS, REINDEX_POINTS, FailpointHit, arm, disarm
from consul_backend.merkle import entry_digest
from consul_backend.physical import EPOCH_KEY, LOCK_KEY
from consul_backend.recovery import CASES, Action, Facts, classify
from consul_backend.replicated import StoreOptions
from consul_backend.txn import Cas, CheckIndex, CheckSession, Delete, DeleteTree, Set
from consul_backend.wal import Record, Write, record_key, segment_prefix
from consul_backend.wal_reader import list_segments
from tests.support.store import GENERATION, PARTITION, key, memory_cluster

OPTIONS = StoreOptions(
    segment_records=4,
    wal_keep_records=8,
    resolve_timeout_s=2.0,
    flush_interval_s=3600,
    collect_interval_s=3600,
)
WHOLE = StoreOptions(segment_records=4, flush_interval_s=3600, collect_interval_s=3600)


@pytest.fixture
async def cluster(monkeypatch):
    monkeypatch.setattr("tests.support.store.OPTIONS", OPTIONS)
    async with memory_cluster() as made:
        yield made
    disarm()


@contextlib.asynccontextmanager
async def fill(cluster, commits, options=OPTIONS, seed=1):
    """A running store after some commits; the log it wrote is checked by the caller."""
    rng = random.Random(seed)
    async with cluster.running(options) as store:
        for number in range(commits):
            value = None if rng.random() < 0.2 else rng.randbytes(8)
            await store.commit(
                [Write(key(f"k{rng.randrange(40)}"), value), Write(key(f"{number}", "l"), b"%d" % number)]
            )
        yield store


# -- the table


def test_every_combination_of_facts_has_exactly_one_case():
    for row in itertools.product([True, False], repeat=7):
        fits = [
            case.label
            for case in CASES
            if all(want is None or want is fact for want, fact in zip(case.pattern, row, strict=True))
        ]
        assert len(fits) == 1, (row, fits)
        assert classify(Facts(*row)).label == fits[0]


def test_nothing_is_served_without_a_dense_log_that_covers_the_checkpoint():
    for row in itertools.product([True, False], repeat=7):
        facts = Facts(*row)
        safe = facts.log and facts.dense and (not facts.checkpoint or facts.covers)
        if not safe:
            assert classify(facts).action is Action.HALT
        if not facts.whole and (not facts.matches or not facts.checkpoint):
            assert classify(facts).action is Action.HALT, "only a whole log replaces the index"


# -- ordinary recovery


async def recovered(cluster):
    tenure, _ = await cluster.lead()
    return await recovery.recover(cluster.physical, GENERATION, tenure, OPTIONS.segment_records)


async def test_nothing_is_recovered_from_an_answer_that_may_be_old(cluster, monkeypatch):
    async with fill(cluster, 30) as store:
        await store.flush()
    asked = []

    def watched(name, read):
        def ask(*args, consistent=False):
            asked.append((name, consistent))
            return read(*args, consistent=consistent)

        monkeypatch.setattr(cluster.physical, name, ask, raising=False)

    for name in ("get", "get_many", "list"):
        watched(name, getattr(cluster.physical, name))
    await recovered(cluster)
    assert set(asked) == {("get", True), ("get_many", True), ("list", True)}


def watched_pauses(monkeypatch):
    """How long each pause from now on was meant to be."""
    found = []
    sleep = asyncio.sleep

    async def pause(delay_s):
        found.append(delay_s)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", pause)
    return found


async def test_recovery_lets_others_run_and_waits_for_nothing(cluster, monkeypatch):
    async with fill(cluster, 30) as store:
        await store.flush()
        await store.commit([Write(key("late"), b"1")])
    pauses = watched_pauses(monkeypatch)
    await recovered(cluster)
    assert set(pauses) == {0}


async def test_a_long_record_is_repeated_in_several_turns(monkeypatch):
    monkeypatch.setattr(recovery, "_ENTRIES_BETWEEN_TURNS", 2)
    writes = [Write(f"r/p/a/{number}", b"v" if number else None) for number in range(5)]
    record = forged_record(
        9, b"p" * 32, groups={("r", "p"): [(f"a/{n}", write.value) for n, write in enumerate(writes)]}
    )
    changes, pauses = [], watched_pauses(monkeypatch)
    await recovery._redo_record(record, lambda *change: changes.append(change), writes)
    digests = [entry_digest(write.key, write.value) if write.value else None for write in writes]
    assert changes == [("r", "p", f"a/{number}", digest, 9) for number, digest in enumerate(digests)]
    assert pauses == [0, 0]


@pytest.mark.parametrize("flushed", ["never", "before", "collected"])
async def test_what_each_segment_of_the_log_weighs_is_known_again(cluster, flushed):
    async with fill(cluster, 41) as store:
        if flushed != "never":
            await store.flush()
        if flushed == "collected":
            assert await store.collect()
        for number in range(6):
            await store.commit([Write(key(f"late{number}"), b"1")])
    weights = {}
    for segment in await list_segments(cluster.inner, GENERATION):
        names = await cluster.inner.list(segment_prefix(GENERATION, segment))
        items = await cluster.inner.get_many([segment_prefix(GENERATION, segment) + name for name in names])
        weights[segment] = sum(len(item.value) for item in items)
    assert (await recovered(cluster)).segment_bytes == weights


async def test_the_newest_records_that_were_read_are_handed_on(cluster, monkeypatch):
    monkeypatch.setattr(recovery, "RECENT_RECORDS", 5)
    async with fill(cluster, 41):
        pass
    newest = [record.chain_hash for record in (await cluster.records())[-5:]]
    assert [record.chain_hash for record in (await recovered(cluster)).recent] == newest


async def test_first_start_redoes_the_whole_log(cluster, caplog):
    async with fill(cluster, 30):
        pass
    cluster.physical.txns.clear()
    store = await cluster.recover(OPTIONS)
    await cluster.check(store)
    deleted = [op for ops in cluster.physical.txns for op in ops if isinstance(op, Delete | DeleteTree)]
    assert not deleted, "a store that has no index yet is not a damaged one"
    assert "anew" not in caplog.text
    assert store.statistics()["recovery_records_redone"] == 32


async def test_after_a_flush_only_the_rest_is_redone(cluster):
    async with fill(cluster, 30) as store:
        await store.flush()
        await store.commit([Write(key("late"), b"1"), Write(key("k1"), None)])
    again = await cluster.recover(OPTIONS)
    await cluster.check(again)
    assert again.statistics()["recovery_records_redone"] == 1
    assert await again.get(key("late")) == b"1"
    assert await again.get(key("k1")) is None


async def test_the_tenure_record_comes_first(cluster):
    async with fill(cluster, 3) as store:
        first = store.head.index
    again = await cluster.recover(OPTIONS)
    newest = (await cluster.records())[-1]
    assert (newest.index, newest.header.kind, newest.header.epoch) == (first + 1, "tenure", again.tenure.epoch)
    assert newest.header.writer == again.tenure.node_id
    assert newest.chain_hash == again.head.chain_hash


async def test_a_deleted_epoch_key_leaves_the_log_readable(cluster):
    for _ in range(3):
        async with fill(cluster, 3):
            pass
    newest = (await cluster.records())[-1]
    await damage(cluster, [Delete(EPOCH_KEY)])
    again = await cluster.recover(OPTIONS)
    await cluster.check(again)
    epochs = [record.header.epoch for record in await cluster.records()]
    assert epochs == sorted(epochs)
    assert epochs[-1] == again.tenure.epoch == newest.header.epoch + 1
    await again.flush()


async def test_collection_keeps_what_recovery_needs(cluster):
    async with fill(cluster, 40) as store:
        assert await store.collect() == 0, "nothing was flushed: everything is needed"
        await store.flush()
        assert await store.collect() == (store.head.index - 7) // 4
        assert store.oldest_index > 30
    again = await cluster.recover(OPTIONS)
    assert again.oldest_index == store.oldest_index
    await cluster.check(again, whole_log=False)


async def test_a_hold_keeps_the_log_up_to_the_hard_bound(cluster):
    async with fill(cluster, 20) as store:
        await store.flush()
        store.hold("secondary", 3)
        await store.collect()
        assert store.oldest_index == 1
        for number in range(30):
            await store.commit([Write(key(f"m{number}"), b"")])
        await store.flush()
        await store.collect()
        assert store.oldest_index == (store.head.index - 4 * 8 + 1) // 4 * 4, "four times the bound"
        store.unhold("secondary")
        await store.collect()
        assert store.oldest_index == (store.head.index - 8 + 1) // 4 * 4


async def test_a_segment_that_could_not_be_deleted_is_tried_again_before_the_next(cluster):
    async with fill(cluster, 40) as store:
        await store.flush()
        cluster.physical.fault = lambda ops: Unavailable("down")
        with pytest.raises(Unavailable):
            await store.collect()
        cluster.physical.fault = lambda ops: None
        await store.collect()
        assert (await cluster.records())[0].index == store.oldest_index


# -- crashes


# Reindexing is no part of a life that nobody asks to reindex: test_index_check crashes there.
@pytest.mark.parametrize("point", [point for point in POINTS if not point.startswith("reindex")])
@pytest.mark.parametrize("hit", [1, 2, 3])
async def test_a_crash_at_any_point_loses_nothing_acknowledged(cluster, point, hit):
    possible: dict[str, set[bytes | None]] = {}

    async def live(seed, name):
        store = await cluster.recover(OPTIONS)
        running = asyncio.create_task(store._group_commit.run())
        rng = random.Random(seed)
        try:
            for number in range(12):
                where = key(f"k{rng.randrange(9)}")
                value = None if rng.random() < 0.2 else b"%s-%d" % (name, number)
                possible.setdefault(where, {None}).add(value)
                committing = asyncio.create_task(store.commit([Write(where, value)]))
                await asyncio.wait([committing, running], return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    await asyncio.gather(committing, return_exceptions=True)
                    return running.result()
                assert committing.result().index == store.head.index
                possible[where] = {value}
                if number % 4 == 3:
                    await store.flush()
                    await store.collect()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return store

    await live(0, b"before")
    arm(f"{point}=raise:{hit}")
    crashed = False
    for life in range(4):
        try:
            await live(life + 1, b"life%d" % life)
        except FailpointHit:
            crashed = True
            break
    assert crashed, f"{point} was never reached {hit} times"
    disarm()
    store = await cluster.recover(OPTIONS)
    for where, values in possible.items():
        assert await store.get(where) in values
    await cluster.check(store, whole_log=False)


@pytest.mark.parametrize("points", list(itertools.product([p for p in POINTS if p.startswith("recovery")], repeat=3)))
async def test_crashes_during_recovery_change_nothing(cluster, points):
    async with fill(cluster, 10) as store:
        await store.flush()
        await store.commit([Write(key("late"), b"1")])
        root = store.forest.root("r")
    for point in points:
        arm(f"{point}=raise")
        with pytest.raises(FailpointHit):
            await cluster.recover(OPTIONS)
    again = await cluster.recover(OPTIONS)
    assert again.forest.root("r") == root
    await cluster.check(again)


# -- damage


async def damage(cluster, ops):
    await cluster.inner.txn(ops)


async def test_a_missing_record_is_named(cluster):
    async with fill(cluster, 20):
        pass
    await damage(cluster, [Delete(record_key(GENERATION, 9, 4))])
    with pytest.raises(Corrupt, match="log torn: record 9 is missing"):
        await cluster.recover(OPTIONS)


async def test_a_damaged_record_is_named(cluster):
    async with fill(cluster, 20):
        pass
    where = record_key(GENERATION, 9, 4)
    item = await cluster.inner.get(where)
    await damage(cluster, [Set(where, item.value[:-1] + b"\0")])
    with pytest.raises(Corrupt, match=where):
        await cluster.recover(OPTIONS)


def forged_record(index, prev_hash, epoch=1, groups=()):
    return Record.build(
        index=index,
        prev_hash=prev_hash,
        epoch=epoch,
        writer="other",
        batch_id=b"b" * 16,
        time_ms=1,
        kind="data",
        positions={},
        groups=dict(groups),
    )


async def test_a_first_record_that_follows_another_is_named(cluster):
    """As when the log of one generation is put into another's place."""
    where = record_key(GENERATION, 1, 4)
    await damage(cluster, [Set(where, forged_record(1, b"p" * 32).encode())])
    with pytest.raises(Corrupt, match=f"{where}: the first record follows another one"):
        await cluster.recover(OPTIONS)


async def test_a_record_of_another_history_is_named(cluster):
    async with fill(cluster, 20):
        pass
    where = record_key(GENERATION, 9, 4)
    header = Record.decode((await cluster.inner.get(where)).value).header
    forged = forged_record(9, header.prev_hash, header.epoch)
    await damage(cluster, [Set(where, forged.encode())])
    with pytest.raises(Corrupt, match=f"{record_key(GENERATION, 10, 4)}.*hash chain"):
        await cluster.recover(OPTIONS)


async def test_another_newest_record_than_the_checkpoint_s_is_named(cluster):
    async with fill(cluster, 20) as store:
        await store.flush()
        newest = store.head.index
    where = record_key(GENERATION, newest, 4)
    header = Record.decode((await cluster.inner.get(where)).value).header
    forged = forged_record(newest, header.prev_hash, header.epoch)
    await damage(cluster, [Set(where, forged.encode())])
    with pytest.raises(Corrupt, match=f"{where}: the checkpoint was written after another record"):
        await cluster.recover(OPTIONS)


async def test_an_older_tenure_s_record_on_top_is_named(cluster):
    async with fill(cluster, 3) as store:
        newest = (await store.records(store.head.index, 1))[0]
    forged = forged_record(newest.index + 1, newest.chain_hash, newest.header.epoch - 1)
    where = record_key(GENERATION, forged.index, 4)
    await damage(cluster, [Set(where, forged.encode())])
    with pytest.raises(Corrupt, match=f"{where}: its writer's epoch is older"):
        await cluster.recover(OPTIONS)


async def test_a_record_in_another_s_place_is_named(cluster):
    async with fill(cluster, 20) as store:
        await store.flush()
        newest = store.head.index
    where = record_key(GENERATION, newest, 4)
    before = await cluster.inner.get(record_key(GENERATION, newest - 1, 4))
    await damage(cluster, [Set(where, before.value)])
    with pytest.raises(Corrupt, match=f"{where} holds record {newest - 1}"):
        await cluster.recover(OPTIONS)


async def test_a_segment_that_lost_its_first_record_is_torn(cluster):
    async with fill(cluster, 40) as store:
        await store.flush()
        await store.collect()
        oldest = store.oldest_index
    await damage(cluster, [Delete(record_key(GENERATION, oldest, 4))])
    with pytest.raises(Corrupt, match=f"log torn: record {oldest} is missing"):
        await cluster.recover(OPTIONS)


async def test_two_records_in_each_other_s_place_are_named(cluster):
    async with fill(cluster, 20):
        pass
    nine, ten = record_key(GENERATION, 9, 4), record_key(GENERATION, 10, 4)
    first, second = await cluster.inner.get(nine), await cluster.inner.get(ten)
    await damage(cluster, [Set(nine, second.value), Set(ten, first.value)])
    with pytest.raises(Corrupt, match=nine):
        await cluster.recover(OPTIONS)


async def test_records_lost_after_the_checkpoint_was_written(cluster):
    async with fill(cluster, 20) as store:
        await store.flush()
        newest = store.head.index
    await damage(cluster, [Delete(record_key(GENERATION, newest, 4))])
    with pytest.raises(Corrupt, match="log shorter than the checkpoint"):
        await cluster.recover(OPTIONS)


async def extents(cluster):
    prefix = f"g/{GENERATION}/merkle/r/{PARTITION}/"
    return [prefix + name for name in await cluster.inner.list(prefix)]


@pytest.mark.parametrize("kind", ["flip", "missing", "older", "foreign name", "checkpoint flip", "checkpoint missing"])
@pytest.mark.parametrize("collected", [False, True])
async def test_a_damaged_index_is_rebuilt_from_the_whole_log_or_refused(cluster, kind, collected, caplog):
    async with fill(cluster, 20) as store:
        await store.flush()
        (where,) = await extents(cluster)
        older = (await cluster.inner.get(where)).value
        for number in range(20):
            await store.commit([Write(key(f"n{number}"), b"1")])
        await store.flush()
        if collected:
            assert await store.collect()
        root = store.forest.root("r")
    newer = (await cluster.inner.get(where)).value
    checkpoint = checkpoint_key(GENERATION)
    raw = (await cluster.inner.get(checkpoint)).value
    await damage(
        cluster,
        {
            "flip": [Set(where, newer[:40] + bytes((newer[40] ^ 1,)) + newer[41:])],
            "missing": [Delete(where)],
            "older": [Set(where, older)],
            "foreign name": [Set(where + "x", newer)],
            "checkpoint flip": [Set(checkpoint, raw[:-1] + bytes((raw[-1] ^ 1,)))],
            "checkpoint missing": [Delete(checkpoint)],
        }[kind],
    )
    if collected:
        with pytest.raises(Corrupt, match=r"index damaged|checkpoint lost"):
            await cluster.recover(OPTIONS)
        return
    again = await cluster.recover(OPTIONS)
    assert "the index is made anew from the log" in caplog.text, "an operator must know"
    assert again.forest.root("r") == root
    await cluster.check(again)
    await again.flush()
    once_more = await cluster.recover(OPTIONS)
    assert once_more.statistics()["recovery_records_redone"] <= 2
    await cluster.check(once_more)


async def test_an_older_checkpoint_put_back_is_seen(cluster):
    async with fill(cluster, 20) as store:
        await store.flush()
        older = (await cluster.inner.get(checkpoint_key(GENERATION))).value
        for number in range(20):
            await store.commit([Write(key(f"n{number}"), b"1")])
        await store.flush()
        await store.collect()
    await damage(cluster, [Set(checkpoint_key(GENERATION), older)])
    with pytest.raises(Corrupt, match="generation g1"):
        await cluster.recover(OPTIONS)


async def test_a_log_that_begins_just_where_recovery_begins_to_read_is_enough(cluster):
    async with fill(cluster, 40) as store:
        await store.flush()
        for number in range(OPTIONS.segment_records):
            if store._flusher.checkpoint.scan_from % OPTIONS.segment_records:
                await store.commit([Write(key(f"n{number}"), b"1")])
                await store.flush()
        checkpoint = store._flusher.checkpoint
        await store.commit([Write(key("late"), b"1")])
    first, behind = divmod(checkpoint.scan_from, OPTIONS.segment_records)
    assert (first > 1, behind) == (True, 0)
    await damage(cluster, [DeleteTree(segment_prefix(GENERATION, segment)) for segment in range(first)])
    again = await cluster.recover(OPTIONS)
    await cluster.check(again, whole_log=False)


async def test_a_segment_collected_between_two_readings_of_the_log_is_no_damage(cluster, monkeypatch):
    async with fill(cluster, 40) as store:
        await store.flush()
        await store.collect()
    listed = recovery.list_segments

    async def as_before(physical, generation):
        segments = await listed(physical, generation)
        assert segments[0] > 0, "something was collected"
        return [segments[0] - 1, *segments]

    monkeypatch.setattr(recovery, "list_segments", as_before)
    again = await cluster.recover(OPTIONS)
    await cluster.check(again, whole_log=False)


async def test_a_log_cut_below_the_redo_point_is_refused(cluster):
    async with fill(cluster, 4) as store:
        await store.flush()
        for number in range(8):
            await store.commit([Write(key(f"n{number}"), b"1")])
    await damage(
        cluster, [DeleteTree(f"g/{GENERATION}/wal/0000000000/"), DeleteTree(f"g/{GENERATION}/wal/0000000001/")]
    )
    with pytest.raises(Corrupt, match="log cut"):
        await cluster.recover(OPTIONS)


async def test_an_empty_generation_is_refused(cluster):
    await damage(cluster, [DeleteTree(f"g/{GENERATION}/")])
    with pytest.raises(Corrupt, match="no log"):
        await cluster.recover(OPTIONS)


async def test_another_segment_size_is_refused(cluster):
    async with fill(cluster, 20):
        pass
    with pytest.raises(Corrupt, match="wrong for 8 records a segment"):
        await cluster.recover(StoreOptions(segment_records=8))


# -- flushing


async def test_a_flush_is_fenced_and_chained(cluster):
    async with fill(cluster, 3) as store:
        await store.flush()
        before = await cluster.inner.get(checkpoint_key(GENERATION))
        await store.commit([Write(key("a"), b"")])
        await store.flush()
        ops = cluster.physical.txns[-1]
        newest = record_key(GENERATION, store.head.index, OPTIONS.segment_records)
        assert ops[:3] == (
            CheckSession(LOCK_KEY, store.tenure.session),
            CheckIndex(EPOCH_KEY, store.tenure.epoch_index),
            CheckIndex(newest, (await cluster.inner.get(newest)).modify_index),
        )
        assert (ops[3].key, ops[3].index) == (checkpoint_key(GENERATION), before.modify_index)
        checkpoint = decode_checkpoint(GENERATION, (await cluster.inner.get(checkpoint_key(GENERATION))).value)
        assert (checkpoint.head_index, checkpoint.head_hash) == (store.head.index, store.head.chain_hash)


@pytest.mark.parametrize("write", ["flush", "collect"])
@pytest.mark.parametrize("lost", ["session", "epoch"])
async def test_a_deposed_node_neither_flushes_nor_collects(cluster, write, lost):
    """Each of the two guards by itself: the other one still passes."""
    async with fill(cluster, 40) as store:
        await store.flush()
        await store.commit([Write(key("a"), b"")])
        if lost == "session":
            await cluster.depose()
        else:
            await damage(cluster, [Set(EPOCH_KEY, b"99")])
        with pytest.raises(FenceLost):
            await (store.flush() if write == "flush" else store.collect())


@pytest.mark.parametrize("write", ["flush", "collect"])
async def test_upkeep_of_a_log_that_is_no_longer_the_one_written_stops(cluster, write):
    """As after a snapshot from within this very tenure: session and epoch pass, the newest record is gone."""
    async with fill(cluster, 40) as store:
        await store.flush()
        await store.commit([Write(key("a"), b"")])
        before = await cluster.inner.get(checkpoint_key(GENERATION))
        await damage(cluster, [Delete(record_key(GENERATION, store.head.index, OPTIONS.segment_records))])
        with pytest.raises(StoreWentBack, match="restored or changed underneath"):
            await (store.flush() if write == "flush" else store.collect())
        assert await cluster.inner.get(checkpoint_key(GENERATION)) == before


@pytest.mark.parametrize("fate", ["lose-before", "lose-after", "late"])
async def test_a_flush_whose_answer_is_lost_is_sent_again(cluster, fate):
    async with fill(cluster, 10) as store:
        cluster.physical.fault = lambda ops: fate
        with pytest.raises(OutcomeUnknown):
            await store.flush()
        cluster.physical.fault = lambda ops: None
        await store.commit([Write(key("k1"), b"new")])
        await store.flush()
        assert True not in await cluster.physical.land(), "a late duplicate of an older flush is refused"
    again = await cluster.recover(OPTIONS)
    assert again.statistics()["recovery_records_redone"] == 0
    await cluster.check(again)


async def test_a_lost_flush_that_is_refused_for_its_size_afterwards_ends_the_tenure(cluster):
    """It can neither be sent again nor forgotten; the next tenure finds out whether it was applied."""
    fates = iter(["lose-after", *[TooLarge("too large")] * 3])
    options = replace(OPTIONS, flush_interval_s=0.01)
    store = await cluster.recover(options)

    def fault(ops):
        flushes = any(isinstance(op, Cas) and op.key.endswith("/checkpoint") for op in ops)
        return next(fates, None) if flushes else None

    cluster.physical.fault = fault
    running = asyncio.create_task(store.run())
    await store.commit([Write(key("a"), b"1")])
    with pytest.raises(BaseExceptionGroup) as ended:
        await asyncio.wait_for(running, 120)
    assert ended.value.subgroup(OutcomeUnknown) is not None
    cluster.physical.fault = lambda ops: None
    async with cluster.running(options) as store:
        await store.commit([Write(key("b"), b"1")])
        await cluster.check(store)


async def test_a_refused_flush_is_dirty_again(cluster):
    async with fill(cluster, 10) as store:
        cluster.physical.fault = lambda ops: Unavailable("down")
        with pytest.raises(Unavailable):
            await store.flush()
        cluster.physical.fault = lambda ops: None
        await store.flush()
    again = await cluster.recover(OPTIONS)
    assert again.statistics()["recovery_records_redone"] == 0
    await cluster.check(again)


async def test_a_foreign_checkpoint_stops_the_flusher(cluster):
    async with fill(cluster, 10) as store:
        await store.flush()
        await damage(cluster, [Set(checkpoint_key(GENERATION), b"foreign")])
        await store.commit([Write(key("a"), b"")])
        with pytest.raises(StoreWentBack):
            await store.flush()


async def test_a_big_partition_splits_over_many_transactions_and_survives_a_crash_between_them(cluster):
    async with cluster.running(WHOLE) as store:
        await store.commit([Write(key("first"), b"")])
        await store.flush()
        for number in range(60):
            await store.commit([Write(key(f"team/application/{number}-{n}" + "x" * 40), b"") for n in range(60)])
        flushed = 0
        while flushed < 2:
            await store._flusher.flush()
            flushed += 1
    again = await cluster.recover(WHOLE)
    await cluster.check(again)
    await again.flush()
    assert len(await extents(cluster)) > 8
    last = await cluster.recover(WHOLE)
    assert last.statistics()["recovery_records_redone"] == 0
    await cluster.check(last)


def test_every_failpoint_is_in_the_code_and_the_other_way_round():
    import pathlib
    import re

    import consul_backend

    folder = pathlib.Path(consul_backend.__file__).parent
    used = [name for file in folder.glob("*.py") for name in re.findall(r'failpoint\("([^"]+)"\)', file.read_text())]
    assert sorted(used) == sorted([*POINTS, *LARGE_POINTS, *ELECTION_POINTS, *REINDEX_POINTS])


@pytest.mark.parametrize("spec", ["nowhere=raise", "commit:before-send", "commit:before-send=burn", "flush:=kill"])
def test_a_misspelt_failpoint_is_refused(spec):
    with pytest.raises(ValueError, match="not a failpoint"):
        arm(spec)
