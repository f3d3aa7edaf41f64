"""The approle auth method: machines log in with a role id and, unless the role says otherwise, a secret id.

Roles are replicated, and so are secret ids, except those of a role with ``local_secret_ids``, which each cluster of a
set keeps for itself. A login only reads, unless it uses up a counted secret id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from plugin_api.engine import EngineContext
from plugin_api.errors import InvalidCredentials, InvalidRequest, NotFound, PermissionDenied, PluginError
from plugin_api.framework import (
    Fields,
    FieldSpec,
    FieldType,
    Handler,
    Path,
    PathEngine,
    generic_name,
    parse_string,
    writes,
)
from plugin_api.locks import KeyedLock
from plugin_api.request import Auth, Operation, Request, Response, list_response
from sidecar.auth.approle_records import DEPRECATED, Role, RoleStore, SecretId, SecretIdStore
from sidecar.auth.approle_secret_ids import SecretIds
from sidecar.auth.cidrs import address_within
from sidecar.auth.token_parameters import TOKEN_FIELDS, max_ttl_warning

log = logging.getLogger("auth.approle")

NAME_BYTES_MAX = 4095
WRONG_LOGIN = "invalid role or secret ID"

_NAME = {"role_name": FieldSpec(FieldType.STRING, description="Name of the role, in any case.")}
_OWN_FIELDS = {
    "bind_secret_id": FieldSpec(FieldType.BOOL, default=True, description="Whether a login needs a secret id."),
    "secret_id_bound_cidrs": FieldSpec(FieldType.LIST, description="Networks from which a login is accepted."),
    "secret_id_num_uses": FieldSpec(FieldType.INT, description="Logins that a secret id is good for; 0 for no limit."),
    "secret_id_ttl": FieldSpec(FieldType.DURATION_S, description="Life of a secret id; 0 for no end."),
}
_LOCAL = FieldSpec(FieldType.BOOL, description="Keep secret ids in the cluster that made them.")
_CREATION_FIELDS = {
    "role_id": FieldSpec(FieldType.STRING, description="Role id in place of a random one."),
    "local_secret_ids": _LOCAL,
    "enable_local_secret_ids": _LOCAL,
}
_PARAMETERS = _OWN_FIELDS | TOKEN_FIELDS
_OLD_FIELDS = {old: _PARAMETERS[new] for old, new in DEPRECATED.items()}
_PROPERTIES = {
    "policies": "token_policies",
    "period": "token_period",
    "bound-cidr-list": "secret_id_bound_cidrs",
    "bind-secret-id": "bind_secret_id",
    "secret-id-bound-cidrs": "secret_id_bound_cidrs",
    "secret-id-num-uses": "secret_id_num_uses",
    "secret-id-ttl": "secret_id_ttl",
    "token-bound-cidrs": "token_bound_cidrs",
    "token-max-ttl": "token_max_ttl",
    "token-num-uses": "token_num_uses",
    "token-ttl": "token_ttl",
}
"""Single parameters that have a path of their own, so that access rules can tell them apart."""

_TIDY_STARTED = (
    "Tidy operation successfully started. Any information from the operation will be printed to Vault's server logs."
)
_TIDY_RUNNING = "Tidy operation already in progress."


class AppRole(PathEngine):
    """One ``approle`` mount."""

    type_name: ClassVar[str] = "approle"
    unauthenticated: ClassVar[tuple[str, ...]] = ("login",)
    has_login_roles: ClassVar[bool] = True

    def __init__(self, context: EngineContext) -> None:
        self._roles = RoleStore(context)
        self._secret_ids = SecretIdStore(context)
        self._locks = KeyedLock()
        self._issuing = SecretIds(context, self._roles, self._secret_ids, self._locks)
        self._tidying: asyncio.Task[None] | None = None
        # Stands in where no role has the role id, so that the answer takes the same steps.
        self._nobody = Role.new("nobody")
        super().__init__(context)

    def paths(self) -> Sequence[Path]:
        role = "role/" + generic_name("role_name")
        return [
            Path(
                "login",
                {
                    "role_id": FieldSpec(FieldType.STRING, description="Role id."),
                    "secret_id": FieldSpec(FieldType.STRING, description="Secret id."),
                },
                {Operation.UPDATE: self._login},
                help="Log in with a role id and a secret id.",
            ),
            Path("role/?", {}, {Operation.LIST: self._list}, help="The names of all roles."),
            Path(
                role,
                _NAME | _PARAMETERS | _CREATION_FIELDS | _OLD_FIELDS,
                writes(self._write) | {Operation.READ: self._read, Operation.DELETE: self._delete},
                exists=self._exists,
                help="Creates, reads, updates or deletes a role.",
                primary_only=True,
            ),
            Path(
                role + "/role-id",
                _NAME | {"role_id": _CREATION_FIELDS["role_id"]},
                writes(self._write_role_id) | {Operation.READ: self._read_role_id},
                help="Reads or sets a role's role id.",
                primary_only=True,
            ),
            Path(
                role + "/local-secret-ids",
                _NAME,
                {Operation.READ: partial(self._read_property, "local_secret_ids")},
                help="Whether the role's secret ids are this cluster's own.",
            ),
            *(self._property_path(role, name, parameter) for name, parameter in _PROPERTIES.items()),
            *self._issuing.paths(role, _NAME),
            Path(
                "tidy/secret-id/?",
                {},
                {Operation.UPDATE: self._tidy},
                help="Removes secret ids that expired or whose role is gone.",
            ),
        ]

    def _property_path(self, role: str, name: str, parameter: str) -> Path:
        names = [parameter, *(old for old, new in DEPRECATED.items() if new == parameter)]
        write: Handler = partial(self._write_property, names)
        return Path(
            f"{role}/{name}",
            _NAME | dict.fromkeys(names, _PARAMETERS[parameter]),
            writes(write)
            | {
                Operation.READ: partial(self._read_property, parameter),
                Operation.DELETE: partial(self._reset_property, parameter),
            },
            help=f"Reads, sets or resets {parameter} of a role.",
            primary_only=True,
        )

    # --- roles ---

    async def _exists(self, request: Request, fields: Fields) -> bool:
        return await self._roles.exists(_name(fields))

    async def _list(self, request: Request, fields: Fields) -> Response:
        return list_response(await self._roles.names())

    async def _read(self, request: Request, fields: Fields) -> Response:
        return Response(data=(await self._role(fields)).describe())

    async def _role(self, fields: Fields) -> Role:
        role = await self._roles.get(_name(fields))
        if role is None:
            raise NotFound
        return role

    async def _write(self, request: Request, fields: Fields) -> Response | None:
        name = _name(fields)
        async with self._locks.hold(f"role/{name}"):
            known = await self._roles.get(name)
            role = known or Role.new(name)
            old_role_id = role.role_id if known is not None else ""
            _set_locality(role, fields, new=known is None)
            role.apply(fields)
            if fields["role_id"]:
                role.role_id = fields["role_id"]
            await self._save(role, old_role_id)
        return max_ttl_warning(role.get("token_max_ttl"), self.context.mount)

    async def _save(self, role: Role, old_role_id: str) -> None:
        # Role ids must be unique, so whoever takes a new one is alone in doing so.
        async with self._locks.hold("role_id"):
            await self._roles.save(role, old_role_id=old_role_id)

    async def _delete(self, request: Request, fields: Fields) -> None:
        name = _name(fields)
        async with self._locks.hold(f"role/{name}"):
            role = await self._roles.get(name)
            if role is None:
                return
            await self._roles.delete(role)
        await self._secret_ids.remove_uid(self._secret_ids.storage_of(role), role.uid)

    async def _read_role_id(self, request: Request, fields: Fields) -> Response:
        return Response(data={"role_id": (await self._role(fields)).role_id})

    async def _write_role_id(self, request: Request, fields: Fields) -> None:
        if not fields["role_id"]:
            raise InvalidRequest("missing role_id")
        name = _name(fields)
        async with self._locks.hold(f"role/{name}"):
            role = await self._role(fields)
            old_role_id, role.role_id = role.role_id, fields["role_id"]
            await self._save(role, old_role_id)

    # --- single parameters ---

    async def _read_property(self, parameter: str, request: Request, fields: Fields) -> Response:
        role = await self._role(fields)
        value = role.get(parameter)
        old = {old: value for old, new in DEPRECATED.items() if new == parameter and old in role.deprecated}
        return Response(data={parameter: value} | old)

    async def _write_property(self, names: Sequence[str], request: Request, fields: Fields) -> None:
        if not any(fields.given(name) for name in names):
            raise InvalidRequest(f"missing {names[0]}")
        async with self._locks.hold(f"role/{_name(fields)}"):
            role = await self._role(fields)
            role.apply(fields)
            await self._roles.save(role, old_role_id=role.role_id)

    async def _reset_property(self, parameter: str, request: Request, fields: Fields) -> None:
        async with self._locks.hold(f"role/{_name(fields)}"):
            role = await self._role(fields)
            role.set(parameter, _PARAMETERS[parameter].missing())
            role.deprecated = [old for old in role.deprecated if DEPRECATED[old] != parameter]
            role.check()
            await self._roles.save(role, old_role_id=role.role_id)

    # --- login ---

    async def login_identity(self, request: Request) -> str:
        try:
            return parse_string(request.data.get("role_id", "")) if request.path == "login" else ""
        except ValueError:
            return ""

    async def login_role(self, request: Request) -> str:
        role_id = await self.login_identity(request)
        role = await self._roles.by_role_id(role_id) if role_id else None
        return role.name if role is not None else ""

    async def _login(self, request: Request, fields: Fields) -> Response:
        if not fields["role_id"]:
            raise InvalidRequest("missing role_id")
        role = await self._roles.by_role_id(fields["role_id"])
        address = request.caller.remote_address
        secret_id: SecretId | None = None
        if role is None or role.bind_secret_id:
            if not fields["secret_id"]:
                raise InvalidRequest("missing secret_id")
            secret_id = await self._use_secret_id(role or self._nobody, fields["secret_id"], address)
            if secret_id is None:
                raise InvalidCredentials(WRONG_LOGIN)
        if role is None:
            raise InvalidCredentials(WRONG_LOGIN)
        if secret_id is None:
            _check_address(role, None, address)
        auth = Auth(metadata={"role_name": role.name}, alias=role.role_id)
        role.tokens.fill(auth)
        if secret_id is not None:
            auth.metadata = secret_id.metadata | auth.metadata
            auth.bound_cidrs = list(secret_id.token_bound_cidrs) or auth.bound_cidrs
        return Response(auth=auth)

    async def _use_secret_id(self, role: Role, sent: str, address: str) -> SecretId | None:
        """The secret id that was sent, one use of it spent; None when there is none that counts. An address that may
        not log in spends nothing."""
        digest = role.digest("secret_id", sent)
        secret_id = await self._secret_ids.get(role, digest)
        if secret_id is None or secret_id.expired(self._now_us()):
            return None
        _check_address(role, secret_id, address)
        if not secret_id.num_uses:
            return secret_id
        self._secret_ids.require_writable(role)
        async with self._locks.hold(f"secret_id/{role.uid}/{digest}"):
            secret_id = await self._secret_ids.get(role, digest)
            if secret_id is None:
                return None
            if secret_id.num_uses == 1:
                await self._secret_ids.remove(role, digest, secret_id)
            else:
                secret_id.num_uses -= 1
                secret_id.updated_us = self._now_us()
                await self._secret_ids.update(role, digest, secret_id)
        return secret_id

    def _now_us(self) -> int:
        return round(self.context.now() * 1_000_000)

    # --- tidy ---

    async def _tidy(self, request: Request, fields: Fields) -> Response:
        if self._tidying is not None and not self._tidying.done():
            return Response(status=202, warnings=[_TIDY_RUNNING])
        self._tidying = asyncio.create_task(self._run_tidy())
        return Response(status=202, warnings=[_TIDY_STARTED])

    async def tidied(self) -> None:
        """Wait for a tidy that runs."""
        if self._tidying is not None:
            await self._tidying

    async def _run_tidy(self) -> None:
        """Nobody waits for the outcome, so what stops a tidy is logged; the next one does the rest."""
        try:
            await self._issuing.remove_dead()
        except PluginError as error:
            log.warning("tidy of secret ids stopped: mount=%s error=%s", self.context.mount.path, error)
        except Exception:
            # The store has errors of its own, which a plugin cannot name.
            log.exception("tidy of secret ids failed: mount=%s", self.context.mount.path)


def _name(fields: Fields) -> str:
    name: str = fields["role_name"]
    if len(name) > NAME_BYTES_MAX:
        raise InvalidRequest("role_name is too long")
    return name.lower()


def _set_locality(role: Role, fields: Fields, *, new: bool) -> None:
    for name in ("local_secret_ids", "enable_local_secret_ids"):
        if not fields.given(name):
            continue
        if not new and fields[name] != role.local_secret_ids:
            raise InvalidRequest("local_secret_ids can only be modified during role creation")
        role.local_secret_ids = fields[name]


def _check_address(role: Role, secret_id: SecretId | None, address: str) -> None:
    if not address_within(role.secret_id_bound_cidrs, address):
        raise InvalidRequest("source address unauthorized by CIDR restrictions on the role")
    if secret_id is not None and not address_within(secret_id.cidr_list, address):
        raise InvalidRequest("source address unauthorized by CIDR restrictions on the secret ID")
    token_cidrs = secret_id.token_bound_cidrs if secret_id is not None else []
    if not address_within(token_cidrs or role.tokens.token_bound_cidrs, address):
        raise PermissionDenied
