"""Large batches that each replace the same keys, and a process that writes them until it is killed.

``python -m tests.support.large_writer ADDRESS PATH MIB`` with the store's token in the environment: it takes the lock
from whoever has it, recovers and says ``ready``; for each number that it reads it commits that batch and says so.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from dataclasses import dataclass

from consul_backend.config import ConsulConfig
from consul_backend.physical import LOCK_KEY
from consul_backend.replicated import StoreOptions
from consul_backend.store import ConsulStore
from consul_backend.wal import Write
from tests.support.store import Cluster, key

TOKEN = "OUTRIDER_TEST_TOKEN"
OPTIONS = StoreOptions(segment_records=8, wal_keep_records=64, flush_interval_s=0.2, collect_interval_s=0.2)
BIG_VALUES = 8
BIG_BYTES = 700_000
"""More than Consul takes as one value: such a one is stored in chunks."""
NUMBER_BYTES = 8


@dataclass(frozen=True)
class Batches:
    """Batches of ``mib`` MiB: every one has the same keys, and each value begins with the number of its batch."""

    mib: int

    def sizes(self, number: int) -> dict[str, int]:
        """Bytes of each value by key; those of the many small ones change with the number."""
        left = self.mib * 2**20
        big = min(BIG_VALUES, self.mib // 2)
        found = {key(f"big/{n}"): BIG_BYTES for n in range(big)}
        left -= sum(found.values())
        small = max(100, self.mib * 100)
        chance = random.Random(number)
        mean = left // small - NUMBER_BYTES
        return found | {key(f"small/{n % 40}/{n}"): chance.randint(NUMBER_BYTES, 2 * mean - 200) for n in range(small)}

    def writes(self, number: int) -> list[Write]:
        """The batch."""
        filler = random.Random(number).randbytes(BIG_BYTES)
        return [Write(name, value_of(number, filler[:size])) for name, size in self.sizes(number).items()]


def value_of(number: int, filler: bytes) -> bytes:
    """A value of batch ``number``, as long as ``filler``."""
    return b"%0*d" % (NUMBER_BYTES, number) + filler[NUMBER_BYTES:]


async def take_over(address: str, token: str, path: str) -> Cluster:
    """A cluster whose lock nobody holds any more: who held it is fenced off."""
    physical = ConsulStore(ConsulConfig(address=address, token=token, path=path))
    await physical.open()
    held = await physical.get(LOCK_KEY, consistent=True)
    if held is not None and held.session:
        await physical.destroy_session(held.session)
    return Cluster(physical)


async def main() -> None:
    """Write what standard input asks for."""
    address, path, mib = sys.argv[1:]
    batches = Batches(int(mib))
    cluster = await take_over(address, os.environ[TOKEN], path)
    async with cluster.running(OPTIONS) as store:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            await store.commit(batches.writes(int(line)))
            print(f"committed {int(line)}", flush=True)
            await store.rolled()
            print(f"rolled {int(line)}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
