"""A process that is killed at any moment of a large batch on a real Consul: all of it is true afterwards, or nothing.

Judged by the next tenure: every value before anything else is done, again when the batch is in its data keys, data and
index against the log; and in the end that neither parts nor chunks of what was replaced are left.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import time
import uuid
from dataclasses import dataclass, field

from consul_backend.chunks import chunk_prefix
from consul_backend.replicated import ReplicatedStore
from consul_backend.wal import Write
from tests.support.cluster import ROOT
from tests.support.consul_server import ConsulServer
from tests.support.faults import rounds
from tests.support.large_writer import BIG_VALUES, NUMBER_BYTES, OPTIONS, TOKEN, Batches, take_over
from tests.support.store import GENERATION, Cluster, key, ran

MIB, ROUNDS = (3, 3) if rounds() == 1 else (31, 20)
"""Of a batch, and how often; a soak does the most that a batch may be."""
SETTLED_S_MAX = 300.0
READ_AT_ONCE = 512


@dataclass
class Lives:
    """How each killed life ended: seconds until the kill, what it had said, which batch is true, seconds to recover."""

    rows: list[tuple[float, str, int, float]] = field(default_factory=list)

    def text(self) -> str:
        took_s = sorted(row[3] for row in self.rows)
        ends = {said: sum(row[1] == said for row in self.rows) for said in ("", "committed", "rolled")}
        kept = sum(row[2] == number for number, row in enumerate(self.rows, start=1))
        return (
            f"{len(self.rows)} kills with {MIB} MiB on the way, between {min(row[0] for row in self.rows):.2f} and"
            f" {max(row[0] for row in self.rows):.2f} s: {ends['']} before an answer, {ends['committed']} while"
            f" it was rolled forward, {ends['rolled']} after; {kept} batches are true; recovery took"
            f" {took_s[0]:.2f} to {took_s[-1]:.2f} s, median {took_s[len(took_s) // 2]:.2f} s"
        )


class Writer:
    """The process of ``large_writer``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, server: ConsulServer, path: str) -> Writer:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.large_writer", server.address, path, str(MIB)),
            cwd=ROOT,
            env={**os.environ, TOKEN: server.token},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        writer = cls(process)
        assert await writer.said() == "ready"
        return writer

    async def said(self) -> str:
        """Its next line, "" when there is none."""
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    def write(self, number: int) -> None:
        """Have it commit a batch."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % number)

    async def kill(self) -> list[str]:
        """SIGKILL, and everything it had said until then."""
        if self._process.returncode is None:
            self._process.kill()
        assert self._process.stdout is not None
        rest = await self._process.stdout.read()
        await self._process.wait()
        return rest.decode().split("\n")


async def numbers(store: ReplicatedStore, batches: Batches) -> int:
    """The one batch of which every value is, each with the length it has there. Asserts."""
    names = list(batches.sizes(1))
    found: dict[str, bytes] = {}
    for start in range(0, len(names), READ_AT_ONCE):
        some = names[start : start + READ_AT_ONCE]
        values = await store.get_many(some)
        assert None not in values
        found |= {name: value for name, value in zip(some, values, strict=True) if value is not None}
    told = {int(value[:NUMBER_BYTES]) for value in found.values()}
    assert len(told) == 1, f"readers see a mix of the batches {sorted(told)}"
    (number,) = told
    assert {name: len(value) for name, value in found.items()} == batches.sizes(number)
    return number


async def nothing_is_left(cluster: Cluster, store: ReplicatedStore) -> None:
    """Until the log has no part of a batch any more, and no chunk is but those of values that are."""
    big = min(BIG_VALUES, MIB // 2)
    async with asyncio.timeout(SETTLED_S_MAX):
        for number in itertools.count():
            await store.commit([Write(key("busy"), b"%d" % number)])
            chunks = await cluster.inner.list(chunk_prefix(GENERATION), consistent=True)
            if len(chunks) == big and number % 64 == 0:
                records = await cluster.records()
                if not any(record.header.large for record in records):
                    return


async def test_a_batch_is_whole_or_not_at_all_whenever_its_writer_dies() -> None:
    batches, lives, chance = Batches(MIB), Lives(), random.Random(time.time_ns())
    path = f"outrider/{uuid.uuid4().hex[:8]}/"
    with ConsulServer() as server:
        cluster = await take_over(server.address, server.token, path)
        await cluster.genesis()
        writer = await Writer.start(server, path)
        began_s = time.monotonic()
        writer.write(0)
        assert (await writer.said(), await writer.said()) == ("committed 0", "rolled 0")
        whole_s = time.monotonic() - began_s
        await writer.kill()
        before = 0
        for number in range(1, ROUNDS + 1):
            writer = await Writer.start(server, path)
            writer.write(number)
            after_s = chance.uniform(0.0, 1.1 * whole_s)
            await asyncio.sleep(after_s)  # the fault's own moment
            said = await writer.kill()
            await cluster.inner.close()
            cluster = await take_over(server.address, server.token, path)
            began_s = time.monotonic()
            store = await cluster.recover(OPTIONS)
            took_s = time.monotonic() - began_s
            true = await numbers(store, batches)
            acknowledged = f"committed {number}" in said
            assert true == number if acknowledged else true in (before, number)
            async with ran(store):
                await store.rolled()
                assert await numbers(store, batches) == true
            last = "rolled" if f"rolled {number}" in said else "committed" if acknowledged else ""
            lives.rows.append((after_s, last, true, took_s))
            before = true
        async with cluster.running(OPTIONS) as store:
            await nothing_is_left(cluster, store)
            assert await numbers(store, batches) == before
            await cluster.check(store, whole_log=False)
        await cluster.inner.close()
    print(f"\n{lives.text()}")
