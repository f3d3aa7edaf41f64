"""Requests a second over HTTP, from an external load generator, against one active node on real Consul.

Each row takes turns with two references for several rounds: an HTTP server of the same library that answers a
constant (what framing alone allows here), and for what writes, a raw PUT to the same Consul. A ratio is the median of
the rounds' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import wrk
from bench.pair import checked, workspace
from bench.report import result, spread, table
from tests.support.cluster import Cluster, Node, consul_storage
from tests.support.consul_server import ConsulServer
from tests.support.ports import free_port

VALUE = "v" * 256
KEYS = 10_000
LISTED = 1_000
POLICY = """
path "bench/*" { capabilities = ["create", "read", "update", "delete", "list"] }
path "transit/*" { capabilities = ["create", "read", "update"] }
path "auth/token/create" { capabilities = ["create", "update"] }
"""
FRAMING = """
import asyncio, sys
from aiohttp import web
from sidecar.api.connection import Server, Times

async def answer(request):
    return web.Response(body=b'{"data":"' + b"v" * 500 + b'"}', content_type="application/json")

async def main():
    runner = web.ServerRunner(Server(answer, connections_max=4096, times=Times(), access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    await asyncio.Event().wait()

asyncio.run(main())
"""


@dataclass(frozen=True)
class Case:
    """One row. ``body`` makes it a write; ``%d`` in path or body is a random number below ``keys``. ``reference`` is
    ``framing`` or ``consul``."""

    name: str
    path: str
    body: str = ""
    reference: str = "framing"
    keys: int = KEYS
    with_token: bool = True

    def script(self, folder: Path, token: str) -> Path:
        """The Lua file that makes this row's requests."""
        file = folder / f"{re.sub('[^a-z0-9]+', '-', self.name)}.lua"
        method = "POST" if self.body else "GET"
        headers = f'["X-Vault-Token"] = "{token}"' if self.with_token else ""
        path, body = json.dumps(f"/v1/{self.path}"), json.dumps(self.body)  # a JSON string is a Lua string, too
        file.write_text(
            "request = function()\n"
            f"  local n = math.random({self.keys}) - 1\n"
            f'  return wrk.format("{method}", ({path}):format(n), {{{headers}}}, ({body}):format(n))\n'
            "end\n"
        )
        return file


def cases(role_id: str, secret_id: str) -> list[Case]:
    """Every row."""
    secret = json.dumps({"value": VALUE})
    plaintext = "djEy" * 64
    return [
        Case("kv v1 write", "bench/one/key/%d", secret, "consul"),
        Case("kv v2 write", "bench/two/data/key/%d", json.dumps({"data": {"value": VALUE}}), "consul"),
        Case("kv v1 read", "bench/one/listed/entry-%04d", keys=LISTED),
        Case("kv v2 read", "bench/two/data/known"),
        Case("list of 1,000", "bench/one/listed?list=true"),
        Case("transit encrypt", "transit/encrypt/bench", json.dumps({"plaintext": plaintext})),
        Case("token create", "auth/token/create", json.dumps({"ttl": "10m"}), "consul"),
        Case("token lookup-self", "auth/token/lookup-self"),
        Case(
            "approle login",
            "auth/approle/login",
            json.dumps({"role_id": role_id, "secret_id": secret_id}),
            "consul",
            with_token=False,
        ),
        Case("sys/health", "sys/health", with_token=False),
    ]


def prepare(cluster: Cluster, consul: ConsulServer) -> tuple[str, list[Case]]:
    """Mounts, data and a token that is not root's."""
    post = lambda path, body: checked(cluster.call("POST", path, body))  # noqa: E731 - twelve calls of one shape
    post("sys/mounts/bench/one", {"type": "kv"})
    post("sys/mounts/bench/two", {"type": "kv", "options": {"version": "2"}})
    post("sys/mounts/transit", {"type": "transit"})
    post("transit/keys/bench", {})
    post("sys/auth/approle", {"type": "approle"})
    post("sys/policies/acl/bench", {"policy": POLICY})
    post("auth/approle/role/bench", {"token_policies": "bench", "token_ttl": "10m"})
    role_id = checked(cluster.call("GET", "auth/approle/role/bench/role-id")).data["role_id"]
    secret_id = post("auth/approle/role/bench/secret-id", {}).data["secret_id"]
    token = post("auth/token/create", {"policies": ["bench"], "ttl": "2h"}).body["auth"]["client_token"]
    post("bench/two/data/known", {"data": {"value": VALUE}})
    for number in range(LISTED):
        post(f"bench/one/listed/entry-{number:04d}", {"value": VALUE})
    return token, cases(role_id, secret_id)


@contextlib.contextmanager
def framing_server() -> Iterator[str]:
    """A bare server of the same HTTP library; its URL."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", FRAMING, str(port)], env={**os.environ, "PYTHONPATH": "."})
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), urllib.request.urlopen(url):
                break
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def cpu_s(node: Node) -> float:
    """CPU seconds the node has used."""
    assert node.process is not None
    fields = Path(f"/proc/{node.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(arguments: argparse.Namespace, home: Path, cluster: Cluster, consul: ConsulServer, framing: str) -> None:
    """Run and print everything."""
    token, rows = prepare(cluster, consul)
    node = cluster.wait_active()
    raw = home / "raw.lua"
    raw.write_text(
        "request = function()\n"
        f'  return wrk.format("PUT", "/v1/kv/outrider/bench-raw/" .. math.random({KEYS}), '
        f'{{["X-Consul-Token"] = "{consul.token}"}}, "{VALUE}")\nend\n'
    )
    shared = {"connections": arguments.connections, "seconds": arguments.seconds}
    shown, figures = [], []
    for case in [case for case in rows if arguments.only in case.name]:
        script = case.script(home, token)
        ours, ratios, cpu_us = [], [], []
        for _ in range(arguments.rounds):
            url, how = (f"http://{consul.address}/", raw) if case.reference == "consul" else (framing, None)
            base = wrk.load(url, script=how, **shared)
            before = cpu_s(node)
            found = wrk.load(f"{node.address}/", script=script, **shared)
            if found.failed:
                raise SystemExit(f"{case.name}: {found.failed} requests failed")
            cpu_us.append((cpu_s(node) - before) / (found.per_s * arguments.seconds) * 1e6)
            ours.append(found)
            ratios.append(found.per_s / base.per_s)
        row = {
            "per_s": statistics.median(one.per_s for one in ours),
            "p50_ms": statistics.median(one.p50_ms for one in ours),
            "p99_ms": statistics.median(one.p99_ms for one in ours),
            "cpu_us": statistics.median(cpu_us),
            "ratio": statistics.median(ratios),
        }
        figures.append({"case": case.name, "reference": case.reference, **{k: round(v, 3) for k, v in row.items()}})
        times = [f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{row['cpu_us']:.0f}"]
        ratio = f"{row['ratio']:.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        shown.append([case.name, spread([one.per_s for one in ours]), *times, case.reference, ratio])
    each = f"{arguments.rounds} rounds of {arguments.seconds:.0f} s each"
    print(f"{arguments.connections} connections, {each}, one node, real Consul")
    table(("request", "requests/s", "p50 ms", "p99 ms", "CPU µs", "reference", "ratio"), shown)
    result("api", {"connections": arguments.connections, "cases": figures})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    consul = ConsulServer()
    consul.start()
    try:
        with workspace() as home, framing_server() as framing:
            storage = consul_storage(consul.address, consul.token, "outrider/")
            cluster = Cluster([Node("bench-1", home, storage, cluster_name="bench", warm=False)])
            try:
                cluster.bootstrap()
                measure(arguments, home, cluster, consul, framing)
            finally:
                cluster.kill()
    finally:
        consul.stop()


if __name__ == "__main__":
    main()
