"""F25, F29 and F45: a primary that is demoted while somebody is being activated; a secondary that is revoked while it
is away; clusters whose programs are not of the same age. Over real TLS and in-memory stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from dataclasses import replace

import msgspec
import pytest

from consul_backend.limits import Limits
from consul_backend.position import Position
from consul_backend.wal import RECORD_VERSION
from plugin_api.errors import InvalidRequest, Unavailable
from sidecar.replication import protocol
from sidecar.replication.hello import Identity, hello_of
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.protocol import RecordFrame
from sidecar.replication.states import Phase
from sidecar.replication.wiring import SecretMaterial
from tests.support.replication_cluster import Cluster, Pair, in_step, primary_in, until

BOTH = (PERFORMANCE, DR)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A cluster that is primary in both modes."""
    async with primary_in(*BOTH) as pair:
        yield pair


async def followed(pair: Pair, mode: Mode) -> Cluster:
    secondary = await pair.activate("eu", mode=mode)
    await until(lambda: in_step(pair.primary, secondary, mode))
    return secondary


async def demoted(cluster: Cluster, mode: Mode) -> None:
    await cluster.manager.primary_demote(mode.name)
    await until(lambda: cluster.of(mode).secondary is not None)


def untouched(fresh: Cluster) -> bool:
    """Whether a cluster that was to become a secondary is what it was."""
    return not fresh.flipped and fresh.manager.modes() == ("disabled", "disabled")


# ---- F25


@pytest.mark.parametrize("mode", BOTH, ids=lambda mode: mode.name)
async def test_a_token_of_a_primary_that_was_demoted_activates_nobody(pair: Pair, mode: Mode) -> None:
    fresh, token = await pair.start("fresh"), await pair.token("late", mode)
    await demoted(pair.primary, mode)
    with pytest.raises((InvalidRequest, Unavailable)):
        await fresh.manager.secondary_enable(mode.name, token, "", "", "")
    assert untouched(fresh)


@pytest.mark.parametrize("mode", BOTH, ids=lambda mode: mode.name)
async def test_demoted_while_it_hands_out_its_keys(pair: Pair, mode: Mode) -> None:
    """The activation is cut off: the new cluster is what it was, and the token is used up."""
    fresh, token = await pair.start("fresh"), await pair.token("late", mode)
    asked, go_on = asyncio.Event(), asyncio.Event()
    manager = pair.primary.of(mode)
    service = manager.primary
    assert service is not None
    material = service._callbacks.secret_material

    async def slow(keyrings: Collection[str]) -> SecretMaterial:
        asked.set()
        await go_on.wait()
        return await material(keyrings)

    service._callbacks = replace(service._callbacks, secret_material=slow)
    enabling = asyncio.create_task(fresh.manager.secondary_enable(mode.name, token, "", "", ""))
    await asked.wait()
    await demoted(pair.primary, mode)
    go_on.set()
    with pytest.raises((InvalidRequest, Unavailable)):
        await enabling
    assert untouched(fresh)
    with pytest.raises((InvalidRequest, Unavailable)):
        await fresh.manager.secondary_enable(mode.name, token, "", "", "")
    assert untouched(fresh)


async def test_the_control_it_is_activated_where_nobody_is_demoted(pair: Pair) -> None:
    fresh, token = await pair.start("fresh"), await pair.token("late")
    await fresh.manager.secondary_enable("performance", token, "", "", "")
    assert not untouched(fresh)


# ---- F29


@pytest.mark.parametrize("mode", BOTH, ids=lambda mode: mode.name)
async def test_revoked_while_it_was_away(pair: Pair, mode: Mode) -> None:
    secondary = await followed(pair, mode)
    await secondary.stop()
    await pair.primary.manager.revoke_secondary(mode.name, "eu")
    pair.primary.store.write(("r/m/secret", b"1"))
    returned = await pair.start("eu-again", secondary.store)
    service = returned.of(mode).secondary
    assert service is not None
    await until(lambda: service._failures >= 3)
    assert not service.connected_to
    assert "r/m/secret" not in returned.store.data
    assert pair.primary.listener.statistics()["connections"] == 0
    # What was taken from it is given back by a token alone, and nothing has to be filled anew.
    before = len(returned.store.log)
    await returned.manager.secondary_update_primary(mode.name, await pair.token("eu", mode))
    await until(lambda: in_step(pair.primary, returned, mode))
    written = {write.key for record in returned.store.log[before:] for write in record.writes()}
    assert {key for key in written if key.startswith("r/m/")} == {"r/m/secret"}


# ---- F45


@pytest.mark.parametrize("mode", BOTH, ids=lambda mode: mode.name)
async def test_records_of_a_later_version_are_not_applied(
    pair: Pair, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The primary was upgraded first, which is the wrong order, and writes what its secondary cannot read."""
    secondary = await followed(pair, mode)
    decode = protocol.decode_from_primary

    def later(raw: bytes) -> object:
        frame = decode(raw)
        if not isinstance(frame, RecordFrame):
            return frame
        _, *rest = msgspec.msgpack.decode(frame.raw)
        return RecordFrame(msgspec.msgpack.encode([RECORD_VERSION + 1, *rest]))

    monkeypatch.setattr("sidecar.replication.applier.decode_from_primary", later)
    pair.primary.store.write(("r/m/later", b"1"))
    manager = secondary.of(mode)
    await until(lambda: (found := manager.secondary) is not None and found.machine.alarm)
    assert "r/m/later" not in secondary.store.data
    status = await secondary.manager.status(mode.name)
    assert status["alarm"]
    # Upgraded, it goes on where it was.
    monkeypatch.undo()
    await until(lambda: in_step(pair.primary, secondary, mode))
    assert secondary.store.data["r/m/later"] == b"1"
    service = manager.secondary
    assert service is not None
    await until(lambda: not service.machine.alarm)


async def test_no_common_protocol_version_is_said_and_mended_by_an_upgrade(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    secondary = await followed(pair, PERFORMANCE)
    await secondary.stop()
    pair.primary.store.write(("r/m/x", b"1"))
    monkeypatch.setattr("sidecar.replication.applier.hello_of", ancient_hello)
    returned = await pair.start("eu-old", secondary.store)
    service = returned.of(PERFORMANCE).secondary
    assert service is not None
    await until(lambda: "upgrade" in service.machine.reason)
    assert service.machine.phase is Phase.IDLE
    assert "r/m/x" not in returned.store.data
    await returned.stop()
    monkeypatch.undo()
    upgraded = await pair.start("eu-new", secondary.store)
    await until(lambda: in_step(pair.primary, upgraded))


def ancient_hello(identity: Identity, position: Position | None, limits: Limits) -> protocol.Hello:
    """What a program of before the first version would say."""
    return msgspec.structs.replace(hello_of(identity, position, limits), versions=(0,))
