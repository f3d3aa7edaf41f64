"""Raw Consul PUTs by an external load generator: the reference that the replicated store is measured against.

``wrk`` (one thread, written in C) costs the machine least; where it cannot be had, a bare asyncio client in this
process takes its place, which flatters the store by about a tenth. Whoever prints figures says which it was.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from bench.report import percentile
from bench.wrk import wrk_command
from scripts.debian_package import NoPackage

SCRIPT = Path(__file__).with_name("put.lua")


def generator() -> tuple[list[str], dict[str, str]]:
    """wrk's command and environment, fetched if need be (call it before there is an event loop to hold up); an empty
    command when it cannot be had."""
    try:
        return wrk_command()
    except NoPackage:
        return [], {}


@dataclass(frozen=True)
class Round:
    """One round: requests a second, median and 99th percentile in seconds, requests."""

    rate: float
    p50_s: float
    p99_s: float
    requests: int


class RawLoad:
    """PUTs of ``value_bytes`` to ``keys`` random keys over ``connections`` keep-alive connections."""

    def __init__(self, address: str, token: str, *, connections: int, keys: int, value_bytes: int) -> None:
        self._address, self._token = address, token
        self._connections, self._keys, self._value_bytes = connections, keys, value_bytes
        self._rounds = 0
        self._wrk, self._environment = generator()

    @property
    def name(self) -> str:
        """What generates the load."""
        return "wrk" if self._wrk else "an asyncio client"

    async def round(self, seconds: float) -> Round:
        """Put for about ``seconds``. Raises RuntimeError when a PUT failed."""
        self._rounds += 1
        return await (self._by_wrk(seconds) if self._wrk else self._by_ourselves(seconds))

    async def _by_wrk(self, seconds: float) -> Round:
        command = [
            *self._wrk, "-t1", f"-c{self._connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s",
            "-s", str(SCRIPT), f"http://{self._address}", "--",
            self._token, "/v1/kv/outrider/bench-raw/", str(self._keys), str(self._value_bytes), str(self._rounds),
        ]  # fmt: skip
        process = await asyncio.create_subprocess_exec(*command, env=self._environment, stdout=asyncio.subprocess.PIPE)
        told, _ = await process.communicate()
        totals = [line.split()[1:] for line in told.decode().splitlines() if line.startswith("TOTALS ")]
        if process.returncode or not totals or int(totals[0][2]):
            raise RuntimeError(f"wrk failed: {told.decode()[-500:]}")
        requests, duration_us, _, p50_us, p99_us = map(float, totals[0])
        return Round(requests / duration_us * 1e6, p50_us / 1e6, p99_us / 1e6, int(requests))

    async def _by_ourselves(self, seconds: float) -> Round:
        clients = [await _Client.connect(self._address, self._token) for _ in range(self._connections)]
        value = b"x" * (self._value_bytes - 8)
        latencies: list[float] = []
        started = time.perf_counter()

        async def put(client: _Client, n: int) -> None:
            while (sent := time.perf_counter()) < started + seconds:
                n = (n * 6364136223846793005 + 1442695040888963407) % 2**64
                await client.put(f"outrider/bench-raw/{n % self._keys}", n.to_bytes(8, "big") + value)
                latencies.append(time.perf_counter() - sent)

        async with asyncio.TaskGroup() as tasks:
            for n, client in enumerate(clients):
                tasks.create_task(put(client, self._rounds * 1000 + n))
        rate = len(latencies) / (time.perf_counter() - started)
        for client in clients:
            client.close()
        return Round(rate, percentile(latencies, 0.5), percentile(latencies, 0.99), len(latencies))


class _Client:
    """One keep-alive connection that does nothing but PUT."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str) -> None:
        self._reader = reader
        self._writer = writer
        self._head = f"HTTP/1.1\r\nHost: consul\r\nX-Consul-Token: {token}\r\nContent-Length: "

    @classmethod
    async def connect(cls, address: str, token: str) -> _Client:
        """Dial ``host:port``."""
        host, port = address.rsplit(":", 1)
        return cls(*await asyncio.open_connection(host, int(port)), token)

    async def put(self, key: str, value: bytes) -> None:
        """One PUT. Raises RuntimeError unless Consul says true."""
        self._writer.write(f"PUT /v1/kv/{key} {self._head}{len(value)}\r\n\r\n".encode() + value)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        body = await self._reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200") or body.strip() != b"true":
            raise RuntimeError(f"raw PUT answered {head[:40]!r}")

    def close(self) -> None:
        """End the connection."""
        self._writer.close()
