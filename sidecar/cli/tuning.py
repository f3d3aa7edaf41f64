"""``tune`` and ``move`` of ``outrider secrets`` and ``outrider auth``."""

from __future__ import annotations

import time
from typing import Any

from sidecar.cli.command import EXIT_OK, EXIT_SERVER, Call, Command, Failed, doing
from sidecar.cli.flags import Flag
from sidecar.cli.mounts import LISTS, SETTINGS_FLAGS, TOKEN_TYPE_FLAG, VERSION_FLAG, option_pairs

_TEXTS = {
    "default-lease-ttl": "default_lease_ttl",
    "description": "description",
    "listing-visibility": "listing_visibility",
    "max-lease-ttl": "max_lease_ttl",
    "plugin-version": "plugin_version",
    "token-type": "token_type",
}
_LOCKOUT = {
    "user-lockout-counter-reset-duration": "lockout_counter_reset_duration",
    "user-lockout-disable": "lockout_disable",
    "user-lockout-duration": "lockout_duration",
    "user-lockout-threshold": "lockout_threshold",
}
_LISTS = {name: name.replace("-", "_") for name in LISTS}
_POLL_S = 0.5


def _tune(call: Call, base: str, what: str) -> int:
    call.at_most(1)
    mount = call.path()
    values = call.values
    request: dict[str, Any] = {field: values.text(flag) for flag, field in _TEXTS.items() if flag in values}
    request |= {field: values.texts(flag) for flag, field in _LISTS.items() if flag in values}
    if lockout := {field: values.text(flag) for flag, field in _LOCKOUT.items() if flag in values}:
        request["user_lockout_config"] = lockout
    options = option_pairs(values.texts("options"))
    if "version" in values:
        options["version"] = values.text("version")
    if options:
        request["options"] = options
    client = call.client()
    with doing(f"tuning {what} {mount}/"):
        reply = client.post(f"{base}/{mount}/tune", request)
    call.warn_of(reply.body)
    call.say(f"Success! Tuned the {what} at: {mount}/")
    return EXIT_OK


def _move(call: Call, prefix: str, what: str) -> int:
    call.at_most(2)
    source, target = call.path(0, "SOURCE"), call.path(1, "DESTINATION")
    client = call.client()
    with doing(f"moving {what} {source}/ to {target}/"):
        reply = client.post("sys/remount", {"from": prefix + source, "to": prefix + target})
    migration = str(((reply.body or {}).get("data") or {}).get("migration_id", ""))
    while migration:
        with doing(f"asking for the state of migration {migration}"):
            body = client.get(f"sys/remount/status/{migration}").body or {}
        state = str(((body.get("data") or {}).get("migration_info") or {}).get("status", ""))
        if state == "success":
            break
        if state != "in-progress":
            raise Failed(f"Failure! Migration {migration} ended as: {state or 'unknown'}", EXIT_SERVER)
        time.sleep(_POLL_S)
    call.say(f"Success! Finished moving {what} {source}/ to {target}/")
    return EXIT_OK


_LOCKOUT_FLAGS = (
    Flag("user-lockout-threshold", "Failed logins after which a user is locked out."),
    Flag("user-lockout-duration", "For how long, as 15m."),
    Flag("user-lockout-counter-reset-duration", "Without a failure for so long the count starts afresh, as 15m."),
    Flag("user-lockout-disable", "Lock nobody out.", "bool"),
)
SECRETS_TUNE = Command(
    "secrets tune [flags] PATH",
    "Change settings of a mounted secrets engine; -version=2 upgrades kv.",
    lambda call: _tune(call, "sys/mounts", "secrets engine"),
    (*SETTINGS_FLAGS, VERSION_FLAG),
    formats=False,
)
AUTH_TUNE = Command(
    "auth tune [flags] PATH",
    "Change settings of a mounted auth method.",
    lambda call: _tune(call, "sys/auth", "auth method"),
    (*SETTINGS_FLAGS, *_LOCKOUT_FLAGS, TOKEN_TYPE_FLAG),
    formats=False,
)
SECRETS_MOVE = Command(
    "secrets move [flags] SOURCE DESTINATION",
    "Give a secrets engine another path; its data stays, its leases are revoked.",
    lambda call: _move(call, "", "secrets engine"),
    formats=False,
)
AUTH_MOVE = Command(
    "auth move [flags] SOURCE DESTINATION",
    "Give an auth method another path; tokens it issued are revoked.",
    lambda call: _move(call, "auth/", "auth method"),
    formats=False,
)
