"""How long one turn holds up the event loop, in CPU time: other processes on the machine do not count."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """``longest_s`` is the CPU time of the longest turn so far."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.stopped = False

    async def watch(self) -> None:
        before = time.thread_time()
        while not self.stopped:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest_s = max(self.longest_s, now - before)
            before = now


@asynccontextmanager
async def watched_turns() -> AsyncIterator[Turns]:
    """Measure every turn within the block. The garbage collector rests: its pauses grow with what other tests left."""
    turns = Turns()
    gc.collect()
    gc.disable()
    watching = asyncio.create_task(turns.watch())
    try:
        yield turns
    finally:
        gc.enable()
        turns.stopped = True
        await watching
