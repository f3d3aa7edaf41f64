"""Does what is due: a bounded number of jobs at once, and of each group (one mount, or the tokens) a bounded share.

The schedule in the store is the truth; everything here is a queue before it and can be thrown away at any moment. A
job that fails for the store's sake leaves its entry where it is and comes back. A group whose jobs hang fills its own
share and its own queue, and nobody else's.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from consul_backend.errors import BackendError
from sidecar.core.metrics import METRICS
from sidecar.core.schedule import Due, Schedule

JOBS_MAX = 192
JOBS_PER_GROUP_MAX = 64
QUEUE_PER_GROUP_MAX = 2_000
REFILL_SECONDS = 64
RETRY_S = 5.0
# A wall clock that is set must not keep anything waiting for longer.
WAIT_S_MAX = 5.0

_log = logging.getLogger("expiration")

Handler = Callable[[Due], Awaitable[None]]
"""Does what is due; when it returns, the entry is gone or moved. Raises BackendError where the store cannot now."""


@dataclass(slots=True)
class _Group:
    waiting: deque[Due] = field(default_factory=deque)
    running: int = 0
    left_in_store: set[int] = field(default_factory=set)


class Expiration:
    """The one loop that expires tokens and leases. ``enabled`` says whether this cluster may do so at the moment."""

    def __init__(
        self,
        schedule: Schedule,
        handle: Handler,
        enabled: Callable[[], bool] = lambda: True,
    ) -> None:
        self._schedule = schedule
        self._handle = handle
        self._enabled = enabled
        self._groups: dict[str, _Group] = {}
        self._busy: set[str] = set()
        self._retry: set[int] = set()
        self._retry_at = 0.0
        self._running = 0
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Something may be due earlier than was known."""
        self._changed.set()

    @property
    def queued(self) -> int:
        """Names that wait in memory."""
        return len(self._busy) - self._running

    @property
    def running(self) -> int:
        """Jobs under way."""
        return self._running

    async def run(self) -> None:
        """Until cancelled; jobs end with it."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._changed.clear()
                failed = not await self._fill(tasks)
                await self._pause(failed)

    async def sweep(self) -> None:
        """Everything that is due now, once. Jobs that fail for the store's sake are left for the next time."""
        async with asyncio.TaskGroup() as tasks:
            while self._enabled():
                self._changed.clear()
                filled = await self._fill(tasks)
                if self._busy:
                    await self._changed.wait()
                    continue
                wait_s = self._schedule.wait_s()
                if not filled or wait_s is None or wait_s > 0:
                    break
        self._bring_back()

    async def _pause(self, failed: bool) -> None:
        """Until a job ends, something falls due, or what failed is tried again."""
        wait_s = self._schedule.wait_s() if self._enabled() else None
        timeout_s = WAIT_S_MAX if wait_s is None else min(max(wait_s, 0.0), WAIT_S_MAX)
        now = asyncio.get_running_loop().time()
        if failed:
            timeout_s = RETRY_S
        if self._retry:
            timeout_s = min(timeout_s, max(self._retry_at - now, 0.0))
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass
        if asyncio.get_running_loop().time() >= self._retry_at:
            self._bring_back()

    def _bring_back(self) -> None:
        for at_s in self._retry:
            self._schedule.add(at_s)
        self._retry.clear()

    async def _fill(self, tasks: asyncio.TaskGroup) -> bool:
        """Take what is due into the queues and begin it. False where the store could not be read."""
        while self._enabled():
            self._start(tasks)
            try:
                found = await self._schedule.take()
            except BackendError as error:
                # Whoever runs the store learns of a lost lead by itself; here it is only work for later.
                _log.warning("expiration is waiting for the store: %s", type(error).__name__)
                return False
            if not found and not self._refill():
                break
            for due in found:
                self._enqueue(due)
        return True

    def _enqueue(self, due: Due) -> None:
        if due.key in self._busy:
            return
        group = self._groups.setdefault(due.group, _Group())
        if len(group.waiting) >= QUEUE_PER_GROUP_MAX:
            group.left_in_store.add(due.at_s)
            return
        self._busy.add(due.key)
        group.waiting.append(due)

    def _start(self, tasks: asyncio.TaskGroup) -> None:
        """Jobs of all groups in turn, while there is room."""
        progress = True
        while progress and self._running < JOBS_MAX:
            progress = False
            for name, group in list(self._groups.items()):
                if not group.waiting or group.running >= JOBS_PER_GROUP_MAX or self._running >= JOBS_MAX:
                    continue
                due = group.waiting.popleft()
                group.running += 1
                self._running += 1
                METRICS.increment("expire.job_manager.total_jobs")
                tasks.create_task(self._job(name, group, due), name="expiration")
                progress = True

    async def _job(self, name: str, group: _Group, due: Due) -> None:
        try:
            await self._handle(due)
        except BackendError as error:
            _log.warning("expiration of one entry is waiting for the store: %s", type(error).__name__)
            if not self._retry:
                self._retry_at = asyncio.get_running_loop().time() + RETRY_S
            self._retry.add(due.at_s)
        except Exception:  # the edge of one entry: what is wrong with it must not keep all others from expiring
            METRICS.increment("expire.lease_expiration.error")
            _log.exception("expiration of one entry failed; it is tried again when a node takes over: %s", due.name)
        finally:
            self._busy.discard(due.key)
            group.running -= 1
            self._running -= 1
            if not group.waiting and not group.running and not group.left_in_store:
                self._groups.pop(name, None)
            self._changed.set()

    def _refill(self) -> bool:
        """Bring back some of what was left in the store, for queues that have room again; all of it would mostly be
        left there once more. Called when nothing else is due, so that what was brought back has been read."""
        refilled = False
        for group in self._groups.values():
            if group.left_in_store and len(group.waiting) <= QUEUE_PER_GROUP_MAX // 2:
                for at_s in heapq.nsmallest(REFILL_SECONDS, group.left_in_store):
                    group.left_in_store.discard(at_s)
                    self._schedule.add(at_s)
                refilled = True
        return refilled
