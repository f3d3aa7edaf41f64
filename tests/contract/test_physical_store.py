"""The rules of ``consul_backend/physical.py``, on every store that claims to keep them."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from consul_backend.clock import SystemClock
from consul_backend.embedded import EmbeddedStore
from consul_backend.errors import (
    AlreadyRunning,
    Conflict,
    Corrupt,
    OutcomeUnknown,
    SentinelMissing,
    TooLarge,
    Unavailable,
)
from consul_backend.limits import body_bytes
from consul_backend.physical import EPOCH_KEY, LOCK_KEY, SENTINEL_KEY, PhysicalStore
from consul_backend.testing import SimulatedConsul
from consul_backend.txn import (
    Cas,
    CheckIndex,
    CheckNotExists,
    CheckSession,
    Delete,
    DeleteTree,
    Get,
    Lock,
    Op,
    Set,
    Unlock,
)

BEAT_TTL_S = 1.0
RELEASE_SLACK_S = 1.5
WATCH_S = 300.0
SOON_S = 120.0
"""Before a watch ends by itself, on any machine."""
"""What a loaded machine may add to the beat's time to live."""


@dataclass
class Bench:
    """A store of one kind, and how to get another process's handle on the same data."""

    store: PhysicalStore
    another: Callable[[], Awaitable[PhysicalStore]]


@pytest.fixture(params=["inmem", "embedded", "simulated", "consul"])
def consul_factory(request: pytest.FixtureRequest) -> Any:
    """The factory of Consul stores, or else the name of the kind to test; no Consul is started for those."""
    return request.getfixturevalue("consul_store_factory") if request.param == "consul" else request.param


@pytest.fixture
async def bench(consul_factory: Any, tmp_path: Path) -> AsyncIterator[Bench]:
    if not isinstance(consul_factory, str):
        yield Bench(await consul_factory(), consul_factory)
        return
    if consul_factory == "simulated":
        async with simulated_bench() as found:
            yield found
        return
    store = EmbeddedStore(None if consul_factory == "inmem" else str(tmp_path / "store"))
    await store.open()
    opened = [store]

    async def another() -> PhysicalStore:
        peer = store.peer()
        await peer.open()
        opened.append(peer)
        return peer

    yield Bench(store, another)
    for handle in reversed(opened):
        await handle.close()


@asynccontextmanager
async def simulated_bench() -> AsyncIterator[Bench]:
    """The simulated Consul of ``tests/sim``, here by the wall clock: it must not drift from the real one."""
    consul = SimulatedConsul(SystemClock())
    nodes = itertools.count(1)

    async def client() -> PhysicalStore:
        handle = consul.client(f"node-{next(nodes)}")
        await handle.open()
        return handle

    yield Bench(await client(), client)
    consul.close()


@pytest.fixture
def store(bench: Bench) -> PhysicalStore:
    return bench.store


async def new_session(store: PhysicalStore, *, beat_ttl_s: float = 30.0, lock_delay_s: float = 0.0) -> str:
    return await store.create_session("contract", beat_ttl_s=beat_ttl_s, lock_delay_s=lock_delay_s)


async def index_of(store: PhysicalStore, key: str) -> int:
    item = await store.get(key, consistent=True)
    assert item is not None
    return item.modify_index


async def value_of(store: PhysicalStore, key: str) -> bytes | None:
    item = await store.get(key, consistent=True)
    return None if item is None else item.value


async def refused(store: PhysicalStore, *ops: Op) -> tuple[int, ...]:
    """The positions of the operations that fail; nothing may be written."""
    with pytest.raises(Conflict) as caught:
        await store.txn(ops)
    return tuple(failure.op_index for failure in caught.value.failures)


# -- transactions


async def test_kind_and_limits(store: PhysicalStore) -> None:
    assert store.kind in {"inmem", "embedded", "consul"}
    assert store.limits.ops_max in {64, 128}
    assert store.limits.body_bytes_max == 524_288


