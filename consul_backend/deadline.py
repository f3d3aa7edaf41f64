"""By when a request wants its answer: set where the request arrives, obeyed wherever its write waits.

A deadline is a time of the running event loop (``loop.time()``). It travels with the task and the tasks that it starts,
through every layer, without being a parameter of each. It ends with its block: what a request left running in the
background is not bound by it.

=============================  ================================================================================
at the deadline a write is     its caller gets
=============================  ================================================================================
queued                         :class:`~consul_backend.errors.DeadlinePassed`: it is taken out, never applied
of a large batch, no commit    the same: its parts are voided
record sent
under way to the store         :class:`~consul_backend.errors.OutcomeUnknown`: the store goes on resolving it
=============================  ================================================================================

A read has nothing to say about its outcome: it is cancelled, ``GRACE_S`` later (:func:`time_limit`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

from consul_backend.errors import BackendError, DeadlinePassed, OutcomeUnknown

GRACE_S = 1.0
"""What a request has left at its deadline: its writes end by themselves then, and say how; the rest is cancelled."""


class _Deadline:
    __slots__ = ("at_s", "over")

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s
        self.over = False


_deadline: ContextVar[_Deadline | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(after_s: float) -> Iterator[None]:
    """Everything in the block is to be done ``after_s`` seconds from now; an earlier deadline stays in force."""
    at_s = asyncio.get_running_loop().time() + after_s
    outer_s = deadline_at()
    mine = _Deadline(at_s if outer_s is None else min(at_s, outer_s))
    token = _deadline.set(mine)
    try:
        yield
    finally:
        mine.over = True
        _deadline.reset(token)


class time_limit:
    """``async with``: :func:`deadline`, and the block is cancelled ``GRACE_S`` after it. Raises TimeoutError then.

    Every request has one. As a generator around ``asyncio.timeout`` it would cost three times as much; what is done
    here is what that does (a cancellation from elsewhere passes, ours becomes TimeoutError).
    """

    __slots__ = ("_after_s", "_cancelling", "_expired", "_mine", "_task", "_timer", "_token")

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a time limit is for a task")
        loop = asyncio.get_running_loop()
        at_s = loop.time() + self._after_s
        self._task, self._cancelling, self._expired = task, task.cancelling(), False
        self._timer = loop.call_at(at_s + GRACE_S, self._expire)
        outer_s = deadline_at()
        self._mine = _Deadline(at_s if outer_s is None else min(at_s, outer_s))
        self._token = _deadline.set(self._mine)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mine.over = True
        _deadline.reset(self._token)
        self._timer.cancel()
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()


def deadline_at() -> float | None:
    """The deadline of the running task, in the loop's time."""
    found = _deadline.get()
    return found.at_s if found is not None and not found.over else None


def remaining_s() -> float | None:
    """Seconds until the deadline, 0 when it has passed; None without one."""
    at_s = deadline_at()
    return None if at_s is None else max(0.0, at_s - asyncio.get_running_loop().time())


def at_deadline(act: Callable[[], None]) -> asyncio.TimerHandle | None:
    """Call ``act`` at the running task's deadline; cancel the timer when there is no more need. Raises DeadlinePassed
    when it has passed already."""
    at_s = deadline_at()
    if at_s is None:
        return None
    loop = asyncio.get_running_loop()
    if at_s <= loop.time():
        raise passed()
    return loop.call_at(at_s, act)


def passed() -> BackendError:
    """For a write that was never sent."""
    return DeadlinePassed("the request's time ran out before its write was sent: nothing was written")


def passed_under_way() -> BackendError:
    """For a write that was."""
    return OutcomeUnknown("the request's time ran out while its write was under way: it may have been applied")
