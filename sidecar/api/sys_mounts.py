"""``sys/mounts``, ``sys/auth`` and what the UI and the CLI ask about mounts (contract 4.12)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from plugin_api.errors import InvalidRequest, PermissionDenied, ReadOnlyStorage
from plugin_api.request import Operation
from sidecar.api.lockout_fields import tuned_lockout
from sidecar.api.mount_config import (
    MOUNTING,
    TUNABLE,
    check_plugin_version,
    check_token_type_tunable,
    config_of,
    describe,
    tuning,
)
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.mounts import AUTH, SECRETS, MountConfig, MountEntry, check_config
from sidecar.core.quotas import Quotas
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.mount_view import BUILT_IN
from sidecar.request.pending_work import can_undo, undo_left_over

_KV_ALIASES = {"kv-v1": "1", "kv-v2": "2", "generic": "1"}


class SysMounts:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore, quotas: Quotas) -> None:
        self._core = core
        self._quotas = quotas
        self._mounts = core.mounts

    def routes(self) -> list[Route]:
        """Rows of the table; ``tune`` before the catch-all that would swallow it."""
        read, update, delete = Operation.READ, Operation.UPDATE, Operation.DELETE
        tune = {read: self._read_tuning, update: self._tune}
        one = {read: self._read_mount, update: self._mount, delete: self._unmount}
        return [
            Route("mounts", {read: self._list_secrets}, help="Secrets engines by path.", fields={}),
            Route("mounts/{path*}/tune", tune, help="Settings of a mount.", fields=TUNABLE),
            Route("mounts/{path*}", one, help="One mount.", fields=MOUNTING),
            Route("auth", {read: self._list_auth}, help="Auth methods by path.", fields={}),
            Route("auth/{auth_path*}/tune", tune, sudo=True, help="Settings of an auth method.", fields=TUNABLE),
            Route("auth/{auth_path*}", one, sudo=True, help="One auth method.", fields=MOUNTING),
            Route("internal/ui/mounts", {read: self._visible}, open=True, help="Mounts for a login page.", fields={}),
            Route(
                "internal/ui/mounts/{path*}",
                {read: self._preflight},
                open=True,
                help="Which mount serves a path.",
                fields={},
            ),
        ]

    async def _list_secrets(self, call: Call, params: Params) -> Answer:
        return Answer({entry.path: describe(entry) for entry in self._mounts.table.entries(SECRETS)})

    async def _list_auth(self, call: Call, params: Params) -> Answer:
        return Answer({entry.path: describe(entry) for entry in self._mounts.table.entries(AUTH)})

    async def _read_mount(self, call: Call, params: Params) -> Answer:
        table, path = _place(params)
        entry = self._mounts.table.find(table, path)
        if entry is None:
            raise InvalidRequest(f"No {'auth' if table == AUTH else 'secret'} engine at {path.rstrip('/')}/")
        return Answer(describe(entry))

    async def _mount(self, call: Call, params: Params) -> None:
        table, path = _place(params)
        fields = Fields(call.data)
        type_name, options = fields.string("type"), fields.string_mapping("options")
        if type_name in ("", "plugin"):
            type_name = fields.string("plugin_name")
        if table == SECRETS and type_name in _KV_ALIASES:
            type_name, options = "kv", {"version": _KV_ALIASES[type_name], **options}
        if type_name in BUILT_IN:
            raise InvalidRequest(f"plugin not found in the catalog: {type_name}")
        check_plugin_version(fields)
        await self._mounts.table.mount(
            table,
            path,
            type_name,
            description=fields.string("description"),
            options=options or None,
            config=config_of(Fields(fields.mapping("config")), MountConfig()),
            local=fields.boolean("local"),
            seal_wrap=fields.boolean("seal_wrap"),
            external_entropy_access=fields.boolean("external_entropy_access"),
            check=self._mounts.check,
        )
        self._mounts.refresh()

    async def _unmount(self, call: Call, params: Params) -> None:
        table, path = _place(params)
        entry = self._mounts.table.find(table, path)
        if entry is None or entry.type in BUILT_IN:
            await self._mounts.table.unmount(table, path)
            return
        async with emptied(self._core, entry, force=Fields(call.data).boolean("force")):
            await self._mounts.table.unmount(table, path)
            self._mounts.refresh()
        await self._quotas.mount_gone(entry.full_path)
        self._core.mounts_changed()
        if self._core.replication is not None and not entry.local:
            await self._core.replication.filters.mount_removed(entry.full_path)

    async def _read_tuning(self, call: Call, params: Params) -> Answer:
        return Answer(tuning(self._tuned_entry(params), self._mounts.defaults))

    async def _tune(self, call: Call, params: Params) -> Answer | None:
        entry = self._tuned_entry(params)
        fields = Fields(call.data)
        check_plugin_version(fields)
        options = fields.string_mapping("options") if fields.given("options") else None
        if fields.given("token_type"):
            check_token_type_tunable(entry)
        config = config_of(fields, entry.config)
        if fields.given("user_lockout_config"):
            tuned = tuned_lockout(entry, Fields(fields.mapping("user_lockout_config")))
            config = msgspec.structs.replace(config, user_lockout=tuned)
        check_config(config)
        description = fields.string("description") if fields.given("description") else None
        if not entry.local and not self._core.writable():
            raise ReadOnlyStorage
        try:
            warnings = await self._mounts.prepare_options(entry, {**(entry.options or {}), **(options or {})})
            await self._mounts.table.tune(
                entry.table, entry.path, config=config, description=description, options=options
            )
        except BaseException:
            # The old engine may have prepared for its end: one that serves takes its place.
            self._mounts.reload("", {entry.full_path})
            raise
        self._mounts.refresh()
        self._core.mounts_changed()
        return Answer(warnings=warnings) if warnings else None

    def _tuned_entry(self, params: Params) -> MountEntry:
        table, path = _place(params)
        if table == SECRETS and path.startswith("auth/"):
            table, path = AUTH, path.removeprefix("auth/")
        entry = self._mounts.table.find(table, path)
        if entry is None:
            prefix = "auth/" if table == AUTH else ""
            raise InvalidRequest(f'cannot fetch sysview for path "{prefix}{path.rstrip("/")}/"')
        return entry

    async def _visible(self, call: Call, params: Params) -> Answer:
        """Mounts for a login page: those marked as visible, and with a token those it can use."""
        data: dict[str, Any] = {"auth": {}, "secret": {}}
        acl = None
        if call.token:
            async with self._core.pipeline.identified(call) as identity:
                acl = identity.acl
        for table, group in ((AUTH, "auth"), (SECRETS, "secret")):
            for entry in self._mounts.table.entries(table):
                if acl is not None and acl.has_any_under(entry.full_path):
                    data[group][entry.path] = describe(entry)
                elif entry.config.listing_visibility == "unauth":
                    data[group][entry.path] = {
                        "description": entry.description,
                        "options": entry.options,
                        "type": entry.type,
                    }
        return Answer(data)

    async def _preflight(self, call: Call, params: Params) -> Answer:
        """Which mount serves a path; unknown mounts and forbidden ones answer alike."""
        wanted = params["path"].rstrip("/") + "/"
        async with self._core.pipeline.identified(call) as identity:
            entry = self._serving(wanted)
            if entry is None or not identity.acl.has_any_under(entry.full_path):
                raise PermissionDenied(
                    "preflight capability check returned 403, please ensure client's policies grant access to "
                    f'path "{wanted}"'
                )
        return Answer({**describe(entry), "path": entry.full_path})

    def _serving(self, path: str) -> MountEntry | None:
        entries = [*self._mounts.table.entries(SECRETS), *self._mounts.table.entries(AUTH)]
        serving = [entry for entry in entries if path.startswith(entry.full_path)]
        return max(serving, key=lambda entry: len(entry.full_path), default=None)


@asynccontextmanager
async def emptied(core: SysCore, entry: MountEntry, *, force: bool = False) -> AsyncIterator[None]:
    """In the block no request reaches the mount, and everything it has issued is revoked. Where that fails the mount
    stays as it was, unless with ``force``, which forgets what cannot be revoked."""
    if not entry.local and not core.writable():
        raise ReadOnlyStorage
    async with core.mounts.closed(entry):
        await core.leasing.revocation.revoke_prefix(entry.full_path, force=force)
        await _undone(core, entry, force=force)
        yield


async def _undone(core: SysCore, entry: MountEntry, *, force: bool) -> None:
    """Have the engine undo what it has begun outside. Raises InvalidRequest where it cannot, unless with ``force``."""
    engine = core.mounts.engine(entry.uuid)
    if engine is None or not can_undo(engine):
        return
    failed = await undo_left_over(engine, min_age_s=0, force=force)
    if failed and not force:
        raise InvalidRequest(
            f"the engine at {entry.full_path} could not undo all that it has begun: see the log, repair what is in its "
            "way and try again, or say force to leave it as it is"
        )


def _place(params: Params) -> tuple[str, str]:
    """(table, path in it) of what the request names."""
    if "auth_path" in params:
        return AUTH, params["auth_path"]
    return SECRETS, params["path"]
