"""``pid_file``: the process id in a file for as long as the server runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def pid_file(path: str) -> Iterator[None]:
    """Write it, and remove it at the end unless another process has put its own there; no path is no file. Raises
    OSError."""
    if not path:
        yield
        return
    own = f"{os.getpid()}\n"
    place = Path(path)
    place.write_text(own, encoding="ascii")
    place.chmod(0o644)  # whoever supervises the process reads it; the process's own umask is tighter
    try:
        yield
    finally:
        with suppress(OSError):
            if place.read_text(encoding="ascii") == own:
                place.unlink()
