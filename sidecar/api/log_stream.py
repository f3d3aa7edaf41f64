"""``sys/monitor``: the log as it is written, to whoever may watch it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

LINES_MAX = 512
"""Waiting for one watcher; what it is too slow to take is counted and left out."""
WATCHERS_MAX = 16
LOG_LEVELS = {"trace": 5, "debug": 10, "notice": 20, "info": 20, "warn": 30, "warning": 30, "error": 40, "err": 40}
"""The names that levels have in this API."""
PULSE_S = 1.0
"""An empty piece this often while nothing is logged, so that a watcher who left is noticed."""


class TooManyWatchers(Exception):
    """Each costs a formatted line for every record."""


class _Watcher(logging.Handler):
    """Hands lines from any thread to one reader in the event loop."""

    def __init__(self, level: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(level)
        self._loop = loop
        self._dropped = 0
        self.lines: asyncio.Queue[str] = asyncio.Queue(LINES_MAX)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        try:
            self._loop.call_soon_threadsafe(self._put, line)
        except RuntimeError:  # the loop has ended: nobody watches any more
            return

    def _put(self, line: str) -> None:
        if self.lines.full():
            self._dropped += 1
            return
        if self._dropped:
            line, self._dropped = f"[monitor: {self._dropped} lines left out]\n{line}", 0
        self.lines.put_nowait(line)


def watch(level: int, formatter: logging.Formatter) -> AsyncGenerator[bytes]:
    """Lines of every logger at ``level`` and above that the server writes itself, until the iterator is closed.
    Raises :class:`TooManyWatchers`."""
    root = logging.getLogger()
    if sum(isinstance(handler, _Watcher) for handler in root.handlers) >= WATCHERS_MAX:
        raise TooManyWatchers
    watcher = _Watcher(level, asyncio.get_running_loop())
    watcher.setFormatter(formatter)
    return _lines(root, watcher)


async def _lines(root: logging.Logger, watcher: _Watcher) -> AsyncGenerator[bytes]:
    # Added here and not before: an iterator that nobody ever asked leaves nothing behind.
    root.addHandler(watcher)
    try:
        while True:
            try:
                async with asyncio.timeout(PULSE_S):
                    line = await watcher.lines.get()
            except TimeoutError:
                yield b""
                continue
            yield line.encode("utf-8", "backslashreplace") + b"\n"
    finally:
        root.removeHandler(watcher)
