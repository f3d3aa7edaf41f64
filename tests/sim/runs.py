"""Running seeds: one by one, many, with a planted bug, and cutting a failing one down."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from consul_backend.testing_faults import FAULTS
from tests.sim.bugs import BUGS
from tests.sim.clusters.bugs import SET_BUGS
from tests.sim.clusters.focus import focused as focused_set
from tests.sim.clusters.plan import EVENTS as SET_EVENTS
from tests.sim.clusters.plan import TAMPERING
from tests.sim.clusters.plan import make_plan as make_set_plan
from tests.sim.clusters.world import simulate_set
from tests.sim.focus import focused
from tests.sim.loop import PROCESS
from tests.sim.plan import EVENTS, make_plan
from tests.sim.trial import Outcome
from tests.sim.world import simulate

LOGGERS = ("core", "replication", "sidecar.replication")
COLLECT_EVERY = 10
"""Seeds between two collections of garbage."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A simulation. ``flag`` chooses it on the command line; ``faults`` are the kinds of trouble that it counts."""

    flag: str
    make_plan: Callable[[int], Any]
    simulate: Callable[..., Outcome]
    bugs: Mapping[str, Any]
    focused: Callable[[int, Any], Any]
    faults: tuple[str, ...]

    @contextmanager
    def planted(self, name: str) -> Iterator[None]:
        """The code with one bug in it."""
        with ExitStack() as stack:
            self.bugs[name].plant(stack)
            yield


SINGLE = Kind("", make_plan, simulate, BUGS, focused, (*EVENTS, *FAULTS, "restore"))
"""One cluster."""
SETS = Kind("--clusters ", make_set_plan, simulate_set, SET_BUGS, focused_set, (*SET_EVENTS, *TAMPERING, *FAULTS))
"""Several clusters that replicate."""


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


def run_seeds(seeds: Iterable[int], kind: Kind = SINGLE) -> Iterator[Outcome]:
    """One outcome per seed, silently."""
    with quiet():
        for count, seed in enumerate(seeds, 1):
            yield kind.simulate(kind.make_plan(seed))
            if count % COLLECT_EVERY == 0:
                gc.collect()


def run_seed(seed: int, kind: Kind = SINGLE) -> Outcome:
    """One seed, silently."""
    return next(iter(list(run_seeds([seed], kind))))


def catch(name: str, seeds_max: int, kind: Kind = SINGLE, *, muted: str = "") -> Outcome | None:
    """The first run that fails with this bug planted, or None: the simulation is blind to it. ``muted``: without what
    that checker says."""
    with kind.planted(name), quiet():
        for seed in range(seeds_max):
            outcome = kind.simulate(replace(kind.focused(seed, kind.bugs[name].focus), muted=frozenset({muted})))
            if outcome.violations:
                return outcome
    return None


def failure_text(outcome: Outcome, kind: Kind = SINGLE) -> str:
    """What to print for a failing seed."""
    violations = "\n".join(f"  {violation}" for violation in outcome.violations[:5])
    return f"seed {outcome.seed} fails; replay it with: python -m tests.sim {kind.flag}{outcome.seed}\n{violations}"


@dataclass(slots=True)
class Totals:
    """Of many seeds."""

    kind: Kind = SINGLE
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

    def merge(self, other: Totals) -> None:
        """Those of other seeds."""
        self.seeds += other.seeds
        self.simulated_s += other.simulated_s
        self.acknowledged += other.acknowledged
        self.reads += other.reads
        self.tenures += other.tenures
        self.steps += other.steps
        self.happened.update(other.happened)

    def never(self, kinds: Iterable[str]) -> str:
        """Which of ``kinds`` never happened, in words; empty if all did."""
        missing = [kind for kind in kinds if not self.happened[kind]]
        return f"never happened in {self.seeds} seeds: {missing}; what did: {dict(self.happened)}" if missing else ""

    @property
    def faults(self) -> int:
        """Acts of the nemesis and faults of single calls."""
        return sum(self.happened[fault] for fault in self.kind.faults)

    def text(self, elapsed_s: float) -> str:
        """In one line."""
        return (
            f"{self.seeds} seeds in {elapsed_s:.1f} s ({self.seeds / elapsed_s:.1f}/s), {self.simulated_s / 3600:.2f}"
            f" simulated hours ({self.simulated_s / elapsed_s:.0f}x), {self.acknowledged} acknowledged writes,"
            f" {self.reads} reads, {self.tenures} tenures, {self.faults} faults, {self.steps} steps"
        )


def replay(plan: Any, kind: Kind = SINGLE) -> Outcome:
    """One plan with a log of everything, the lines of production code included."""
    worlds: list[Any] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            process = PROCESS.get()
            who = process.name if process is not None else "-"
            world = worlds[-1]
            world.lines.append(f"{world.loop.time():9.4f}   [{who}] {record.name}: {record.getMessage()}")

    with ExitStack() as stack:
        handler = Lines()
        for name in LOGGERS:
            _listen(stack, logging.getLogger(name), handler)
        return kind.simulate(plan, verbose=True, watch=worlds.append)


def _listen(stack: ExitStack, logger: logging.Logger, handler: logging.Handler) -> None:
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    stack.callback(logger.removeHandler, handler)
    stack.callback(logger.setLevel, level)
    stack.callback(setattr, logger, "propagate", propagate)


def shrink(plan: Any, kind: Kind = SINGLE) -> Any:
    """Leave out acts of the nemesis as long as the plan still fails by the same checker."""
    with quiet():
        wanted = {violation.checker for violation in kind.simulate(plan).violations}
        if not wanted:
            return plan
        count = len(plan.events)
        size = max(1, count // 2)
        while size:
            for start in range(0, count, size):
                smaller = replace(plan, skipped=plan.skipped | set(range(start, min(start + size, count))))
                if smaller.skipped != plan.skipped and wanted & {
                    it.checker for it in kind.simulate(smaller).violations
                }:
                    plan = smaller
            size //= 2
    return plan
