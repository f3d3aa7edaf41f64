"""The check names what does not hold and changes nothing; a reindex restores what the log proves and adopts nothing."""

import asyncio
import random

import msgspec
import pytest

from consul_backend import index_check
from consul_backend.chunks import CHUNKS_MAX, Manifest, decode_manifest, encode_manifest
from consul_backend.errors import FenceLost, ForeignWrite, IndexDamaged, OutcomeUnknown, TooLarge
from consul_backend.failpoint import FailpointHit, arm, disarm
from consul_backend.index_check import Kind, Progress, check
from consul_backend.limits import Limits, body_bytes
from consul_backend.merkle import SUBPAGES, bucket_of
from consul_backend.reindex import Quarantined, ReindexOptions, heal, quarantine_prefix, reindex
from consul_backend.replicated import StoreOptions, physical_key
from consul_backend.txn import CheckNotExists, Delete, Set
from consul_backend.wal import Write
from tests.support.store import GENERATION, PARTITION, key, memory_cluster
from tests.unit.test_lazy_index import LAZY, damage, extent_keys, fill, page_of

KEEP = StoreOptions(segment_records=8, flush_interval_s=0.01, collect_interval_s=3600)
FORGET = StoreOptions(segment_records=8, wal_keep_records=4, flush_interval_s=3600, collect_interval_s=3600)


@pytest.fixture
async def cluster():
    async with memory_cluster() as made:
        yield made
    disarm()


def where(name):
    return physical_key(GENERATION, name)


async def entries(store, count=200):
    data = {}
    for start in range(0, count, 50):
        names = [key(f"f{n % 5}/k{n}", "rl"[n % 3 == 0]) for n in range(start, start + 50)]
        await store.commit([Write(name, name.encode()) for name in names])
        data |= {name: name.encode() for name in names}
    return data


async def checked(store, **options):
    return await check(store.inspected(), Progress(), **options)


async def repaired(store, **options):
    return await reindex(store.inspected(), ReindexOptions(**options), Progress())


async def stored(cluster, prefix):
    found = {}
    for name in await cluster.inner.list(prefix):
        if name.endswith("/"):
            found |= await stored(cluster, prefix + name)
        else:
            found[prefix + name] = (await cluster.inner.get(prefix + name)).value
    return found


async def test_a_sound_store_is_found_sound_while_it_is_written_to(cluster):
    async with cluster.running(KEEP) as store:
        data = await entries(store)
        stop = asyncio.Event()

        async def write():
            rng = random.Random(1)
            while not stop.is_set():
                name = rng.choice(sorted(data))
                await store.commit([Write(name, rng.choice([None, rng.randbytes(5)]))])

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            for _ in range(5):
                report = await checked(store)
                assert not report.corrupted, report
            stop.set()
        assert (await checked(store)).keys == sum(store.forest.count(cls, PARTITION) for cls in "rl") + 1


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("cls", ["r", "l"])
async def test_each_kind_of_foreign_write_is_named_and_healed_from_the_log(cluster, kind, cls):
    async with cluster.running(KEEP) as store:
        data = await entries(store)
        victim = sorted(name for name in data if name.startswith(cls))[3]
        if kind is Kind.EXTRA:
            victim = key("planted", cls)
        op = Delete(where(victim)) if kind is Kind.LOST else Set(where(victim), b"foreign")
        await cluster.inner.txn([op])
        before = await stored(cluster, f"g/{GENERATION}/d/")
        report = await checked(store)
        assert [(found.kind, found.key) for found in report.findings] == [(kind, victim)]
        page, subpage = divmod(bucket_of(victim.split("/", 2)[2]), SUBPAGES)
        assert report.pages == {(cls, PARTITION): {page: {subpage}}}
        assert await stored(cluster, f"g/{GENERATION}/d/") == before, "a check changes nothing"

        root, head = store.forest.root(cls), store.head.index
        done = await repaired(store)
        assert (done.restored, done.quarantined) == (kind is not Kind.EXTRA, kind is not Kind.LOST)
        assert done.clean
        assert (store.forest.root(cls), store.head.index) == (root, head), "nothing was adopted, nothing was committed"
        assert not (await checked(store)).corrupted
        await cluster.check(store)
        aside = [msgspec.msgpack.decode(raw, type=Quarantined) for raw in (await quarantined(cluster)).values()]
        assert [(one.key, one.value) for one in aside] == ([] if kind is Kind.LOST else [(victim, b"foreign")])


