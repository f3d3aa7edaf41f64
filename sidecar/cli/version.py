"""``outrider version``."""

from __future__ import annotations

from sidecar.cli.command import EXIT_OK, Call, Command
from sidecar.version import version_text


def run(call: Call) -> int:
    call.at_most(0)
    call.say(version_text())
    return EXIT_OK


VERSION = Command("version", "Print the version.", run, http=False, formats=False)
