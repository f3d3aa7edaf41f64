"""A mount's settings: as clients send them, and as they are shown (contract 4.12). Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from plugin_api.errors import InvalidRequest
from plugin_api.framework import FieldSpec
from plugin_api.request import Operation
from sidecar.api.lockout_fields import shown_lockout
from sidecar.core.mounts import AUTH, MountConfig, MountEntry
from sidecar.request.fields import Fields
from sidecar.request.mount_view import TtlDefaults, mount_info
from sidecar.request.route_table import ANY, BOOL, LIST, MAP, STRING, in_query, takes
from sidecar.version import PLUGIN_VERSION, __version__

LISTS = (
    "passthrough_request_headers",
    "allowed_response_headers",
    "audit_non_hmac_request_keys",
    "audit_non_hmac_response_keys",
)
# A TTL may also be "system" or -1, for the server's default.
TUNABLE: dict[str, FieldSpec] = {
    **takes(
        default_lease_ttl=ANY, max_lease_ttl=ANY, force_no_cache=BOOL, listing_visibility=STRING, token_type=STRING
    ),
    **{name: FieldSpec(LIST) for name in LISTS},
    **takes(description=STRING, options=MAP, plugin_version=STRING, user_lockout_config=MAP),
}
"""What can be sent to ``tune``."""
MOUNTING: dict[str, FieldSpec] = takes(
    type=STRING,
    plugin_name=STRING,
    plugin_version=STRING,
    description=STRING,
    config=MAP,
    options=MAP,
    local=BOOL,
    seal_wrap=BOOL,
    external_entropy_access=BOOL,
) | {"force": in_query(BOOL, Operation.DELETE)}
"""What can be sent to enable a mount; ``force`` is for its removal."""


def config_of(fields: Fields, old: MountConfig) -> MountConfig:
    """``old`` with what was sent; ``system`` and -1 mean the system's default again. Raises InvalidRequest."""
    changes: dict[str, Any] = {}
    for name in ("default_lease_ttl", "max_lease_ttl"):
        if fields.given(name):
            reset = fields.string(name) in ("", "system", "-1")
            changes[f"{name}_s"] = 0 if reset else fields.duration_s(name)
    if fields.given("force_no_cache"):
        changes["force_no_cache"] = fields.boolean("force_no_cache")
    for name in ("listing_visibility", "token_type"):
        if fields.given(name):
            changes[name] = fields.string(name)
    for name in LISTS:
        if fields.given(name):
            changes[name] = tuple(fields.strings(name))
    return msgspec.structs.replace(old, **changes)


def check_plugin_version(fields: Fields) -> None:
    """Every plugin has one version, the server's own. Raises InvalidRequest for another."""
    version = fields.string("plugin_version")
    if version and version.removeprefix("v").partition("+")[0] != __version__:
        raise InvalidRequest("plugin_version: a plugin that is part of the server has the server's version only")


def check_token_type_tunable(entry: MountEntry) -> None:
    """Only methods that log somebody in make tokens of a type. Raises InvalidRequest."""
    if entry.table != AUTH:
        raise InvalidRequest("'token_type' can only be modified on auth mounts")
    if entry.type == "token":
        raise InvalidRequest("'token_type' cannot be set for 'token' or 'ns_token' auth mounts")


def describe(entry: MountEntry) -> dict[str, Any]:
    """One mount as the lists show it; a TTL of 0 is the system's default."""
    config: dict[str, Any] = {
        "default_lease_ttl": entry.config.default_lease_ttl_s,
        "force_no_cache": entry.config.force_no_cache,
        "max_lease_ttl": entry.config.max_lease_ttl_s,
        **_optional(entry),
    }
    return {
        "accessor": entry.accessor,
        "config": config,
        "deprecation_status": "supported",
        "description": entry.description,
        "external_entropy_access": entry.external_entropy_access,
        "local": entry.local,
        "options": entry.options,
        "plugin_version": "",
        "running_plugin_version": PLUGIN_VERSION,
        "running_sha256": "",
        "seal_wrap": entry.seal_wrap,
        "type": entry.type,
        "uuid": entry.uuid,
    }


def tuning(entry: MountEntry, defaults: TtlDefaults) -> dict[str, Any]:
    """One mount as ``tune`` shows it, with the TTLs that are in force."""
    info = mount_info(entry, defaults)
    data: dict[str, Any] = {
        "default_lease_ttl": info.default_lease_ttl_s,
        "description": entry.description,
        "force_no_cache": entry.config.force_no_cache,
        "max_lease_ttl": info.max_lease_ttl_s,
    }
    if entry.options:
        data["options"] = entry.options
    optional = _optional(entry)
    lockout: dict[str, Any] = optional.pop("user_lockout_config", {})
    return data | optional | lockout


def _optional(entry: MountEntry) -> dict[str, Any]:
    """Settings that are shown where they are set."""
    shown: dict[str, Any] = {}
    if entry.config.listing_visibility:
        shown["listing_visibility"] = entry.config.listing_visibility
    if entry.table == AUTH:
        shown["token_type"] = entry.config.token_type or "default-service"
    if entry.config.user_lockout is not None:
        shown["user_lockout_config"] = shown_lockout(entry.config.user_lockout)
    for name in LISTS:
        values = getattr(entry.config, name)
        if values:
            shown[name] = list(values)
    return shown
