"""``outrider read``, ``write``, ``list`` and ``delete``: any path of the API."""

from __future__ import annotations

from typing import Any

from sidecar.cli import output
from sidecar.cli.client import ApiError, Reply
from sidecar.cli.command import EXIT_OK, EXIT_SERVER, Call, Command, Failed, doing
from sidecar.cli.flags import Flag, UsageError
from sidecar.cli.values import parse_data

WRAPPING_DEFAULT_TTL = "5m"


def found(call: Call, what: str, path: str, send: Any) -> Reply:
    """The answer of ``send()``; nothing there is a failure with Vault's words for it."""
    try:
        with doing(f"{what} {path}"):
            reply: Reply = send()
    except Failed as failure:
        cause = failure.__cause__
        if isinstance(cause, ApiError) and cause.status == 404 and not cause.reply.errors():
            if call.format == "json":
                call.say("{}")
            raise Failed(f"No value found at {path}", EXIT_SERVER) from None
        raise
    return reply


def read(call: Call) -> int:
    path = call.path()
    query = {key: str(value) for key, value in parse_data(call.arguments[1:], call.read_stdin).items()}
    client = call.client()
    return call.show_secret(found(call, "reading", path, lambda: client.get(path, query)))


def write(call: Call) -> int:
    path = call.path()
    data = parse_data(call.arguments[1:], call.read_stdin)
    if not call.arguments[1:] and not call.values.flag("force"):
        raise UsageError("must supply data or use -force")
    client = call.client(wrap_ttl=WRAPPING_DEFAULT_TTL if path == "sys/wrapping/wrap" else "")
    with doing(f"writing data to {path}"):
        reply = client.put(path, data or None)
    if reply.body is None:
        if not call.values.text("field") and call.format == "table":
            call.say(f"Success! Data written to: {path}")
        return EXIT_OK
    return call.show_secret(reply)


def patch(call: Call) -> int:
    path = call.path()
    data = parse_data(call.arguments[1:], call.read_stdin)
    if not call.arguments[1:] and not call.values.flag("force"):
        raise UsageError("must supply data or use -force")
    client = call.client()
    with doing(f"writing data to {path}"):
        reply = client.patch(path, data)
    if reply.body is None:
        if not call.values.text("field") and call.format == "table":
            call.say(f"Success! Data written to: {path}")
        return EXIT_OK
    return call.show_secret(reply)


def list_names(call: Call) -> int:
    path = call.path()
    call.at_most(1)
    client = call.client()
    return show_names(call, found(call, "listing", path, lambda: client.list(path)))


def show_names(call: Call, reply: Reply) -> int:
    """Print the answer to a LIST."""
    body = reply.body or {}
    call.warn_of(body)
    if call.format == "raw":
        call.say(reply.text.rstrip("\n"))
        return EXIT_OK
    if body.get("wrap_info"):
        return call.show_secret(reply)
    data = body.get("data") or {}
    keys = data.get("keys") or []
    if not keys:
        raise Failed("No entries found", EXIT_SERVER)
    info = data.get("key_info") or {}
    if call.values.flag("detailed") and info:
        names = sorted({name for one in info.values() if isinstance(one, dict) for name in one})
        rows = [(key, *((info.get(key) or {}).get(name, "") for name in names)) for key in keys]
        return call.show_value(data, output.table(("Keys", *names), rows))
    return call.show_value(keys, output.table(("Keys",), [(key,) for key in keys]))


def delete(call: Call) -> int:
    path = call.path()
    call.at_most(1)
    client = call.client()
    with doing(f"deleting {path}"):
        reply = client.delete(path)
    if reply.body is None:
        if call.format == "table":
            call.say(f"Success! Data deleted (if it existed) at: {path}")
        return EXIT_OK
    return call.show_secret(reply)


READ = Command("read [flags] PATH [KEY=VALUE...]", "Read a path. Pairs become query parameters.", read, field=True)
WRITE = Command(
    "write [flags] PATH [KEY=VALUE...]",
    "Write data, or call an endpoint. KEY=@file reads a file, KEY=- standard input;\n"
    "  a lone - or @file is a whole JSON object.",
    write,
    (Flag("force", "Write nothing: call the endpoint with an empty body.", "bool", aliases=("f",)),),
    field=True,
)
PATCH = Command(
    "patch [flags] PATH [KEY=VALUE...]",
    "Change some fields of what is at a path, where it can be patched; the others stay.",
    patch,
    (Flag("force", "Patch with nothing.", "bool", aliases=("f",)),),
    field=True,
)
LIST = Command(
    "list [flags] PATH",
    "List the names below a path.",
    list_names,
    (Flag("detailed", "Show what is known of each name too, where the server tells.", "bool"),),
)
DELETE = Command("delete [flags] PATH", "Delete what is at a path.", delete)
