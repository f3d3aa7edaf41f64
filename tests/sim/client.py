"""Clients: they write, read and list, believe what they are told, and write it down."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from consul_backend.replicated import Write as StoreWrite
from tests.sim.history import Listing, Read, Write
from tests.sim.node import Node, Reply
from tests.sim.witness import Violation

if TYPE_CHECKING:
    from tests.sim.world import World

PARTITION = "p1"
FOLDER = f"r/{PARTITION}/k/"
RETRY_S = 0.25


def key_name(number: int) -> str:
    """Most keys share a folder; some are local or in other partitions."""
    if number % 5:
        return f"{FOLDER}{number}"
    return f"{'l' if number % 2 else 'r'}/p{number % 3}/odd/{number}"


class Client:
    """One client, with one operation at a time."""

    def __init__(self, world: World, name: str, rnd: random.Random) -> None:
        self.name = name
        self.healthy_writes = 0
        self.healthy_reads = 0
        self._world = world
        self._plan = world.plan
        self._random = rnd

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            node = self._pick()
            if node is not None:
                healthy = self._world.healed_s is not None
                draw = self._random.random()
                if draw >= self._plan.read_share and not self._world.quiet:
                    ok = await self._write(node)
                    self.healthy_writes += ok and healthy
                elif draw < 0.1 * self._plan.read_share:
                    await (self._list(node) if draw < 0.07 * self._plan.read_share else self._follow(node))
                else:
                    ok = await self._read(node)
                    self.healthy_reads += ok and healthy
            await asyncio.sleep(self._random.expovariate(1.0 / self._plan.think_s) if node else RETRY_S)

    def _pick(self) -> Node | None:
        """Mostly who seems to lead; a deposed node that does not know it yet is asked as well."""
        serving = [node for node in self._world.nodes if node.store is not None]
        return self._random.choice(serving) if serving else None

    async def _ask(self, node: Node, work: Callable[[], Awaitable[Reply]]) -> Reply | None:
        """The node's answer, or None: it died, or nothing came for a long time."""
        world = self._world
        answer: asyncio.Future[Reply] = world.loop.create_future()
        await asyncio.sleep(self._latency())
        process = node.process

        async def serve() -> None:
            reply = await work()
            world.deliver(self._latency(), answer, reply)

        if process.killed:
            return None
        world.expect(process, answer)
        process.spawn(serve())
        try:
            return await asyncio.wait_for(answer, self._plan.patience_s)
        except (TimeoutError, ConnectionError):
            return None

    def _latency(self) -> float:
        return self._random.expovariate(1.0 / self._plan.usual_s)

    async def _write(self, node: Node) -> bool:
        world, rnd = self._world, self._random
        number = len(world.history.writes) + 1
        entries: dict[str, bytes | None] = {}
        if rnd.random() < self._plan.large_share:
            entries = self._large(number)
        keys = rnd.sample(range(self._plan.keys), min(self._plan.keys, rnd.choice((1, 1, 1, 2, 3))))
        for key in keys:
            entries[key_name(key)] = None if rnd.random() < 0.2 else self._value(number)
        if None in entries.values() or rnd.random() < self._plan.marker_share:
            entries[f"r/{PARTITION}/marker/{number}"] = self._value(number)
        write = Write(number, self.name, entries, world.loop.time())
        world.history.writes.append(write)
        reply = await self._ask(node, lambda: node.write([StoreWrite(key, value) for key, value in entries.items()]))
        if reply is not None and reply.outcome in ("fail", "standby"):
            write.outcome = "fail"
        elif reply is not None and reply.outcome == "ok":
            write.outcome, write.index, write.completed_s = "ok", reply.index, world.loop.time()
        world.note(f"{self.name} {number} {write.outcome} {write.index}")
        return write.outcome == "ok"

    def _large(self, number: int) -> dict[str, bytes | None]:
        """More than one transaction holds: many entries, or a value of many parts."""
        limits, rnd = self._plan.limits, self._random
        if rnd.random() < 0.3:
            size = rnd.randint(limits.body_bytes_max // 4, 2 * limits.body_bytes_max)
            return {f"r/{PARTITION}/huge/{rnd.randrange(3)}": self._value(number) + bytes(size)}
        count = rnd.randint(limits.ops_max // 2, 2 * limits.ops_max)
        return {f"{FOLDER}many/{name}": self._value(number) for name in rnd.sample(range(2 * limits.ops_max), count)}

    def _value(self, number: int) -> bytes:
        return b"%d of %s " % (number, self.name.encode()) + b"." * self._random.randint(0, self._plan.value_bytes)

    async def _read(self, node: Node) -> bool:
        world = self._world
        number = self._random.randrange(self._plan.keys)
        key = key_name(number)
        started_s = world.loop.time()
        reply = await self._ask(node, lambda: node.read(key))
        if reply is None or reply.outcome != "ok":
            return reply is not None and reply.outcome == "foreign"
        world.history.reads.append(Read(self.name, key, reply.value, started_s, world.loop.time()))
        world.note(f"{self.name} read {key} {reply.value!r:.20}")
        return True

    async def _list(self, node: Node) -> None:
        world = self._world
        started_s = world.loop.time()
        reply = await self._ask(node, lambda: node.list(FOLDER))
        if reply is not None and reply.outcome == "ok":
            names = frozenset(name for name in reply.names if not name.endswith("/"))
            world.history.listings.append(Listing(self.name, FOLDER, names, started_s, world.loop.time()))
            world.note(f"{self.name} listed {len(names)}")

    async def _follow(self, node: Node) -> None:
        """Read the log from somewhere on: record by record what the witness saw, or gone because it was collected."""
        witness = self._world.witness
        start = self._random.randint(1, max(1, len(witness.records)))
        reply = await self._ask(node, lambda: node.follow(start))
        if reply is None or self._world.restored or reply.outcome not in ("ok", "gone"):
            return
        expected = witness.records[start - 1 : start - 1 + len(reply.records)]
        # A segment counts as gone a moment before it is deleted; what recovery reads may never be.
        needed = witness.checkpoint.scan_from if witness.checkpoint is not None else 1
        same = [record.chain_hash for record in reply.records] == [record.chain_hash for record in expected]
        if not same or (reply.outcome == "gone" and start >= max(needed, witness.oldest_index)):
            what = f"{node.process.name} answered {reply.outcome} and {len(reply.records)} records from {start} on"
            self._world.report(Violation("P2", f"{what}, which are not those that were written"))
