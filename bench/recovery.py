"""Becoming active with few and with many keys, the checkpoint being equally far behind.

A store is filled, its index flushed, then a fixed number of random writes follows that only the log has. What a new
active node then needs until it commits its first record is measured, and what follows while it serves already: the
first read of a random key, its first write, all roots known, the whole index in memory.

Memory is what the kernel says of a process that does nothing else: how much larger it is once active, and with the
index loaded, than before. Python's own count of its objects, of another one, stands beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import result, table
from consul_backend.clock import SystemClock
from consul_backend.config import ConsulConfig
from consul_backend.embedded import EmbeddedStore
from consul_backend.index_check import Progress, check
from consul_backend.physical import EPOCH_KEY, LOCK_KEY, PhysicalStore
from consul_backend.read_lease import ReadLease
from consul_backend.replicated import ReplicatedStore, StoreOptions, genesis
from consul_backend.store import ConsulStore
from consul_backend.tenure import Tenure
from consul_backend.txn import Cas, Lock, Unlock
from consul_backend.wal import Write
from tests.support.consul_server import ConsulServer

GENERATION = "bench"
PARTITION = "0b8f2c1e-77aa-4d1c-9d0e-2f6f3a5f9a10"
BATCH = 61
CHECKED_KEYS_MAX = 100_000
"""A merkle-check reads every value: minutes at a million keys, and nothing that 100,000 do not show."""
FILLERS = 8
TOKEN = "OUTRIDER_BENCH_TOKEN"
OPTIONS = StoreOptions(flush_interval_s=3600, collect_interval_s=1.0, wal_keep_records=512, index_warm_share=1.0)


def key_of(number: int) -> str:
    """A key as a key-value engine would make it."""
    return f"r/{PARTITION}/team-{number % 1000:04d}/app-{number * 2654435761 % 2**32:08x}/cfg{number % 97:02d}"


@dataclass(slots=True)
class Times:
    """Seconds of each repeat, and MiB: of the process once active, and with the index loaded; then as Python counts."""

    active: list[float] = field(default_factory=list)
    first_read: list[float] = field(default_factory=list)
    first_write: list[float] = field(default_factory=list)
    rooted: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    checked: list[float] = field(default_factory=list)
    active_mib: list[float] = field(default_factory=list)
    loaded_mib: list[float] = field(default_factory=list)
    active_traced_mib: list[float] = field(default_factory=list)
    loaded_traced_mib: list[float] = field(default_factory=list)


class Bench:
    """One physical store and the tenures on it."""

    def __init__(self, physical: PhysicalStore) -> None:
        self.physical = physical
        self._session = ""

    async def recover(self) -> ReplicatedStore:
        """Take the lock and recover."""
        return await self.active(await self.lead())

    async def lead(self) -> tuple[Tenure, ReadLease]:
        """End the tenure that is and take the lock."""
        physical, clock = self.physical, SystemClock()
        await self.leave()
        session = self._session = await physical.create_session("bench", beat_ttl_s=3600, lock_delay_s=0)
        found = await physical.get(EPOCH_KEY)
        number = int(found.value) + 1 if found else 1
        done = await physical.txn(
            [Lock(LOCK_KEY, b"", session), Cas(EPOCH_KEY, b"%d" % number, found.modify_index if found else 0)]
        )
        tenure = Tenure(number, "bench", session, done.modify_index)

        async def renew() -> bool:
            return await physical.renew_session(session)

        return tenure, ReadLease(clock, 3600.0, renew)

    async def leave(self) -> None:
        """Give the lock back, if this process has it."""
        if self._session:
            await self.physical.txn([Unlock(LOCK_KEY, b"", self._session)])
            await self.physical.destroy_session(self._session)
            self._session = ""

    async def active(self, held: tuple[Tenure, ReadLease]) -> ReplicatedStore:
        """From the lock to the first record of the tenure."""
        tenure, lease = held
        return await ReplicatedStore.recover(
            self.physical, GENERATION, tenure, OPTIONS, clock=SystemClock(), lease=lease
        )

    async def fill(self, keys: int, distance: int) -> None:
        """``keys`` keys with a flushed index, then ``distance`` writes that only the log has."""
        await genesis(
            self.physical,
            GENERATION,
            [Write("c/core/seal", b"seal")],
            node_id="bench",
            time_ms=SystemClock().time_ms(),
            random_bytes=os.urandom,
        )
        store = await self.recover()
        running = asyncio.create_task(store.run())
        numbers = iter(range(0, keys, BATCH))

        async def filler() -> None:
            for start in numbers:
                batch = range(start, min(start + BATCH, keys))
                await store.commit([Write(key_of(number), b"value %d" % number) for number in batch])

        await asyncio.gather(*(filler() for _ in range(FILLERS)))
        await self._stop(running)
        await store.flush()
        store = await self.recover()
        running = asyncio.create_task(store.run())
        rng = random.Random(3)
        for number in range(distance):
            await store.commit([Write(key_of(rng.randrange(keys)), b"later %d" % number)])
        await self._stop(running)

    async def _stop(self, running: asyncio.Task[None]) -> None:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    async def measure(self, keys: int, times: Times) -> None:
        """One recovery. Nothing is flushed, so the distance stays."""
        rng = random.Random()
        held = await self.lead()
        started = time.perf_counter()
        store = await self.active(held)
        times.active.append(time.perf_counter() - started)
        times.first_read.append(await self._timed(lambda: store.get(key_of(rng.randrange(keys)))))
        running = asyncio.create_task(store.run())
        write = Write(key_of(rng.randrange(keys)), os.urandom(8))
        times.first_write.append(await self._timed(lambda: store.commit([write])))
        times.rooted.append(await self._timed(store.rooted))
        times.loaded.append(await self._timed(store.load_index))
        await self._stop(running)

    async def weigh(self, measured_bytes: Callable[[], int]) -> tuple[float, float]:
        """One recovery more, not timed: MiB more than before it once active, and with the index loaded."""
        held = await self.lead()
        before = measured_bytes()
        store = await self.active(held)
        active = measured_bytes()
        running = asyncio.create_task(store.run())  # loads what nobody asks for
        await store.rooted()
        await store.load_index()
        loaded = measured_bytes()
        await self._stop(running)
        await self.leave()
        return (active - before) / 2**20, (loaded - before) / 2**20

    async def _timed(self, call: Callable[[], Awaitable[object]]) -> float:
        started = time.perf_counter()
        await call()
        return time.perf_counter() - started


def resident_bytes() -> int:
    """Memory of this process, as the kernel counts it."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def traced_bytes() -> int:
    """Memory that Python's objects hold, of those made since the tracing began."""
    return tracemalloc.get_traced_memory()[0]


