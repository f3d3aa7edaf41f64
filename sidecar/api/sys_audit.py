"""``sys/audit`` and ``sys/audit-hash`` (contract 4.12)."""

from __future__ import annotations

from typing import Any

from plugin_api.errors import InvalidRequest
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.audit.table import AuditEntry
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import BOOL, MAP, STRING, takes


class SysAudit:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._audit = core.audit

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read, update, delete = Operation.READ, Operation.UPDATE, Operation.DELETE
        return [
            Route("audit", {read: self._list}, sudo=True, help="Audit devices by path.", fields={}),
            Route(
                "audit/{path*}",
                {update: self._enable, delete: self._disable},
                sudo=True,
                help="One audit device.",
                fields=takes(type=STRING, description=STRING, options=MAP, local=BOOL),
            ),
            Route(
                "audit-hash/{path*}",
                {update: self._hash},
                help="What a device makes of a text.",
                fields=takes(input=STRING),
            ),
        ]

    async def _list(self, call: Call, params: Params) -> Answer:
        return Answer({entry.path: describe(entry) for entry in self._audit.devices()})

    async def _enable(self, call: Call, params: Params) -> None:
        fields = Fields(call.data)
        await self._audit.enable(
            params["path"],
            fields.string("type"),
            fields.string_mapping("options"),
            description=fields.string("description"),
            local=fields.boolean("local"),
        )

    async def _disable(self, call: Call, params: Params) -> None:
        await self._audit.disable(params["path"])

    async def _hash(self, call: Call, params: Params) -> Answer:
        text = Fields(call.data).string("input")
        if not text:
            raise InvalidRequest('the "input" parameter is empty')
        return Answer({"hash": self._audit.hash(params["path"], text)})


def describe(entry: AuditEntry) -> dict[str, Any]:
    """One device as the list shows it."""
    return {
        "description": entry.description,
        "local": entry.local,
        "options": entry.options,
        "path": entry.path,
        "type": entry.type,
    }
