"""``sys/internal/counters/*``: what is counted here. There is no identity engine and no billing, and the answers say
so in the shapes clients know."""

from __future__ import annotations

from datetime import UTC, datetime

from plugin_api.errors import InvalidRequest
from plugin_api.framework import FieldSpec
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import BOOL, INT, STRING, takes


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
            Route(
                "internal/counters/activity",
                {read: self._activity},
                help="Clients: not recorded.",
                fields={
                    **takes(current_billing_period=BOOL, limit_namespaces=INT),
                    "start_time": FieldSpec(STRING, description="RFC 3339 time, or unix seconds."),
                    "end_time": FieldSpec(STRING, description="Likewise."),
                },
            ),
            Route("internal/counters/config", {read: self._config}, help="Recording of clients: off.", fields={}),
            Route("internal/ui/version", {read: self._version}, help="The server's version.", fields={}),
        ]

    async def _tokens(self, call: Call, params: Params) -> Answer:
        total = len(await self._core.tokens.list_accessors())
        return Answer({"counters": {"service_tokens": {"total": total}}})

    async def _entities(self, call: Call, params: Params) -> Answer:
        return Answer({"counters": {"entities": {"total": 0}}})

    async def _activity(self, call: Call, params: Params) -> Answer:
        """Nothing for any period, as a server answers on which clients are not counted; a period that is none is said
        to be."""
        fields = Fields(call.data)
        start_s, end_s = (_moment_s(fields, name) for name in ("start_time", "end_time"))
        if start_s is not None and end_s is not None and start_s > end_s:
            raise InvalidRequest("start_time is later than end_time")
        return Answer()

    async def _config(self, call: Call, params: Params) -> Answer:
        return Answer({"enabled": "disable", "queries_available": False, "retention_months": 0})

    async def _version(self, call: Call, params: Params) -> Answer:
        return Answer({"version": self._core.node.version})


def _moment_s(fields: Fields, name: str) -> float | None:
    """Unix seconds; None where it is not given. Raises InvalidRequest."""
    text = fields.string(name).strip()
    if not text:
        return None
    try:
        if text.isascii() and text.isdecimal():
            return float(datetime.fromtimestamp(int(text), UTC).timestamp())
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        moment = None
    if moment is None or moment.tzinfo is None:
        raise InvalidRequest(f"failed to parse {name}: it must be an RFC 3339 time, or unix seconds")
    return moment.timestamp()
