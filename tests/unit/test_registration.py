"""What the catalog is told of a node, and that a catalog that fails is told later and harms nobody."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import pytest

from consul_backend.config import ConsulConfig
from consul_backend.errors import Unavailable
from sidecar.mesh.registration import (
    Intervals,
    NodeState,
    NoRegistration,
    Registrar,
    ServiceRegistration,
    service_id,
)

NEVER_S = 3600.0


class FakeEntry:
    """A catalog entry that records what it is told. ``down`` makes every call fail, ``hang`` makes it wait."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.down = False
        self.hang = False
        self.attempts = 0
        self._happened = asyncio.Condition()

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags written last."""
        return next((call[1] for call in reversed(self.calls) if call[0] == "tags"), ())

    @property
    def check_state(self) -> tuple[Any, ...]:
        """The check's last state and text."""
        return next((call[1:] for call in reversed(self.calls) if call[0] == "check"), (None, ""))

    async def _told(self, *call: object) -> None:
        self.attempts += 1
        if self.hang:
            await asyncio.Event().wait()
        if not self.down:
            self.calls.append(call)
        async with self._happened:
            self._happened.notify_all()
        if self.down:
            raise Unavailable("connection refused")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(120), self._happened:
            await self._happened.wait_for(condition)

    async def register(self) -> None:
        await self._told("register")

    async def set_tags(self, tags: Sequence[str]) -> None:
        await self._told("tags", tuple(tags))

    async def check(self, passing: bool, output: str) -> None:
        await self._told("check", passing, output)

    async def deregister(self) -> None:
        await self._told("deregister")

    async def close(self) -> None:
        self.calls.append(("close",))


QUIET = Intervals(check_s=NEVER_S, reconcile_s=NEVER_S, retry_s=0.001, leave_s=0.05)


@asynccontextmanager
async def running(
    entry: FakeEntry, tags: Sequence[str] = (), intervals: Intervals = QUIET
) -> AsyncIterator[ServiceRegistration]:
    registration = ServiceRegistration(entry, tags=tags, intervals=intervals)
    task = asyncio.create_task(registration.run())
    try:
        yield registration
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# --- what is said ---


@pytest.mark.parametrize(
    ("state", "tags", "check"),
    [
        (NodeState(), ("standby",), (False, "Outrider Sealed")),
        (NodeState(initialized=True), ("standby", "initialized"), (False, "Outrider Sealed")),
        (NodeState(sealed=False, initialized=True), ("standby", "initialized"), (True, "Outrider Unsealed")),
        (
            NodeState(sealed=False, active=True, initialized=True, performance_mode="primary"),
            ("active", "initialized", "perf-primary"),
            (True, "Outrider Unsealed"),
        ),
        (
            NodeState(sealed=False, initialized=True, performance_mode="secondary"),
            ("standby", "initialized", "perf-secondary"),
            (True, "Outrider Unsealed"),
        ),
        (
            NodeState(sealed=False, active=True, initialized=True, performance_mode="primary", dr_mode="primary"),
            ("active", "initialized", "perf-primary", "dr-primary"),
            (True, "Outrider Unsealed"),
        ),
        (
            NodeState(sealed=False, active=True, initialized=True, performance_mode="primary", dr_mode="secondary"),
            ("dr-secondary", "initialized"),
            (True, "Outrider Unsealed"),
        ),
        (
            NodeState(sealed=False, active=True, initialized=True, leaving=True, performance_mode="disabled"),
            ("standby", "initialized"),
            (False, "Outrider Stepping Down"),
        ),
    ],
)
def test_tags_and_check_of_a_state(state: NodeState, tags: tuple[str, ...], check: tuple[bool, str]) -> None:
    assert state.tags(()) == tags
    assert (state.passing, state.output) == check


def test_in_every_state_exactly_one_role_and_active_only_where_requests_may_go() -> None:
    flags = (False, True)
    for sealed, active, initialized, leaving in product(flags, repeat=4):
        for mode in ("", "disabled", "primary", "secondary", "unknown"):
            state = NodeState(sealed, active, initialized, leaving, mode)
            tags = state.tags(("dc1", "initialized"))
            assert len(set(tags) & {"active", "standby"}) == 1
            assert len(set(tags)) == len(tags)
            assert tags[:2] == ("dc1", "initialized")
            assert "active" not in tags or state.passing
            assert not (sealed and any(tag.startswith("perf-") for tag in tags))


def test_the_id_survives_a_restart() -> None:
    assert service_id("outrider", "10.0.0.1", 8200) == "outrider:10.0.0.1:8200"


# --- when it is said ---


async def test_a_node_registers_sealed_and_follows_its_life() -> None:
    entry = FakeEntry()
    async with running(entry, tags=("blue",)) as registration:
        await entry.until(lambda: len(entry.calls) == 2)
        assert entry.calls == [("tags", ("blue", "standby")), ("check", False, "Outrider Sealed")]
        await registration.update(sealed=False)
        await entry.until(lambda: entry.check_state == (True, "Outrider Unsealed"))
        assert entry.tags == ("blue", "standby", "initialized")
        await registration.update(active=True, performance_mode="primary")
        await entry.until(lambda: "active" in entry.tags)
        assert entry.tags == ("blue", "active", "initialized", "perf-primary")
        await registration.update(sealed=True, active=False)
        await entry.until(lambda: entry.check_state == (False, "Outrider Sealed"))
        await entry.until(lambda: entry.tags == ("blue", "standby", "initialized"))


