"""A secondary that restarts while its primary is dead still says what a promotion may lose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from plugin_api.errors import Unavailable
from sidecar.replication.heard import Heard
from sidecar.replication.modes import DR
from tests.support.replication_cluster import Cluster, Pair, in_step, primary_in, until


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with primary_in(DR) as pair:
        yield pair


async def preview(cluster: Cluster) -> dict[str, Any]:
    response = await cluster.manager.secondary_promote("dr", "", force=False, preview=True)
    return dict((response.data or {})["promotion_forecast"])


async def test_a_restart_forgets_nothing_that_was_heard_of_a_primary_that_is_dead_by_then(pair: Pair) -> None:
    secondary = await pair.activate("mirror", mode=DR)
    await until(lambda: in_step(pair.primary, secondary, DR))
    # It has everything of a moment, too: without that word no age of it can be shown later.
    await until(lambda: (service := secondary.of(DR).secondary) is not None and service.applier.lag_s() is not None)
    applied = secondary.store.commit

    async def only_what_is_its_own(writes: Any, **options: Any) -> Any:
        if options.get("positions"):  # a batch of the primary comes with its position
            await asyncio.get_running_loop().create_future()
        return await applied(writes, **options)

    secondary.store.commit = only_what_is_its_own  # type: ignore[method-assign]  # it hears, and applies no more
    pair.primary.store.write(*((f"r/m/lost-{n}", b"x") for n in range(3)))
    pair.primary.store.write(("r/m/lost", b"y"))
    newest = pair.primary.store.head.index

    def stored() -> int:
        raw = secondary.store.data.get("c/replication/heard-dr")
        return msgspec.msgpack.decode(raw, type=Heard).head_index if raw else 0

    await until(lambda: stored() == newest)
    await secondary.stop()
    await pair.primary.stop()
    secondary.store.commit = applied  # type: ignore[method-assign]  # stands in for one call
    again = await pair.start("mirror", secondary.store)
    shown = await preview(again)
    assert shown["known_missing_records"] == 2
    assert shown["known_missing_range"] == [newest - 1, newest]
    assert shown["primary_heard_age_s"] is not None
    assert shown["complete_age_s"] >= shown["primary_heard_age_s"]
    assert shown["may_be_lost"].startswith("2 known records, and what the primary wrote in its last")
    with pytest.raises(Unavailable, match="2 records of the primary are known and not applied here"):
        await again.manager.secondary_promote("dr", "", force=False, preview=False)
    status = await again.manager.status("dr")
    assert status["primaries"][0]["connection_status"] == "disconnected"
    assert status["lag_s"] >= shown["complete_age_s"]
