"""Many leases put into a cluster's store by its own code, while none of its nodes runs: HTTP would take many times as
long, and is not what the test of their revocation is about."""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from collections.abc import Callable

import msgspec

from consul_backend.clock import SystemClock
from consul_backend.config import ConsulConfig
from consul_backend.election import Epoch
from consul_backend.physical import EPOCH_KEY, LOCK_KEY, PhysicalStore
from consul_backend.read_lease import ReadLease
from consul_backend.replicated import ReplicatedStore, StoreOptions, read_entry
from consul_backend.store import ConsulStore
from consul_backend.tenure import Tenure
from consul_backend.txn import Cas, Lock, Unlock
from plugin_api.engine import MountInfo
from plugin_api.request import Lease
from sidecar.core.barrier import load_barrier
from sidecar.core.keys import SEAL
from sidecar.core.leasing import Leasing
from sidecar.core.schedule import Schedule
from sidecar.core.seal import combine
from sidecar.core.seal_record import SealRecord, open_root_key
from sidecar.core.store_view import SealedStore
from sidecar.core.token_entry import CreateToken
from sidecar.generation import read_generation
from tests.support.store import ran

AT_ONCE = 128


async def make_leases(
    config: ConsulConfig, keys: list[str], mount: MountInfo, count: int, issue: Callable[[int], str], ttl_s: int = 7200
) -> None:
    """``count`` leases of one token, below fifty roles of ``mount``; ``issue(n)`` makes the n-th credential and returns
    its name. ``keys`` are the cluster's key shares, in base64."""
    physical = ConsulStore(config)
    await physical.open()
    try:
        found = await read_generation(physical)
        assert found is not None
        generation = found[0].id

        async def read(key: str) -> bytes | None:
            return await read_entry(physical, generation, key)

        seal = await read(SEAL)
        assert seal is not None
        root_key = open_root_key(SealRecord.decode(seal), combine([base64.b64decode(share) for share in keys]))
        barrier = await load_barrier(read, root_key)
        tenure, lease = await _lead(physical)
        store = await ReplicatedStore.recover(
            physical, generation, tenure, StoreOptions(), clock=SystemClock(), lease=lease
        )
        async with ran(store):
            sealed = SealedStore(store, barrier)
            leasing = Leasing(sealed, Schedule(sealed, time.time), lambda _: None, time.time, lambda: False)
            await leasing.load()
            holder = (await leasing.tokens.create(CreateToken(policies=["default"], ttl_s=4 * ttl_s))).entry
            numbers = itertools.islice(itertools.count(), count)

            async def maker() -> None:
                for number in numbers:
                    kept = Lease(ttl_s=ttl_s, internal={"credential": issue(number)})
                    path = f"{mount.path}creds/app-{number % 50}"
                    await leasing.leases.register(path, mount, kept, holder)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(AT_ONCE):
                    tasks.create_task(maker())
        await physical.txn([Unlock(LOCK_KEY, b"", tenure.session)])
        await physical.destroy_session(tenure.session)
    finally:
        await physical.close()


async def _lead(physical: PhysicalStore) -> tuple[Tenure, ReadLease]:
    """A tenure after the newest one; nobody else is there to want the lock."""
    session = await physical.create_session("lease maker", beat_ttl_s=3600, lock_delay_s=0)
    found = await physical.get(EPOCH_KEY, consistent=True)
    assert found is not None
    number = msgspec.json.decode(found.value, type=Epoch).number + 1
    epoch = msgspec.json.encode(Epoch(number, "lease maker", session))
    done = await physical.txn([Lock(LOCK_KEY, b"", session), Cas(EPOCH_KEY, epoch, found.modify_index)])

    async def renew() -> bool:
        return await physical.renew_session(session)

    return Tenure(number, "lease maker", session, done.modify_index), ReadLease(SystemClock(), 3600.0, renew)
