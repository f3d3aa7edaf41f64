"""Looking into a running node: ``sys/monitor`` and ``sys/pprof`` (contract 4.10)."""

from __future__ import annotations

from plugin_api.errors import InvalidRequest, Unavailable
from plugin_api.framework import FieldSpec
from plugin_api.request import Operation
from sidecar.api import pprof
from sidecar.api.log_stream import LOG_LEVELS, TooManyWatchers, watch
from sidecar.api.pprof import Profiler
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import DURATION, STRING, Handler


class SysDebug:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core
        self._profiler = Profiler()

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read = Operation.READ
        rows = [
            Route(
                f"pprof/{name}".rstrip("/"),
                {read: self._pprof(name)},
                sudo=True,
                help="Memory by line of code." if name in pprof.MEMORY else "A look into this node.",
                fields={},
                content_type=pprof.TEXT_TYPE,
            )
            for name in (*pprof.TEXTS, *pprof.MEMORY)
        ]
        seconds = {"seconds": FieldSpec(DURATION, default=pprof.PROFILE_S, description="How long to sample.")}
        monitor = {
            "log_level": FieldSpec(STRING, default="info", description="trace, debug, info, warn or error."),
            "log_format": FieldSpec(STRING, default="standard", description="standard or json."),
        }
        return [
            *rows,
            Route(
                "pprof/profile",
                {read: self._profile},
                sudo=True,
                help="Where the processor's time goes.",
                fields=seconds,
                content_type=pprof.TEXT_TYPE,
            ),
            Route(
                "monitor",
                {read: self._monitor},
                help="The log as it is written.",
                fields=monitor,
                content_type=pprof.TEXT_TYPE,
            ),
        ]

    def _pprof(self, name: str) -> Handler:
        async def handler(call: Call, params: Params) -> Answer:
            return _plain(await self._profiler.text(name))

        return handler

    async def _profile(self, call: Call, params: Params) -> Answer:
        seconds = Fields(call.data).duration_s("seconds", pprof.PROFILE_S)
        return _plain(await self._profiler.text(pprof.PROFILE, seconds))

    async def _monitor(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        level, layout = fields.string("log_level", "info").lower(), fields.string("log_format", "standard").lower()
        if level not in LOG_LEVELS:
            raise InvalidRequest("unknown log level")
        formatter = self._core.options.log_formatters.get(layout)
        if formatter is None:
            raise InvalidRequest("unknown log format: there are standard and json")
        try:
            return Answer(stream=watch(LOG_LEVELS[level], formatter()), content_type=pprof.TEXT_TYPE)
        except TooManyWatchers:
            raise Unavailable("too many watch the log already; try again later") from None


def _plain(text: str) -> Answer:
    return Answer(plain=text.encode(), content_type=pprof.TEXT_TYPE)
