"""One lock per key, for read-modify-write of single entries on the active node."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager


class KeyedLock:
    """Locks made on first use and forgotten with the last holder or waiter, so memory follows the keys in use.

    ``async with locks.hold("a/b"):`` waits for that key only. Not re-entrant: a holder that asks again waits for ever.
    """

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    def __len__(self) -> int:
        """How many keys are held or waited for."""
        return len(self._locks)

    def hold(self, key: str) -> AbstractAsyncContextManager[None]:
        """Hold ``key`` for the block; cancelled while waiting, nothing is held."""
        return _Held(self._locks, key)


class _Held:
    """One block. A class: most writes have such a block, and as a generator it costs three times as much."""

    __slots__ = ("_key", "_lock", "_locks")

    def __init__(self, locks: dict[str, tuple[asyncio.Lock, int]], key: str) -> None:
        self._locks = locks
        self._key = key

    async def __aenter__(self) -> None:
        self._lock, users = self._locks.get(self._key) or (asyncio.Lock(), 0)
        self._locks[self._key] = (self._lock, users + 1)
        try:
            await self._lock.acquire()
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
        self._leave()

    def _leave(self) -> None:
        users = self._locks[self._key][1] - 1
        if users:
            self._locks[self._key] = (self._lock, users)
        else:
            del self._locks[self._key]
