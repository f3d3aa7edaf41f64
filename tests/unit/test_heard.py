"""What was heard of a primary is stored when it is news, and counts only for the log that it was heard of."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest

from consul_backend.errors import Unavailable
from consul_backend.position import Position
from sidecar.replication.applier import Applier, ApplierOptions
from sidecar.replication.heard import BEATS_BETWEEN, Heard, HeardKeeper, heard_key, load_heard, resume
from sidecar.replication.hello import Identity
from sidecar.replication.modes import DR
from tests.support.replication import FakeClock
from tests.support.replication_cluster import Store

HERE = Position("set", "A", 1, 50, bytes(32))


async def nothing(_: object) -> None:
    return None


def applier(clock: FakeClock, position: Position | None = HERE) -> Applier:
    store = Store("eu")
    return Applier(DR, store, position, nothing, clock, ApplierOptions(), identity=Identity("eu", "s"))


def kept(clock: FakeClock, *, heard_ago_s: float, complete_ago_s: float | None) -> Heard:
    now_ms = clock.time_ms()
    complete_ms = 0 if complete_ago_s is None else now_ms - int(complete_ago_s * 1000)
    return Heard("A", 60, now_ms - int(heard_ago_s * 1000), complete_ms)


def test_ages_go_on_over_a_restart_and_count_by_the_monotonic_clock_from_then_on() -> None:
    clock = FakeClock()
    follower = applier(clock)
    resume(follower, kept(clock, heard_ago_s=10, complete_ago_s=12), clock)
    assert follower.upstream.head_index == 60
    assert not follower.upstream.connected
    clock.now_s += 5
    clock.skew_ms -= 3_600_000  # the wall clock goes back by an hour
    assert follower.lag_s() == 17
    assert follower.upstream.heard_at_s is not None
    assert clock.monotonic() - follower.upstream.heard_at_s == 15


def test_a_clock_that_went_back_over_the_restart_makes_no_negative_age() -> None:
    clock = FakeClock()
    heard = kept(clock, heard_ago_s=10, complete_ago_s=None)
    clock.skew_ms -= 3_600_000
    follower = applier(clock)
    resume(follower, heard, clock)
    assert follower.upstream.heard_at_s == clock.monotonic()
    assert follower.lag_s() is None, "it never had everything"
    complete = kept(clock, heard_ago_s=10, complete_ago_s=12)
    clock.skew_ms -= 3_600_000
    resume(follower, complete, clock)
    assert (follower.upstream.heard_at_s, follower.lag_s()) == (clock.monotonic(), 0)


@pytest.mark.parametrize("complete_ago_s", [None, 12])
def test_what_was_kept_is_kept_again_as_it_was_while_nothing_new_is_heard(complete_ago_s: float | None) -> None:
    clock = FakeClock()
    follower = applier(clock)
    heard = kept(clock, heard_ago_s=10, complete_ago_s=complete_ago_s)
    resume(follower, heard, clock)
    follower.upstream.connected = True
    clock.now_s += 7
    keeper = HeardKeeper(DR, Store("eu"), lambda: follower, clock, beat_s=5.0)
    assert keeper._now() == heard


def test_without_a_position_there_is_nothing_to_keep() -> None:
    clock = FakeClock()
    follower = applier(clock, None)
    follower.upstream.connected, follower.upstream.heard_at_s = True, clock.now_s
    assert HeardKeeper(DR, Store("eu"), lambda: follower, clock, beat_s=5.0)._now() is None


def test_what_was_heard_of_another_log_does_not_count() -> None:
    clock = FakeClock()
    heard = kept(clock, heard_ago_s=1, complete_ago_s=1)
    for follower, what in (
        (applier(clock, replace_generation("B")), heard),
        (applier(clock, None), heard),
        (applier(clock), None),
    ):
        resume(follower, what, clock)
        assert follower.upstream.heard_at_s is None
        assert follower.upstream.head_index == 0


def replace_generation(generation: str) -> Position:
    return Position(HERE.set_id, generation, HERE.epoch, HERE.index, HERE.chain_hash)


def test_only_news_is_stored() -> None:
    clock = FakeClock()
    follower = applier(clock)
    keeper = HeardKeeper(DR, Store("eu"), lambda: follower, clock, beat_s=5.0)
    assert keeper._now() is None, "nothing was heard yet"
    follower.upstream.connected, follower.upstream.heard_at_s, follower.upstream.head_index = True, clock.now_s, 50
    first = keeper._now()
    assert first is not None
    assert keeper._news(first)
    clock.now_s += 2
    assert keeper._now() == first, "when it was heard stays, while nothing comes"
    clock.now_s -= 2
    assert first.heard_ms == clock.time_ms()
    keeper._stored = first
    assert not keeper._news(first)
    assert keeper._news(replace_head(first, 51)), "a record that is known and not here"
    assert keeper._news(msgspec.structs.replace(first, generation="B")), "another log"
    later = replace_time(first, int(5.0 * BEATS_BETWEEN * 1000))
    assert keeper._news(later)
    assert not keeper._news(replace_time(first, 10_000))
    clock.now_s += 2
    follower.upstream.connected = False
    assert keeper._now() is None, "when the primary is silent there is nothing new"


def replace_head(heard: Heard, index: int) -> Heard:
    return msgspec.structs.replace(heard, head_index=index)


def replace_time(heard: Heard, more_ms: int) -> Heard:
    return msgspec.structs.replace(heard, heard_ms=heard.heard_ms + more_ms)


async def test_what_cannot_be_read_is_left_out() -> None:
    store = Store("eu")
    assert await load_heard(DR, store) is None
    await store.put(heard_key(DR), b"nonsense")
    assert await load_heard(DR, store) is None
    assert heard_key(DR).startswith("c/"), "shipped to nobody, in no root"


class Entries(Store):
    """Entries that cannot be written at first."""

    def __init__(self, refused: int) -> None:
        super().__init__("eu")
        self.refused = refused
        self.kept: dict[str, bytes] = {}
        self.written = asyncio.Event()

    async def get(self, key: str) -> bytes | None:
        return self.kept.get(key)

    async def put(self, key: str, value: bytes) -> None:
        if self.refused:
            self.refused -= 1
            raise Unavailable("nobody there")
        self.kept[key] = value
        self.written.set()


async def test_what_could_not_be_stored_is_stored_next_time_and_read_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    clock, entries = FakeClock(), Entries(refused=2)
    follower = applier(clock)
    follower.upstream.connected, follower.upstream.heard_at_s, follower.upstream.head_index = True, clock.now_s, 50
    keeper = HeardKeeper(DR, entries, lambda: follower, clock, beat_s=0.001)
    assert await load_heard(DR, entries) is None
    follower.upstream.connected = False
    running = asyncio.create_task(keeper.run())
    await asyncio.sleep(0.02)
    assert entries.refused == 2, "nothing is heard of it"
    follower.upstream.connected = True
    await asyncio.wait_for(entries.written.wait(), 10)
    entries.written.clear()
    await asyncio.sleep(0.02)
    assert not entries.written.is_set(), "there is no news"
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert entries.refused == 0
    assert caplog.text.count("was not stored, next time: nobody there") == 2
    assert await load_heard(DR, entries) == keeper._now()


async def test_what_cannot_be_read_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    entries = Entries(refused=0)
    await entries.put(heard_key(DR), b"junk")
    assert await load_heard(DR, entries) is None
    assert "cannot be read" in caplog.text
