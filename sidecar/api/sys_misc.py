"""The small ``sys/`` endpoints that clients call on their way (contract 4.12)."""

from __future__ import annotations

from plugin_api.errors import InvalidRequest
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields


class SysMisc:
    """Handlers of one tenure. No engine of this version hands out leases; the answers say so in the shapes clients
    know."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read, update, listing = Operation.READ, Operation.UPDATE, Operation.LIST
        return [
            Route("leases/lookup", {update: self._no_lease}),
            Route("leases/renew", {update: self._no_lease}),
            Route("renew", {update: self._no_lease}),
            Route("leases/revoke", {update: self._revoke_lease}),
            Route("revoke", {update: self._revoke_lease}),
            Route("leases/lookup/{prefix*}", {listing: self._no_leases}, sudo=True),
            Route("config/state/sanitized", {read: self._config}),
            Route("internal/ui/namespaces", {read: self._namespaces}),
            Route("plugins/catalog", {read: self._plugins, listing: self._plugins}, sudo=True),
        ]

    async def _no_lease(self, call: Call, params: Params) -> None:
        if not Fields(call.data).string("lease_id"):
            raise InvalidRequest("lease_id must be specified")
        raise InvalidRequest("lease not found")

    async def _revoke_lease(self, call: Call, params: Params) -> None:
        # To revoke what does not exist is no failure, here as for tokens.
        if not Fields(call.data).string("lease_id"):
            raise InvalidRequest("lease_id must be specified")

    async def _no_leases(self, call: Call, params: Params) -> Answer:
        return Answer(status=404)

    async def _config(self, call: Call, params: Params) -> Answer:
        return Answer(dict(self._core.options.sanitized_config))

    async def _namespaces(self, call: Call, params: Params) -> Answer:
        return Answer({"keys": [""]})

    async def _plugins(self, call: Call, params: Params) -> Answer:
        return Answer(self._core.mounts.plugin_types())
