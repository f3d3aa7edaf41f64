"""Clients of a set: each speaks to one cluster, writes there or through it, and reads back what it was promised."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from sidecar.replication.modes import PERFORMANCE
from tests.sim.clusters.cluster import Cluster, Gone
from tests.sim.clusters.lineage import is_taken
from tests.sim.clusters.node import MOUNT_1, MOUNT_2, Order, Told
from tests.sim.history import Write
from tests.sim.witness import Violation

if TYPE_CHECKING:
    from tests.sim.clusters.world import SetWorld

RETRY_S = 0.2
PATIENCE_S = 8.0


def key_name(number: int) -> str:
    """Keys of two mounts and of a system area; every seventh is local."""
    if number % 7 == 6:
        return f"l/local/{number}"
    return f"{(f'r/{MOUNT_1}/k', f'r/{MOUNT_2}/k', 'r/policy/k')[number % 3]}/{number}"


class Client:
    """One client, one operation at a time."""

    def __init__(self, world: SetWorld, cluster: Cluster, name: str, rnd: random.Random) -> None:
        self.name = name
        self._world = world
        self._plan = world.plan
        self._cluster = cluster
        self._random = rnd

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if self._cluster.active() is None:
                await asyncio.sleep(RETRY_S)
                continue
            if self._random.random() < self._plan.read_share:
                await self._read(key_name(self._random.randrange(self._plan.keys)))
            elif not self._world.quiet:
                await self._write()
            await asyncio.sleep(self._random.expovariate(1.0 / self._plan.think_s))

    async def _read(self, key: str) -> Told | None:
        cluster, world = self._cluster, self._world
        try:
            told = await cluster.ask(lambda node: node.show(key), patience_s=PATIENCE_S)
        except Gone:
            return None
        if told.outcome != "ok":
            return None
        world.count("read")
        world.note(f"{self.name} read {key} {told.value!r:.20}")
        seen = {cluster.value_at(key, told.low)}
        seen |= {value for at, value in cluster.witness.fold.versions.get(key, ()) if at > told.low}
        if told.value not in seen:
            what = f"{self.name} read {key} = {told.value!r:.40}, which it was not from record {told.low} on"
            cluster.report(Violation("P3", what))
        return told

    async def _write(self) -> None:
        world = self._world
        number = len(world.writes)
        write = Write(number, self.name, self._entries(number), world.loop.time())
        world.writes.append(write)
        order = Order(number, dict(write.entries))
        try:
            told = await self._cluster.ask(lambda node: node.order(order), patience_s=PATIENCE_S)
        except Gone:
            return
        world.note(f"{self.name} {number} {told.outcome} {told.index} {told.forwarded} {told.late}")
        if told.outcome == "fail":
            world.told_failed.add(number)
        if told.outcome == "ok":
            world.acknowledged += 1
            if write.outcome != "ok":
                self._cluster.report(Violation("P1", f"batch {number} is acknowledged, and was {write.outcome}"))
            if told.forwarded:
                world.count("forwarded late" if told.late else "forwarded")
                await self._read_own(write, told)

    async def _read_own(self, write: Write, told: Told) -> None:
        """P9: what went through this cluster without a warning is seen here at once, by whoever asks the same node."""
        if told.late or not told.index:
            return
        source = self._world.clusters[self._world.begun[write.number]]
        key = self._random.choice(sorted(write.entries))
        role = self._cluster.secondary_role(PERFORMANCE)
        position = self._cluster.witness.records[-1].header.positions.get(PERFORMANCE.name)
        if role is None or position is None or position.generation != source.generation:
            return  # it was pointed at another primary meanwhile
        if not is_taken(role, key):
            return
        now = len(source.witness.records)
        shown = await self._read(key)
        after = self._cluster.witness.records[-1].header.positions.get(PERFORMANCE.name)
        if shown is None or after is None or after.generation != source.generation:
            return
        if self._cluster.secondary_role(PERFORMANCE) != role:
            return
        allowed = {source.value_at(key, told.index)}
        allowed |= {value for at, value in source.witness.fold.versions.get(key, ()) if told.index < at}
        self._world.count("own write read")
        if shown.value not in allowed:
            what = (
                f"{self.name} wrote {key} as record {told.index} of {source.name} ({now} now), and reads another value"
            )
            self._cluster.report(Violation("P9", what))

    def _entries(self, number: int) -> dict[str, bytes | None]:
        plan, rnd = self._plan, self._random
        entries: dict[str, bytes | None] = {}
        local = rnd.random() < 0.1
        if not local and rnd.random() < plan.large_share:
            count = rnd.randint(plan.limits.ops_max // 2, plan.limits.ops_max + 8)
            names = rnd.sample(range(plan.limits.ops_max + 8), count)
            entries = {f"r/{MOUNT_1}/many/{name}": self._value(number) for name in names}
        for _ in range(rnd.choice((1, 1, 2, 4))):
            key = key_name(rnd.randrange(plan.keys))
            if key.startswith("l/") == local:
                entries[key] = None if rnd.random() < plan.delete_share else self._value(number)
        marker = "l/local" if local else f"r/{rnd.choice((MOUNT_1, MOUNT_2))}"
        if not entries or None in entries.values():
            entries[f"{marker}/marker/{number}"] = self._value(number)
        return entries

    def _value(self, number: int) -> bytes:
        return b"%d " % number + b"." * self._random.randint(0, self._plan.value_bytes)
