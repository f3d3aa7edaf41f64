"""Clusters for the replication benchmark: one node each on a Consul server of its own, the real store, cluster port and
replication, and no HTTP API, so that what is measured is replication. As a program it is one secondary, or many thin
ones, in a process of its own; commands and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import gc
import json
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from consul_backend.config import ConsulConfig
from consul_backend.replicated import ReplicatedStore, StoreOptions
from consul_backend.store import ConsulStore
from consul_backend.wal import Write
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.roles import SecondaryRole, decode_role
from sidecar.replication.states import Phase
from sidecar.replication.wiring import ReplicationOptions
from tests.support.replication_cluster import Cluster as Site
from tests.support.store import Cluster as Tenures
from tests.support.store import ran
from tests.support.thin_secondary import ThinSecondary

PARTITION = "r/0b8f2c1e-77aa-4d1c-9d0e-2f6f3a5f9a10"
BEAT_S = 1.0


class BenchStore:
    """A replicated store with the calls that the manager makes of a sealed one; nothing is encrypted."""

    def __init__(self, inner: ReplicatedStore) -> None:
        self._inner = inner
        self.data: dict[str, bytes] = {}  # no mounts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def put(self, key: str, value: bytes) -> None:
        """As the barrier's."""
        await self._inner.commit([Write(key, value)])

    async def delete(self, key: str) -> None:
        """As the barrier's."""
        await self._inner.commit([Write(key, None)])

    def encode(self, write: Write) -> Write:
        """Nothing is encrypted."""
        return write


@contextlib.asynccontextmanager
async def bench_store(
    address: str, token: str, path: str, entries: Sequence[Write] = (), options: StoreOptions | None = None
) -> AsyncIterator[BenchStore]:
    """A fresh generation at ``path``, led and running."""
    physical = ConsulStore(ConsulConfig(address=address, token=token, path=path))
    await physical.open()
    try:
        tenures = Tenures(physical)
        await tenures.genesis(*entries)
        tenures.physical = physical  # type: ignore[assignment]  # no fault injection in between
        store = await tenures.recover(options or StoreOptions(wal_keep_records=10**6, wal_keep_bytes=2**40))
        async with ran(store):
            yield BenchStore(store)
    finally:
        await physical.close()


def options() -> ReplicationOptions:
    """Defaults but for the beat."""
    return ReplicationOptions(beat_s=BEAT_S, silent_beats_max=30)


def usage() -> dict[str, float]:
    """CPU seconds and resident MiB of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"cpu_s": used.ru_utime + used.ru_stime, "rss_mib": resident / 2**20}


class Secondary:
    """One secondary with a store, and when each numbered key became readable."""

    def __init__(self, store: BenchStore) -> None:
        self._store = store
        self._site: Site | None = None
        self.applied_at: dict[str, float] = {}

    async def _on_applied(self, keys: Sequence[str]) -> None:
        now = time.monotonic()
        for key in keys:
            self.applied_at[key] = now

    async def attach(self) -> None:
        """Follow the primary."""
        site = Site("secondary", self._store, options())  # type: ignore[arg-type]  # by shape
        site._on_applied = self._on_applied  # type: ignore[method-assign]  # who else hears it
        self._site = await site.start()

    async def detach(self) -> None:
        """Follow it no more."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    def state(self) -> dict[str, Any]:
        """Where it is."""
        service = self._site.manager.performance.secondary if self._site is not None else None
        if service is None:
            return usage()
        position, progress, last = service.applier.position, service.sync_progress, service.last_sync
        return usage() | {
            "phase": service.machine.phase.value,
            "streams": service.machine.phase is Phase.STREAM_WALS,
            "index": position.index if position else 0,
            "reason": service.machine.reason,
            "progress": None if progress is None else dataclasses.asdict(progress),
            "last_sync": None if last is None else dataclasses.asdict(last),
        }


async def commands() -> AsyncIterator[dict[str, Any]]:
    """From standard input, until its end."""
    reader = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


def say(what: Any) -> None:
    """One answer."""
    print(json.dumps(what), flush=True)


async def run_secondary(asked: dict[str, Any]) -> None:
    """One secondary until standard input ends."""
    entries = [Write(key, base64.b64decode(value)) for key, value in asked["entries"].items()]
    async with bench_store(asked["consul"], asked["token"], asked["path"], entries) as store:
        secondary = Secondary(store)
        gc.freeze()
        say({"ready": True})
        async for command in commands():
            if command["do"] == "attach":
                await secondary.attach()
            elif command["do"] == "detach":
                await secondary.detach()
            elif command["do"] == "applied":
                say(secondary.applied_at)
                secondary.applied_at = {}
                continue
            say(secondary.state())
        await secondary.detach()


async def run_thin(asked: dict[str, Any]) -> None:
    """Many thin secondaries until standard input ends."""
    roles = [decode_role(base64.b64decode(one)) for one in asked["roles"]]
    thin = [ThinSecondary(PERFORMANCE, role) for role in roles if isinstance(role, SecondaryRole)]
    tasks = [asyncio.create_task(one.run()) for one in thin]
    async with asyncio.timeout(60):
        for one in thin:
            await one.joined.wait()
    say({"ready": True})
    async for _ in commands():
        say(usage() | {"indexes": [one.index for one in thin], "bytes": sum([one.bytes for one in thin])})
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Child:
    """A process of this module."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, kind: str, asked: dict[str, Any]) -> Child:
        """Start it and wait until it is ready."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__)),
            kind,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**28,
        )
        child = cls(process)
        await child.ask(asked)
        return child

    async def ask(self, command: dict[str, Any]) -> Any:
        """One command, its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the benchmark has ended")
        return json.loads(line)

    async def do(self, what: str) -> Any:
        """One command without parameters."""
        return await self.ask({"do": what})

    async def stop(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def main() -> None:
    """A child: the first line says what it is to be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["secondary", "thin"])
    kind = parser.parse_args().kind
    asked = json.loads(sys.stdin.readline())
    await (run_secondary(asked) if kind == "secondary" else run_thin(asked))


if __name__ == "__main__":
    asyncio.run(main())
