"""The small ``sys/`` endpoints that clients call on their way (contract 4.12)."""

from __future__ import annotations

from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call


class SysMisc:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table."""
        return [
            Route("internal/ui/namespaces", {Operation.READ: self._namespaces}, help="Namespaces: the one.", fields={}),
        ]

    async def _namespaces(self, call: Call, params: Params) -> Answer:
        return Answer({"keys": [""]})
