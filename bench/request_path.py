"""What this process does for one request, without sockets and without Consul: processor time from the bytes of the
request to the bytes of the answer.

The whole server runs, down to a store in a dictionary; requests are handed to the HTTP connections of 16 clients, and
their answers are taken from them. The fastest of many batches counts, so other work on the machine hardly does. What
a row does not have: the socket (20 to 40 µs), the replicated store (``write_path.py`` for a write), replication.

    python bench/request_path.py --against /tmp/before      # another tree of this project, in turns
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ.get("OUTRIDER_TREE") or str(Path(__file__).resolve().parent.parent))

from aiohttp.web_protocol import RequestHandler

from sidecar.api.front import Front
from sidecar.api.server import ApiServer
from sidecar.garbage import settle
from tests.support.service_node import FakeReplication, Harness, running

CLIENTS = 16
VALUE = "v" * 256
POLICY = """
path "one/*" { capabilities = ["create", "read", "update", "delete", "list"] }
path "two/*" { capabilities = ["create", "read", "update", "delete", "list"] }
path "transit/*" { capabilities = ["create", "read", "update"] }
path "auth/token/create" { capabilities = ["create", "update"] }
"""


class Wire(asyncio.Transport):
    """Stands for a client's socket: keeps what is written, and tells how much of an answer has come."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()

    def write(self, data: Any) -> None:
        self.answers.put_nowait(bytes(data))

    def writelines(self, pieces: Any) -> None:
        self.answers.put_nowait(b"".join(pieces))

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        return

    def pause_reading(self) -> None:
        return

    def resume_reading(self) -> None:
        return

    def close(self) -> None:
        return

    def abort(self) -> None:
        return


class Client:
    """One connection that asks one thing after the other."""

    def __init__(self, handler: RequestHandler) -> None:
        self.wire = Wire()
        self.handler = handler
        handler.connection_made(self.wire)

    async def ask(self, requests: Iterator[bytes], times: int) -> None:
        """``times`` requests. Raises RuntimeError for an answer that is no success."""
        for _ in range(times):
            self.handler.data_received(next(requests))
            answer = await self.wire.answers.get()
            if answer[9:11] != b"20":
                raise RuntimeError(answer.decode("utf-8", "replace"))


def http(method: str, path: str, token: str, body: Any = None) -> bytes:
    """A request as Vault's own clients write it."""
    raw = b"" if body is None else json.dumps(body).encode()
    length = f"Content-Length: {len(raw)}\r\n" if raw else ""
    head = (
        f"{method} /v1/{path} HTTP/1.1\r\nHost: 127.0.0.1:8200\r\nUser-Agent: Go-http-client/1.1\r\n{length}"
        f"X-Vault-Request: true\r\n{f'X-Vault-Token: {token}' + chr(13) + chr(10) if token else ''}"
        "Accept-Encoding: gzip\r\n\r\n"
    )
    return head.encode() + raw


async def requests(harness: Harness) -> dict[str, Iterator[bytes]]:
    """Every row: endless requests."""

    async def post(path: str, body: Any) -> Any:
        reply = await harness.call("POST", path, body)
        if reply.status not in (200, 204):
            raise RuntimeError(str(reply.errors))
        return reply.body

    await post("sys/mounts/one", {"type": "kv"})
    await post("sys/mounts/two", {"type": "kv", "options": {"version": "2"}})
    await post("sys/mounts/transit", {"type": "transit"})
    await post("transit/keys/bench", {})
    await post("sys/auth/approle", {"type": "approle"})
    await post("sys/policies/acl/bench", {"policy": POLICY})
    await post("auth/approle/role/bench", {"token_policies": "bench", "token_ttl": "10m"})
    role_id = (await harness.call("GET", "auth/approle/role/bench/role-id")).data["role_id"]
    secret_id = (await post("auth/approle/role/bench/secret-id", {}))["data"]["secret_id"]
    token = (await post("auth/token/create", {"policies": ["bench"], "ttl": "2h"}))["auth"]["client_token"]
    await post("one/known", {"value": VALUE})
    await post("two/data/known", {"data": {"value": VALUE}})

    def repeat(request: bytes) -> Iterator[bytes]:
        while True:
            yield request

    def numbered(path: str, body: Any) -> Iterator[bytes]:
        made = [http("POST", path.format(number), token, body) for number in range(500)]
        while True:
            yield from made

    login = {"role_id": role_id, "secret_id": secret_id}
    return {
        "kv v1 read": repeat(http("GET", "one/known", token)),
        "kv v2 read": repeat(http("GET", "two/data/known", token)),
        "kv v1 write": numbered("one/key/{}", {"value": VALUE}),
        "kv v2 write": numbered("two/data/key/{}", {"data": {"value": VALUE}}),
        "transit encrypt": repeat(http("POST", "transit/encrypt/bench", token, {"plaintext": "djEy" * 64})),
        "token create": repeat(http("POST", "auth/token/create", token, {"ttl": "10m"})),
        "lookup-self": repeat(http("GET", "auth/token/lookup-self", token)),
        "approle login": repeat(http("POST", "auth/approle/login", "", login)),
        "sys/health": repeat(http("GET", "sys/health", "")),
    }


