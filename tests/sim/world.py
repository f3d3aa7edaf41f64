"""A world: nodes, clients and a nemesis on one simulated Consul, and the verdict on what happened.

Order of a run: genesis, a calm while (work must get done), the time of faults, healing, and then every client must
succeed again within :data:`HEAL_S` (P14). At last all nodes are stopped, an auditor takes over on a perfect network and
recovers, and the checkers judge.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from consul_backend import lazy_index
from consul_backend.errors import Conflict
from consul_backend.physical import LOCK_KEY, SENTINEL_KEY
from consul_backend.replicated import ReplicatedStore, genesis
from consul_backend.replicated import Write as StoreWrite
from consul_backend.testing import Applied, SimulatedConsul
from consul_backend.txn import Cas, Delete
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
from tests.sim.loop import Deadlock, Livelock, NodeClock, Process, SimLoop
from tests.sim.network import SwarmNetwork
from tests.sim.node import Node, Reply
from tests.sim.plan import CALM_S, Event, Plan
from tests.sim.witness import GENESIS_NODE, Violation, Witness

GENERATION = "g1"
HEAL_S = 60.0
CALM_WRITES_MIN = 1
HUNG_S = 60.0


@dataclass(slots=True)
class Outcome:
    """A finished run. ``trace`` is equal for equal runs."""

    seed: int
    violations: list[Violation]
    trace: str
    simulated_s: float
    steps: int
    acknowledged: int
    reads: int
    tenures: int
    healed_after_s: float
    faults: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


class World:
    """One seed's. ``verbose`` keeps a log of what happened."""

    def __init__(self, plan: Plan, loop: SimLoop, *, verbose: bool = False) -> None:
        self.plan = plan
        self.loop = loop
        self.history = History()
        self.violations: list[Violation] = []
        self.healed_s: float | None = None
        self.nodes: list[Node] = []
        self.lines: list[str] = []
        self.faults: dict[str, int] = {}
        self.tenures = 0
        self._verbose = verbose
        self._over = asyncio.Event()
        self._trace = hashlib.blake2b(digest_size=8)
        self._restarts = 0
        self._graveyard: list[tuple[Node, asyncio.Task[None]]] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._expected: dict[Process, list[asyncio.Future[Reply]]] = {}
        self._exempt: list[Exemption] = []
        self._recoveries = 0
        self._outside: set[asyncio.Task[Any]] = set()
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
        before = self.witness.checkpoint
        self.witness.applied(applied)
        checkpoint = self.witness.checkpoint
        if checkpoint is not before and checkpoint is not None and checkpoint.serial % 8 == 1:
            for violation in stored_index_reaches(self.witness, self.consul.table, GENERATION):
                self.report(violation)

    # -- what the others tell

    def report(self, violation: Violation) -> None:
        """Something does not hold; the run ends."""
        self.violations.append(violation)
        self.log(f"VIOLATION {violation}")
        self._over.set()

    def log(self, text: str) -> None:
        """For whoever replays the seed; part of the trace."""
        self.note(text)
        if self._verbose:
            self.lines.append(f"{self.loop.time():9.4f} {text}")

    def note(self, text: str) -> None:
        """Part of the trace only."""
        self._trace.update(f"{self.loop.time():.9f} {text}\n".encode())

    def recovered(self, node: Node, store: ReplicatedStore) -> None:
        """A node has recovered and serves from here on: its index must be exact (P8)."""
        self.tenures += 1
        self._recoveries += 1
        case = store.statistics()["recovery_records_redone"]
        self.log(f"{node.process.name} recovered at record {store.head.index}, {case} redone")
        if self.plan.store.index_eager_keys == 0:
            return  # a page of a lazy index cannot be looked at before it is loaded: the audit looks at all
        roots = self._recoveries % 8 == 1
        for violation in index_is_exact(self.witness, store.forest, store.head.index, roots=roots):
            self.report(Violation(violation.checker, f"{node.process.name} after recovery: {violation.text}"))

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
        tasks = [self._spawn(client.run()) for client in clients]
        tasks.append(self._spawn(self._nemesis(clients)))
        await self._over.wait()
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                self.report(Violation("simulation", repr(result)))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self._outside.add(task)
        task.add_done_callback(self._outside.discard)
        return task

    async def _nemesis(self, clients: list[Client]) -> None:
        await asyncio.sleep(CALM_S)
        while self.history.acknowledged() < CALM_WRITES_MIN:
            await asyncio.sleep(0.1)
            if self.loop.time() > HEAL_S:
                self.report(Violation("P14", f"no work was done in the first {HEAL_S:.0f} s, without any fault"))
                return
        self.network.calm = False
        start_s = self.loop.time() - CALM_S
        for number, event in enumerate(self.plan.events):
            await asyncio.sleep(max(0.0, start_s + event.at_s - self.loop.time()))
            if number not in self.plan.skipped:
                self._act(event)
        await asyncio.sleep(max(0.0, start_s + CALM_S + self.plan.duration_s - self.loop.time()))
        self._heal()
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

    def _act(self, event: Event) -> None:
        number = event.node if event.node >= 0 else self._leader()
        node = self.nodes[number]
        self.faults[event.what] = self.faults.get(event.what, 0) + 1
        self.log(f"nemesis: {event.what} {node.process.name} for {event.for_s:.2f} s")
        actions: dict[str, Callable[[], None]] = {
            "pause": lambda: self._pause(node, event.for_s),
            "kill": lambda: self._kill_and_restart(number, event.for_s),
            "cut": lambda: self._cut(self.network.cut, node, event.for_s),
            "cut-refused": lambda: self._cut(self.network.refused, node, event.for_s),
            "clock": lambda: self._step_clock(node, event),
            "destroy-session": self._destroy_session,
            "pause-and-depose": lambda: self._pause_and_depose(node, event.for_s),
            "cut-and-depose": lambda: self._cut_and_depose(node, event.for_s),
            "delete-lock": self._delete_lock,
            "step-down": node.step_down,
            "leader-change": lambda: self.consul.change_leader(min(event.for_s, 2.0), stale_s=event.for_s / 4),
            "quorum-lost": lambda: self.consul.change_leader(event.for_s),
            "storm": lambda: self._storm(event.for_s),
        }
        actions[event.what]()

    def _leader(self) -> int:
        """Who holds the lock, serving or still recovering; the first node if nobody does."""
        lock = self.consul.table.read(LOCK_KEY)
        holder = self.consul.session_owners.get(lock.session) if lock is not None else None
        return next((number for number, node in enumerate(self.nodes) if node.process.name == holder), 0)

    def _later(self, after_s: float, action: Callable[[], None]) -> None:
        self.loop.call_later(after_s, action)

    def _pause(self, node: Node, for_s: float) -> None:
        if not node.process.killed:
            node.process.paused = True
            self._later(for_s, lambda: self._unpause(node))

    def _unpause(self, node: Node) -> None:
        if node.process.paused and not node.process.killed:
            self.log(f"{node.process.name} goes on")
            self.loop.unpause(node.process)

    def _kill_and_restart(self, number: int, after_s: float) -> None:
        node = self.nodes[number]
        if node.process.killed:
            return
        self.kill(node)
        self._later(after_s, lambda: self._restart(number, node))

    def _restart(self, number: int, dead: Node) -> None:
        if self.nodes[number] is dead:
            self.start_node(number)

    def _cut(self, links: set[str], node: Node, for_s: float) -> None:
        links.add(node.process.name)
        self._later(for_s, lambda: links.discard(node.process.name))

    def _step_clock(self, node: Node, event: Event) -> None:
        node.clock.step_ms += int((event.for_s - 7.0) * 1_000_000)

    def _destroy_session(self) -> None:
        lock = self.consul.table.read(LOCK_KEY)
        if lock is not None and lock.session:
            self.consul.end_session(lock.session)

    def _cut_and_depose(self, node: Node, for_s: float) -> None:
        """The leader loses its session and cannot learn of it."""
        self._cut(self.network.cut, node, for_s)
        self._destroy_session()

    def _pause_and_depose(self, node: Node, for_s: float) -> None:
        """The leader sleeps through the end of its tenure; what was on its way to it comes when it wakes."""
        self._pause(node, for_s)
        self._destroy_session()

    def _delete_lock(self) -> None:
        """Deleting the lock skips the lock-delay, which is the read lease: reads of that long are not judged."""
        now_s = self.loop.time()
        self._exempt.append(Exemption(now_s, now_s + self.plan.election.lock_delay_s))
        try:
            self.consul.rules.txn([Delete(LOCK_KEY)], self.consul.now())
        except Conflict as error:
            raise AssertionError("a deletion is never refused") from error

    def _storm(self, for_s: float) -> None:
        self.network.stormy = True

        def calm() -> None:
            self.network.stormy = False

        self._later(for_s, calm)

    def _heal(self) -> None:
        self.network.heal()
        for number, node in enumerate(self.nodes):
            if node.process.killed:
                self.start_node(number)
            self._unpause(node)

    # -- the verdict

    async def judge(self) -> None:
        """After the run: stop everything, recover once more, and let the checkers judge."""
        self._judge_hung()
        for node in self.nodes:
            self.kill(node)
        if not self.violations:
            await self._audit()
        at, found = landed(self.history, self.witness)
        found += linearizable(self.history, self.witness, at, self._exempt)
        found += data_is_fold(self.witness, self.consul.table, GENERATION, self.plan.store.segment_records)
        self.violations += found
        for violation in found:
            self.log(f"VIOLATION {violation}")
        self._trace.update(self.witness.digest.digest())

    def _judge_hung(self) -> None:
        """An operation that a living node never answers."""
        for node in self.nodes:
            waiting = self._expected.get(node.process, [])
            if self.healed_s is not None and len(waiting) > 2 * self.plan.clients:
                self.report(Violation("P14", f"{node.process.name} answers {len(waiting)} requests never"))

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
        self.violations += found
        self.kill(auditor)

    def outcome(self) -> Outcome:
        """The run in figures."""
        healed_s = self.healed_s if self.healed_s is not None else self.loop.time()
        return Outcome(
            seed=self.plan.seed,
            violations=self.violations,
            trace=self._trace.hexdigest(),
            simulated_s=self.loop.time(),
            steps=self.loop.steps,
            acknowledged=self.history.acknowledged(),
            reads=len(self.history.reads) + len(self.history.listings),
            tenures=self.tenures,
            healed_after_s=self.loop.time() - healed_s,
            faults={**self.faults, **self.network.counts},
            log=self.lines,
        )

    async def bury(self) -> None:
        """Let every process that was killed unwind, so that nothing is left behind in this interpreter."""
        self.consul.close()
        for node, task in self._graveyard:
            node.physical.crash()
            self.loop.bury(node.process)
            task.cancel()
        for task in asyncio.all_tasks(self.loop) - {asyncio.current_task()}:
            task.cancel()
        for _ in range(200):
            if len(asyncio.all_tasks(self.loop)) == 1:
                return
            for task in asyncio.all_tasks(self.loop) - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0.01)


def simulate(plan: Plan, *, verbose: bool = False, watch: Callable[[World], None] = lambda world: None) -> Outcome:
    """Run one plan to its verdict. ``watch`` is given the world before it begins."""
    loop = SimLoop(plan.seed, shuffle=plan.shuffle)
    asyncio.set_event_loop(loop)
    virtual = patch.object(lazy_index, "time", SimpleNamespace(monotonic=loop.time))  # it paces itself by the time
    try:
        virtual.start()
        world = World(plan, loop, verbose=verbose)
        watch(world)
        try:
            loop.run_until_complete(world.run())
            loop.run_until_complete(world.judge())
        except (Deadlock, Livelock) as error:
            world.report(Violation("P14", repr(error)))
        outcome = world.outcome()
        loop.run_until_complete(world.bury())
        return outcome
    finally:
        virtual.stop()
        asyncio.set_event_loop(None)
        loop.close()
