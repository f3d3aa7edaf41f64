"""``sys/mounts``, ``sys/auth``, ``sys/remount`` and what the UI and the CLI ask about mounts (contract 4.12)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from plugin_api.errors import InvalidRequest, PermissionDenied, ReadOnlyStorage
from plugin_api.request import Operation
from sidecar.api.lockout_fields import shown_lockout, tuned_lockout
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.mounts import AUTH, SECRETS, MountConfig, MountEntry
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.mount_view import BUILT_IN, mount_info

_KV_ALIASES = {"kv-v1": "1", "kv-v2": "2", "generic": "1"}
_LISTS = (
    "passthrough_request_headers",
    "allowed_response_headers",
    "audit_non_hmac_request_keys",
    "audit_non_hmac_response_keys",
)


class SysMounts:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core
        self._mounts = core.mounts

    def routes(self) -> list[Route]:
        """Rows of the table; ``tune`` before the catch-all that would swallow it."""
        read, update, delete = Operation.READ, Operation.UPDATE, Operation.DELETE
        tune = {read: self._read_tuning, update: self._tune}
        return [
            Route("mounts", {read: self._list_secrets}, help="Secrets engines by path."),
            Route("mounts/{path*}/tune", tune, help="Tune a mount."),
            Route("mounts/{path*}", {read: self._read_mount, update: self._mount, delete: self._unmount}),
            Route("auth", {read: self._list_auth}, help="Auth methods by path."),
            Route("auth/{auth_path*}/tune", tune, sudo=True),
            Route(
                "auth/{auth_path*}",
                {read: self._read_mount, update: self._mount, delete: self._unmount},
                sudo=True,
            ),
            Route("remount", {update: self._remount}, sudo=True, help="Move a mount."),
            Route("internal/ui/mounts", {read: self._visible}, open=True),
            Route("internal/ui/mounts/{path*}", {read: self._preflight}, open=True),
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
        await self._mounts.table.mount(
            table,
            path,
            type_name,
            description=fields.string("description"),
            options=options or None,
            config=_config(Fields(fields.mapping("config")), MountConfig()),
            local=fields.boolean("local"),
        )
        self._mounts.refresh()

    async def _unmount(self, call: Call, params: Params) -> None:
        table, path = _place(params)
        entry = self._mounts.table.find(table, path)
        if entry is None or entry.type in BUILT_IN:
            await self._mounts.table.unmount(table, path)
            return
        async with self._emptied(entry, force=Fields(call.data).boolean("force")):
            await self._mounts.table.unmount(table, path)
            self._mounts.refresh()
        self._core.mounts_changed()

    @asynccontextmanager
    async def _emptied(self, entry: MountEntry, *, force: bool = False) -> AsyncIterator[None]:
        """In the block no request reaches the mount, and everything it has issued is revoked. Where that fails the
        mount stays as it was, unless with ``force``, which forgets what cannot be revoked."""
        if not entry.local and not self._core.writable():
            raise ReadOnlyStorage
        async with self._mounts.closed(entry):
            await self._core.leasing.revocation.revoke_prefix(entry.full_path, force=force)
            yield

    async def _read_tuning(self, call: Call, params: Params) -> Answer:
        entry = self._tuned_entry(params)
        info = mount_info(entry, self._mounts.defaults)
        data: dict[str, Any] = {
            "default_lease_ttl": info.default_lease_ttl_s,
            "description": entry.description,
            "force_no_cache": entry.config.force_no_cache,
            "max_lease_ttl": info.max_lease_ttl_s,
        }
        if entry.options:
            data["options"] = entry.options
        optional = _optional_config(entry)
        lockout = optional.pop("user_lockout_config", {})
        return Answer(data | optional | lockout)

    async def _tune(self, call: Call, params: Params) -> None:
        entry = self._tuned_entry(params)
        fields = Fields(call.data)
        options = fields.string_mapping("options") if fields.given("options") else None
        if options is not None and entry.type == "kv":
            _check_version(entry, options)
        lockout = fields.mapping("user_lockout_config") if fields.given("user_lockout_config") else None
        config = _config(fields, entry.config)
        if lockout is not None:
            tuned = tuned_lockout(entry, Fields(lockout))
            config = msgspec.structs.replace(config, user_lockout=tuned)
        await self._mounts.table.tune(
            entry.table,
            entry.path,
            config=config,
            description=fields.string("description") if fields.given("description") else None,
            options=options,
        )
        self._mounts.refresh()

    def _tuned_entry(self, params: Params) -> MountEntry:
        table, path = _place(params)
        if table == SECRETS and path.startswith("auth/"):
            table, path = AUTH, path.removeprefix("auth/")
        entry = self._mounts.table.find(table, path)
        if entry is None:
            prefix = "auth/" if table == AUTH else ""
            raise InvalidRequest(f'cannot fetch sysview for path "{prefix}{path.rstrip("/")}/"')
        return entry

    async def _remount(self, call: Call, params: Params) -> None:
        fields = Fields(call.data)
        source, target = fields.string("from"), fields.string("to")
        if not source or not target:
            raise InvalidRequest("both 'from' and 'to' path must be specified as a string")
        entry, _ = self._mounts.table.check_remount(source, target)
        # As in Vault: what was issued under the old path does not follow.
        async with self._emptied(entry):
            await self._mounts.table.remount(source, target)
            self._mounts.refresh()

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


def describe(entry: MountEntry) -> dict[str, Any]:
    """One mount as the lists show it; a TTL of 0 is the system's default."""
    config: dict[str, Any] = {
        "default_lease_ttl": entry.config.default_lease_ttl_s,
        "force_no_cache": entry.config.force_no_cache,
        "max_lease_ttl": entry.config.max_lease_ttl_s,
        **_optional_config(entry),
    }
    return {
        "accessor": entry.accessor,
        "config": config,
        "description": entry.description,
        "external_entropy_access": False,
        "local": entry.local,
        "options": entry.options,
        "seal_wrap": False,
        "type": entry.type,
        "uuid": entry.uuid,
    }


