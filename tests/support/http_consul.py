"""Consul's transactions and listings over HTTP, in front of an embedded store, with limits that can be lowered while it
runs: what ConsulStore meets when a setting, or a proxy, changes under it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

from consul_backend.config import ConsulConfig
from consul_backend.embedded import EmbeddedStore
from consul_backend.errors import Conflict
from consul_backend.store import ConsulStore
from consul_backend.txn import (
    Cas,
    CheckIndex,
    CheckNotExists,
    CheckSession,
    Delete,
    DeleteTree,
    Get,
    Op,
    Set,
)

PREFIX = "outrider/"


class HttpConsul:
    """``body_bytes_max`` and ``ops_max`` hold from now on; over the body limit it answers 413, or, with ``closes``,
    closes the connection, after applying the transaction while ``applies_first``. ``lose`` answers are lost."""

    def __init__(self, inner: EmbeddedStore) -> None:
        self.inner = inner
        self.body_bytes_max = 524_288
        self.ops_max = 128
        self.closes = False
        self.applies_first = 0
        self.lose = 0
        self.closed = 0
        self.refused = 0
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                method, target, _ = head[0].split(" ")
                answer = await self._answer(method, target, body)
                if answer is None:
                    self.closed += 1
                    return
                status, text = answer
                writer.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def _answer(self, method: str, target: str, body: bytes) -> tuple[int, bytes] | None:
        url = urlsplit(target)
        if method == "GET":
            assert "keys" in parse_qs(url.query, keep_blank_values=True)
            prefix = url.path.removeprefix("/v1/kv/")
            names = await self.inner.list(prefix.removeprefix(PREFIX))
            return (200, json.dumps([prefix + name for name in names]).encode()) if names else (404, b"")
        ops = [_op(one["KV"]) for one in json.loads(body)]
        if len(body) > self.body_bytes_max:
            return await self._over_size(ops, len(body))
        if len(ops) > self.ops_max:
            self.refused += 1
            return 413, f"Transaction contains too many operations ({len(ops)} > {self.ops_max})".encode()
        answer = await self._apply(ops)
        if self.lose and any(isinstance(op, Set | Cas) for op in ops):
            self.lose -= 1
            return None
        return answer

    async def _over_size(self, ops: list[Op], size_bytes: int) -> tuple[int, bytes] | None:
        if not self.closes:
            self.refused += 1
            return 413, f"Request body({size_bytes} bytes) too large, max size: {self.body_bytes_max} bytes.".encode()
        if self.applies_first and any(isinstance(op, Set | Cas) for op in ops):
            self.applies_first -= 1
            await self._apply(ops)
        return None

    async def _apply(self, ops: list[Op]) -> tuple[int, bytes]:
        try:
            result = await self.inner.txn(ops)
        except Conflict as refusal:
            errors = [{"OpIndex": failure.op_index, "What": failure.what} for failure in refusal.failures]
            return 409, json.dumps({"Results": None, "Errors": errors}).encode()
        found = iter(result.items)
        results: list[dict[str, Any]] = []
        for op in ops:
            if isinstance(op, Get):
                item = next(found)
                value = base64.b64encode(item.value).decode() if item.value else None
                entry = {"Value": value, "ModifyIndex": item.modify_index, "Session": item.session}
                results.append({"KV": {"Key": PREFIX + op.key, **entry}})
            elif not isinstance(op, Delete | DeleteTree | CheckNotExists):
                results.append({"KV": {"Key": PREFIX + op.key, "ModifyIndex": result.modify_index or 1}})
        return 200, json.dumps({"Results": results, "Errors": None}).encode()


def _op(kv: dict[str, Any]) -> Op:
    key = kv["Key"].removeprefix(PREFIX)
    value = base64.b64decode(kv.get("Value") or "")
    match kv["Verb"]:
        case "get":
            return Get(key)
        case "set":
            return Set(key, value)
        case "cas":
            return Cas(key, value, kv["Index"])
        case "delete":
            return Delete(key)
        case "delete-tree":
            return DeleteTree(key)
        case "check-index":
            return CheckIndex(key, kv["Index"])
        case "check-session":
            return CheckSession(key, kv["Session"])
        case "check-not-exists":
            return CheckNotExists(key)
    raise AssertionError(f"no test needs {kv['Verb']}")


@asynccontextmanager
async def http_consul(inner: EmbeddedStore) -> AsyncIterator[tuple[HttpConsul, ConsulStore]]:
    """The server, and a client that has probed it."""
    consul = HttpConsul(inner)
    server = await asyncio.start_server(consul.serve, "127.0.0.1", 0, limit=2**20)
    store = ConsulStore(ConsulConfig(address=f"127.0.0.1:{server.sockets[0].getsockname()[1]}"), request_timeout_s=5.0)
    await store.open()
    try:
        yield consul, store
    finally:
        await store.close()
        server.close()
        await server.wait_closed()
