"""A TCP server with an event loop and a thread of its own, beside whatever the test does."""

from __future__ import annotations

import abc
import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

CALL_S = 60.0


class ServerThread(abc.ABC):
    """Serves connections on a free port of loopback from :meth:`_start` on. What has to run in the loop goes through
    :meth:`_call`, or ``self._loop.call_soon_threadsafe``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def _start(self) -> int:
        """Begin to serve; returns the port."""
        self._thread.start()
        self._server: asyncio.Server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_S)

    @abc.abstractmethod
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""

    def close(self) -> None:
        """Stop it and its thread."""

        async def shut() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S)
        self._loop.close()
