"""Thousands of random operations, played on every store at once: each must answer as real Consul does.

The list of operations is drawn beforehand from one seed and names its indexes and sessions, because every store has its
own numbers for them. Indexes are compared by equality and by order, and failed transactions by which operations failed.
``CONFORMANCE_OPS`` sets how many, ``CONFORMANCE_SEED`` which; a difference is reported with all that led to it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from consul_backend.clock import SystemClock
from consul_backend.embedded import EmbeddedStore
from consul_backend.errors import BackendError, Conflict
from consul_backend.physical import SENTINEL_KEY, Item, PhysicalStore
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

OPERATIONS = int(os.environ.get("CONFORMANCE_OPS", "3000"))
SEED = int(os.environ.get("CONFORMANCE_SEED", "1"))
BEAT_TTL_S = 60.0
NAMES_MAX = 4
BEAT_EVERY = 500
"""Operations between two beats: no session may end by itself meanwhile."""
LOCK_DELAY_S = 60.0
"""Consul's longest. A delay that ends during the run would be a race; this one does not unless the run is long."""
SESSIONS_MAX = 6
SHOWN = 12

KEYS = ("a", "ab", "a/b", "a/b/c", "a/b-c", "a/bc/d", "A/b", "b/1", "b/2", "b/10", "b_", "c/d/e/f")
LOCKS = tuple(f"lock/{number}" for number in range(40))
PREFIXES = ("a", "a/", "a/b", "a/b/", "b/", "b/1", "c", "lock/1", "nothing/")
FOLDERS = ("", "a/", "a/b/", "b/", "c/", "c/d/", "lock/", "nothing/")
VALUES = (b"", b"1", b"2", b"\x00\xff", b"a longer value")

Step = tuple[str, tuple[Any, ...]]
"""A call by name. Operations of a transaction are tuples as well: the verb, and symbols for indexes and sessions."""


def make_steps(seed: int, count: int) -> list[Step]:
    """The calls, without any number that only one store knows."""
    rnd = random.Random(f"conformance {seed}")
    sessions = 0
    steps: list[Step] = []
    for number in range(count):
        if number % BEAT_EVERY == 0:
            steps.append(("beat", ()))
        draw = rnd.random()
        if sessions < 2 or draw < 0.02:
            steps.append(("create_session", (sessions, rnd.choice((0.0, 0.0, LOCK_DELAY_S)))))
            sessions += 1
        elif draw < 0.04:
            steps.append(("destroy_session", (_session(rnd, sessions),)))
        elif draw < 0.06:
            steps.append(("renew_session", (_session(rnd, sessions),)))
        elif draw < 0.14:
            steps.append(("get_many", (tuple(_key(rnd) for _ in range(rnd.randint(1, 6))), rnd.random() < 0.5)))
        elif draw < 0.22:
            steps.append(("list", (rnd.choice(FOLDERS), rnd.random() < 0.5)))
        elif draw < 0.25:
            steps.append(("watch", (_key(rnd), rnd.choice(("none", "older")))))
        elif draw < 0.28:
            steps.append(("wait", (_key(rnd), tuple(_op(rnd, sessions) for _ in range(rnd.randint(1, 3))))))
        else:
            size = rnd.choice((1, 1, 2, 3, 5, 9))
            steps.append(("txn", tuple(_op(rnd, sessions) for _ in range(size))))
    return steps


def _key(rnd: random.Random) -> str:
    return rnd.choice(KEYS if rnd.random() < 0.75 else LOCKS)


def _session(rnd: random.Random, made: int) -> int:
    """Mostly one of the newest, which may be alive."""
    return rnd.randrange(max(0, made - SESSIONS_MAX) if rnd.random() < 0.9 else 0, made)


