"""What the plan does to nodes, stores and links; an operator's acts go to :mod:`tests.sim.clusters.operators`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.sim.clusters.plan import Event

if TYPE_CHECKING:
    from tests.sim.clusters.cluster import Cluster
    from tests.sim.clusters.node import SetNode
    from tests.sim.clusters.world import SetWorld


class Trouble:
    """One world's."""

    def __init__(self, world: SetWorld) -> None:
        self._world = world

    def act(self, event: Event) -> None:
        """Do it now."""
        world, names = self._world, self._world.plan.names
        one, other = world.clusters[names[event.cluster]], world.clusters[names[event.other]]
        world.log(f"nemesis: {event.what} ({one.name}, {other.name}) for {event.for_s:.2f} s")
        actions: dict[str, Callable[[], None]] = {
            "pause": lambda: self._pause(one, event.for_s),
            "kill": lambda: self._kill(one, event.for_s),
            "step-down": lambda: self._node(one).step_down(),
            "cut-store": lambda: self._cut_store(one, event.for_s),
            "cut-link": lambda: self._cut(one, other, event.for_s, both=True),
            "cut-one-way": lambda: self._cut(one, other, event.for_s, both=False),
            "slow-link": lambda: self._slow(one, other, event.for_s),
            "reset-links": lambda: world.links.reset(one.name, other.name),
        }
        action = actions.get(event.what)
        if action is not None:
            world.count(event.what)
            action()
        else:
            world.operator.act(event.what, one, other)

    def heal(self) -> None:
        """No trouble from here on."""
        self._world.links.heal()
        for cluster in self._world.clusters.values():
            cluster.network.heal()
            for number, node in enumerate(cluster.nodes):
                if node.process.killed:
                    cluster.start_node(number)
                self._unpause(node)

    def _later(self, after_s: float, action: Callable[[], None]) -> None:
        self._world.loop.call_later(after_s, action)

    def _node(self, cluster: Cluster) -> SetNode:
        return cluster.active() or cluster.nodes[0]

    def _pause(self, cluster: Cluster, for_s: float) -> None:
        node = self._node(cluster)
        if not node.process.killed:
            node.process.paused = True
            self._later(for_s, lambda: self._unpause(node))

    def _unpause(self, node: SetNode) -> None:
        if node.process.paused and not node.process.killed:
            self._world.loop.unpause(node.process)

    def _kill(self, cluster: Cluster, for_s: float) -> None:
        node = self._node(cluster)
        number = cluster.nodes.index(node)
        if not node.process.killed:
            cluster.kill(node)
            self._later(for_s, lambda: self._restart(cluster, number, node))

    def _restart(self, cluster: Cluster, number: int, dead: SetNode) -> None:
        if cluster.nodes[number] is dead:
            cluster.start_node(number)

    def _cut_store(self, cluster: Cluster, for_s: float) -> None:
        name = self._node(cluster).process.name
        cluster.network.cut.add(name)
        self._later(for_s, lambda: cluster.network.cut.discard(name))

    def _cut(self, one: Cluster, other: Cluster, for_s: float, *, both: bool) -> None:
        self._world.links.cut(one.name, other.name, both=both)
        self._later(for_s, lambda: self._world.links.mend(one.name, other.name))

    def _slow(self, one: Cluster, other: Cluster, for_s: float) -> None:
        self._world.links.link(one.name, other.name).slow = True
        self._later(for_s, lambda: self._world.links.mend(one.name, other.name))
