"""Nodes that start in a tenth of a second: one process has imported everything, and forks a node whenever asked.

A forked node is a process of its own like any other (arguments, environment, log, signals, death by SIGKILL); only its
imports are not repeated, which is nine tenths of what a start costs. Crash tests start hundreds of nodes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ASK_BYTES_MAX = 65536
ANSWER_TIMEOUT_S = 120.0
POLL_S = 0.005


class Nursery:
    """Client side: one per test process, started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._statuses: dict[int, int] = {}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.nursery", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours
        atexit.register(self.close)

    def spawn(self, arguments: list[str], log_path: Path, environment: dict[str, str]) -> WarmProcess:
        """A new process of ``python -m sidecar ARGUMENTS``. ``environment`` is added to this process's own."""
        ask = {"arguments": arguments, "log": str(log_path), "environment": environment}
        with self._lock:
            self._socket.settimeout(ANSWER_TIMEOUT_S)
            self._socket.send(json.dumps(ask).encode())
            while True:
                answer = json.loads(self._socket.recv(ASK_BYTES_MAX))
                if "born" in answer:
                    return WarmProcess(self, answer["born"])
                self._statuses[answer["dead"]] = answer["code"]

    def status(self, pid: int) -> int | None:
        """How the process ended, as ``Popen.returncode``; None while it runs."""
        with self._lock:
            self._socket.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                while raw := self._socket.recv(ASK_BYTES_MAX):
                    answer = json.loads(raw)
                    self._statuses[answer["dead"]] = answer["code"]
            return self._statuses.get(pid)

    def close(self) -> None:
        """End it, and with it every process it made."""
        self._socket.close()
        self._process.wait(ANSWER_TIMEOUT_S)


class WarmProcess:
    """What tests use of ``subprocess.Popen``."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._nursery.status(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a node", timeout or 0.0)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if (
            self.poll() is None
        ):  # until its end is reported to us the nursery keeps its number taken, or just now let go
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


_nursery: Nursery | None = None


def nursery() -> Nursery:
    """This test process's."""
    global _nursery
    if _nursery is None:
        _nursery = Nursery()
    return _nursery


# -- the process itself


def _serve(channel: socket.socket) -> None:
    import sidecar.app
    import sidecar.cli.server
    import sidecar.engines.kv  # noqa: F401 - what entry points load otherwise

    children: set[int] = set()
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is woken:
                woken.recv(4096)
                _report_dead(channel, children)
                continue
            raw = channel.recv(ASK_BYTES_MAX)
            if not raw:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for one in (channel, wake, woken, selector):
                    one.close()
                _become_node(json.loads(raw))
            children.add(pid)
            channel.send(json.dumps({"born": pid}).encode())


def _report_dead(channel: socket.socket, children: set[int]) -> None:
    for pid in tuple(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children.discard(pid)
            with contextlib.suppress(BrokenPipeError):
                channel.send(json.dumps({"dead": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def _become_node(ask: dict[str, Any]) -> None:
    from sidecar.__main__ import main

    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(ask["environment"])
        log = os.open(ask["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        code = main(ask["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
