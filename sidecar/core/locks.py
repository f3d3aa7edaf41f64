"""One lock per name, held by one or shared by several, kept only while somebody holds it or waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


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
    async def share(self, name: str) -> AsyncIterator[None]:
        """Nobody holds ``name`` during the block; others may share it."""
        with self._used(name) as lock:
            async with lock.gate:
                lock.sharers += 1
            try:
                yield
            finally:
                lock.sharers -= 1
                if not lock.sharers:
                    lock.alone.set()

    @contextmanager
    def _used(self, name: str) -> Iterator[_Lock]:
        lock = self._locks.setdefault(name, _Lock())
        lock.users += 1
        try:
            yield lock
        finally:
            lock.users -= 1
            if not lock.users:
                del self._locks[name]
