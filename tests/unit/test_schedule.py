"""The schedule: an index in the store, of which memory holds no more than it needs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consul_backend.errors import Unavailable
from sidecar.core.schedule import Schedule, due_delete, due_key, due_name, due_write
from sidecar.core.store_view import SealedStore
from tests.support.logical_store import FakeTime, MemoryLogicalStore, make_sealed


def make() -> tuple[MemoryLogicalStore, SealedStore, FakeTime, Schedule]:
    store, sealed = make_sealed()
    now = FakeTime()
    return store, sealed, now, Schedule(sealed, now)


async def taken(schedule: Schedule) -> list[tuple[int, str]]:
    """Everything that is due."""
    found: list[tuple[int, str]] = []
    while some := await schedule.take():
        found += [(due.at_s, due.name) for due in some]
    return found


async def test_names_come_in_their_second_and_not_before() -> None:
    _, sealed, now, schedule = make()
    start_s = int(now())
    moments = {"a-1": start_s + 5, "a-2": start_s + 65, "b-1": start_s + 65, "b-2": start_s + 7200}
    for name, at_s in moments.items():
        await sealed.commit([due_write(at_s, name)])
        schedule.add(at_s)
    assert await taken(schedule) == []
    assert schedule.wait_s() == 5
    now.advance(4.9)
    assert await taken(schedule) == []
    now.advance(0.1)
    assert await taken(schedule) == [(start_s + 5, "a-1")]
    now.advance(60)
    assert await taken(schedule) == [(start_s + 65, "a-2"), (start_s + 65, "b-1")]
    now.advance(86_400)
    assert await taken(schedule) == [(start_s + 7200, "b-2")]
    assert schedule.wait_s() is None


async def test_a_restart_finds_everything_and_reads_minutes_only() -> None:
    store, sealed, now, _ = make()
    start_s = int(now()) // 60 * 60
    for number in range(300):
        await sealed.commit([due_write(start_s + number * 7, due_name("g", str(number)))])
    lists: list[str] = []
    read = store.list

    async def counted(prefix: str) -> list[str]:
        lists.append(prefix)
        return await read(prefix)

    store.list = counted
    schedule = Schedule(sealed, now)
    await schedule.load()
    assert lists == ["l/lease/due/"]
    now.advance(300 * 7 + 60)
    assert [int(name.partition("-")[2]) for _, name in await taken(schedule)] == list(range(300))


async def test_what_is_not_deleted_comes_back_when_it_is_added_again() -> None:
    _, sealed, now, schedule = make()
    at_s = int(now())
    await sealed.commit([due_write(at_s, "a-1"), due_write(at_s, "a-2")])
    schedule.add(at_s)
    assert len(await taken(schedule)) == 2
    await sealed.commit([due_delete(at_s, "a-1")])
    assert await taken(schedule) == []
    schedule.add(at_s)
    assert await taken(schedule) == [(at_s, "a-2")]


@pytest.mark.parametrize("failing", ["minute", "second"])
async def test_a_store_that_fails_makes_it_forget_nothing(failing: str) -> None:
    store, sealed, now, _ = make()
    at_s = int(now()) + 120
    await sealed.commit([due_write(at_s, "a-1")])
    schedule = Schedule(sealed, now)
    await schedule.load()
    now.advance(200)
    read, calls = store.list, 0

    async def fails(prefix: str) -> list[str]:
        nonlocal calls
        calls += 1
        if calls == (1 if failing == "minute" else 2):
            raise Unavailable("not now")
        return await read(prefix)

    store.list = fails
    with pytest.raises(Unavailable):
        await taken(schedule)
    assert await taken(schedule) == [(at_s, "a-1")]


async def test_replication_can_add_to_it() -> None:
    _, sealed, now, schedule = make()
    at_s = int(now()) - 500
    await sealed.commit([due_write(at_s, "a-1")])
    schedule.invalidate([due_key(at_s, "a-1"), "l/expire/x/y", "r/core/mounts/x"])
    assert await taken(schedule) == [(at_s, "a-1")]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.booleans(), st.integers(0, 90)), max_size=30))
async def test_it_agrees_with_a_list_of_everything(steps: list[tuple[int, bool, int]]) -> None:
    """Each step adds a name some seconds ahead (or behind), perhaps restarts, and lets time pass."""
    _, sealed, now, schedule = make()
    waiting: dict[str, int] = {}
    for number, (ahead_s, restart, pause_s) in enumerate(steps):
        name, at_s = f"g-{number}", int(now()) + ahead_s - 100
        await sealed.commit([due_write(at_s, name)])
        schedule.add(at_s)
        waiting[name] = at_s
        if restart:
            schedule = Schedule(sealed, now)
            await schedule.load()
        now.advance(pause_s)
        expected = {name: at_s for name, at_s in waiting.items() if at_s <= now()}
        found = {name: at_s for at_s, name in await taken(schedule)}
        assert found == expected
        for name, at_s in found.items():
            await sealed.commit([due_delete(at_s, name)])
            del waiting[name]
