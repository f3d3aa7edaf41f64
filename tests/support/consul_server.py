"""A real Consul for tests, demo and benchmarks: one server, on disk, ACL default deny, on free loopback ports."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.consul_binary import NoConsul, obtain_consul
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
POLICY_FILE = ROOT / "deploy" / "nomad" / "consul-acl-policy.hcl"
START_TIMEOUT_S = 120.0
STARTS_MAX = 3
IMAGE = os.environ.get("OUTRIDER_TEST_CONSUL_IMAGE", "hashicorp/consul:1.22")


class ConsulFailed(Exception):
    """The server did not come up; the message ends with the tail of its log."""


@dataclass(frozen=True)
class RawAnswer:
    """What Consul said: status, body text, headers with lower-case names."""

    status: int
    text: str
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.text)


class ConsulServer:
    """``start`` it, then use ``address`` (``host:port``) with ``token``, which has the rights of the policy file only.

    ``settings`` are merged into the agent's configuration, and its ``ports`` into those. Data survive ``kill`` and
    ``restart``, not ``stop``. With ``disk_can_fill``, :meth:`fill_disk` works.
    """

    def __init__(
        self, *, acl: bool = True, settings: dict[str, Any] | None = None, disk_can_fill: bool = False
    ) -> None:
        self._acl = acl
        self._disk_can_fill = disk_can_fill
        self._settings = settings or {}
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._container: Any = None
        self._ports: tuple[int, int, int] | None = None
        self.address = ""
        self.token = ""
        self.management_token = ""

    def __enter__(self) -> ConsulServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it has a leader and, with ACLs, tokens. Raises ConsulFailed."""
        self._folder = Path(tempfile.mkdtemp(prefix="outrider-consul-"))
        try:
            self._launch()
            if self._acl:
                self.management_token = self._bootstrap_acl()
                self.token = self.create_token(self.create_policy(POLICY_FILE.read_text()))
            self._await_writable()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and delete its data. Idempotent."""
        if self._process is not None:
            self.kill()
        if self._container is not None:
            self._container.stop()
            self._container = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def kill(self) -> None:
        """SIGKILL the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self, *, wait: bool = True) -> None:
        """Start again after :meth:`kill`, on the same ports and data; with ``wait`` until it takes writes."""
        self._spawn()
        if wait:
            self._await_writable()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def cpu_s(self) -> float:
        """Processor time that the server has used, of all its threads; 0.0 in a container."""
        if self._process is None:
            return 0.0
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo :meth:`freeze`."""
        self._signal(signal.SIGCONT)

    def fill_disk(self) -> None:
        """Leave no room: what is written beyond the present size of the server's log fails (EFBIG), as on a full disk.

        A limit on the process does it, so no right to mount anything is needed; the limit is soft and can be raised
        again by whoever set it. Raises ConsulFailed when it cannot be set."""
        self._limit_files((self._home / "data" / "raft" / "raft.db").stat().st_size)

    def free_disk(self) -> None:
        """Undo :meth:`fill_disk`."""
        self._limit_files(None)

    def _limit_files(self, soft_bytes: int | None) -> None:
        if self._process is None or not self._disk_can_fill:
            raise ConsulFailed("only a local process that was started with disk_can_fill can run out of disk")
        if self.running:
            _, hard_bytes = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
            limits = (hard_bytes if soft_bytes is None else soft_bytes, hard_bytes)
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, limits)

    @property
    def found_disk_full(self) -> bool:
        """Whether the server has complained of it."""
        return "file too large" in (self._home / "log").read_text(errors="replace")

    # -- talking to it

    def call(
        self, method: str, path: str, body: Any = None, *, token: str | None = None, timeout_s: float = 60.0
    ) -> RawAnswer:
        """One request to ``/v1/<path>`` with the management token, or ``token``; bytes go as they are, else as JSON."""
        secret = self.management_token if token is None else token
        try:
            with self._open(method, path, body, secret, timeout_s) as answer:
                return _raw(answer.status, answer.read(), answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return _raw(error.code, error.read(), error.headers)

    def _open(self, method: str, path: str, body: Any, token: str, timeout_s: float) -> Any:
        request = urllib.request.Request(f"http://{self.address}/v1/{path}", method=method)
        if token:
            request.add_header("X-Consul-Token", token)
        if body is not None:
            request.data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return urllib.request.urlopen(request, timeout=timeout_s)

    def raw_get(self, key: str) -> bytes | None:
        """The value under a full key, read past Outrider; None if there is none."""
        answer = self.call("GET", f"kv/{key}")
        return base64.b64decode(answer.json[0]["Value"] or "") if answer.status == 200 else None

    def raw_put(self, key: str, value: bytes) -> None:
        """Write a full key past Outrider."""
        self._expect(self.call("PUT", f"kv/{key}", value))

    def raw_delete(self, prefix: str) -> None:
        """Delete every key below a full prefix past Outrider."""
        self._expect(self.call("DELETE", f"kv/{prefix}?recurse"))

    def snapshot(self) -> bytes:
        """The whole state, as an operator's backup holds it."""
        with self._open("GET", "snapshot", None, self.management_token, 120.0) as answer:
            return bytes(answer.read())

    def restore(self, snapshot: bytes) -> None:
        """Put a :meth:`snapshot` back underneath whoever uses the server."""
        self._expect(self.call("PUT", "snapshot", snapshot, timeout_s=30.0))

    def create_policy(self, rules: str) -> str:
        """A new policy's id."""
        body = {"Name": f"test-{uuid.uuid4().hex}", "Rules": rules}
        return str(self._expect(self.call("PUT", "acl/policy", body)).json["ID"])

    def change_policy(self, policy: str, rules: str) -> None:
        """Give an existing policy other rules."""
        name = self._expect(self.call("GET", f"acl/policy/{policy}")).json["Name"]
        self._expect(self.call("PUT", f"acl/policy/{policy}", {"ID": policy, "Name": name, "Rules": rules}))

    def create_token(self, *policies: str) -> str:
        """A new token's secret, with these policies' ids."""
        body = {"Policies": [{"ID": policy} for policy in policies]}
        return str(self._expect(self.call("PUT", "acl/token", body)).json["SecretID"])

    # -- inside

    def _launch(self) -> None:
        try:
            binary = obtain_consul()
        except NoConsul:
            if not shutil.which("docker"):
                raise
            self._launch_container()
            return
        for attempt in range(STARTS_MAX):
            self._write_settings(str(binary))
            try:
                self._spawn()
                self._await_answer()
            except ConsulFailed:
                self.kill()
                if attempt == STARTS_MAX - 1:
                    raise
            else:
                return

    def _write_settings(self, binary: str) -> None:
        http, server, serf = self._ports or [free_port() for _ in range(3)]
        self.address = f"127.0.0.1:{http}"
        ports = {"http": http, "server": server, "serf_lan": serf, "serf_wan": -1, "dns": -1, "grpc": -1}
        ports |= self._settings.get("ports", {})
        settings = {
            "server": True,
            "bootstrap_expect": 1,
            "node_name": f"test-{http}",
            "data_dir": str(self._home / "data"),
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "performance": {"raft_multiplier": 1},
            "disable_update_check": True,
            "leave_on_terminate": False,
            "log_level": "warn",
            **self._acl_settings(),
            **self._settings,
            "ports": ports,
        }
        (self._home / "agent.json").write_text(json.dumps(settings))
        (self._home / "binary").write_text(binary)

    def _acl_settings(self) -> dict[str, Any]:
        return {"acl": {"enabled": True, "default_policy": "deny"}} if self._acl else {}

    def _spawn(self) -> None:
        binary = (self._home / "binary").read_text()
        # A write past the limit on file sizes also raises a signal, which would end the process: inherited blocked.
        blocked = {signal.SIGXFSZ} if self._disk_can_fill else set()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        with (self._home / "log").open("ab") as log, contextlib.ExitStack() as after:
            after.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
            self._process = subprocess.Popen(
                [binary, "agent", "-config-file", str(self._home / "agent.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _launch_container(self) -> None:
        # Imported here: only a machine without a binary needs the Docker client.
        from testcontainers.core.container import DockerContainer

        settings = {
            "bootstrap_expect": 1,
            "server": True,
            "performance": {"raft_multiplier": 1},
            "client_addr": "0.0.0.0",  # inside the container; the port is published on loopback
            **self._acl_settings(),
            **self._settings,
        }
        container = DockerContainer(IMAGE).with_exposed_ports(8500).with_command("agent")
        container.with_env("CONSUL_LOCAL_CONFIG", json.dumps(settings))
        self._container = container.start()
        self.address = f"{container.get_container_host_ip()}:{container.get_exposed_port(8500)}"
        self._await_answer()

    def _await_answer(self) -> None:
        self._await("an answer", lambda: self.call("GET", "status/leader").status == 200)

    def _await_writable(self) -> None:
        self._await("a leader", lambda: self.call("PUT", "kv/outrider-test-ready", b"1").status == 200)

    def _bootstrap_acl(self) -> str:
        secret = ""

        def bootstrapped() -> bool:
            nonlocal secret
            answer = self.call("PUT", "acl/bootstrap")
            if answer.status == 200:
                secret = str(answer.json["SecretID"])
            return bool(secret)

        self._await("the ACL system", bootstrapped)
        return secret

    def _await(self, what: str, condition: Any) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._process is not None and self._process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                if condition():
                    return
            time.sleep(0.02)
        raise ConsulFailed(f"Consul gave no sign of {what}\n{self._log_tail()}")

    def _expect(self, answer: RawAnswer) -> RawAnswer:
        if answer.status != 200:
            raise ConsulFailed(f"Consul answered {answer.status}: {answer.text}")
        return answer

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise ConsulFailed("only a running local process can be signalled")
        self._process.send_signal(number)

    def _log_tail(self) -> str:
        log = self._home / "log"
        return log.read_text(errors="replace")[-2000:] if log.exists() else ""

    @property
    def _home(self) -> Path:
        if self._folder is None:
            raise ConsulFailed("the server is not started")
        return self._folder


class ConsulCluster:
    """Consul servers as processes on loopback, that elect a leader among them. ``servers`` share tokens; each is the
    agent of whoever uses its address."""

    def __init__(self, count: int = 3) -> None:
        ports = [free_port() for _ in range(3 * count)]
        self.servers = []
        for n in range(count):
            settings = {
                "bootstrap_expect": count,
                "retry_join": [f"127.0.0.1:{serf}" for serf in ports[2::3]],
                "retry_interval": "1s",
                "autopilot": {"cleanup_dead_servers": False, "server_stabilization_time": "1s"},
            }
            server = ConsulServer(settings=settings)
            server._ports = (ports[3 * n], ports[3 * n + 1], ports[3 * n + 2])
            self.servers.append(server)

    def __enter__(self) -> ConsulCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all and wait for a leader and tokens. Raises ConsulFailed."""
        try:
            for server in self.servers:
                server._folder = Path(tempfile.mkdtemp(prefix="outrider-consul-"))
                server._write_settings(str(obtain_consul()))
                server._spawn()
            first = self.servers[0]
            first.management_token = first._bootstrap_acl()
            first._await_writable()
            first.token = first.create_token(first.create_policy(POLICY_FILE.read_text()))
            for server in self.servers:
                server.management_token, server.token = first.management_token, first.token
                server._await_writable()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every server. Idempotent."""
        for server in self.servers:
            server.stop()

    def heal(self) -> None:
        """Start what was killed and wait until every server takes part again. Raises ConsulFailed."""
        for server in self.servers:
            if not server.running:
                server.restart(wait=False)
        for server in self.servers:
            server._await_writable()
            server._await("a whole cluster", lambda server=server: self._whole(server))

    def _whole(self, server: ConsulServer) -> bool:
        health = server.call("GET", "operator/autopilot/health")
        return health.status == 200 and health.json["FailureTolerance"] == (len(self.servers) - 1) // 2

    def leader(self) -> ConsulServer:
        """The server that leads now, waiting for one. Raises ConsulFailed."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            for server in filter(lambda server: server.running, self.servers):
                with contextlib.suppress(OSError):
                    address = server.call("GET", "status/leader", timeout_s=2.0).json
                    for other in filter(lambda other: other.running, self.servers):
                        if other._ports is not None and address == f"127.0.0.1:{other._ports[1]}":
                            return other
            time.sleep(0.05)
        raise ConsulFailed("the servers elected no leader")


def _raw(status: int, body: bytes, headers: Any) -> RawAnswer:
    return RawAnswer(status, body.decode(errors="replace"), {name.lower(): value for name, value in headers.items()})
