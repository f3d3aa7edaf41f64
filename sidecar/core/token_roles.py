"""Token roles: what ``auth/token/create/<role>`` may make, whoever calls it. Replicated; used on every cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import msgspec

from plugin_api.errors import InvalidRequest
from sidecar.core.keys import TOKEN_ROLES
from sidecar.core.policies import DEFAULT, normalize_policies
from sidecar.core.store_view import SealedStore, View
from sidecar.core.token_entry import BATCH, SERVICE, CreateToken

TYPES = (SERVICE, BATCH, "default", "default-service", "default-batch")


class TokenRole(msgspec.Struct, frozen=True, omit_defaults=True):
    """One role as stored. Durations in seconds, 0 for none."""

    name: str
    allowed_policies: tuple[str, ...] = ()
    allowed_policies_glob: tuple[str, ...] = ()
    disallowed_policies: tuple[str, ...] = ()
    disallowed_policies_glob: tuple[str, ...] = ()
    allowed_entity_aliases: tuple[str, ...] = ()
    orphan: bool = False
    renewable: bool = True
    path_suffix: str = ""
    token_type: str = "default-service"  # noqa: S105 - a kind of token
    period_s: int = 0
    explicit_max_ttl_s: int = 0
    num_uses: int = 0
    no_default_policy: bool = False
    bound_cidrs: tuple[str, ...] = ()

    @property
    def restricts_policies(self) -> bool:
        """Whether the role itself says which policies its tokens may have, instead of the caller's own."""
        return bool(
            self.allowed_policies
            or self.allowed_policies_glob
            or self.disallowed_policies
            or self.disallowed_policies_glob
        )

    def policies(self, wanted: Sequence[str], parent: Iterable[str], *, no_default: bool) -> list[str]:
        """The policies of a token that was asked for with ``wanted``, for a role that restricts them. Raises
        InvalidRequest."""
        by_list = bool(self.allowed_policies or self.allowed_policies_glob)
        asked = normalize_policies(wanted, default=False)
        if DEFAULT in asked and self._disallows(DEFAULT):
            raise InvalidRequest(f'token policy "{DEFAULT}" is disallowed by this role')
        chosen = asked or normalize_policies(self.allowed_policies if by_list else parent, default=False)
        others = [name for name in chosen if name != DEFAULT]
        if by_list and not all(self._allows(name) for name in others):
            raise InvalidRequest(
                f"token policies ({_listed(chosen)}) must be subset of the role's allowed policies "
                f"({_listed(self.allowed_policies)}) or glob policies ({_listed(self.allowed_policies_glob)})"
            )
        for name in others:
            if self._disallows(name):
                raise InvalidRequest(f'token policy "{name}" is disallowed by this role')
        with_default = DEFAULT in asked or not (no_default or self._disallows(DEFAULT))
        return normalize_policies(others, default=with_default)

    def _allows(self, name: str) -> bool:
        return name in self.allowed_policies or _any_glob(self.allowed_policies_glob, name)

    def _disallows(self, name: str) -> bool:
        return name in self.disallowed_policies or _any_glob(self.disallowed_policies_glob, name)

    def shape(self, spec: CreateToken, wanted_type: str) -> CreateToken:
        """``spec`` with everything that the role decides but its policies. ``wanted_type`` is what the client asked
        for, empty for nothing."""
        limits = [limit for limit in (spec.explicit_max_ttl_s, self.explicit_max_ttl_s) if limit]
        uses = [count for count in (spec.num_uses, self.num_uses) if count]
        return replace(
            spec,
            path=f"auth/token/create/{self.name}" + (f"/{self.path_suffix}" if self.path_suffix else ""),
            parent=None if self.orphan else spec.parent,
            renewable=spec.renewable and self.renewable,
            period_s=self.period_s or spec.period_s,
            explicit_max_ttl_s=min(limits, default=0),
            num_uses=min(uses, default=0),
            type=self._type(wanted_type),
            bound_cidrs=self.bound_cidrs,
            role=self.name,
        )

    def _type(self, wanted: str) -> str:
        if self.token_type in (SERVICE, BATCH):
            return self.token_type
        return wanted or (BATCH if self.token_type == "default-batch" else SERVICE)  # noqa: S105 - a kind of token

    def check(self) -> None:
        """Raises InvalidRequest for a role that could make no token."""
        if self.token_type not in TYPES:
            raise InvalidRequest(f'invalid "token_type" value "{self.token_type}"')
        if self.num_uses < 0:
            raise InvalidRequest("'token_num_uses' cannot be negative")
        if self.token_type != BATCH:
            return
        for made, problem in (
            (self.renewable, "renewable tokens"),
            (self.period_s, "periodic tokens"),
            (self.explicit_max_ttl_s, "tokens with an explicit max TTL"),
            (self.num_uses, "tokens with limited use count"),
        ):
            if made:
                raise InvalidRequest(f"'token_type' cannot be 'batch' when role is set to generate {problem}")


class TokenRoles:
    """Roles by name."""

    def __init__(self, sealed: SealedStore, writable: Callable[[], bool]) -> None:
        _, partition, prefix = TOKEN_ROLES.split("/", 2)
        self._view = View(sealed, "r", partition, prefix, writable)

    async def get(self, name: str) -> TokenRole | None:
        """The role, or None."""
        raw = await self._view.get(name)
        return None if raw is None else msgspec.msgpack.decode(raw, type=TokenRole)

    async def put(self, role: TokenRole) -> None:
        """Store a role. Raises ReadOnlyStorage on a performance secondary."""
        await self._view.put(role.name, msgspec.msgpack.encode(role))

    async def delete(self, name: str) -> None:
        """Tokens made with the role stay. Raises ReadOnlyStorage on a performance secondary."""
        await self._view.delete(name)

    async def list(self) -> list[str]:
        """Names, sorted."""
        return await self._view.list()


def _listed(names: Iterable[str]) -> str:
    return "[" + " ".join(f'"{name}"' for name in names) + "]"


def _any_glob(patterns: Iterable[str], name: str) -> bool:
    return any(_glob(pattern, name) for pattern in patterns)


def _glob(pattern: str, name: str) -> bool:
    """``*`` stands for any text, wherever and however often it comes."""
    first, *rest = pattern.split("*")
    if not rest:
        return name == first
    *middle, last = rest
    if not name.startswith(first) or len(name) < len(first) + len(last) or not name.endswith(last):
        return False
    place, end = len(first), len(name) - len(last)
    for part in middle:
        found = name.find(part, place, end)
        if found < 0:
            return False
        place = found + len(part)
    return True
