"""Secret ids of approle: issuing, looking up, destroying, tidying."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from plugin_api.engine import EngineContext
from plugin_api.errors import InvalidRequest, NotFound
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, writes
from plugin_api.locks import KeyedLock
from plugin_api.request import Operation, Request, Response, list_response
from sidecar.auth.approle_records import Role, RoleStore, SecretId, SecretIdStore
from sidecar.auth.cidrs import all_within, checked_cidrs

GENERATE_FIELDS = {
    "metadata": FieldSpec(FieldType.ANY, description="JSON object of texts that logins carry on to their tokens."),
    "cidr_list": FieldSpec(FieldType.LIST, description="Networks from which this secret id is accepted."),
    "token_bound_cidrs": FieldSpec(FieldType.LIST, description="Networks from which its tokens are accepted."),
    "num_uses": FieldSpec(FieldType.INT, description="Logins it is good for; 0 for no limit."),
    "ttl": FieldSpec(FieldType.DURATION_S, description="Its life; 0 for no end."),
}
_SECRET_ID = {"secret_id": FieldSpec(FieldType.STRING, description="Secret id.", query_of=(Operation.DELETE,))}
_ACCESSOR = {
    "secret_id_accessor": FieldSpec(
        FieldType.STRING, description="Accessor of a secret id.", query_of=(Operation.DELETE,)
    )
}
_NO_ACCESSOR = "failed to find accessor entry for secret_id_accessor"


class SecretIds:
    """The paths below a role that deal with its secret ids. None is ``primary_only``: where a role keeps them local,
    every cluster issues its own."""

    def __init__(self, context: EngineContext, roles: RoleStore, store: SecretIdStore, locks: KeyedLock) -> None:
        self._context = context
        self._roles = roles
        self._store = store
        self._locks = locks

    def paths(self, role: str, name: Mapping[str, FieldSpec]) -> list[Path]:
        """``role`` is the pattern of a role's own path, ``name`` its field."""
        by_id, by_accessor = dict(name) | _SECRET_ID, dict(name) | _ACCESSOR
        return [
            Path(
                role + "/secret-id/?",
                dict(name) | GENERATE_FIELDS,
                writes(self._generate) | {Operation.LIST: self._list},
                help="Issues a secret id, or lists the accessors of all.",
            ),
            Path(
                role + "/custom-secret-id",
                by_id | GENERATE_FIELDS,
                writes(self._register),
                help="Takes a secret id of the caller's own.",
            ),
            Path(role + "/secret-id/lookup", by_id, writes(self._lookup), help="What is known of a secret id."),
            Path(
                role + "/secret-id/destroy",
                by_id,
                writes(self._destroy) | {Operation.DELETE: self._destroy},
                help="Destroys a secret id.",
            ),
            Path(
                role + "/secret-id-accessor/lookup",
                by_accessor,
                writes(self._lookup_accessor),
                help="What is known of the secret id with an accessor.",
            ),
            Path(
                role + "/secret-id-accessor/destroy",
                by_accessor,
                writes(self._destroy_accessor) | {Operation.DELETE: self._destroy_accessor},
                help="Destroys the secret id with an accessor.",
            ),
        ]

    async def _role(self, fields: Fields) -> Role:
        role = await self._roles.get(fields["role_name"].lower())
        if role is None:
            raise InvalidRequest("role does not exist")
        return role

    # --- issuing ---

    async def _generate(self, request: Request, fields: Fields) -> Response:
        role = await self._role(fields)
        return await self._add(role, str(uuid.uuid4()), fields)

    async def _register(self, request: Request, fields: Fields) -> Response:
        role = await self._role(fields)
        if not fields["secret_id"]:
            raise InvalidRequest("missing secret_id")
        return await self._add(role, fields["secret_id"], fields)

    async def _add(self, role: Role, value: str, fields: Fields) -> Response:
        self._store.require_writable(role)
        if not role.bind_secret_id:
            raise InvalidRequest("bind_secret_id is not set on the role")
        secret_id = self._new(role, fields)
        digest = role.digest("secret_id", value)
        async with self._hold(role, digest):
            old = await self._store.get(role, digest)
            if old is not None:
                if not old.expired(self._now_us()):
                    raise InvalidRequest("SecretID is already registered")
                await self._store.remove(role, digest, old)
            await self._store.add(role, digest, secret_id)
        return Response(
            data={
                "secret_id": value,
                "secret_id_accessor": secret_id.accessor,
                "secret_id_ttl": secret_id.ttl_s,
                "secret_id_num_uses": secret_id.num_uses,
            }
        )

    def _new(self, role: Role, fields: Fields) -> SecretId:
        now_us = self._now_us()
        ttl_s = _ttl_s(role, fields, self._context.mount.max_lease_ttl_s)
        return SecretId(
            accessor=str(uuid.uuid4()),
            num_uses=_num_uses(role, fields),
            ttl_s=ttl_s,
            created_us=now_us,
            updated_us=now_us,
            expires_us=now_us + ttl_s * 1_000_000 if ttl_s else 0,
            metadata=_metadata(fields["metadata"]),
            cidr_list=_within(fields["cidr_list"], role.secret_id_bound_cidrs),
            token_bound_cidrs=_within(fields["token_bound_cidrs"], role.tokens.token_bound_cidrs),
        )

    # --- looking up and destroying ---

    async def _list(self, request: Request, fields: Fields) -> Response:
        role = await self._role(fields)
        now_us = self._now_us()
        accessors = []
        for digest in await self._store.digests(role):
            secret_id = await self._store.get(role, digest)
            if secret_id is not None and not secret_id.expired(now_us):
                accessors.append(secret_id.accessor)
        return list_response(accessors)

    async def _lookup(self, request: Request, fields: Fields) -> Response | None:
        role, digest = await self._named(fields)
        secret_id = await self._store.get(role, digest)
        if secret_id is None or secret_id.expired(self._now_us()):
            return None
        return Response(data=secret_id.describe())

    async def _destroy(self, request: Request, fields: Fields) -> None:
        role, digest = await self._named(fields)
        self._store.require_writable(role)
        await self._remove(role, digest)

    async def _named(self, fields: Fields) -> tuple[Role, str]:
        if not fields["secret_id"]:
            raise InvalidRequest("missing secret_id")
        role = await self._role(fields)
        return role, role.digest("secret_id", fields["secret_id"])

    async def _lookup_accessor(self, request: Request, fields: Fields) -> Response:
        _, _, secret_id = await self._by_accessor(fields)
        if secret_id.expired(self._now_us()):
            raise NotFound(_NO_ACCESSOR)
        return Response(data=secret_id.describe())

    async def _destroy_accessor(self, request: Request, fields: Fields) -> None:
        role, digest, _ = await self._by_accessor(fields, to_write=True)
        await self._remove(role, digest)

    async def _by_accessor(self, fields: Fields, *, to_write: bool = False) -> tuple[Role, str, SecretId]:
        accessor = fields["secret_id_accessor"]
        if not accessor:
            raise InvalidRequest("missing secret_id_accessor")
        role = await self._role(fields)
        if to_write:
            self._store.require_writable(role)
        found = await self._store.by_accessor(role, accessor)
        if found is None:
            raise NotFound(_NO_ACCESSOR)
        return role, *found

    async def _remove(self, role: Role, digest: str) -> None:
        async with self._hold(role, digest):
            secret_id = await self._store.get(role, digest)
            if secret_id is not None:
                await self._store.remove(role, digest, secret_id)

    # --- tidying ---

    async def remove_dead(self) -> None:
        """Remove expired secret ids, and those of roles that are gone, from all that this cluster may write."""
        storages = [self._context.local_storage]
        if self._context.writable():
            storages.append(self._context.storage)
        # In this order: a role that comes after the first look has nothing stored that the look has seen.
        uids = [(storage, await self._store.uids(storage)) for storage in storages]
        found = [await self._roles.get(name) for name in await self._roles.names()]
        roles = {role.uid: role for role in found if role is not None}
        for storage, known in uids:
            for uid in sorted(known - roles.keys()):
                await self._store.remove_uid(storage, uid)
        for role in roles.values():
            if role.local_secret_ids or self._context.writable():
                await self._remove_expired(role)

    async def _remove_expired(self, role: Role) -> None:
        for digest in await self._store.digests(role):
            async with self._hold(role, digest):
                secret_id = await self._store.get(role, digest)
                if secret_id is not None and secret_id.expired(self._now_us()):
                    await self._store.remove(role, digest, secret_id)

    def _hold(self, role: Role, digest: str) -> Any:
        return self._locks.hold(f"secret_id/{role.uid}/{digest}")

    def _now_us(self) -> int:
        return round(self._context.now() * 1_000_000)


