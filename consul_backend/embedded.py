"""A physical store of one process, for ``-dev``, demos and fast tests: SQLite with Consul's rules and limits.

SQLite runs on one worker thread; this half owns the event loop's side: watches, beats and the timer that ends
sessions. :meth:`EmbeddedStore.peer` gives a second handle with its own beat on the same data, so that two nodes in one
process can compete for a lock as two processes do for Consul's.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from consul_backend.clock import Clock, SystemClock
from consul_backend.embedded_engine import Beat, Engine
from consul_backend.errors import AlreadyRunning, SentinelMissing, Unavailable
from consul_backend.limits import Limits, require_fit, require_key, require_prefix
from consul_backend.physical import SENTINEL_KEY, Item, Names, TxnResult, writes_sentinel
from consul_backend.txn import Op, require_session

DATABASE_NAME = "outrider.db"
LOCK_NAME = "outrider.lock"

P = ParamSpec("P")
T = TypeVar("T")


class EmbeddedStore:
    """``path`` is a directory (made if missing), or None to keep all in memory. See ``physical.py`` for the rules."""

    def __init__(
        self,
        path: str | None = None,
        *,
        limits: Limits | None = None,
        _hub: _Hub | None = None,
    ) -> None:
        self._hub = _hub or _Hub(path, limits or Limits(), SystemClock())
        self._beat = Beat()
        self._beat_ttl_s = 0.0
        self._opened = False
        self._sentinel_seen = False

    @property
    def kind(self) -> str:
        return "inmem" if self._hub.path is None else "embedded"

    @property
    def limits(self) -> Limits:
        return self._hub.limits

    def peer(self) -> EmbeddedStore:
        """Another handle on the same data, with a beat of its own: what a second process is to Consul. Open it too."""
        return EmbeddedStore(_hub=self._hub)

    async def open(self) -> None:
        if not self._opened:
            await self._hub.open()
            self._opened = True
            await self.get(SENTINEL_KEY)

    async def close(self) -> None:
        """Idempotent. The file is released with its last handle; sessions of this handle die by their missing beat."""
        if self._opened:
            self._opened = False
            await self._hub.close()

    async def get(self, key: str, *, consistent: bool = False) -> Item | None:
        return (await self.get_many([key], consistent=consistent))[0]

    async def get_many(self, keys: Sequence[str], *, consistent: bool = False) -> list[Item | None]:
        for key in keys:
            require_key(key)
        items = await self._run(self._hub.engine.get_many, keys, self._now())
        if any(item is not None and item.key == SENTINEL_KEY for item in items):
            self._sentinel_seen = True
        return items

    async def list(self, prefix: str, *, consistent: bool = False) -> list[str]:
        if prefix and not prefix.endswith("/"):
            raise ValueError(f"a list prefix ends in a slash: {prefix!r}")
        names = await self._run(self._hub.engine.list, require_prefix(prefix))
        await self._require_sentinel()
        return names

    async def names_below(self, prefix: str, names_max: int, *, consistent: bool = False) -> Names | None:
        if prefix and not prefix.endswith("/"):
            raise ValueError(f"a list prefix ends in a slash: {prefix!r}")
        names = await self._run(self._hub.engine.names_below, require_prefix(prefix), names_max)
        await self._require_sentinel()
        return names

    async def _require_sentinel(self) -> None:
        if await self.get(SENTINEL_KEY) is None and self._sentinel_seen:
            raise SentinelMissing("the sentinel is gone: an empty or short list proves nothing")

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        require_fit(ops, self.limits)
        result = await self._run(self._hub.engine.txn, tuple(ops), self._now())
        self._sentinel_seen = self._sentinel_seen or writes_sentinel(ops)
        return result

    async def watch(self, key: str, index: int, wait_s: float) -> tuple[Item | None, int]:
        require_key(key)
        with _Waiter(self._hub, key) as changed:
            item, changed_at, store_index = await self._run(self._hub.engine.look, key, self._now())
            if index and changed_at <= index:
                try:
                    await asyncio.wait_for(changed.wait(), wait_s)
                except TimeoutError:
                    return item, index
                item, _, store_index = await self._run(self._hub.engine.look, key, self._now())
        return item, item.modify_index if item else store_index

    async def create_session(self, name: str, *, beat_ttl_s: float, lock_delay_s: float) -> str:
        self._beat_ttl_s = beat_ttl_s
        await self.beat()
        session = await self._run(self._hub.engine.create_session, self._beat, lock_delay_s)
        self._hub.watch_deadlines()
        return session

    async def beat(self) -> None:
        if not self._opened:
            raise Unavailable("the embedded store is not open")
        now_s = self._now()
        if self._beat.deadline_s <= now_s:  # too late: what was missed is missed, also if the timer has not run yet
            await self._run(self._hub.engine.expire, now_s)
        self._beat.deadline_s = now_s + self._beat_ttl_s

    async def renew_session(self, session: str) -> bool:
        return await self._run(self._hub.engine.session_alive, require_session(session), self._now())

    async def destroy_session(self, session: str) -> None:
        await self._run(self._hub.engine.destroy_session, session, self._now())

    async def stop_beat(self) -> None:
        self._beat.deadline_s = float("-inf")
        if self._opened:
            await self._run(self._hub.engine.expire, self._now())

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if not self._opened:
            raise Unavailable("the embedded store is not open")
        return await self._hub.run(work, *args, **kwargs)

    def _now(self) -> float:
        return self._hub.clock.monotonic()


class _Hub:
    """What the handles of one store share: the worker thread, the file and its lock, the waiting watchers."""

    def __init__(self, path: str | None, limits: Limits, clock: Clock) -> None:
        self.path = path
        self.limits = limits
        self.clock = clock
        self.engine = Engine(None if path is None else str(Path(path) / DATABASE_NAME), self._changed)
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._handles = 0
        self._lock_fd: int | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._handles += 1
        if self._handles > 1:
            return
        try:
            self._loop = asyncio.get_running_loop()
            self._lock_fd = _lock_directory(self.path)
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedded store")
            await self.run(self.engine.open)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        self._handles -= 1
        if self._handles:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._executor is not None:
            executor, self._executor = self._executor, None
            await asyncio.get_running_loop().run_in_executor(executor, self.engine.close)
            executor.shutdown()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` on the store's thread. Once begun it ends, also when the caller is cancelled."""
        if self._executor is None:
            raise Unavailable("the embedded store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(*args, **kwargs))

    def waiters(self, key: str) -> set[asyncio.Event]:
        return self._waiters.setdefault(key, set())

    def forget(self, key: str, event: asyncio.Event) -> None:
        events = self._waiters[key]
        events.discard(event)
        if not events:
            del self._waiters[key]

    def watch_deadlines(self) -> None:
        """See to it that sessions end in time even when nobody calls."""
        if self._timer is None or self._timer.done():
            self._timer = asyncio.create_task(self._end_sessions_in_time(), name="embedded store: sessions")

    async def _end_sessions_in_time(self) -> None:
        while (deadline_s := await self.run(self.engine.next_deadline)) is not None:
            await asyncio.sleep(max(0.0, deadline_s - self.clock.monotonic()))
            await self.run(self.engine.expire, self.clock.monotonic())

    def _changed(self, keys: Sequence[str]) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake, keys)

    def _wake(self, keys: Sequence[str]) -> None:
        for key in keys:
            for event in self._waiters.get(key, ()):
                event.set()


class _Waiter:
    """Registered before the first look, so that no change falls between look and wait."""

    def __init__(self, hub: _Hub, key: str) -> None:
        self._hub = hub
        self._key = key
        self._event = asyncio.Event()

    def __enter__(self) -> asyncio.Event:
        self._hub.waiters(self._key).add(self._event)
        return self._event

    def __exit__(self, *_: object) -> None:
        self._hub.forget(self._key, self._event)


def _lock_directory(path: str | None) -> int | None:
    """Hold the directory for this process; not by its database, whose locks SQLite drops when any handle closes."""
    if path is None:
        return None
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_fd = os.open(Path(path) / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"embedded store: {error}") from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock_fd)
        raise AlreadyRunning(f"another process uses the embedded store in {path}") from None
    return lock_fd
