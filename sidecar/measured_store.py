"""The physical store with a stopwatch: how long Consul (or SQLite) takes, as ``consul.*`` samples."""

from __future__ import annotations

from collections.abc import Sequence

from consul_backend.limits import Limits
from consul_backend.physical import Item, Names, PhysicalStore, TxnResult
from consul_backend.txn import Op
from sidecar.core.metrics import METRICS, Metrics


class MeasuredStore:
    """Implements :class:`~consul_backend.physical.PhysicalStore` by the one it is given. Waiting for a change is no
    latency and is not measured."""

    def __init__(self, store: PhysicalStore, metrics: Metrics = METRICS) -> None:
        self._store = store
        self._metrics = metrics

    @property
    def kind(self) -> str:
        return self._store.kind

    @property
    def limits(self) -> Limits:
        return self._store.limits

    async def open(self) -> None:
        await self._store.open()

    async def close(self) -> None:
        await self._store.close()

    async def get(self, key: str, *, consistent: bool = False) -> Item | None:
        with self._metrics.timer("consul.get"):
            return await self._store.get(key, consistent=consistent)

    async def get_many(self, keys: Sequence[str], *, consistent: bool = False) -> list[Item | None]:
        with self._metrics.timer("consul.get"):
            return await self._store.get_many(keys, consistent=consistent)

    async def list(self, prefix: str, *, consistent: bool = False) -> list[str]:
        with self._metrics.timer("consul.list"):
            return await self._store.list(prefix, consistent=consistent)

    async def names_below(self, prefix: str, names_max: int, *, consistent: bool = False) -> Names | None:
        with self._metrics.timer("consul.list"):
            return await self._store.names_below(prefix, names_max, consistent=consistent)

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        with self._metrics.timer("consul.transaction"):
            return await self._store.txn(ops)

    async def watch(self, key: str, index: int, wait_s: float) -> tuple[Item | None, int]:
        return await self._store.watch(key, index, wait_s)

    async def create_session(self, name: str, *, beat_ttl_s: float, lock_delay_s: float) -> str:
        with self._metrics.timer("consul.session"):
            return await self._store.create_session(name, beat_ttl_s=beat_ttl_s, lock_delay_s=lock_delay_s)

    async def beat(self) -> None:
        with self._metrics.timer("consul.beat"):
            await self._store.beat()

    async def renew_session(self, session: str) -> bool:
        with self._metrics.timer("consul.session"):
            return await self._store.renew_session(session)

    async def destroy_session(self, session: str) -> None:
        with self._metrics.timer("consul.session"):
            await self._store.destroy_session(session)

    async def stop_beat(self) -> None:
        await self._store.stop_beat()