def _optional_config(entry: MountEntry) -> dict[str, Any]:
    """Settings that are shown where they are set."""
    shown: dict[str, Any] = {}
    if entry.config.listing_visibility:
        shown["listing_visibility"] = entry.config.listing_visibility
    if entry.table == AUTH:
        shown["token_type"] = entry.config.token_type or "default-service"
    if entry.config.user_lockout is not None:
        shown["user_lockout_config"] = shown_lockout(entry.config.user_lockout)
    for name in _LISTS:
        values = getattr(entry.config, name)
        if values:
            shown[name] = list(values)
    return shown


def _place(params: Params) -> tuple[str, str]:
    """(table, path in it) of what the request names."""
    if "auth_path" in params:
        return AUTH, params["auth_path"]
    return SECRETS, params["path"]


def _config(fields: Fields, old: MountConfig) -> MountConfig:
    """``old`` with what was sent; ``system`` and -1 mean the system's default again."""
    changes: dict[str, Any] = {}
    for name in ("default_lease_ttl", "max_lease_ttl"):
        if fields.given(name):
            reset = fields.string(name) in ("", "system", "-1")
            changes[f"{name}_s"] = 0 if reset else fields.duration_s(name)
    if fields.given("force_no_cache"):
        changes["force_no_cache"] = fields.boolean("force_no_cache")
    for name in ("listing_visibility", "token_type"):
        if fields.given(name):
            changes[name] = fields.string(name)
    for name in _LISTS:
        if fields.given(name):
            changes[name] = tuple(fields.strings(name))
    return msgspec.structs.replace(old, **changes)


def _check_version(entry: MountEntry, options: Mapping[str, str]) -> None:
    old, new = (entry.options or {}).get("version", "1"), options.get("version")
    if new is None or new == old:
        return
    if old == "2":
        raise InvalidRequest("cannot downgrade mount from version 2")
    raise InvalidRequest("changing the version of a mounted kv engine is not supported: mount a new one")
