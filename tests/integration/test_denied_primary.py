"""F46 where no node of the primary's cluster can notice: its store was put back, and only secondaries know better."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from consul_backend.errors import NotApplied
from consul_backend.wal import Write
from sidecar.core.write_gate import GatedStore
from sidecar.replication import texts
from sidecar.replication.denials import STOPPED
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from tests.support.replication_cluster import Cluster, Pair, in_step, primary_in, until


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A cluster that is primary in both modes."""
    async with primary_in(DR, PERFORMANCE) as pair:
        yield pair


async def put_back_under(pair: Pair, secondary: Cluster, mode: Mode, *, writes_after: int) -> None:
    """What ``r/m/gone`` said was acknowledged and shipped; then an older snapshot comes back, a node that never saw
    better leads, and writes on."""
    us = pair.primary
    us.store.write(("r/m/kept", b"1"))
    await until(lambda: in_step(us, secondary, mode))
    before = us.store.head.index
    for _ in range(3):
        us.store.write(("r/m/gone", b"acknowledged"))
    await until(lambda: in_step(us, secondary, mode))
    us.store.put_back(before)
    for number in range(writes_after):
        us.store.write((f"r/m/after-{number}", b"1"))
    await new_tenure(us)


async def new_tenure(cluster: Cluster) -> None:
    tenures = cluster.tenures
    cluster._restart.set()
    await until(lambda: cluster.tenures > tenures)


@pytest.mark.parametrize("mode", [PERFORMANCE, DR], ids=lambda mode: mode.name)
@pytest.mark.parametrize("writes_after", [0, 4], ids=["ends before", "has another"])
async def test_a_secondary_that_knows_better_stops_its_primary_until_an_operator_decides(
    pair: Pair, mode: Mode, writes_after: int, caplog: pytest.LogCaptureFixture
) -> None:
    us, secondary = pair.primary, await pair.activate("eu", mode=mode)
    await put_back_under(pair, secondary, mode, writes_after=writes_after)
    await until(lambda: us.manager.denials.stopped is not None)
    assert us.gates[-1] == STOPPED
    for cls in "rl":
        with pytest.raises(NotApplied):
            await GatedStore(us.store, us.writes).commit([Write(f"{cls}/m/new", b"1")])
    status = await us.manager.status(mode.name)
    assert status["stopped"] == STOPPED
    (denied,) = status["denials"]
    assert denied["node_id"] == "eu"
    assert ("has another of that number" if writes_after else "ends at") in denied["reason"]
    assert us.manager.gauges()[f"replication.{mode.name}.denials"] == 1
    assert secondary.store.data["r/m/gone"] == b"acknowledged", "the only copy is not synchronised away"
    assert sum("changed underneath" in record.message for record in caplog.records) == 1, "however often it comes back"

    assert (await us.manager.recover()).warnings == [texts.RECOVERING]
    assert us.manager.denials.stopped == STOPPED
    await new_tenure(us)  # another node begins anew and is told as well
    await until(lambda: us.manager.denials.stopped is not None)
    assert us.gates[-1] == STOPPED

    assert (await us.manager.recover(force=True)).warnings == [texts.GOING_ON]
    assert us.gates[-1] is None
    await GatedStore(us.store, us.writes).commit([Write("r/m/new", b"1")])
    await until(lambda: in_step(us, secondary, mode))
    assert "r/m/gone" not in secondary.store.data
    status = await us.manager.status(mode.name)
    assert "stopped" not in status
    assert status["epoch"]["number"] == 2
    assert us.manager.gauges()[f"replication.{mode.name}.denials"] == 0
    (lost,) = (await secondary.manager.lost_writes(mode.name)).data["lost_writes"]
    assert lost["entries"] >= 1, "what was acknowledged is kept where it still is"
    found = await secondary.manager.lost_writes_read(mode.name, lost["id"], "1", values=False)
    assert any("gone" in str(entry) for entry in (found.data or {})["lost_entries"]), found.data


async def test_both_modes_begin_anew_together(pair: Pair) -> None:
    us = pair.primary
    perf, mirror = await pair.activate("perf", mode=PERFORMANCE), await pair.activate("mirror", mode=DR)
    await until(lambda: in_step(us, mirror, DR))
    await put_back_under(pair, perf, PERFORMANCE, writes_after=1)
    await until(lambda: us.manager.denials.stopped is not None)
    await us.manager.recover(force=True)
    await until(lambda: in_step(us, perf, PERFORMANCE) and in_step(us, mirror, DR))
    assert us.manager.denials.stopped is None
    assert [us.gates[-1], perf.gates[-1]] == [None, None]


async def test_a_secondary_that_is_not_believed_is_revoked(pair: Pair) -> None:
    us, secondary = pair.primary, await pair.activate("eu", mode=PERFORMANCE)
    await put_back_under(pair, secondary, PERFORMANCE, writes_after=0)
    await until(lambda: us.manager.denials.stopped is not None)
    await us.manager.revoke_secondary("performance", "eu")
    assert us.manager.denials.stopped is None
    assert us.gates[-1] is None
    await GatedStore(us.store, us.writes).commit([Write("r/m/new", b"1")])


async def test_a_node_that_leads_no_more_believes_nobody(pair: Pair) -> None:
    """A paused node wakes up: what a secondary has from its successor is no sign of a store that went back."""
    us, secondary = pair.primary, await pair.activate("eu", mode=PERFORMANCE)
    us.store.deposed = True
    await put_back_under(pair, secondary, PERFORMANCE, writes_after=0)
    service = secondary.of(PERFORMANCE).secondary
    assert service is not None
    await until(lambda: "another tenure leads" in service.machine.reason)
    assert us.manager.denials.stopped is None
    us.store.deposed = False
    await until(lambda: us.manager.denials.stopped is not None)
