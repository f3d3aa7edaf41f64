"""Which versions of this program have led this cluster, and since when. Local to the cluster."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from consul_backend.wal import Write
from sidecar.core.keys import VERSIONS
from sidecar.core.store_view import SealedStore, read_many


class VersionEntry(msgspec.Struct, frozen=True):
    """``installed_s`` is when it first led, unix seconds; ``previous`` is empty for the first one."""

    version: str
    installed_s: int
    previous: str = ""


class VersionHistory:
    """Grows by one entry when a new version leads."""

    def __init__(self, sealed: SealedStore, version: str, now: Callable[[], float]) -> None:
        self._sealed = sealed
        self._version = version
        self._now = now

    async def record(self) -> None:
        """Note that this version leads; nothing if it is known already."""
        if await self._sealed.get(VERSIONS + self._version) is not None:
            return
        before = await self._entries()
        entry = VersionEntry(self._version, int(self._now()), before[-1].version if before else "")
        await self._sealed.commit([Write(VERSIONS + self._version, msgspec.json.encode(entry))])

    async def entries(self) -> list[VersionEntry]:
        """Oldest first, this version among them."""
        await self.record()
        return await self._entries()

    async def _entries(self) -> list[VersionEntry]:
        names = await self._sealed.list(VERSIONS)
        raws = await read_many(self._sealed, [VERSIONS + name for name in names])
        found = [msgspec.json.decode(raw, type=VersionEntry) for raw in raws]
        return sorted(found, key=lambda entry: (entry.installed_s, entry.version))
