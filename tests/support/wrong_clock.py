"""A wall clock that is wrong by as much as a test says, in a node that runs: Python's, not that of OpenSSL."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "TEST_CLOCK_OFFSET"
_SITE = f"""
import os, time
_file, _time, _time_ns, _monotonic = os.environ["{VARIABLE}"], time.time, time.time_ns, time.monotonic
_known = [0, -1.0]
def _offset_ns():
    if _monotonic() - _known[1] > 0.05:
        with open(_file) as found:
            _known[:] = [int(found.read() or 0), _monotonic()]
    return _known[0]
time.time_ns = lambda: _time_ns() + _offset_ns()
time.time = lambda: _time() + _offset_ns() / 1e9
"""


class WrongClock:
    """``environment`` is for the node, which is started cold by it: a forked one has its clock already."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._file = directory / "offset"
        (directory / "sitecustomize.py").write_text(_SITE, encoding="utf-8")
        self.environment = {
            VARIABLE: str(self._file),
            "PYTHONPATH": os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        self.set(0)

    def set(self, offset_s: float) -> None:
        """Be wrong by this from now on."""
        replacement = self._file.with_suffix(".new")
        replacement.write_text(str(int(offset_s * 1e9)), encoding="utf-8")
        replacement.replace(self._file)
