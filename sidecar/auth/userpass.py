"""The userpass auth method: names and bcrypt-hashed passwords.

Storage: ``user/<lower-case name>`` (msgpack), replicated, so that every cluster of a set accepts the same logins while
each makes its own tokens.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import bcrypt
import msgspec

from plugin_api.engine import EngineContext
from plugin_api.errors import InvalidCredentials, InvalidRequest, NotFound, PermissionDenied, PluginError
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, PathEngine, generic_name, writes
from plugin_api.locks import KeyedLock
from plugin_api.request import Auth, Operation, Request, Response, list_response
from sidecar.auth.token_parameters import TOKEN_FIELDS, TokenParameters, sanitised_policies

BCRYPT_COST = 10
PASSWORD_BYTES_MAX = 72
"""What bcrypt looks at; a longer password would be the same as its first 72 bytes, so it is refused."""

LOGINS_AT_ONCE_MAX = 4
"""Hashes computed in threads at the same time on one mount: more would take the processor from all other requests."""

# The hash of no password: compared with when the user is unknown, so that the answer takes the same time.
_NOBODY = b"$2b$10$" + b"." * 53
_BCRYPT_HASH = re.compile(rb"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")

_LOGIN = re.compile("login/" + generic_name("username"), re.ASCII)

_DEPRECATED = {
    "policies": "token_policies",
    "ttl": "token_ttl",
    "max_ttl": "token_max_ttl",
    "bound_cidrs": "token_bound_cidrs",
}
_USER_FIELDS = {
    "username": FieldSpec(FieldType.STRING, description="Name of the user, in any case."),
    "password": FieldSpec(FieldType.STRING, description="Password of the user."),
    "password_hash": FieldSpec(FieldType.STRING, description="A bcrypt hash in place of the password."),
}


@dataclass(slots=True)
class User:
    """One user. ``deprecated`` names the old parameters that were used last, which a read then shows as well."""

    password_hash: bytes = field(repr=False)
    tokens: TokenParameters = field(default_factory=TokenParameters)
    deprecated: list[str] = field(default_factory=list)


class Userpass(PathEngine):
    """One ``userpass`` mount."""

    type_name: ClassVar[str] = "userpass"
    unauthenticated: ClassVar[tuple[str, ...]] = ("login/*",)

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        self._storage = context.storage
        self._locks = KeyedLock()
        self._hashing = asyncio.Semaphore(LOGINS_AT_ONCE_MAX)

    def paths(self) -> Sequence[Path]:
        user = "users/" + generic_name("username")
        deprecated = {name: TOKEN_FIELDS[new] for name, new in _DEPRECATED.items()}
        return [
            Path(
                "login/" + generic_name("username"),
                {name: _USER_FIELDS[name] for name in ("username", "password")},
                {Operation.UPDATE: self._login},
                help="Log in with a name and a password.",
            ),
            Path("users/?", {}, {Operation.LIST: self._list}, help="The names of all users."),
            Path(
                user,
                _USER_FIELDS | TOKEN_FIELDS | deprecated,
                writes(self._write) | {Operation.READ: self._read, Operation.DELETE: self._delete},
                exists=self._exists,
                help="Creates, reads, updates or deletes a user.",
                primary_only=True,
            ),
            Path(
                user + "/password",
                _USER_FIELDS,
                {Operation.UPDATE: self._write_password},
                help="Sets a user's password.",
                primary_only=True,
            ),
            Path(
                user + "/policies",
                dict.fromkeys(("policies", "token_policies"), TOKEN_FIELDS["token_policies"])
                | {"username": _USER_FIELDS["username"]},
                {Operation.UPDATE: self._write_policies},
                help="Sets a user's policies.",
                primary_only=True,
            ),
        ]

    # --- users ---

    async def _user(self, name: str) -> User | None:
        raw = await self._storage.get(_key(name))
        if raw is None:
            return None
        try:
            return msgspec.msgpack.decode(raw, type=User)
        except msgspec.DecodeError:
            raise PluginError("a stored user cannot be read") from None

    async def _save(self, name: str, user: User) -> None:
        await self._storage.put(_key(name), msgspec.msgpack.encode(user))

    async def _exists(self, request: Request, fields: Fields) -> bool:
        return await self._storage.exists(_key(_name(fields)))

    async def _list(self, request: Request, fields: Fields) -> Response:
        return list_response(await self._storage.list("user/"))

    async def _read(self, request: Request, fields: Fields) -> Response:
        user = await self._user(_name(fields))
        if user is None:
            raise NotFound
        data: dict[str, Any] = user.tokens.describe()
        return Response(
            data=data | {name: data[_DEPRECATED[name]] for name in user.deprecated if data[_DEPRECATED[name]]}
        )

    async def _write(self, request: Request, fields: Fields) -> None:
        name = _name(fields)
        password_hash = await self._new_hash(fields)
        async with self._locks.hold(name):
            user = await self._user(name)
            if user is None:
                if password_hash is None:
                    raise InvalidRequest("missing password")
                user = User(password_hash)
            user.password_hash = password_hash or user.password_hash
            _apply_deprecated(user, fields)
            user.tokens.apply(fields)
            await self._save(name, user)

    async def _delete(self, request: Request, fields: Fields) -> None:
        name = _name(fields)
        async with self._locks.hold(name):
            await self._storage.delete(_key(name))

    async def _write_password(self, request: Request, fields: Fields) -> None:
        name = _name(fields)
        password_hash = await self._new_hash(fields)
        if password_hash is None:
            raise InvalidRequest("missing password")
        async with self._locks.hold(name):
            user = await self._known(name)
            user.password_hash = password_hash
            await self._save(name, user)

    async def _write_policies(self, request: Request, fields: Fields) -> None:
        name = _name(fields)
        async with self._locks.hold(name):
            user = await self._known(name)
            if fields.given("token_policies"):
                user.tokens.token_policies = sanitised_policies(fields["token_policies"])
                user.deprecated = [old for old in user.deprecated if old != "policies"]
            else:
                user.tokens.token_policies = sanitised_policies(fields["policies"])
                user.deprecated = sorted({*user.deprecated, "policies"})
            await self._save(name, user)

    async def _known(self, name: str) -> User:
        user = await self._user(name)
        if user is None:
            raise InvalidRequest("username does not exist")
        return user

    async def _new_hash(self, fields: Fields) -> bytes | None:
        """The hash of the password that was sent, or the one sent in its place; None when neither was."""
        password: str = fields["password"]
        imported: str = fields["password_hash"]
        if password and imported:
            raise InvalidRequest("password and password_hash are mutually exclusive")
        if imported:
            raw = imported.encode(errors="replace")
            if not _BCRYPT_HASH.fullmatch(raw):
                raise InvalidRequest("password_hash must be a bcrypt hash")
            return raw
        if not password:
            return None
        secret = _password_bytes(password)
        if secret is None:
            raise InvalidRequest(f"password length exceeds {PASSWORD_BYTES_MAX} bytes")
        async with self._hashing:
            return await asyncio.to_thread(bcrypt.hashpw, secret, bcrypt.gensalt(BCRYPT_COST))

    # --- login ---

    async def login_identity(self, request: Request) -> str:
        found = _LOGIN.fullmatch(request.path)
        return found[1].lower() if found is not None else ""

    async def _login(self, request: Request, fields: Fields) -> Response:
        name = _name(fields)
        if not fields["password"]:
            raise InvalidRequest("missing password")
        secret = _password_bytes(fields["password"])
        user = await self._user(name)
        expected = user.password_hash if user is not None else _NOBODY
        async with self._hashing:
            # A password that is too long costs the same time as a wrong one.
            matches = await asyncio.to_thread(bcrypt.checkpw, secret or b"", expected)
        if user is None or secret is None or not matches:
            raise InvalidCredentials("invalid username or password")
        if not user.tokens.allows_address(request.caller.remote_address):
            raise PermissionDenied
        auth = Auth(display_name=name, metadata={"username": name}, alias=name)
        return Response(auth=user.tokens.fill(auth))


def _name(fields: Fields) -> str:
    name: str = fields["username"]
    return name.lower()


def _key(name: str) -> str:
    return f"user/{name}"


def _password_bytes(password: str) -> bytes | None:
    """The password as bcrypt takes it, or None if it is longer than bcrypt looks at."""
    secret = password.encode(errors="surrogatepass")
    return secret if len(secret) <= PASSWORD_BYTES_MAX else None


def _apply_deprecated(user: User, fields: Fields) -> None:
    """Old names of parameters still work; a new name wins, and a read shows an old one if it was the last used."""
    for old, new in _DEPRECATED.items():
        if fields.given(new):
            user.deprecated = [name for name in user.deprecated if name != old]
        elif fields.given(old):
            setattr(user.tokens, new, fields[old])
            user.deprecated = sorted({*user.deprecated, old})
