"""Threads that put load on a cluster until they are told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Self

from tests.support.cluster import ClusterError


class LoadThreads:
    """Runs each of ``work`` in a thread from entering to :meth:`finish`; they look at :attr:`stopped`."""

    def __init__(self, work: Sequence[Callable[[], None]]) -> None:
        self.stopped = threading.Event()
        self._threads = [threading.Thread(target=one, daemon=True) for one in work]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Stop after the requests in flight. Raises ClusterError if one never ends (P14)."""
        self.stopped.set()
        for thread in self._threads:
            thread.join(180)
            if thread.is_alive():
                raise ClusterError("a request was neither answered nor refused within 180 s")
