"""The audit table: which devices there are. Replicated entries at ``r/core/audit/<uuid>``, local ones at ``l/core/…``.

An entry holds its device's salt, behind the barrier like everything else: a replicated device makes the same hashes on
every cluster of a set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

import msgspec

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from sidecar.core.keys import AUDIT_TABLES
from sidecar.core.store_view import SealedStore, read_many


class AuditEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One device. ``path`` ends in ``/``."""

    path: str
    type: str
    uuid: str
    salt: bytes
    description: str = ""
    options: dict[str, str] = {}
    local: bool = False

    def __repr__(self) -> str:
        # Without the salt: who has it can try texts against the hashes.
        return f"AuditEntry(path={self.path!r}, type={self.type!r}, uuid={self.uuid!r}, local={self.local!r})"

    @property
    def key(self) -> str:
        """Where the entry is stored."""
        return AUDIT_TABLES[1 if self.local else 0] + self.uuid


class AuditTable:
    """The entries, loaded once and kept exact."""

    def __init__(self, sealed: SealedStore, writable: Callable[[], bool]) -> None:
        self._sealed = sealed
        self._writable = writable
        self._entries: dict[str, AuditEntry] = {}
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Read both parts."""
        keys = [folder + name for folder in AUDIT_TABLES for name in await self._sealed.list(folder)]
        self._entries = {entry.key: entry for entry in await self._read(keys)}

    def devices(self) -> list[AuditEntry]:
        """Every entry. A local and a replicated one may have the same path, if the replicated one came later; both are
        devices at work."""
        return sorted(self._entries.values(), key=lambda entry: (entry.path, entry.local))

    def find(self, path: str) -> AuditEntry | None:
        """The device at ``path`` (with or without its trailing slash): a local one before a replicated one."""
        wanted = path.removesuffix("/") + "/"
        return next((entry for entry in reversed(self.devices()) if entry.path == wanted), None)

    def require_free(self, entry: AuditEntry) -> None:
        """Raises InvalidRequest where the path is taken, ReadOnlyStorage where the entry cannot be written here."""
        for other in self._entries.values():
            # Paths of devices are names in URLs: neither may begin another one.
            if other.path.startswith(entry.path) or entry.path.startswith(other.path):
                raise InvalidRequest(f"path already in use: {other.path}")
        self._require_writable(entry)

    async def add(self, entry: AuditEntry) -> None:
        """Raises as :meth:`require_free`."""
        async with self._lock:
            self.require_free(entry)
            await self._sealed.commit([Write(entry.key, msgspec.msgpack.encode(entry))])
            self._entries[entry.key] = entry

    async def remove(self, path: str) -> AuditEntry | None:
        """The entry that went, None where there was none. Raises ReadOnlyStorage."""
        async with self._lock:
            entry = self.find(path)
            if entry is None:
                return None
            self._require_writable(entry)
            await self._sealed.commit([Write(entry.key, None)])
            del self._entries[entry.key]
            return entry

    async def invalidate(self, keys: Iterable[str]) -> bool:
        """Replication changed these logical keys. True if devices came, went or changed."""
        changed = [key for key in keys if key.startswith(AUDIT_TABLES)]
        if not changed:
            return False
        async with self._lock:
            read = {entry.key: entry for entry in await self._read(changed)}
            for key in changed:
                self._entries.pop(key, None)
            self._entries.update(read)
        return True

    async def _read(self, keys: Sequence[str]) -> list[AuditEntry]:
        return [msgspec.msgpack.decode(raw, type=AuditEntry) for raw in await read_many(self._sealed, keys)]

    def _require_writable(self, entry: AuditEntry) -> None:
        if not entry.local and not self._writable():
            raise ReadOnlyStorage
