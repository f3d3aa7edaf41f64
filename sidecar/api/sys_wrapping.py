"""``sys/wrapping/*`` (contract 5.5): these take the wrapping token itself, as the caller's or as a parameter."""

from __future__ import annotations

from plugin_api.errors import InvalidRequest
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call
from sidecar.request.errors import TokenRefused
from sidecar.request.fields import Fields
from sidecar.request.route_table import STRING, in_query, takes


class SysWrapping:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table. All but ``wrap`` are open: the wrapping token must not be *used* before it is redeemed."""
        read, update = Operation.READ, Operation.UPDATE
        token = takes(token=STRING)
        return [
            Route("wrapping/wrap", {update: self._wrap}, help="Wrap any JSON object."),
            Route(
                "wrapping/lookup",
                {read: self._lookup, update: self._lookup},
                open=True,
                help="What is known of a wrapping token.",
                fields={"token": in_query(STRING, read)},
            ),
            Route("wrapping/unwrap", {update: self._unwrap}, open=True, help="What was wrapped, once.", fields=token),
            Route("wrapping/rewrap", {update: self._rewrap}, open=True, help="A fresh wrapping token.", fields=token),
        ]

    async def _wrap(self, call: Call, params: Params) -> Answer:
        if call.wrap_ttl_s <= 0:
            raise InvalidRequest("endpoint requires response wrapping to be used")
        return Answer(dict(call.data))

    async def _lookup(self, call: Call, params: Params) -> Answer:
        token = Fields(call.data).string("token") or call.token
        if not token:
            raise InvalidRequest('missing "token" value in input')
        return Answer(await self._core.wrapping.lookup(token))

    async def _unwrap(self, call: Call, params: Params) -> Answer:
        return Answer(stored=await self._core.wrapping.unwrap(await self._redeemed(call)))

    async def _rewrap(self, call: Call, params: Params) -> Answer:
        return Answer(wrap_info=await self._core.wrapping.rewrap(await self._redeemed(call)))

    async def _redeemed(self, call: Call) -> str:
        """The wrapping token: the caller's own, or one given as a parameter by a caller who may ask."""
        if not call.token:
            raise TokenRefused
        token = Fields(call.data).string("token")
        if not token or token == call.token:
            return call.token
        async with self._core.pipeline.identified(call):
            self._core.pipeline.authorize(call)
        return token
