"""A process of the same user that wants a server's keys: its memory, its environment, its core dump.

Run as ``python thief.py REQUEST``, where the request is JSON: ``server`` (the command), ``address``, ``home`` (where it
runs), ``canary`` (a secret's value). It starts the server, initialises and unseals it as an operator would, has it keep
the canary, and tries everything; prints what it got as JSON. It is to run without capabilities, also as root: then it
shows what any process of the service's user can do.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_PR_CAPBSET_DROP = 24
_CAPABILITIES = 64
_CHUNK_BYTES = 4 * 1024 * 1024
_START_S_MAX = 60.0


def give_up_capabilities() -> None:
    """For ``preexec_fn``: the program that follows, and all it starts, can do what any user can with what is its own,
    also where the user is root. May leave core dumps as large as it is allowed."""
    libc = ctypes.CDLL(None)
    for capability in range(_CAPABILITIES):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def spellings(secret: bytes) -> set[bytes]:
    """How a key may look in a file."""
    return {secret, secret.hex().encode(), base64.b64encode(secret)}


def call(address: str, method: str, path: str, body: Any = None, token: str = "") -> Any:
    request = urllib.request.Request(
        f"{address}/v1/{path}",
        method=method,
        data=json.dumps(body or {}).encode(),
        headers={"X-Vault-Token": token, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        raw = answer.read()
        return json.loads(raw) if raw.strip() else None


def until(condition: Any) -> Any:
    """Ask again until there is an answer. Raises TimeoutError."""
    end_s = time.monotonic() + _START_S_MAX
    while time.monotonic() < end_s:
        try:
            found = condition()
        except (OSError, urllib.error.URLError):
            found = None
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError("the server did not get ready")


def read_memory(pid: int, wanted: set[bytes]) -> str:
    """``denied``, ``found`` or ``not found``."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="ascii")
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            return "found" if any(_in_region(memory, line, wanted) for line in maps.splitlines()) else "not found"
    except PermissionError:
        return "denied"


def _in_region(memory: Any, line: str, wanted: set[bytes]) -> bool:
    place, rights = line.split()[:2]
    if not rights.startswith("rw") or "[vv" in line:
        return False
    start, end = (int(part, 16) for part in place.split("-"))
    overlap = max(map(len, wanted))
    for at in range(start, end, _CHUNK_BYTES):
        try:
            memory.seek(at)
            data = memory.read(min(_CHUNK_BYTES + overlap, end - at))
        except (OSError, OverflowError):
            return False
        if any(secret in data for secret in wanted):
            return True
    return False


def read_file(path: str, wanted: bytes) -> str:
    try:
        return "found" if wanted in Path(path).read_bytes() else "not found"
    except PermissionError:
        return "denied"


def main() -> None:
    request = json.loads(sys.argv[1])
    home, address, canary = Path(request["home"]), request["address"], request["canary"].encode()
    with open(home / "server.log", "wb") as log:
        server = subprocess.Popen(
            request["server"],
            cwd=home,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "SEAL_CANARY": request["canary"]},
        )
    try:
        until(lambda: call(address, "GET", "sys/init") is not None)
        made = call(address, "PUT", "sys/init", {"secret_shares": 3, "secret_threshold": 2})
        for share in made["keys_base64"][:2]:
            call(address, "PUT", "sys/unseal", {"key": share})
        token = made["root_token"]
        until(lambda: call(address, "GET", "sys/ha-status", token=token))
        call(address, "POST", "sys/mounts/kv", {"type": "kv"}, token)
        call(address, "POST", "kv/a", {"value": request["canary"]}, token)
        shares = [base64.b64decode(share) for share in made["keys_base64"]]
        wanted = {canary, token.encode(), *shares}
        found = {
            "memory": read_memory(server.pid, wanted),
            "environment": read_file(f"/proc/{server.pid}/environ", canary),
            "command_line": read_file(f"/proc/{server.pid}/cmdline", token.encode()),
        }
        server.send_signal(signal.SIGABRT)
        server.wait(20)
    finally:
        server.kill()
    dumps = sorted(path.name for path in home.glob("core*"))
    for name in dumps:
        (home / name).unlink()  # large, and full of keys
    secrets = {token.encode(), canary} | {text for share in shares for text in spellings(share)}
    files = [path for path in home.rglob("*") if path.is_file()]
    leaks = sorted(path.name for path in files if any(secret in path.read_bytes() for secret in secrets))
    print(json.dumps({**found, "dumps": dumps, "leaks": leaks, "files": len(files)}))


if __name__ == "__main__":
    main()
