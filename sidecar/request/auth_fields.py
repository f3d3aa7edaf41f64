"""Tokens as the API shows them (contract 4.11, 5.3). Pure."""

from __future__ import annotations

from typing import Any

from plugin_api.formats import format_time
from sidecar.core.token_entry import TokenEntry


def auth_of(entry: TokenEntry, token: str, now_s: float) -> dict[str, Any]:
    """The ``auth`` member of an answer that issues or renews ``token`` (empty where the caller may not see it)."""
    return {
        "client_token": token,
        "accessor": entry.accessor,
        "policies": list(entry.policies),
        "token_policies": list(entry.policies),
        "metadata": entry.meta,
        "lease_duration": entry.remaining_s(now_s),
        "renewable": entry.renewable,
        "entity_id": entry.entity_id,
        "token_type": entry.type,
        "orphan": entry.orphan,
        "mfa_requirement": None,
        "num_uses": entry.num_uses,
    }


def lookup_of(entry: TokenEntry, token: str, now_s: float) -> dict[str, Any]:
    """The ``data`` of a lookup; ``token`` is empty for a lookup by accessor."""
    data: dict[str, Any] = {
        "accessor": entry.accessor,
        "creation_time": entry.created_s,
        "creation_ttl": entry.ttl_s,
        "display_name": entry.display_name,
        "entity_id": entry.entity_id,
        "expire_time": format_time(entry.expires_s) if entry.expires_s else None,
        "explicit_max_ttl": entry.explicit_max_ttl_s,
        "id": token,
    }
    if entry.expires_s:
        data["issue_time"] = format_time(entry.created_s)
    if entry.last_renewal_s:
        data["last_renewal"] = format_time(entry.last_renewal_s)
        data["last_renewal_time"] = entry.last_renewal_s
    data |= {
        "meta": entry.meta,
        "num_uses": entry.num_uses,
        "orphan": entry.orphan,
        "path": entry.path,
    }
    if entry.period_s:
        data["period"] = entry.period_s
    data["policies"] = list(entry.policies)
    if entry.expires_s:
        data["renewable"] = entry.renewable
    if entry.role:
        data["role"] = entry.role
    if entry.bound_cidrs:
        data["bound_cidrs"] = list(entry.bound_cidrs)
    return {**data, "ttl": entry.remaining_s(now_s), "type": entry.type}
