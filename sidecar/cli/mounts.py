"""``outrider secrets`` and ``outrider auth``: enable, disable and list."""

from __future__ import annotations

from typing import Any

from sidecar.cli import output
from sidecar.cli.command import EXIT_OK, Call, Command, doing
from sidecar.cli.flags import Flag, UsageError

LISTS = (
    "allowed-response-headers",
    "audit-non-hmac-request-keys",
    "audit-non-hmac-response-keys",
    "passthrough-request-headers",
)
PATH_FLAG = Flag("path", "Where to mount it.", default="the type's name")
DETAILED_FLAG = Flag("detailed", "Show their settings too.", "bool")
SETTINGS_FLAGS = (
    Flag("description", "A line for people."),
    Flag("default-lease-ttl", "Default TTL of its leases, as 1h."),
    Flag("max-lease-ttl", "Longest TTL of its leases, as 24h."),
    Flag("listing-visibility", "unauth: shown before login; hidden."),
    Flag("options", "key=value option of the mount; may be repeated.", "texts"),
    Flag("audit-non-hmac-request-keys", "Request field that the audit shows in clear; may be repeated.", "texts"),
    Flag("audit-non-hmac-response-keys", "Response field that the audit shows in clear; may be repeated.", "texts"),
    Flag("passthrough-request-headers", "Request header passed to the plugin; may be repeated.", "texts"),
    Flag("allowed-response-headers", "Header the plugin may set; may be repeated.", "texts"),
    Flag("plugin-version", "The version of its plugin: only the server's own."),
)
"""What both enable and tune set."""
VERSION_FLAG = Flag("version", "Version of the engine.", "int")
TOKEN_TYPE_FLAG = Flag("token-type", "default-service, default-batch, service or batch.")
_ENABLE_FLAGS = (
    PATH_FLAG,
    *SETTINGS_FLAGS,
    Flag("local", "Do not replicate its data to performance secondaries.", "bool"),
    Flag("force-no-cache", "Accepted; nothing of a mount is cached that could be stale.", "bool"),
    Flag("seal-wrap", "Kept and shown; everything is encrypted by the barrier alike.", "bool"),
    Flag("external-entropy-access", "Kept and shown; it changes nothing.", "bool"),
    Flag("plugin-name", "Name of the plugin, in the place of TYPE."),
)


def _enable(call: Call, base: str, what: str) -> int:
    call.at_most(1)
    named = call.values.text("plugin-name")
    kind = named if named and (not call.arguments or call.arguments == ["plugin"]) else call.path(0, "TYPE")
    options = option_pairs(call.values.texts("options"))
    if kind in ("kv-v1", "kv-v2"):
        kind, options = "kv", {"version": kind[-1], **options}
    if "version" in call.values:
        options["version"] = call.values.text("version")
    mount = call.values.text("path", kind).strip("/")
    config: dict[str, Any] = {
        name.replace("-", "_"): call.values.text(name)
        for name in ("default-lease-ttl", "max-lease-ttl", "listing-visibility", "token-type")
        if name in call.values
    }
    config |= {name.replace("-", "_"): call.values.texts(name) for name in LISTS if name in call.values}
    if call.values.flag("force-no-cache"):
        config["force_no_cache"] = True
    request: dict[str, Any] = {
        "type": kind,
        "description": call.values.text("description"),
        "local": call.values.flag("local"),
        "config": config,
    }
    if options:
        request["options"] = options
    if "plugin-version" in call.values:
        request["plugin_version"] = call.values.text("plugin-version")
    for flag in ("seal-wrap", "external-entropy-access"):
        if call.values.flag(flag):
            request[flag.replace("-", "_")] = True
    client = call.client()
    with doing(f"enabling {what}"):
        client.post(f"{base}/{mount}", request)
    call.say(f"Success! Enabled the {kind} {what} at: {mount}/")
    return EXIT_OK


