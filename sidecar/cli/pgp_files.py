"""PGP keys from files, as the API wants them: base64 of the binary or armored key."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from sidecar.cli.flags import UsageError


def read_keys(names: str) -> list[str]:
    """The keys of ``file,file,…`` in order. Raises UsageError."""
    return [read_key(name.strip()) for name in names.split(",") if name.strip()]


def read_key(name: str) -> str:
    """One file's key; a leading ``@`` is accepted. Raises UsageError."""
    if name.startswith("keybase:"):
        raise UsageError(f"{name}: keys are not fetched from Keybase; give a file with the key")
    try:
        content = Path(name.removeprefix("@")).read_bytes()
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from error
    try:
        return base64.b64encode(base64.b64decode(content.strip(), validate=True)).decode()
    except (ValueError, binascii.Error):
        return base64.b64encode(content).decode()  # binary or armored, not in base64 already
