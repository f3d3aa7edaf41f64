"""Looking into a running node: ``sys/monitor`` and ``sys/pprof`` (contract 4.10)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from plugin_api.errors import InvalidRequest, Unavailable
from plugin_api.framework import FieldSpec
from plugin_api.request import Operation
from sidecar.api import profiles
from sidecar.api.log_stream import LOG_LEVELS, TooManyWatchers, watch
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import DURATION, STRING, Handler

PROFILE_S_MAX = 60
"""Below the time that a request may take."""
_PROFILE_S = 30
_TEXT = "text/plain; charset=utf-8"
_INDEX = """goroutine     stacks of every task and thread
threadcreate  stacks of every thread
profile       where the processor's time goes, sampled for ?seconds=30, as folded stacks
heap, allocs  memory by line of code; needs a process started with PYTHONTRACEMALLOC=1
"""


class SysDebug:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core
        self._profiling = False

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read = Operation.READ
        texts: dict[str, Callable[[], str]] = {
            "pprof": lambda: _INDEX,
            "pprof/goroutine": profiles.stacks,
            "pprof/threadcreate": profiles.thread_stacks,
        }
        rows = [
            Route(path, {read: _text(make)}, sudo=True, help="A look into this node.", fields={}, content_type=_TEXT)
            for path, make in texts.items()
        ]
        rows += [
            Route(path, {read: self._heap}, sudo=True, help="Memory by line of code.", fields={}, content_type=_TEXT)
            for path in ("pprof/heap", "pprof/allocs")
        ]
        seconds = {"seconds": FieldSpec(DURATION, default=_PROFILE_S, description="How long to sample.")}
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
                content_type=_TEXT,
            ),
            Route(
                "monitor",
                {read: self._monitor},
                help="The log as it is written.",
                fields=monitor,
                content_type=_TEXT,
            ),
        ]

    async def _heap(self, call: Call, params: Params) -> Answer:
        try:
            text = await asyncio.to_thread(profiles.heap)
        except LookupError:
            raise InvalidRequest(
                "memory is not traced: start the server with PYTHONTRACEMALLOC=1 in its environment, which costs speed"
            ) from None
        return _plain(text)

    async def _profile(self, call: Call, params: Params) -> Answer:
        seconds = Fields(call.data).duration_s("seconds", _PROFILE_S)
        if not 1 <= seconds <= PROFILE_S_MAX:
            raise InvalidRequest(f"seconds must be between 1 and {PROFILE_S_MAX}")
        if self._profiling:
            raise Unavailable("a profile is being taken already; try again later")
        self._profiling = True
        try:
            return _plain(await asyncio.to_thread(profiles.sample, seconds))
        finally:
            self._profiling = False

    async def _monitor(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        level, layout = fields.string("log_level", "info").lower(), fields.string("log_format", "standard").lower()
        if level not in LOG_LEVELS:
            raise InvalidRequest("unknown log level")
        formatter = self._core.options.log_formatters.get(layout)
        if formatter is None:
            raise InvalidRequest("unknown log format: there are standard and json")
        try:
            return Answer(stream=watch(LOG_LEVELS[level], formatter()), content_type=_TEXT)
        except TooManyWatchers:
            raise Unavailable("too many watch the log already; try again later") from None


def _text(make: Callable[[], str]) -> Handler:
    async def handler(call: Call, params: Params) -> Answer:
        return _plain(make())

    return handler


def _plain(text: str) -> Answer:
    return Answer(plain=text.encode(), content_type=_TEXT)
