"""``sys/pprof/*`` as answers: of the active node to who may ask, and of any node on a listener that is open to all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from plugin_api.errors import InvalidRequest, NotFound, Unavailable
from sidecar.api import profiles

PROFILE_S_MAX = 60
"""Below the time that a request may take."""
PROFILE_S = 30
TEXT_TYPE = "text/plain; charset=utf-8"
INDEX = """goroutine     stacks of every task and thread
threadcreate  stacks of every thread
profile       where the processor's time goes, sampled for ?seconds=30, as folded stacks
heap, allocs  memory by line of code; needs a process started with PYTHONTRACEMALLOC=1
"""
TEXTS: Mapping[str, Callable[[], str]] = {
    "": lambda: INDEX,
    "goroutine": profiles.stacks,
    "threadcreate": profiles.thread_stacks,
}
MEMORY = ("heap", "allocs")
PROFILE = "profile"


class Profiler:
    """Makes them; one profile at a time."""

    def __init__(self) -> None:
        self._busy = False

    async def text(self, name: str, seconds: float = PROFILE_S) -> str:
        """What is below ``sys/pprof/`` under ``name``. Raises NotFound, InvalidRequest, and Unavailable while somebody
        else has a profile taken."""
        if name in TEXTS:
            return TEXTS[name]()
        if name in MEMORY:
            return await _memory()
        if name != PROFILE:
            raise NotFound
        if not 1 <= seconds <= PROFILE_S_MAX:
            raise InvalidRequest(f"seconds must be between 1 and {PROFILE_S_MAX}")
        if self._busy:
            raise Unavailable("a profile is being taken already; try again later")
        self._busy = True
        try:
            return await asyncio.to_thread(profiles.sample, seconds)
        finally:
            self._busy = False


async def _memory() -> str:
    try:
        return await asyncio.to_thread(profiles.heap)
    except LookupError:
        raise InvalidRequest(
            "memory is not traced: start the server with PYTHONTRACEMALLOC=1 in its environment, which costs speed"
        ) from None