async def test_all_keys_of_a_transaction_share_one_new_index(store: PhysicalStore) -> None:
    first = await store.txn([Set("a", b"1"), Set("b/c", b"2")])
    second = await store.txn([Set("a", b"3"), Cas("d", b"", 0), Delete("b/c")])
    assert second.modify_index > first.modify_index > 0
    assert await index_of(store, "a") == await index_of(store, "d") == second.modify_index
    assert await value_of(store, "d") == b""
    assert await store.get("b/c") is None


async def test_values_come_back_as_they_were(store: PhysicalStore) -> None:
    values = {f"v/{n}": bytes(range(256)) * n for n in range(5)}
    await store.txn([Set(key, value) for key, value in values.items()])
    items = await store.get_many(list(values), consistent=True)
    assert {item.key: item.value for item in items if item} == values


async def test_gets_inside_a_transaction_see_its_writes(store: PhysicalStore) -> None:
    result = await store.txn([Set("a", b"1"), Get("a"), Set("a", b"2"), Get("a")])
    assert [item.value for item in result.items] == [b"1", b"2"]
    assert await value_of(store, "a") == b"2"


async def test_a_refused_transaction_writes_nothing_and_names_every_failure(store: PhysicalStore) -> None:
    await store.txn([Set("there", b"1")])
    before = await index_of(store, "there")
    failed = await refused(
        store,
        Set("new", b"x"),
        CheckNotExists("there"),
        Cas("there", b"2", before + 1000),
        CheckIndex("there", before),
        Get("nowhere"),
        CheckIndex("nowhere", 1),
        CheckSession("nowhere", str(uuid.uuid4())),
        Delete("there"),
    )
    assert failed == (1, 2, 4, 5, 6)
    assert await store.get("new") is None
    assert await index_of(store, "there") == before


async def test_writing_the_same_value_moves_no_index(store: PhysicalStore) -> None:
    first = await store.txn([Set("a", b"same")])
    again = await store.txn([Set("a", b"same"), Set("b", b"other")])
    assert await index_of(store, "a") == first.modify_index
    assert await index_of(store, "b") == again.modify_index > first.modify_index
    alone = await store.txn([Set("a", b"same")])
    assert alone.modify_index == first.modify_index
    await store.txn([CheckIndex("a", first.modify_index), Cas("a", b"same", first.modify_index)])
    assert await index_of(store, "a") == first.modify_index


async def test_a_transaction_that_writes_nothing_has_no_index(store: PhysicalStore) -> None:
    await store.txn([Set("a", b"1")])
    assert (await store.txn([Delete("a"), Delete("never")])).modify_index == 0
    assert (await store.txn([CheckNotExists("a")])).modify_index == 0


async def test_delete_tree_takes_what_begins_with_the_prefix(store: PhysicalStore) -> None:
    await store.txn([Set(key, b"") for key in ("w/1/a", "w/1/b", "w/10/a", "w/2/a", "w")])
    await store.txn([DeleteTree("w/1/")])
    assert await store.list("w/") == ["10/", "2/"]
    await store.txn([DeleteTree("w/")])
    assert await store.list("") == ["w"]


# -- the guards of a commit


async def test_create_only_creates_once(store: PhysicalStore) -> None:
    await store.txn([Cas("record", b"1", 0)])
    assert await refused(store, Cas("record", b"1", 0)) == (0,)


async def test_a_chain_of_records_admits_one_successor(store: PhysicalStore) -> None:
    """check-index on the last record and cas 0 on the next: a repeated or late transaction lands nowhere."""
    one = (await store.txn([Cas("wal/1", b"one", 0)])).modify_index
    commit: list[Op] = [CheckIndex("wal/1", one), Set("data", b"v1"), Cas("wal/2", b"two", 0)]
    two = (await store.txn(commit)).modify_index
    assert await refused(store, *commit) == (2,)
    await store.txn([CheckIndex("wal/2", two), Set("data", b"v2"), Cas("wal/3", b"three", 0)])
    # Collected since: cas 0 alone would let the late duplicate pass.
    await store.txn([Delete("wal/1"), Delete("wal/2")])
    assert await refused(store, *commit) == (0,)
    assert await value_of(store, "data") == b"v2"