def option_pairs(texts: list[str]) -> dict[str, str]:
    """``-options=key=value``, as often as given. Raises UsageError."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError("-options must be key=value")
        found[name] = value
    return found


def _disable(call: Call, base: str, what: str) -> int:
    call.at_most(1)
    mount = call.path(0, "PATH")
    client = call.client()
    with doing(f"disabling {what} at {mount}/"):
        client.delete(f"{base}/{mount}")
    call.say(f"Success! Disabled the {what} (if it existed) at: {mount}/")
    return EXIT_OK


def _list(call: Call, base: str, what: str) -> int:
    call.at_most(0)
    client = call.client()
    with doing(f"listing the {what}s"):
        body = client.get(base).body or {}
    mounts = {path: mount for path, mount in sorted((body.get("data") or {}).items()) if isinstance(mount, dict)}
    if call.values.flag("detailed"):
        return call.show_value(mounts, _detailed(mounts, auth=base == "sys/auth"))
    rows = [
        (path, mount.get("type", ""), mount.get("accessor", ""), mount.get("description", ""))
        for path, mount in mounts.items()
    ]
    return call.show_value(mounts, output.table(("Path", "Type", "Accessor", "Description"), rows))


def _detailed(mounts: dict[str, dict[str, Any]], *, auth: bool) -> str:
    """Vault's columns, of which this server has something to say."""

    def row(path: str, mount: dict[str, Any]) -> tuple[Any, ...]:
        config = mount.get("config") or {}
        ttls = [config.get(f"{name}_lease_ttl") or "system" for name in ("default", "max")]
        own = config.get("token_type", "") if auth else str(bool(config.get("force_no_cache"))).lower()
        options = " ".join(f"{name}={value}" for name, value in sorted((mount.get("options") or {}).items()))
        return (
            path,
            mount.get("type", ""),
            mount.get("accessor", ""),
            *map(str, ttls),
            own,
            "local" if mount.get("local") else "replicated",
            f"map[{options}]",
            mount.get("description", ""),
            mount.get("uuid", ""),
            mount.get("running_plugin_version", ""),
            mount.get("deprecation_status", ""),
        )

    header: tuple[str, ...] = (
        "Path",
        "Plugin",
        "Accessor",
        "Default TTL",
        "Max TTL",
        "Token Type" if auth else "Force No Cache",
    )
    header += ("Replication", "Options", "Description", "UUID", "Running Version", "Deprecation Status")
    return output.table(header, [row(path, mount) for path, mount in mounts.items()])


SECRETS_ENABLE = Command(
    "secrets enable [flags] TYPE",
    "Mount a secrets engine. kv-v2 is kv with -version=2.",
    lambda call: _enable(call, "sys/mounts", "secrets engine"),
    (*_ENABLE_FLAGS, VERSION_FLAG),
    formats=False,
)
SECRETS_DISABLE = Command(
    "secrets disable [flags] PATH",
    "Unmount a secrets engine and delete its data.",
    lambda call: _disable(call, "sys/mounts", "secrets engine"),
    formats=False,
)
SECRETS_LIST = Command(
    "secrets list [flags]",
    "List the secrets engines.",
    lambda call: _list(call, "sys/mounts", "secrets engine"),
    (DETAILED_FLAG,),
)
AUTH_ENABLE = Command(
    "auth enable [flags] TYPE",
    "Mount an auth method.",
    lambda call: _enable(call, "sys/auth", "auth method"),
    (*_ENABLE_FLAGS, TOKEN_TYPE_FLAG),
    formats=False,
)
AUTH_DISABLE = Command(
    "auth disable [flags] PATH",
    "Unmount an auth method: its users can no longer log in.",
    lambda call: _disable(call, "sys/auth", "auth method"),
    formats=False,
)
AUTH_LIST = Command(
    "auth list [flags]",
    "List the auth methods.",
    lambda call: _list(call, "sys/auth", "auth method"),
    (DETAILED_FLAG,),
)
