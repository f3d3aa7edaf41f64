"""CPU time of the API server alone for a request: sockets, HTTP, limits; the handler answers a constant.

Each server is a process of its own, for where its heap lies matters (``consul_backend/socket_reads.py``); the variants
take turns. The client sends eight requests at once on eight connections, from another process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import result, table
from consul_backend import socket_reads
from sidecar.api import request_parser
from sidecar.api.server import ApiServer
from sidecar.request.types import HttpRequest, HttpResponse

CONNECTIONS = 8
ROUND = 50  # times all connections
METHODS = ("GET", "LIST", "POST")
VARIANTS = {
    "as it is": (),
    "Python parser for all": ("parser",),
    "reads of 256 KiB": ("reads",),
    "both": ("parser", "reads"),
}
ANSWER = json.dumps({"data": "v" * 500}).encode()


def request(method: str) -> bytes:
    """What the command line of this API's clients sends, and a body where there is one."""
    body = "x" * 256 if method == "POST" else ""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return (
        f"{method} /v1/bench/one/key HTTP/1.1\r\nHost: 127.0.0.1:8200\r\nUser-Agent: Go-http-client/1.1\r\n{length}"
        f"X-Vault-Token: hvs.{'x' * 92}\r\nX-Vault-Request: true\r\nAccept-Encoding: gzip\r\n\r\n{body}"
    ).encode()


async def serve(without: list[str]) -> None:
    """Print the port, then the CPU seconds used so far for each line of input."""
    if "parser" in without:
        request_parser._LINE = re.compile(b"never")  # no request is plain

    async def answer(_: HttpRequest) -> HttpResponse:
        return HttpResponse(body=ANSWER)

    server = ApiServer(answer)
    if "reads" in without:
        socket_reads.READ_BYTES = 256 * 1024
    _, port = await server.listen("127.0.0.1", 0)
    print(port, flush=True)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def told() -> None:
        if os.read(0, 1):
            print(time.process_time(), flush=True)
        else:
            ended.set()

    loop.add_reader(0, told)
    await ended.wait()
    await server.close()


def measure(without: tuple[str, ...], rounds: int) -> dict[str, float]:
    """CPU µs of one request of each method: the fastest round of one server."""
    command = [sys.executable, __file__, "--serve", *without]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        asking, told = process.stdin, process.stdout
        assert asking is not None
        assert told is not None

        def cpu_s() -> float:
            asking.write(b"?")
            asking.flush()
            return float(told.readline())

        port = int(told.readline())
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
        found = {}
        for method in METHODS:
            raw, costs = request(method), []
            for _ in range(rounds):
                before = cpu_s()
                for _ in range(ROUND):
                    for client in clients:
                        client.sendall(raw)
                    for client in clients:
                        client.recv(65536)
                costs.append((cpu_s() - before) / (ROUND * CONNECTIONS) * 1e6)
            found[method] = min(costs)
        for client in clients:
            client.close()
        asking.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=int, default=6, help="of each variant")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--serve", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        asyncio.run(serve(arguments.serve))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.servers):
        for name, without in VARIANTS.items():
            found[name].append(measure(without, arguments.rounds))
    figures = {
        name: {method: [round(each[method], 1) for each in servers] for method in METHODS}
        for name, servers in found.items()
    }
    rows = [
        [name, *(f"{statistics.median(costs):.0f} [{min(costs):.0f}-{max(costs):.0f}]" for costs in row.values())]
        for name, row in figures.items()
    ]
    print(f"CPU µs a request, {arguments.servers} servers of each kind, load {os.getloadavg()[0]:.1f}")
    table(("", *METHODS), rows)
    result("http_server", figures)


if __name__ == "__main__":
    main()