def _op(rnd: random.Random, sessions: int) -> tuple[Any, ...]:
    verb = rnd.choices(
        ("set", "cas", "get", "delete", "tree", "lock", "unlock", "index", "session", "absent"),
        (24, 12, 10, 10, 2, 12, 6, 10, 8, 6),
    )[0]
    value = rnd.choice(VALUES)
    match verb:
        case "set":
            return verb, _key(rnd), value
        case "cas":
            return verb, _key(rnd), value, rnd.choices(("now", "zero", "older", "other"), (6, 3, 1, 1))[0]
        case "get" | "delete" | "absent":
            return verb, _key(rnd)
        case "tree":
            return verb, rnd.choice(PREFIXES)
        case "lock" | "unlock":
            return verb, rnd.choice(LOCKS), value, _session(rnd, sessions)
        case "session":
            return verb, rnd.choice(LOCKS), _session(rnd, sessions)
        case _:
            return verb, _key(rnd), rnd.choices(("now", "older", "other"), (8, 1, 1))[0]


@dataclass
class Player:
    """One store, and what it calls the things that the steps name. ``seen`` is every index it has shown, in order of
    showing; equal indexes are one."""

    name: str
    store: PhysicalStore
    sessions: list[str] = field(default_factory=list)
    seen: dict[int, int] = field(default_factory=dict)
    history: dict[str, list[int]] = field(default_factory=dict)

    async def play(self, step: Step) -> object:
        """One call; its answer with this store's numbers taken out."""
        name, arguments = step
        try:
            return await getattr(self, f"_{name}")(*arguments)
        except Conflict as refusal:
            return "refused", tuple(failure.op_index for failure in refusal.failures)
        except BackendError as error:
            return type(error).__name__, str(error)

    def order(self) -> list[int]:
        """The labels of all indexes seen, by index: equal for stores that number their changes alike."""
        return [self.seen[index] for index in sorted(self.seen)]

    async def _beat(self) -> object:
        return await self.store.beat()

    async def _create_session(self, number: int, lock_delay_s: float) -> object:
        assert number == len(self.sessions)
        self.sessions.append(
            await self.store.create_session("conformance", beat_ttl_s=BEAT_TTL_S, lock_delay_s=lock_delay_s)
        )
        return None

    async def _destroy_session(self, number: int) -> object:
        return await self.store.destroy_session(self.sessions[number])

    async def _renew_session(self, number: int) -> object:
        return await self.store.renew_session(self.sessions[number])

    async def _get_many(self, keys: Sequence[str], consistent: bool) -> object:
        return [self._plain(item) for item in await self.store.get_many(keys, consistent=consistent)]

    async def _list(self, prefix: str, consistent: bool) -> object:
        level = await self.store.list(prefix, consistent=consistent)
        return level, await self.store.names_below(prefix, NAMES_MAX, consistent=consistent)

    async def _watch(self, key: str, which: str) -> object:
        """A blocking query that has its answer already."""
        item, index = await self.store.watch(key, 0, 10.0)
        if which == "older" and item is not None and index > 1:
            item, index = await self.store.watch(key, index - 1, 10.0)
        return self._plain(item), index == item.modify_index if item is not None else index > 0

    async def _wait(self, key: str, ops: Sequence[tuple[Any, ...]]) -> object:
        """A blocking query that begins before a transaction. It must see it, if that changes its key."""
        before, index = await self.store.watch(key, 0, 10.0)
        waiting = asyncio.create_task(self.store.watch(key, index, 10.0))
        try:
            result = await self.play(("txn", tuple(ops)))
            now = await self.store.get(key, consistent=True)
            if now == before:
                return result, "unchanged"
            item, _ = await waiting
            while item != now:
                item, index = await self.store.watch(key, index, 10.0)
            return result, self._plain(item)
        finally:
            waiting.cancel()
            await asyncio.wait([waiting])

    async def _txn(self, *ops: tuple[Any, ...]) -> object:
        concrete = [await self._concrete(op) for op in ops]
        result = await self.store.txn(concrete)
        return self._label(result.modify_index), [self._plain(item) for item in result.items]

    async def _concrete(self, op: tuple[Any, ...]) -> Op:
        verb, key, *rest = op
        match verb:
            case "set":
                return Set(key, rest[0])
            case "cas":
                return Cas(key, rest[0], await self._index(key, rest[1]))
            case "get":
                return Get(key)
            case "delete":
                return Delete(key)
            case "tree":
                return DeleteTree(key)
            case "lock":
                return Lock(key, rest[0], self.sessions[rest[1]])
            case "unlock":
                return Unlock(key, rest[0], self.sessions[rest[1]])
            case "index":
                return CheckIndex(key, await self._index(key, rest[0]))
            case "session":
                return CheckSession(key, self.sessions[rest[0]])
            case _:
                return CheckNotExists(key)

    async def _index(self, key: str, which: str) -> int:
        """The key's index now, one it had before, one of another key, or 0."""
        if which == "zero":
            return 0
        item = await self.store.get(key, consistent=True)
        self._plain(item)
        if which == "now":
            return item.modify_index if item is not None else 0
        found = self.history.get(key if which == "older" else KEYS[0], [])
        return found[-2] if len(found) > 1 else 1

    def _plain(self, item: Item | None) -> object:
        if item is None:
            return None
        history = self.history.setdefault(item.key, [])
        if not history or history[-1] != item.modify_index:
            history.append(item.modify_index)
        holder = self.sessions.index(item.session) if item.session else None
        return item.key, item.value, self._label(item.modify_index), holder

    def _label(self, index: int) -> int:
        """Number of the index by when it was first shown; 0 for none."""
        return self.seen.setdefault(index, len(self.seen) + 1) if index else 0


