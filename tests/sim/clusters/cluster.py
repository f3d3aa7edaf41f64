"""One cluster of a set: its simulated Consul, the witness of its log, its nodes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from consul_backend.errors import ForeignWrite
from consul_backend.physical import SENTINEL_KEY
from consul_backend.reindex import ReindexReport
from consul_backend.replicated import ReplicatedStore, genesis
from consul_backend.testing import Applied, SimulatedConsul
from consul_backend.txn import Cas
from consul_backend.wal import Write as StoreWrite
from sidecar.replication.modes import Mode
from sidecar.replication.roles import DisabledRole, Role, SecondaryRole, decode_role
from tests.sim.clusters.links import Links
from tests.sim.clusters.node import SetNode
from tests.sim.clusters.plan import SetPlan
from tests.sim.history import History, Write
from tests.sim.loop import NodeClock, Process, SimLoop
from tests.sim.network import SwarmNetwork
from tests.sim.witness import GENESIS_NODE, Violation, Witness

if TYPE_CHECKING:
    from tests.sim.clusters.world import SetWorld

T = TypeVar("T")

INDEX_CHECK_EVERY = 4


class Gone(Exception):
    """Whoever was asked died, or did not answer."""


class Cluster:
    """``acknowledged``: the newest record that somebody was told of."""

    def __init__(self, world: SetWorld, name: str, plan: SetPlan, loop: SimLoop, links: Links) -> None:
        self.name = name
        self.plan = plan
        self.generation = f"g-{name}"
        self.nodes: list[SetNode] = []
        self.times: list[float] = []
        self.history = History()
        self.acknowledged = 0
        self.restored = False
        self.tenures = 0
        self._world = world
        self._loop = loop
        self._links = links
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._graveyard: list[tuple[SetNode, asyncio.Task[None]]] = []
        self._expected: dict[Process, list[asyncio.Future[Any]]] = {}
        self._restarts = 0
        self._number = plan.names.index(name)
        seed = plan.seed * 16 + self._number
        self.network = SwarmNetwork(seed, usual_s=plan.usual_s, late_s_max=1.0, stale_share=0.0, faults=plan.faults)
        self.consul = SimulatedConsul(
            NodeClock(loop, rate=1.0, started_s=1000.0),
            limits=plan.limits,
            network=self.network,
            seed=seed,
            on_applied=self._applied,
        )
        self.witness = Witness(
            self.generation,
            self.consul.table,
            lambda session: self.consul.session_owners.get(session, "nobody"),
            self.report,
            segment_records=plan.store.segment_records,
        )

    def _applied(self, applied: Applied) -> None:
        before = len(self.witness.records)
        self.witness.applied(applied)
        for index in range(before, len(self.witness.records)):
            self.times.append(self._loop.time())
            self._world.lineage.recorded(self, self.witness.records[index], self.witness.fold.effects[index])

    # -- what it is, from its log

    @property
    def head(self) -> int:
        """Its newest record."""
        return len(self.witness.records)

    def value_at(self, key: str, index: int) -> bytes | None:
        """A key as of record ``index``."""
        for at, value in reversed(self.witness.fold.versions.get(key, ())):
            if at <= index:
                return value
        return None

    def role(self, mode: Mode) -> Role:
        """Its newest committed role."""
        raw = self.witness.newest(mode.role_key)
        return DisabledRole() if raw is None else decode_role(raw)

    @property
    def is_mix(self) -> bool:
        """Whether its data is a mix now, by its own newest record."""
        return self._world.lineage.is_mix(self)

    # -- what nodes tell

    def report(self, violation: Violation) -> None:
        """Something does not hold."""
        self._world.report(Violation(violation.checker, f"{self.name}: {violation.text}"))

    def log(self, text: str) -> None:
        """For whoever replays the seed."""
        self._world.log(f"{self.name}: {text}")

    def surprised(self, text: str) -> None:
        """Production code broke its contract."""
        self.report(Violation("contract", text))

    def mixed_read(self, who: str, key: str) -> None:
        """A read was answered from a mix (P6)."""
        self.report(Violation("P6", f"{who} served {key} while its data is a mix of two states"))

    def recovered(self, node: Any, store: ReplicatedStore) -> None:
        """A node begins a tenure."""
        self.tenures += 1
        self.log(f"{node.process.name} recovered at record {store.head.index}")
        if self.plan.store.index_eager_keys and self.tenures % INDEX_CHECK_EVERY == 2:
            self._world.judge_index(self, store, "after recovery")

    def halted(self, node: Any, error: BaseException) -> None:
        """A node refuses to go on."""
        self.report(Violation("halt", f"{node.process.name} halted: {error!r}"))

    def reindexed(self, node: Any, report: ReindexReport) -> None:
        """Nothing is damaged in this world."""
        if not report.clean:
            self.report(Violation("P8", f"{node.process.name} finds damage where none was done: {report}"))

    def foreign(self, node: Any, key: str, error: ForeignWrite) -> None:
        """Nobody writes behind its back."""
        self.report(Violation("foreign", f"{node.process.name}: {error}"))

    # -- what clients' writes become

    def begin(self, number: int) -> None:
        """A client's write is run here."""
        write = self._world.writes[number]
        if number in self._world.begun:
            self.report(Violation("P1", f"batch {number} was carried out in {self._world.begun[number]} before"))
            return
        self._world.begun[number] = self.name
        self.history.writes.append(write)

    def done(self, number: int, outcome: str, index: int) -> None:
        """It ended here, whatever its client hears."""
        write: Write = self._world.writes[number]
        write.outcome, write.index = outcome, index
        if outcome == "ok":
            write.completed_s = self._loop.time()
            self.acknowledged = max(self.acknowledged, index)

    # -- nodes

    async def found(self, entries: Mapping[str, bytes]) -> None:
        """Its first record, and its nodes."""
        founder = self.consul.client(GENESIS_NODE)
        await founder.open()
        await genesis(
            founder,
            self.generation,
            [StoreWrite(key, value) for key, value in sorted(entries.items())],
            node_id=GENESIS_NODE,
            time_ms=1_600_000_000_000,
            random_bytes=random.Random(f"genesis {self.plan.seed} {self.name}").randbytes,
            guard=[Cas(SENTINEL_KEY, b"outrider", 0)],
            segment_records=self.plan.store.segment_records,
        )
        for number in range(self.plan.nodes):
            self.start_node(number)

    def start_node(self, number: int) -> None:
        """A new process."""
        self._restarts += 1
        process = Process(f"{self.name}{number}.{self._restarts}")
        rnd = random.Random(f"process {self.plan.seed} {process.name}")
        host = f"{self.name}-{number}"
        self._links.place(process, self.name)
        node = SetNode(
            self,
            self._links,
            host,
            name=f"{self.name}{number}",
            process=process,
            physical=self.consul.client(process.name),
            clock=NodeClock(self._loop, rate=1.0, started_s=rnd.uniform(0, 10_000)),
            generation=self.generation,
            election=self.plan.election,
            store=self.plan.store,
            random_bytes=rnd.randbytes,
        )
        self._links.listen(host, node)
        if number < len(self.nodes):
            self.nodes[number] = node
        else:
            self.nodes.append(node)
        self._tasks[process.name] = node.start()

    def kill(self, node: SetNode) -> None:
        """SIGKILL."""
        if node.process.killed:
            return
        node.process.killed = True
        node.store = node.replication = None
        node.physical.crash()
        self._links.died(node.process)
        self._graveyard.append((node, self._tasks.pop(node.process.name)))
        for answer in list(self._expected.get(node.process, ())):
            if not answer.done():
                answer.set_exception(Gone("the process died"))

    def active(self) -> SetNode | None:
        """Who serves, if anybody does."""
        return next((node for node in self.nodes if node.replication is not None and not node.process.killed), None)

    async def ask(self, work: Callable[[SetNode], Awaitable[T]], *, patience_s: float = 10.0) -> T:
        """Have the active node do something. Raises Gone, and what the work raises."""
        node = self.active()
        if node is None:
            raise Gone(f"nobody serves in {self.name}")
        answer: asyncio.Future[T] = self._loop.create_future()

        async def serve() -> None:
            try:
                result = await work(node)
            except Exception as error:
                if not answer.done():
                    answer.set_exception(error)
            else:
                if not answer.done():
                    answer.set_result(result)

        waiting = self._expected.setdefault(node.process, [])
        waiting.append(answer)
        answer.add_done_callback(waiting.remove)
        node.process.spawn(serve())
        try:
            return await asyncio.wait_for(answer, patience_s)
        except TimeoutError:
            raise Gone(f"{node.process.name} did not answer in {patience_s:g} s") from None

    async def bury(self) -> None:
        """Let killed processes unwind."""
        self.consul.close()
        for node, task in self._graveyard:
            node.physical.crash()
            self._loop.bury(node.process)
            task.cancel()

    def secondary_role(self, mode: Mode) -> SecondaryRole | None:
        """Its role, if it is a secondary in that mode."""
        role = self.role(mode)
        return role if isinstance(role, SecondaryRole) else None
