"""Running seeds: one by one, many, with a planted bug, and cutting a failing one down."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from consul_backend.testing_faults import FAULTS
from tests.sim.bugs import BUGS, planted
from tests.sim.focus import focused
from tests.sim.loop import PROCESS
from tests.sim.plan import EVENTS, Plan, make_plan
from tests.sim.world import Outcome, World, simulate

COLLECT_EVERY = 10
"""Seeds between two collections of garbage."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the store's log, and without the garbage collector between callbacks. Worth it for many seeds together:
    what is there already is not looked through again."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        logging.disable(disabled)
        gc.unfreeze()
        if collecting:
            gc.enable()


def run_seeds(seeds: Iterable[int]) -> Iterator[Outcome]:
    """One outcome per seed, silently."""
    with quiet():
        for count, seed in enumerate(seeds, 1):
            yield simulate(make_plan(seed))
            if count % COLLECT_EVERY == 0:
                gc.collect()


def run_seed(seed: int) -> Outcome:
    """One seed, silently."""
    return next(iter(list(run_seeds([seed]))))


def catch(name: str, seeds_max: int, *, muted: str = "") -> Outcome | None:
    """The first run that fails with this bug planted, or None: the simulation is blind to it. ``muted``: without what
    that checker says."""
    with planted(name), quiet():
        for seed in range(seeds_max):
            outcome = simulate(replace(focused(seed, BUGS[name].focus), muted=frozenset({muted})))
            if outcome.violations:
                return outcome
    return None


def failure_text(outcome: Outcome) -> str:
    """What to print for a failing seed."""
    violations = "\n".join(f"  {violation}" for violation in outcome.violations[:5])
    return f"seed {outcome.seed} fails; replay it with: python -m tests.sim {outcome.seed}\n{violations}"


@dataclass(slots=True)
class Totals:
    """Of many seeds."""

    seeds: int = 0
    simulated_s: float = 0.0
    acknowledged: int = 0
    reads: int = 0
    tenures: int = 0
    steps: int = 0
    happened: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """One more."""
        self.seeds += 1
        self.simulated_s += outcome.simulated_s
        self.acknowledged += outcome.acknowledged
        self.reads += outcome.reads
        self.tenures += outcome.tenures
        self.steps += outcome.steps
        self.happened.update(outcome.happened)

    @property
    def faults(self) -> int:
        """Acts of the nemesis and faults of single calls."""
        return sum(self.happened[kind] for kind in (*EVENTS, *FAULTS, "restore"))

    def text(self, elapsed_s: float) -> str:
        """In one line."""
        return (
            f"{self.seeds} seeds in {elapsed_s:.1f} s ({self.seeds / elapsed_s:.1f}/s), {self.simulated_s / 3600:.2f}"
            f" simulated hours ({self.simulated_s / elapsed_s:.0f}x), {self.acknowledged} acknowledged writes,"
            f" {self.reads} reads, {self.tenures} tenures, {self.faults} faults, {self.steps} steps"
        )


def replay(plan: Plan) -> Outcome:
    """One plan with a log of everything, the store's own lines included."""
    worlds: list[World] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            process = PROCESS.get()
            who = process.name if process is not None else "-"
            world = worlds[-1]
            world.lines.append(f"{world.loop.time():9.4f}   [{who}] {record.name}: {record.getMessage()}")

    handler, logger = Lines(), logging.getLogger("core")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    propagate, logger.propagate = logger.propagate, False
    try:
        return simulate(plan, verbose=True, watch=worlds.append)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def shrink(plan: Plan) -> Plan:
    """Leave out acts of the nemesis as long as the plan still fails by the same checker."""
    with quiet():
        wanted = {violation.checker for violation in simulate(plan).violations}
        if not wanted:
            return plan
        count = len(plan.events)
        size = max(1, count // 2)
        while size:
            for start in range(0, count, size):
                smaller = replace(plan, skipped=plan.skipped | set(range(start, min(start + size, count))))
                if smaller.skipped != plan.skipped and wanted & {it.checker for it in simulate(smaller).violations}:
                    plan = smaller
            size //= 2
    return plan
