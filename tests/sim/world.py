"""A world: nodes, clients and a nemesis on one simulated Consul, and the verdict on what happened.

Order of a run: genesis, a calm while (work must get done), the time of faults, healing, and then every client must
succeed again within :data:`HEAL_S` (P14). At last all nodes are stopped, an auditor takes over on a perfect network and
recovers, and the checkers judge.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

from consul_backend import lazy_index
from consul_backend.errors import Corrupt, ForeignWrite, StoreWentBack
from consul_backend.physical import SENTINEL_KEY
from consul_backend.reindex import ReindexReport
from consul_backend.replicated import ReplicatedStore, genesis
from consul_backend.replicated import Write as StoreWrite
from consul_backend.testing import Applied, SimulatedConsul, Snapshot
from consul_backend.txn import Cas
from tests.sim.checkers import (
    Exemption,
    data_is_fold,
    index_is_exact,
    landed,
    linearizable,
    stored_index_reaches,
)
from tests.sim.client import Client
from tests.sim.history import History
from tests.sim.loop import NodeClock, Process, SimLoop
from tests.sim.nemesis import Nemesis
from tests.sim.network import SwarmNetwork
from tests.sim.node import Node, Reply
from tests.sim.plan import CALM_S, Plan
from tests.sim.trial import Outcome, Trial, simulated_loop
from tests.sim.witness import GENESIS_NODE, Violation, Witness

GENERATION = "g1"
HEAL_S = 60.0
CALM_WRITES_MIN = 1
DETECTION_S = 5.0
"""How long a node may take to notice that the store went back, besides two looks at the newest record."""


class AfterRestore:
    """What holds once an old snapshot was put back: a process that knew of records which are gone now writes and serves
    no more. Others may go on with what is there."""

    def __init__(self, world: World, at_s: float, records: int) -> None:
        self.at_s = at_s
        self._world = world
        self._ahead = {node.process.name for node in world.nodes if node.knows > records}

    def halted(self, error: BaseException) -> bool:
        """Whether a node may stop for this reason now."""
        return isinstance(error, StoreWentBack | Corrupt)

    def applied(self, applied: Applied) -> None:
        """A transaction on the store that went back."""
        records = [op.key for op in applied.ops if isinstance(op, Cas) and "/wal/" in op.key]
        if applied.node in self._ahead and records:
            what = f"{applied.node} wrote {records[0]} into a store that went back behind what it knows"
            self._world.report(Violation("F46", what))

    def judge(self) -> None:
        """Time enough has passed to notice."""
        for node in self._world.nodes:
            if node.process.name in self._ahead and node.store is not None:
                what = f"{node.process.name} still serves from a store that went back behind what it knows"
                self._world.report(Violation("F46", what))


class World(Trial):
    """One seed's."""

    def __init__(self, plan: Plan, loop: SimLoop, *, verbose: bool = False) -> None:
        super().__init__(plan.seed, loop, muted=plan.muted, verbose=verbose)
        self.plan = plan
        self.history = History()
        self.nodes: list[Node] = []
        self.tenures = 0
        self._restarts = 0
        self._graveyard: list[tuple[Node, asyncio.Task[None]]] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._expected: dict[Process, list[asyncio.Future[Reply]]] = {}
        self.exempt: list[Exemption] = []
        self._after_restore: AfterRestore | None = None
        self._recoveries = 0
        self.network = SwarmNetwork(
            plan.seed,
            usual_s=plan.usual_s,
            late_s_max=plan.late_s_max,
            stale_share=plan.stale_share,
            faults=plan.faults,
        )
        self.consul = SimulatedConsul(
            NodeClock(loop, rate=1.0, started_s=1000.0),
            limits=plan.limits,
            network=self.network,
            seed=plan.seed,
            on_applied=self._applied,
        )
        self.witness = Witness(
            GENERATION,
            self.consul.table,
            lambda session: self.consul.session_owners.get(session, "nobody"),
            self.report,
            segment_records=plan.store.segment_records,
        )

    def _applied(self, applied: Applied) -> None:
        if self._after_restore is not None:
            self._after_restore.applied(applied)
            return
        before = self.witness.checkpoint
        self.witness.applied(applied)
        checkpoint = self.witness.checkpoint
        if checkpoint is not before and checkpoint is not None and checkpoint.serial % 8 == 1:
            for violation in stored_index_reaches(self.witness, self.consul.table, GENERATION):
                self.report(violation)

    # -- what the others tell

    def halted(self, node: Node, error: BaseException) -> None:
        """A node refuses to go on with the store as it is."""
        self.count("halt")
        self.log(f"{node.process.name} halted: {error!r}")
        if self._after_restore is None or not self._after_restore.halted(error):
            what = f"{node.process.name} halted: {type(error).__name__}: {error}"
            self.report(Violation("halt", what))

    def recovered(self, node: Node, store: ReplicatedStore) -> None:
        """A node has recovered and serves from here on: its index must be exact (P8)."""
        self.tenures += 1
        self._recoveries += 1
        case = store.statistics()["recovery_records_redone"]
        self.log(f"{node.process.name} recovered at record {store.head.index}, {case} redone")
        if self._after_restore is not None:
            return  # the witness knows the store as it was before
        if self.plan.store.index_eager_keys == 0:
            return  # a page of a lazy index cannot be looked at before it is loaded: the audit looks at all
        roots = self._recoveries % 8 == 1
        for violation in index_is_exact(self.witness, store.forest, store.head.index, roots=roots):
            self.report(Violation(violation.checker, f"{node.process.name} after recovery: {violation.text}"))

    def foreign(self, node: Node, key: str, error: ForeignWrite) -> None:
        """A read was refused because what is stored is nobody's."""
        self.count("foreign read")
        if key not in self.witness.damaged and self._after_restore is None:
            self.report(Violation("foreign", f"{node.process.name}: {error}"))

    def reindexed(self, node: Node, report: ReindexReport) -> None:
        """A node has compared everything it stores with its index, and repaired what differed (P8)."""
        self.count("reindexed")
        self.log(f"{node.process.name}: {report}")
        for what in ("restored", "quarantined"):
            self.happened[what] = self.happened.get(what, 0) + getattr(report, what)
        if self._after_restore is not None:
            return
        wrong = report.pages or report.extents or report.dropped
        if wrong or (not self.witness.damaged and (not report.clean or report.quarantined or report.restored)):
            self.report(Violation("P8", f"{node.process.name} finds damage where none was done: {report}"))

    @property
    def restored(self) -> bool:
        """Whether the store was put back: the witness knows it as it was before."""
        return self._after_restore is not None

    @property
    def quiet(self) -> bool:
        """Whether nobody is to write any more."""
        return self._after_restore is not None and self.plan.quiet_after_restore

    def expect(self, process: Process, answer: asyncio.Future[Reply]) -> None:
        """A client waits for a process; if it dies the client is told."""
        waiting = self._expected.setdefault(process, [])
        waiting.append(answer)
        answer.add_done_callback(waiting.remove)

    def deliver(self, after_s: float, answer: asyncio.Future[Reply], reply: Reply) -> None:
        """An answer travels to a client."""

        def arrive() -> None:
            if not answer.done():
                answer.set_result(reply)

        self.loop.call_later(after_s, arrive, context=contextvars.Context())

    # -- nodes

    def start_node(self, number: int) -> None:
        """A new process for node ``number``."""
        self._restarts += 1
        name = "same" if self.plan.same_name else f"n{number}"
        process = Process(f"n{number}.{self._restarts}")
        randomness = random.Random(f"process {self.plan.seed} {process.name}")
        node = Node(
            self,
            name,
            process,
            self.consul.client(process.name),
            NodeClock(self.loop, rate=self.plan.rates[number], started_s=randomness.uniform(0, 10_000)),
            generation=GENERATION,
            election=self.plan.election,
            store=self.plan.store,
            random_bytes=randomness.randbytes,
        )
        if number < len(self.nodes):
            self.nodes[number] = node
        else:
            self.nodes.append(node)
        self._tasks[process.name] = node.start()

    def kill(self, node: Node) -> None:
        """SIGKILL: what was sent may still arrive, nothing else of it happens any more."""
        if node.process.killed:
            return
        node.process.killed = True
        node.store = None
        node.physical.crash()
        self._graveyard.append((node, self._tasks.pop(node.process.name)))
        for answer in list(self._expected.get(node.process, ())):
            if not answer.done():
                answer.set_exception(ConnectionResetError("the process died"))

    # -- the run

    async def run(self) -> None:
        """Genesis to healing; the verdict comes after."""
        if self.plan.same_name:
            self.count("same name")
        founder = self.consul.client(GENESIS_NODE)
        await founder.open()
        await genesis(
            founder,
            GENERATION,
            [StoreWrite("c/seal/config", b"seal"), StoreWrite("r/p1/first", b"first")],
            node_id=GENESIS_NODE,
            time_ms=1_600_000_000_000,
            random_bytes=random.Random(self.plan.seed).randbytes,
            guard=[Cas(SENTINEL_KEY, b"outrider", 0)],
        )
        for number in range(self.plan.nodes):
            self.start_node(number)
        clients = [
            Client(self, f"c{number}", random.Random(f"client {self.plan.seed} {number}"))
            for number in range(self.plan.clients)
        ]
        tasks = [self.spawn(client.run()) for client in clients]
        tasks.append(self.spawn(self._trouble(clients)))
        await self._over.wait()
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                self.report(Violation("simulation", repr(result)))

    async def _trouble(self, clients: list[Client]) -> None:
        await asyncio.sleep(CALM_S)
        while self.history.acknowledged() < CALM_WRITES_MIN:
            await asyncio.sleep(0.1)
            if self.loop.time() > HEAL_S:
                self.report(Violation("P14", f"no work was done in the first {HEAL_S:.0f} s, without any fault"))
                self._over.set()
                return
        self.network.calm = False
        nemesis = Nemesis(self)
        start_s = self.loop.time() - CALM_S
        snapshots: list[tuple[Snapshot, int]] = []
        if self.plan.snapshot_at_s is not None:
            take = lambda: snapshots.append((self.consul.snapshot(), len(self.witness.records)))  # noqa: E731 - a function of the loop, not of the module
            self.loop.call_at(start_s + self.plan.snapshot_at_s, take)
        for number, event in enumerate(self.plan.events):
            await asyncio.sleep(max(0.0, start_s + event.at_s - self.loop.time()))
            if number not in self.plan.skipped:
                nemesis.act(event)
        await asyncio.sleep(max(0.0, start_s + CALM_S + self.plan.duration_s - self.loop.time()))
        nemesis.heal()
        if snapshots:
            await self._restore(snapshots[0])
            return
        self.healed_s = self.loop.time()
        self.log("healed")
        while self.loop.time() < self.healed_s + HEAL_S:
            await asyncio.sleep(0.25)
            if all(client.healthy_writes and client.healthy_reads for client in clients):
                self._over.set()
                return
        stuck = [client.name for client in clients if not (client.healthy_writes and client.healthy_reads)]
        serving = [node.process.name for node in self.nodes if node.store is not None]
        self.report(
            Violation(
                "P14", f"{HEAL_S:.0f} s after the last fault {stuck} have not written and read; serving: {serving}"
            )
        )
        self._over.set()

    async def _restore(self, snapshot: tuple[Snapshot, int]) -> None:
        """An operator puts an old snapshot of the store back under everybody (F46); the run ends with what follows."""
        while not self.consul.has_leader():
            await asyncio.sleep(0.1)
        self.count("restore")
        self.log(f"the store is put back to record {snapshot[1]}")
        self._after_restore = AfterRestore(self, self.loop.time(), snapshot[1])
        self.consul.restore(snapshot[0])
        await asyncio.sleep(DETECTION_S + 2.2 * self.plan.store.tip_interval_s)
        self._after_restore.judge()
        self._over.set()

    # -- the verdict

    async def judge(self) -> None:
        """Stop everything, recover once more, and let the checkers judge."""
        self._judge_hung()
        if self._after_restore is None:
            self._judge_indexes()
        for node in self.nodes:
            self.kill(node)
        history = self.history
        if self._after_restore is not None:
            history = history.until(self._after_restore.at_s)
        elif not self.violations:
            await self._audit()
        at, found = landed(history, self.witness)
        found += linearizable(history, self.witness, at, self.exempt)
        if self._after_restore is None:
            found += data_is_fold(self.witness, self.consul.table, GENERATION, self.plan.store.segment_records)
        for violation in found:
            self.report(violation)
        self._trace.update(self.witness.digest.digest())

    def _judge_hung(self) -> None:
        """An operation that a living node never answers."""
        for node in self.nodes:
            waiting = self._expected.get(node.process, [])
            if self.healed_s is not None and len(waiting) > 2 * self.plan.clients:
                self.report(Violation("P14", f"{node.process.name} answers {len(waiting)} requests never"))

    def _judge_indexes(self) -> None:
        """The index of whoever serves is exact after every commit, roots included (P8)."""
        for node in self.nodes:
            store = node.store
            if store is None or self.plan.store.index_eager_keys == 0 or store.head.index > len(self.witness.records):
                continue
            for violation in index_is_exact(self.witness, store.forest, store.head.index, roots=True):
                self.report(Violation(violation.checker, f"{node.process.name} at the end: {violation.text}"))

    async def _audit(self) -> None:
        self.network.heal()
        violations = len(self.violations)
        self.start_node(0)
        auditor = self.nodes[0]
        for _ in range(int(HEAL_S / 0.1)):
            if auditor.store is not None or len(self.violations) != violations:
                break
            await asyncio.sleep(0.1)
        if auditor.store is None:
            if len(self.violations) == violations:
                self.report(Violation("P14", f"nobody could take over within {HEAL_S:.0f} s at the end"))
            return
        await auditor.process.spawn(auditor.store.load_index())
        found = index_is_exact(self.witness, auditor.store.forest, auditor.store.head.index, roots=True)
        for violation in found:
            self.report(violation)
        if not found:
            await auditor.process.spawn(auditor.reindex())
            self.witness.repaired(auditor.store.oldest_index)
        self.kill(auditor)

    def outcome(self) -> Outcome:
        """The run in figures."""
        return self._figures(
            acknowledged=self.history.acknowledged(),
            reads=len(self.history.reads) + len(self.history.listings),
            tenures=self.tenures,
            happened={**self.happened, **self.network.counts, **self.witness.counts},
        )

    async def bury(self) -> None:
        """Let every process that was killed unwind, so that nothing is left behind in this interpreter."""
        self.consul.close()
        for node, task in self._graveyard:
            node.physical.crash()
            self.loop.bury(node.process)
            task.cancel()
        await self._unwind()


def simulate(plan: Plan, *, verbose: bool = False, watch: Callable[[World], None] = lambda world: None) -> Outcome:
    """Run one plan to its verdict. ``watch`` is given the world before it begins."""
    with simulated_loop(plan.seed, shuffle=plan.shuffle) as loop:
        virtual = SimpleNamespace(monotonic=loop.time)
        with patch.object(lazy_index, "time", virtual):  # it paces itself by the time
            world = World(plan, loop, verbose=verbose)
            watch(world)
            return world.to_the_end()
