"""The loop that does what is due: bounded, fair, and forgetting nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from consul_backend.errors import Unavailable
from sidecar.core import expiration
from sidecar.core.expiration import JOBS_MAX, JOBS_PER_GROUP_MAX, Expiration
from sidecar.core.schedule import Due, Schedule, due_name, due_write
from tests.support.logical_store import FakeTime, make_sealed


class Work:
    """Handles what is due by deleting it; ``held`` groups wait for ``release``."""

    def __init__(self) -> None:
        self.store, self.sealed = make_sealed()
        self.now = FakeTime()
        self.schedule = Schedule(self.sealed, self.now)
        self.done: list[str] = []
        self.running: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.held: set[str] = set()
        self.release = asyncio.Event()
        self.errors: list[Exception] = []
        self.expiration = Expiration(self.schedule, self.handle)
        self.progress = asyncio.Event()

    async def handle(self, due: Due) -> None:
        for key in (due.group, "all"):
            self.running[key] = self.running.get(key, 0) + 1
            self.most[key] = max(self.most.get(key, 0), self.running[key])
        try:
            if due.group in self.held:
                await self.release.wait()
            if self.errors:
                raise self.errors.pop()
            await self.sealed.delete(due.key)
            self.done.append(due.name)
        finally:
            for key in (due.group, "all"):
                self.running[key] -= 1
            self.progress.set()

    async def add(self, group: str, count: int, at_s: int | None = None) -> None:
        at_s = int(self.now()) if at_s is None else at_s
        for start in range(0, count, 50):
            numbers = range(start, min(start + 50, count))
            await self.sealed.commit([due_write(at_s, due_name(group, f"{number:05d}")) for number in numbers])
        self.schedule.add(at_s)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(120):
            while not condition():
                self.progress.clear()
                await self.progress.wait()

    def left(self) -> list[str]:
        return self.store.below("l/lease/due/")


@pytest.fixture
def work() -> Work:
    return Work()


async def test_everything_due_is_done_in_bounded_parallel(work: Work) -> None:
    for group in "abcdefgh":
        await work.add(group, 100)
    await work.expiration.sweep()
    assert len(work.done) == len(set(work.done)) == 800
    assert work.left() == []
    assert max(work.most[group] for group in "abcdefgh") <= JOBS_PER_GROUP_MAX
    assert JOBS_PER_GROUP_MAX < work.most["all"] <= JOBS_MAX


async def test_a_group_that_hangs_holds_up_nobody_else(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiration, "QUEUE_PER_GROUP_MAX", 90)
    work.held = {"hung"}
    for ago_s in (3, 2, 1):
        await work.add("hung", 200, int(work.now()) - ago_s)
    await work.add("fine", 300)
    running = asyncio.create_task(work.expiration.run())
    await work.until(lambda: sum(name.startswith("fine") for name in work.done) == 300)
    assert work.running["hung"] == JOBS_PER_GROUP_MAX
    assert work.expiration.queued <= 90
    work.release.set()
    work.held.clear()
    await work.until(lambda: len(work.done) == 900)
    assert work.left() == []
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_the_store_refused_is_tried_again(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiration, "RETRY_S", 0.0)
    await work.add("a", 20)
    work.errors = [Unavailable("not now") for _ in range(7)]
    work.store.fail = Unavailable("nor this")
    running = asyncio.create_task(work.expiration.run())
    await work.until(lambda: len(work.done) == 20)
    assert work.left() == []
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_one_bad_entry_does_not_stop_the_rest(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    await work.add("a", 20)
    work.errors = [ValueError("a defect")]
    await work.expiration.sweep()
    assert len(work.done) == 19
    assert len(work.left()) == 1, "it is still in the store, for the next node"
    assert "expiration of one entry failed" in caplog.text


async def test_nothing_is_done_where_this_cluster_may_not(work: Work) -> None:
    allowed = False
    work.expiration = Expiration(work.schedule, work.handle, lambda: allowed)
    await work.add("a", 20)
    await work.expiration.sweep()
    assert (work.done, len(work.left())) == ([], 20)
    allowed = True
    await work.expiration.sweep()
    assert len(work.done) == 20


async def test_a_wake_up_finds_what_has_become_due(work: Work) -> None:
    running = asyncio.create_task(work.expiration.run())
    await asyncio.sleep(0)
    await work.add("a", 1)
    work.expiration.wake()
    await work.until(lambda: work.done == ["a-00000"])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
