"""A world of several clusters and the verdict on what happened.

Order of a run: the first cluster begins, the others are activated as the plan has it; a calm while; the time of faults
and of operators' acts; healing, in which an operator brings every cluster back under one primary; then clients rest,
and within :data:`HEAL_S` of healing everybody must stand where its primary stands (P7).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from consul_backend.replicated import ReplicatedStore
from sidecar.replication.modes import MODES, Mode
from sidecar.replication.shipped import Shipped
from tests.sim.checkers import data_is_fold, index_is_exact, landed
from tests.sim.clusters.client import Client
from tests.sim.clusters.cluster import Cluster
from tests.sim.clusters.lineage import Lineage
from tests.sim.clusters.links import Links
from tests.sim.clusters.node import KEYRINGS, SEAL_KEY
from tests.sim.clusters.operators import Operator
from tests.sim.clusters.plan import CALM_S, SetPlan
from tests.sim.clusters.seams import Tokens, simulated
from tests.sim.clusters.sessions import start_sessions
from tests.sim.clusters.stream import StreamWatch
from tests.sim.clusters.trouble import Trouble
from tests.sim.history import Write
from tests.sim.loop import SimLoop
from tests.sim.trial import Outcome, Trial, simulated_loop
from tests.sim.witness import Violation

HEAL_S = 90.0
BEGIN_S = 30.0
SETTLE_S = 30.0


class SetWorld(Trial):
    """One seed's."""

    def __init__(self, plan: SetPlan, loop: SimLoop, *, verbose: bool = False) -> None:
        super().__init__(plan.seed, loop, muted=plan.muted, verbose=verbose)
        self.plan = plan
        self.writes: list[Write] = []
        self.begun: dict[int, str] = {}
        self.told_failed: set[int] = set()
        self.acknowledged = 0
        self.quiet = False
        self.tokens = Tokens()
        self.lineage = Lineage(self)
        self.streams = StreamWatch(self)
        self.links = Links(
            loop, plan.seed, delay_s=plan.link.delay_s, tampering=plan.link.tampering, watcher=self.streams
        )
        self.clusters = {name: Cluster(self, name, plan, loop, self.links) for name in plan.names}
        self.operator = Operator(self)
        self._by_generation = {cluster.generation: cluster for cluster in self.clusters.values()}

    def by_generation(self, generation: str) -> Cluster | None:
        """The cluster whose store that is."""
        return self._by_generation.get(generation)

    # -- what the others tell

    def judge_index(self, cluster: Cluster, store: ReplicatedStore, when: str) -> None:
        """P8: a serving store's index is the one of its log."""
        if store.head.index > cluster.head:
            return
        for violation in index_is_exact(cluster.witness, store.forest, store.head.index, roots=True):
            cluster.report(Violation(violation.checker, f"{when}: {violation.text}"))

    # -- the run

    async def run(self) -> None:
        """From the first record to standstill; the verdict comes after."""
        begun = self.spawn(self._live())
        over = self.spawn(self._over.wait())
        await asyncio.wait([begun, over], return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(self._outside, key=hash):
            task.cancel()
        for result in await asyncio.gather(*sorted(self._outside, key=hash), return_exceptions=True):
            if isinstance(result, Exception):
                self.report(Violation("simulation", repr(result)))
        if begun.done() and not begun.cancelled() and (error := begun.exception()) is not None:
            self.report(Violation("simulation", repr(error)))

    async def _live(self) -> None:
        await self._begin()
        for cluster in self.clusters.values():
            for number in range(self.plan.clients):
                name = f"{cluster.name}-c{number}"
                client = Client(self, cluster, name, random.Random(f"client {self.plan.seed} {name}"))
                self.spawn(client.run())
        await asyncio.sleep(CALM_S)
        await self._trouble()
        self.healed_s = self.loop.time()
        self.log("healed")
        if not await self._until(self._all_follow, HEAL_S, mending=True):
            self._stuck("P7", "after the last fault not everybody follows")
            return
        self.quiet = True
        if not await self._until(self._all_equal, SETTLE_S, mending=True):
            self._stuck("P7", "with nobody writing not everybody stands where its primary stands")

    async def _begin(self) -> None:
        first = self.clusters[self.plan.names[0]]
        entries = dict.fromkeys(KEYRINGS, b"keyring 1") | {SEAL_KEY: b"seal", "r/policy/first": b"first"}
        await first.found(entries)
        for follow in self.plan.follows:
            await self._within(lambda follow=follow: self.operator.enlist(follow), f"{follow.who} was not activated")

    async def _within(self, attempt: Callable[[], Coroutine[Any, Any, bool]], problem: str) -> None:
        deadline_s = self.loop.time() + BEGIN_S
        while not await attempt():
            if self.loop.time() > deadline_s:
                raise AssertionError(problem)
            await asyncio.sleep(0.1)

    async def _trouble(self) -> None:
        for cluster in self.clusters.values():
            cluster.network.calm = False
        self.links.begin_tampering()
        trouble = Trouble(self)
        start_s = self.loop.time() - CALM_S
        for number, event in enumerate(self.plan.events):
            await asyncio.sleep(max(0.0, start_s + event.at_s - self.loop.time()))
            if number not in self.plan.skipped:
                trouble.act(event)
        await asyncio.sleep(max(0.0, start_s + CALM_S + self.plan.duration_s - self.loop.time()))
        trouble.heal()

    async def _until(self, done: Callable[[], bool], patience_s: float, *, mending: bool) -> bool:
        deadline_s = self.loop.time() + patience_s
        while self.loop.time() < deadline_s:
            if not self.operator.busy:
                if done():
                    return True
                if mending:
                    await self.operator.mend()
            await asyncio.sleep(0.2)
        return False

    def _all_follow(self) -> bool:
        return all(self.operator.follows(cluster, mode) for mode, cluster in self._followers())

    def _followers(self) -> Iterable[tuple[Mode, Cluster]]:
        for mode in MODES.values():
            for name in self.operator.members(mode):
                if name != self.operator.primary[mode.name]:
                    yield mode, self.clusters[name]

    def _all_equal(self) -> bool:
        """P7: positions, roots and data."""
        for mode, cluster in self._followers():
            primary = self.clusters[self.operator.primary[mode.name]]
            node, other = cluster.active(), primary.active()
            if node is None or other is None or node.store is None or other.store is None:
                return False
            service = node.mode(mode.name).secondary
            position = service.applier.position if service is not None else None
            if service is None or position is None or position.index != primary.head:
                return False
            role = cluster.secondary_role(mode)
            if role is None or not self.operator.follows(cluster, mode):
                return False
            if not service.applier.upstream.complete_at or service.applier.upstream.complete_at[0] != primary.head:
                return False
            roots = [Shipped(store.forest, mode.classes, role.selection).root() for store in (node.store, other.store)]
            if roots[0] != roots[1]:
                self.report(Violation("P7", f"{cluster.name} is in step with {primary.name} and roots differ"))
            self.lineage.compare_all(cluster, mode, primary, primary.head, "at the end it")
        return True

    def _stuck(self, checker: str, text: str) -> None:
        self.report(Violation(checker, f"{text}: {self.operator.describe()}"))

    # -- the verdict

    async def judge(self) -> None:
        """Stop everything; the checkers judge."""
        if not self.violations:
            for cluster in self.clusters.values():
                node = cluster.active()
                if node is not None and node.store is not None:
                    await node.process.spawn(node.store.load_index())
                    if node.store is not None:
                        self.judge_index(cluster, node.store, "at the end")
        for cluster in self.clusters.values():
            for node in cluster.nodes:
                cluster.kill(node)
        found: list[Violation] = []
        for cluster in self.clusters.values():
            _, some = landed(cluster.history, self.lineage.own_log(cluster))
            some += data_is_fold(
                cluster.witness, cluster.consul.table, cluster.generation, self.plan.store.segment_records
            )
            found += [Violation(one.checker, f"{cluster.name}: {one.text}") for one in some]
            self._trace.update(cluster.witness.digest.digest())
        for number in sorted(self.told_failed):
            if self.begun.get(number) and self.writes[number].outcome == "ok":
                found.append(Violation("P1", f"batch {number} was reported as failed and was carried out"))
        for violation in found:
            self.report(violation)

    def outcome(self) -> Outcome:
        """The run in figures."""
        counts: dict[str, int] = {}
        some: list[dict[str, int]] = [self.happened, self.links.counts, self.lineage.counts]
        for cluster in self.clusters.values():
            some += [cluster.witness.counts, cluster.network.counts]
        for one in some:
            for what, number in one.items():
                counts[what] = counts.get(what, 0) + number
        return self._figures(
            acknowledged=self.acknowledged,
            reads=self.happened.get("read", 0),
            tenures=sum(cluster.tenures for cluster in self.clusters.values()),
            happened=counts,
        )

    async def bury(self) -> None:
        """Leave nothing behind in this interpreter."""
        for cluster in self.clusters.values():
            await cluster.bury()
        await self._unwind()


def simulate_set(
    plan: SetPlan, *, verbose: bool = False, watch: Callable[[SetWorld], None] = lambda world: None
) -> Outcome:
    """Run one plan to its verdict."""
    with simulated_loop(plan.seed, shuffle=plan.shuffle) as loop:
        world = SetWorld(plan, loop, verbose=verbose)
        watch(world)
        start_sessions(world)
        with simulated(loop, world.links, world.tokens, plan.seed):
            return world.to_the_end()
