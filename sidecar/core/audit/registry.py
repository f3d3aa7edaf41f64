"""Audit as the rest of the server sees it: devices by path, and one place to write entries."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping

from plugin_api.errors import InvalidRequest
from plugin_api.formats import format_time
from sidecar.core.audit.broker import AuditBroker
from sidecar.core.audit.hashing import SALT_BYTES, Hasher
from sidecar.core.audit.options import LocalRules, check_type
from sidecar.core.audit.table import AuditEntry, AuditTable
from sidecar.core.mounts import clean_mount_path
from sidecar.core.store_view import SealedStore


class AuditRegistry:
    """Table and devices of one tenure, kept in step."""

    def __init__(
        self,
        sealed: SealedStore,
        writable: Callable[[], bool],
        now: Callable[[], float],
        rules: LocalRules,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.broker = AuditBroker(rules)
        self._table = AuditTable(sealed, writable)
        self._now = now
        self._random_bytes = random_bytes

    async def load(self) -> None:
        """Read the table and put its devices to work."""
        await self._table.load()
        self.broker.reconcile(self._table.devices())

    def devices(self) -> list[AuditEntry]:
        """Every entry of the table, by path."""
        return self._table.devices()

    async def enable(
        self, path: str, type_name: str, options: Mapping[str, str], *, description: str = "", local: bool = False
    ) -> None:
        """Add a device that has proved that it can write. Raises InvalidRequest, ReadOnlyStorage."""
        check_type(type_name)
        entry = AuditEntry(
            path=clean_mount_path(path),
            type=type_name,
            uuid=str(uuid.UUID(bytes=self._random_bytes(16), version=4)),
            salt=self._random_bytes(SALT_BYTES),
            description=description,
            options=dict(options),
            local=local,
        )
        self._table.require_free(entry)
        device = await self.broker.trial(entry, format_time(self._now()), str(uuid.uuid4()))
        try:
            await self._table.add(entry)
        except BaseException:
            self.broker.dismiss(device)
            raise
        self.broker.employ(entry, device)

    async def disable(self, path: str) -> None:
        """Remove a device; one that does not exist is no failure. Raises ReadOnlyStorage."""
        if await self._table.remove(path) is not None:
            self.broker.reconcile(self._table.devices())

    def hash(self, path: str, text: str) -> str:
        """What the device at ``path`` makes of ``text``. Raises InvalidRequest."""
        entry = self._table.find(path)
        if entry is None:
            raise InvalidRequest("unknown audit backend")
        return Hasher(entry.salt).text(text)

    async def invalidate(self, keys: Iterable[str]) -> None:
        """Replication changed these logical keys."""
        if await self._table.invalidate(keys):
            self.broker.reconcile(self._table.devices())
