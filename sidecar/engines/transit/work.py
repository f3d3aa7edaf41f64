"""Where cryptography runs: small and fast things here and now, everything else in threads, a bounded number at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

INLINE_BYTES_MAX = 64 * 1024
"""Input that is handled in the event loop in one go: AES-GCM, base64 and HMAC together take less than 1 ms."""

ITEMS_PER_TURN = 100
"""Items of a batch between two turns of the event loop: 2 ms in it, or up to 500 ms of RSA in a thread."""

THREADS_AT_ONCE_MAX = 3
"""Of the threads that all of the server shares, six on two processors."""

GENERATING_AT_ONCE_MAX = 1
"""RSA keys generated at the same time on one mount; each takes up to some seconds of a processor."""

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """The threads that one mount may use. A request that is cancelled leaves at most one turn running."""

    def __init__(self) -> None:
        self._threads = asyncio.Semaphore(THREADS_AT_ONCE_MAX)
        self._generating = asyncio.Semaphore(GENERATING_AT_ONCE_MAX)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``function`` in a thread."""
        async with self._threads:
            return await asyncio.to_thread(function, *args, **kwargs)

    async def generate(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """:meth:`run` for what may take seconds."""
        async with self._generating:
            return await asyncio.to_thread(function, *args, **kwargs)

    async def map(
        self, function: Callable[[T], R], items: Sequence[T], *, slow: bool, size: Callable[[T], int]
    ) -> list[R]:
        """``function`` of every item, in order. ``slow`` or large ones (``size`` in bytes) go to a thread."""
        results: list[R] = []
        for turn, in_thread in _turns(items, slow=slow, size=size):
            if in_thread:
                results += await self.run(_each, function, turn)
            else:
                results += _each(function, turn)
            if len(results) < len(items):
                await asyncio.sleep(0)
        return results


def _each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]


def _turns(items: Sequence[T], *, slow: bool, size: Callable[[T], int]) -> Iterator[tuple[list[T], bool]]:
    turn: list[T] = []
    total = 0
    for item in items:
        length = size(item)
        if turn and (len(turn) == ITEMS_PER_TURN or total + length > INLINE_BYTES_MAX):
            yield turn, slow or total > INLINE_BYTES_MAX
            turn, total = [], 0
        turn.append(item)
        total += length
    if turn:
        yield turn, slow or total > INLINE_BYTES_MAX
