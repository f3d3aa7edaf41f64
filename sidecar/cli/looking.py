"""``token capabilities``, ``path-help``, ``print token``, ``plugin``, ``version-history`` and ``monitor``: look, change
nothing."""

from __future__ import annotations

import sys

from sidecar.cli import output
from sidecar.cli.command import EXIT_OK, Call, Command, doing
from sidecar.cli.data import found
from sidecar.cli.flags import Flag


def capabilities(call: Call) -> int:
    """With one argument, those of the token in use."""
    call.at_most(2)
    client = call.client()
    path = call.argument(len(call.arguments) - 1 if call.arguments else 0, "PATH")
    with doing("listing capabilities"):
        if len(call.arguments) == 1:
            reply = client.post("sys/capabilities-self", {"paths": [path]})
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
    rows = [(name, kind) for kind in kinds for name in data.get(kind) or []]
    return call.show_value({kind: data.get(kind) or [] for kind in kinds}, output.table(("Name", "Type"), rows))


def plugin_info(call: Call) -> int:
    call.at_most(2)
    kind, name = call.path(0, "TYPE"), call.path(1, "NAME")
    client = call.client()
    path = f"sys/plugins/catalog/{kind}/{name}"
    data = (found(call, "reading plugin", path, lambda: client.get(path)).body or {}).get("data") or {}
    return call.show_value(data, output.pairs(sorted(data.items())))


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
    "token capabilities [flags] [TOKEN] PATH", "Show what a token, or the one in use, may do at a path.", capabilities
)
PATH_HELP = Command("path-help [flags] PATH", "Show the help text of an endpoint.", path_help)
PRINT_TOKEN = Command("print token", "Print the token in use.", print_token, http=False, formats=False)
PLUGIN_LIST = Command("plugin list [flags] [TYPE]", "List what can be mounted: auth, database or secret.", plugins)
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
