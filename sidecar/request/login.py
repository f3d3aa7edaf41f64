"""From an auth method's answer to a token."""

from __future__ import annotations

from collections.abc import Callable

from plugin_api.engine import MountInfo
from plugin_api.errors import InvalidRequest, PluginError
from plugin_api.request import Auth
from sidecar.core.metrics import METRICS
from sidecar.core.policies import normalize_policies
from sidecar.core.token_entry import BATCH, ROOT_POLICY, SERVICE, CreateToken
from sidecar.core.tokens import TokenStore
from sidecar.request.auth_fields import auth_of
from sidecar.request.call import Answer, Call
from sidecar.request.pipeline import address_allowed

_TYPES = {
    "": SERVICE,
    "default": SERVICE,
    "default-service": SERVICE,
    "service": SERVICE,
    "default-batch": BATCH,
    "batch": BATCH,
}


async def log_in(tokens: TokenStore, call: Call, mount: MountInfo, auth: Auth, now: Callable[[], float]) -> Answer:
    """Issue the token that ``auth`` describes. Raises InvalidRequest where it asks for what no login may give."""
    policies = normalize_policies(auth.policies, default=not auth.no_default_policy)
    if ROOT_POLICY in policies:
        raise InvalidRequest("auth methods cannot create root tokens")
    if auth.token_type not in _TYPES:
        raise PluginError("the auth method answered with an unknown token type")
    if not address_allowed(tuple(auth.bound_cidrs), call.remote_address):
        raise InvalidRequest("request originated from invalid CIDR")
    max_ttl_s = min(auth.max_ttl_s or mount.max_lease_ttl_s, mount.max_lease_ttl_s)
    is_batch = _TYPES[auth.token_type] == BATCH
    spec = CreateToken(
        policies=policies,
        path=call.path,
        display_name=_display_name(mount, auth),
        meta=dict(auth.metadata) or None,
        ttl_s=auth.ttl_s,
        explicit_max_ttl_s=0 if is_batch else auth.explicit_max_ttl_s,
        max_ttl_s=max_ttl_s,
        default_ttl_s=min(mount.default_lease_ttl_s, max_ttl_s),
        period_s=0 if is_batch else auth.period_s,
        num_uses=0 if is_batch else auth.num_uses,
        renewable=auth.renewable,
        type=_TYPES[auth.token_type],
        bound_cidrs=auth.bound_cidrs,
        method=mount.type,
        mount=mount.path,
    )
    with METRICS.timer("expire.register-auth"):
        issued = await tokens.create(spec)
    return Answer(auth=auth_of(issued.entry, issued.token, now()), warnings=list(issued.warnings))


def _display_name(mount: MountInfo, auth: Auth) -> str:
    method = mount.path.removeprefix("auth/").rstrip("/").replace("/", "-")
    return f"{method}-{auth.display_name}" if auth.display_name else method
