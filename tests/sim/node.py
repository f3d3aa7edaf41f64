"""One node: the real election and the real replicated store, put together as ``sidecar/roles.py`` does it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from consul_backend.election import Election, ElectionOptions, Held, LeaderInfo
from consul_backend.errors import (
    BackendError,
    Conflict,
    Corrupt,
    FenceLost,
    ForeignWrite,
    NotApplied,
    OutcomeUnknown,
    Overloaded,
    PermissionDenied,
    SentinelMissing,
    StoreWentBack,
    TooLarge,
    Unavailable,
)
from consul_backend.index_check import Progress
from consul_backend.reindex import ReindexOptions, ReindexReport, reindex
from consul_backend.replicated import ReplicatedStore, StoreOptions, Write
from consul_backend.testing import SimulatedStore
from consul_backend.wal import Record
from consul_backend.wal_reader import RecordGone
from tests.sim.loop import NodeClock, Process
from tests.sim.witness import Violation

HALTING = (SentinelMissing, StoreWentBack, Corrupt, PermissionDenied)
ENDING = (FenceLost, OutcomeUnknown, Unavailable, NotApplied, Conflict)

FOLLOWED = 5
"""Records that are read from the log at once."""

DRAIN_S = 1.0
DRAIN_ROUNDS = 20


class World(Protocol):
    """What a node tells the world."""

    def report(self, violation: Violation) -> None: ...

    def log(self, text: str) -> None: ...

    def recovered(self, node: Node, store: ReplicatedStore) -> None: ...

    def halted(self, node: Node, error: BaseException) -> None: ...

    def reindexed(self, node: Node, report: ReindexReport) -> None: ...

    def foreign(self, node: Node, key: str, error: ForeignWrite) -> None: ...


class Reply:
    """What a client is told: ``outcome`` is ok, fail, unknown, standby, foreign, gone or error."""

    __slots__ = ("index", "names", "outcome", "records", "value")

    def __init__(
        self,
        outcome: str,
        *,
        index: int = 0,
        value: bytes | None = None,
        names: Sequence[str] = (),
        records: Sequence[Record] = (),
    ) -> None:
        self.records = records
        self.outcome = outcome
        self.index = index
        self.value = value
        self.names = names


class Node:
    """One process of a node. ``name`` is the node's, ``process.name`` this process's own."""

    def __init__(
        self,
        world: World,
        name: str,
        process: Process,
        physical: SimulatedStore,
        clock: NodeClock,
        *,
        generation: str,
        election: ElectionOptions,
        store: StoreOptions,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self.name = name
        self.process = process
        self.physical = physical
        self.clock = clock
        self.store: ReplicatedStore | None = None
        self.tenures = 0
        self.halted = False
        self._world = world
        self._generation = generation
        self._election_options = election
        self._store_options = store
        self._random_bytes = random_bytes
        self._asked = asyncio.Event()
        self._running = 0
        self._seen_index = 0

    @property
    def knows(self) -> int:
        """The newest record that this process knows to have been committed."""
        return max(self._seen_index, self.store.head.index if self.store is not None else 0)

    def start(self) -> asyncio.Task[None]:
        """Begin, in this node's process."""
        return self.process.spawn(self._run())

    def step_down(self) -> None:
        """An operator asks for it."""
        self._asked.set()

    async def _run(self) -> None:
        try:
            await self._open()
            election = Election(
                self.physical,
                node_id=self.name,
                advertise=lambda: LeaderInfo(self.name, "", ""),
                clock=self.clock,
                options=self._election_options,
            )
            while True:
                held = await election.campaign()
                self.tenures += 1
                self._world.log(f"{self.process.name} leads, epoch {held.tenure.epoch}")
                await self._lead(election, held)
        except HALTING as error:
            self.halted = True
            self._world.halted(self, error)
        except Exception as error:  # whatever it is, production code let it out
            self.halted = True
            self._world.report(Violation("crash", f"{self.process.name} crashed: {error!r}"))

    async def _open(self) -> None:
        while True:
            try:
                await self.physical.open()
            except Unavailable:
                await self.physical.close()
                await asyncio.sleep(0.2)
            else:
                return

    async def _lead(self, election: Election, held: Held) -> None:
        self._asked.clear()
        lost: BaseExceptionGroup | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                keeping = tasks.create_task(election.keep(held), name="keep")
                store = await ReplicatedStore.recover(
                    self.physical,
                    self._generation,
                    held.tenure,
                    self._store_options,
                    clock=self.clock,
                    lease=held.lease,
                    random_bytes=self._random_bytes,
                    seen_index=self._seen_index,
                )
                self._world.recovered(self, store)
                running = tasks.create_task(store.run(), name="store")
                riders = await self._ride(tasks, store)
                self.store = store
                await self._asked.wait()
                self._leave()
                await self._drain()
                for rider in riders:
                    rider.cancel()
                running.cancel()
                keeping.cancel()
        except* ENDING as group:
            lost = group
        except* HALTING as group:
            lost = group
        finally:
            self._leave()
            if lost is None:
                await election.release(held)
            else:
                await election.lost(held)
        self._world.log(f"{self.process.name} no longer leads: {_first(lost)!r}")
        error = _first(lost)
        if isinstance(error, HALTING):
            raise error

    async def _ride(self, tasks: asyncio.TaskGroup, store: ReplicatedStore) -> Sequence[asyncio.Task[None]]:
        """What else runs in a tenure, before it serves; cancelled when it ends."""
        return ()

    def _leave(self) -> None:
        self._seen_index = self.knows
        self.store = None

    async def _drain(self) -> None:
        for _ in range(DRAIN_ROUNDS):
            if not self._running:
                return
            await asyncio.sleep(DRAIN_S / DRAIN_ROUNDS)

    # -- what clients ask

    async def write(self, writes: Sequence[Write]) -> Reply:
        """One batch."""
        store = self.store
        if store is None:
            return Reply("standby")
        self._running += 1
        try:
            head = await store.commit(writes)
        except (Overloaded, NotApplied, TooLarge, PermissionDenied):
            return Reply("fail")
        except OutcomeUnknown:
            return Reply("unknown")
        except BackendError as error:
            self._world.report(Violation("contract", f"commit raised {error!r}"))
            return Reply("unknown")
        finally:
            self._running -= 1
        return Reply("ok", index=head.index)

    async def read(self, key: str) -> Reply:
        """One key."""
        store = self.store
        if store is None:
            return Reply("standby")
        try:
            return Reply("ok", value=await store.get(key))
        except ForeignWrite as error:
            self._world.foreign(self, key, error)
            return Reply("foreign")
        except (FenceLost, Unavailable):
            pass
        return Reply("error")

    async def list(self, prefix: str) -> Reply:
        """One folder."""
        store = self.store
        if store is None:
            return Reply("standby")
        try:
            return Reply("ok", names=await store.list(prefix))
        except (FenceLost, Unavailable):
            return Reply("error")

    async def follow(self, start: int) -> Reply:
        """Records from ``start`` on, as whoever ships the log reads them."""
        store = self.store
        if store is None:
            return Reply("standby")
        try:
            return Reply("ok", records=await store.records(start, FOLLOWED))
        except (RecordGone, FenceLost, Unavailable) as error:
            return Reply("gone" if isinstance(error, RecordGone) else "error")

    async def reindex(self) -> None:
        """Compare everything stored with the index, and repair."""
        store = self.store
        if store is None:
            return
        try:
            report = await reindex(store.inspected(), ReindexOptions(diff=True, skip_flush=True), Progress())
        except (FenceLost, Unavailable, OutcomeUnknown, NotApplied, Overloaded) as error:
            self._world.log(f"{self.process.name} could not reindex: {error!r}")
        except (StoreWentBack, Corrupt) as error:
            if not self._world.restored:
                self._world.report(Violation("crash", f"{self.process.name} crashed reindexing: {error!r}"))
        except Exception as error:  # whatever it is, production code let it out
            self._world.report(Violation("crash", f"{self.process.name} crashed reindexing: {error!r}"))
        else:
            self._world.reindexed(self, report)


def _first(error: BaseException | None) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
