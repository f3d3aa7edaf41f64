"""Deadlines for a slow client that count only time in which the loop could have read from it.

A deadline by the clock judges the wrong party when the loop itself was held up: after twelve seconds in one function
every connection whose deadline is ten has passed it, and the healthiest client is cut off. Here a deadline is counted
in slices. A slice that ends late counts as one slice, however late it is, so a stretch in which the loop ran nothing
costs a client at most one of them (two, with the one it began in), and what has arrived meanwhile is read before the
next one ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

SLICES = 10


class Patience:
    """Calls ``act`` once after ``budget_s`` seconds of a loop that turns; :meth:`cancel` when there is no more need."""

    __slots__ = ("_act", "_handle", "_left", "_loop", "_slice_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, budget_s: float, act: Callable[[], None]) -> None:
        self._loop = loop
        self._act = act
        self._left = SLICES
        self._slice_s = budget_s / SLICES
        self._handle = loop.call_later(self._slice_s, self._tick)

    def cancel(self) -> None:
        """Forget it."""
        self._handle.cancel()

    def _tick(self) -> None:
        self._left -= 1
        if self._left > 0:
            self._handle = self._loop.call_later(self._slice_s, self._tick)
        else:
            self._act()


@asynccontextmanager
async def patience(budget_s: float) -> AsyncIterator[None]:
    """Give the block ``budget_s`` seconds of a loop that turns, 0 for as long as it likes. Raises TimeoutError."""
    async with asyncio.timeout(None) as limit:
        if not budget_s:
            yield
            return
        loop = asyncio.get_running_loop()
        timer = Patience(loop, budget_s, lambda: limit.reschedule(loop.time()))
        try:
            yield
        finally:
            timer.cancel()
