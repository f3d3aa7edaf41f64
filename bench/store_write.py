"""Logical writes a second through the replicated store against raw Consul PUTs at the same concurrency.

A logical write is a key *and* its write-ahead-log record *and* the fencing and chain checks, in one Consul transaction
shared with whatever else was waiting. The two take turns for several rounds, so that a busy moment of the machine
hits both; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.raw_load import RawLoad, Round, generator
from bench.report import percentile, result, spread, table
from consul_backend.clock import SystemClock
from consul_backend.election import Election, ElectionOptions, LeaderInfo
from consul_backend.limits import body_bytes
from consul_backend.physical import TxnResult
from consul_backend.replicated import ReplicatedStore, StoreOptions, genesis
from consul_backend.store import ConsulConfig, ConsulStore
from consul_backend.txn import Op
from consul_backend.wal import Write
from tests.support.consul_server import ConsulServer

KEYS = 10_000
GOALS = {1: "p50 at most 1.15x raw", 16: "1.1x", 128: "2.2x, p99 below raw's"}


class CountingStore(ConsulStore):
    """Counts the bytes of transactions while ``counting``."""

    counting = False
    sent_bytes = 0

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        if self.counting:
            self.sent_bytes += body_bytes(ops, self.limits.prefix_bytes)
        return await super().txn(ops)


@dataclass
class Side:
    """What one side did in all rounds; processor seconds of this process and of Consul."""

    rounds: list[Round] = field(default_factory=list)
    own_s: float = 0.0
    consul_s: float = 0.0

    @property
    def writes(self) -> int:
        return sum(one.requests for one in self.rounds)

    def median(self, what: str) -> float:
        return float(statistics.median(getattr(one, what) for one in self.rounds))

    def row(self, name: str, own: str) -> list[str]:
        rates = spread([one.rate for one in self.rounds])
        latencies = [f"{self.median(what) * 1000:.2f}" for what in ("p50_s", "p99_s")]
        return [name, rates, *latencies, own, f"{self.consul_s / self.writes * 1e6:.0f}"]


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Bench:
    """One server, one active store on it, and both ways to write."""

    def __init__(self, server: ConsulServer, physical: CountingStore, store: ReplicatedStore, value: bytes) -> None:
        self.server, self.physical, self.store, self.value = server, physical, store, value
        self._written = 0

    async def logical(self, writers: int, seconds: float) -> Round:
        """``writers`` callers that each wait for one commit before the next."""
        latencies: list[float] = []
        started = time.perf_counter()

        async def write(n: int) -> None:
            while (sent := time.perf_counter()) < started + seconds:
                n = (n * 6364136223846793005 + 1442695040888963407) % 2**64
                self._written += 1
                value = self._written.to_bytes(8, "big") + self.value
                await self.store.commit([Write(f"r/bench/key/{(n >> 32) % KEYS}", value)])
                latencies.append(time.perf_counter() - sent)

        async with asyncio.TaskGroup() as tasks:
            for n in range(writers):
                tasks.create_task(write(self._written + n))
        rate = len(latencies) / (time.perf_counter() - started)
        return Round(rate, percentile(latencies, 0.5), percentile(latencies, 0.99), len(latencies))

    async def turns(self, writers: int, seconds: float, rounds: int) -> None:
        """Both sides in turns; prints the figures."""
        raw_load = RawLoad(
            self.server.address, self.server.token, connections=writers, keys=KEYS, value_bytes=len(self.value) + 8
        )
        await raw_load.round(1.0)
        await self.logical(writers, 1.0)
        raw, ours = Side(), Side()
        records, busy_s, load = 0, 0.0, os.getloadavg()[0]
        for _ in range(rounds):
            consul = self.server.cpu_s
            raw.rounds.append(await raw_load.round(seconds))
            raw.consul_s += self.server.cpu_s - consul
            own, consul, head, began = cpu_s(), self.server.cpu_s, self.store.head.index, time.perf_counter()
            ours.rounds.append(await self.logical(writers, seconds))
            ours.own_s += cpu_s() - own
            ours.consul_s += self.server.cpu_s - consul
            busy_s += time.perf_counter() - began
            records += self.store.head.index - head
        self.physical.counting, self.physical.sent_bytes = True, 0
        counted = await self.logical(writers, 1.0)
        self.physical.counting = False
        amplification = self.physical.sent_bytes / (counted.requests * (len(self.value) + 8))
        ratios = [mine.rate / theirs.rate for mine, theirs in zip(ours.rounds, raw.rounds, strict=True)]
        p50_ratios = [mine.p50_s / theirs.p50_s for mine, theirs in zip(ours.rounds, raw.rounds, strict=True)]
        figures = {
            "writers": writers,
            "load_generator": raw_load.name,
            "load_average": round(load, 1),
            "raw_puts_per_s": round(raw.median("rate")),
            "logical_writes_per_s": round(ours.median("rate")),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "p50_ms": round(ours.median("p50_s") * 1000, 2),
            "p99_ms": round(ours.median("p99_s") * 1000, 2),
            "raw_p50_ms": round(raw.median("p50_s") * 1000, 2),
            "raw_p99_ms": round(raw.median("p99_s") * 1000, 2),
            "p50_ratio": round(statistics.median(p50_ratios), 2),
            "writes_per_transaction": round(ours.writes / max(1, records), 1),
            "own_cpu_us_per_write": round(ours.own_s / ours.writes * 1e6, 1),
            "consul_cpu_us_per_write": round(ours.consul_s / ours.writes * 1e6, 1),
            "raw_consul_cpu_us_per_put": round(raw.consul_s / raw.writes * 1e6, 1),
            "bytes_per_logical_byte": round(amplification, 2),
            "core_share": round(ours.own_s / busy_s, 2),
        }
        print(f"\n{writers} writers, {len(self.value) + 8} B values, {KEYS:,} keys, {rounds} rounds of {seconds:.0f} s")
        own = f"{figures['own_cpu_us_per_write']:.0f}"
        table(
            ["", "writes/s", "p50 ms", "p99 ms", "own CPU µs/write", "Consul's CPU µs/write"],
            [raw.row(f"raw PUT, {raw_load.name}", "-"), ours.row("replicated store", own)],
        )
        print(
            "ratio {ratio}x [{ratio_min}-{ratio_max}], p50 {p50_ratio}x, {writes_per_transaction} writes/transaction,"
            " {bytes_per_logical_byte} bytes to Consul per byte, {core_share} of a core, load {load_average}".format(
                **figures
            )
            + (f" (goal: {GOALS[writers]})" if writers in GOALS else "")
        )
        result("store_write", figures)


@asynccontextmanager
async def prepared(server: ConsulServer, value_bytes: int) -> AsyncIterator[Bench]:
    """A tenure on ``server``."""
    physical = CountingStore(ConsulConfig(address=server.address, token=server.token, path="outrider/bench/"))
    await physical.open()
    clock = SystemClock()
    election = Election(
        physical,
        node_id="bench",
        advertise=lambda: LeaderInfo("bench", "", ""),
        clock=clock,
        options=ElectionOptions(beat_ttl_s=30.0),  # a machine so busy that beats are missed is not what is measured
    )
    await genesis(physical, "g1", [], node_id="bench", time_ms=clock.time_ms(), random_bytes=os.urandom)
    held = await election.campaign()
    keeping = asyncio.create_task(election.keep(held))
    store = await ReplicatedStore.recover(physical, "g1", held.tenure, StoreOptions(), clock=clock, lease=held.lease)
    running = asyncio.create_task(store.run())
    try:
        yield Bench(server, physical, store, os.urandom(value_bytes - 8))
    finally:
        running.cancel()
        keeping.cancel()
        await asyncio.wait([running, keeping])
        await election.release(held)
        await physical.close()


async def measure(server: ConsulServer, arguments: argparse.Namespace) -> None:
    async with prepared(server, arguments.value_bytes) as bench:
        for writers in arguments.writers:
            await bench.turns(writers, arguments.seconds, arguments.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--value-bytes", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    generator()
    # By default Consul takes 200 connections of one client, which is us and the load generator together.
    with ConsulServer(settings={"limits": {"http_max_conns_per_client": 2000}}) as server:
        asyncio.run(measure(server, arguments))


if __name__ == "__main__":
    main()