async def test_the_fence_admits_the_holder_only(bench: Bench) -> None:
    store, other = bench.store, await bench.another()
    mine, theirs = await new_session(store), await new_session(other)
    await store.txn([Set("free", b"")])
    await store.txn([Lock(LOCK_KEY, b"me", mine), Cas(EPOCH_KEY, b"1", 0)])
    assert await refused(other, CheckSession(LOCK_KEY, theirs), Set("data", b"x")) == (0,)
    assert await refused(store, CheckSession("free", mine), Set("data", b"x")) == (0,)
    assert await refused(store, CheckSession("none", mine), Set("data", b"x")) == (0,)
    await store.txn([CheckSession(LOCK_KEY, mine), Set("data", b"x")])
    assert await value_of(other, "data") == b"x"


async def test_a_plain_write_keeps_the_lock(store: PhysicalStore) -> None:
    session = await new_session(store)
    await store.txn([Lock(LOCK_KEY, b"1", session)])
    await store.txn([Set(LOCK_KEY, b"2")])
    item = await store.get(LOCK_KEY)
    assert item is not None
    assert (item.value, item.session) == (b"2", session)


# -- limits, at their edges


async def test_the_operation_limit(store: PhysicalStore) -> None:
    ops_max = store.limits.ops_max
    await store.txn([Set(f"n/{n}", b"") for n in range(ops_max)])
    assert len(await store.list("n/")) == ops_max
    with pytest.raises(TooLarge):
        await store.txn([Set(f"m/{n}", b"") for n in range(ops_max + 1)])
    assert await store.list("m/") == []


