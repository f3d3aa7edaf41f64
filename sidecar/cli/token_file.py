"""The file that holds the token between calls: ``~/.vault-token``, as Vault's own client has it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping


def path(environ: Mapping[str, str]) -> str:
    """Where the file is: in the home directory."""
    return os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".vault-token")


def read(environ: Mapping[str, str]) -> str:
    """The stored token, "" if there is none that can be read."""
    try:
        with open(path(environ), encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def write(environ: Mapping[str, str], token: str) -> None:
    """Store a token, readable by its owner only; the file is whole or untouched. Raises OSError."""
    target = path(environ)
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".vault-token-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:  # mkstemp made it 0600
            file.write(token)
        os.replace(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