async def quarantined(cluster):
    return await stored(cluster, quarantine_prefix(GENERATION))


async def forgotten(cluster):
    """Entries whose records the log no longer has."""
    async with cluster.running(FORGET) as store:
        data = await entries(store, 50)
    async with cluster.running(FORGET) as store:
        for number in range(40):
            await store.commit([Write(key("busy"), b"%d" % number)])
    store = await cluster.recover(FORGET)
    await store.flush()
    assert await store.collect()
    return data


@pytest.mark.parametrize("kind", [Kind.FOREIGN, Kind.LOST])
async def test_beyond_the_log_only_force_gives_up(cluster, kind):
    data = await forgotten(cluster)
    victim = sorted(data)[5]
    await cluster.inner.txn([Delete(where(victim)) if kind is Kind.LOST else Set(where(victim), b"foreign")])
    async with cluster.running(FORGET) as store:
        done = await repaired(store)
        assert (done.unresolved, done.restored, done.dropped) == (1, 0, 0)
        with pytest.raises(ForeignWrite):
            await store.get(victim)
        done = await repaired(store, force=True)
        assert (done.unresolved, done.dropped, done.quarantined) == (0, 1, kind is Kind.FOREIGN)
        assert await store.get(victim) is None
        assert not (await checked(store)).corrupted
        await cluster.check(store, whole_log=False)


@pytest.mark.parametrize("options", [KEEP, LAZY], ids=["eager", "lazy"])
async def test_what_is_needed_first_is_healed_before_anything_is_served(cluster, options, caplog):
    """Deleted, overwritten and planted entries of one partition, and one key of another; the rest is not looked at."""
    async with cluster.running(options) as store:
        data = await entries(store)
    replicated = [name for name in sorted(data) if name.startswith("r/")]
    gone, foreign, local, other = replicated[3], replicated[9], *[n for n in sorted(data) if n.startswith("l/")][:2]
    changes = [Delete(where(gone)), *(Set(where(name), b"foreign") for name in (foreign, key("planted"), local, other))]
    await cluster.inner.txn(changes)
    async with cluster.running(options) as store:
        done = await heal(store.inspected(), [("r", PARTITION)], [local])
        assert (done.restored, done.quarantined, done.unresolved) == (3, 3, 0)
        for name in (gone, foreign, local):
            assert await store.get(name) == data[name]
        with pytest.raises(ForeignWrite):
            await store.get(other)
        assert (await heal(store.inspected(), [("r", PARTITION)], [local])).restored == 0
        assert store.statistics()["foreign_writes"] == 5
    assert caplog.text.count("was changed by somebody else") == 4
    assert "f1/" not in caplog.text, "no path is named"


async def test_a_foreign_value_that_is_read_is_named_in_the_log_and_not_every_time(cluster, caplog):
    async with cluster.running(KEEP) as store:
        data = await entries(store, 50)
    victim = min(data)
    await cluster.inner.txn([Set(where(victim), b"foreign")])
    async with cluster.running(KEEP) as store:
        for _ in range(20):
            with pytest.raises(ForeignWrite):
                await store.get(victim)
        assert store.statistics()["foreign_writes"] == 20
    assert caplog.text.count("somebody else changed it; merkle-check names what") == 3  # times 1, 4 and 16 are due
    assert victim.rsplit("/", 1)[1] not in caplog.text