async def test_the_body_limit_to_the_byte(store: PhysicalStore) -> None:
    limits = store.limits

    def filled(spare_bytes: int) -> list[Op]:
        """A transaction that leaves exactly ``spare_bytes`` of the body unused (negative: too large)."""
        rest = limits.body_bytes_max - body_bytes([Set("big/", b"")], limits.prefix_bytes) - spare_bytes
        return [Set("big/" + "k" * (1 + (rest - 1) % 4), b"v" * ((rest - 1) // 4 * 3))]

    exact = filled(0)
    assert body_bytes(exact, limits.prefix_bytes) == limits.body_bytes_max
    await store.txn(exact)
    await store.txn([DeleteTree("big/")])
    with pytest.raises(TooLarge):
        await store.txn(filled(-1))
    assert await store.list("big/") == []


async def test_our_size_limits_are_the_servers_own(consul_store_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our own gate open, Consul itself takes what we call fitting and refuses one byte and one operation more."""
    store = await consul_store_factory()
    limits = store.limits
    monkeypatch.setattr("consul_backend.store.require_shape", lambda *_: None)
    monkeypatch.setattr("consul_backend.store.require_body", lambda *_: None)
    with pytest.raises(TooLarge):
        await store.txn([CheckNotExists("a")] * (limits.ops_max + 1))
    rest = limits.body_bytes_max - body_bytes([Set("big", b"")], limits.prefix_bytes)
    await store.txn([Set("big" + "k" * (rest % 4), b"v" * (rest // 4 * 3))])
    # The server may close before it has read the whole of a request that is too large; nothing is written either way.
    with pytest.raises((TooLarge, OutcomeUnknown)):
        await store.txn([Set("huge" + "k" * (rest % 4), b"v" * (rest // 4 * 3))])
    assert await store.get("huge" + "k" * (rest % 4)) is None


async def test_keys_outside_the_alphabet_are_refused_everywhere(store: PhysicalStore) -> None:
    for call in (store.get("a//b"), store.get_many(["a.b"]), store.txn([Set("ü", b"")]), store.watch("", 0, 0)):
        with pytest.raises(ValueError, match="not a physical key"):
            await call
    with pytest.raises(ValueError, match="slash"):
        await store.list("a")


# -- reading


async def test_get_many_keeps_order_beyond_one_transaction(store: PhysicalStore) -> None:
    count = store.limits.ops_max + 10
    for start in range(0, count, 50):
        await store.txn([Set(f"k/{n}", b"%d" % n) for n in range(start, min(start + 50, count)) if n % 7])
    keys = [f"k/{n}" for n in reversed(range(count))]
    items = await store.get_many(keys)
    expected = [b"%d" % n if n % 7 else None for n in reversed(range(count))]
    assert [item.value if item else None for item in items] == expected
    assert await store.get_many([]) == []


async def test_get_many_of_big_values(store: PhysicalStore) -> None:
    """Together far over one body's worth: read in smaller pieces, whole all the same."""
    for n in range(10):
        await store.txn([Set(f"big/{n}", bytes([n]) * 380_000)])
    items = await store.get_many([f"big/{n}" for n in range(10)])
    assert [item.value[:1] * len(item.value) == item.value and len(item.value) for item in items if item] == [
        380_000
    ] * 10


async def test_list_shows_one_level_sorted_by_bytes(store: PhysicalStore) -> None:
    for names in (["b", "a-b", "a/x", "a/y/z", "B"], ["_", "a", "a_/q", "0/1/2/3"]):
        await store.txn([Set(f"top/{name}", b"") for name in names])
    assert await store.list("top/") == ["0/", "B", "_", "a", "a-b", "a/", "a_/", "b"]
    assert await store.list("top/a/", consistent=True) == ["x", "y/"]
    assert await store.list("") == ["top/"]
    assert await store.list("nowhere/") == []


async def test_names_below_shows_every_level_unless_there_are_too_many(store: PhysicalStore) -> None:
    names = ["b", "a-b", "a/x", "a/y/z", "B", "_", "a", "a_/q"]
    await store.txn([Set(f"top/{name}", b"") for name in names])
    found = await store.names_below("top/", len(names), consistent=True)
    assert found == ["B", "_", "a", "a-b", "a/x", "a/y/z", "a_/q", "b"]
    assert await store.names_below("top/", len(names) - 1) is None
    assert await store.names_below("top/a/", 2) == ["x", "y/z"]
    assert await store.names_below("", 100) == [f"top/{name}" for name in found]
    assert await store.names_below("nowhere/", 0) == []
    with pytest.raises(ValueError, match="ends in a slash"):
        await store.names_below("top", 100)


async def test_a_key_may_be_asked_for_twice(store: PhysicalStore) -> None:
    await store.txn([Set("a", b"1")])
    found = await store.get_many(["a", "nothing", "a", "nothing"])
    assert [item.value if item is not None else None for item in found] == [b"1", None, b"1", None]


async def test_list_of_a_long_folder(store: PhysicalStore) -> None:
    names = [f"{n:04}" for n in range(600)]
    for start in range(0, 600, 60):
        await store.txn([Set(f"f/{name}", b"") for name in names[start : start + 60]])
    assert await store.list("f/") == names


async def test_a_sentinel_that_is_gone_stops_every_list(store: PhysicalStore) -> None:
    await store.txn([Set("a", b"1"), Set(SENTINEL_KEY, b"here")])
    assert await store.list("") == ["a", SENTINEL_KEY]
    await store.txn([Delete(SENTINEL_KEY)])
    for prefix in ("", "empty/"):
        with pytest.raises(SentinelMissing):
            await store.list(prefix)
        with pytest.raises(SentinelMissing):
            await store.names_below(prefix, 100)


async def test_a_sentinel_found_at_opening_counts(bench: Bench) -> None:
    await bench.store.txn([Set(SENTINEL_KEY, b"here")])
    later = await bench.another()
    await bench.store.txn([Delete(SENTINEL_KEY)])
    with pytest.raises(SentinelMissing):
        await later.list("")


# -- watching


async def test_a_watch_wakes_for_its_key(store: PhysicalStore) -> None:
    await store.txn([Set("w", b"1"), Set("other", b"1")])
    item, index = await store.watch("w", 0, 10.0)
    assert item is not None
    assert item.value == b"1"
    waiting = asyncio.create_task(store.watch("w", index, WATCH_S))
    await store.txn([Set("other", b"2"), Set("w", b"1")])
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done, "another key and the same value wake nobody"
    await store.txn([Set("w", b"2")])
    item, next_index = await asyncio.wait_for(waiting, SOON_S)
    assert item is not None
    assert item.value == b"2"
    assert next_index > index


async def test_a_watch_ends_by_itself(store: PhysicalStore) -> None:
    await store.txn([Set("w", b"1")])
    item, index = await store.watch("w", 0, 10.0)
    again, next_index = await store.watch("w", index, 0.05)
    assert again == item
    assert next_index == index


async def test_a_watch_sees_deletion_and_creation(store: PhysicalStore) -> None:
    await store.txn([Set("w", b"1")])
    _, index = await store.watch("w", 0, 10.0)
    waiting = asyncio.create_task(store.watch("w", index, WATCH_S))
    await asyncio.wait([waiting], timeout=0.1)
    await store.txn([Delete("w")])
    item, index = await asyncio.wait_for(waiting, SOON_S)
    assert item is None
    waiting = asyncio.create_task(store.watch("w", index, WATCH_S))
    await asyncio.wait([waiting], timeout=0.1)
    await store.txn([Set("w", b"2")])
    item, _ = await asyncio.wait_for(waiting, SOON_S)
    assert item is not None
    assert item.value == b"2"


async def test_a_watch_does_not_miss_what_happened_before_it(store: PhysicalStore) -> None:
    await store.txn([Set("w", b"1")])
    _, index = await store.watch("w", 0, 10.0)
    await store.txn([Set("w", b"2")])
    item, _ = await asyncio.wait_for(store.watch("w", index, WATCH_S), SOON_S)
    assert item is not None
    assert item.value == b"2"


# -- sessions and locks


async def wait_free(store: PhysicalStore, key: str) -> None:
    """Until nobody holds ``key``."""
    index = 0
    while True:
        item, index = await store.watch(key, index, 10.0)
        if item is not None and not item.session:
            return


async def test_a_missed_beat_frees_the_lock_in_time(bench: Bench) -> None:
    store, other = bench.store, await bench.another()
    session = await new_session(store, beat_ttl_s=BEAT_TTL_S, lock_delay_s=0.3)
    await store.txn([Lock(LOCK_KEY, b"me", session)])
    before = await index_of(other, LOCK_KEY)
    beaten_at_s = time.monotonic()
    await store.beat()
    await asyncio.wait_for(wait_free(other, LOCK_KEY), SOON_S)
    assert 0.7 * BEAT_TTL_S < time.monotonic() - beaten_at_s < BEAT_TTL_S + RELEASE_SLACK_S
    assert await index_of(other, LOCK_KEY) > before
    assert await value_of(other, LOCK_KEY) == b"me", "a lock that is lost keeps its value"
    assert await store.renew_session(session) is False
    assert await refused(store, CheckSession(LOCK_KEY, session), Set("late", b"")) == (0,)


async def test_beats_keep_the_session(store: PhysicalStore) -> None:
    ttl_s = 3 * BEAT_TTL_S  # a machine that is busy may be late by two thirds of it
    session = await new_session(store, beat_ttl_s=ttl_s)
    until_s = time.monotonic() + 1.5 * ttl_s
    while time.monotonic() < until_s:
        await asyncio.sleep(BEAT_TTL_S / 3)
        await store.beat()
    assert await store.renew_session(session) is True


async def test_a_lock_that_was_lost_is_delayed(bench: Bench) -> None:
    store, other = bench.store, await bench.another()
    lost = await new_session(store, lock_delay_s=3.0)
    successor = await new_session(other)
    await store.txn([Lock(LOCK_KEY, b"1", lost)])
    destroyed_at = time.monotonic()
    await store.destroy_session(lost)
    with pytest.raises(Conflict, match="lock delay"):
        await other.txn([Lock(LOCK_KEY, b"2", successor)])
    while True:
        try:
            await other.txn([Lock(LOCK_KEY, b"2", successor)])
        except Conflict:
            await asyncio.sleep(0.02)
        else:
            break
    assert 2.8 < time.monotonic() - destroyed_at < 3.0 + RELEASE_SLACK_S


async def test_a_clean_release_has_no_delay(bench: Bench) -> None:
    store, other = bench.store, await bench.another()
    mine, theirs = await new_session(store, lock_delay_s=5.0), await new_session(other)
    await store.txn([Lock(LOCK_KEY, b"1", mine)])
    assert await refused(other, Unlock(LOCK_KEY, b"", theirs)) == (0,)
    await store.txn([Unlock(LOCK_KEY, b"free", mine)])
    await store.destroy_session(mine)
    await other.txn([Lock(LOCK_KEY, b"2", theirs)])
    item = await store.get(LOCK_KEY)
    assert item is not None
    assert (item.value, item.session) == (b"2", theirs)


async def test_a_held_lock_is_refused_to_others_and_not_to_its_holder(bench: Bench) -> None:
    store, other = bench.store, await bench.another()
    mine, theirs = await new_session(store), await new_session(other)
    await store.txn([Lock(LOCK_KEY, b"1", mine)])
    assert await refused(other, Lock(LOCK_KEY, b"2", theirs), Cas(EPOCH_KEY, b"", 0)) == (0,)
    await store.txn([Lock(LOCK_KEY, b"3", mine)])
    assert await store.get(EPOCH_KEY) is None


async def test_a_dead_session_locks_nothing(store: PhysicalStore) -> None:
    session = await new_session(store)
    assert await store.renew_session(session) is True
    await store.destroy_session(session)
    await store.destroy_session(session)
    assert await store.renew_session(session) is False
    with pytest.raises(Conflict, match="invalid session"):
        await store.txn([Lock(LOCK_KEY, b"", session)])


async def test_stopping_the_beat_ends_the_sessions(store: PhysicalStore) -> None:
    session = await new_session(store)
    await store.txn([Lock(LOCK_KEY, b"", session)])
    await store.stop_beat()
    await asyncio.wait_for(wait_free(store, LOCK_KEY), SOON_S)
    await store.stop_beat()
    fresh = await new_session(store)
    assert await store.renew_session(fresh) is True


async def test_one_process_may_have_several_sessions_in_turn(store: PhysicalStore) -> None:
    first = await new_session(store)
    second = await new_session(store, beat_ttl_s=20.0)
    assert first != second
    assert await store.renew_session(first)
    assert await store.renew_session(second)


# -- opening and closing


async def test_a_closed_store_is_unavailable(bench: Bench) -> None:
    handle = await bench.another()
    await handle.close()
    await handle.close()
    for call in (handle.get("a"), handle.list(""), handle.txn([Set("a", b"")]), handle.watch("a", 0, 1), handle.beat()):
        with pytest.raises(Unavailable):
            await call
    await bench.store.txn([Set("a", b"still here")])


async def test_an_embedded_store_keeps_data_and_drops_locks(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "store")
    store = EmbeddedStore(path)
    await store.open()
    session = await new_session(store)
    index = (await store.txn([Set("a", b"1"), Lock(LOCK_KEY, b"me", session)])).modify_index
    await store.close()
    await store.open()
    held = await store.get(LOCK_KEY)
    assert held is not None
    assert held.session == ""
    assert held.modify_index > index
    assert await index_of(store, "a") == index
    assert (await store.txn([Set("b", b"")])).modify_index > held.modify_index
    await store.close()


async def test_a_second_process_is_refused(tmp_path: Path) -> None:
    first, second = EmbeddedStore(str(tmp_path)), EmbeddedStore(str(tmp_path))
    await first.open()
    with pytest.raises(AlreadyRunning):
        await second.open()
    await first.close()
    await second.open()
    await second.close()


async def test_another_programs_file_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "outrider.db").write_bytes(b"not a database, and long enough to be taken for one" * 100)
    store = EmbeddedStore(str(tmp_path))
    with pytest.raises(Corrupt):
        await store.open()


async def test_a_cancelled_caller_leaves_the_store_whole() -> None:
    store = EmbeddedStore(None)
    await store.open()
    writing = asyncio.create_task(store.txn([Set("a", b"1")]))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await store.txn([Set("b", b"1")])
    assert await value_of(store, "b") == b"1"
    await store.close()
