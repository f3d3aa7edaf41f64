"""Logical writes a second through the replicated store against raw Consul PUTs at the same concurrency.

A logical write is a key *and* its write-ahead-log record *and* the fencing and chain checks, in one Consul transaction
shared with whatever else was waiting. The two take turns for several rounds, so that a busy moment of the machine
hits both; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import percentile, result, spread, table
from consul_backend.clock import SystemClock
from consul_backend.election import Election, LeaderInfo
from consul_backend.replicated import ReplicatedStore, StoreOptions, genesis
from consul_backend.store import ConsulConfig, ConsulStore
from consul_backend.wal import Write
from tests.support.consul_server import ConsulServer

KEYS = 10_000


@dataclass
class Load:
    """What one side did in all rounds: writes a second per round, and every latency in seconds."""

    rates: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    writes: int = 0

    def row(self, name: str) -> list[str]:
        milliseconds = [f"{percentile(self.latencies_s, share) * 1000:.1f}" for share in (0.5, 0.99)]
        return [name, spread(self.rates), *milliseconds, f"{self.cpu_s / self.writes * 1e6:.0f}"]


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class RawConsul:
    """One keep-alive connection that does nothing but PUT: as little client as HTTP allows, so that the reference is
    Consul's speed and not that of a client library."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str) -> None:
        self._reader = reader
        self._writer = writer
        self._head = f"HTTP/1.1\r\nHost: consul\r\nX-Consul-Token: {token}\r\nContent-Length: "

    @classmethod
    async def connect(cls, address: str, token: str) -> RawConsul:
        """Dial ``host:port``."""
        host, port = address.rsplit(":", 1)
        return cls(*await asyncio.open_connection(host, int(port)), token)

    async def put(self, key: str, value: bytes) -> None:
        """One PUT. Raises RuntimeError unless Consul says true."""
        self._writer.write(f"PUT /v1/kv/{key} {self._head}{len(value)}\r\n\r\n".encode() + value)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        body = await self._reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200") or body.strip() != b"true":
            raise RuntimeError(f"raw PUT answered {head[:40]!r}")

    def close(self) -> None:
        """End the connection."""
        self._writer.close()


async def one_round(load: Load, write: Callable[[int], Awaitable[object]], writers: int, seconds: float) -> None:
    """``writers`` loops of ``write(n)`` for ``seconds``."""
    done = 0
    started, cpu_started = time.perf_counter(), cpu_s()
    deadline = started + seconds

    async def writer(number: int) -> None:
        nonlocal done
        n = number
        while (sent := time.perf_counter()) < deadline:
            await write(n)
            load.latencies_s.append(time.perf_counter() - sent)
            done += 1
            n = (n * 6364136223846793005 + 1442695040888963407) % 2**64

    async with asyncio.TaskGroup() as tasks:
        for number in range(writers):
            tasks.create_task(writer(number))
    load.rates.append(done / (time.perf_counter() - started))
    load.cpu_s += cpu_s() - cpu_started
    load.writes += done


async def measure(server: ConsulServer, writers: int, value_bytes: int, seconds: float, rounds: int) -> None:
    """Run the rounds and print the figures."""
    physical = ConsulStore(ConsulConfig(address=server.address, token=server.token, path="outrider/bench/"))
    await physical.open()
    clock = SystemClock()
    election = Election(physical, node_id="bench", advertise=lambda: LeaderInfo("bench", "", ""), clock=clock)
    await genesis(physical, "g1", [], node_id="bench", time_ms=clock.time_ms(), random_bytes=os.urandom)
    held = await election.campaign()
    keeping = asyncio.create_task(election.keep(held))
    store = await ReplicatedStore.recover(physical, "g1", held.tenure, StoreOptions(), clock=clock, lease=held.lease)
    running = asyncio.create_task(store.run())
    raw, logical = Load(), Load()
    value = os.urandom(value_bytes)
    counter = 0
    raw_clients = [await RawConsul.connect(server.address, server.token) for _ in range(writers)]
    idle = list(raw_clients)

    async def put_raw(n: int) -> None:
        nonlocal counter
        counter += 1
        client = idle.pop()
        try:
            await client.put(f"outrider/bench-raw/{n % KEYS}", counter.to_bytes(8, "big") + value[8:])
        finally:
            idle.append(client)

    async def put_logical(n: int) -> None:
        nonlocal counter
        counter += 1
        await store.commit([Write(f"r/bench/key/{n % KEYS}", counter.to_bytes(8, "big") + value[8:])])

    await one_round(Load(), put_raw, writers, 1.0)
    await one_round(Load(), put_logical, writers, 1.0)
    before = store.head.index
    for _ in range(rounds):
        await one_round(raw, put_raw, writers, seconds)
        await one_round(logical, put_logical, writers, seconds)
    for client in raw_clients:
        client.close()
    batch = logical.writes / max(1, store.head.index - before)
    ratios = [ours / theirs for ours, theirs in zip(logical.rates, raw.rates, strict=True)]
    print(
        f"{writers} concurrent writers, {value_bytes} B values, {KEYS:,} keys, {rounds} rounds of {seconds:.0f} s each"
    )
    table(
        ["", "writes/s", "p50 ms", "p99 ms", "client CPU µs/write"],
        [raw.row("raw Consul PUT"), logical.row("replicated store")],
    )
    busy = logical.cpu_s / (rounds * seconds)
    print(
        f"ratio {statistics.median(ratios):.2f}x [{min(ratios):.2f}-{max(ratios):.2f}], {batch:.1f} writes/transaction"
    )
    limit = "this process" if busy > 0.85 else "Consul (one transaction in flight, its Raft commit and JSON)"
    print(f"this process used {busy:.2f} of a core in the logical rounds: the limit is {limit}")
    running.cancel()
    keeping.cancel()
    await asyncio.wait([running, keeping])
    await election.release(held)
    await physical.close()
    result(
        "store_write",
        {
            "writers": writers,
            "value_bytes": value_bytes,
            "raw_puts_per_s": round(statistics.median(raw.rates)),
            "logical_writes_per_s": round(statistics.median(logical.rates)),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "p50_ms": round(percentile(logical.latencies_s, 0.5) * 1000, 2),
            "p99_ms": round(percentile(logical.latencies_s, 0.99) * 1000, 2),
            "raw_p50_ms": round(percentile(raw.latencies_s, 0.5) * 1000, 2),
            "raw_p99_ms": round(percentile(raw.latencies_s, 0.99) * 1000, 2),
            "writes_per_transaction": round(batch, 1),
            "core_share": round(busy, 2),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--writers", type=int, default=128)
    parser.add_argument("--value-bytes", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    server = ConsulServer()
    server.start()
    try:
        asyncio.run(measure(server, arguments.writers, arguments.value_bytes, arguments.seconds, arguments.rounds))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
