"""Plaintext over the replicated store: every value passes the barrier here, and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Protocol

import plugin_api.storage
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from sidecar.core.barrier import THREAD_BYTES_MIN, Barrier
from sidecar.core.keys import RAW_KEYS
from sidecar.core.metrics import METRICS
from sidecar.core.unicode_text import is_encodable

_READS_AT_ONCE = 64
_SEALED_BETWEEN_TURNS = 500


class CommitHead(Protocol):
    """What a commit returns: the WAL index of the record that holds it."""

    @property
    def index(self) -> int: ...


class LogicalStore(Protocol):
    """What the replicated store offers to the core: ciphertext by logical key."""

    async def get(self, key: str) -> bytes | None:
        """The stored bytes, or None where the key is proven absent."""

    async def exists(self, key: str) -> bool:
        """Whether the key has a value, told without reading it."""

    async def list(self, prefix: str) -> list[str]:
        """Sorted names one level below ``prefix`` (``class/partition/`` or deeper); folders end in ``/``."""

    async def commit(self, writes: Sequence[Write]) -> CommitHead:
        """All or none; returns once it is durable."""


class WriteTracker:
    """The highest WAL index this task or its children committed; 0 while they wrote nothing."""

    __slots__ = ("index",)

    def __init__(self) -> None:
        self.index = 0


last_write: ContextVar[WriteTracker | None] = ContextVar("last_write", default=None)


class TrackedWrites:
    """Collect the position of everything committed inside the block, so that an answer can name it."""

    __slots__ = ("_token",)

    def __enter__(self) -> WriteTracker:
        tracker = WriteTracker()
        self._token = last_write.set(tracker)
        return tracker

    def __exit__(self, *_: object) -> None:
        last_write.reset(self._token)


def always() -> bool:
    """The ``writable`` of storage that no role makes read-only."""
    return True


class SealedStore:
    """Get, list and commit of plaintext on logical keys. Raises DecryptionFailed where a value does not authenticate,
    and what the store below raises."""

    def __init__(self, store: LogicalStore, barrier: Barrier) -> None:
        self._store = store
        self.barrier = barrier

    async def get(self, key: str) -> bytes | None:
        """The plaintext at ``key``, or None."""
        with METRICS.timer("barrier.get"):
            blob = await self._store.get(key)
            if blob is None or key in RAW_KEYS:
                return blob
            if len(blob) < THREAD_BYTES_MIN:
                return self.barrier.open(key, blob)
            return await self.barrier.open_value(key, blob)

    async def get_raw(self, key: str) -> bytes | None:
        """The bytes at ``key`` as they are stored."""
        return await self._store.get(key)

    async def exists(self, key: str) -> bool:
        """Whether ``key`` has a value, told without reading it."""
        return await self._store.exists(key)

    async def list(self, prefix: str) -> list[str]:
        """Names one level below ``prefix``; folders end in ``/``."""
        with METRICS.timer("barrier.list"):
            return await self._store.list(prefix)

    def encode(self, write: Write) -> Write:
        """``write`` as the store takes it. Keyrings and the seal record pass unchanged."""
        if write.value is None or write.key in RAW_KEYS:
            return write
        return Write(write.key, self.barrier.seal(write.key, write.value))

    async def commit(self, writes: Sequence[Write]) -> CommitHead:
        """Seal and commit ``writes``, all or none."""
        deletes = all(write.value is None for write in writes)
        with METRICS.timer("barrier.delete" if deletes else "barrier.put"):
            encoded: list[Write] = []
            for number, write in enumerate(writes, 1):
                small = write.value is None or len(write.value) < THREAD_BYTES_MIN
                encoded.append(self.encode(write) if small else await self._encode_value(write))
                if number % _SEALED_BETWEEN_TURNS == 0:
                    await asyncio.sleep(0)
            with METRICS.timer("wal.persistWALs"):
                head = await self._store.commit(encoded)
        tracker = last_write.get()
        if tracker is not None:
            tracker.index = max(tracker.index, head.index)
        return head

    async def _encode_value(self, write: Write) -> Write:
        if write.value is None or write.key in RAW_KEYS:
            return write
        return Write(write.key, await self.barrier.seal_value(write.key, write.value))

    async def put(self, key: str, value: bytes) -> CommitHead:
        """:meth:`commit` of one write."""
        return await self.commit([Write(key, value)])

    async def delete(self, key: str) -> CommitHead:
        """:meth:`commit` of one delete."""
        return await self.commit([Write(key, None)])


async def read_many(sealed: SealedStore, keys: Sequence[str]) -> list[bytes]:
    """The values of those ``keys`` that exist, in their order, read a bounded number at a time."""
    found: list[bytes] = []
    for start in range(0, len(keys), _READS_AT_ONCE):
        values = await asyncio.gather(*(sealed.get(key) for key in keys[start : start + _READS_AT_ONCE]))
        found.extend(value for value in values if value is not None)
    return found


async def walk(sealed: SealedStore, prefix: str, limit: int) -> list[str]:
    """At most ``limit`` full keys below ``prefix`` (which ends in ``/``), at any depth."""
    found: list[str] = []
    folders = [prefix]
    while folders and len(found) < limit:
        folder = folders.pop()
        for name in await sealed.list(folder):
            if name.endswith("/"):
                folders.append(folder + name)
            elif len(found) < limit:
                found.append(folder + name)
    return found


class View:
    """One partition (or a folder of it) as a plugin's storage: it can name no key outside.

    Paths are not cleaned: ``.``, ``..`` and a slash at either end are refused (InvalidRequest) rather than given
    a meaning that another layer might not share.
    """

    def __init__(
        self,
        sealed: SealedStore,
        cls: str,
        partition: str,
        prefix: str = "",
        writable: Callable[[], bool] = always,
    ) -> None:
        self._sealed = sealed
        self._root = f"{cls}/{partition}/{prefix}"
        self._replicated = cls == "r"
        self._writable = writable

    async def get(self, path: str) -> bytes | None:
        """The value, or None if there is none."""
        return await self._sealed.get(self._key(path))

    async def exists(self, path: str) -> bool:
        """Whether there is a value, told without reading it."""
        return await self._sealed.exists(self._key(path))

    async def list(self, prefix: str = "") -> list[str]:
        """Names one level below ``prefix`` (``""`` or ending in ``/``), sorted; folders end in ``/``."""
        if prefix and not prefix.endswith("/"):
            raise InvalidRequest("a list prefix must end in '/'")
        if prefix:
            self._key(prefix[:-1])
        return await self._sealed.list(self._root + prefix)

    async def commit(self, writes: Sequence[plugin_api.storage.Write]) -> None:
        """Apply all writes or none. Raises ReadOnlyStorage where this cluster may not write."""
        if self._replicated and not self._writable():
            raise ReadOnlyStorage
        batch = [Write(self._key(write.path), write.value) for write in writes]
        if batch:
            await self._sealed.commit(batch)

    async def put(self, path: str, value: bytes) -> None:
        """:meth:`commit` of one write."""
        await self.commit([plugin_api.storage.Write(path, value)])

    async def delete(self, path: str) -> None:
        """:meth:`commit` of one delete; a missing key is no failure."""
        await self.commit([plugin_api.storage.Write(path, None)])

    def _key(self, path: str) -> str:
        if not path or path[0] == "/" or path[-1] == "/":
            raise InvalidRequest("a storage path must not be empty or begin or end with '/'")
        if "." in path and any(segment in (".", "..") for segment in path.split("/")):
            raise InvalidRequest("a storage path must not contain '.' or '..' segments")
        if not path.isascii() and not is_encodable(path):
            raise InvalidRequest("a storage path must be Unicode text")
        return self._root + path
