"""A bounded queue between the task that reads a connection and the one that acts on it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Items with sizes. :meth:`put` waits while ``bytes_max`` are held; a single larger item passes alone. After
    :meth:`fail`, :meth:`get` first hands out what is held, then raises the failure."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._failure: Exception | None = None
        self._changed = asyncio.Event()

    @property
    def held_bytes(self) -> int:
        """Bytes of the items that wait."""
        return self._bytes

    async def put(self, item: T, item_bytes: int) -> None:
        """Add an item, once there is room."""
        while self._items and self._bytes + item_bytes > self._bytes_max:
            await self._wait()
        self._items.append((item, item_bytes))
        self._bytes += item_bytes
        self._changed.set()

    def fail(self, failure: Exception) -> None:
        """No item follows; the first failure counts."""
        self._failure = self._failure or failure
        self._changed.set()

    async def get(self) -> T:
        """The next item. Raises what :meth:`fail` was given, after the last one."""
        while not self._items:
            if self._failure is not None:
                raise self._failure
            await self._wait()
        return self._pop()

    def next_is(self, kind: type[T] | tuple[type[T], ...]) -> bool:
        """Whether an item waits and is of that kind."""
        return bool(self._items) and isinstance(self._items[0][0], kind)

    def _pop(self) -> T:
        item, item_bytes = self._items.popleft()
        self._bytes -= item_bytes
        self._changed.set()
        return item

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()
