"""``outrider debug``: what a node says of itself over some time, as one bundle to hand on.

The bundle has the shape of Vault's: one file for each target, an array with an entry for each capture, and an index
with what could not be captured. Nothing that looks like a token is written, whatever answered with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sidecar.cli.client import ApiError, Client, LocalError
from sidecar.cli.command import EXIT_LOCAL, EXIT_OK, Call, Command, Failed
from sidecar.cli.flags import Flag, UsageError

TARGETS = ("config", "host", "log", "metrics", "pprof", "replication-status", "requests", "server-status")
_FILES = {
    "config": "config.json",
    "host": "host_info.json",
    "log": "server.log",
    "metrics": "metrics.json",
    "replication-status": "replication_status.json",
    "requests": "requests.json",
    "server-status": "server_status.json",
}
_PATHS: Mapping[str, Mapping[str, str]] = {
    "config": {"config": "sys/config/state/sanitized"},
    "host": {"host": "sys/host-info"},
    "metrics": {"metrics": "sys/metrics"},
    "replication-status": {"status": "sys/replication/status"},
    "requests": {"requests": "sys/in-flight-req"},
    "server-status": {
        "health": "sys/health?standbyok=true&sealedcode=200&uninitcode=200&drsecondarycode=200",
        "seal": "sys/seal-status",
        "leader": "sys/leader",
        "ha": "sys/ha-status",
    },
}
_PROFILES = ("goroutine", "threadcreate", "heap")
_PROFILE_S_MAX = 30
INTERVAL_S_MIN = 1.0
_STAMP = "%Y-%m-%dT%H-%M-%SZ"
_TOKEN = re.compile(r"\b(?:hv[sbr]\.[A-Za-z0-9_-]{8,}|[sbr]\.[A-Za-z0-9]{24,})")
REDACTED = "<redacted>"


def run(call: Call) -> int:
    call.at_most(0)
    targets = _targets(call)
    duration_s, interval_s = _seconds(call, "duration", 120.0), _seconds(call, "interval", 30.0)
    metrics_s = _seconds(call, "metrics-interval", 10.0)
    if min(interval_s, metrics_s) < INTERVAL_S_MIN:
        raise UsageError(f"-interval and -metrics-interval must be at least {INTERVAL_S_MIN:g} s")
    started = datetime.now(UTC)
    folder = call.values.text("output") or f"outrider-debug-{started:{_STAMP}}"
    compress = call.values.text("compress", "true") == "true"
    folder = folder.removesuffix(".tar.gz")
    made = f"{folder}.tar.gz" if compress else folder
    client = call.client()
    if client.options.as_curl or client.options.as_policy:
        raise UsageError("debug makes many requests; none of them can be printed instead")
    for path in (folder, made):
        if os.path.exists(path):
            raise UsageError(f"{path} is there already")
    try:
        os.makedirs(folder, mode=0o700)
    except OSError as error:
        raise UsageError(f"cannot make {folder}: {error.strerror}") from error
    bundle = Bundle(folder, client.options.token)
    call.complain(f"==> Starting debug capture of {client.address}, for {duration_s:g} s; interrupt it to end sooner")
    capture = Capture(client, bundle, targets, interval_s, metrics_s, call.values.text("log-format", "standard"))
    try:
        capture.over(duration_s)
    except KeyboardInterrupt:
        call.complain("==> Interrupted; keeping what there is")
    finally:
        capture.end()
    try:
        bundle.write_index(
            {
                "server_address": client.address,
                "timestamp": started.isoformat().replace("+00:00", "Z"),
                "duration_seconds": duration_s,
                "interval_seconds": interval_s,
                "metrics_interval_seconds": metrics_s,
                "targets": targets,
                "compress": compress,
            }
        )
        if compress:
            _packed(folder, made)
    except OSError as error:
        raise Failed(f"Error writing {made}: {error.strerror}", EXIT_LOCAL) from error
    for failure in bundle.errors:
        call.complain(f"WARNING! {failure['target']}: {failure['error']}")
    call.say(f"Success! Bundle written to: {made}")
    return EXIT_OK


def _targets(call: Call) -> list[str]:
    wanted = [part.strip() for text in call.values.texts("target") for part in text.split(",") if part.strip()]
    for target in wanted:
        if target not in TARGETS:
            raise UsageError(f'unknown target "{target}"; there are {", ".join(TARGETS)}')
    return [target for target in TARGETS if target in wanted] if wanted else list(TARGETS)


def _seconds(call: Call, flag: str, default: float) -> float:
    from sidecar.config.reader import parse_duration_s

    text = call.values.text(flag)
    try:
        return parse_duration_s(text) if text else default
    except ValueError:
        raise UsageError(f"-{flag} must be a duration, as 90 or 2m") from None


class Bundle:
    """The folder. Safe to use by several threads."""

    def __init__(self, folder: str, token: str) -> None:
        self._folder = folder
        self._token = token
        self._lock = threading.Lock()
        self._captures: dict[str, list[Any]] = {}
        self.errors: list[dict[str, str]] = []
        self._closed = False

    def add(self, target: str, entry: dict[str, Any]) -> None:
        """One more entry of a target's file."""
        with self._lock:
            captures = self._captures.setdefault(target, [])
            captures.append({"timestamp": _now(), **entry})
            self._write(_FILES[target], json.dumps(captures, indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """A file of its own, in a folder of its own if the name has one."""
        with self._lock:
            self._write(name, text)

    def append(self, name: str, text: str) -> None:
        """More of a file."""
        with self._lock:
            if not self._closed:
                with open(os.path.join(self._folder, name), "a", encoding="utf-8", opener=_private) as file:
                    file.write(self._clean(text))

    def failed(self, target: str, error: Exception) -> None:
        """A target, or a part of it, could not be captured; the same failure is kept once."""
        text = self._clean(" ".join(str(error).split()))
        with self._lock:
            if not any(known["target"] == target and known["error"] == text for known in self.errors):
                self.errors.append({"timestamp": _now(), "target": target, "error": text})

    def write_index(self, about: dict[str, Any]) -> None:
        """The last file."""
        with self._lock:
            files = sorted(
                os.path.relpath(os.path.join(place, name), self._folder)
                for place, _, names in os.walk(self._folder)
                for name in names
            )
            self._write("index.json", json.dumps({**about, "output": files, "errors": self.errors}, indent=2) + "\n")
            self._closed = True

    def _write(self, name: str, text: str) -> None:
        if self._closed:
            return
        path = os.path.join(self._folder, name)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(path, "w", encoding="utf-8", opener=_private) as file:
            file.write(self._clean(text))

    def _clean(self, text: str) -> str:
        if self._token:
            text = text.replace(self._token, REDACTED)
        return _TOKEN.sub(REDACTED, text)


class Capture:
    """Asks the server, each target in its time."""

    def __init__(
        self,
        client: Client,
        bundle: Bundle,
        targets: list[str],
        interval_s: float,
        metrics_s: float,
        log_format: str,
    ) -> None:
        self._client = client
        self._bundle = bundle
        self._targets = targets
        self._interval_s = interval_s
        self._metrics_s = metrics_s
        self._log_format = log_format
        self._profiling: threading.Thread | None = None

    def over(self, duration_s: float) -> None:
        """Capture at the beginning and then in each interval, until the time is over."""
        if "log" in self._targets:
            threading.Thread(target=self._tried, args=("log", self._follow), daemon=True).start()
        begun_s = time.monotonic()
        due_s = {"metrics": begun_s, "": begun_s}
        while True:
            now_s = time.monotonic()
            if due_s["metrics"] <= now_s and "metrics" in self._targets:
                self._capture("metrics")
                due_s["metrics"] += self._metrics_s
            if due_s[""] <= now_s:
                left_s = begun_s + duration_s - now_s
                self._profile(left_s)
                for target in self._targets:
                    if target in _PATHS and target != "metrics":
                        self._capture(target)
                due_s[""] += self._interval_s
            upcoming = [at_s for target, at_s in due_s.items() if not target or target in self._targets]
            wait_s = min(*upcoming, begun_s + duration_s) - time.monotonic()
            if time.monotonic() >= begun_s + duration_s:
                return
            time.sleep(max(wait_s, 0.0))

    def end(self) -> None:
        """Wait for a profile under way: it is as long as the server samples."""
        if self._profiling is not None:
            self._profiling.join()

    def _capture(self, target: str) -> None:
        for name, path in _PATHS[target].items():
            self._tried(target, lambda name=name, path=path: self._add(target, name, path))  # type: ignore[misc]  # bound now

    def _add(self, target: str, name: str, path: str) -> None:
        where, _, query = path.partition("?")
        pairs = dict(part.split("=") for part in query.split("&")) if query else None
        body = self._client.get(where, pairs).body or {}
        self._bundle.add(target, {name: body.get("data", body) if "request_id" in body else body})

    def _profile(self, left_s: float) -> None:
        if "pprof" not in self._targets or (self._profiling is not None and self._profiling.is_alive()):
            return
        folder = f"{datetime.now(UTC):{_STAMP}}"
        seconds = int(min(self._interval_s, _PROFILE_S_MAX, left_s))
        self._profiling = threading.Thread(target=self._profiles, args=(folder, seconds))
        self._profiling.start()

    def _profiles(self, folder: str, seconds: int) -> None:
        for name in (*_PROFILES, "profile"):
            if name == "profile" and seconds < 1:
                continue
            query = {"seconds": str(seconds)} if name == "profile" else None
            self._tried("pprof", lambda name=name, query=query: self._text(folder, name, query))  # type: ignore[misc]  # bound now

    def _text(self, folder: str, name: str, query: Mapping[str, str] | None) -> None:
        self._bundle.write(f"{folder}/{name}.txt", self._client.get(f"sys/pprof/{name}", query).text)

    def _follow(self) -> None:
        self._bundle.append(_FILES["log"], "")  # there also where the server has nothing to say
        for line in self._client.stream("sys/monitor", {"log_level": "debug", "log_format": self._log_format}):
            self._bundle.append(_FILES["log"], line)

    def _tried(self, target: str, ask: Callable[[], None]) -> None:
        try:
            ask()
        except (ApiError, LocalError, OSError) as error:
            self._bundle.failed(target, error)


def _packed(folder: str, made: str) -> None:
    with open(made, "xb", opener=_private) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(folder, arcname=os.path.basename(folder))
    shutil.rmtree(folder)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


DEBUG = Command(
    "debug [flags]",
    "Capture what a node says of itself for some time, into one bundle. What the token may not read is left\n"
    "  out and named in the bundle's index.",
    run,
    (
        Flag("duration", "How long; 0 captures once.", default="2m"),
        Flag("interval", "How often everything but metrics is captured.", default="30s"),
        Flag("metrics-interval", "How often metrics are captured.", default="10s"),
        Flag("target", f"What to capture, may be repeated: {', '.join(TARGETS)}. All without it.", "texts"),
        Flag("output", "Where the bundle is written.", default="outrider-debug-TIME"),
        Flag("compress", "Pack it into one .tar.gz.", "bool", "true"),
        Flag("log-format", "standard or json.", default="standard"),
    ),
    formats=False,
)
