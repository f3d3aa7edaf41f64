"""The cluster seeds of ``make test``, in two files of one share each, so that xdist spreads them over its workers.

``SIM_CLUSTER_SEEDS`` sets how many there are together, ``SIM_CLUSTER_FIRST`` where they begin.
"""

from __future__ import annotations

import functools
import os
import time

from tests.sim.clusters.plan import make_plan
from tests.sim.runs import SETS, Totals, failure_text, run_seeds

FIRST = int(os.environ.get("SIM_CLUSTER_FIRST", "0"))
SEEDS = int(os.environ.get("SIM_CLUSTER_SEEDS", "120"))
SHARES = 2
CHUNK = 20
SEEDS_FOR_EVERY_KIND = 60
MORE_FIRST = 20_000
"""Where seeds are taken from if a share has fewer."""

ACKNOWLEDGED_PER_SEED_MIN = 40
"""The floor of useful work: a simulation in which nothing happens finds nothing."""


def chunks(share: int) -> list[int]:
    """The first seed of each chunk of a share: every second chunk."""
    return list(range(FIRST, FIRST + SEEDS, CHUNK))[share::SHARES]


@functools.cache
def run_chunk(first: int) -> Totals:
    """Run a chunk's seeds, once; the first that fails ends it, with the command that replays it."""
    totals, started_s = Totals(SETS), time.perf_counter()
    seeds = range(first, min(first + CHUNK, FIRST + SEEDS))
    for outcome in run_seeds(seeds, SETS):
        assert not outcome.violations, failure_text(outcome, SETS)
        totals.add(outcome)
    print(totals.text(time.perf_counter() - started_s))
    assert totals.acknowledged >= ACKNOWLEDGED_PER_SEED_MIN * totals.seeds
    assert totals.happened["record applied"] > 50 * totals.seeds
    assert totals.faults > 3 * totals.seeds
    with_sessions = sum(make_plan(seed).sessions > 0 for seed in seeds)
    assert totals.happened["session read"] >= 20 * with_sessions
    assert totals.happened["session wrote"] >= 3 * with_sessions
    return totals


def share_totals(share: int) -> Totals:
    """Of the chunks of a share, run or not; of enough seeds for every kind of thing to happen."""
    totals = Totals(SETS)
    for first in chunks(share):
        totals.merge(run_chunk(first))
    for outcome in run_seeds(range(MORE_FIRST, MORE_FIRST + SEEDS_FOR_EVERY_KIND - totals.seeds), SETS):
        totals.add(outcome)
    return totals
