"""``sys/replication/*`` (contract 1): checks what came, asks :class:`~sidecar.api.replication_api.ReplicationAPI`."""

from __future__ import annotations

import re
from typing import Any

from plugin_api.errors import InvalidRequest, UnsupportedPath
from plugin_api.request import Operation, Response
from sidecar.api.replication_api import ReplicationAPI
from sidecar.api.sys_core import Handler, Params, Route, SysCore
from sidecar.core.operation_tokens import OperationTokens
from sidecar.request.call import Answer, Call, Wrap
from sidecar.request.fields import Fields

PERFORMANCE = "performance"
TOKEN_TTL_S = 1800
CA_OVERLAP_S = 7 * 24 * 60 * 60
NOT_A_DR_SECONDARY = "Not a DR secondary."
DR_ACTIONS = (
    "promote",
    "disable",
    "update-primary",
    "recover",
    "reindex",
    "merkle-check",
    "accept-deletions",
    "generate-operation-token/attempt",
    "generate-operation-token/update",
)
"""What a DR secondary does for whoever has a DR operation token, or enough key shares."""
_ID = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
_ID_CHARS_MAX = 128


class SysReplication:
    """Handlers of one tenure of a cluster that is no DR secondary."""

    def __init__(self, core: SysCore, operation_tokens: OperationTokens) -> None:
        self._core = core
        self._operation_tokens = operation_tokens

    def routes(self) -> list[Route]:
        """Rows of the table: status without a token, each action per mode, and the older names without a mode."""
        update = Operation.UPDATE
        rows = [
            Route("replication/status", {Operation.READ: self._both}, open=True, help="Status of both modes."),
            Route("replication/{mode}/status", {Operation.READ: self._one}, open=True),
            Route("replication/merkle-check", {update: self._merkle_check}),
            Route("replication/reindex", {update: self._reindex}, sudo=True),
            Route("replication/recover", {update: self._recover}),
        ]
        # Open, as they are where they work: there a DR operation token is asked for, here the mode is wrong anyway.
        rows += [
            Route(f"replication/dr/secondary/{action}", {update: self._not_a_dr_secondary}, open=True)
            for action in DR_ACTIONS
        ]
        rows.append(Route("replication/dr/secondary/operation-token/delete", {update: self._delete_token}, open=True))
        actions = (
            ("primary/enable", self._primary_enable, False),
            ("primary/demote", self._primary_demote, False),
            ("primary/disable", self._primary_disable, False),
            ("primary/secondary-token", self._secondary_token, True),
            ("primary/revoke-secondary", self._revoke_secondary, False),
            ("primary/rotate-ca", self._rotate_ca, True),
            ("secondary/generate-public-key", self._public_key, False),
            ("secondary/enable", self._secondary_enable, False),
            ("secondary/promote", self._secondary_promote, False),
            ("secondary/disable", self._secondary_disable, False),
            ("secondary/update-primary", self._secondary_update_primary, False),
            ("secondary/accept-deletions", self._accept_deletions, True),
        )
        for path, handler, sudo in actions:
            rows.append(Route(f"replication/{path}", {update: handler}, sudo=sudo))
            rows.append(Route(f"replication/{{mode}}/{path}", {update: handler}, sudo=sudo))
        return (
            rows
            + self._filter_routes()
            + lost_writes_routes(self._lost_writes, self._lost_one, self._lost_export, self._lost_delete)
        )

    def _filter_routes(self) -> list[Route]:
        """Paths filters, with the name they had before 1.11, and mounts whose data is not held."""
        base = "replication/performance"
        handlers = {
            Operation.READ: self._read_filter,
            Operation.UPDATE: self._set_filter,
            Operation.DELETE: self._delete_filter,
        }
        return [
            Route(f"{base}/primary/paths-filter/{{id}}", handlers),
            Route(f"{base}/primary/mount-filter/{{id}}", handlers),
            Route(f"{base}/{{kind}}/dynamic-filter/{{id}}", {Operation.READ: self._dynamic_filter}),
            Route(f"{base}/not-held", {Operation.READ: self._not_held}),
            Route(f"{base}/not-held/accept-empty", {Operation.UPDATE: self._accept_empty}, sudo=True),
        ]

    async def _read_filter(self, call: Call, params: Params) -> Answer:
        return Answer(self._api().filters.get(_checked_id(params["id"])))

    async def _set_filter(self, call: Call, params: Params) -> None:
        fields = Fields(call.data)
        await self._api().filters.set(_checked_id(params["id"]), fields.string("mode"), fields.strings("paths"))

    async def _delete_filter(self, call: Call, params: Params) -> None:
        await self._api().filters.delete(_checked_id(params["id"]))

    async def _dynamic_filter(self, call: Call, params: Params) -> Answer:
        if params["kind"] not in ("primary", "secondary"):
            raise UnsupportedPath
        return Answer(self._api().filters.dynamic(params["kind"], _checked_id(params["id"])))

    async def _not_held(self, call: Call, params: Params) -> Answer:
        return Answer(self._api().filters.lacking())

    async def _accept_empty(self, call: Call, params: Params) -> None:
        await self._api().filters.accept_empty(Fields(call.data).strings("paths"))

    async def _both(self, call: Call, params: Params) -> Answer:
        if self._core.replication is None:
            return Answer({"dr": {"mode": "disabled"}, "performance": {"mode": "disabled"}})
        return Answer(await self._core.replication.status(None))

    async def _one(self, call: Call, params: Params) -> Answer:
        mode = mode_of(params)
        if self._core.replication is None:
            return Answer({"mode": "disabled"})
        return Answer(await self._core.replication.status(mode))

    async def _merkle_check(self, call: Call, params: Params) -> Answer:
        return answer_of(await self._api().merkle_check())

    async def _reindex(self, call: Call, params: Params) -> Answer:
        return await reindex(self._api(), Fields(call.data))

    async def _recover(self, call: Call, params: Params) -> Answer:
        return answer_of(await self._api().recover(force=Fields(call.data).boolean("force")))

    async def _not_a_dr_secondary(self, call: Call, params: Params) -> None:
        if self._core.replication is not None:
            self._core.replication.require_steady()  # it may be just becoming one
        raise InvalidRequest(NOT_A_DR_SECONDARY)

    async def _delete_token(self, call: Call, params: Params) -> None:
        """Also after a promotion, which does not consume it."""
        await self._operation_tokens.delete(Fields(call.data).string("dr_operation_token"))

    async def _primary_enable(self, call: Call, params: Params) -> Answer:
        address = Fields(call.data).string("primary_cluster_addr")
        return answer_of(await self._api().primary_enable(mode_of(params), address))

    async def _primary_demote(self, call: Call, params: Params) -> Answer:
        return answer_of(await self._api().primary_demote(mode_of(params)))

    async def _primary_disable(self, call: Call, params: Params) -> Answer:
        return answer_of(await self._api().primary_disable(mode_of(params)))

    async def _secondary_token(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        secondary_id = _secondary_id(fields)
        ttl_s = fields.duration_s("ttl", TOKEN_TTL_S) or TOKEN_TTL_S
        public_key = fields.string("secondary_public_key")
        payload, claims = await self._api().secondary_token(mode_of(params), secondary_id, ttl_s, public_key)
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
        await self._api().revoke_secondary(mode_of(params), _secondary_id(Fields(call.data)))

    async def _rotate_ca(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        overlap_s = fields.duration_s("overlap", CA_OVERLAP_S)
        force = fields.boolean("force")
        return answer_of(await self._api().rotate_authority(mode_of(params), overlap_s, force=force))

    async def _public_key(self, call: Call, params: Params) -> Answer:
        return answer_of(await self._api().secondary_public_key(mode_of(params)))

    async def _secondary_enable(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        token = fields.string("token").strip()
        if not token:
            raise InvalidRequest("token must be specified")
        api = self._api()
        act = api.secondary_preflight if fields.boolean("preflight") else api.secondary_enable
        response = await act(
            mode_of(params),
            token,
            fields.string("primary_api_addr").rstrip("/"),
            fields.string("ca_file"),
            fields.string("ca_path"),
        )
        return answer_of(response)

    async def _secondary_disable(self, call: Call, params: Params) -> Answer:
        return answer_of(await self._api().secondary_disable(mode_of(params)))

    async def _secondary_promote(self, call: Call, params: Params) -> Answer:
        return await promote(self._api(), mode_of(params), Fields(call.data))

    async def _secondary_update_primary(self, call: Call, params: Params) -> Answer:
        return await update_primary(self._api(), mode_of(params), Fields(call.data))

    async def _accept_deletions(self, call: Call, params: Params) -> Answer:
        return await accept_deletions(self._api(), mode_of(params), Fields(call.data))

    async def _lost_writes(self, call: Call, params: Params) -> Answer:
        return answer_of(await self._api().lost_writes(mode_of(params)))

    async def _lost_one(self, call: Call, params: Params) -> Answer:
        return await lost_entries(self._api(), call, params, values=False)

    async def _lost_export(self, call: Call, params: Params) -> Answer:
        return await lost_entries(self._api(), call, params, values=True)

    async def _lost_delete(self, call: Call, params: Params) -> None:
        await self._api().lost_writes_delete(mode_of(params), params["id"])

    def _api(self) -> ReplicationAPI:
        if self._core.replication is None:
            raise UnsupportedPath
        return self._core.replication


def lost_writes_routes(listed: Handler, one: Handler, export: Handler, delete: Handler) -> list[Route]:
    """Rows for the records of lost writes; what they hold is for those who may use ``sudo``."""
    base = "replication/{mode}/lost-writes"
    return [
        Route(base, {Operation.READ: listed, Operation.LIST: listed}, sudo=True, help="Lost writes."),
        Route(base + "/{id}", {Operation.READ: one, Operation.DELETE: delete}, sudo=True),
        Route(base + "/{id}/export", {Operation.READ: export}, sudo=True),
    ]


async def reindex(api: ReplicationAPI, fields: Fields) -> Answer:
    """Contract 1.13; ``deletions`` is ours."""
    diff, force, skip_flush = (fields.boolean(name) for name in ("diff", "force", "skip_flush"))
    return answer_of(await api.reindex(diff, force, skip_flush, max(0, fields.integer("deletions"))))


async def promote(api: ReplicationAPI, mode: str, fields: Fields) -> Answer:
    """Contract 1.10."""
    return answer_of(
        await api.secondary_promote(
            mode,
            fields.string("primary_cluster_addr"),
            force=fields.boolean("force"),
            preview=fields.boolean("preview"),
        )
    )


async def update_primary(api: ReplicationAPI, mode: str, fields: Fields) -> Answer:
    """Contract 1.12. A blank token is one; without token and addresses nobody said what to do."""
    addresses = fields.strings("update_primary_addrs")
    if not fields.given("token") and not addresses:
        raise InvalidRequest('token must be specified; "" makes this secondary forget its primary')
    return answer_of(
        await api.secondary_update_primary(
            mode,
            fields.string("token").strip(),
            primary_api_addr=fields.string("primary_api_addr").rstrip("/"),
            ca_file=fields.string("ca_file"),
            ca_path=fields.string("ca_path"),
            addresses=addresses,
        )
    )


async def accept_deletions(api: ReplicationAPI, mode: str, fields: Fields) -> Answer:
    """Ours: what an operator says to a secondary that its mass-delete brake has stopped."""
    if not fields.given("deletions"):
        raise InvalidRequest("deletions must be specified: how many the status says under brake")
    deletions = fields.integer("deletions")
    if deletions < 1:
        raise InvalidRequest("deletions must be positive")
    return answer_of(await api.accept_deletions(mode, deletions))


async def lost_entries(api: ReplicationAPI, call: Call, params: Params, *, values: bool) -> Answer:
    """One page of a record of lost writes."""
    page = Fields(call.data).string("page")
    return answer_of(await api.lost_writes_read(mode_of(params), params["id"], page, values=values))


def mode_of(params: Params) -> str:
    """The mode in the path; the oldest paths have none and mean performance."""
    mode = params.get("mode", PERFORMANCE)
    if mode not in (PERFORMANCE, "dr"):
        raise UnsupportedPath
    return mode


def _secondary_id(fields: Fields) -> str:
    secondary_id = fields.string("id")
    if not secondary_id:
        raise InvalidRequest("id must be specified")
    return _checked_id(secondary_id)


def _checked_id(secondary_id: str) -> str:
    if len(secondary_id) > _ID_CHARS_MAX or not _ID.fullmatch(secondary_id):
        raise InvalidRequest(
            "id may hold letters, digits, '_', '.' and '-', and begins and ends with none of the last two"
        )
    return secondary_id


def answer_of(response: Response) -> Answer:
    """Data and warnings as they are."""
    data: dict[str, Any] | None = response.data
    return Answer(data, warnings=list(response.warnings))
