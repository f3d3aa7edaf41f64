"""asyncio's private attribute: these fail when a Python release no longer honours it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from consul_backend.socket_reads import READ_BYTES, limit_socket_reads
from sidecar.api.server import ApiServer
from sidecar.request.types import HttpRequest, HttpResponse


class Sizes(asyncio.Protocol):
    """What each read gave, until the other end closes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.sizes.append(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


async def sizes_of_reads() -> list[int]:
    """Of 4 MiB that are sent as fast as they are taken."""
    read = Sizes()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: read, "127.0.0.1", 0)
    async with server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(bytes(4 * 1024 * 1024))
        writer.close()
        await read.ended.wait()
    assert sum(read.sizes) == 4 * 1024 * 1024
    return read.sizes


async def test_reads_are_small_enough_to_come_from_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    transport: Any = asyncio.selector_events._SelectorTransport  # type: ignore[attr-defined]  # asyncio names no public one
    monkeypatch.setattr(transport, "max_size", 256 * 1024)
    limit_socket_reads()
    assert max(await sizes_of_reads()) <= READ_BYTES
    assert transport.max_size == READ_BYTES
    # Control: it is this attribute that decides.
    monkeypatch.setattr(transport, "max_size", 1000)
    assert max(await sizes_of_reads()) <= 1000


async def test_the_api_server_s_connections_read_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio.selector_events._SelectorTransport, "max_size", 1)  # type: ignore[attr-defined]  # asyncio names no public one
    seen: list[int] = []

    async def fallback(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.transport.max_size)  # type: ignore[union-attr]  # asyncio's own transport
        return web.Response()

    async def handle(_: HttpRequest) -> HttpResponse:
        raise AssertionError

    server = ApiServer(handle, fallback=fallback)
    address = await server.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /ui HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()
    await server.close()
    assert seen == [READ_BYTES]