def _num_uses(role: Role, fields: Fields) -> int:
    if not fields.given("num_uses"):
        return role.secret_id_num_uses
    number: int = fields["num_uses"]
    if number < 0:
        raise InvalidRequest("num_uses cannot be negative")
    if role.secret_id_num_uses and (number == 0 or number > role.secret_id_num_uses):
        raise InvalidRequest("num_uses cannot be higher than the role's secret_id_num_uses")
    return number


def _ttl_s(role: Role, fields: Fields, max_s: int) -> int:
    ttl_s: int = fields["ttl"] if fields.given("ttl") else role.secret_id_ttl
    if fields.given("ttl") and role.secret_id_ttl and (ttl_s == 0 or ttl_s > role.secret_id_ttl):
        raise InvalidRequest("ttl cannot be longer than the role's secret_id_ttl")
    return min(ttl_s, max_s)


def _within(cidrs: list[str], allowed: list[str]) -> list[str]:
    checked_cidrs(cidrs)
    if not all_within(cidrs, allowed):
        raise InvalidRequest("CIDR blocks of the secret ID must lie within those of the role")
    return cidrs


def _metadata(sent: Any) -> dict[str, str]:
    """Metadata as the client sent it: an object, or the JSON text of one."""
    if sent is None or sent == "":
        return {}
    if isinstance(sent, str):
        try:
            sent = msgspec.json.decode(sent)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            raise InvalidRequest("failed to parse metadata: it must be a JSON object") from None
    if not isinstance(sent, dict) or not all(isinstance(value, str) for value in sent.values()):
        raise InvalidRequest("failed to parse metadata: it must be a JSON object of strings")
    return dict(sent)