async def test_many_foreign_keys_are_counted_and_put_aside_and_said_a_few_times_only(cluster, caplog):
    async with cluster.running(KEEP) as store:
        await entries(store)
        for start in range(0, 300, 50):
            await cluster.inner.txn([Set(where(key(f"planted/{n}")), b"x") for n in range(start, start + 50)])
        await cluster.inner.txn([Set(where(key(f"f{n % 5}/k{n}", "r")), b"x") for n in range(1, 150, 3)])
        report = await checked(store)
        assert report.counts == {Kind.EXTRA: 300, Kind.FOREIGN: 50}, "each once"
        done = await heal(store.inspected(), [("r", PARTITION)])
        assert (done.quarantined, done.restored, done.clean) == (350, 50, True)
        assert store.statistics()["foreign_writes"] == 350
        said = [line for line in caplog.messages if "was changed by somebody else" in line]
        assert len(said) <= 5 + 3  # times 1, 4, 16, 64 and 256 are due, for each kind
        assert not (await checked(store)).corrupted


async def test_names_that_are_not_ours_are_counted_and_left_alone(cluster):
    strays = ["stray_name", "folder/stray_name", "a_folder/x"]
    async with cluster.running(KEEP) as store:
        data = await entries(store)
        folder = where(key("x")).removesuffix("x")
        await cluster.inner.txn([Set(folder + name, b"x") for name in strays])
        names = await store.list(f"r/{PARTITION}/")
        assert names == sorted({name.split("/")[2] + "/" for name in data if name.startswith("r/")} | {"folder/"})
        report = await checked(store)
        assert (report.strays, report.findings, report.corrupted) == (3, [], True)
        done = await repaired(store)
        assert (done.unresolved, done.quarantined, done.clean) == (3, 0, False)
        assert (await cluster.inner.get(folder + strays[0])).value == b"x"


async def test_what_the_log_cannot_heal_is_named_and_left(cluster, caplog):
    data = await forgotten(cluster)
    victim = sorted(data)[5]
    await cluster.inner.txn([Delete(where(victim))])
    async with cluster.running(FORGET) as store:
        done = await heal(store.inspected(), [tuple(victim.split("/")[:2])])
        assert (done.unresolved, done.restored, done.dropped) == (1, 0, 0)
        with pytest.raises(ForeignWrite):
            await store.get(victim)
    assert "the log no longer has 1 of them" in caplog.text


async def test_entries_of_a_large_batch_are_healed_whole_from_its_parts(cluster):
    """A value that goes on from one part to the next is no entry of either."""
    async with cluster.running(KEEP) as store:
        names = [key(f"part/{n}") for n in range(40)]
        data = {name: name.encode() * 400 + b"\0" * n for n, name in enumerate(names)}
        await store.commit([Write(name, value) for name, value in data.items()])
        await store.rolled()
        assert store.statistics()["large_parts"] > 1
        for name in names:
            await cluster.inner.txn([Set(where(name), b"foreign")])
        done = await repaired(store)
        assert (done.restored, done.quarantined, done.unresolved) == (40, 40, 0)
        await cluster.check(store)


SWEEP = StoreOptions(segment_records=8, flush_interval_s=0.01, collect_interval_s=0.01)


