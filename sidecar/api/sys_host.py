"""What a node tells of itself and its peers: ``sys/ha-status``, ``host-info``, ``in-flight-req``, ``version-history``,
``loggers``, ``metrics`` (contract 4.9, 4.10)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from plugin_api.errors import InvalidRequest, NotFound
from plugin_api.formats import format_time
from plugin_api.request import Operation
from sidecar.api.host_info import host_info
from sidecar.api.log_stream import LOG_LEVELS
from sidecar.api.metrics_answer import metrics_answer
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.version_history import VersionHistory
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import STRING, takes

LOGGERS = (
    "audit",
    "auth",
    "consul_backend",
    "core",
    "http",
    "replication",
    "service_registration",
    "sidecar",
    "token",
)
"""The top of each tree of loggers; what is below follows."""
_NAMES = {5: "trace", 10: "debug", 20: "info", 30: "warn", 40: "error"}


class SysHost:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core
        self._versions = VersionHistory(core.sealed, core.node.version, core.now)

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read, update, delete, listing = Operation.READ, Operation.UPDATE, Operation.DELETE, Operation.LIST
        return [
            Route("ha-status", {read: self._ha_status}, help="The nodes of this cluster.", fields={}),
            Route("host-info", {read: self._host_info}, help="The machine this node runs on.", fields={}),
            Route(
                "metrics",
                {read: self._metrics},
                help="Counters and times of this node.",
                fields=takes(format=STRING),
                content_type="text/plain",
            ),
            Route(
                "in-flight-req",
                {read: self._in_flight},
                help="Requests that run at this moment.",
                fields={},
                raw=True,
            ),
            Route(
                "version-history",
                {listing: self._version_history},
                help="Versions that have led this cluster.",
                fields={},
            ),
            Route(
                "loggers",
                {read: self._levels, update: self._set_levels, delete: self._reset_levels},
                help="Log levels until the process ends.",
                fields=takes(level=STRING),
            ),
            Route(
                "loggers/{name}",
                {read: self._level, update: self._set_level, delete: self._reset_level},
                help="One log level until the process ends.",
                fields=takes(level=STRING),
            ),
        ]

    async def _ha_status(self, call: Call, params: Params) -> Answer:
        nodes = [
            {
                "hostname": node.hostname,
                "api_address": node.api_addr,
                "cluster_address": node.cluster_addr,
                "active_node": node.active,
                "last_echo": format_time(node.last_echo_s) if node.last_echo_s else None,
                "version": node.version,
                "echo_duration_ms": node.echo_ms,
                "clock_skew_ms": node.clock_skew_ms,
                "replication_primary_canary_age_ms": node.canary_age_ms,
            }
            for node in await self._core.node.members()
        ]
        return Answer({"nodes": nodes})

    async def _host_info(self, call: Call, params: Params) -> Answer:
        return Answer(await asyncio.to_thread(host_info))

    async def _metrics(self, call: Call, params: Params) -> Answer:
        answer = metrics_answer(call.data, prometheus=self._core.options.prometheus)
        return Answer(status=answer.status, plain=answer.body, content_type=answer.content_type)

    async def _in_flight(self, call: Call, params: Params) -> Answer:
        return Answer(raw=self._core.in_flight.shown(self._core.now()))

    async def _version_history(self, call: Call, params: Params) -> Answer:
        entries = await self._versions.entries()
        info = {
            entry.version: {
                "build_date": None,
                "previous_version": entry.previous or None,
                "timestamp_installed": format_time(entry.installed_s),
            }
            for entry in entries
        }
        return Answer({"keys": [entry.version for entry in entries], "key_info": info})

    # -- log levels of this process, until it ends or its configuration is read again

    async def _levels(self, call: Call, params: Params) -> Answer:
        return Answer({name: _level_of(name) for name in LOGGERS})

    async def _level(self, call: Call, params: Params) -> Answer:
        return Answer({_known(params["name"]): _level_of(params["name"])})

    async def _set_levels(self, call: Call, params: Params) -> None:
        level = _wanted(call)
        for name in LOGGERS:
            logging.getLogger(name).setLevel(level)

    async def _set_level(self, call: Call, params: Params) -> None:
        logging.getLogger(_known(params["name"])).setLevel(_wanted(call))

    async def _reset_levels(self, call: Call, params: Params) -> None:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.NOTSET)

    async def _reset_level(self, call: Call, params: Params) -> None:
        logging.getLogger(_known(params["name"])).setLevel(logging.NOTSET)


def _known(name: str) -> str:
    if name not in LOGGERS:
        raise NotFound(f'logger "{name}" not found')
    return name


def _wanted(call: Call) -> int:
    level = Fields(call.data).string("level").lower()
    if not level:
        raise InvalidRequest("level is required")
    if level not in LOG_LEVELS:
        raise InvalidRequest("invalid level provided: there are trace, debug, info, warn and error")
    return LOG_LEVELS[level]


def _level_of(name: str) -> Any:
    level = logging.getLogger(name).getEffectiveLevel()
    return _NAMES.get(level, str(level))
