"""``sys/internal/specs/openapi``: the API as it is mounted now, as far as the caller may use it."""

from __future__ import annotations

import asyncio

from plugin_api.request import Operation
from sidecar.api.raw_paths import RAW_PATHS
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request import openapi
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import BOOL, STRING, in_query


class SysSpecs:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table."""
        return [
            Route(
                "internal/specs/openapi",
                {Operation.READ: self._document, Operation.UPDATE: self._document},
                help="This API as an OpenAPI document.",
                fields={
                    "generic_mount_paths": in_query(BOOL, Operation.READ),
                    "context": in_query(STRING, Operation.READ),
                },
                raw=True,
            )
        ]

    async def _document(self, call: Call, params: Params) -> Answer:
        acl = call.known.acl
        mounts = [openapi.MountDescription("", "system", RAW_PATHS)]
        for path, backend in self._core.mounts.router.items():
            if acl.has_any_under(path):
                mounts.append(openapi.MountDescription(path, backend.type_name, tuple(backend.describe())))
        generic = Fields(call.data).boolean("generic_mount_paths")
        version = self._core.node.version
        return Answer(raw=await asyncio.to_thread(openapi.document, mounts, version, generic=generic))
