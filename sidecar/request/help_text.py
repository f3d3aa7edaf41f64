"""What ``?help=1`` says, made from the tables that requests are routed by. Pure.

At a mount's root: what lies there, path by path. At a path: the row that serves it, what it does and its parameters.
"""

from __future__ import annotations

from plugin_api.description import PathDescription
from sidecar.request.openapi import MountDescription, matching


def help_text(mount: MountDescription, rest: str, summary: str) -> str:
    """The text for ``rest`` below ``mount``; ``summary`` is what the backend itself says of that path."""
    if not rest.strip("/"):
        return _of_mount(mount)
    found = matching(mount, rest).paths
    if not found:
        return summary
    return _of_path(found[0], rest.rstrip("/"), summary)


def _of_mount(mount: MountDescription) -> str:
    lines = ["## DESCRIPTION", "", f"    A backend of type {mount.type}, at {mount.path}", "", "## PATHS", ""]
    lines += ["    What is served below the mount. Ask for help at any path that fits one of them.", ""]
    for path in sorted(mount.paths, key=lambda path: path.template):
        lines.append(f"    {path.template}")
        if path.help:
            lines.append(f"        {path.help}")
        lines.append("")
    return "\n".join(lines)


def _of_path(path: PathDescription, rest: str, summary: str) -> str:
    lines = [f"Request:        {rest}", f"Matching Route: {path.template}", ""]
    if summary or path.help:
        lines += [summary or path.help, ""]
    fields = {name: (spec.type.value, spec.description) for name, spec in path.fields.items()}
    fields |= dict.fromkeys(path.parameters, ("string", "Part of the path."))
    if fields:
        lines += ["## PARAMETERS", ""]
        for name, (kind, description) in sorted(fields.items()):
            lines.append(f"    {name} ({kind})")
            if description:
                lines.append(f"        {description}")
            lines.append("")
    lines += ["## OPERATIONS", "", f"    {', '.join(operation.value for operation in path.operations)}", ""]
    return "\n".join(lines)
