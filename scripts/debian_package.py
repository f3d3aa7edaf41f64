"""Debian packages unpacked into a folder of ours, never installed.

They come through apt itself, in a private folder: apt knows this machine's proxies and credentials and checks the
archive's signature and hashes. The mirror is the one this machine's own apt sources name.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

APT_SOURCES = Path("/etc/apt")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
COMMAND_TIMEOUT_S = 300

_ONE_LINE = re.compile(r"^\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+(.+)$")


class NoPackage(Exception):
    """The packages cannot be had here; the message says why."""


def unpack(packages: Sequence[str], suite: str, folder: Path) -> None:
    """Unpack ``packages`` of a Debian suite, without what they depend on, so that ``folder`` is their root; at most
    once however many processes ask. Raises NoPackage."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_suffix(".lock")):
        if not folder.exists():
            _fetch(packages, suite, folder)


def _fetch(packages: Sequence[str], suite: str, target: Path) -> None:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise NoPackage(f"{' and '.join(missing)} missing")
    mirror = debian_mirror()
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as name:
        folder = Path(name)
        options = _private_apt(folder, mirror, suite)
        _run(["apt-get", *options, "update"], folder)
        _run(["apt-get", *options, "download", *packages], folder)
        for archive in sorted(folder.glob("*.deb")):
            _run(["dpkg-deb", "-x", str(archive), "unpacked"], folder)
        (folder / "unpacked").rename(target)


def debian_mirror(sources: Path = APT_SOURCES) -> str:
    """The address of the Debian archive in apt's sources (one-line and deb822 files). Raises NoPackage."""
    files = [sources / "sources.list", *sorted((sources / "sources.list.d").glob("*"))]
    for path in files:
        if not path.is_file() or path.suffix not in {".list", ".sources"}:
            continue
        entries = _deb822(path.read_text()) if path.suffix == ".sources" else _one_line(path.read_text())
        for uri, suite, components in entries:
            release = re.match(r"[a-z]+$", suite)
            if release and "main" in components and re.search(r"/debian/?$", uri):
                return uri.rstrip("/")
    raise NoPackage("apt's sources name no Debian archive")


def _one_line(text: str) -> Iterator[tuple[str, str, list[str]]]:
    for line in text.splitlines():
        match = _ONE_LINE.match(line)
        if match:
            yield match[1], match[2], match[3].split()


def _deb822(text: str) -> Iterator[tuple[str, str, list[str]]]:
    for stanza in re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        fields = dict[str, str]()
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[name] += " " + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield uri, suite, fields.get("components", "").split()


def _private_apt(folder: Path, mirror: str, suite: str) -> list[str]:
    """apt's options for an archive list of our own that leaves the machine's lists and packages untouched."""
    for part in ("lists/partial", "cache/archives/partial", "sources.d"):
        (folder / part).mkdir(parents=True)
    signed_by = f"Signed-By: {KEYRING}\n" if KEYRING.exists() else ""
    source = f"Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\n{signed_by}"
    (folder / "sources.d" / "debian.sources").write_text(source)
    (folder / "status").touch()
    settings = {
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": folder / "sources.d",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        "APT::Update::Error-Mode": "any",
        "Acquire::Retries": "3",
        "Acquire::Languages": "none",
    }
    return [part for key, value in settings.items() if str(value) for part in ("-o", f"{key}={value}")]


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NoPackage(f"{' '.join(command[:1] + command[-2:])} failed: {said[-1] if said else done.returncode}")


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
