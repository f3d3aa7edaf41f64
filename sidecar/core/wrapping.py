"""Response wrapping: an answer is kept in the cubbyhole of a single-use token; who holds the token gets it once.

A wrapping token may be handed out as a JWT (ES512, as activation tokens are): the claim ``jti`` is the token itself,
the rest tells the holder where to redeem it. Consumption is committed before the answer leaves.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt as pyjwt
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from sidecar.core.keys import JWT_KEY
from sidecar.core.policies import RESPONSE_WRAPPING
from sidecar.core.store_view import SealedStore, always
from sidecar.core.token_entry import CreateToken, TokenEntry
from sidecar.core.token_ids import cubbyhole_folder
from sidecar.core.tokens import TokenStore, cubbyhole

ALGORITHM = "ES512"
LEEWAY_S = 60
_NOT_BEFORE_S = 5
_RESPONSE = "response"
_WRAP_INFO = "wrapinfo"


class _Info(msgspec.Struct, frozen=True):
    creation_time_s: int
    creation_ttl_s: int
    creation_path: str
    jwt_claims: dict[str, Any] | None = None


class _StoredKey(msgspec.Struct, frozen=True):
    type: str
    x: str
    y: str
    d: str


@dataclass(frozen=True, slots=True)
class WrapInfo:
    """What a client gets in place of the answer."""

    token: str = field(repr=False)
    accessor: str
    ttl_s: int
    creation_time_s: int
    creation_path: str
    wrapped_accessor: str = ""


class Wrapping:
    """Wrap, look up, unwrap and rewrap. Every method that takes a token also takes its JWT form, and raises
    InvalidRequest ``wrapping token is not valid or does not exist`` for any that cannot be redeemed. A token lives by
    ``now``; what a JWT says of its times is for others, whose clocks are ``wall`` clocks."""

    def __init__(
        self,
        sealed: SealedStore,
        tokens: TokenStore,
        now: Callable[[], float],
        *,
        writable: Callable[[], bool] = always,
        wall: Callable[[], float] | None = None,
    ) -> None:
        self._sealed = sealed
        self._tokens = tokens
        self._now = now
        self._wall = wall or now
        self._writable = writable
        self._key: ec.EllipticCurvePrivateKey | None = None
        self._key_lock = asyncio.Lock()

    async def wrap(
        self,
        payload: dict[str, Any],
        ttl_s: int,
        creation_path: str,
        *,
        jwt: bool = False,
        api_addr: str = "",
        extra_claims: Mapping[str, Any] | None = None,
        wrapped_accessor: str = "",
    ) -> WrapInfo:
        """Keep ``payload`` (JSON values) for one reader for ``ttl_s`` seconds. With ``jwt`` the token is a JWT that
        names ``api_addr``. Raises ReadOnlyStorage where a JWT key would have to be made and may not."""
        if ttl_s <= 0:
            raise InvalidRequest("endpoint requires response wrapping to be used")
        claims = {"accessor": wrapped_accessor, "addr": api_addr, **(extra_claims or {})} if jwt else None
        if claims is not None:
            await self._private_key()
        info = _Info(int(self._now()), ttl_s, creation_path, claims)
        response = msgspec.json.encode(payload)
        issued = await self._tokens.create_with(_spec(info), lambda entry: _kept(entry, info, response))
        return await self._info(issued.token, issued.entry, info, wrapped_accessor)

    async def lookup(self, token: str) -> dict[str, Any]:
        """``creation_ttl`` (seconds), ``creation_time`` (RFC 3339) and ``creation_path``. Consumes nothing."""
        entry = await self._entry(await self._resolve(token))
        raw = await cubbyhole(self._sealed, entry).get(_WRAP_INFO)
        if raw is None:
            raise _invalid()
        info = msgspec.json.decode(raw, type=_Info)
        created = dt.datetime.fromtimestamp(info.creation_time_s, dt.UTC)
        return {
            "creation_ttl": info.creation_ttl_s,
            "creation_time": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "creation_path": info.creation_path,
        }

    async def unwrap(self, token: str) -> dict[str, Any]:
        """The payload, for exactly one of any number of callers. Not to be preceded by a counted use of the token."""
        token = await self._resolve(token)
        await self._entry(token)
        values = await self._tokens.take(token, (_RESPONSE, _WRAP_INFO), lambda values: ())
        if values is None or values[0] is None:
            raise _invalid()
        payload: dict[str, Any] = msgspec.json.decode(values[0])
        return payload

    async def rewrap(self, token: str) -> WrapInfo:
        """A new token for the same payload, TTL and creation path, in one commit with the end of the old token."""
        token = await self._resolve(token)
        old = await self._entry(token)
        raw = await cubbyhole(self._sealed, old).get(_WRAP_INFO)
        if raw is None:
            raise _invalid()
        previous = msgspec.json.decode(raw, type=_Info)
        info = msgspec.structs.replace(previous, creation_time_s=int(self._now()))
        issued = self._tokens.prepare(_spec(info))

        def renewed(values: list[bytes | None]) -> list[Write]:
            response = values[0]
            if response is None:
                raise _invalid()
            return [*self._tokens.creation(issued.entry), *_kept(issued.entry, info, response)]

        if await self._tokens.take(token, (_RESPONSE, _WRAP_INFO), renewed) is None:
            raise _invalid()
        self._tokens.adopt(issued.entry)
        wrapped_accessor = str((info.jwt_claims or {}).get("accessor", ""))
        return await self._info(issued.token, issued.entry, info, wrapped_accessor)

    async def _info(self, token: str, entry: TokenEntry, info: _Info, wrapped_accessor: str) -> WrapInfo:
        if info.jwt_claims is not None:
            token = await self._sign(token, info)
        return WrapInfo(
            token,
            entry.accessor,
            info.creation_ttl_s,
            info.creation_time_s,
            info.creation_path,
            wrapped_accessor,
        )

    async def _entry(self, token: str) -> TokenEntry:
        entry = await self._tokens.lookup(token)
        if entry is None or entry.policies != (RESPONSE_WRAPPING,):
            raise _invalid()
        return entry

    # -- the JWT form

    async def _sign(self, token: str, info: _Info) -> str:
        key = await self._private_key()
        issued_s = int(self._wall())
        claims = {
            **(info.jwt_claims or {}),
            "exp": issued_s + info.creation_ttl_s,
            "iat": issued_s,
            "jti": token,
            "nbf": issued_s - _NOT_BEFORE_S,
            "type": "wrapping",
        }
        return await asyncio.to_thread(pyjwt.encode, claims, key, ALGORITHM)

    async def _resolve(self, token: str) -> str:
        """The token itself: of a JWT that this cluster signed, its ``jti``."""
        if token.count(".") != 2 or token[1:2] == ".":
            return token
        key = await self._stored_key()
        if key is None:
            raise _invalid()
        return await asyncio.to_thread(_verified_token, token, key.public_key(), self._wall())

    async def _private_key(self) -> ec.EllipticCurvePrivateKey:
        async with self._key_lock:
            key = await self._stored_key()
            if key is None:
                if not self._writable():
                    raise ReadOnlyStorage
                key = await asyncio.to_thread(ec.generate_private_key, ec.SECP521R1())
                await self._sealed.put(JWT_KEY, _encode_key(key))
            return key

    async def _stored_key(self) -> ec.EllipticCurvePrivateKey | None:
        # Read each time, for it arrives by replication on a secondary; the parsed key is kept while the bytes agree.
        raw = await self._sealed.get(JWT_KEY)
        if raw is None:
            return None
        secret = int(msgspec.json.decode(raw, type=_StoredKey).d)
        if self._key is None or self._key.private_numbers().private_value != secret:
            self._key = await asyncio.to_thread(ec.derive_private_key, secret, ec.SECP521R1())
        return self._key


def _spec(info: _Info) -> CreateToken:
    return CreateToken(
        policies=(RESPONSE_WRAPPING,),
        path=info.creation_path,
        display_name="wrapping",
        ttl_s=info.creation_ttl_s,
        explicit_max_ttl_s=info.creation_ttl_s,
        max_ttl_s=info.creation_ttl_s,
        num_uses=1,
        renewable=False,
    )


def _kept(entry: TokenEntry, info: _Info, response: bytes) -> list[Write]:
    folder = cubbyhole_folder(entry.id_hash)
    return [Write(folder + _RESPONSE, response), Write(folder + _WRAP_INFO, msgspec.json.encode(info))]


def _encode_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.private_numbers()
    public = numbers.public_numbers
    # As text: a JSON number of 157 digits is not read back exactly by every program.
    return msgspec.json.encode(_StoredKey("p521", str(public.x), str(public.y), str(numbers.private_value)))


def _verified_token(token: str, key: ec.EllipticCurvePublicKey, now_s: float) -> str:
    """The ``jti`` of a wrapping JWT. One algorithm, one key, one type: nothing in the header chooses any of them."""
    try:
        header = pyjwt.get_unverified_header(token)
        claims = pyjwt.decode(
            token,
            key,
            algorithms=[ALGORITHM],
            options={"require": ["exp", "nbf", "jti"], "verify_exp": False, "verify_nbf": False, "verify_iat": False},
        )
    except pyjwt.InvalidTokenError:
        raise _invalid() from None
    token_id = claims["jti"]
    times = claims["nbf"], claims["exp"]
    sound = (
        header.get("typ") == "JWT"
        and "crit" not in header
        and claims.get("type") == "wrapping"
        and isinstance(token_id, str)
        and all(isinstance(time, int) for time in times)
        and times[0] - LEEWAY_S <= now_s < times[1] + LEEWAY_S
    )
    if not sound:
        raise _invalid()
    return str(token_id)


def _invalid() -> InvalidRequest:
    return InvalidRequest("wrapping token is not valid or does not exist")
