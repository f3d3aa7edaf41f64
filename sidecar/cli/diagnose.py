"""``outrider operator diagnose``: run every check of a configuration and show what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.cli.command import EXIT_LOCAL, EXIT_OK, EXIT_SERVER, Call, Command
from sidecar.cli.flags import Flag, UsageError

if TYPE_CHECKING:
    from sidecar.diagnose import Finding

_EXIT = {"failure": EXIT_LOCAL, "warning": EXIT_SERVER}


def run(call: Call) -> int:
    """0 where all is well, 1 after a failure, 2 after a warning, as in Vault."""
    import asyncio

    from sidecar.diagnose import diagnose

    call.at_most(0)
    paths = call.values.texts("config")
    if not paths:
        raise UsageError("-config is needed")
    found = asyncio.run(diagnose(paths, call.environ))
    call.show_value(found.shown(), "\n".join(_lines(found, "")))
    return _EXIT.get(found.status, EXIT_OK)


def _lines(found: Finding, indent: str) -> list[str]:
    message = f": {found.message}" if found.message else ""
    lines = [f"{indent}[ {found.status} ] {found.name}{message}"]
    if found.advice:
        lines.append(f"{indent}  {found.advice}")
    for child in found.children:
        lines += _lines(child, indent + "  ")
    return lines


DIAGNOSE = Command(
    "operator diagnose [flags]",
    "Check, without a server, whether one could serve with this configuration on this machine. Nothing is\n"
    "  changed. Exit code 0: all is well, 1: something fails, 2: something to look at.",
    run,
    (Flag("config", "HCL or JSON file, or a directory of such; may be repeated, later ones win.", "texts"),),
    http=False,
)
