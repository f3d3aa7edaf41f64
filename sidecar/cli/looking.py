"""``token capabilities``, ``path-help``, ``auth help``, ``print token``, ``plugin``, ``operator usage``,
``version-history`` and ``monitor``: look, change nothing but what is loaded."""

from __future__ import annotations

import sys
from typing import Any

from sidecar.cli import output
from sidecar.cli.command import EXIT_OK, EXIT_SERVER, Call, Command, Failed, doing
from sidecar.cli.data import found
from sidecar.cli.flags import Flag, UsageError


def capabilities(call: Call) -> int:
    """With one argument, those of the token in use."""
    call.at_most(2)
    client = call.client()
    accessor = call.values.flag("accessor")
    if accessor and len(call.arguments) != 2:
        raise UsageError("-accessor needs two arguments: ACCESSOR PATH")
    path = call.argument(len(call.arguments) - 1 if call.arguments else 0, "PATH")
    with doing("listing capabilities"):
        if len(call.arguments) == 1:
            reply = client.post("sys/capabilities-self", {"paths": [path]})
        elif accessor:
            reply = client.post(
                "sys/capabilities-accessor", {"accessor": call.argument(0, "ACCESSOR"), "paths": [path]}
            )
        else:
            reply = client.post("sys/capabilities", {"token": call.argument(0, "TOKEN"), "paths": [path]})
    granted = sorted((reply.body or {}).get("capabilities") or ((reply.body or {}).get("data") or {}).get(path) or [])
    return call.show_value(granted, ", ".join(granted))


def path_help(call: Call) -> int:
    call.at_most(1)
    path = call.path()
    client = call.client()
    reply = found(call, "retrieving help for", path, lambda: client.get(path, {"help": "1"}))
    text = str((reply.body or {}).get("help", ""))
    return call.show_value(reply.body or {}, text.rstrip("\n"))


def print_token(call: Call) -> int:
    call.at_most(0)
    call.say(call.token())
    return EXIT_OK


def plugins(call: Call) -> int:
    call.at_most(1)
    client = call.client()
    with doing("listing plugins"):
        body = client.get("sys/plugins/catalog").body or {}
    data = body.get("data") or {}
    kinds = [call.path(0, "TYPE")] if call.arguments else ["auth", "database", "secret"]
    if call.values.flag("detailed"):
        detailed = [one for one in data.get("detailed") or [] if one.get("type") in kinds]
        names = ("name", "type", "version", "deprecation_status")
        shown = [tuple(str(one.get(name, "")) for name in names) for one in detailed]
        return call.show_value(detailed, output.table(("Name", "Type", "Version", "Deprecation Status"), shown))
    rows = [(name, kind) for kind in kinds for name in data.get(kind) or []]
    return call.show_value({kind: data.get(kind) or [] for kind in kinds}, output.table(("Name", "Type"), rows))


def plugin_info(call: Call) -> int:
    call.at_most(2)
    kind, name = call.path(0, "TYPE"), call.path(1, "NAME")
    client = call.client()
    path = f"sys/plugins/catalog/{kind}/{name}"
    data = (found(call, "reading plugin", path, lambda: client.get(path)).body or {}).get("data") or {}
    return call.show_value(data, output.pairs(sorted(data.items())))


def plugin_reload(call: Call) -> int:
    call.at_most(2)
    names, mounts = call.values.text("plugin"), call.values.texts("mounts")
    request: dict[str, Any] = {"scope": call.values.text("scope")} if "scope" in call.values else {}
    client = call.client()
    if call.arguments:
        path = f"sys/plugins/reload/{call.path(0, 'TYPE')}/{call.path(1, 'NAME')}"
        what = call.path(1, "NAME")
    elif bool(names) == bool(mounts):
        raise UsageError("give TYPE NAME, or one of -plugin and -mounts")
    else:
        path = "sys/plugins/reload/backend"
        listed = [name for text in mounts for name in text.split(",") if name.strip()]
        request |= {"plugin": names} if names else {"mounts": listed}
        what = names or ", ".join(listed)
    with doing("reloading plugin"):
        body = client.put(path, request).body or {}
    call.warn_of(body)
    return call.show_value(body.get("data") or {}, f"Success! Reloaded: {what}")


