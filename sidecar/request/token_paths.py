"""``auth/token/``: create, look up, renew and revoke tokens (contract 4.11).

Tokens are local to a cluster: nothing here is ever forwarded to a primary but what changes a role.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

from plugin_api.errors import InvalidRequest, PermissionDenied
from plugin_api.request import Operation
from sidecar.core.metrics import METRICS
from sidecar.core.policies import normalize_policies
from sidecar.core.token_entry import ROOT_POLICY, SYSTEM_MAX_TTL_S, CreateToken, Renewed, TokenEntry
from sidecar.core.token_roles import TokenRole, TokenRoles
from sidecar.core.tokens import TokenStore
from sidecar.request.auth_fields import auth_of, lookup_of
from sidecar.request.call import Answer, Call
from sidecar.request.errors import JoinedError
from sidecar.request.fields import Fields
from sidecar.request.route_table import (
    BOOL,
    DURATION,
    INT,
    LIST,
    MAP,
    STRING,
    Params,
    Route,
    RouteBackend,
    in_query,
    takes,
)
from sidecar.request.token_roles import ROLE_FIELDS, TokenRolePaths

TIDY_STARTED = (
    "Tidy operation successfully started. Any information from the operation will be printed to Vault's server logs."
)
_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9-]")
_CREATION = takes(
    id=STRING,
    policies=LIST,
    meta=MAP,
    no_parent=BOOL,
    no_default_policy=BOOL,
    renewable=BOOL,
    ttl=DURATION,
    lease=DURATION,
    type=STRING,
    explicit_max_ttl=DURATION,
    display_name=STRING,
    num_uses=INT,
    period=DURATION,
    entity_alias=STRING,
    role_name=STRING,
)


class TokenPaths(RouteBackend):
    """The backend of the ``auth/token/`` mount. TTLs in seconds. ``is_policy``: whether there is a policy of a name."""

    def __init__(
        self,
        tokens: TokenStore,
        roles: TokenRoles,
        now: Callable[[], float],
        *,
        default_ttl_s: int = SYSTEM_MAX_TTL_S,
        max_ttl_s: int = SYSTEM_MAX_TTL_S,
        is_policy: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._tokens = tokens
        self._roles = TokenRolePaths(roles, max_ttl_s)
        self._is_policy = is_policy
        self._now = now
        self._default_ttl_s = default_ttl_s
        self._max_ttl_s = max_ttl_s
        super().__init__("token", [*self._creating(), *self._looking(), *self._ending()])

    def _creating(self) -> list[Route]:
        update, role = Operation.UPDATE, self._role
        return [
            Route("create", {update: self._create}, help="A token, child of the caller's.", fields=_CREATION),
            Route("create-orphan", {update: self._create_orphan}, help="A token without parent.", fields=_CREATION),
            Route("create/{role}", {update: self._create_by_role}, help="A token as a role says.", fields=_CREATION),
            Route("roles", {Operation.LIST: role}, help="Token roles.", fields={}),
            Route(
                "roles/{name}",
                {Operation.READ: role, Operation.UPDATE: role, Operation.DELETE: role},
                help="One token role.",
                fields=ROLE_FIELDS,
            ),
        ]

    def _looking(self) -> list[Route]:
        read, update, listing = Operation.READ, Operation.UPDATE, Operation.LIST
        token, accessor, increment = takes(token=STRING), takes(accessor=STRING), takes(increment=DURATION)
        asked = {"token": in_query(STRING, read)}
        lookup, lookup_self = self._lookup, self._lookup_self
        return [
            Route("lookup", {read: lookup, update: lookup}, help="What is known of a token.", fields=asked),
            Route("lookup-self", {read: lookup_self, update: lookup_self}, help="The caller's token.", fields=token),
            Route("lookup-accessor", {update: self._lookup_accessor}, help="A token by accessor.", fields=accessor),
            Route("accessors", {listing: self._accessors}, sudo=True, help="The accessors of all tokens.", fields={}),
            Route("renew", {update: self._renew}, help="More time for a token.", fields=token | increment),
            Route("renew-self", {update: self._renew_self}, help="More time for the caller.", fields=token | increment),
            Route(
                "renew-accessor",
                {update: self._renew_accessor},
                help="More time for a token, by accessor.",
                fields=accessor | increment,
            ),
        ]

    def _ending(self) -> list[Route]:
        update, token, accessor = Operation.UPDATE, takes(token=STRING), takes(accessor=STRING)
        return [
            Route("revoke", {update: self._revoke}, help="End a token and its children.", fields=token),
            Route("revoke-self", {update: self._revoke_self}, help="End the caller's token.", fields=token),
            Route(
                "revoke-orphan",
                {update: self._revoke_orphan},
                sudo=True,
                help="End a token; its children live on.",
                fields=token,
            ),
            Route("revoke-accessor", {update: self._revoke_accessor}, help="End a token by accessor.", fields=accessor),
            Route("tidy", {update: self._tidy}, help="Look for what tokens left behind.", fields={}),
        ]

    async def exists(self, call: Call, rest: str) -> bool | None:
        folder, _, name = rest.partition("/")
        return await self._roles.exists(name) if folder == "roles" else None

    async def handle(self, call: Call, rest: str) -> Answer | None:
        if rest.partition("/")[0] != "roles" and call.known.entry is None:
            raise InvalidRequest("tokens belong to one cluster: this request cannot be forwarded")
        return await super().handle(call, rest)

    async def _role(self, call: Call, params: Params) -> Answer | None:
        return await self._roles.handle(call, params.get("name", ""))

    # -- creating

    async def _create(self, call: Call, params: Params) -> Answer:
        return await self._issue(call, orphan=False)

    async def _create_by_role(self, call: Call, params: Params) -> Answer:
        return await self._issue(call, orphan=False, role=await self._roles.required(params["role"]))

    async def _create_orphan(self, call: Call, params: Params) -> Answer:
        return await self._issue(call, orphan=True)

    async def _issue(self, call: Call, *, orphan: bool, role: TokenRole | None = None) -> Answer:
        parent = _own(call)
        if parent.num_uses or parent.spent:
            raise InvalidRequest("restricted use token cannot generate child tokens")
        fields = Fields(call.data)
        sudo = call.known.acl.check(call.path, call.operation, call.data).sudo
        no_parent = fields.boolean("no_parent")
        if no_parent and not orphan and not sudo:
            raise InvalidRequest("root or sudo privileges required to create orphan token")
        spec = self._spec(fields, parent, role, sudo=sudo, orphan=orphan or no_parent, path=call.path)
        issued = await self._tokens.create(spec)
        # A name may be of a policy to come, so it is no error; mostly it is mistyped.
        missing = [name for name in issued.entry.policies if not await self._is_policy(name)]
        warnings = [*issued.warnings, *(f'Policy "{name}" does not exist' for name in missing)]
        return Answer(auth=auth_of(issued.entry, issued.token, self._now()), warnings=warnings)

    def _spec(
        self, fields: Fields, parent: TokenEntry, role: TokenRole | None, *, sudo: bool, orphan: bool, path: str
    ) -> CreateToken:
        token = fields.string("id")
        period_s = fields.duration_s("period")
        if token and not sudo:
            raise InvalidRequest("root or sudo privileges required to specify token id")
        if token.startswith(("s.", "b.", "hvs.", "hvb.", "hvr.")):
            raise InvalidRequest("custom token ID cannot have a prefix of the server's own tokens")
        if period_s and not sudo:
            raise InvalidRequest("root or sudo privileges required to create periodic token")
        if fields.string("entity_alias"):
            if role is None:
                raise InvalidRequest("'entity_alias' is only allowed in combination with token role")
            raise InvalidRequest("'entity_alias' is not available: there is no identity engine")
        num_uses = fields.integer("num_uses")
        if num_uses < 0:
            raise InvalidRequest("number of uses cannot be negative")
        # ``lease`` is the name that ``ttl`` had once.
        ttl_s = fields.duration_s("ttl") or fields.duration_s("lease")
        display_name = _NOT_A_NAME.sub("-", f"token-{fields.string('display_name')}").strip("-")
        wanted_type = fields.string("type")
        spec = CreateToken(
            policies=_policies(fields, parent, role, sudo=sudo),
            path=path,
            display_name=display_name,
            meta=fields.string_mapping("meta") or None,
            ttl_s=ttl_s,
            explicit_max_ttl_s=fields.duration_s("explicit_max_ttl"),
            max_ttl_s=self._max_ttl_s,
            default_ttl_s=self._default_ttl_s,
            period_s=period_s,
            num_uses=num_uses,
            renewable=fields.boolean("renewable", default=True),
            parent=None if orphan else parent,
            type=wanted_type or "service",
            id=token or None,
            entity_id="" if orphan else parent.entity_id,
        )
        return spec if role is None else role.shape(spec, wanted_type)

    # -- looking up

    async def _lookup(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        token = fields.string("token")
        if not token or token == call.known.token:
            return await self._lookup_self(call, params)
        with METRICS.timer("expire.fetch-lease-times-by-token"):
            entry = await self._tokens.lookup(token)
        if entry is None:
            raise PermissionDenied("bad token")
        return Answer(lookup_of(entry, token, self._now()))

    async def _lookup_self(self, call: Call, params: Params) -> Answer:
        # From the identity, not the store: a token in its last use is gone for everybody else already.
        return Answer(lookup_of(_own(call), call.known.token, self._now()))

    async def _lookup_accessor(self, call: Call, params: Params) -> Answer:
        _, entry = await self._by_accessor(Fields(call.data))
        return Answer(lookup_of(entry, "", self._now()))

    async def _by_accessor(self, fields: Fields) -> tuple[str, TokenEntry]:
        accessor = _required(fields, "accessor")
        entry = await self._tokens.lookup_accessor(accessor)
        if entry is None:
            raise JoinedError("invalid accessor")
        return accessor, entry

    async def _accessors(self, call: Call, params: Params) -> Answer:
        accessors = await self._tokens.list_accessors()
        return Answer({"keys": accessors}) if accessors else Answer(status=404)

    async def _tidy(self, call: Call, params: Params) -> Answer:
        if not self._tokens.ask_for_tidy():
            return Answer(status=202, warnings=["Tidy operation already in progress."])
        return Answer(status=202, warnings=[TIDY_STARTED])

    # -- renewing

    async def _renew(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        token = fields.string("token") or call.known.token
        with METRICS.timer("expire.renew-token"):
            return self._renewed(await self._tokens.renew(token, fields.duration_s("increment")), token)

    async def _renew_self(self, call: Call, params: Params) -> Answer:
        increment_s = Fields(call.data).duration_s("increment")
        with METRICS.timer("expire.renew-token"):
            return self._renewed(await self._tokens.renew(call.known.token, increment_s), call.known.token)

    async def _renew_accessor(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        accessor, _ = await self._by_accessor(fields)
        with METRICS.timer("expire.renew-token"):
            return self._renewed(await self._tokens.renew_accessor(accessor, fields.duration_s("increment")), "")

    def _renewed(self, renewed: Renewed, token: str) -> Answer:
        return Answer(auth=auth_of(renewed.entry, token, self._now()), warnings=list(renewed.warnings))

    # -- revoking

    async def _revoke(self, call: Call, params: Params) -> None:
        await self._tokens.revoke(_required(Fields(call.data), "token"))

    async def _revoke_self(self, call: Call, params: Params) -> None:
        await self._tokens.revoke_entry(_own(call))

    async def _revoke_orphan(self, call: Call, params: Params) -> None:
        token = _required(Fields(call.data), "token")
        if await self._tokens.lookup(token) is None:
            raise InvalidRequest("token to revoke not found")
        await self._tokens.revoke_orphan(token)

    async def _revoke_accessor(self, call: Call, params: Params) -> Answer | None:
        accessor = _required(Fields(call.data), "accessor")
        if await self._tokens.lookup_accessor(accessor) is None:
            return Answer(warnings=["No token found with this accessor"])
        await self._tokens.revoke_accessor(accessor)
        return None


def _own(call: Call) -> TokenEntry:
    entry = call.known.entry
    if entry is None:
        raise InvalidRequest("tokens belong to one cluster: this request cannot be forwarded")
    return entry


def _required(fields: Fields, name: str) -> str:
    value = fields.string(name)
    if not value:
        raise InvalidRequest(f"missing {name}" if name != "accessor" else "missing accessor_id")
    return value


def _policies(fields: Fields, parent: TokenEntry, role: TokenRole | None, *, sudo: bool) -> Sequence[str]:
    """The role's rule where it has one, else the rule for children; root only from root, whatever the role says."""
    no_default = fields.boolean("no_default_policy") or (role is not None and role.no_default_policy)
    if role is not None and role.restricts_policies:
        policies: Sequence[str] = role.policies(fields.strings("policies"), parent.policies, no_default=no_default)
    else:
        policies = _child_policies(fields.strings("policies"), parent, sudo=sudo, no_default=no_default)
    if ROOT_POLICY in policies and ROOT_POLICY not in parent.policies:
        raise InvalidRequest("root tokens may not be created without parent token being root")
    if "response-wrapping" in policies:
        raise InvalidRequest("cannot create a token with the response-wrapping policy")
    return policies


def _child_policies(wanted: Sequence[str], parent: TokenEntry, *, sudo: bool, no_default: bool) -> list[str]:
    """A child has no policy its parent lacks, unless the parent may use sudo here."""
    with_default = not no_default and (sudo or "default" in parent.policies)
    if not wanted:
        inherited = [name for name in parent.policies if not (no_default and name == "default")]
        return normalize_policies(inherited, default=with_default)
    policies = normalize_policies(wanted, default=with_default)
    if not sudo and not set(policies) <= set(parent.policies) and ROOT_POLICY not in parent.policies:
        raise InvalidRequest("child policies must be subset of parent")
    return policies
