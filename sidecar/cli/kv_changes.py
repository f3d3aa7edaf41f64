"""``outrider kv``: patch, rollback, metadata put and patch, and enable-versioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sidecar.cli.client import ApiError, Client, Reply
from sidecar.cli.command import EXIT_OK, EXIT_SERVER, Call, Command, Failed, doing
from sidecar.cli.data import found
from sidecar.cli.flags import Flag, UsageError
from sidecar.cli.kv import MOUNT_FLAG, show_written, versioned
from sidecar.cli.values import parse_data


def patch(call: Call) -> int:
    """By PATCH; with ``rw``, or where the server has no PATCH, by reading and writing what was read, changed."""
    removed = call.values.texts("remove-data")
    data: dict[str, Any] = parse_data(call.arguments[1:], call.read_stdin)
    if not data and not removed:
        raise UsageError("must supply data")
    data |= dict.fromkeys(removed)  # None in a merge patch takes a member away
    method = call.values.text("method")
    if method not in ("", "patch", "rw"):
        raise UsageError("-method must be patch or rw")
    client = call.client()
    path = versioned(call, client).path("data")
    if method == "rw":
        return _read_and_write(call, client, path, data)
    cas = call.values.integer("cas", -1)
    payload = {"data": data, "options": {"cas": cas} if cas >= 0 else {}}
    try:
        with doing(f"writing data to {path}"):
            reply = client.patch(path, payload)
    except Failed as failure:
        cause = failure.__cause__
        if method or not isinstance(cause, ApiError) or cause.status != 405:
            raise
        return _read_and_write(call, client, path, data)
    return show_written(call, path, reply)


def _read_and_write(call: Call, client: Client, path: str, changes: dict[str, Any]) -> int:
    """The write counts only if nobody has written since the read."""
    newest = found(call, "reading", path, lambda: client.get(path))
    old = ((newest.body or {}).get("data") or {}).get("data")
    if old is None:
        raise Failed(f"No value found at {path}", EXIT_SERVER)
    merged = {name: value for name, value in {**old, **changes}.items() if value is not None}
    cas = call.values.integer("cas", -1)
    with doing(f"writing data to {path}"):
        reply = client.put(path, {"data": merged, "options": {"cas": cas if cas >= 0 else _version(newest)}})
    return show_written(call, path, reply)


def rollback(call: Call) -> int:
    """Write an old version again, if nobody has written since it was looked at."""
    call.at_most(1)
    if "version" not in call.values:
        raise UsageError("-version says which version to bring back")
    wanted = call.values.integer("version", 0)
    client = call.client()
    path = versioned(call, client).path("data")
    newest = _version(found(call, "reading", path, lambda: client.get(path)))
    old = found(call, "reading", path, lambda: client.get(path, {"version": str(wanted)}))
    data = ((old.body or {}).get("data") or {}).get("data")
    if data is None:
        raise Failed(f"Version {wanted} of {path} is deleted or destroyed", EXIT_SERVER)
    with doing(f"writing data to {path}"):
        reply = client.put(path, {"data": data, "options": {"cas": newest}})
    return show_written(call, path, reply)


def _version(reply: Reply) -> int:
    metadata = ((reply.body or {}).get("data") or {}).get("metadata") or {}
    return int(metadata.get("version", 0))


def metadata_put(call: Call) -> int:
    return _change_metadata(call, lambda client, path, request: client.put(path, request))


def metadata_patch(call: Call) -> int:
    return _change_metadata(call, lambda client, path, request: client.patch(path, request))


def _change_metadata(call: Call, send: Callable[[Client, str, dict[str, Any]], Reply]) -> int:
    call.at_most(1)
    values = call.values
    request: dict[str, Any] = {}
    if "max-versions" in values:
        request["max_versions"] = values.integer("max-versions", 0)
    if "cas-required" in values:
        request["cas_required"] = values.flag("cas-required")
    if "delete-version-after" in values:
        request["delete_version_after"] = values.text("delete-version-after")
    custom = [text.partition("=") for text in values.texts("custom-metadata")]
    if any(not (name and equals) for name, equals, _ in custom):
        raise UsageError("-custom-metadata must be key=value")
    # None in a merge patch takes a member away.
    metadata: dict[str, str | None] = dict.fromkeys(values.texts("remove-custom-metadata"))
    metadata |= {name: value for name, _, value in custom}
    if metadata:
        request["custom_metadata"] = metadata
    client = call.client()
    path = versioned(call, client).path("metadata")
    with doing(f"writing metadata to {path}"):
        send(client, path, request)
    if call.format == "table":
        call.say(f"Success! Data written to: {path}")
    return EXIT_OK


def enable_versioning(call: Call) -> int:
    call.at_most(1)
    mount = call.path()
    client = call.client()
    with doing(f"tuning secrets engine {mount}/"):
        reply = client.post(f"sys/mounts/{mount}/tune", {"options": {"version": "2"}})
    call.warn_of(reply.body)
    call.say(f"Success! Tuned the secrets engine at: {mount}/")
    return EXIT_OK


PATCH = Command(
    "kv patch [flags] PATH KEY=VALUE...",
    "Change some fields of a secret's newest version; the others stay.",
    patch,
    (
        Flag("cas", "Write only if this is the current version.", "int"),
        Flag("method", "patch, or rw: read, change, and write if nobody has written meanwhile."),
        Flag("remove-data", "A field to take away; may be repeated.", "texts"),
        MOUNT_FLAG,
    ),
    field=True,
)
ROLLBACK = Command(
    "kv rollback [flags] PATH",
    "Make an old version of a secret its newest again.",
    rollback,
    (Flag("version", "The version to bring back.", "int"), MOUNT_FLAG),
    field=True,
)
_METADATA_FLAGS = (
    Flag("max-versions", "How many versions to keep; 0: as many as the mount says.", "int"),
    Flag("cas-required", "Refuse writes that do not name the current version.", "bool"),
    Flag("delete-version-after", "Delete each version after this time, as 768h."),
    Flag("custom-metadata", "key=value; may be repeated.", "texts"),
    MOUNT_FLAG,
)
METADATA_PUT = Command(
    "kv metadata put [flags] PATH",
    "Set how many versions of a secret are kept, for how long, and what people know of it.",
    metadata_put,
    _METADATA_FLAGS,
)
METADATA_PATCH = Command(
    "kv metadata patch [flags] PATH",
    "Change what is given of a secret's settings; the others stay.",
    metadata_patch,
    (*_METADATA_FLAGS, Flag("remove-custom-metadata", "A key to take away; may be repeated.", "texts")),
)
ENABLE_VERSIONING = Command(
    "kv enable-versioning [flags] PATH", "Upgrade a kv mount to version 2.", enable_versioning, formats=False
)
