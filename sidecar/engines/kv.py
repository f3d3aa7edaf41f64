"""The key/value engine: mount option ``version`` chooses plain values (1, the default) or versioned ones (2)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import ClassVar

from plugin_api.description import PathDescription
from plugin_api.engine import Engine, EngineContext
from plugin_api.errors import InvalidRequest
from plugin_api.request import Request, Response
from sidecar.engines import kv_upgrade
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
        self._version = version
        self._engine = _ENGINES[version](context)
        self._upgraded = version == "1"
        self._retired = False
        self._running = 0
        self._idle = asyncio.Event()

    async def handle(self, request: Request) -> Response | None:
        await self._check_upgraded()
        self._running += 1
        try:
            return await self._engine.handle(request)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def exists(self, request: Request) -> bool | None:
        await self._check_upgraded()
        return await self._engine.exists(request)

    async def retune(self, options: Mapping[str, str]) -> list[str]:
        version = options.get("version", "") or "1"
        if version not in _ENGINES:
            raise InvalidRequest("invalid kv version: it must be 1 or 2")
        if version == self._version:
            return []
        if version == "1":
            raise InvalidRequest("cannot downgrade mount from version 2")
        # No write of this engine may come after its successor has looked for what there is to upgrade.
        self._retired = True
        while self._running:
            self._idle.clear()
            await self._idle.wait()
        await kv_upgrade.begin(self.context.storage)
        return [kv_upgrade.STARTED]

    async def initialize(self) -> None:
        if not self._upgraded:
            await kv_upgrade.upgrade(self.context.storage, lambda: round(self.context.now() * 1_000_000))

    async def _check_upgraded(self) -> None:
        if self._retired:
            raise InvalidRequest(kv_upgrade.UNDER_WAY)
        if not self._upgraded:
            if await kv_upgrade.is_under_way(self.context.storage):
                raise InvalidRequest(kv_upgrade.UNDER_WAY)
            self._upgraded = True

    async def invalidate(self, path: str) -> None:
        if path == kv_upgrade.STATE:
            self._upgraded = self._version == "1"
        await self._engine.invalidate(path)

    def help(self, path: str) -> str:
        return self._engine.help(path)

    def describe(self) -> Sequence[PathDescription]:
        return self._engine.describe()


_ENGINES: dict[str, type[KVv1] | type[KVv2]] = {"1": KVv1, "2": KVv2}