def usage(call: Call) -> int:
    """What the server has recorded of clients; this one records nothing and says so by an empty answer."""
    call.at_most(0)
    query = {
        name.replace("-", "_"): call.values.text(name) for name in ("start-time", "end-time") if name in call.values
    }
    query = {name: f"{text}-01T00:00:00Z" if len(text) == 7 else text for name, text in query.items()}
    client = call.client()
    with doing("retrieving client counts"):
        body = client.get("sys/internal/counters/activity", query).body
    data = (body or {}).get("data")
    if not data:
        call.complain("No data is available: this server does not record its clients.")
        return EXIT_OK if body is None else EXIT_SERVER
    total = data.get("total") or {}
    rows = [(name, total[name]) for name in sorted(total)]
    return call.show_value(data, output.pairs(rows))


def auth_help(call: Call) -> int:
    """Of a method by its path, or by its type where one of that type is mounted."""
    call.at_most(1)
    wanted = call.path(0, "TYPE | PATH")
    client = call.client()
    with doing("listing auth methods"):
        mounts = (client.get("sys/auth").body or {}).get("data") or {}
    paths = [path for path, mount in sorted(mounts.items()) if isinstance(mount, dict)]
    by_type = [path for path in paths if mounts[path].get("type") == wanted]
    if f"{wanted}/" not in paths and not by_type:
        raise Failed(f"Error: there is no auth method at or of type {wanted}", EXIT_SERVER)
    path = f"{wanted}/" if f"{wanted}/" in paths else by_type[0]
    with doing(f"retrieving help for auth/{path}"):
        body = client.get(f"auth/{path}", {"help": "1"}).body or {}
    return call.show_value(body, str(body.get("help", "")).rstrip("\n"))


def version_history(call: Call) -> int:
    call.at_most(0)
    client = call.client()
    with doing("reading the version history"):
        data = (client.list("sys/version-history").body or {}).get("data") or {}
    info = data.get("key_info") or {}
    rows = [
        (name, (info.get(name) or {}).get("timestamp_installed") or "", (info.get(name) or {}).get("build_date") or "")
        for name in data.get("keys") or []
    ]
    return call.show_value(data, output.table(("Version", "Installation Time", "Build Date"), rows))


def monitor(call: Call) -> int:
    """Until interrupted."""
    call.at_most(0)
    client = call.client()
    query = {
        "log_level": call.values.text("log-level", "info"),
        "log_format": call.values.text("log-format", "standard"),
    }
    with doing("following the server's log"):
        for line in client.stream("sys/monitor", query):
            sys.stdout.write(line)
            sys.stdout.flush()
    return EXIT_OK


CAPABILITIES = Command(
    "token capabilities [flags] [TOKEN | ACCESSOR] PATH",
    "Show what a token, or the one in use, may do at a path.",
    capabilities,
    (Flag("accessor", "The first argument is a token's accessor.", "bool"),),
)
PATH_HELP = Command("path-help [flags] PATH", "Show the help text of an endpoint.", path_help)
PRINT_TOKEN = Command("print token", "Print the token in use.", print_token, http=False, formats=False)
PLUGIN_LIST = Command(
    "plugin list [flags] [TYPE]",
    "List what can be mounted: auth, database or secret.",
    plugins,
    (Flag("detailed", "Show their versions too.", "bool"),),
)
PLUGIN_INFO = Command(
    "plugin info [flags] TYPE NAME", "Show what is known of something that can be mounted.", plugin_info
)
VERSION_HISTORY = Command(
    "version-history [flags]", "List the versions of the server that have led the cluster.", version_history
)
MONITOR = Command(
    "monitor [flags]",
    "Follow the server's log.",
    monitor,
    (
        Flag("log-level", "trace, debug, info, warn or error.", default="info"),
        Flag("log-format", "standard or json.", default="standard"),
    ),
    formats=False,
)
PLUGIN_RELOAD = Command(
    "plugin reload [flags] [TYPE NAME]",
    "Load the engines of a plugin, or those at some paths, anew.",
    plugin_reload,
    (
        Flag("plugin", "Name of the plugin."),
        Flag("mounts", "Path of a mount; may be repeated, or with commas.", "texts"),
        Flag("scope", "Accepted: the active node alone loads engines."),
    ),
)
USAGE = Command(
    "operator usage [flags]",
    "Show how many clients the server has recorded: none are.",
    usage,
    (Flag("start-time", "YYYY-MM or an RFC 3339 time."), Flag("end-time", "Likewise.")),
)
AUTH_HELP = Command("auth help [flags] TYPE | PATH", "Show the help text of an auth method.", auth_help)
