"""The ``token_*`` parameters that every auth method's users or roles take, as the API documents them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from plugin_api.engine import MountInfo
from plugin_api.errors import InvalidRequest
from plugin_api.framework import Fields, FieldSpec, FieldType
from plugin_api.request import Auth, Response
from sidecar.auth.cidrs import address_within, checked_cidrs

TOKEN_TYPES = ("service", "batch", "default", "default-service", "default-batch")

TOKEN_FIELDS = {
    "token_bound_cidrs": FieldSpec(FieldType.LIST, description="Networks from which a login is accepted."),
    "token_explicit_max_ttl": FieldSpec(FieldType.DURATION_S, description="Hard limit of a token's life."),
    "token_max_ttl": FieldSpec(FieldType.DURATION_S, description="Life of a token with all renewals."),
    "token_no_default_policy": FieldSpec(FieldType.BOOL, description="Leave the default policy out."),
    "token_num_uses": FieldSpec(FieldType.INT, description="Requests that a token may make; 0 for no limit."),
    "token_period": FieldSpec(FieldType.DURATION_S, description="Makes periodic tokens of this renewal period."),
    "token_policies": FieldSpec(FieldType.LIST, description="Policies of the tokens."),
    "token_ttl": FieldSpec(FieldType.DURATION_S, description="First life of a token."),
    "token_type": FieldSpec(FieldType.STRING, description="service, batch or default."),
}


@dataclass(slots=True)
class TokenParameters:
    """How tokens are made. TTLs in seconds, 0 for the mount's default."""

    token_bound_cidrs: list[str] = field(default_factory=list)
    token_explicit_max_ttl: int = 0
    token_max_ttl: int = 0
    token_no_default_policy: bool = False
    token_num_uses: int = 0
    token_period: int = 0
    token_policies: list[str] = field(default_factory=list)
    token_ttl: int = 0
    token_type: str = "default"  # noqa: S105 - a kind of token

    def apply(self, fields: Fields) -> None:
        """Take over what was sent. Raises InvalidRequest; then nothing of this object may be stored."""
        for name in TOKEN_FIELDS:
            if fields.given(name):
                setattr(self, name, fields[name])
        self.token_policies = sanitised_policies(self.token_policies)
        self.token_bound_cidrs = checked_cidrs(self.token_bound_cidrs)
        self.token_type = self.token_type or "default"
        self._check()

    def _check(self) -> None:
        if self.token_type not in TOKEN_TYPES:
            raise InvalidRequest("invalid 'token_type' value")
        if self.token_num_uses < 0:
            raise InvalidRequest("'token_num_uses' cannot be negative")
        if self.token_num_uses and self.token_type in ("batch", "default-batch"):
            raise InvalidRequest(
                "'token_type' cannot be 'batch' or 'default_batch' when set to generate tokens with limited use count"
            )
        if self.token_max_ttl and self.token_ttl > self.token_max_ttl:
            raise InvalidRequest("'token_ttl' cannot be greater than 'token_max_ttl'")

    def describe(self) -> dict[str, Any]:
        """As a read of the user or role shows it."""
        return {name: getattr(self, name) for name in TOKEN_FIELDS}

    def allows_address(self, remote_address: str) -> bool:
        """Whether a client at this address may log in; an unknown address passes only where nothing is bound."""
        return address_within(self.token_bound_cidrs, remote_address)

    def fill(self, auth: Auth) -> Auth:
        """Put the parameters into a login's answer."""
        auth.policies = list(self.token_policies)
        auth.ttl_s = self.token_ttl
        auth.max_ttl_s = self.token_max_ttl
        auth.explicit_max_ttl_s = self.token_explicit_max_ttl
        auth.period_s = self.token_period
        auth.num_uses = self.token_num_uses
        auth.token_type = self.token_type
        auth.no_default_policy = self.token_no_default_policy
        auth.bound_cidrs = list(self.token_bound_cidrs)
        return auth


def max_ttl_warning(token_max_ttl: int, mount: MountInfo) -> Response | None:
    """The answer to a write that asks for longer lives (seconds) than the mount allows; None where it does not."""
    if token_max_ttl <= mount.max_lease_ttl_s:
        return None
    return Response(
        warnings=[
            "token_max_ttl is greater than the backend mount's maximum TTL value; issued tokens' max TTL value will be "
            "truncated"
        ]
    )


def sanitised_policies(names: Iterable[str]) -> list[str]:
    """Policy names in lower case, sorted, each once; root stands alone because it makes the others meaningless."""
    cleaned = sorted({name.strip().lower() for name in names} - {""})
    return ["root"] if "root" in cleaned else cleaned