async def test_leaving_is_known_before_it_returns_check_first() -> None:
    entry = FakeEntry()
    async with running(entry) as registration:
        await registration.update(sealed=False, active=True)
        await entry.until(lambda: "active" in entry.tags and entry.check_state[0] is True)
        before = len(entry.calls)
        await registration.leaving()
        assert entry.calls[before : before + 2] == [
            ("check", False, "Outrider Stepping Down"),
            ("tags", ("standby", "initialized")),
        ]
        await registration.update(active=False)
        await entry.until(lambda: entry.check_state == (True, "Outrider Unsealed"))
        assert entry.tags == ("standby", "initialized")


async def test_leaving_waits_a_bounded_time_and_is_said_later() -> None:
    entry = FakeEntry()
    async with running(entry) as registration:
        await registration.update(sealed=False, active=True)
        await entry.until(lambda: "active" in entry.tags and entry.check_state[0] is True)
        entry.down = True
        await registration.leaving()
        entry.down = False
        await entry.until(lambda: entry.tags == ("standby", "initialized") and entry.check_state[0] is False)
    stuck = FakeEntry()
    registration = ServiceRegistration(stuck, intervals=QUIET)
    task = asyncio.create_task(registration.run())
    await stuck.until(lambda: len(stuck.calls) == 2)
    stuck.hang = True
    async with asyncio.timeout(120):
        await registration.leaving()
        await registration.close()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stuck.calls[-1] == ("close",)


async def test_an_update_without_a_change_costs_nothing() -> None:
    entry = FakeEntry()
    async with running(entry) as registration:
        await entry.until(lambda: len(entry.calls) == 2)
        await registration.update(sealed=True, active=False)
        await asyncio.sleep(0)
        assert len(entry.calls) == 2


async def test_the_check_is_pushed_again_and_again_and_the_entry_now_and_then() -> None:
    entry = FakeEntry()
    async with running(entry, intervals=Intervals(check_s=0.001, reconcile_s=NEVER_S)) as registration:
        await registration.update(sealed=False)
        await entry.until(lambda: entry.calls.count(("check", True, "Outrider Unsealed")) >= 5)
        assert sum(call[0] == "tags" for call in entry.calls) <= 2
    entry = FakeEntry()
    async with running(entry, intervals=Intervals(check_s=0.001, reconcile_s=0.0)):
        await entry.until(lambda: sum(call[0] == "tags" for call in entry.calls) >= 5)


# --- a catalog that fails ---


async def test_failures_are_logged_once_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service_registration")
    entry = FakeEntry()
    entry.down = True
    async with running(entry) as registration:
        await entry.until(lambda: entry.attempts >= 5)
        await registration.update(sealed=False, active=True)
        await entry.until(lambda: entry.attempts >= 10)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        entry.down = False
        await entry.until(lambda: bool(entry.calls) and entry.calls[-1] == ("check", True, "Outrider Unsealed"))
        assert "active" in entry.tags
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_after_a_failure_the_whole_entry_is_written_again() -> None:
    entry = FakeEntry()
    async with running(entry, intervals=Intervals(check_s=0.001, reconcile_s=NEVER_S, retry_s=0.001)):
        await entry.until(lambda: len(entry.calls) >= 2)
        entry.down = True
        attempts = entry.attempts
        await entry.until(lambda: entry.attempts >= attempts + 2)
        entry.calls.clear()
        entry.down = False
        await entry.until(lambda: len(entry.calls) >= 2)
        assert entry.calls[0][0] == "tags"


async def test_close_takes_the_entry_out_and_survives_a_dead_consul(caplog: pytest.LogCaptureFixture) -> None:
    entry = FakeEntry()
    await ServiceRegistration(entry, intervals=QUIET).close()
    assert entry.calls == [("deregister",), ("close",)]
    dead = FakeEntry()
    dead.down = True
    await ServiceRegistration(dead, intervals=QUIET).close()
    assert dead.calls == [("close",)]
    assert "could not be taken out" in caplog.text


async def test_no_registration_does_nothing() -> None:
    registrar: Registrar = NoRegistration()
    await registrar.run()
    await registrar.update(sealed=False, active=True, performance_mode="primary")
    await registrar.leaving()
    await registrar.close()


async def test_of_builds_the_entry_that_vault_would() -> None:
    registration = ServiceRegistration.of(
        ConsulConfig(), service="vault", tags=("blue",), address="10.0.0.1", port=8200, check_ttl_s=10.0
    )
    entry = registration._entry.entry  # type: ignore[attr-defined]  # what the mesh would read
    assert (entry.service, entry.id, entry.address, entry.port) == ("vault", "vault:10.0.0.1:8200", "10.0.0.1", 8200)
    assert entry.check_ttl_s > 2 * registration._intervals.check_s - 0.001
