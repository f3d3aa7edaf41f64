"""What a merkle sync has fetched and not yet committed: within the staging bound, or one commit's worth of a mix.

Deletions that the comparison derives are held until the end of the sync, apart from the rest: only then it is known
which of them somebody made in the log meanwhile, and whether the others are too many to be made unasked
(:mod:`sidecar.replication.brake`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from consul_backend.errors import TooLarge
from consul_backend.failpoint import failpoint
from consul_backend.position import Position
from consul_backend.wal import Write
from sidecar.replication.brake import COUNTED_CLASS, Brake
from sidecar.replication.committer import commit, positions_at, stored_position
from sidecar.replication.diff import PIECE_ENTRIES
from sidecar.replication.filling import SyncProgress
from sidecar.replication.intake import Budget, split_writes
from sidecar.replication.modes import Mode
from sidecar.replication.protocol import NONE_POSITION, is_none
from sidecar.replication.store_view import SecondaryStore

FLYING_MAX = 4
"""Commits of a mix that are under way at once; the store makes one transaction at a time of them."""


@dataclass(frozen=True, slots=True)
class Staging:
    """What a sync holds in memory at most, to commit it as one: entries, and bytes of their keys and values."""

    entries_max: int = 200_000
    bytes_max: int = 64 * 1024 * 1024


class Stage:
    """One sync's. ``brake`` judges what is deleted, ``progress`` is told with a closed gate. Once the brake is on,
    nothing is staged or committed any more; what was, stays. However it ends, :meth:`abandon` it."""

    def __init__(
        self,
        mode: Mode,
        store: SecondaryStore,
        budget: Budget,
        bounds: Staging,
        on_applied: Callable[[Sequence[str]], Awaitable[None]],
        gate: Callable[[SyncProgress | None], None],
        progress: Callable[[], SyncProgress],
        brake: Brake,
    ) -> None:
        self._mode = mode
        self._keyrings = mode.keyrings
        self._store = store
        self._budget = budget
        self._bounds = bounds
        self._on_applied = on_applied
        self._gate = gate
        self._progress = progress
        self._brake = brake
        self._held: dict[str, None] = {}
        self._pending: dict[str, Write] = {}
        self._pending_bytes = 0
        self._mixed = is_none(stored_position(store, mode))
        self._flying: deque[tuple[asyncio.Task[None], list[str]]] = deque()
        self._in_flight: set[str] = set()
        self.keys = 0

    def is_whole(self) -> bool:
        """Whether nothing of it was committed yet: the data is one whole prefix still."""
        return not self._mixed

    def holds(self, key: str) -> bool:
        """Whether a write of the key is staged, or not applied yet."""
        return key in self._pending or key in self._in_flight

    async def add(self, writes: Sequence[Write]) -> None:
        """Stage writes; commits what no longer fits. The keyring is committed, and loaded, before what follows it."""
        if self._brake.on:
            return
        for write in writes:
            self._held.pop(write.key, None)
            if write.key in self._keyrings and not self._mixed:
                await self._commit_keyring(write)
                continue
            cost = self._cost(write)
            known = write.key in self._pending
            if self._pending and self._is_full(len(self._pending) + (not known), self._pending_bytes + cost):
                await self._spill()
                cost = self._cost(write)
            self._pending.pop(write.key, None)
            self._pending[write.key] = write
            self._pending_bytes += cost
            if write.key in self._keyrings:
                await self.flush()

    async def drop(self, keys: Collection[str]) -> None:
        """The comparison found no such entries on the primary. See :class:`~sidecar.replication.brake.Brake`."""
        if not self._brake.holds:
            self._brake.count(sum([_is_counted(key) for key in keys]))
            await self.add([Write(key, None) for key in keys])
            return
        if not self._brake.on:
            self._held |= dict.fromkeys([key for key in keys if _is_counted(key)])
            if len(self._held) > self._bounds.entries_max and self._brake.forbids(len(self._held)):
                self._count_held()
            await self.add([Write(key, None) for key in keys if not _is_counted(key)])
        else:
            self._brake.count(sum([_is_counted(key) for key in keys]))

    async def settle(self) -> None:
        """Everything was received: what is held still, because no record since the base wrote it, goes with the rest or
        after it, unless it is too much."""
        held = list(self._held)
        self._count_held()
        for start in range(0, len(held), PIECE_ENTRIES):
            await self.add([Write(key, None) for key in held[start : start + PIECE_ENTRIES]])
            await asyncio.sleep(0)

    def _count_held(self) -> None:
        self._brake.count(len(self._held))
        self._held.clear()
        if self._brake.on:
            self._pending.clear()
            self._pending_bytes = 0

    def _cost(self, write: Write) -> int:
        if self._mixed:
            return self._budget.cost_bytes(write)
        return len(write.key) + (len(write.value) if write.value is not None else 0)

    def _is_full(self, count: int, size_bytes: int) -> bool:
        if self._mixed:
            return count > self._budget.writes_max or size_bytes > self._budget.bytes_max
        return count > self._bounds.entries_max or size_bytes > self._bounds.bytes_max

    async def _commit_keyring(self, write: Write) -> None:
        """A newer keyring holds every older key, so it can go before everything else and nobody reads a mix."""
        stored = stored_position(self._store, self._mode)
        if stored is None:
            raise AssertionError("data without a position is a mix")
        await commit(self._store, [write], positions_at(self._mode, stored))
        self.keys += 1
        await self._on_applied([write.key])

    async def flush(self) -> None:
        """Commit what is staged, and with it that the data is a mix from here on; all of it has landed then."""
        await self._spill()
        while self._flying:
            await self._land()

    async def _spill(self) -> None:
        """Send what is staged on its way. Some commits are under way at once, of different keys: the store is never
        without one while the next arrives."""
        if not self._pending and self._mixed:
            return
        self._mixed = True
        self._gate(self._progress())
        for piece in split_writes(self._taken(), self._budget):
            keys = [write.key for write in piece]
            while len(self._flying) >= FLYING_MAX or (self._flying and not self._in_flight.isdisjoint(keys)):
                await self._land()
            self._in_flight.update(keys)
            self._flying.append((asyncio.create_task(self._commit_of_a_mix(piece)), keys))

    async def _land(self) -> None:
        """Wait for the commit that is longest under way."""
        task, keys = self._flying[0]
        await task
        self._flying.popleft()
        self._in_flight.difference_update(keys)
        self.keys += len(keys)
        if keys:
            await self._on_applied(keys)
        failpoint("sync:half-way")

    async def abandon(self) -> None:
        """Nothing more is added: leave no commit behind that somebody does not know of."""
        tasks = [task for task, _ in self._flying]
        self._flying.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self, position: Position, source_positions: Mapping[str, Position]) -> None:
        """Commit what is staged together with the position, and open the gate."""
        if self._pending or stored_position(self._store, self._mode) != position:
            failpoint("sync:before-guard")
            await self._commit_whole(position, source_positions)
            failpoint("sync:after-guard")
        self._mixed = False
        self._gate(None)

    def _taken(self) -> list[Write]:
        writes = list(self._pending.values())
        self._pending.clear()
        self._pending_bytes = 0
        return writes

    async def _commit_of_a_mix(self, piece: list[Write]) -> None:
        try:
            await commit(self._store, piece, positions_at(self._mode, NONE_POSITION))
        except TooLarge:
            if len(piece) <= 1:
                raise
            await self._commit_of_a_mix(piece[: len(piece) // 2])
            await self._commit_of_a_mix(piece[len(piece) // 2 :])

    async def _commit_whole(self, position: Position, source_positions: Mapping[str, Position]) -> None:
        """What is staged and the position in one commit; where not even that fits, in parts, the position last."""
        writes = self._taken()
        try:
            await commit(self._store, writes, positions_at(self._mode, position, source_positions))
        except TooLarge:
            if len(writes) <= 1:
                raise
            # Its own store has smaller bounds than this.
            self._pending = {write.key: write for write in writes[:-1]}
            await self.flush()
            last = writes[-1:]
            await commit(self._store, last, positions_at(self._mode, position, source_positions))
            writes = last
        self.keys += len(writes)
        if writes:
            await self._on_applied([write.key for write in writes])


def _is_counted(key: str) -> bool:
    return key.startswith(f"{COUNTED_CLASS}/")
