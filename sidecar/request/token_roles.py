"""``auth/token/roles/*``: what ``auth/token/create/<role>`` may make (contract 4.11)."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

import msgspec

from plugin_api.errors import InvalidRequest, NotFound, UnsupportedOperation, UnsupportedPath
from plugin_api.framework import FieldSpec, FieldType
from plugin_api.request import Operation
from sidecar.core.policies import normalize_policies
from sidecar.core.token_roles import TokenRole, TokenRoles
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields

NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
_SUFFIX = re.compile(r"\w[\w-]*\w", re.ASCII)
_POLICY_LISTS = ("allowed_policies", "disallowed_policies")
_PLAIN_LISTS = ("allowed_policies_glob", "disallowed_policies_glob", "allowed_entity_aliases")
_BOOLEANS = {"orphan": "orphan", "renewable": "renewable", "token_no_default_policy": "no_default_policy"}
# Newer name first: it wins where both are sent.
_DURATIONS = {
    "period_s": ("token_period", "period"),
    "explicit_max_ttl_s": ("token_explicit_max_ttl", "explicit_max_ttl"),
}
ROLE_FIELDS = {
    **dict.fromkeys((*_POLICY_LISTS, *_PLAIN_LISTS, "token_bound_cidrs", "bound_cidrs"), FieldSpec(FieldType.LIST)),
    **dict.fromkeys(_BOOLEANS, FieldSpec(FieldType.BOOL)),
    **dict.fromkeys((name for names in _DURATIONS.values() for name in names), FieldSpec(FieldType.DURATION_S)),
    **dict.fromkeys(("token_type", "path_suffix"), FieldSpec(FieldType.STRING)),
    "token_num_uses": FieldSpec(FieldType.INT),
}
"""What a role can be written with."""


class TokenRolePaths:
    """Handles ``roles`` and ``roles/<name>`` below ``auth/token/``."""

    def __init__(self, roles: TokenRoles, max_ttl_s: int) -> None:
        self.roles = roles
        self._max_ttl_s = max_ttl_s

    async def handle(self, call: Call, name: str) -> Answer | None:
        """``name`` is empty for the list of roles."""
        if not name:
            if call.operation is not Operation.LIST:
                raise UnsupportedOperation
            names = await self.roles.list()
            return Answer({"keys": names}) if names else Answer(status=404)
        if not NAME.fullmatch(name):
            raise UnsupportedPath
        match call.operation:
            case Operation.READ:
                return await self._read(name)
            case Operation.CREATE | Operation.UPDATE:
                return await self._write(call, name)
            case Operation.DELETE:
                await self.roles.delete(name)
                return None
        raise UnsupportedOperation

    async def exists(self, name: str) -> bool | None:
        """Whether a write would update the role."""
        return await self.roles.get(name) is not None if NAME.fullmatch(name) else None

    async def required(self, name: str) -> TokenRole:
        """The role to create a token with. Raises InvalidRequest."""
        role = await self.roles.get(name) if NAME.fullmatch(name) else None
        if role is None:
            raise InvalidRequest(f"unknown role {name}")
        return role

    async def _read(self, name: str) -> Answer:
        role = await self.roles.get(name)
        if role is None:
            raise NotFound
        return Answer(_shown(role))

    async def _write(self, call: Call, name: str) -> Answer | None:
        fields = Fields(call.data)
        role = _changed(await self.roles.get(name) or TokenRole(name), fields)
        role.check()
        await self.roles.put(role)
        if role.explicit_max_ttl_s <= self._max_ttl_s:
            return None
        return Answer(
            warnings=[
                f"Given explicit max TTL of {role.explicit_max_ttl_s} is greater than system/mount allowed value of "
                f"{self._max_ttl_s} seconds; tokens of this role end at that"
            ]
        )


def _changed(role: TokenRole, fields: Fields) -> TokenRole:
    """``role`` with what was sent. Raises InvalidRequest."""
    changes: dict[str, Any] = {}
    for name in _POLICY_LISTS:
        if fields.given(name):
            changes[name] = tuple(normalize_policies(fields.strings(name), default=False))
    for name in _PLAIN_LISTS:
        if fields.given(name):
            changes[name] = tuple(fields.strings(name))
    for name, attribute in _BOOLEANS.items():
        if fields.given(name):
            changes[attribute] = fields.boolean(name)
    for attribute, names in _DURATIONS.items():
        for name in names:
            if fields.given(name):
                changes.setdefault(attribute, fields.duration_s(name))
    if fields.given("token_num_uses"):
        changes["num_uses"] = fields.integer("token_num_uses")
    if fields.given("token_type"):
        changes["token_type"] = fields.string("token_type") or "default-service"
    for name in ("token_bound_cidrs", "bound_cidrs"):
        if fields.given(name):
            changes.setdefault("bound_cidrs", tuple(_cidr(text) for text in fields.strings(name)))
    if fields.given("path_suffix"):
        changes["path_suffix"] = suffix = fields.string("path_suffix")
        if suffix and not _SUFFIX.fullmatch(suffix):
            raise InvalidRequest("given role path suffix contains invalid characters; must match \\w[\\w-]+\\w")
    return msgspec.structs.replace(role, **changes)


def _cidr(text: str) -> str:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise InvalidRequest(f'error parsing bound_cidrs: "{text}" is not a network or address') from None
    return str(network) if "/" in text else text


def _shown(role: TokenRole) -> dict[str, Any]:
    return {
        "allowed_entity_aliases": list(role.allowed_entity_aliases),
        "allowed_policies": list(role.allowed_policies),
        "allowed_policies_glob": list(role.allowed_policies_glob),
        "disallowed_policies": list(role.disallowed_policies),
        "disallowed_policies_glob": list(role.disallowed_policies_glob),
        "explicit_max_ttl": role.explicit_max_ttl_s,
        "name": role.name,
        "orphan": role.orphan,
        "path_suffix": role.path_suffix,
        "period": role.period_s,
        "renewable": role.renewable,
        "token_bound_cidrs": list(role.bound_cidrs),
        "token_explicit_max_ttl": role.explicit_max_ttl_s,
        "token_no_default_policy": role.no_default_policy,
        "token_num_uses": role.num_uses,
        "token_period": role.period_s,
        "token_type": role.token_type,
    }
