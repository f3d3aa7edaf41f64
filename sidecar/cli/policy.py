"""``outrider policy``: write, read, list, delete and fmt."""

from __future__ import annotations

import os
import stat

from sidecar.cli import output
from sidecar.cli.command import EXIT_LOCAL, EXIT_OK, EXIT_SERVER, Call, Command, Failed, doing
from sidecar.cli.data import found
from sidecar.cli.flags import UsageError


def write(call: Call) -> int:
    call.at_most(2)
    name, source = call.path(0, "NAME"), call.argument(1, "FILE")
    if source == "-":
        text = call.read_stdin()
    else:
        try:
            with open(source, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"cannot read {source}: {reason}") from error
    client = call.client()
    with doing(f"uploading policy {name}"):
        client.put(f"sys/policies/acl/{name}", {"policy": text})
    call.say(f"Success! Uploaded policy: {name}")
    return EXIT_OK


def read(call: Call) -> int:
    call.at_most(1)
    name = call.path(0, "NAME")
    client = call.client()
    try:
        reply = found(call, "reading policy", name, lambda: client.get(f"sys/policies/acl/{name}"))
    except Failed as failure:
        if str(failure).startswith("No value found"):
            raise Failed(f"No policy named: {name}", EXIT_SERVER) from None
        raise
    text = str(((reply.body or {}).get("data") or {}).get("policy", ""))
    return call.show_value({"policy": text}, text.rstrip("\n"))


def list_names(call: Call) -> int:
    call.at_most(0)
    client = call.client()
    reply = found(call, "listing", "policies", lambda: client.list("sys/policies/acl"))
    names = ((reply.body or {}).get("data") or {}).get("keys") or []
    return call.show_value(names, "\n".join(map(output.go_text, names)))


def delete(call: Call) -> int:
    call.at_most(1)
    name = call.path(0, "NAME")
    client = call.client()
    with doing(f"deleting policy {name}"):
        client.delete(f"sys/policies/acl/{name}")
    call.say(f"Success! Deleted policy: {name}")
    return EXIT_OK


def fmt(call: Call) -> int:
    """In the file itself, which is the old one or the new one whatever happens."""
    from sidecar.hcl import HCLError
    from sidecar.hcl.formatting import format_text

    call.at_most(1)
    given = call.argument(0, "PATH")
    path = os.path.realpath(given)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
        made = format_text(text, given)
        if made != text:
            _replace(path, made)
    except HCLError as error:
        raise Failed(f"Error formatting policy: {error}", EXIT_LOCAL) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot format {given}: {reason}") from error
    call.say(f"Success! Formatted policy: {given}")
    return EXIT_OK


def _replace(path: str, text: str) -> None:
    import tempfile

    handle, name = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".policy-")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(name, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


WRITE = Command("policy write [flags] NAME FILE", "Upload a policy; FILE - is standard input.", write, formats=False)
READ = Command("policy read [flags] NAME", "Print a policy.", read)
LIST = Command("policy list [flags]", "List the policies.", list_names)
DELETE = Command("policy delete [flags] NAME", "Delete a policy.", delete, formats=False)
FMT = Command(
    "policy fmt PATH",
    "Lay the policy in a file out as is usual; the file is rewritten.",
    fmt,
    http=False,
    formats=False,
)
