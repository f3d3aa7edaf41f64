"""Fifty secondaries of one primary, over the real cluster port: all converge, and neither one that reads nothing nor
one that is slow holds up the primary or the others."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from sidecar.replication.activation import ActivationRequest, activate
from sidecar.replication.modes import PERFORMANCE
from tests.support.replication_cluster import OPTIONS, Cluster, Pair, in_step, primary_in
from tests.support.thin_secondary import ThinSecondary, following

SECONDARIES = 50
REAL = 3
STALLED_BYTES_MAX = 64 * 2**20
RECORDS = 200
SETTLE_S = 300.0
PATIENT = replace(OPTIONS, silent_beats_max=600)
"""Fifty handshakes and fifty streams share one event loop: whoever is silent for long is no subject here."""


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with primary_in(PERFORMANCE, primary=Cluster("us", options=PATIENT)) as pair:
        yield pair


async def thin(pair: Pair, name: str, *, pause_s: float = 0.0, stuck: bool = False) -> ThinSecondary:
    token = await pair.token(name)
    made = await activate(
        PERFORMANCE,
        ActivationRequest(token),
        store_id=f"store-of-{name}",
        now_s=time.time(),
    )
    return ThinSecondary(PERFORMANCE, made.role, pause_s=pause_s, stuck=stuck)


async def write(pair: Pair, records: int, value: bytes = b"v" * 100) -> float:
    """Commits of ten entries, one after the other; the median time of one, the time of the other tasks included."""
    took: list[float] = []
    for number in range(records):
        started = time.perf_counter()
        pair.primary.store.write(*((f"r/m/{number % 20}-{n}", value) for n in range(10)))
        await asyncio.sleep(0)
        took.append(time.perf_counter() - started)
        await asyncio.sleep(0.002)
    return sorted(took)[records // 2]


async def settled(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(SETTLE_S):
        while not what():  # noqa: ASYNC110 - any condition, of other processes too
            await asyncio.sleep(0.02)


async def test_fifty_secondaries_converge_whatever_two_of_them_do(pair: Pair) -> None:
    store = pair.primary.store
    real = [await pair.activate(f"real-{n}", PATIENT) for n in range(REAL)]
    quick = [await thin(pair, f"quick-{n}") for n in range(SECONDARIES - REAL - 2)]
    slow, stuck = await thin(pair, "slow", pause_s=2.5), await thin(pair, "stuck", stuck=True)
    everyone = [*quick, slow, stuck]
    assert len(real) + len(everyone) == SECONDARIES
    await settled(lambda: all(in_step(pair.primary, one) for one in real))
    async with following(everyone):
        service = pair.primary.manager.performance.primary
        assert service is not None
        await settled(lambda: sum(peer.connected for peer in service.shipper.peers.values()) == SECONDARIES)
        encoded = service.shipper._frames.encoded
        before = store.head
        await write(pair, RECORDS)
        head = store.head
        await settled(lambda: all(one.index == head.index for one in quick))
        assert {one.position.chain_hash for one in quick if one.position} == {head.chain_hash}
        assert {one.entries for one in quick} == {10 * RECORDS}, "each entry once"
        await settled(lambda: all(in_step(pair.primary, one) for one in real))
        records = head.index - before.index
        assert service.shipper._frames.encoded - encoded <= records + 5, "encoded once, not fifty times"
        others = [peer for name, peer in service.shipper.peers.items() if name not in ("slow", "stuck")]
        await settled(lambda: all(peer.applied >= head.index for peer in others))
        assert stuck.index < head.index
        assert slow.index < head.index, "or it was not slow"
        status = await pair.primary.manager.status("performance")
        behind = {one["node_id"]: one["behind_records"] for one in status["secondaries"]}
        assert len(behind) == SECONDARIES
        assert behind["stuck"] >= records
        assert store.holds["performance:stuck"] <= before.index + 1, "its log is kept"


async def test_five_that_are_stuck_cost_neither_time_nor_much_memory(pair: Pair) -> None:
    """The same writes with five that read and with five that do not."""
    figures: dict[bool, tuple[float, int]] = {}
    for stuck in (False, True):
        some = [await thin(pair, f"{stuck}-{n}", stuck=stuck) for n in range(5)]
        async with following(some):
            gc.collect()
            tracemalloc.start()
            took_s = await write(pair, RECORDS, b"v" * 10_000)  # 20 MB in all, five times the window of each
            if not stuck:
                await settled(lambda some=some: all(one.index == pair.primary.store.head.index for one in some))
            gc.collect()
            figures[stuck] = took_s, tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
    (reading_s, reading_bytes), (stuck_s, stuck_bytes) = figures[False], figures[True]
    print(f"commit {reading_s * 1e3:.2f} ms with five that read, {stuck_s * 1e3:.2f} ms with five that do not;")
    print(f"{(stuck_bytes - reading_bytes) / 5 / 2**20:.2f} MiB more for each that does not")
    assert stuck_bytes - reading_bytes < 5 * STALLED_BYTES_MAX
    assert stuck_s < max(0.1, 3 * reading_s), "a commit that waits for one waits for a beat at least"