@pytest.fixture
async def players(consul_store_factory: Callable[..., Any], tmp_path: Path) -> AsyncIterator[list[Player]]:
    consul = SimulatedConsul(SystemClock())
    stores: dict[str, PhysicalStore] = {
        "consul": await consul_store_factory(),
        "simulated": consul.client("node"),
        "inmem": EmbeddedStore(None),
        "embedded": EmbeddedStore(str(tmp_path / "store")),
    }
    for store in stores.values():
        await store.open()
        await store.txn([Set(SENTINEL_KEY, b"here")])
    yield [Player(name, store) for name, store in stores.items()]
    for name, store in stores.items():
        if name != "consul":
            await store.close()
    consul.close()


@pytest.mark.timeout(600)
async def test_every_store_answers_as_consul_does(players: list[Player]) -> None:
    steps = make_steps(SEED, OPERATIONS)
    answers: dict[str, int] = {}
    for number, step in enumerate(steps):
        expected, *others = await asyncio.gather(*(player.play(step) for player in players))
        for player, answer in zip(players[1:], others, strict=True):
            if answer != expected or (number % 50 == 0 and player.order() != players[0].order()):
                before = "\n".join(f"  {it}" for it in steps[max(0, number - SHOWN) : number])
                pytest.fail(
                    f"seed {SEED}, step {number}: {step}\n consul answers {expected}\n {player.name} answers {answer}\n"
                    f" same order of indexes: {player.order() == players[0].order()}\n after\n{before}"
                )
        kind = "refused" if isinstance(expected, tuple) and expected and expected[0] == "refused" else "done"
        answers[f"{step[0]} {kind}"] = answers.get(f"{step[0]} {kind}", 0) + 1
    for player in players[1:]:
        assert player.order() == players[0].order()
    if OPERATIONS >= 1000:
        assert answers["txn refused"] > 0.1 * OPERATIONS
        assert answers["txn done"] > 0.2 * OPERATIONS
        assert set(answers) >= {
            "list done",
            "get_many done",
            "watch done",
            "wait done",
            "wait refused",
            "create_session done",
            "destroy_session done",
            "renew_session done",
        } - {"wait refused"}
