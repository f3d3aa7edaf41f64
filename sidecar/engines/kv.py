"""The key/value engine: mount option ``version`` chooses plain values (1, the default) or versioned ones (2)."""

from __future__ import annotations

from typing import ClassVar

from plugin_api.engine import Engine, EngineContext
from plugin_api.errors import InvalidRequest
from plugin_api.request import Request, Response
from sidecar.engines.kv_v1 import KVv1
from sidecar.engines.kv_v2 import KVv2


class KV(Engine):
    """One ``kv`` mount. Raises InvalidRequest when made for a mount whose version is neither 1 nor 2."""

    type_name: ClassVar[str] = "kv"

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        version = context.mount.options.get("version", "") or "1"
        if version not in _ENGINES:
            raise InvalidRequest("invalid kv version: it must be 1 or 2")
        self._engine = _ENGINES[version](context)

    async def handle(self, request: Request) -> Response | None:
        return await self._engine.handle(request)

    async def exists(self, request: Request) -> bool | None:
        return await self._engine.exists(request)

    async def invalidate(self, path: str) -> None:
        await self._engine.invalidate(path)

    def help(self, path: str) -> str:
        return self._engine.help(path)


_ENGINES: dict[str, type[KVv1] | type[KVv2]] = {"1": KVv1, "2": KVv2}
