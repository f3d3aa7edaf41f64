"""Statement 47: neither keys nor secrets leave a server's process: not by its memory, environment or core dump for
another process of the same user, nor by its log or its files. Each is got from a server that does not protect itself.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import thief
from tests.support.cluster import embedded_storage
from tests.support.ports import free_port

UNPROTECTED = (
    "import runpy, sidecar.hardening\n"
    "sidecar.hardening.protect_process = lambda **_: []\n"
    "runpy.run_module('sidecar', run_name='__main__')"
)


def stolen(home: Path, *program: str) -> dict[str, Any]:
    """What the thief gets of a server that is started as ``python <program> server …``."""
    port = free_port()
    config = home / "server.hcl"
    config.write_text(
        f"{embedded_storage(home / 'data')}\n"
        f'listener "tcp" {{\n  address = "127.0.0.1:{port}"\n  cluster_address = "127.0.0.1:{free_port()}"\n'
        '  tls_disable = true\n}\nlog_level = "trace"\n',
        encoding="utf-8",
    )
    request = {
        "server": [sys.executable, *program, "server", f"-config={config}"],
        "address": f"http://127.0.0.1:{port}",
        "home": str(home),
        "canary": f"canary-{secrets.token_hex(16)}",
    }
    done = subprocess.run(
        [sys.executable, thief.__file__, json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        preexec_fn=thief.give_up_capabilities,
    )
    assert done.returncode == 0, done.stderr + (home / "server.log").read_text(errors="replace")[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def dumps_are_written() -> bool:
    """Whether this machine writes core dumps as files beside the process, and lets this user have them."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    probe = "import os, resource, signal; print(resource.getrlimit(resource.RLIMIT_CORE)[1])"
    limit = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, preexec_fn=thief.give_up_capabilities
    )
    return pattern.startswith("core") and limit.stdout.strip() != "0"


def test_47_nothing_leaves_the_process(tmp_path: Path) -> None:
    found = stolen(tmp_path, "-m", "sidecar")
    assert found["files"] > 3
    assert found == {
        "memory": "denied",
        "environment": "denied",
        "command_line": "not found",
        "dumps": [],
        "leaks": [],
        "files": found["files"],
    }


def test_47_control_unprotected_it_does(tmp_path: Path) -> None:
    found = stolen(tmp_path, "-c", UNPROTECTED)
    assert (found["memory"], found["environment"]) == ("found", "found")
    assert bool(found["dumps"]) == dumps_are_written()


def test_47_control_the_search_of_files_finds_what_is_there(tmp_path: Path) -> None:
    """A server whose configuration holds the canary: the file is found out."""
    (tmp_path / "note").write_text("x")
    share = bytes(range(33))
    for number, text in enumerate(sorted(thief.spellings(share))):
        (tmp_path / f"leak-{number}").write_bytes(b"before " + text + b" after")
    found = [path.name for path in tmp_path.iterdir() if any(s in path.read_bytes() for s in thief.spellings(share))]
    assert sorted(found) == ["leak-0", "leak-1", "leak-2"]