def largest(name):
    """Random bytes, as many as one transaction takes: not with a guard more, nor with a second copy's frame around."""
    limits = Limits()
    return random.Random(1).randbytes((limits.body_bytes_max - body_bytes([Set(where(name), b"")])) // 4 * 3)


async def swept_down_to(cluster, values):
    """Until the chunks of so many values are stored."""
    while len(await cluster.inner.list(f"g/{GENERATION}/b/")) != values:  # noqa: ASYNC110 - a deletion in the store
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", [Kind.FOREIGN, Kind.EXTRA])
async def test_a_foreign_value_as_large_as_consul_takes_is_put_aside_in_pieces(cluster, kind):
    async with cluster.running(KEEP) as store:
        data = await entries(store)
        victim = sorted(data)[3] if kind is Kind.FOREIGN else key("planted")
        foreign = largest(victim)
        with pytest.raises(TooLarge):
            await cluster.inner.txn([CheckNotExists("not/there"), Set(where(victim), foreign)])
        await cluster.inner.txn([Set(where(victim), foreign)])
        done = await repaired(store)
        assert (done.quarantined, done.restored, done.unresolved) == (1, kind is Kind.FOREIGN, 0)
        await cluster.check(store)
        raw = await quarantined(cluster)
        pieces = [msgspec.msgpack.decode(raw[name], type=Quarantined) for name in sorted(raw)]
        assert len(pieces) == 2
        assert [(one.key, one.number, one.count) for one in pieces] == [(victim, number, 2) for number in range(2)]
        assert b"".join(one.value for one in pieces) == foreign


@pytest.mark.parametrize("how", ["overwritten", "deleted"])
async def test_a_value_that_fits_no_transaction_is_put_back_in_chunks(cluster, how):
    """Also when what stands in its place is as large, and twice: the chunks of before are garbage then."""
    async with cluster.running(SWEEP) as store:
        victim, value = key("big"), random.Random(2).randbytes(900_000)
        await store.commit([Write(victim, value)])
        await store.rolled()
        for _ in range(2):
            op = Delete(where(victim)) if how == "deleted" else Set(where(victim), largest(victim))
            await cluster.inner.txn([op])
            done = await repaired(store)
            assert (done.quarantined, done.restored, done.unresolved) == (how == "overwritten", 1, 0)
            assert await store.get(victim) == value
            assert not (await checked(store)).corrupted
        await cluster.check(store)
    async with cluster.running(SWEEP) as store:
        assert await store.get(victim) == value
        await swept_down_to(cluster, 1)
        (name,) = await cluster.inner.list(f"g/{GENERATION}/b/")
        assert name.startswith("reindex-")


async def test_a_repair_in_chunks_that_a_commit_overtakes_leaves_no_garbage(cluster):
    async with cluster.running(SWEEP) as store:
        victim, value = key("big"), random.Random(3).randbytes(500_000)
        await store.commit([Write(victim, value)])
        await store.rolled()
        await cluster.inner.txn([Set(where(victim), b"foreign")])
        newer = []

        def write_too(ops):
            if not newer and any(isinstance(op, Set) and "/b/reindex-" in op.key for op in ops):
                newer.append(asyncio.create_task(store.commit([Write(victim, b"newer")])))

        cluster.physical.fault = write_too
        done = await repaired(store)
        await newer[0]
        assert done.clean
        assert await store.get(victim) == b"newer"
        await swept_down_to(cluster, 0)
        await cluster.check(store)


async def test_a_manifest_that_a_stranger_wrote_is_not_counted_to_its_end(cluster):
    async with cluster.running(KEEP) as store:
        data = await entries(store, 50)
        victim = sorted(data)[3]
        for count in (CHUNKS_MAX + 1, 2**60, -1):
            stranger = encode_manifest(Manifest("x", count, 2**62))
            assert decode_manifest(stranger) is None
            await cluster.inner.txn([Set(where(victim), stranger)])
            assert (await repaired(store)).restored == 1
        assert decode_manifest(encode_manifest(Manifest("x", CHUNKS_MAX, 1))) == Manifest("x", CHUNKS_MAX, 1)
        await cluster.check(store)


async def test_force_deletes_no_value_that_was_written_meanwhile(cluster):
    async with cluster.running(FORGET) as store:
        data = await entries(store, 50)
        for number in range(40):
            await store.commit([Write(key("busy"), b"%d" % number)])
    store = await cluster.recover(FORGET)
    await store.flush()
    assert await store.collect()
    victim = sorted(data)[5]
    await cluster.inner.txn([Set(where(victim), b"foreign")])
    async with cluster.running(FORGET) as store:
        newer = []

        def write_too(ops):
            if not newer and any(
                isinstance(op, Set) and op.key.startswith(quarantine_prefix(GENERATION)) for op in ops
            ):
                newer.append(asyncio.create_task(store.commit([Write(victim, b"newer")])))

        cluster.physical.fault = write_too
        done = await repaired(store, force=True)
        await newer[0]
        assert await store.get(victim) == b"newer"
        assert (done.quarantined, done.dropped) == (1, 0)
        await cluster.check(store, whole_log=False)


async def test_a_damaged_extent_is_named_and_written_anew(cluster):
    async with cluster.running(KEEP) as store:
        await entries(store)
        await store._flusher.stored(store.head.index)
        (extent, *_) = await extent_keys(cluster)
        raw = (await cluster.inner.get(extent)).value
        await cluster.inner.txn([Set(extent, raw[:50] + bytes((raw[50] ^ 1,)) + raw[51:])])
        report = await checked(store)
        assert report.corrupted
        assert report.bad_extents == [("r", PARTITION, 0)]
        done = await repaired(store, diff=True)
        assert (done.extents, done.unresolved) == (1, 0)
        assert not (await checked(store)).corrupted
    await cluster.check(await cluster.recover(KEEP))


@pytest.mark.parametrize("changed", [False, True])
async def test_a_page_that_cannot_be_loaded_is_taken_from_the_data_if_they_prove_it(cluster, changed, monkeypatch):
    monkeypatch.setattr("tests.support.store.OPTIONS", LAZY)
    data = await fill(cluster, 90)
    victim = (await extent_keys(cluster))[3]
    await damage(cluster, [Delete(victim)])
    lost = [name for name in data if name.startswith("r/")]
    async with cluster.running(LAZY) as store:
        with pytest.raises(IndexDamaged):
            await store.load_index()
        report = await checked(store)
        assert report.damaged
        pages = {page for _, _, page in report.damaged}
        lost = [name for name in lost if page_of(name) in pages]
        assert set(report.pages["r", PARTITION]) == pages
        if changed:
            await cluster.inner.txn([Set(where(lost[0]), b"foreign")])
        done = await repaired(store, skip_flush=True)
        if changed:
            assert done.unresolved
            with pytest.raises(IndexDamaged):
                await store.get(lost[0])
            return
        assert (done.pages, done.unresolved) == (len(pages), 0)
        assert [await store.get(name) for name in lost] == [data[name] for name in lost]
        await store._flusher.flush_all()
    await cluster.check(await cluster.recover(LAZY_READ_WHOLE))


LAZY_READ_WHOLE = StoreOptions(segment_records=64, flush_interval_s=3600, collect_interval_s=3600)


async def test_a_reindex_cut_short_is_finished_by_the_next(cluster):
    async with cluster.running(KEEP) as store:
        data = await entries(store)
        victims = sorted(data)[:6]
        await cluster.inner.txn([Set(where(name), b"foreign") for name in victims])
        arm("reindex:before-repair=raise:4")
        with pytest.raises(FailpointHit):
            await repaired(store)
        assert len((await checked(store)).findings) == 3
        assert (await repaired(store)).restored == 3
        assert len(await quarantined(cluster)) == 6
        await cluster.check(store)


async def test_a_reindex_goes_on_where_the_log_is_left(cluster):
    """The log is collected between the check and the reading of it."""
    async with cluster.running(FORGET) as store:
        data = await entries(store)
        victim = max(data)
        for number in range(40):
            await store.commit([Write(key("other"), b"%d" % number)])
        await store.commit([Write(victim, b"newest")])
        await cluster.inner.txn([Set(where(victim), b"foreign")])
        parts = store.inspected()
        oldest = iter([1])
        parts.oldest = lambda: next(oldest, store.oldest_index)
        await store.flush()
        assert await store.collect()
        report = await reindex(parts, ReindexOptions(), Progress())
        assert report.clean
        assert await store.get(victim) == b"newest"


async def test_a_batch_whose_parts_are_collected_is_out_of_reach_and_no_damage(cluster):
    """The collector deletes one segment after the other: the commit record stands alone for a while."""
    async with cluster.running(KEEP) as store:
        first = store.head.index + 1
        names = [key(f"part/{n}") for n in range(40)]
        await store.commit([Write(name, name.encode() * 400) for name in names])
        await store.rolled()
        await store.commit([Write(key("after"), b"1")])
        (commit,) = [one for one in await store.records(first, 1000) if one.header.kind == "commit"]
        for name in (names[0], key("after")):
            await cluster.inner.txn([Set(where(name), b"foreign")])
        for oldest in (first + 1, commit.index):
            parts = store.inspected()
            parts.oldest = lambda oldest=oldest: oldest
            report = await reindex(parts, ReindexOptions(), Progress())
            assert report.unresolved == 1
            assert report.restored == (oldest == first + 1)
        assert await store.get(key("after")) == b"1"
        assert (await repaired(store)).restored == 1
        await cluster.check(store)


async def test_a_log_that_begins_inside_a_value_is_read_from_the_next_one_on(cluster):
    """Collected up to a part that goes on with a value: found by seed 802403 of the simulation."""
    async with cluster.running(KEEP) as store:
        first = store.head.index + 1
        await store.commit([Write(key("big"), b"v" * 600_000), *(Write(key(f"n{n}"), b"1" * 400) for n in range(40))])
        await store.rolled()
        await store.commit([Write(key("after"), b"1")])
        continued = [
            one.index for one in await store.records(first, 1000) if (big := one.header.large) and big.continued
        ]
        assert continued
        await cluster.inner.txn([Set(where(key("after")), b"foreign"), Set(where(key("n1")), b"foreign")])
        for oldest in continued:
            parts = store.inspected()
            parts.oldest = lambda oldest=oldest: oldest
            found = await heal(parts, [("r", PARTITION)])
            assert (found.restored, found.unresolved) == ((1, 1) if oldest == continued[0] else (0, 1))
        assert await store.get(key("after")) == b"1"
        assert (await repaired(store)).restored == 1
        await cluster.check(store)


async def test_a_flush_without_an_answer_is_no_damage(cluster):
    """The extent may be stored as it was or as it shall be, until that is resolved."""
    async with cluster.running(FORGET) as store:
        await entries(store)
        await store.flush()
        await store.commit([Write(key("f0/k0", "l"), b"changed")])
        for fate in ("lose-before", "lose-after"):
            cluster.physical.fault = lambda ops, fate=fate: fate
            with pytest.raises(OutcomeUnknown):
                await store._flusher.flush()
            cluster.physical.fault = lambda ops: None
            report = await checked(store)
            assert not report.corrupted, report.problems
        await store.flush()
        assert not (await checked(store)).corrupted


async def test_a_deposed_node_reports_no_damage(cluster):
    """To it, what its successor writes looks like damage."""
    old = await cluster.recover(KEEP)
    async with cluster.running(KEEP) as store:
        await entries(store)
        with pytest.raises(FenceLost):
            await checked(old)


@pytest.mark.parametrize("names_max", [1, 3, 50, 10_000])
async def test_every_key_is_met_however_few_names_come_at_once(cluster, names_max, monkeypatch):
    """What is listed level by level, and what in one answer, is the same; and both find the one that is planted."""
    monkeypatch.setattr(index_check, "NAMES_AT_ONCE", names_max)
    async with cluster.running(KEEP) as store:
        await entries(store)
        for name in ("f1/deep/er/one", "top"):
            await store.commit([Write(key(name), b"1")])
        report = await checked(store)
        assert not report.corrupted
        assert report.keys == sum(store.forest.count(cls, PARTITION) for cls in "rl") + 1
        await cluster.inner.txn([Set(where(key("f1/deep/planted")), b"1"), Delete(where(key("top")))])
        found = {finding.key: finding.kind for finding in (await checked(store)).findings}
        assert found == {key("f1/deep/planted"): Kind.EXTRA, key("top"): Kind.LOST}


async def test_progress_moves(cluster):
    async with cluster.running(KEEP) as store:
        await entries(store)
        progress = Progress()
        await reindex(store.inspected(), ReindexOptions(), progress)
        assert (progress.stage, progress.done, progress.total) == ("committing", 201, 201)
