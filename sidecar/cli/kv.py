"""``outrider kv``: get, put, list and delete on both versions of the key-value engine, and what only the versioned one
has: undelete, destroy and metadata.

A first call asks the server which mount a path belongs to and of which version it is, as Vault's client does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sidecar.cli import output
from sidecar.cli.client import ApiError, Client, Reply
from sidecar.cli.command import EXIT_OK, EXIT_SERVER, Call, Command, Failed, doing
from sidecar.cli.data import found, show_names
from sidecar.cli.flags import Flag, UsageError
from sidecar.cli.values import parse_data

MOUNT_FLAG = Flag("mount", "Path of the engine's mount; PATH is then relative to it.")


class Target(NamedTuple):
    """Where a secret is: ``mount`` ends in a slash, ``rest`` is relative to it."""

    mount: str
    rest: str
    versioned: bool

    def path(self, area: str) -> str:
        """The path to call; ``area`` (data, metadata, delete) exists on versioned mounts only."""
        return (
            f"{self.mount}{area}/{self.rest}".rstrip("/") if self.versioned else f"{self.mount}{self.rest}".rstrip("/")
        )


def _locate(call: Call, client: Client) -> Target:
    mount_flag = call.values.text("mount").strip("/")
    given = call.argument(0, "PATH").strip("/") if call.arguments else ""
    if not mount_flag and not given:
        raise UsageError("not enough arguments: PATH is missing")
    path = f"{mount_flag}/{given}".strip("/") if mount_flag else given
    try:
        with doing(f"looking up the mount of {path}"):
            data = (client.get(f"sys/internal/ui/mounts/{path}").body or {}).get("data") or {}
    except Failed as failure:
        cause = failure.__cause__
        if not isinstance(cause, ApiError) or cause.status != 404:
            raise
        data = {}  # a server without this endpoint has no versioned engine either
    version = str((data.get("options") or {}).get("version", "1"))
    mount = str(data.get("path") or f"{path.split('/', 1)[0]}/")
    return Target(mount, f"{path}/".removeprefix(mount).strip("/"), version == "2")


def _is_secret_path(target: Target) -> Target:
    if not target.rest:
        raise UsageError("PATH names a mount, not a secret")
    return target


def get(call: Call) -> int:
    call.at_most(1)
    client = call.client()
    target = _is_secret_path(_locate(call, client))
    path = target.path("data")
    query = {"version": call.values.text("version")} if "version" in call.values else {}
    if query and not target.versioned:
        raise UsageError("-version needs a versioned mount")
    reply = found(call, "reading", path, lambda: client.get(path, query))
    body = reply.body or {}
    if not target.versioned or body.get("wrap_info") or call.format == "raw":
        return _show_version_1(call, reply)
    inner = body.get("data") or {}
    data, metadata = inner.get("data"), inner.get("metadata") or {}
    if data is None and call.values.text("field"):
        raise Failed(f"No data found at {path}", EXIT_SERVER)
    if call.values.text("field"):
        return call.show_field({"data": data}, call.values.text("field"))
    call.warn_of(body)
    call.show_value(output.envelope(body), _versioned_text(path, data, metadata))
    return EXIT_OK if data is not None else EXIT_SERVER


def _show_version_1(call: Call, reply: Reply) -> int:
    if call.format != "table" or call.values.text("field") or (reply.body or {}).get("wrap_info"):
        return call.show_secret(reply)
    call.warn_of(reply.body)
    data = (reply.body or {}).get("data") or {}
    call.say(f"{output.title('Data', list(data))}\n{output.pairs(sorted(data.items()))}")
    return EXIT_OK


def _versioned_text(path: str, data: dict[str, Any] | None, metadata: dict[str, Any]) -> str:
    sections = [
        f"{output.heading('Secret Path', len(path))}\n{path}",
        f"{output.title('Metadata', list(metadata))}\n{output.pairs(sorted(metadata.items()))}",
    ]
    if data is not None:
        sections.append(f"{output.title('Data', list(data))}\n{output.pairs(sorted(data.items()))}")
    return "\n\n".join(sections)


def put(call: Call) -> int:
    data = parse_data(call.arguments[1:], call.read_stdin)
    if not call.arguments[1:]:
        raise UsageError("must supply data")
    cas = call.values.integer("cas", -1)
    client = call.client()
    target = _is_secret_path(_locate(call, client))
    path = target.path("data")
    if cas >= 0 and not target.versioned:
        raise UsageError("-cas needs a versioned mount")
    payload: dict[str, Any] = data
    if target.versioned:
        payload = {"data": data, "options": {"cas": cas} if cas >= 0 else {}}
    with doing(f"writing data to {path}"):
        reply = client.put(path, payload)
    return show_written(call, path, reply)


def show_written(call: Call, path: str, reply: Reply) -> int:
    """Print the answer to a write of a secret."""
    if reply.body is None:
        if call.format == "table":
            call.say(f"Success! Data written to: {path}")
        return EXIT_OK
    if call.format != "table" or call.values.text("field") or reply.body.get("wrap_info"):
        return call.show_secret(reply)
    call.warn_of(reply.body)
    call.say(_versioned_text(path, None, reply.body.get("data") or {}))
    return EXIT_OK


def list_names(call: Call) -> int:
    call.at_most(1)
    client = call.client()
    path = _locate(call, client).path("metadata")
    return show_names(call, found(call, "listing", path, lambda: client.list(path)))


def _versions(call: Call) -> list[str]:
    return [part for text in call.values.texts("versions") for part in text.split(",") if part]


def delete(call: Call) -> int:
    call.at_most(1)
    versions = _versions(call)
    client = call.client()
    target = _is_secret_path(_locate(call, client))
    if versions and not target.versioned:
        raise UsageError("-versions needs a versioned mount")
    path = target.path("delete" if versions else "data")
    with doing(f"deleting {path}"):
        if versions:
            client.put(path, {"versions": versions})
        else:
            client.delete(path)
    if call.format == "table":
        call.say(f"Success! Data deleted (if it existed) at: {path}")
    return EXIT_OK


def _change_versions(call: Call, area: str, what: str) -> int:
    call.at_most(1)
    versions = _versions(call)
    if not versions:
        raise UsageError("no versions provided, use the -versions flag to say which")
    client = call.client()
    path = versioned(call, client).path(area)
    with doing(f"{what} {path}"):
        client.put(path, {"versions": versions})
    if call.format == "table":
        call.say(f"Success! Data written to: {path}")
    return EXIT_OK


def versioned(call: Call, client: Client) -> Target:
    """The secret that the arguments name. Raises UsageError where its mount keeps no versions."""
    target = _is_secret_path(_locate(call, client))
    if not target.versioned:
        raise UsageError("this needs a versioned mount")
    return target


def undelete(call: Call) -> int:
    return _change_versions(call, "undelete", "undeleting")


def destroy(call: Call) -> int:
    return _change_versions(call, "destroy", "destroying")


def metadata_get(call: Call) -> int:
    call.at_most(1)
    client = call.client()
    path = versioned(call, client).path("metadata")
    reply = found(call, "reading", path, lambda: client.get(path))
    body = reply.body or {}
    if call.format != "table" or call.values.text("field") or body.get("wrap_info"):
        return call.show_secret(reply)
    call.warn_of(body)
    data = dict(body.get("data") or {})
    versions = data.pop("versions", None) or {}
    sections = [
        f"{output.heading('Metadata Path', len(path))}\n{path}",
        f"{output.title('Metadata', list(data))}\n{output.pairs(sorted(data.items()))}",
    ]
    for number in sorted(versions, key=int):
        version = versions[number]
        sections.append(f"{output.title(f'Version {number}', list(version))}\n{output.pairs(sorted(version.items()))}")
    call.say("\n\n".join(sections))
    return EXIT_OK


def metadata_delete(call: Call) -> int:
    call.at_most(1)
    client = call.client()
    path = versioned(call, client).path("metadata")
    with doing(f"deleting {path}"):
        client.delete(path)
    if call.format == "table":
        call.say(f"Success! Data deleted (if it existed) at: {path}")
    return EXIT_OK


GET = Command(
    "kv get [flags] PATH",
    "Read a secret.",
    get,
    (Flag("version", "Which version to read; the newest without it.", "int"), MOUNT_FLAG),
    field=True,
)
PUT = Command(
    "kv put [flags] PATH KEY=VALUE...",
    "Write a secret; on a versioned mount, its next version. KEY=@file reads a file, KEY=- standard input.",
    put,
    (Flag("cas", "Write only if this is the current version; 0: only if there is none.", "int"), MOUNT_FLAG),
    field=True,
)
LIST = Command("kv list [flags] PATH", "List the secrets and folders below a path.", list_names, (MOUNT_FLAG,))
DELETE = Command(
    "kv delete [flags] PATH",
    "Delete a secret; on a versioned mount its newest version, which can be brought back.",
    delete,
    (Flag("versions", "Versions to delete, separated by commas.", "texts"), MOUNT_FLAG),
)
VERSIONS_FLAG = Flag("versions", "Versions it is about, separated by commas.", "texts")
UNDELETE = Command(
    "kv undelete [flags] PATH", "Bring deleted versions of a secret back.", undelete, (VERSIONS_FLAG, MOUNT_FLAG)
)
DESTROY = Command(
    "kv destroy [flags] PATH",
    "Remove versions of a secret for good; their metadata stays.",
    destroy,
    (VERSIONS_FLAG, MOUNT_FLAG),
)
METADATA_GET = Command(
    "kv metadata get [flags] PATH",
    "Show the versions and settings of a secret.",
    metadata_get,
    (MOUNT_FLAG,),
    field=True,
)
METADATA_DELETE = Command(
    "kv metadata delete [flags] PATH",
    "Remove a secret with all its versions. Nothing brings it back.",
    metadata_delete,
    (MOUNT_FLAG,),
)
