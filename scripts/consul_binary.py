"""Print the path of a Consul binary, fetching one for tests when the machine has none.

    python scripts/consul_binary.py

In this order: ``$CONSUL_BIN``, ``consul`` on PATH, this project's cache, and else Debian bullseye's package ``consul``
(1.8.7), which is unpacked into that cache and never installed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.debian_package import NoPackage, unpack

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache" / "debian" / "consul"
SUITE = "bullseye"
PACKAGE = "consul"


class NoConsul(Exception):
    """There is no Consul binary here and none can be had; the message says what to do."""


def find_consul() -> Path | None:
    """A binary that is here already, or None."""
    named = os.environ.get("CONSUL_BIN")
    if named:
        if not os.access(named, os.X_OK):
            raise NoConsul(f"CONSUL_BIN names {named}, which is not an executable file")
        return Path(named)
    on_path = shutil.which("consul")
    if on_path:
        return Path(on_path)
    return _cached() if os.access(_cached(), os.X_OK) else None


def obtain_consul() -> Path:
    """A binary's path; fetched at most once however many processes ask. Raises NoConsul."""
    found = find_consul()
    if found is not None:
        return found
    try:
        unpack([PACKAGE], SUITE, CACHE)
    except NoPackage as reason:
        raise NoConsul(f"{reason}: install Consul, or name a binary in CONSUL_BIN") from None
    return _cached()


def _cached() -> Path:
    return CACHE / "usr" / "bin" / "consul"


def main() -> int:
    """Print the path; exit status 1 with a reason when there is none."""
    try:
        print(obtain_consul())
    except NoConsul as reason:
        print(reason, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
