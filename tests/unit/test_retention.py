"""What of the log may go, against a dumb oracle that looks at every record."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consul_backend.errors import Unavailable
from consul_backend.physical import TxnResult
from consul_backend.retention import HARD_FACTOR, Collector, RetentionFacts, collectable, keep_from
from consul_backend.tenure import Tenure
from consul_backend.txn import CheckIndex, CheckSession, DeleteTree, Op
from consul_backend.wal import segment_prefix


@st.composite
def facts(draw: st.DrawFn) -> RetentionFacts:
    """A log whose every segment has a size, some older ones too that are gone: so bytes bound it as often as count."""
    width = draw(st.sampled_from([2, 8, 16]))
    oldest = draw(st.integers(1, 200))
    head = draw(st.integers(200, 280))
    segments = range(max(0, oldest // width - 2), head // width + 1)
    sizes = draw(st.lists(st.integers(0, 500), min_size=len(segments), max_size=len(segments)))
    return RetentionFacts(
        oldest=oldest,
        head=head,
        redo_from=draw(st.integers(150, 401)),
        keep_records=draw(st.integers(1, 300)),
        keep_bytes=draw(st.integers(0, 3000)),
        segment_records=width,
        sizes=dict(zip(segments, sizes, strict=True)),
        holds=draw(st.dictionaries(st.sampled_from("ab"), st.integers(1, 400))),
        crossings=draw(st.dictionaries(st.integers(0, 50), st.integers(1, 400), max_size=3)),
    )


def within(found: RetentionFacts, index: int, factor: int) -> bool:
    """Whether ``factor`` times the bounds still hold with everything from ``index`` on kept: the newest
    ``keep_records`` records, and whole segments while their bytes fit, the newest one whatever it holds."""
    width = found.segment_records
    if index < found.head - factor * found.keep_records + 1:
        return False
    newest = found.head // width
    segments = range(index // width, newest + 1)
    return index // width == newest or (
        sum(found.sizes.get(segment, 0) for segment in segments) <= factor * found.keep_bytes
    )


def oracle(found: RetentionFacts) -> int:
    """The first record that must stay: looked for record by record."""

    def bounded(factor: int) -> int:
        fitting = [index for index in range(found.oldest, found.head + 1) if within(found, index, factor)]
        return min(fitting, default=found.head)

    soft, hard = bounded(1), bounded(HARD_FACTOR)
    held = min(found.holds.values(), default=soft)
    kept = max(found.oldest, min(found.head, found.redo_from, max(hard, min(soft, held))))
    changed = True
    while changed:  # a batch that is kept needs its parts, and they may be kept with another batch
        changed = False
        for segment, first in found.crossings.items():
            if segment >= kept // found.segment_records and max(found.oldest, first) < kept:
                kept, changed = max(found.oldest, first), True
    return kept


@settings(max_examples=250)
@given(facts())
def test_the_first_record_kept_is_the_oracle_s(found: RetentionFacts) -> None:
    assert keep_from(found) == oracle(found)


@given(facts())
def test_whole_segments_go_oldest_first_and_nothing_that_is_kept(found: RetentionFacts) -> None:
    doomed = collectable(found)
    width = found.segment_records
    first = found.oldest // width
    assert doomed == list(range(first, first + len(doomed)))
    assert all((segment + 1) * width <= keep_from(found) for segment in doomed)
    if keep_from(found) // width > first:
        assert doomed[-1] == keep_from(found) // width - 1, "what may go goes"


def plain(**given: object) -> RetentionFacts:
    known: dict[str, object] = {
        "oldest": 1, "head": 1000, "redo_from": 1001, "keep_records": 100, "keep_bytes": 10_000,
        "segment_records": 10, "sizes": {}, "holds": {},
    }  # fmt: skip
    return RetentionFacts(**(known | given))


def test_by_example() -> None:
    assert keep_from(plain()) == 901, "the newest hundred"
    assert keep_from(plain(holds={"a": 700})) == 700
    assert keep_from(plain(holds={"a": 950, "b": 700})) == 700
    assert keep_from(plain(holds={"a": 10})) == 601, "up to four times the bound"
    assert keep_from(plain(holds={"a": 999})) == 901, "a secondary that is near keeps nothing from being kept"
    assert keep_from(plain(redo_from=400)) == 400, "recovery needs it, whatever the bound"
    assert keep_from(plain(sizes={99: 6_000, 98: 6_000})) == 990
    assert keep_from(plain(sizes={99: 4_000, 98: 6_000, 97: 1})) == 980
    grown = plain(head=1005, redo_from=1006, sizes={100: 50_000, 99: 1})
    assert keep_from(grown) == 1000, "the newest segment stays, however big"
    assert keep_from(plain(oldest=950)) == 950
    assert keep_from(plain(crossings={95: 580, 57: 300})) == 580
    assert keep_from(plain(crossings={95: 575, 57: 300})) == 300, "parts of parts' neighbours"
    assert keep_from(plain(crossings={89: 1})) == 901


NEWEST = CheckIndex("g/g1/wal/0000000000/00000000000001", 9)


class Deletions:
    """A store that notes what is deleted; the first ``refuse`` transactions find nobody there."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.refuse = 0

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        if self.refuse:
            self.refuse -= 1
            raise Unavailable("nobody there")
        session, epoch, newest, *rest = ops
        assert isinstance(session, CheckSession)
        assert isinstance(epoch, CheckIndex)
        assert newest == NEWEST
        self.told += [op.prefix for op in rest if isinstance(op, DeleteTree)]
        return TxnResult(0, ())


