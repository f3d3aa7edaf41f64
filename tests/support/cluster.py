"""Outrider nodes as real processes, for integration tests, the demo and the benchmarks."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.consul_server import ConsulServer
from tests.support.nursery import WarmProcess, nursery
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
"""Nobody waits as long as that but on a machine that is starved: limits here cost nothing when things pass."""

STEADY = 'sidecar {\n  beat_ttl = "6s"\n}\n'
"""Settings of nodes on Consul whose tenures a busy machine must not end. A takeover after a crash takes that long."""


class ClusterError(Exception):
    """A node did not do what the harness asked of it in time; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Reply:
    """An HTTP answer: status, decoded JSON body (None when empty), headers with lower-case names."""

    status: int
    body: Any
    headers: dict[str, str]

    @property
    def data(self) -> Any:
        """``body["data"]``."""
        return self.body["data"]

    @property
    def errors(self) -> list[str]:
        """``body["errors"]``, empty if there are none."""
        return (self.body or {}).get("errors") or []


def call(
    address: str,
    method: str,
    path: str,
    body: Any = None,
    *,
    token: str | None = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> Reply:
    """One request to ``/v1/<path>``; any status is an answer. Redirects are not followed. Raises OSError, also when the
    answer breaks off."""
    request = urllib.request.Request(f"{address}/v1/{path}", method=method, headers=dict(headers or {}))
    request.add_header("X-Vault-Request", "true")
    if token:
        request.add_header("X-Vault-Token", token)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return _reply(answer.status, answer.read(), dict(answer.headers))
    except urllib.error.HTTPError as error:
        with error:
            return _reply(error.code, error.read(), dict(error.headers))
    except http.client.IncompleteRead as error:
        raise ConnectionResetError(f"{method} {path}: the answer broke off") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _reply(status: int, raw: bytes, headers: dict[str, str]) -> Reply:
    return Reply(
        status, json.loads(raw) if raw.strip() else None, {name.lower(): value for name, value in headers.items()}
    )


@dataclass
class Node:
    """One ``outrider server`` process. ``storage`` is the storage stanza's text; ``settings`` more top-level lines,
    ``listener_settings`` more lines of the listener. ``warm``: forked by the nursery, not started from nothing, unless
    its ``environment`` holds what only a new interpreter obeys."""

    name: str
    directory: Path
    storage: str
    cluster_name: str = ""
    settings: str = ""
    listener_settings: str = ""
    api_port: int = field(default_factory=free_port)
    cluster_port: int = field(default_factory=free_port)
    advertised_cluster_port: int = 0
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    warm: bool = True
    process: subprocess.Popen[bytes] | WarmProcess | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def cluster_address(self) -> str:
        """What peers are told: the node's own port, or a proxy's in front of it."""
        return f"https://127.0.0.1:{self.advertised_cluster_port or self.cluster_port}"

    @property
    def config_path(self) -> Path:
        return self.directory / f"{self.name}.hcl"

    @property
    def log_path(self) -> Path:
        return self.directory / f"{self.name}.log"

    def write_config(self) -> None:
        """Write the node's configuration file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        named = f'cluster_name = "{self.cluster_name}"\n' if self.cluster_name else ""
        self.config_path.write_text(
            f"{self.storage}\n"
            f'listener "tcp" {{\n  address = "127.0.0.1:{self.api_port}"\n'
            f'  cluster_address = "127.0.0.1:{self.cluster_port}"\n  tls_disable = true\n{self.listener_settings}}}\n'
            f'api_addr = "{self.address}"\ncluster_addr = "{self.cluster_address}"\n{named}{self.settings}\n',
            encoding="utf-8",
        )

    def start(self, *, wait: bool = True) -> None:
        """Start the process; with ``wait`` until it answers sys/health."""
        self.write_config()
        if self.warm and "PYTHONPATH" not in self.environment:
            arguments = ["server", f"-config={self.config_path}"]
            self.process = nursery().spawn(arguments, self.log_path, self.environment)
        else:
            self._start_cold()
        if wait:
            self.wait_listening()

    def _start_cold(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sidecar", "server", f"-config={self.config_path}"],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            )

    def wait_listening(self) -> None:
        """Until sys/health answers, with whatever status."""

        def answers() -> bool:
            if self.process is not None and self.process.poll() is not None:
                raise ClusterError(f"{self.name} exited with {self.process.returncode}\n{self.log_tail()}")
            try:
                call(self.address, "GET", "sys/health", timeout_s=2)
            except OSError:
                return False
            return True

        self.wait_until("answer sys/health", answers)

    def wait_until(self, what: str, condition: Any, timeout_s: float = START_TIMEOUT_S) -> None:
        """Poll ``condition`` until it is true. Raises ClusterError naming ``what`` after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.name} did not {what} within {timeout_s:.0f} s\n{self.log_tail()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)
        self._reap()

    def stop(self) -> None:
        """SIGTERM, then wait; SIGKILL after 60 s."""
        self._signal(signal.SIGTERM)
        self._reap()

    def freeze(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _signal(self, number: signal.Signals) -> None:
        if self.running and self.process is not None:
            self.process.send_signal(number)

    def _reap(self) -> None:
        if self.process is None:
            return
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def log_tail(self, lines: int = 40) -> str:
        """The end of the node's log."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Reply:
        """:func:`call` at this node's address."""
        return call(self.address, method, path, body, **options)

    def health(self) -> Reply | None:
        """sys/health, or None while the node does not answer."""
        try:
            return self.call("GET", "sys/health", timeout_s=10)
        except OSError:
            return None

    def unseal(self, keys: list[str]) -> Reply:
        """Give key shares until the node is unsealed; returns the last answer."""
        reply = self.call("GET", "sys/seal-status")
        for key in keys:
            reply = self.call("PUT", "sys/unseal", {"key": key})
            if reply.status != 200 or not reply.body["sealed"]:
                break
        return reply


@dataclass
class Cluster:
    """Nodes that share one store."""

    nodes: list[Node]
    keys: list[str] = field(default_factory=list, repr=False)
    root_token: str = field(default="", repr=False)

    def start(self) -> None:
        """Start every node."""
        for node in self.nodes:
            node.start(wait=False)
        for node in self.nodes:
            node.wait_listening()

    def init(self, shares: int = 1, threshold: int = 1) -> None:
        """Initialise through the first node and remember keys and root token."""
        reply = self.nodes[0].call("PUT", "sys/init", {"secret_shares": shares, "secret_threshold": threshold})
        if reply.status != 200:
            raise ClusterError(f"init answered {reply.status}: {reply.errors}\n{self.nodes[0].log_tail()}")
        self.keys = reply.body["keys_base64"][:threshold]
        self.root_token = reply.body["root_token"]

    def unseal(self) -> None:
        """Unseal every node and wait for one to be active and the rest to be standbys."""
        for node in self.nodes:
            reply = node.unseal(self.keys)
            if reply.status != 200 or reply.body["sealed"]:
                raise ClusterError(f"{node.name} stays sealed: {reply.status} {reply.errors}\n{node.log_tail()}")
        self.wait_active()
        for node in self.nodes:
            node.wait_until("become active or standby", lambda node=node: ready(node))

    def bootstrap(self, shares: int = 1, threshold: int = 1) -> None:
        """Start, initialise and unseal."""
        self.start()
        self.init(shares, threshold)
        self.unseal()

    def active(self) -> Node | None:
        """The active node, if there is one now."""
        for node in self.nodes:
            if node.running and (reply := node.health()) is not None and reply.status == 200:
                return node
        return None

    def wait_active(self, timeout_s: float = START_TIMEOUT_S) -> Node:
        """The active node, waiting for one."""
        deadline = time.monotonic() + timeout_s
        while (node := self.active()) is None:
            if time.monotonic() > deadline:
                tails = "\n".join(f"--- {node.name}\n{node.log_tail()}" for node in self.nodes)
                raise ClusterError(f"no node became active within {timeout_s:.0f} s\n{tails}")
            time.sleep(0.02)
        return node

    def standby(self) -> Node:
        """Some running node that is not the active one."""
        active = self.wait_active()
        return next(node for node in self.nodes if node is not active and node.running)

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Reply:
        """A request with the root token to the active node."""
        options.setdefault("token", self.root_token)
        return self.wait_active().call(method, path, body, **options)

    def stop(self) -> None:
        """Stop every node."""
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        """SIGKILL every node."""
        for node in self.nodes:
            node.kill()


def ready(node: Node) -> bool:
    """Whether the node is active, or a standby that knows who is."""
    reply = node.health()
    if reply is None or reply.status not in (200, 429):
        return False
    return reply.status == 200 or bool(node.call("GET", "sys/leader").body.get("leader_address"))


def performance(node: Node) -> dict[str, Any]:
    """The performance half of sys/replication/status; empty while the node cannot tell."""
    try:
        reply = node.call("GET", "sys/replication/status")
    except OSError:
        return {}
    return dict(reply.data["performance"]) if reply.status == 200 else {}


def in_step(primary: Node, secondary: Node) -> bool:
    """Whether both ends are connected, the secondary streams and both roots are equal."""
    return together(performance(primary), performance(secondary))


def together(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """:func:`in_step` of what a primary and its secondary say of one mode.

    Streaming and equal is what a secondary that was just cut off still calls itself, while it waits to connect again.
    """
    if theirs.get("state") != "stream-wals" or not ours.get("merkle_root"):
        return False
    named = [one for one in ours.get("secondaries", []) if one["node_id"] == theirs["secondary_id"]]
    connected = theirs["connection_state"] == "ready" and any(one["connection_status"] == "connected" for one in named)
    return bool(connected and ours["merkle_root"] == theirs.get("merkle_root"))


def activation_token(primary: Cluster, secondary_id: str, *, mode: str = "performance", **parameters: Any) -> str:
    """A new activation token. Raises ClusterError."""
    reply = primary.call("POST", f"sys/replication/{mode}/primary/secondary-token", {"id": secondary_id, **parameters})
    if reply.status != 200:
        raise ClusterError(f"secondary-token answered {reply.status}: {reply.errors}")
    return str(reply.body["wrap_info"]["token"])


def replicate(primary: Cluster, secondary: Cluster, secondary_id: str = "eu-west") -> None:
    """Make ``secondary`` a performance secondary and wait until both roots are equal."""
    if performance(primary.wait_active()).get("mode") != "primary":
        enabled = primary.call("POST", "sys/replication/performance/primary/enable", {})
        if enabled.status != 200:
            raise ClusterError(f"primary/enable answered {enabled.status}: {enabled.errors}")
    token = activation_token(primary, secondary_id)
    reply = secondary.call("POST", "sys/replication/performance/secondary/enable", {"token": token})
    if reply.status != 200:
        raise ClusterError(f"secondary/enable answered {reply.status}: {reply.errors}")
    secondary.keys = primary.keys
    wait_in_step(primary, secondary)


def wait_in_step(primary: Cluster, secondary: Cluster, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until the secondary streams with the primary's root. Raises ClusterError with both statuses."""
    deadline = time.monotonic() + timeout_s
    while True:
        ours, theirs = primary.active(), secondary.active()
        if ours and theirs and in_step(ours, theirs):
            return
        if time.monotonic() > deadline:
            tails = "\n".join(f"--- {node.name}\n{node.log_tail()}" for node in (*primary.nodes, *secondary.nodes))
            states = [performance(node) if node else None for node in (ours, theirs)]
            raise ClusterError(f"not in step within {timeout_s:.0f} s: {states}\n{tails}")
        time.sleep(0.05)


def embedded_storage(directory: Path) -> str:
    """The storage stanza of a single-node store in ``directory``."""
    return f'storage "embedded" {{\n  path = "{directory}"\n}}'


def consul_storage(address: str, token: str, path: str) -> str:
    """The storage stanza of a cluster on the Consul at ``address``."""
    return f'storage "consul" {{\n  address = "{address}"\n  path = "{path}"\n  token = "{token}"\n}}'


@contextlib.contextmanager
def cluster_on(
    server: ConsulServer,
    home: Path,
    nodes: int,
    settings: str,
    *,
    token: str = "",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """A cluster on ``server`` under a prefix of its own, unsealed; ended with SIGKILL."""
    storage = consul_storage(server.address, token or server.token, f"outrider/{uuid.uuid4().hex[:8]}/")
    made = [
        Node(f"node-{n}", home, storage, settings=settings, environment=dict(environment or {}))
        for n in range(1, nodes + 1)
    ]
    cluster = Cluster(list(made))
    try:
        cluster.bootstrap()
        yield cluster
    finally:
        for node in made:  # a test may have left some of them behind
            node.kill()
