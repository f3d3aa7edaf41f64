"""A TCP proxy on loopback that can misbehave: cut, refuse, swallow. One per link, run in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any


class FaultProxy:
    """Forwards connections to ``127.0.0.1:target_port``.

    ``cut()`` aborts what is open and refuses what comes; ``blackhole()`` keeps connections open and delivers nothing;
    ``heal()`` ends both.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._refusing = False
        self._flowing = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self._loop.call_soon_threadsafe(self._flowing.set)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.connections = 0

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def cut(self) -> None:
        """Reset every connection, refuse new ones."""
        self._refusing = True

        async def abort() -> None:
            for writer in tuple(self._writers):
                writer.transport.abort()

        self._call(abort())

    def blackhole(self) -> None:
        """Deliver nothing more, in either direction, and say nothing about it."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def heal(self) -> None:
        """Behave again."""
        self._refusing = False
        self._loop.call_soon_threadsafe(self._flowing.set)

    def close(self) -> None:
        """Stop the proxy and its thread."""

        async def shut() -> None:
            self._server.close()
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()

        self._call(shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, target_writer}
        self._writers |= pair
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, target_writer))
                tasks.create_task(self._pump(target_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers -= pair
            for one in pair:
                with contextlib.suppress(OSError):
                    one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        writer.close()
