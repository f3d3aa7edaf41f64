"""``sys/config/*``: CORS, audited request headers, headers of the web UI, and the configuration without secrets."""

from __future__ import annotations

from plugin_api.errors import InvalidRequest, NotFound
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.node_settings import Cors, NodeSettings, checked_cors, checked_header_name
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import ANY, BOOL, LIST, takes


class SysConfig:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore, settings: NodeSettings) -> None:
        self._core = core
        self._settings = settings

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read, update, delete, listing = Operation.READ, Operation.UPDATE, Operation.DELETE, Operation.LIST
        return [
            Route(
                "config/cors",
                {read: self._cors, update: self._set_cors, delete: self._no_cors},
                sudo=True,
                help="Which web pages of other origins may call this API.",
                fields=takes(allowed_origins=LIST, allowed_headers=LIST, enable=BOOL),
            ),
            Route(
                "config/auditing/request-headers",
                {read: self._audited, listing: self._audited},
                sudo=True,
                help="Request headers that are entered in the audit log.",
                fields={},
            ),
            Route(
                "config/auditing/request-headers/{name}",
                {read: self._audited_one, update: self._audit_header, delete: self._no_audit_header},
                sudo=True,
                help="One request header in the audit log; hmac hides its value.",
                fields=takes(hmac=BOOL),
            ),
            Route(
                "config/ui/headers",
                {listing: self._ui_names, read: self._ui_names},
                sudo=True,
                help="Headers of the web UI's answers.",
                fields={},
            ),
            Route(
                "config/ui/headers/{name}",
                {read: self._ui_header, update: self._set_ui_header, delete: self._no_ui_header},
                sudo=True,
                help="One header of the web UI's answers.",
                fields=takes(values=ANY, multivalue=BOOL),
            ),
            Route(
                "config/state/sanitized",
                {read: self._sanitized},
                help="The configuration this node runs with, without secrets.",
                fields={},
            ),
        ]

    async def _cors(self, call: Call, params: Params) -> Answer:
        cors = self._settings.cors
        if not cors.enabled:
            return Answer({"enabled": False})
        return Answer({"enabled": True, "allowed_origins": list(cors.origins), "allowed_headers": list(cors.headers)})

    async def _set_cors(self, call: Call, params: Params) -> None:
        fields = Fields(call.data)
        await self._settings.set_cors(
            checked_cors(fields.strings("allowed_origins"), fields.strings("allowed_headers"))
        )

    async def _no_cors(self, call: Call, params: Params) -> None:
        await self._settings.set_cors(Cors())

    async def _audited(self, call: Call, params: Params) -> Answer:
        audited = self._settings.audited_headers
        return Answer({"headers": {name: {"hmac": hashed} for name, hashed in sorted(audited.items())}})

    async def _audited_one(self, call: Call, params: Params) -> Answer:
        name = checked_header_name(params["name"])
        hashed = self._settings.audited_headers.get(name)
        if hashed is None:
            raise InvalidRequest("Could not find header in config")
        return Answer({name: {"hmac": hashed}})

    async def _audit_header(self, call: Call, params: Params) -> None:
        await self._settings.set_audited_header(params["name"], hashed=Fields(call.data).boolean("hmac"))

    async def _no_audit_header(self, call: Call, params: Params) -> None:
        await self._settings.set_audited_header(params["name"], hashed=None)

    async def _ui_names(self, call: Call, params: Params) -> Answer:
        names = sorted(self._settings.ui_headers)
        return Answer({"keys": names}) if names else Answer(status=404)

    async def _ui_header(self, call: Call, params: Params) -> Answer:
        values = self._settings.ui_headers.get(checked_header_name(params["name"]))
        if values is None:
            raise NotFound
        return Answer({"values": values} if Fields(call.data).boolean("multivalue") else {"value": values[0]})

    async def _set_ui_header(self, call: Call, params: Params) -> None:
        given = call.data.get("values")
        # One text is one value: a header's value may hold commas.
        values = Fields({"values": [given] if isinstance(given, str) else given}).strings("values")
        if not values:
            raise InvalidRequest("values cannot be empty")
        await self._settings.set_ui_header(params["name"], values)

    async def _no_ui_header(self, call: Call, params: Params) -> None:
        await self._settings.set_ui_header(params["name"], None)

    async def _sanitized(self, call: Call, params: Params) -> Answer:
        return Answer(dict(self._core.options.sanitized_config))
