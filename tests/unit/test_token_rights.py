"""A token without rights: what is said, how often, and when it is tried again."""

import asyncio
from typing import Any, cast

import pytest

from consul_backend.errors import PermissionDenied, StoreWentBack
from sidecar.roles import ENDING, HALTING, Roles
from sidecar.token_rights import HINT, PAUSE_MAX_S, PAUSE_MIN_S, TokenRights


def test_pauses_grow_to_a_bound_and_lines_become_rare(caplog: pytest.LogCaptureFixture) -> None:
    rights, error = TokenRights(), PermissionDenied("Consul: permission denied")
    pauses = [rights.refused(error) for _ in range(20)]
    assert pauses[:4] == [PAUSE_MIN_S, 2, 4, 8]
    assert pauses[-1] == PAUSE_MAX_S
    assert rights.trouble == f"Consul: permission denied: {HINT}"
    assert len(caplog.records) == 3, "times 1, 4 and 16"
    assert rights.refused(PermissionDenied("another")) == PAUSE_MAX_S
    assert len(caplog.records) == 4
    rights.accepted()
    assert rights.trouble == ""
    assert len(caplog.records) == 5
    rights.accepted()
    assert len(caplog.records) == 5
    assert rights.refused(error) == PAUSE_MIN_S


def test_a_lost_right_ends_a_tenure_and_seals_nothing() -> None:
    assert PermissionDenied in ENDING
    assert not issubclass(PermissionDenied, HALTING)
    assert issubclass(StoreWentBack, HALTING)


class Sealing:
    """Unsealed until :meth:`seal`."""

    reason = ""

    def __init__(self) -> None:
        self.opened: object | None = object()
        self._left = asyncio.Event()

    async def wait_unsealed(self) -> object:
        if self.opened is None:
            await asyncio.get_running_loop().create_future()
        return self.opened

    async def wait_left(self, opened: object) -> None:
        await self._left.wait()

    def seal(self, reason: str, *, reopen: bool = False) -> None:
        self.reason, self.opened = reason, None
        self._left.set()


class Registrar:
    async def update(self, **facts: object) -> None:
        """Nobody reads the catalog here."""


async def test_the_role_loop_tries_again_until_the_right_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.token_rights.PAUSE_MIN_S", 0.001)
    monkeypatch.setattr("sidecar.token_rights.PAUSE_MAX_S", 0.002)
    roles = cast("Any", Roles.__new__(Roles))
    sealing = Sealing()
    node = cast("Any", type("Node", (), {}))()
    node.sealing, node.rights = sealing, TokenRights()
    roles._node, roles._registration, roles._retiring = node, Registrar(), set()
    tries = 0
    stood_by = asyncio.Event()

    async def stand_by(opened: object) -> None:
        nonlocal tries
        tries += 1
        if tries <= 5:
            raise PermissionDenied("Consul: permission denied")
        node.rights.accepted()
        stood_by.set()
        await asyncio.get_running_loop().create_future()

    roles._stand_by = stand_by
    running = asyncio.create_task(roles.run())
    await stood_by.wait()
    assert tries == 6
    assert sealing.reason == ""
    assert node.rights.trouble == ""
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_seal_does_not_wait_for_the_pause() -> None:
    roles = cast("Any", Roles.__new__(Roles))
    sealing = Sealing()
    node = cast("Any", type("Node", (), {}))()
    node.sealing, node.rights = sealing, TokenRights()
    updates: list[dict[str, object]] = []
    sealed = asyncio.Event()

    class Seen(Registrar):
        async def update(self, **facts: object) -> None:
            updates.append(facts)
            if facts["sealed"]:
                sealed.set()

    roles._node, roles._registration, roles._retiring = node, Seen(), set()

    async def stand_by(opened: object) -> None:
        asyncio.get_running_loop().call_soon(sealing.seal, "asked")
        raise PermissionDenied("Consul: permission denied")

    node.rights._pause_s = 1e6
    roles._stand_by = stand_by
    running = asyncio.create_task(roles.run())
    async with asyncio.timeout(120):
        await sealed.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
