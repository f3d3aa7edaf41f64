"""``sys/internal/counters/*``: what is counted here. There is no identity engine and no billing, and the answers say
so in the shapes clients know."""

from __future__ import annotations

from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call


class SysCounters:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read = Operation.READ
        return [
            Route("internal/counters/tokens", {read: self._tokens}, help="Service tokens there are.", fields={}),
            Route("internal/counters/entities", {read: self._entities}, help="Entities there are.", fields={}),
            Route("internal/counters/activity", {read: self._activity}, help="Clients: not recorded.", fields={}),
            Route("internal/counters/config", {read: self._config}, help="Recording of clients: off.", fields={}),
            Route("internal/ui/version", {read: self._version}, help="The server's version.", fields={}),
        ]

    async def _tokens(self, call: Call, params: Params) -> Answer:
        total = len(await self._core.tokens.list_accessors())
        return Answer({"counters": {"service_tokens": {"total": total}}})

    async def _entities(self, call: Call, params: Params) -> Answer:
        return Answer({"counters": {"entities": {"total": 0}}})

    async def _activity(self, call: Call, params: Params) -> Answer:
        return Answer()

    async def _config(self, call: Call, params: Params) -> Answer:
        return Answer({"enabled": "disable", "queries_available": False, "retention_months": 0})

    async def _version(self, call: Call, params: Params) -> Answer:
        return Answer({"version": self._core.node.version})
