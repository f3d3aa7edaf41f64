"""What approle keeps: roles, and the secret ids that were issued for them.

Storage: ``role/<lower-case name>`` (msgpack); ``role_id/<digest>`` names the role of a role id;
``secret_id/<uid>/<hmac>`` (msgpack) and ``accessor/<uid>/<hmac>``, which holds the former's hmac. ``uid`` is new with
every role, so that a role of an old name never inherits secret ids, and what is left of a deleted role opens nothing.
A secret id itself is never stored: its hmac is keyed by the role. Those of a role with ``local_secret_ids`` live in
this cluster's local storage.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from plugin_api.engine import EngineContext
from plugin_api.errors import InvalidRequest, PluginError, ReadOnlyStorage
from plugin_api.formats import format_time_us
from plugin_api.framework import Fields
from plugin_api.storage import Storage, Write
from sidecar.auth.cidrs import checked_cidrs
from sidecar.auth.token_parameters import TokenParameters

REMOVALS_PER_COMMIT_MAX = 32
"""Deletes in one commit; half of the 61 data operations that the smallest Consul transaction leaves."""

NEVER = "0001-01-01T00:00:00Z"

DEPRECATED = {
    "policies": "token_policies",
    "period": "token_period",
    "bound_cidr_list": "secret_id_bound_cidrs",
}
"""Old names of parameters, still taken; the new name wins where both are sent."""

_OWN = ("bind_secret_id", "secret_id_bound_cidrs", "secret_id_num_uses", "secret_id_ttl")

_Record = TypeVar("_Record")


@dataclass(slots=True)
class Role:
    """One role. ``hmac_key`` turns secret ids and accessors into storage keys. TTLs in seconds."""

    name: str
    uid: str
    role_id: str
    hmac_key: bytes = field(repr=False)
    bind_secret_id: bool = True
    secret_id_bound_cidrs: list[str] = field(default_factory=list)
    secret_id_num_uses: int = 0
    secret_id_ttl: int = 0
    local_secret_ids: bool = False
    tokens: TokenParameters = field(default_factory=TokenParameters)
    deprecated: list[str] = field(default_factory=list)

    @classmethod
    def new(cls, name: str) -> Role:
        """A role with a random role id."""
        return cls(name, uid=uuid.uuid4().hex, role_id=str(uuid.uuid4()), hmac_key=secrets.token_bytes(32))

    def apply(self, fields: Fields) -> None:
        """Take over what was sent. Raises InvalidRequest; then nothing of this object may be stored."""
        for old, new in DEPRECATED.items():
            if fields.given(new):
                self.deprecated = [name for name in self.deprecated if name != old]
            elif fields.given(old):
                self.set(new, fields[old])
                self.deprecated = sorted({*self.deprecated, old})
        for name in _OWN:
            if fields.given(name):
                self.set(name, fields[name])
        self.tokens.apply(fields)
        self.check()

    def get(self, name: str) -> Any:
        """A parameter by the name it has in the API."""
        return getattr(self if name in _OWN or name == "local_secret_ids" else self.tokens, name)

    def set(self, name: str, value: Any) -> None:
        """Set a parameter by the name it has in the API; :meth:`check` must follow."""
        setattr(self if name in _OWN else self.tokens, name, value)

    def check(self) -> None:
        """Raise InvalidRequest where the parameters do not fit together."""
        self.secret_id_bound_cidrs = checked_cidrs(self.secret_id_bound_cidrs)
        if self.secret_id_num_uses < 0:
            raise InvalidRequest("secret_id_num_uses cannot be negative")
        if not (self.bind_secret_id or self.secret_id_bound_cidrs or self.tokens.token_bound_cidrs):
            raise InvalidRequest("at least one constraint should be enabled on the role")

    def describe(self) -> dict[str, Any]:
        """As a read of the role shows it."""
        data = {name: self.get(name) for name in (*_OWN, "local_secret_ids")} | self.tokens.describe()
        return data | {old: self.get(DEPRECATED[old]) for old in self.deprecated if self.get(DEPRECATED[old])}

    def digest(self, kind: str, value: str) -> str:
        """The storage name of a secret id or an accessor."""
        message = f"{kind}\0{value}".encode(errors="surrogatepass")
        return hmac.digest(self.hmac_key, message, "sha256").hex()


@dataclass(slots=True)
class SecretId:
    """What is known of one secret id. ``num_uses`` counts down, 0 is no limit; times in unix microseconds."""

    accessor: str
    num_uses: int = 0
    ttl_s: int = 0
    created_us: int = 0
    updated_us: int = 0
    expires_us: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    cidr_list: list[str] = field(default_factory=list)
    token_bound_cidrs: list[str] = field(default_factory=list)

    def expired(self, now_us: int) -> bool:
        """Whether its time is over."""
        return bool(self.expires_us) and now_us >= self.expires_us

    def describe(self) -> dict[str, Any]:
        """As a lookup shows it."""
        return {
            "secret_id_accessor": self.accessor,
            "secret_id_num_uses": self.num_uses,
            "secret_id_ttl": self.ttl_s,
            "creation_time": format_time_us(self.created_us),
            "last_updated_time": format_time_us(self.updated_us),
            "expiration_time": format_time_us(self.expires_us) if self.expires_us else NEVER,
            "metadata": self.metadata,
            "cidr_list": self.cidr_list,
            "token_bound_cidrs": self.token_bound_cidrs,
        }


class RoleStore:
    """Roles by name and by role id."""

    def __init__(self, context: EngineContext) -> None:
        self._storage = context.storage

    async def get(self, name: str) -> Role | None:
        """The role of a lower-case name."""
        raw = await self._storage.get(f"role/{name}")
        return None if raw is None else _decoded(raw, Role)

    async def exists(self, name: str) -> bool:
        return await self._storage.exists(f"role/{name}")

    async def names(self) -> list[str]:
        return await self._storage.list("role/")

    async def by_role_id(self, role_id: str) -> Role | None:
        """The role that has this role id."""
        raw = await self._storage.get(_role_id_key(role_id))
        role = None if raw is None else await self.get(raw.decode())
        if role is None or not _equal(role.role_id, role_id):
            return None
        return role

    async def save(self, role: Role, *, old_role_id: str = "") -> None:
        """Store ``role`` and the way from its role id to it; ``old_role_id`` is what it had before. Raises
        InvalidRequest where another role has that role id."""
        writes = [Write(f"role/{role.name}", _encoded(role))]
        if role.role_id != old_role_id:
            other = await self.by_role_id(role.role_id)
            if other is not None and other.name != role.name:
                raise InvalidRequest("role_id already in use")
            if old_role_id:
                writes.append(Write(_role_id_key(old_role_id), None))
            writes.append(Write(_role_id_key(role.role_id), role.name.encode()))
        await self._storage.commit(writes)

    async def delete(self, role: Role) -> None:
        """Remove the role; its secret ids open nothing from then on."""
        await self._storage.commit([Write(f"role/{role.name}", None), Write(_role_id_key(role.role_id), None)])


class SecretIdStore:
    """Secret ids of roles, each in the storage that its role says."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context

    def require_writable(self, role: Role) -> None:
        """Raise ReadOnlyStorage where this cluster may not write the secret ids of ``role``, before anything is
        decided from a copy that may be behind."""
        if not role.local_secret_ids and not self._context.writable():
            raise ReadOnlyStorage

    async def get(self, role: Role, digest: str) -> SecretId | None:
        """By :meth:`Role.digest` of the secret id."""
        raw = await self.storage_of(role).get(f"secret_id/{role.uid}/{digest}")
        return None if raw is None else _decoded(raw, SecretId)

    async def by_accessor(self, role: Role, accessor: str) -> tuple[str, SecretId] | None:
        """Digest and record of the secret id with this accessor."""
        raw = await self.storage_of(role).get(_accessor_key(role, accessor))
        if raw is None:
            return None
        found = await self.get(role, raw.decode())
        return None if found is None else (raw.decode(), found)

    async def add(self, role: Role, digest: str, secret_id: SecretId) -> None:
        """Store a new secret id with its accessor."""
        await self.storage_of(role).commit(
            [_secret_write(role, digest, secret_id), Write(_accessor_key(role, secret_id.accessor), digest.encode())]
        )

    async def update(self, role: Role, digest: str, secret_id: SecretId) -> None:
        await self.storage_of(role).commit([_secret_write(role, digest, secret_id)])

    async def remove(self, role: Role, digest: str, secret_id: SecretId) -> None:
        """Remove a secret id with its accessor."""
        await self.storage_of(role).commit(
            [Write(f"secret_id/{role.uid}/{digest}", None), Write(_accessor_key(role, secret_id.accessor), None)]
        )

    async def digests(self, role: Role) -> list[str]:
        """Of every secret id of the role that is stored, expired or not."""
        return await self.storage_of(role).list(f"secret_id/{role.uid}/")

    async def uids(self, storage: Storage) -> set[str]:
        """Of every role that has anything stored, whether the role is still there or not."""
        folders = [*await storage.list("secret_id/"), *await storage.list("accessor/")]
        return {name[:-1] for name in folders if name.endswith("/")}

    async def remove_uid(self, storage: Storage, uid: str) -> None:
        """Remove whatever is stored for a role that is gone."""
        for folder in (f"secret_id/{uid}/", f"accessor/{uid}/"):
            names = await storage.list(folder)
            for start in range(0, len(names), REMOVALS_PER_COMMIT_MAX):
                step = names[start : start + REMOVALS_PER_COMMIT_MAX]
                await storage.commit([Write(folder + name, None) for name in step])

    def storage_of(self, role: Role) -> Storage:
        """Where the secret ids of ``role`` are."""
        return self._context.local_storage if role.local_secret_ids else self._context.storage


def _secret_write(role: Role, digest: str, secret_id: SecretId) -> Write:
    return Write(f"secret_id/{role.uid}/{digest}", _encoded(secret_id))


def _accessor_key(role: Role, accessor: str) -> str:
    return f"accessor/{role.uid}/{role.digest('accessor', accessor)}"


def _role_id_key(role_id: str) -> str:
    return "role_id/" + hashlib.sha256(role_id.encode(errors="surrogatepass")).hexdigest()


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(errors="surrogatepass"), other.encode(errors="surrogatepass"))


def _encoded(record: Role | SecretId) -> bytes:
    try:
        return msgspec.msgpack.encode(record)
    except UnicodeEncodeError:
        raise InvalidRequest("the request holds text that is not Unicode") from None


def _decoded(raw: bytes, kind: type[_Record]) -> _Record:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except msgspec.DecodeError:
        raise PluginError("a stored record of this mount cannot be read") from None
