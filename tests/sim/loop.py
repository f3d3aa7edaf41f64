"""An event loop that owns time and order: nothing waits for the operating system, and a seed decides who runs next.

Every task belongs to a :class:`Process` (by its context) or to none, which is the outside world. A paused process is
what SIGSTOP makes of one: none of its callbacks run, its timers fire late, the rest of the world goes on. A killed one
never runs again, not even its ``finally`` blocks.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import random
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any

STEPS_WITHOUT_TIME_MAX = 200_000


class Deadlock(AssertionError):
    """Everyone waits and no timer is set."""


class Livelock(AssertionError):
    """The loop is busy and time does not pass."""


class Process:
    """A node's operating system process. Never reused: a restart makes another one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.paused = False
        self.killed = False
        self._parked: list[asyncio.Handle] = []
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine, and all that it starts, in this process."""
        return asyncio.get_running_loop().create_task(work, context=self._context.copy())

    def park(self, handle: asyncio.Handle) -> None:
        """Keep a callback that may not run now."""
        self._parked.append(handle)

    def resume(self) -> list[asyncio.Handle]:
        """What has become due meanwhile, in order."""
        parked, self._parked = self._parked, []
        return parked


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("PROCESS", default=None)


class _Numbered:
    """Hashed by a number, given when it is first asked for: asyncio keeps tasks and futures in sets, whose order must
    depend neither on memory nor on the runs before."""

    numbers = itertools.count()
    __slots__ = ()

    def __hash__(self) -> int:
        try:
            return self.number  # type: ignore[has-type, no-any-return]  # a slot of the classes below
        except AttributeError:
            self.number = next(_Numbered.numbers)
            return self.number


class SimTask(_Numbered, asyncio.Task):  # type: ignore[type-arg]  # the result's type is the coroutine's
    """A task with a number."""

    __slots__ = ("number",)


class SimFuture(_Numbered, asyncio.Future):  # type: ignore[type-arg]  # the result's type is the caller's
    """A future with a number."""

    __slots__ = ("number",)


class SimHandle(asyncio.Handle):
    """A callback; asyncio's, without what only its debug mode needs."""

    __slots__ = ()

    def __init__(
        self,
        callback: Callable[..., object],
        args: Sequence[Any],
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context | None,
    ) -> None:
        self._callback: Any = callback
        self._args: Any = args
        self._loop = loop
        self._context = context if context is not None else contextvars.copy_context()
        self._cancelled = False
        self._repr = None
        self._source_traceback = None

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = self._args = None


class SimTimer(SimHandle, asyncio.TimerHandle):
    """A callback for later."""

    __slots__ = ()

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: Sequence[Any],
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context | None,
    ) -> None:
        super().__init__(callback, args, loop, context)
        self._when = when
        self._scheduled = True


class SimLoop(asyncio.BaseEventLoop):
    """``shuffle`` explores the orders of callbacks that are ready at one time; without, they run as asyncio's do."""

    def __init__(self, seed: int, *, shuffle: bool) -> None:
        super().__init__()
        self._clock_resolution = 1e-9
        _Numbered.numbers = itertools.count()
        self._now = 0.0
        self._random = random.Random(f"loop {seed}")
        self._shuffle = shuffle
        self._timers: list[tuple[float, int, SimTimer]] = []
        self._timer_numbers = itertools.count()
        self.steps = 0
        self._idle_steps = 0
        self.errors: list[dict[str, Any]] = []
        self.set_task_factory(_new_task)
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return self._now

    def create_future(self) -> SimFuture:
        return SimFuture(loop=self)

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> SimHandle:
        handle = SimHandle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> SimTimer:
        when = self._now + delay
        timer = SimTimer(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._timer_numbers), timer))
        return timer

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> SimTimer:
        """As asyncio's; timers of one moment run in the order in which they were set."""
        timer = SimTimer(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._timer_numbers), timer))
        return timer

    def unpause(self, process: Process) -> None:
        """Let a paused process go on."""
        process.paused = False
        self._ready.extend(process.resume())

    def bury(self, process: Process) -> None:
        """Let a killed process unwind, after the simulation: its connections must be dead."""
        process.killed = process.paused = False
        self._ready.extend(process.resume())

    def _run_once(self) -> None:
        """Rounds until the loop is to stop: a round is every callback that is ready when it begins.

        Each step's time counts, there are thousands in a seed: so a callback is called here, not by its handle.
        """
        ready, timers, shuffle = self._ready, self._timers, self._random.shuffle if self._shuffle else None
        while not self._stopping:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not ready:
                if not timers:
                    raise Deadlock("every task waits and no timer is set")
                self._now = max(self._now, timers[0][0])
                self._idle_steps = 0
            while timers and timers[0][0] <= self._now:
                ready.append(heapq.heappop(timers)[2])
            batch = list(ready)
            ready.clear()
            if shuffle is not None and len(batch) > 1:
                shuffle(batch)
            self.steps += len(batch)
            self._idle_steps += 1
            if self._idle_steps > STEPS_WITHOUT_TIME_MAX:
                raise Livelock(f"{self._idle_steps} rounds at time {self._now}")
            for handle in batch:
                if handle._cancelled:
                    continue
                context = handle._context
                process = context.get(PROCESS)
                if process is not None and (process.paused or process.killed):
                    process.park(handle)
                    continue
                try:
                    context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # as asyncio's handles do: told to whoever owns the loop
                    self.call_exception_handler({"message": f"exception in {handle!r}", "exception": error})

    def _process_events(self, event_list: list[Any]) -> None:
        raise AssertionError("a simulated loop has no files")

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector."""


def _new_task(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, Any] | Generator[Any, Any, Any],
    context: contextvars.Context | None = None,
) -> SimTask:
    return SimTask(work, loop=loop, context=context)


class NodeClock:
    """A node's own clock: ``rate`` is how fast it counts, ``step_ms`` what its wall clock was moved by."""

    def __init__(self, loop: SimLoop, *, rate: float, started_s: float) -> None:
        self._loop = loop
        self._rate = rate
        self._started_s = started_s
        self.step_ms = 0

    def monotonic(self) -> float:
        return self._started_s + self._loop.time() * self._rate

    def time_ms(self) -> int:
        return 1_700_000_000_000 + int(self._loop.time() * 1000.0) + self.step_ms
