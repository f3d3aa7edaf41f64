"""One device at work: a thread of its own that writes lines in the order they were handed over.

The thread is a daemon: a write that hangs for ever must not keep the process from ending. What waits is bounded; once
the bound is reached, further lines fail at once.

Waking a thread costs more than writing a line. So the thread gets all lines of one turn of the event loop together, and
while it writes, whatever comes waits to be its next write.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass, field

from sidecar.core.audit.entries import Formatting
from sidecar.core.audit.sink import Sink, SinkError

log = logging.getLogger("audit")

QUEUE_BYTES_MAX = 16 * 2**20
_BATCH_BYTES = 256 * 1024

Outcome = str | None
"""What was wrong, or None."""


@dataclass(slots=True)
class _Job:
    """A line to write; or, without one, the wish to reopen (``last`` False) or to end."""

    done: asyncio.Future[Outcome]
    line: bytes = field(default=b"", repr=False)
    last: bool = False


class Device:
    """Made and used on the event loop. ``how`` is for who makes the lines. ``error`` is what was wrong with the newest
    line, ``stalled`` says that a line was waited for in vain and none was written since."""

    def __init__(self, name: str, how: Formatting, sink: Sink, *, queue_bytes_max: int = QUEUE_BYTES_MAX) -> None:
        self.name = name
        self.how = how
        self.error: Outcome = None
        self.stalled = False
        self._sink = sink
        self._queue_bytes_max = queue_bytes_max
        self._queued_bytes = 0
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Job] = deque()
        self._busy = False
        self._jobs: queue.SimpleQueue[list[_Job]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def failing(self) -> bool:
        """Whether the newest thing known of the device is a failure."""
        return self.stalled or self.error is not None

    def submit(self, line: bytes) -> asyncio.Future[Outcome]:
        """Hand over one line; the future tells how it went and never raises."""
        if self._closed:
            return self._answered("the device is closed")
        if self._queued_bytes and self._queued_bytes + len(line) > self._queue_bytes_max:
            self._note("too much waits to be written")
            return self._answered("too much waits to be written")
        self._queued_bytes += len(line)
        return self._put(line)

    def ask_to_reopen(self) -> None:
        """After the lines handed over before: close the file or connection and open it again."""
        if not self._closed:
            _ = self._put()

    def close(self) -> asyncio.Future[Outcome]:
        """After the lines handed over before: let go of everything. Nothing needs to wait for it."""
        if self._closed:
            return self._answered(None)
        self._closed = True
        return self._answered(None) if self._thread is None else self._put(last=True)

    def stall(self) -> None:
        """Its newest line was waited for in vain."""
        if not self.stalled:
            log.error("audit device %s hangs; it is not waited for while another one works", self.name)
        self.stalled = True

    def _put(self, line: bytes = b"", *, last: bool = False) -> asyncio.Future[Outcome]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"audit {self.name}", daemon=True)
            self._thread.start()
        job = _Job(self._loop.create_future(), line, last)
        self._waiting.append(job)
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._hand_over)
        return job.done

    def _hand_over(self) -> None:
        """Give the thread what waits: lines, up to a size, or one wish."""
        waiting = self._waiting
        jobs = [waiting.popleft()]
        size = len(jobs[0].line)
        while size and waiting and waiting[0].line and size < _BATCH_BYTES:
            job = waiting.popleft()
            jobs.append(job)
            size += len(job.line)
        self._jobs.put(jobs)

    def _answered(self, outcome: Outcome) -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = self._loop.create_future()
        future.set_result(outcome)
        return future

    def _note(self, outcome: Outcome) -> None:
        if outcome is not None and self.error is None:
            log.error("audit device %s fails: %s", self.name, outcome)
        if outcome is None and self.failing:
            log.warning("audit device %s works again", self.name)
            self.stalled = False
        self.error = outcome

    def _finish(self, jobs: list[_Job], outcome: Outcome) -> None:
        self._busy = bool(self._waiting)
        if self._busy:
            self._hand_over()
        for job in jobs:
            self._queued_bytes -= len(job.line)
            if not job.done.done():
                job.done.set_result(outcome)
        if not jobs[-1].last:
            self._note(outcome)

    # -- in the thread

    def _work(self) -> None:
        ended = False
        while not ended:
            jobs = self._jobs.get()
            ended = jobs[0].last
            outcome = self._tried(jobs)
            try:
                self._loop.call_soon_threadsafe(self._finish, jobs, outcome)
            except RuntimeError:
                return  # the loop has ended, and with it everybody who could ask

    def _tried(self, jobs: list[_Job]) -> Outcome:
        try:
            if jobs[0].line:
                self._sink.write([job.line for job in jobs])
            elif jobs[0].last:
                self._sink.close()
            else:
                self._sink.reopen()
        except SinkError as error:
            return str(error)
        except OSError as error:
            return error.strerror or type(error).__name__
        except Exception as error:  # the thread's edge: it must answer, or everybody would wait for nothing
            log.exception("audit device %s: defect", self.name)
            return type(error).__name__
        return None
