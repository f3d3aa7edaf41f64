"""An in-memory logical store: what the replicated store offers to the core, without one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from consul_backend.wal import Write
from sidecar.core.barrier import Barrier
from sidecar.core.expiration import Expiration
from sidecar.core.keyring import Keyring
from sidecar.core.store_view import SealedStore
from sidecar.core.tokens import TokenStore


@dataclass(frozen=True)
class MemoryHead:
    index: int


class MemoryLogicalStore:
    """Atomic commits, dense indexes; every call lets other tasks run first, as real I/O does.

    ``fail`` is raised by the next commit, before (``applied`` False) or after it took effect. ``commits`` keeps every
    batch, for tests that count them.
    """

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.commits: list[list[Write]] = []
        self.reads = 0
        self.fail: Exception | None = None
        self.fail_applied = False
        self.ops_max = 61

    @property
    def index(self) -> int:
        return len(self.commits)

    async def get(self, key: str) -> bytes | None:
        self.reads += 1
        await asyncio.sleep(0)
        value = self.data.get(key)
        await asyncio.sleep(0)
        return value

    async def exists(self, key: str) -> bool:
        await asyncio.sleep(0)
        return key in self.data

    async def list(self, prefix: str) -> list[str]:
        assert prefix.endswith("/")
        await asyncio.sleep(0)
        names = set()
        for key in self.data:
            if key.startswith(prefix):
                name, slash, _ = key[len(prefix) :].partition("/")
                names.add(name + slash)
        return sorted(names)

    async def commit(self, writes: Sequence[Write], *, positions: object = None) -> MemoryHead:
        await asyncio.sleep(0)
        assert 0 < len(writes) <= self.ops_max, f"{len(writes)} operations in one commit"
        error, self.fail = self.fail, None
        if error is not None and not self.fail_applied:
            raise error
        for write in writes:
            if write.value is None:
                self.data.pop(write.key, None)
            else:
                self.data[write.key] = write.value
        self.commits.append(list(writes))
        if error is not None:
            raise error
        await asyncio.sleep(0)
        return MemoryHead(self.index)

    def below(self, prefix: str) -> list[str]:
        """All keys under ``prefix``."""
        return sorted(key for key in self.data if key.startswith(prefix))


class FakeTime:
    """Unix seconds that pass only when told."""

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def counting_bytes(seed: int = 1):
    """A deterministic source of bytes with no short period."""
    import random

    source = random.Random(seed)
    return source.randbytes


def make_barrier(seed: int = 1) -> Barrier:
    """A barrier with its own keys; nonces stay random."""
    random_bytes = counting_bytes(seed)
    return Barrier(
        random_bytes(32),
        Keyring.generate(0, random_bytes),
        Keyring.generate(0, random_bytes),
    )


def make_sealed() -> tuple[MemoryLogicalStore, SealedStore]:
    store = MemoryLogicalStore()
    return store, SealedStore(store, make_barrier())


async def expire(tokens: TokenStore) -> None:
    """Everything that is due for tokens, as a node that runs does it; the schedule is read as after a start."""
    await tokens.schedule.load()
    await tokens.sweep()
    await Expiration(tokens.schedule, tokens.expire).sweep()
