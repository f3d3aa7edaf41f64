"""The nemesis: does to nodes, network and store what the plan says, when it says so.

Acts by name (:data:`tests.sim.plan.EVENTS`), each on one node, mostly on whoever holds the lock. Two of them belong
together: *foreign-write* changes a data key behind everyone's back, and *reindex* (which follows it) must find it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from consul_backend.errors import Conflict
from consul_backend.physical import LOCK_KEY
from consul_backend.txn import Delete, Op, Set
from tests.sim.checkers import Exemption
from tests.sim.client import FOLDER
from tests.sim.history import NEVER
from tests.sim.plan import Event

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

REINDEX_AFTER_S = 2.0


class Nemesis:
    """One world's."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(f"nemesis {world.plan.seed}")
        self._foreign = 0

    def act(self, event: Event) -> None:
        """Do it now."""
        world = self._world
        number = event.node if event.node >= 0 else self._leader()
        node = world.nodes[number]
        world.count(event.what)
        world.log(f"nemesis: {event.what} {node.process.name} for {event.for_s:.2f} s")
        actions: dict[str, Callable[[], None]] = {
            "pause": lambda: self._pause(node, event.for_s),
            "kill": lambda: self._kill_and_restart(number, event.for_s),
            "cut": lambda: self._cut(world.network.cut, node, event.for_s),
            "cut-refused": lambda: self._cut(world.network.refused, node, event.for_s),
            "clock": lambda: self._step_clock(node, event),
            "destroy-session": self._destroy_session,
            "pause-and-depose": lambda: self._pause_and_depose(node, event.for_s),
            "cut-and-depose": lambda: self._cut_and_depose(node, event.for_s),
            "delete-lock": self._delete_lock,
            "step-down": node.step_down,
            "leader-change": lambda: world.consul.change_leader(min(event.for_s, 2.0), stale_s=event.for_s / 4),
            "quorum-lost": lambda: world.consul.change_leader(event.for_s),
            "storm": lambda: self._storm(event.for_s),
            "reindex": self._reindex,
            "foreign-write": self._foreign_write,
        }
        actions[event.what]()

    def heal(self) -> None:
        """No fault from here on; whoever is dead starts again."""
        self._world.network.heal()
        for number, node in enumerate(self._world.nodes):
            if node.process.killed:
                self._world.start_node(number)
            self._unpause(node)

    def _leader(self) -> int:
        """Who holds the lock, serving or still recovering; the first node if nobody does."""
        consul = self._world.consul
        lock = consul.table.read(LOCK_KEY)
        holder = consul.session_owners.get(lock.session) if lock is not None else None
        return next((number for number, node in enumerate(self._world.nodes) if node.process.name == holder), 0)

    def _later(self, after_s: float, action: Callable[[], None]) -> None:
        self._world.loop.call_later(after_s, action)

    # -- nodes

    def _pause(self, node: Node, for_s: float) -> None:
        if not node.process.killed:
            node.process.paused = True
            self._later(for_s, lambda: self._unpause(node))

    def _unpause(self, node: Node) -> None:
        if node.process.paused and not node.process.killed:
            self._world.log(f"{node.process.name} goes on")
            self._world.loop.unpause(node.process)

    def _kill_and_restart(self, number: int, after_s: float) -> None:
        node = self._world.nodes[number]
        if node.process.killed:
            return
        self._world.kill(node)
        self._later(after_s, lambda: self._restart(number, node))

    def _restart(self, number: int, dead: Node) -> None:
        if self._world.nodes[number] is dead:
            self._world.start_node(number)

    def _step_clock(self, node: Node, event: Event) -> None:
        node.clock.step_ms += int((event.for_s - 7.0) * 1_000_000)

    # -- network and servers

    def _cut(self, links: set[str], node: Node, for_s: float) -> None:
        links.add(node.process.name)
        self._later(for_s, lambda: links.discard(node.process.name))

    def _storm(self, for_s: float) -> None:
        network = self._world.network
        network.stormy = True

        def calm() -> None:
            network.stormy = False

        self._later(for_s, calm)

    # -- the lock

    def _destroy_session(self) -> None:
        consul = self._world.consul
        lock = consul.table.read(LOCK_KEY)
        if lock is not None and lock.session:
            consul.end_session(lock.session)

    def _cut_and_depose(self, node: Node, for_s: float) -> None:
        """The leader loses its session and cannot learn of it."""
        self._cut(self._world.network.cut, node, for_s)
        self._destroy_session()

    def _pause_and_depose(self, node: Node, for_s: float) -> None:
        """The leader sleeps through the end of its tenure; what was on its way to it comes when it wakes."""
        self._pause(node, for_s)
        self._destroy_session()

    def _delete_lock(self) -> None:
        """Deleting the lock skips the lock-delay, which is the read lease: reads of that long are not judged."""
        world = self._world
        now_s = world.loop.time()
        world.exempt.append(Exemption(now_s, now_s + world.plan.election.lock_delay_s))
        self._behind_everyones_back(Delete(LOCK_KEY))

    # -- the data

    def _foreign_write(self) -> None:
        """Somebody writes into the data: another value, an old one, none, or a key that never was. Names have no digest
        that would show it, so from here on lists are not judged."""
        world, rnd = self._world, self._random
        now_s = world.loop.time()
        world.exempt.append(Exemption(now_s, NEVER, lists_only=True))
        self._later(REINDEX_AFTER_S, self._reindex)
        key = self._victim() if rnd.random() < 0.8 else None
        if key is None:
            self._foreign += 1
            key = f"{FOLDER}foreign/{self._foreign}"
            self._behind_everyones_back(Set(world.witness.where(key), b"nobody wrote this"))
        else:
            old = [value for _, value in world.witness.fold.versions[key][:-1] if value is not None]
            choices: list[bytes | None] = [None, b"nobody wrote this", *old[-1:]]
            value = rnd.choice(choices)
            where = world.witness.where(key)
            self._behind_everyones_back(Delete(where) if value is None else Set(where, value))
        world.witness.damaged.add(key)
        world.log(f"nemesis: {key} was changed by nobody")

    def _victim(self) -> str | None:
        """A key that a record of its own holds: the parts of a large batch are not what a repair looks into."""
        witness = self._world.witness
        keys = [
            key
            for key, versions in witness.fold.versions.items()
            if versions[-1][1] is not None
            and key not in witness.fold.unrolled
            and witness.records[versions[-1][0] - 1].header.large is None
        ]
        return self._random.choice(keys) if keys else None

    def _reindex(self) -> None:
        node = self._world.nodes[self._leader()]
        if node.store is not None and not node.process.killed:
            node.process.spawn(node.reindex())

    def _behind_everyones_back(self, op: Op) -> None:
        consul = self._world.consul
        try:
            consul.rules.txn([op], consul.now())
        except Conflict as error:
            raise AssertionError("a plain write is never refused") from error
