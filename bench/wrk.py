"""The external load generator: Debian's wrk, unpacked into the project's cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.debian_package import unpack

ROOT = Path(__file__).resolve().parent.parent / ".cache" / "debian" / "wrk"
SUITE = "bullseye"
PACKAGES = ("wrk", "libluajit-5.1-2", "libssl1.1")
_UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run: requests a second, latencies in milliseconds, and how many answers were no success."""

    per_s: float
    p50_ms: float
    p99_ms: float
    failed: int


def load(url: str, *, connections: int, seconds: float, script: Path | None = None, token: str = "") -> Figures:
    """Load ``url`` from one thread. ``script`` is a Lua file that makes the requests. Raises CalledProcessError."""
    command, environment = wrk_command()
    command += ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency", "--timeout", "30s"]
    if token:
        command += ["-H", f"X-Vault-Token: {token}"]
    if script is not None:
        command += ["-s", str(script)]
    done = subprocess.run([*command, url], env=environment, capture_output=True, text=True, check=True)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    return Figures(
        float(re.findall(r"Requests/sec:\s+([\d.]+)", done.stdout)[0]),
        _latency_ms(done.stdout, "50%"),
        _latency_ms(done.stdout, "99%"),
        int(failed[1]) if failed else 0,
    )


def wrk_command() -> tuple[list[str], dict[str, str]]:
    """How to run it: the words, and the environment. Raises NoPackage."""
    on_path = shutil.which("wrk")
    if on_path:
        return [on_path], dict(os.environ)
    unpack(PACKAGES, SUITE, ROOT)
    libraries = ":".join(str(folder) for folder in (ROOT / "usr" / "lib").iterdir() if folder.is_dir())
    return [str(ROOT / "usr" / "bin" / "wrk")], {**os.environ, "LD_LIBRARY_PATH": libraries}


def _latency_ms(text: str, share: str) -> float:
    found = re.search(rf"^\s+{re.escape(share)}\s+([\d.]+)(us|ms|s|m)$", text, re.MULTILINE)
    return float(found[1]) * _UNITS_MS[found[2]] if found else 0.0
