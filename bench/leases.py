"""100,000 leases: making them, taking over with them, and revoking them all when they end together.

The engine's own work is nothing; what is measured is the store, the schedule and the loop. The longest stall is how
late a task was that wants to run every millisecond: the same loop keeps the cluster's lock alive. On a machine that
does other work too, compare it with the stall of doing nothing, and the CPU time rather than the rates.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.recovery import GENERATION, Bench
from bench.report import result, table
from consul_backend.clock import SystemClock
from consul_backend.config import ConsulConfig
from consul_backend.embedded import EmbeddedStore
from consul_backend.physical import PhysicalStore
from consul_backend.replicated import genesis
from consul_backend.store import ConsulStore
from consul_backend.wal import Write
from plugin_api.engine import Engine, EngineContext, MountInfo
from plugin_api.request import IssuedLease, Lease, Request, Response
from plugin_api.testing import make_context
from sidecar.core.barrier import Barrier
from sidecar.core.keyring import Keyring
from sidecar.core.leasing import Leasing
from sidecar.core.schedule import Schedule
from sidecar.core.store_view import SealedStore
from sidecar.core.token_entry import CreateToken
from tests.support.consul_server import ConsulServer

MAKERS = 128
TTL_S = (600, 7200)


class Nothing(Engine):
    """Takes back what it never gave."""

    type_name = "nothing"

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        self.revoked = 0

    async def handle(self, request: Request) -> Response | None:
        return None

    async def revoke(self, lease: IssuedLease) -> None:
        self.revoked += 1


@dataclass
class Clock:
    """Unix seconds that the bench moves."""

    now_s: float

    def __call__(self) -> float:
        return self.now_s


@dataclass(frozen=True)
class Phase:
    """Seconds that something took, of them in this process, and the longest it kept another task from running."""

    took_s: float
    cpu_s: float
    stall_s: float

    def row(self, name: str, leases: int = 0) -> tuple[str, ...]:
        each = (f"{leases / self.took_s:,.0f}", f"{self.cpu_s / leases * 1e3:,.2f}") if leases else ("", "")
        return (name, f"{self.took_s:,.1f}", *each, f"{self.stall_s * 1e3:,.1f}")


async def phase(work: Callable[[], Awaitable[object]]) -> Phase:
    """Run ``work`` next to a task that wants to run every millisecond."""
    loop, worst = asyncio.get_running_loop(), 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            wanted = loop.time() + 0.001
            await asyncio.sleep(0.001)
            worst = max(worst, loop.time() - wanted)

    watching = asyncio.create_task(watch())
    started, cpu = time.perf_counter(), time.process_time()
    await work()
    took, cpu = time.perf_counter() - started, time.process_time() - cpu
    await asyncio.sleep(0.002)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    return Phase(took, cpu, worst)


async def measure(physical: PhysicalStore, leases: int) -> None:
    """All three, in order."""
    await physical.open()
    bench, clock = Bench(physical), Clock(time.time())
    engine = Nothing(make_context(path="db/", type_name="nothing"))
    mount: MountInfo = engine.context.mount
    barrier = Barrier(os.urandom(32), Keyring.generate(0, os.urandom), Keyring.generate(0, os.urandom))
    await genesis(
        physical,
        GENERATION,
        [Write("c/core/seal", b"seal")],
        node_id="bench",
        time_ms=SystemClock().time_ms(),
        random_bytes=os.urandom,
    )

    async def tenure() -> tuple[Leasing, asyncio.Task[None]]:
        store = await bench.recover()
        sealed = SealedStore(store, barrier)
        node = Leasing(sealed, Schedule(sealed, clock), lambda _: engine, clock, lambda: True)
        return node, asyncio.create_task(store.run())

    leasing, running = await tenure()
    await leasing.load()
    idle = await phase(lambda: asyncio.sleep(3))
    holder = (await leasing.tokens.create(CreateToken(policies=["a"]))).entry
    numbers, rng = iter(range(leases)), random.Random(1)

    async def maker() -> None:
        for number in numbers:
            lease = Lease(ttl_s=rng.randint(*TTL_S), internal={"username": f"v-{number}", "role": "app"})
            await leasing.leases.register(f"db/creds/app-{number % 50}", mount, lease, holder)

    made = await phase(lambda: asyncio.gather(*(maker() for _ in range(MAKERS))))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    leasing, running = await tenure()
    tracemalloc.start()
    loaded = await phase(leasing.load)
    loaded_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    clock.now_s += TTL_S[1] + 1
    ended = await phase(leasing.expiration.sweep)
    if engine.revoked != leases:
        raise SystemExit(f"{engine.revoked} of {leases} leases were revoked")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await physical.close()
    show(leases, loaded_bytes, idle=idle, made=made, loaded=loaded, ended=ended)


def show(leases: int, loaded_bytes: int, *, idle: Phase, made: Phase, loaded: Phase, ended: Phase) -> None:
    """Print the table and the figures."""
    phases = {"nothing": idle, "take over": loaded}
    print(f"{leases:,} leases; {MAKERS} makers; {loaded_bytes:,} bytes in memory after taking over")
    table(
        ("", "seconds", "leases/s", "CPU ms a lease", "longest stall ms"),
        [made.row("make", leases), ended.row("revoke all", leases), *(each.row(name) for name, each in phases.items())],
    )
    result(
        "leases",
        {
            "leases": leases,
            "load_ms": round(loaded.took_s * 1e3, 1),
            "load_bytes": loaded_bytes,
            "made_per_s": round(leases / made.took_s),
            "made_cpu_ms": round(made.cpu_s / leases * 1e3, 3),
            "revoked_per_s": round(leases / ended.took_s),
            "revoked_cpu_ms": round(ended.cpu_s / leases * 1e3, 3),
            "stall_ms": {
                "idle": round(idle.stall_s * 1e3, 1),
                "make": round(made.stall_s * 1e3, 1),
                "load": round(loaded.stall_s * 1e3, 1),
                "revoke": round(ended.stall_s * 1e3, 1),
            },
        },
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=("embedded", "consul"), default="consul")
    parser.add_argument("--leases", type=int, default=100_000)
    arguments = parser.parse_args()
    if arguments.store == "consul":
        with ConsulServer() as server:
            config = ConsulConfig(address=server.address, token=server.token, path="outrider/bench-leases/")
            asyncio.run(measure(ConsulStore(config), arguments.leases))
    else:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(measure(EmbeddedStore(folder), arguments.leases))


if __name__ == "__main__":
    main()
