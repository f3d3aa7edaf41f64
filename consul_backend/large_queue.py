"""Where large batches wait for their turn: bounded, and left at the caller's deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from consul_backend.batching import Prepared
from consul_backend.deadline import at_deadline, passed, passed_under_way
from consul_backend.errors import BackendError, NotApplied, Overloaded
from consul_backend.position import Position
from consul_backend.wal import Head

_ENDED = "this node is no longer active: nothing was written"


@dataclass(eq=False)
class Job:
    """One batch and the caller that waits for it. ``sent``: its commit record is under way, or further."""

    writes: dict[str, Prepared]
    positions: Mapping[str, Position] | None
    future: asyncio.Future[Head]
    size_bytes: int
    sent: bool = False

    @classmethod
    def of(cls, writes: dict[str, Prepared], positions: Mapping[str, Position] | None) -> Job:
        """For the running loop."""
        size = sum([entry.record_bytes for entry in writes.values()])
        return cls(writes, positions, asyncio.get_running_loop().create_future(), size)

    def require_wanted(self) -> None:
        """Raises NotApplied when the caller has gone, or was told that its time ran out."""
        if self.future.done():
            raise NotApplied("nobody waits for this batch any more: nothing was written")

    def fail(self, error: BackendError) -> None:
        """The caller gets the error, unless it has an answer."""
        if not self.future.done():
            self.future.set_exception(error)


class LargeQueue:
    """``jobs_max`` jobs of ``bytes_max`` bytes together wait at most; a single one may be larger."""

    def __init__(self, jobs_max: int, bytes_max: int) -> None:
        self._jobs: deque[Job] = deque()
        self._jobs_max = jobs_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self._closed = False
        self.arrived = asyncio.Event()
        self.overloaded = 0
        self.overdue = 0

    def require_room(self, size_bytes: int) -> None:
        """Raises Overloaded; NotApplied after :meth:`close`."""
        if self._closed:
            raise NotApplied(_ENDED)
        if len(self._jobs) >= self._jobs_max or (self._jobs and self._bytes + size_bytes > self._bytes_max):
            self.overloaded += 1
            raise Overloaded(f"{len(self._jobs)} large batches of {self._bytes} bytes wait to be committed already")

    async def commit(self, job: Job) -> Head:
        """Queue a job and wait for what becomes of it. Cancelling, or the caller's deadline, takes it out, or leaves it
        unwanted (:meth:`Job.require_wanted`)."""
        self.require_room(job.size_bytes)
        timer = at_deadline(partial(self._overdue, job))
        self._jobs.append(job)
        self._bytes += job.size_bytes
        self.arrived.set()
        try:
            return await job.future
        except asyncio.CancelledError:
            self._withdraw(job)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def pop(self) -> Job:
        """The job whose turn it is. Raises IndexError."""
        job = self._jobs.popleft()
        self._bytes -= job.size_bytes
        return job

    def writes(self, key: str) -> bool:
        """Whether a job that waits writes the key."""
        return any(key in job.writes for job in self._jobs)

    def close(self) -> None:
        """The tenure is over: nothing that waits was written."""
        self._closed = True
        for job in self._jobs:
            job.fail(NotApplied(_ENDED))
        self._jobs.clear()

    def _withdraw(self, job: Job) -> None:
        with contextlib.suppress(ValueError):
            self._jobs.remove(job)
            self._bytes -= job.size_bytes

    def _overdue(self, job: Job) -> None:
        self._withdraw(job)
        if not job.sent:
            self.overdue += 1
        job.fail(passed_under_way() if job.sent else passed())

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        return {
            "large_queue": len(self._jobs),
            "large_queue_bytes": self._bytes,
            "large_overloaded": self.overloaded,
            "large_overdue": self.overdue,
        }

    def __len__(self) -> int:
        return len(self._jobs)
