"""What every simulated world has, whatever happens in it: violations, counts, a log, a trace and a way to its end."""

from __future__ import annotations

import abc
import asyncio
import hashlib
from collections.abc import Collection, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.sim.loop import Deadlock, Livelock, SimLoop
from tests.sim.witness import Violation

UNWINDING_STEPS_MAX = 200


@dataclass(slots=True)
class Outcome:
    """A finished run. ``trace`` is equal for equal runs; ``happened`` counts acts of the nemesis, faults of calls, and
    what the stores were seen to do, by kind."""

    seed: int
    violations: list[Violation]
    trace: str
    simulated_s: float
    steps: int
    acknowledged: int
    reads: int
    tenures: int
    healed_after_s: float
    happened: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


class Trial(abc.ABC):
    """One seed's. What the checkers of ``muted`` say does not count; ``verbose`` keeps a log of what happened."""

    def __init__(self, seed: int, loop: SimLoop, *, muted: Collection[str], verbose: bool) -> None:
        self.loop = loop
        self.violations: list[Violation] = []
        self.lines: list[str] = []
        self.happened: dict[str, int] = {}
        self.healed_s: float | None = None
        self._seed = seed
        self._muted = muted
        self._verbose = verbose
        self._over = asyncio.Event()
        self._trace = hashlib.blake2b(digest_size=8)
        self._outside: set[asyncio.Task[Any]] = set()

    @abc.abstractmethod
    async def run(self) -> None:
        """From the first record to the last fault's end."""

    @abc.abstractmethod
    async def judge(self) -> None:
        """Stop everything; the checkers judge."""

    @abc.abstractmethod
    def outcome(self) -> Outcome:
        """The run in figures."""

    @abc.abstractmethod
    async def bury(self) -> None:
        """Leave nothing behind in this interpreter."""

    def to_the_end(self) -> Outcome:
        """Run it, judge it, and clear away."""
        try:
            self.loop.run_until_complete(self.run())
            self.loop.run_until_complete(self.judge())
        except (Deadlock, Livelock) as error:
            self.report(Violation("P14", repr(error)))
        outcome = self.outcome()
        self.loop.run_until_complete(self.bury())
        return outcome

    # -- what the others tell

    def report(self, violation: Violation) -> None:
        """Something does not hold; the run ends."""
        if violation.checker in self._muted:
            return
        self.violations.append(violation)
        self.log(f"VIOLATION {violation}")
        self._over.set()

    def log(self, text: str) -> None:
        """For whoever replays the seed; part of the trace."""
        self.note(text)
        if self._verbose:
            self.lines.append(f"{self.loop.time():9.4f} {text}")

    def note(self, text: str) -> None:
        """Part of the trace only."""
        self._trace.update(f"{self.loop.time():.9f} {text}\n".encode())

    def count(self, what: str) -> None:
        """Something of this kind happened."""
        self.happened[what] = self.happened.get(what, 0) + 1

    # -- for the worlds

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Outside every process."""
        task = self.loop.create_task(work)
        self._outside.add(task)
        task.add_done_callback(self._outside.discard)
        return task

    def _figures(self, *, acknowledged: int, reads: int, tenures: int, happened: dict[str, int]) -> Outcome:
        now_s = self.loop.time()
        return Outcome(
            seed=self._seed,
            violations=self.violations,
            trace=self._trace.hexdigest(),
            simulated_s=now_s,
            steps=self.loop.steps,
            acknowledged=acknowledged,
            reads=reads,
            tenures=tenures,
            healed_after_s=now_s - self.healed_s if self.healed_s is not None else 0.0,
            happened=happened,
            log=self.lines,
        )

    async def _unwind(self) -> None:
        """Cancel whatever still runs, also what starts while others end."""
        for _ in range(UNWINDING_STEPS_MAX):
            left = asyncio.all_tasks(self.loop) - {asyncio.current_task()}
            if not left:
                return
            for task in left:
                task.cancel()
            await asyncio.sleep(0.01)


@contextmanager
def simulated_loop(seed: int, *, shuffle: bool) -> Iterator[SimLoop]:
    """The loop of one seed, current until the block ends."""
    loop = SimLoop(seed, shuffle=shuffle)
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()
