"""A fresh secondary is filled with progress, and one that was cut in the middle goes on from what it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from sidecar.replication.filling import SyncProgress
from sidecar.replication.modes import PERFORMANCE
from tests.support.replication_cluster import Cluster, Pair, Store, in_step, primary_in, until

ENTRIES = 6_000


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with primary_in(PERFORMANCE) as pair:
        yield pair


def entries_of(store: Store) -> int:
    return sum(key.startswith("r/m/") for key in store.data)


def progress_of(secondary: Cluster) -> SyncProgress | None:
    service = secondary.manager.performance.secondary
    return service.sync_progress if service is not None else None


async def test_a_fill_cut_twice_goes_on_and_tells_how_far_it_is(pair: Pair) -> None:
    store = pair.primary.store
    for start in range(0, ENTRIES, 50):
        store.write(*((f"r/m/{number}", b"v" * 200) for number in range(start, start + 50)))

    async def cut_after(secondary: Cluster, entries: int) -> list[SyncProgress]:
        """Stop it once it has so many; what it showed meanwhile."""
        seen: list[SyncProgress] = []
        async with asyncio.timeout(120):
            while entries_of(secondary.store) < entries:
                if (progress := progress_of(secondary)) and progress.total:
                    seen.append(progress)
                await asyncio.sleep(0)
        assert isinstance(secondary.gates[-1], str), "nobody reads a mix"
        status = await secondary.manager.status("performance")
        shown = status["merkle_sync_progress"]
        assert shown["sync_total_keys"] >= ENTRIES - shown["kept_keys"]
        assert 0 < shown["sync_progress"] < shown["sync_total_keys"]
        assert shown["bytes"] > 0
        assert shown["eta_s"] > 0
        gauges = secondary.manager.gauges()
        assert gauges["replication.performance.sync.entries_done"] == shown["sync_progress"]
        await secondary.stop()
        assert [one.done for one in seen] == sorted([one.done for one in seen])
        return seen

    fresh = await pair.activate()
    assert {one.kept < 100 for one in await cut_after(fresh, 1_000)} == {True}
    again = await pair.start("eu", fresh.store)
    assert {one.kept >= 1_000 for one in await cut_after(again, 3_000)} == {True}, "it says what it had"
    kept = entries_of(again.store)
    last = await pair.start("eu", again.store)
    await until(lambda: in_step(pair.primary, last))
    assert last.gates[-1] is None
    service = last.manager.performance.secondary
    assert service is not None
    assert service.last_sync is not None
    assert service.last_sync.keys <= ENTRIES - kept + 100, "what was here did not travel again"
    assert service.last_sync.bytes < 400 * (ENTRIES - kept + 200)


@pytest.mark.parametrize("log_reaches", [True, False])
async def test_one_that_was_away_for_longer_than_the_log_reaches_compares(pair: Pair, log_reaches: bool) -> None:
    store = pair.primary.store
    for start in range(0, 1_000, 50):
        store.write(*((f"r/m/{number}", b"v") for number in range(start, start + 50)))
    secondary = await pair.activate()
    await until(lambda: in_step(pair.primary, secondary))
    await secondary.stop()
    for start in range(0, 300, 50):
        store.write(*((f"r/m/{number}", b"changed") for number in range(start, start + 50)))
    store.write(*((f"r/m/{number}", None) for number in range(900, 960)))
    if not log_reaches:
        store.oldest_index = store.head.index
    again = await pair.start("eu", secondary.store)
    await until(lambda: in_step(pair.primary, again))
    service = again.manager.performance.secondary
    assert service is not None
    await until(lambda: service.last_sync is not None)
    last = service.last_sync
    assert last is not None
    assert (last.by, last.round_trips, last.keys) == (("wal", 1, 360) if log_reaches else ("merkle", 2, 360))
