"""``python -m tests.check``: format, lint, types, tests, in that order, for people and CI alike.

``--static`` stops before the tests; further arguments go to pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATIC = (
    ("format", ["ruff", "format", "--check", "."]),
    ("lint", ["ruff", "check", "."]),
    ("types", ["mypy"]),
)
# One more than the cores of the smallest machine: much of the time is waiting for Consul.
WORKERS = "3"
ENDPOINTS = ROOT / ".cache" / "endpoints"
FOLDER_VARIABLE = "OUTRIDER_ENDPOINTS"
"""Where the tests note which endpoints they reach (tests/support/endpoints.py)."""


def run(name: str, module_and_args: list[str], environment: Mapping[str, str] | None = None) -> None:
    """Run one tool as a module of this interpreter; exits with its code if it fails."""
    print(f"==> {name}", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", *module_and_args]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **(environment or {})}, check=False).returncode
    if code != 0:
        sys.exit(code)
    print(f"    {name} passed in {time.monotonic() - started:.1f} s", flush=True)


def main(arguments: list[str]) -> None:
    """Every check in order; the first failure ends the run."""
    static_only = "--static" in arguments
    for name, command in STATIC:
        run(name, command)
    if static_only:
        return
    print("==> a Consul to test against", flush=True)
    subprocess.run([sys.executable, "scripts/consul_binary.py"], cwd=ROOT, check=True)
    rest = [argument for argument in arguments if argument != "--static"]
    shutil.rmtree(ENDPOINTS, ignore_errors=True)
    # In their order: the files with few and long tests come first, and the workers end together.
    parallel = ["-n", WORKERS, "--dist", "loadfile", "--no-loadscope-reorder"]
    run("tests", ["pytest", *parallel, *rest], {FOLDER_VARIABLE: str(ENDPOINTS)})
    if not rest:
        run("compatibility page", ["scripts.compatibility", "--verify", str(ENDPOINTS)])


if __name__ == "__main__":
    main(sys.argv[1:])
