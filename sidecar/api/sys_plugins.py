"""``sys/plugins/*``: the engines and auth methods there are, and loading a mount's engine anew."""

from __future__ import annotations

from typing import Any

from plugin_api.errors import InvalidRequest, NotFound
from plugin_api.framework import FieldSpec, FieldType
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import LIST, STRING, takes
from sidecar.version import PLUGIN_VERSION

TYPES = ("auth", "database", "secret")
_NOT_YET = (
    "a plugin cannot be registered here: engines and auth methods run inside the server and are installed with it, as "
    "Python packages with an entry point"
)
_REGISTRATION = takes(
    sha256=STRING, sha_256=STRING, command=STRING, args=LIST, env=LIST, version=STRING, oci_image=STRING, runtime=STRING
)


class SysPlugins:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read, update, delete, listing = Operation.READ, Operation.UPDATE, Operation.DELETE, Operation.LIST
        one = {read: self._one, update: self._register, delete: self._deregister}
        reload = takes(plugin=STRING, mounts=LIST, scope=STRING)
        return [
            Route("plugins/catalog", {read: self._all, listing: self._all}, help="Plugins by type.", fields={}),
            Route("plugins/catalog/{type}", {listing: self._of_type}, help="Plugins of a type.", fields={}),
            Route(
                "plugins/catalog/{type}/{name}",
                one,
                sudo=True,
                help="One plugin.",
                fields={**_REGISTRATION, "name": FieldSpec(FieldType.STRING)},
            ),
            Route("plugins/reload/backend", {update: self._reload}, help="Load engines of mounts anew.", fields=reload),
            Route(
                "plugins/reload/{type}/{name}",
                {update: self._reload_named},
                help="Load the engines of a plugin anew.",
                fields=takes(scope=STRING),
            ),
        ]

    def _types(self) -> dict[str, list[str]]:
        return {"database": [], **self._core.mounts.plugin_types()}

    async def _all(self, call: Call, params: Params) -> Answer:
        types = self._types()
        detailed = [self._detail(kind, name) for kind in TYPES for name in types[kind]]
        return Answer({**{kind: types[kind] for kind in TYPES}, "detailed": detailed})

    def _detail(self, kind: str, name: str) -> dict[str, Any]:
        return {
            "builtin": True,
            "deprecation_status": "supported",
            "name": name,
            "type": kind,
            "version": PLUGIN_VERSION,
        }

    async def _of_type(self, call: Call, params: Params) -> Answer:
        names = self._types()[_type(params)]
        return Answer({"keys": names}) if names else Answer(status=404)

    async def _one(self, call: Call, params: Params) -> Answer:
        kind, name = _type(params), params["name"]
        if name not in self._types()[kind]:
            raise NotFound
        detail = self._detail(kind, name)
        del detail["type"]
        return Answer({**detail, "args": None, "command": "", "sha256": ""})

    async def _register(self, call: Call, params: Params) -> None:
        _type(params)
        raise InvalidRequest(_NOT_YET)

    async def _deregister(self, call: Call, params: Params) -> None:
        # What is not registered is gone already; what is built in stays.
        if params["name"] in self._types()[_type(params)]:
            raise InvalidRequest(f'"{params["name"]}" is a builtin plugin')

    async def _reload(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        plugin, mounts = fields.string("plugin"), fields.strings("mounts")
        if bool(plugin) == bool(mounts):
            raise InvalidRequest("one of plugin or mounts must be provided, and not both")
        for path in mounts:
            if self._core.mounts.router.get(path.strip("/") + "/") is None:
                raise InvalidRequest(f'cannot fetch mount entry on "{path.strip("/")}/"')
        self._core.mounts.reload(plugin, {path.strip("/") + "/" for path in mounts})
        return Answer({"reload_id": call.id})

    async def _reload_named(self, call: Call, params: Params) -> Answer:
        if params["name"] not in self._types()[_type(params)]:
            raise InvalidRequest(f"plugin not found in the catalog: {params['name']}")
        self._core.mounts.reload(params["name"], set())
        return Answer({"reload_id": call.id})


def _type(params: Params) -> str:
    if params["type"] not in TYPES:
        raise InvalidRequest(f"unsupported plugin type: there are {', '.join(TYPES)}")
    return params["type"]
