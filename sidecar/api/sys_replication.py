"""``sys/replication/*`` (contract 1): checks what came, asks :class:`~sidecar.api.replication_api.ReplicationAPI`."""

from __future__ import annotations

import re
from typing import Any

from plugin_api.errors import InvalidRequest, UnsupportedPath
from plugin_api.request import Operation, Response
from sidecar.api.replication_api import ReplicationAPI
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call, Wrap
from sidecar.request.fields import Fields

PERFORMANCE = "performance"
TOKEN_TTL_S = 1800
_ID = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
_ID_CHARS_MAX = 128


class SysReplication:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table: status without a token, each action per mode, and the older names without a mode."""
        rows = [
            Route("replication/status", {Operation.READ: self._both}, open=True, help="Status of both modes."),
            Route("replication/{mode}/status", {Operation.READ: self._one}, open=True),
            Route("replication/merkle-check", {Operation.UPDATE: self._merkle_check}),
            Route("replication/reindex", {Operation.UPDATE: self._reindex}, sudo=True),
            Route("replication/recover", {Operation.UPDATE: self._recover}),
        ]
        actions = (
            ("primary/enable", self._primary_enable, False),
            ("primary/disable", self._primary_disable, False),
            ("primary/secondary-token", self._secondary_token, True),
            ("primary/revoke-secondary", self._revoke_secondary, False),
            ("secondary/enable", self._secondary_enable, False),
            ("secondary/disable", self._secondary_disable, False),
        )
        for path, handler, sudo in actions:
            rows.append(Route(f"replication/{path}", {Operation.UPDATE: handler}, sudo=sudo))
            rows.append(Route(f"replication/{{mode}}/{path}", {Operation.UPDATE: handler}, sudo=sudo))
        return rows

    async def _both(self, call: Call, params: Params) -> Answer:
        if self._core.replication is None:
            return Answer({"dr": {"mode": "disabled"}, "performance": {"mode": "disabled"}})
        return Answer(await self._core.replication.status(None))

    async def _one(self, call: Call, params: Params) -> Answer:
        mode = _mode(params)
        if self._core.replication is None:
            return Answer({"mode": "disabled"})
        return Answer(await self._core.replication.status(mode))

    async def _merkle_check(self, call: Call, params: Params) -> Answer:
        return _answer(await self._api().merkle_check())

    async def _reindex(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        return _answer(
            await self._api().reindex(fields.boolean("diff"), fields.boolean("force"), fields.boolean("skip_flush"))
        )

    async def _recover(self, call: Call, params: Params) -> Answer:
        return _answer(await self._api().recover())

    async def _primary_enable(self, call: Call, params: Params) -> Answer:
        address = Fields(call.data).string("primary_cluster_addr")
        return _answer(await self._api().primary_enable(_mode(params), address))

    async def _primary_disable(self, call: Call, params: Params) -> Answer:
        return _answer(await self._api().primary_disable(_mode(params)))

    async def _secondary_token(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        secondary_id = _secondary_id(fields)
        ttl_s = fields.duration_s("ttl", TOKEN_TTL_S) or TOKEN_TTL_S
        public_key = fields.string("secondary_public_key")
        payload, claims = await self._api().secondary_token(_mode(params), secondary_id, ttl_s, public_key)
        if public_key:
            return Answer(payload)
        answer = Answer(payload, wrap=Wrap(ttl_s, jwt=True, claims=claims))
        if not self._core.options.api_addr:
            answer.warnings.append(
                "No redirect address set in Vault so none could be encoded in the token. You may need to supply "
                "Vault's API address when unwrapping the token."
            )
        return answer

    async def _revoke_secondary(self, call: Call, params: Params) -> None:
        await self._api().revoke_secondary(_mode(params), _secondary_id(Fields(call.data)))

    async def _secondary_enable(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        token = fields.string("token").strip()
        if not token:
            raise InvalidRequest("token must be specified")
        response = await self._api().secondary_enable(
            _mode(params),
            token,
            fields.string("primary_api_addr").rstrip("/"),
            fields.string("ca_file"),
            fields.string("ca_path"),
        )
        return _answer(response)

    async def _secondary_disable(self, call: Call, params: Params) -> Answer:
        return _answer(await self._api().secondary_disable(_mode(params)))

    def _api(self) -> ReplicationAPI:
        if self._core.replication is None:
            raise UnsupportedPath
        return self._core.replication


def _mode(params: Params) -> str:
    mode = params.get("mode", PERFORMANCE)
    if mode not in (PERFORMANCE, "dr"):
        raise UnsupportedPath
    return mode


def _secondary_id(fields: Fields) -> str:
    secondary_id = fields.string("id")
    if not secondary_id:
        raise InvalidRequest("id must be specified")
    if len(secondary_id) > _ID_CHARS_MAX or not _ID.fullmatch(secondary_id):
        raise InvalidRequest(
            "id may hold letters, digits, '_', '.' and '-', and begins and ends with none of the last two"
        )
    return secondary_id


def _answer(response: Response) -> Answer:
    data: dict[str, Any] | None = response.data
    return Answer(data, warnings=list(response.warnings))
