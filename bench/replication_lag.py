"""From the primary's acknowledgement to readable on the secondary, at a steady rate of new keys.

Every write goes through the primary's HTTP API; one reader asks the secondary's HTTP API for the oldest key it has not
seen yet, again and again. So each lag includes up to one read of the secondary (its own time is reported as well).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp

from bench.pair import replicating_pair
from bench.report import percentile, result, table


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds, each in the order in which they were measured."""

    lags_s: list[float] = field(default_factory=list)
    writes_s: list[float] = field(default_factory=list)
    reads_s: list[float] = field(default_factory=list)


async def measure(primary: str, primary_token: str, secondary: str, token: str, rate: float, seconds: float) -> Samples:
    """Write and watch."""
    total = int(rate * seconds)
    acknowledged: dict[int, float] = {}
    news = asyncio.Event()
    samples = Samples()
    value = os.urandom(128).hex()
    async with aiohttp.ClientSession() as session:

        async def write(n: int) -> None:
            sent = time.perf_counter()
            async with session.post(
                f"{primary}/v1/bench/key/{n}", json={"value": value}, headers={"X-Vault-Token": primary_token}
            ) as answer:
                await answer.read()
                answer.raise_for_status()
            acknowledged[n] = time.perf_counter()
            samples.writes_s.append(acknowledged[n] - sent)
            news.set()

        async def writer() -> None:
            started = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for n in range(total):
                    await asyncio.sleep(max(0.0, started + n / rate - time.perf_counter()))
                    tasks.create_task(write(n))

        async def reader() -> None:
            for n in range(total):
                while n not in acknowledged:
                    news.clear()
                    await news.wait()
                while True:
                    asked = time.perf_counter()
                    async with session.get(f"{secondary}/v1/bench/key/{n}", headers={"X-Vault-Token": token}) as answer:
                        await answer.read()
                        status = answer.status
                    now = time.perf_counter()
                    samples.reads_s.append(now - asked)
                    if status == 200:
                        samples.lags_s.append(now - acknowledged[n])
                        break
                    if status != 404:
                        raise RuntimeError(f"the secondary answered {status}")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(writer())
            tasks.create_task(reader())
    return samples


def show(samples: Samples, rate: float, seconds: float) -> None:
    """Print the table and the figures."""
    lags_s, writes_s, reads_s = samples.lags_s, samples.writes_s, samples.reads_s

    def row(name: str, taken_s: list[float]) -> list[str]:
        return [name, f"{len(taken_s):,}", *(f"{percentile(taken_s, share) * 1000:.1f}" for share in (0.5, 0.99, 1.0))]

    print(f"{rate:.0f} writes/s of new keys for {seconds:.0f} s, two real Consul servers on this machine")
    table(
        ["", "samples", "p50 ms", "p99 ms", "max ms"],
        [
            row("write on the primary", writes_s),
            row("acknowledged -> readable on the secondary", lags_s),
            row("one read of the secondary", reads_s),
        ],
    )
    result(
        "replication_lag",
        {
            "writes_per_s": rate,
            "lag_p50_ms": round(percentile(lags_s, 0.5) * 1000, 2),
            "lag_p99_ms": round(percentile(lags_s, 0.99) * 1000, 2),
            "lag_to_write_ratio_p50": round(percentile(lags_s, 0.5) / percentile(writes_s, 0.5), 2),
            "write_p50_ms": round(percentile(writes_s, 0.5) * 1000, 2),
            "write_p99_ms": round(percentile(writes_s, 0.99) * 1000, 2),
            "read_p50_ms": round(percentile(reads_s, 0.5) * 1000, 2),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    arguments = parser.parse_args()
    with replicating_pair() as (primary, secondary, token):
        here, there = primary.wait_active(), secondary.wait_active()
        samples = asyncio.run(
            measure(here.address, primary.root_token, there.address, token, arguments.rate, arguments.seconds)
        )
    show(samples, arguments.rate, arguments.seconds)


if __name__ == "__main__":
    main()