async def weighed(physical: PhysicalStore, *, traced: bool) -> None:
    """What a process of its own does, and prints."""
    await physical.open()
    if traced:
        tracemalloc.start()
    print(json.dumps(await Bench(physical).weigh(traced_bytes if traced else resident_bytes)))
    await physical.close()


async def weigh(times: Times, where: Sequence[str], token: str, *, traced: bool) -> None:
    """Have a process of its own weigh the store at ``where``, which nobody else has open."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--weigh", *where, *(["--traced"] if traced else [])),
        env={**os.environ, TOKEN: token},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    active_mib, loaded_mib = json.loads(out)
    (times.active_traced_mib if traced else times.active_mib).append(active_mib)
    (times.loaded_traced_mib if traced else times.loaded_mib).append(loaded_mib)


async def one_size(physical: PhysicalStore, keys: int, distance: int, repeats: int) -> Times:
    """All repeats with one number of keys, without memory."""
    await physical.open()
    bench, times = Bench(physical), Times()
    try:
        await bench.fill(keys, distance)
        for _ in range(repeats):
            gc.collect()  # the index of the repeat before is not what this one has to pay for
            await bench.measure(keys, times)
        if keys > CHECKED_KEYS_MAX:
            return times
        parts = (await bench.recover()).inspected()
        started = time.perf_counter()
        report = await check(parts, Progress())
        times.checked.append(time.perf_counter() - started)
        if report.corrupted or report.keys < keys:
            raise SystemExit(f"the merkle check found {report.problems or report.pages or report.keys}")
        return times
    finally:
        await bench.leave()
        await physical.close()


async def run(arguments: argparse.Namespace) -> None:
    rows, figures = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        for keys in arguments.keys:
            token, where = "", [f"{folder}/{keys}"]
            if arguments.store == "consul":
                server = servers.enter_context(ConsulServer())
                token, where = server.token, [server.address, f"outrider/bench-{keys}/"]
            else:
                os.mkdir(where[0])
            times = await one_size(store_at(where, token), keys, arguments.distance, arguments.repeats)
            await weigh(times, where, token, traced=False)
            await weigh(times, where, token, traced=True)
            servers.close()
            found = {name: medians(getattr(times, name), name) for name in Times.__slots__}
            rows.append([f"{keys:,}", *("-" if value is None else f"{value:,.1f}" for value in found.values())])
            named = {name if name.endswith("_mib") else f"{name}_ms": value for name, value in found.items()}
            figures.append({"keys": keys, **named})
    print(f"store: {arguments.store}; {arguments.distance:,} records since the checkpoint; ms, medians")
    header = ("keys", "until active", "then first read", "first write", "roots known", "all loaded", "merkle-check")
    table((*header, "MiB active", "MiB loaded", "traced", "traced"), rows)
    result("recovery", {"store": arguments.store, "distance": arguments.distance, "sizes": figures})


def store_at(where: Sequence[str], token: str) -> PhysicalStore:
    """A folder of an embedded store, or address and path of one in Consul."""
    if len(where) == 1:
        return EmbeddedStore(where[0])
    return ConsulStore(ConsulConfig(address=where[0], token=token, path=where[1]))


def medians(samples: list[float], name: str) -> float | None:
    """The median, times in milliseconds; None for none."""
    return round(statistics.median(samples) * (1 if name.endswith("_mib") else 1e3), 2) if samples else None


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=("embedded", "consul"), default="embedded")
    parser.add_argument("--keys", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--distance", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weigh", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.weigh:
        asyncio.run(weighed(store_at(arguments.weigh, os.environ[TOKEN]), traced=arguments.traced))
    else:
        asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
