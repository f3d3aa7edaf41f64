"""Tokens as values: what is stored of one, what one is made from, and how long it may live. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from plugin_api.errors import InvalidRequest

SYSTEM_MAX_TTL_S = 2_764_800  # 768h
SERVICE = "service"
BATCH = "batch"
ROOT_POLICY = "root"


class TokenEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One token as stored. The token itself is nowhere in it: ``id_hash`` is a keyed hash.

    Times are unix seconds, durations seconds; ``expires_s`` 0 means never. ``parent`` is the parent's ``id_hash``, or
    empty for an orphan. ``spent`` marks a token whose last use has begun or whose revocation is under way: nobody can
    look it up any more.
    """

    id_hash: str
    accessor: str
    policies: tuple[str, ...]
    path: str
    created_s: int
    display_name: str = ""
    meta: dict[str, str] | None = None
    num_uses: int = 0
    parent: str = ""
    type: str = SERVICE
    expires_s: int = 0
    ttl_s: int = 0
    explicit_max_ttl_s: int = 0
    max_ttl_s: int = 0
    period_s: int = 0
    renewable: bool = False
    last_renewal_s: int = 0
    entity_id: str = ""
    bound_cidrs: tuple[str, ...] = ()
    role: str = ""
    spent: bool = False

    @property
    def orphan(self) -> bool:
        """Whether no other token's revocation takes this one along."""
        return not self.parent

    def alive(self, now_s: float) -> bool:
        """Whether the token may still be used."""
        return not self.spent and (self.expires_s == 0 or now_s < self.expires_s)

    def remaining_s(self, now_s: float) -> int:
        """The TTL a client is shown; 0 also for tokens that never expire."""
        return max(0, self.expires_s - int(now_s)) if self.expires_s else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateToken:
    """What a token is made from. ``parent`` None makes an orphan. ``max_ttl_s`` and ``default_ttl_s`` are those of
    the mount it comes from. ``id`` is a custom token, None lets the store draw one. ``method`` and ``mount`` are the
    auth method's type and path, for the metrics."""

    policies: Sequence[str]
    path: str = "auth/token/create"
    display_name: str = "token"
    meta: dict[str, str] | None = None
    ttl_s: int = 0
    explicit_max_ttl_s: int = 0
    max_ttl_s: int = SYSTEM_MAX_TTL_S
    default_ttl_s: int = SYSTEM_MAX_TTL_S
    period_s: int = 0
    num_uses: int = 0
    renewable: bool = True
    parent: TokenEntry | None = None
    type: str = SERVICE
    id: str | None = field(default=None, repr=False)
    entity_id: str = ""
    bound_cidrs: Sequence[str] = ()
    role: str = ""
    method: str = "token"
    mount: str = "auth/token/"


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token, the only time it is seen in clear."""

    token: str = field(repr=False)
    entry: TokenEntry
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Renewed:
    """The entry after a renewal."""

    entry: TokenEntry
    warnings: list[str] = field(default_factory=list)


def format_duration(seconds: int) -> str:
    """``"768h"``, ``"1h30m"``, ``"5s"``: Go's form without the zero parts."""
    parts = ((seconds // 3600, "h"), (seconds % 3600 // 60, "m"), (seconds % 60, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


def capped(what: str, wanted_s: int, limit_s: int, warnings: list[str]) -> int:
    if wanted_s <= limit_s:
        return wanted_s
    warnings.append(
        f'{what} of "{format_duration(wanted_s)}" exceeded the effective max_ttl of "{format_duration(limit_s)}"; '
        f"{what} value is capped accordingly",
    )
    return limit_s


def check_spec(spec: CreateToken) -> None:
    """Raises InvalidRequest for what no token may be."""
    numbers = (spec.ttl_s, spec.explicit_max_ttl_s, spec.period_s, spec.num_uses)
    if any(number < 0 for number in numbers):
        raise InvalidRequest("ttl, explicit_max_ttl, period and num_uses must not be negative")
    if spec.type not in (SERVICE, BATCH):
        raise InvalidRequest(f'invalid "token_type" value "{spec.type}"')
    if spec.id is not None:
        if not spec.id or "." in spec.id:
            raise InvalidRequest("custom token ID cannot have a '.' in the value")
        if spec.type == BATCH:
            raise InvalidRequest("batch tokens cannot have a custom ID")
    root = ROOT_POLICY in spec.policies
    if root and spec.parent is not None and spec.parent.expires_s and not spec.ttl_s:
        raise InvalidRequest("expiring root tokens cannot create non-expiring root tokens")
    if spec.type == BATCH:
        if root:
            raise InvalidRequest("batch tokens cannot be root tokens")
        for name, number in (
            ("period", spec.period_s),
            ("explicit_max_ttl", spec.explicit_max_ttl_s),
            ("num_uses", spec.num_uses),
        ):
            if number:
                raise InvalidRequest(f'batch tokens cannot have "{name}" set')
    if spec.parent is not None and spec.parent.type == BATCH:
        raise InvalidRequest("batch tokens cannot create more tokens")


def first_ttl(spec: CreateToken) -> tuple[int, list[str]]:
    """The TTL a new token starts with (0: never expires, for root tokens only), and warnings."""
    warnings: list[str] = []
    if ROOT_POLICY in spec.policies and not (spec.ttl_s or spec.period_s or spec.explicit_max_ttl_s):
        return 0, warnings
    limit_s = spec.max_ttl_s or SYSTEM_MAX_TTL_S
    if spec.period_s:
        ttl_s = capped("period", spec.period_s, limit_s, warnings)
    else:
        ttl_s = capped("TTL", spec.ttl_s or min(spec.default_ttl_s or limit_s, limit_s), limit_s, warnings)
    explicit_s = spec.explicit_max_ttl_s
    if explicit_s > limit_s and not spec.period_s:
        warnings.append(
            f'Explicit max TTL of "{format_duration(explicit_s)}" is greater than system/mount allowed value; '
            f'value is being capped to "{format_duration(limit_s)}"'
        )
    elif explicit_s and ttl_s > explicit_s:
        if spec.ttl_s or spec.period_s:  # else nobody asked for more
            warnings.append(
                f'TTL of "{format_duration(ttl_s)}" exceeded the explicit max_ttl of "{format_duration(explicit_s)}"; '
                "TTL value is capped accordingly"
            )
        ttl_s = explicit_s
    return ttl_s, warnings


def new_entry(
    spec: CreateToken, policies: tuple[str, ...], id_hash: str, accessor: str, ttl_s: int, now_s: int
) -> TokenEntry:
    """What is stored of a token that is made from ``spec`` now."""
    return TokenEntry(
        id_hash=id_hash,
        accessor=accessor,
        policies=policies,
        path=spec.path,
        created_s=now_s,
        display_name=spec.display_name,
        meta=dict(spec.meta) if spec.meta else None,
        num_uses=spec.num_uses,
        parent=spec.parent.id_hash if spec.parent is not None else "",
        type=spec.type,
        expires_s=now_s + ttl_s if ttl_s else 0,
        ttl_s=ttl_s,
        explicit_max_ttl_s=spec.explicit_max_ttl_s,
        max_ttl_s=spec.max_ttl_s,
        period_s=spec.period_s,
        renewable=spec.renewable and ttl_s > 0 and spec.type == SERVICE,
        entity_id=spec.entity_id,
        bound_cidrs=tuple(spec.bound_cidrs),
        role=spec.role,
    )


def renewed_expiry(entry: TokenEntry, increment_s: int, now_s: int) -> tuple[int, list[str]]:
    """When ``entry`` expires after a renewal now: never later than its maxima, never "never", and never sooner than
    without the renewal when a maximum has been reached."""
    warnings: list[str] = []
    if entry.period_s:
        ttl_s = min(entry.period_s, entry.max_ttl_s or SYSTEM_MAX_TTL_S)
        limits = []
    else:
        ttl_s = increment_s if increment_s > 0 else entry.ttl_s
        limits = [entry.created_s + (entry.max_ttl_s or SYSTEM_MAX_TTL_S)]
    if entry.explicit_max_ttl_s:
        limits.append(entry.created_s + entry.explicit_max_ttl_s)
    if limits:
        ttl_s = capped("TTL", ttl_s, max(min(limits) - now_s, 0), warnings)
    if ttl_s <= 0:
        return entry.expires_s, warnings
    return now_s + ttl_s, warnings
