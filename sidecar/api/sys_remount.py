"""``sys/remount``: move a mount to another path, and how a move went (contract 4.12)."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from typing import Any

from plugin_api.errors import InvalidRequest, NotFound, PluginError
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.api.sys_mounts import emptied
from sidecar.core.mounts import AUTH
from sidecar.core.quotas import Quotas
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import STRING, takes

MIGRATIONS_MAX = 256
"""Remembered for status; the oldest are forgotten, and all of them with the tenure."""


class SysRemount:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore, quotas: Quotas) -> None:
        self._core = core
        self._quotas = quotas
        self._migrations: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def routes(self) -> list[Route]:
        """Rows of the table."""
        return [
            Route(
                "remount",
                {Operation.UPDATE: self._remount},
                sudo=True,
                help="Move a mount; what it issued is revoked, its data stays.",
                fields=takes(**{"from": STRING, "to": STRING}),
            ),
            Route(
                "remount/status/{id}",
                {Operation.READ: self._status},
                help="How a move went.",
                fields={},
            ),
        ]

    async def _remount(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        source, target = (_clean(fields.string(name)) for name in ("from", "to"))
        if not source or not target:
            raise InvalidRequest("both 'from' and 'to' path must be specified as a string")
        migration_id = str(uuid.uuid4())
        info = {"source_mount": source, "target_mount": target, "status": "in-progress"}
        self._remember(migration_id, info)
        try:
            await self._move(source, target)
        except PluginError:
            info["status"] = "failure"
            raise
        info["status"] = "success"
        return Answer({"migration_id": migration_id})

    async def _move(self, source: str, target: str) -> None:
        core = self._core
        entry, new_path = core.mounts.table.check_remount(source, target)
        new_full_path = f"auth/{new_path}" if entry.table == AUTH else new_path

        async def move() -> None:
            await core.mounts.table.remount(source, target)
            core.mounts.refresh()

        # As in Vault: what was issued under the old path does not follow.
        async with emptied(core, entry):
            if core.replication is None or entry.local:
                await move()
            else:
                await core.replication.filters.mount_moved(entry.full_path, new_full_path, move)
        await self._quotas.mount_gone(entry.full_path, new_full_path)

    async def _status(self, call: Call, params: Params) -> Answer:
        info = self._migrations.get(params["id"])
        if info is None:
            raise NotFound
        return Answer({"migration_id": params["id"], "migration_info": dict(info)})

    def _remember(self, migration_id: str, info: dict[str, Any]) -> None:
        self._migrations[migration_id] = info
        if len(self._migrations) > MIGRATIONS_MAX:
            self._migrations.popitem(last=False)


def _clean(path: str) -> str:
    trimmed = path.strip("/")
    return f"{trimmed}/" if trimmed else ""
