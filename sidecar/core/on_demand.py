"""Work in the background that somebody asks for: one pass at a time, and whoever asks meanwhile is told so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class OnDemand:
    """``work`` does one pass and handles its own errors."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._asked, self._done = asyncio.Event(), asyncio.Event()
        self._done.set()

    def ask(self) -> bool:
        """Have :meth:`run` do a pass soon. False where one is asked for or under way."""
        if self._asked.is_set():
            return False
        self._done.clear()
        self._asked.set()
        return True

    async def done(self) -> None:
        """Return once no pass is asked for or under way."""
        await self._done.wait()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._asked.wait()
            try:
                await self._work()
            finally:
                self._asked.clear()
                self._done.set()
