"""Sessions of clients that carry ``X-Vault-Index`` from cluster to cluster, and what is promised to them.

A session writes wherever class ``r`` is written, and reads anywhere. Every record that it made or saw is its own from
then on: an answer without a warning is of a state that has them all, or there is no answer (412).

P9: read-your-writes and monotonic reads, through cuts, crashes, promotions by force and re-pointing.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from consul_backend.errors import BackendError
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.roles import DisabledRole
from tests.sim.clusters.cluster import Cluster, Gone
from tests.sim.clusters.lineage import Origin, is_taken
from tests.sim.clusters.node import MOUNT_1, Order, SetNode
from tests.sim.clusters.plan import CALM_S
from tests.sim.history import Write
from tests.sim.witness import Violation

if TYPE_CHECKING:
    from tests.sim.clusters.world import SetWorld

HEADERS_MAX = 6
PATIENCE_S = 8.0


@dataclass
class Session:
    """``headers`` are what it was told, ``mine`` the records that it made or saw by that."""

    world: SetWorld
    name: str
    rnd: random.Random
    headers: list[str] = field(default_factory=list)
    mine: frozenset[Origin] = frozenset()

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.sleep(CALM_S / 2)
        clusters = list(self.world.clusters.values())
        while True:
            cluster = self.rnd.choice(clusters)
            if cluster.active() is not None:
                try:
                    await self._turn(cluster)
                except Gone:
                    self.world.count("session unanswered")
            await asyncio.sleep(self.rnd.expovariate(1.0 / self.world.plan.think_s))

    async def _turn(self, cluster: Cluster) -> None:
        if self.rnd.random() < 0.3 and not self.world.quiet:
            await cluster.ask(lambda node: self._write(cluster, node), patience_s=PATIENCE_S)
        else:
            await cluster.ask(lambda node: self._read(cluster, node), patience_s=PATIENCE_S)

    async def _write(self, cluster: Cluster, node: SetNode) -> None:
        """Where this cluster is the primary; what goes through a secondary is the other clients' business."""
        replication = node.replication
        if replication is None or not replication.is_primary_writable() or _alone(cluster):
            return
        number = len(self.world.writes)
        entries: dict[str, bytes | None] = {f"r/{MOUNT_1}/session/{self.name}": b"%d" % number}
        write = Write(number, self.name, entries, self.world.loop.time())
        self.world.writes.append(write)
        told = await node.order(Order(number, dict(entries)))
        if told.outcome == "fail":
            self.world.told_failed.add(number)
        if told.outcome != "ok" or told.forwarded:
            return
        header = replication.sessions.after(written=told.index, answered="", asked=False)
        if not header:
            return
        self.world.count("session wrote")
        self._keep(header)
        self.mine |= {(cluster.name, told.index)}

    async def _read(self, cluster: Cluster, node: SetNode) -> None:
        replication = node.replication
        if replication is None or node.gate is not None or replication.mirrors or _alone(cluster):
            return
        try:
            found = await replication.sessions.require(self.headers)
        except BackendError:
            return
        if node.replication is not replication or node.gate is not None:
            return  # its tenure ended meanwhile: nobody is answered by it
        if found.missing:
            self.world.count("session refused")
            return
        # A read shows what this node's store knows to be committed, and what it is told to have seen is no less.
        if node.store is None:
            return
        here = self.world.lineage.origins(cluster, PERFORMANCE, node.store.head.index)
        if found.warnings:  # what it carried is of no use any more: it begins anew
            self.world.count("session warned")
            self.headers.clear()
            self.mine = frozenset()
            return
        self.world.count("session read")
        gone = {origin for origin in self.mine - here if self._travels(cluster, origin)}
        if gone:
            what = f"{self.name} reads without {len(gone)} records that it made or saw, first {min(gone)}"
            cluster.report(Violation("P9", what))
        header = replication.sessions.after(written=0, answered="", asked=True)
        self._keep(header)
        self.mine |= here

    def _travels(self, cluster: Cluster, origin: Origin) -> bool:
        """Whether anything of a record is sent to a cluster: what a filter withholds is in mounts that it has not."""
        name, index = origin
        role, effects = cluster.role(PERFORMANCE), self.world.clusters[name].witness.fold.effects[index - 1]
        return any(key.startswith("r/") and is_taken(role, key) for key in effects)

    def _keep(self, header: str) -> None:
        self.headers.append(header)
        if len(self.headers) > HEADERS_MAX:
            self.headers.pop(0)  # a newer one says as much, or a warning came in between


def _alone(cluster: Cluster) -> bool:
    """Whether it is in no performance set: nobody else can tell what its indexes mean."""
    return isinstance(cluster.role(PERFORMANCE), DisabledRole)


def start_sessions(world: SetWorld) -> None:
    """As many as its plan has."""
    for number in range(world.plan.sessions):
        name = f"session-{number}"
        session = Session(world, name, random.Random(f"session {world.plan.seed} {name}"))
        world.spawn(session.run())