async def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Microseconds of processor time a request, by row."""
    found: dict[str, float] = {}
    replication = FakeReplication()
    replication.sessions.telling = True  # a write's answer has a header more
    with tempfile.TemporaryDirectory() as folder:
        async with running(now=time.time, replication=replication) as harness:
            if arguments.audit:
                log = {"type": "file", "options": {"file_path": f"{folder}/audit.log"}}
                assert (await harness.call("PUT", "sys/audit/file", log)).status == 204
            server = ApiServer(Front(harness.node).handle)
            await server.listen("127.0.0.1", 0)
            factory: Any = server._server  # what a listening socket makes its connections with
            rows = await requests(harness)
            clients = [Client(factory()) for _ in range(CLIENTS)]
            settle()
            for name, texts in rows.items():
                if arguments.only in name:
                    found[name] = await one_row(clients, texts, arguments)
            await server.close()
    return found


async def one_row(clients: list[Client], texts: Iterator[bytes], arguments: argparse.Namespace) -> float:
    """Of one row."""

    async def batch() -> None:
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.ask(texts, arguments.times))

    for _ in range(3):
        await batch()
    if arguments.profile:
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(arguments.batches):
            await batch()
        profile.disable()
        show(profile, len(clients) * arguments.times * arguments.batches)
    took = []
    for _ in range(arguments.batches):
        before = time.process_time()
        await batch()
        took.append(time.process_time() - before)
    return min(took) / (len(clients) * arguments.times) * 1e6


def show(profile: cProfile.Profile, count: int) -> None:
    """Own and whole microseconds and calls of each function, a request."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]  # typeshed leaves it out
    lines = sorted(((own, whole, calls, *where) for where, (_, calls, own, whole, _) in stats.items()), reverse=True)
    print(f"{sum(line[2] for line in lines) / count:.0f} calls a request")
    for own, whole, calls, file, line, name in lines[:120]:
        place = "/".join(Path(file).parts[-2:])
        print(f"{own / count * 1e6:7.2f} {whole / count * 1e6:8.1f} {calls / count:6.2f}  {place}:{line} {name}")


def compare(arguments: argparse.Namespace) -> None:
    """Run both trees in turns and print both."""
    runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    trees = {"before": str(arguments.against.resolve()), "after": str(Path(__file__).resolve().parent.parent)}
    options = ["--times", str(arguments.times), "--batches", str(arguments.batches), "--only", arguments.only]
    options += ["--audit"] if arguments.audit else []
    for turn in range(2 * arguments.turns):
        name = ("before", "after")[turn % 2]
        environment = {**os.environ, "OUTRIDER_TREE": trees[name], "PYTHONPATH": trees[name]}
        done = subprocess.run(
            [sys.executable, __file__, *options], env=environment, check=True, capture_output=True, text=True
        )
        runs[name].append(json.loads(done.stdout.splitlines()[-1])["cpu_us"])
    print(f"{'request':20} {'before':>8} {'after':>8}  ratio")
    figures = {}
    for row in runs["after"][0]:
        before, after = (min(run[row] for run in runs[name]) for name in ("before", "after"))
        print(f"{row:20} {before:8.1f} {after:8.1f}  {after / before:.2f}")
        figures[row] = [round(before, 1), round(after, 1)]
    ratio = statistics.median(after / before for before, after in figures.values())
    print(json.dumps({"benchmark": "request_path", "audit": arguments.audit, "cpu_us": figures, "ratio": ratio}))


def main() -> None:
    parser = argparse.ArgumentParser(description="processor time of a request in this process")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--times", type=int, default=6, help="requests of each client in one batch")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--audit", action="store_true", help="with an audit device that writes a file")
    parser.add_argument("--profile", action="store_true", help="show where a batch's time goes")
    parser.add_argument("--against", type=Path, help="another tree, to compare with")
    parser.add_argument("--turns", type=int, default=3, help="with --against: runs of each tree")
    arguments = parser.parse_args()
    if arguments.against:
        compare(arguments)
        return
    found = asyncio.run(measure(arguments))
    for name, cpu_us in found.items():
        print(f"{name:20} {cpu_us:8.1f}")
    print(json.dumps({"benchmark": "request_path", "audit": arguments.audit, "cpu_us": found}))


if __name__ == "__main__":
    main()
