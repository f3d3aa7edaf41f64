"""One lock per name, held by one or shared by several, kept only while somebody holds it or waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager


class _Lock:
    """Whoever wants it passes ``gate``; a holder stays there, which keeps later sharers out until it is done."""

    __slots__ = ("alone", "gate", "sharers", "users")

    def __init__(self) -> None:
        self.gate = asyncio.Lock()
        self.alone = asyncio.Event()
        self.sharers = 0
        self.users = 0


class KeyedLocks:
    """Serialises what concerns one name and lets everything else run. Not reentrant. Who waits is served in turn, so a
    stream of sharers cannot keep a holder waiting."""

    def __init__(self) -> None:
        self._locks: dict[str, _Lock] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Nobody else has ``name`` during the block."""
        with self._used(name) as lock:
            async with lock.gate:
                while lock.sharers:
                    lock.alone.clear()
                    await lock.alone.wait()
                yield

    @asynccontextmanager
    async def hold_all(self, names: Iterable[str]) -> AsyncIterator[None]:
        """:meth:`hold` each of ``names``, taken in their order, so that two who want the same never wait for each
        other."""
        async with AsyncExitStack() as held:
            for name in sorted(names):
                await held.enter_async_context(self.hold(name))
            yield

    def share(self, name: str) -> AbstractAsyncContextManager[None]:
        """Nobody holds ``name`` during the block; others may share it."""
        return _Shared(self, name)

    @contextmanager
    def _used(self, name: str) -> Iterator[_Lock]:
        lock = self.enter(name)
        try:
            yield lock
        finally:
            self.leave(name, lock)

    def enter(self, name: str) -> _Lock:
        """The lock of ``name``, which stays until as many have left as entered."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = _Lock()
        lock.users += 1
        return lock

    def leave(self, name: str, lock: _Lock) -> None:
        """One user less."""
        lock.users -= 1
        if not lock.users:
            del self._locks[name]


class _Shared:
    """One block of :meth:`KeyedLocks.share`. A class: every new token has one, and three generators cost more than what
    they guard."""

    __slots__ = ("_lock", "_locks", "_name")

    def __init__(self, locks: KeyedLocks, name: str) -> None:
        self._locks = locks
        self._name = name

    async def __aenter__(self) -> None:
        self._lock = lock = self._locks.enter(self._name)
        try:
            async with lock.gate:
                lock.sharers += 1
        except BaseException:
            self._locks.leave(self._name, lock)
            raise

    async def __aexit__(self, *_: object) -> None:
        lock = self._lock
        lock.sharers -= 1
        if not lock.sharers:
            lock.alone.set()
        self._locks.leave(self._name, lock)
