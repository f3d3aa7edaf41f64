"""Between the roles: a lock that was won is led or given back, never forgotten."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consul_backend.clock import SystemClock
from consul_backend.election import ElectionOptions, Held
from consul_backend.embedded import EmbeddedStore
from consul_backend.errors import SentinelMissing
from consul_backend.replicated import StoreOptions
from sidecar.core.metrics import METRICS
from sidecar.roles import RoleOptions, Roles

HELD = cast("Held", SimpleNamespace(tenure=SimpleNamespace(session="s")))


class Elected:
    """An election that is won at the very moment when the campaign is given up."""

    def __init__(self) -> None:
        self.released: list[Held] = []
        self.running = asyncio.Event()

    async def campaign(self) -> Held:
        self.running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return HELD
        raise AssertionError

    async def release(self, held: Held, *, stay_away_s: float | None = None) -> None:
        self.released.append(held)

    async def leader(self) -> None:
        return None


class Sealing:
    """Left by :attr:`left`; ``error`` is what looking at the generation raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.left = asyncio.Event()
        self._error = error

    async def wait_left(self, _: object) -> None:
        await self.left.wait()

    async def stale_reason(self, _: object) -> str:
        if self._error is not None:
            raise self._error
        return ""


def standing_by(physical: EmbeddedStore, sealing: Sealing, elected: Elected) -> Roles:
    node = SimpleNamespace(
        identity=SimpleNamespace(node_id="n", api_addr="", cluster_addr=""),
        sealing=sealing,
        take_role=lambda role: None,
    )
    anything: Any = None
    roles = Roles(
        cast("Any", node),
        physical,
        anything,
        anything,
        anything,
        clock=SystemClock(),
        election_options=ElectionOptions(),
        store_options=StoreOptions(),
        options=RoleOptions(),
    )
    roles._election = cast("Any", elected)
    return roles


async def test_a_lock_won_while_the_node_is_sealed_reaches_the_one_who_gives_it_back() -> None:
    physical, elected, sealing = EmbeddedStore(None), Elected(), Sealing()
    await physical.open()
    standing = asyncio.create_task(standing_by(physical, sealing, elected)._stand_by(cast("Any", None)))
    await asyncio.wait_for(elected.running.wait(), 60)
    sealing.left.set()
    assert await asyncio.wait_for(standing, 120) is HELD
    await physical.close()


async def test_a_lock_won_while_a_duty_fails_is_released() -> None:
    physical, elected = EmbeddedStore(None), Elected()
    await physical.open()
    with pytest.raises(SentinelMissing):
        await standing_by(physical, Sealing(SentinelMissing("gone")), elected)._stand_by(cast("Any", None))
    assert elected.released == [HELD]
    await physical.close()


async def test_a_lock_won_while_the_process_ends_is_released() -> None:
    physical, elected = EmbeddedStore(None), Elected()
    await physical.open()
    standing = asyncio.create_task(standing_by(physical, Sealing(), elected)._stand_by(cast("Any", None)))
    await asyncio.wait_for(elected.running.wait(), 60)
    standing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await standing
    assert elected.released == [HELD]
    await physical.close()


async def test_a_lead_that_cannot_be_taken_is_counted() -> None:
    """What operators of Vault have an alarm on."""

    class Scope:
        async def start(self, tasks: asyncio.TaskGroup) -> None:
            raise SentinelMissing("gone")

    def failures() -> int:
        lines = METRICS.as_prometheus().splitlines()
        name = "vault_core_leadership_setup_failed_count "
        return sum(int(line.removeprefix(name)) for line in lines if line.startswith(name))

    physical, sealing, before = EmbeddedStore(None), Sealing(), failures()
    opened = cast("Any", object())
    sealing.opened = opened  # type: ignore[attr-defined]  # of what a real one has
    with pytest.raises(SentinelMissing):
        await standing_by(physical, sealing, Elected())._active(opened, cast("Any", Scope()), cast("Any", None))
    assert failures() == before + 1
