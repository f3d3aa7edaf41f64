"""Between a node's service and its store: what only replication may write is refused here, whoever asks.

Above this, each part asks whether it may write and answers its client accordingly; this is what holds when one of them
forgets, and what tells a demotion that nothing which was let in earlier is still on its way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from consul_backend.errors import NotApplied
from consul_backend.wal import Write
from plugin_api.errors import ReadOnlyStorage
from sidecar.core.store_view import CommitHead, LogicalStore

NOT_NOW = (
    "this cluster may not write that now: it is a DR secondary, its replication role is being changed, or it is stopped"
)


class WriteGate:
    """Which classes are closed, and how many commits are under way."""

    def __init__(self) -> None:
        self._closed: frozenset[str] = frozenset()
        self._under_way = 0
        self._none = asyncio.Event()
        self._none.set()

    def restrict(self, classes: Collection[str]) -> None:
        """From now on nobody but replication commits entries of exactly these classes."""
        self._closed = frozenset(classes)

    async def settled(self) -> None:
        """Wait until no commit that was let in before is still under way."""
        await self._none.wait()

    def check(self, writes: Sequence[Write]) -> None:
        """Raises ReadOnlyStorage on a performance secondary, whose primary could write it; else NotApplied."""
        classes = {write.key.split("/", 1)[0] for write in writes} & self._closed
        if not classes:
            return
        raise ReadOnlyStorage if self._closed == {"r"} else NotApplied(NOT_NOW)

    def enter(self) -> None:
        """A commit that was checked begins."""
        self._under_way += 1
        self._none.clear()

    def leave(self) -> None:
        """It ended, however."""
        self._under_way -= 1
        if self._under_way == 0:
            self._none.set()


class GatedStore:
    """A logical store whose commits pass ``gate``."""

    def __init__(self, store: LogicalStore, gate: WriteGate) -> None:
        self._store = store
        self._gate = gate

    async def get(self, key: str) -> bytes | None:
        """As of the store below."""
        return await self._store.get(key)

    async def exists(self, key: str) -> bool:
        """As of the store below."""
        return await self._store.exists(key)

    async def list(self, prefix: str) -> list[str]:
        """As of the store below."""
        return await self._store.list(prefix)

    async def commit(self, writes: Sequence[Write]) -> CommitHead:
        """As of the store below, if the gate lets it through. Raises ReadOnlyStorage, NotApplied."""
        self._gate.check(writes)
        self._gate.enter()
        try:
            return await self._store.commit(writes)
        finally:
            self._gate.leave()
