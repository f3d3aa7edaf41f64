"""What a server process does for its memory and its files, seen from a process of its own."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import ctypes, json, pathlib, resource, sys
{protect}
libc = ctypes.CDLL(None)
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
pathlib.Path(sys.argv[1], "made").write_text("x")
pathlib.Path(sys.argv[1], "folder").mkdir()
print(json.dumps({{
    "missing": missing,
    "dumpable": libc.prctl(3, 0, 0, 0, 0),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "locked_kib": int(status["VmLck"].split()[0]),
}}))
"""
PROTECTED = "from sidecar.hardening import protect_process\nmissing = protect_process(lock_memory={lock})"
UNPROTECTED = "missing = []"


def run(home: Path, protect: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(protect=protect), str(home)],
        capture_output=True,
        check=True,
        umask=0,
        env={**os.environ, **environment},
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def modes(home: Path) -> list[int]:
    return [stat.S_IMODE((home / name).stat().st_mode) for name in ("made", "folder")]


def test_no_dumps_and_files_for_the_owner_alone(tmp_path: Path) -> None:
    found = run(tmp_path, PROTECTED.format(lock=False))
    assert (found["dumpable"], found["core"], found["missing"]) == (0, [0, 0], [])
    assert modes(tmp_path) == [0o600, 0o700]
    assert found["locked_kib"] == 0


def test_without_it_a_process_can_be_dumped(tmp_path: Path) -> None:
    found = run(tmp_path, UNPROTECTED)
    assert found["dumpable"] == 1
    assert modes(tmp_path) == [0o666, 0o777]


def test_memory_is_locked_where_that_is_allowed_and_said_where_not(tmp_path: Path) -> None:
    found = run(tmp_path, PROTECTED.format(lock=True))
    if found["missing"]:
        assert "disable_mlock" in found["missing"][0]
        assert found["locked_kib"] == 0
    else:
        assert found["locked_kib"] > 1000


def test_a_limit_on_locked_memory_is_respected(tmp_path: Path) -> None:
    """Locking under a limit would make a later allocation fail: without the capability nothing is locked."""
    limited = (
        "import sidecar.hardening as h\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "h._CAP_IPC_LOCK = 63\n"
        "missing = h.protect_process(lock_memory=True)"
    )
    found = run(tmp_path, limited)
    assert "CAP_IPC_LOCK" in found["missing"][0]
    assert found["locked_kib"] == 0
