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
        read, listing = Operation.READ, Operation.LIST
        return [
            Route("config/state/sanitized", {read: self._config}),
            Route("internal/ui/namespaces", {read: self._namespaces}),
            Route("plugins/catalog", {read: self._plugins, listing: self._plugins}, sudo=True),
        ]

    async def _config(self, call: Call, params: Params) -> Answer:
        return Answer(dict(self._core.options.sanitized_config))

    async def _namespaces(self, call: Call, params: Params) -> Answer:
        return Answer({"keys": [""]})

    async def _plugins(self, call: Call, params: Params) -> Answer:
        return Answer(self._core.mounts.plugin_types())