async def test_segments_go_one_by_one_told_before_and_none_is_forgotten() -> None:
    store = Deletions()
    found = plain(head=140, redo_from=141, keep_records=100)
    tenure = Tenure(1, "node", "0b8f2c1e-1c3d-4b5a-9a77-3f3a7f3a7f3a", 5)
    collector = Collector(
        store, "g1", tenure, facts=lambda: found, newest=lambda: NEWEST, gone=store.told.append, interval_s=3600
    )
    assert collector.statistics() == {"wal_segments_collected": 0, "collect_failures": 0}
    assert await collector.collect() == 4
    prefixes = [segment_prefix("g1", segment) for segment in range(4)]
    assert store.told == [0, 1, 2, 3, *prefixes], "readers are told before anything goes; the oldest goes first"
    store.told.clear()
    store.refuse = 1
    found = replace(found, oldest=40, head=160, redo_from=161)
    with pytest.raises(Unavailable):
        await collector.collect()
    assert store.told == [4, 5]
    found = replace(found, oldest=60)  # as the store counts them now: told is told
    assert await collector.collect() == 2
    assert store.told == [4, 5, segment_prefix("g1", 4), segment_prefix("g1", 5)]
    assert collector.statistics() == {"wal_segments_collected": 6, "collect_failures": 0}
    assert await collector.collect() == 0


async def test_trouble_that_passes_is_told_once_each_time_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    store, done = Deletions(), asyncio.Event()
    first, second = plain(head=140, redo_from=141), plain(oldest=41, head=180, redo_from=181)
    # Twice: tries without a store, of segments that count as gone since the first, then one with it.
    script = [(True, first), (True, replace(first, oldest=41)), (False, replace(first, oldest=41))]
    script += [(True, second), (False, replace(second, oldest=81))]

    def facts() -> RetentionFacts:
        if not script:
            done.set()
            return replace(second, oldest=81)
        refused, found = script.pop(0)
        store.refuse = int(refused)
        return found

    tenure = Tenure(1, "node", "0b8f2c1e-1c3d-4b5a-9a77-3f3a7f3a7f3a", 5)
    collector = Collector(store, "g1", tenure, facts=facts, newest=lambda: NEWEST, gone=store.told.append, interval_s=0)
    running = asyncio.create_task(collector.run())
    await done.wait()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert collector.statistics() == {"wal_segments_collected": 8, "collect_failures": 3}
    assert caplog.text.count("could not be collected") == 2
