"""``python -m tests.sim SEED [--shrink]`` replays a seed with its log; ``--soak [--from SEED]`` runs seeds until it is
stopped, ``--seeds N`` that many; ``--bugs`` shows how soon each planted bug is caught. With ``--clusters`` all of that
is about several clusters that replicate. Exit code 1 if a seed failed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

from tests.sim.runs import SETS, SINGLE, Kind, Totals, catch, failure_text, replay, run_seeds, shrink

REPORT_EVERY_S = 10.0
BUG_SEEDS_MAX = 60
LINES_SHOWN = 200


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="replay this seed, with its log")
    parser.add_argument("--shrink", action="store_true", help="first leave out faults that the failure does not need")
    parser.add_argument("--lines", type=int, default=LINES_SHOWN, help="of the log, how many to show")
    parser.add_argument("--soak", action="store_true", help="run until stopped")
    parser.add_argument("--seeds", type=int, default=0, help="run this many")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--clusters", action="store_true", help="several clusters that replicate, not one")
    parser.add_argument("--bug", choices=sorted([*SINGLE.bugs, *SETS.bugs]), help="with this bug planted")
    parser.add_argument("--bugs", action="store_true", help="show how soon each planted bug is caught")
    options = parser.parse_args(arguments)
    kind = SETS if options.clusters else SINGLE
    if options.bugs:
        return show_bugs(kind)
    if options.bug is not None:
        if options.bug not in kind.bugs:
            parser.error(f"{options.bug} is a bug of the other simulation: see --clusters")
        with kind.planted(options.bug):
            return run(options, kind)
    return run(options, kind)


def run(options: argparse.Namespace, kind: Kind) -> int:
    """Replay or many seeds."""
    if options.seed is not None:
        return show(options.seed, kind, shrinking=options.shrink, lines=options.lines)
    if not options.soak and not options.seeds:
        options.seeds = 100
    seeds = itertools.count(options.first)
    return run_many(seeds if options.soak else itertools.islice(seeds, options.seeds), kind)


def show(seed: int, kind: Kind, *, shrinking: bool, lines: int) -> int:
    """Replay one seed."""
    plan = kind.make_plan(seed)
    if shrinking:
        plan = shrink(plan, kind)
    print(plan.describe())
    outcome = replay(plan, kind)
    print("\n".join(outcome.log[-lines:]))
    print(f"trace {outcome.trace}, {outcome.simulated_s:.1f} simulated seconds")
    for violation in outcome.violations:
        print(f"VIOLATION {violation}")
    return 1 if outcome.violations else 0


def run_many(seeds: itertools.islice[int] | itertools.count[int], kind: Kind) -> int:
    """Seeds in order; stops at the first failing one."""
    totals, started_s = Totals(kind), time.perf_counter()
    reported_s = started_s
    try:
        for outcome in run_seeds(seeds, kind):
            totals.add(outcome)
            if outcome.violations:
                print(failure_text(outcome, kind))
                return 1
            if time.perf_counter() - reported_s > REPORT_EVERY_S:
                reported_s = time.perf_counter()
                print(totals.text(reported_s - started_s), flush=True)
    except KeyboardInterrupt:
        print()
    print(totals.text(time.perf_counter() - started_s))
    return 0


def show_bugs(kind: Kind) -> int:
    """For each planted bug: the first seed that catches it, by what, and how long that took."""
    missed = 0
    for name in kind.bugs:
        started_s = time.perf_counter()
        outcome = catch(name, BUG_SEEDS_MAX, kind)
        if outcome is None:
            missed += 1
            text = f"NOT CAUGHT in {BUG_SEEDS_MAX} seeds"
        else:
            text = f"seed {outcome.seed}, {str(outcome.violations[0])[:100]}"
        print(f"{name:45} {time.perf_counter() - started_s:6.1f} s  {text}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
