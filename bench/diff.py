"""The diff of two indexes of a million keys of which a hundred differ: bytes on the wire both ways, round trips, CPU.

Primary and secondary are stores in memory with the real index; what travels is encoded and decoded as on the wire. The
entries themselves are counted apart: they have to travel whatever the protocol is.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import PeakMemory, result, table
from consul_backend.clock import SystemClock
from consul_backend.merkle import Forest, entry_digest
from sidecar.replication import protocol as wire
from sidecar.replication.answers import answer_diff, answer_fetch
from sidecar.replication.hello import Source
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.states import Event
from sidecar.replication.sync import Syncer
from tests.support.replication import MemoryStore

SOURCE = Source("primary-cluster", "set", "generation", 1, "epoch-id")
GOAL_DIFFERING = 100
BYTES_MAX = 100 * 1000
CPU_S_MAX = 2.0


def key_of(number: int, partitions: int) -> str:
    """A key as a key-value engine would make it."""
    partition = f"{number % partitions:08x}-77aa-4d1c-9d0e-2f6f3a5f9a10"
    return f"r/{partition}/team-{number % 1000:04d}/app-{number * 2654435761 % 2**32:08x}/cfg{number % 97:02d}"


@dataclass(slots=True)
class Traffic:
    """What was counted."""

    request: int = 0
    reply: int = 0
    fetch: int = 0
    answer: int = 0
    entries: int = 0
    primary_cpu_s: float = 0.0

    @property
    def overhead(self) -> int:
        """Everything but the entries."""
        return self.request + self.reply + self.fetch + self.answer - self.entries


class Wire:
    """Both round trips as function calls; the primary's CPU is timed."""

    def __init__(self, primary: MemoryStore, traffic: Traffic) -> None:
        self._primary = primary
        self._traffic = traffic

    async def request(self, request: wire.DiffRequest) -> wire.DiffReply:
        """First round trip."""
        raw = wire.encode(request)
        started = time.process_time()
        reply = wire.encode(
            await answer_diff(self._primary, SOURCE, wire.decode_diff_request(raw), mode=PERFORMANCE, hold_as="bench")
        )
        self._traffic.primary_cpu_s += time.process_time() - started
        self._traffic.request += len(raw)
        self._traffic.reply += len(reply)
        return wire.decode_diff_reply(reply)

    async def fetch(self, request: wire.FetchRequest) -> AsyncIterator[bytes]:
        """Second round trip."""
        raw = wire.encode(request)
        self._traffic.fetch += len(raw)
        started = time.process_time()
        chunks = [
            chunk async for chunk in answer_fetch(self._primary, wire.decode_fetch_request(raw), mode=PERFORMANCE)
        ]
        self._traffic.primary_cpu_s += time.process_time() - started
        for chunk in chunks:
            self._traffic.answer += len(chunk)
            frame = wire.decode_from_fetch(chunk[wire.LENGTH_BYTES :])
            if isinstance(frame, wire.Entries):
                self._traffic.entries += sum([len(key) + len(value) for key, value in frame.puts])
            yield chunk


def fill(keys: int, partitions: int) -> tuple[MemoryStore, MemoryStore]:
    """Two stores with the same keys; values are made up from the key, so that only the index takes memory."""
    primary, secondary = MemoryStore("primary"), MemoryStore("secondary", writes_max=10**9)
    for store in (primary, secondary):
        store.forest = Forest()
        store.forest.apply((key_of(number, partitions), entry_digest("k", b"%d" % number)) for number in range(keys))
        store.forest.root("r")
    return primary, secondary


async def run(keys: int, differing: int, partitions: int) -> dict[str, float | int | bool]:
    """One diff and sync."""
    primary, secondary = fill(keys, partitions)
    rng = random.Random(4)
    for number in rng.sample(range(keys), differing):
        primary.write((key_of(number, partitions), rng.randbytes(100)))
    primary.oldest_index = primary.head.index
    traffic = Traffic()
    link = Wire(primary, traffic)

    async def on_applied(names: object) -> None:
        return None

    syncer = Syncer(
        PERFORMANCE,
        secondary,
        link.request,
        link.fetch,
        on_applied=on_applied,
        gate=lambda progress: None,
        on_event=lambda event: None,
        clock=SystemClock(),
    )
    with PeakMemory() as memory:
        started = time.process_time()
        done = await syncer.run()
        cpu_s = time.process_time() - started
    if done.event is not Event.SYNCED:
        raise SystemExit(f"the sync ended as {done.event}: {done.reason}")
    secondary_cpu_s = cpu_s - traffic.primary_cpu_s
    small = traffic.overhead <= BYTES_MAX and max(secondary_cpu_s, traffic.primary_cpu_s) < CPU_S_MAX
    met = small or differing > GOAL_DIFFERING
    return {
        "keys": keys,
        "differing": differing,
        "partitions": partitions,
        "request_bytes": traffic.request,
        "reply_bytes": traffic.reply,
        "fetch_bytes": traffic.fetch,
        "answer_bytes": traffic.answer - traffic.entries,
        "entry_bytes": traffic.entries,
        "total_bytes": traffic.overhead,
        "round_trips": done.round_trips,
        "primary_cpu_ms": round(traffic.primary_cpu_s * 1e3, 1),
        "secondary_cpu_ms": round(secondary_cpu_s * 1e3, 1),
        "memory_mib": round(memory.mib, 1),
        "met": met and done.round_trips == 2 and done.keys == differing,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--differing", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--partitions", type=int, nargs="+", default=[1, 10])
    arguments = parser.parse_args()
    runs = [
        asyncio.run(run(keys, differing, partitions))
        for keys in arguments.keys
        for differing in arguments.differing
        if differing <= keys // 10
        for partitions in arguments.partitions
    ]
    columns = [name for name in runs[0] if name != "met"]
    print(f"Goal for 100 that differ of 1,000,000: <= {BYTES_MAX:,} bytes in all, < {CPU_S_MAX:.0f} s each")
    table([name.replace("_", " ") for name in columns], [[f"{one[name]:,}" for name in columns] for one in runs])
    result("diff", {"runs": runs})


if __name__ == "__main__":
    main()
