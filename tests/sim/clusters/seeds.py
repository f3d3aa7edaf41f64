"""The cluster seeds of ``make test``, in two files of one share each, so that xdist spreads them over its workers.

``SIM_CLUSTER_SEEDS`` sets how many there are together, ``SIM_CLUSTER_FIRST`` where they begin.
"""

from __future__ import annotations

import os
import time

from tests.sim.runs import SETS, Totals, failure_text, run_seeds

FIRST = int(os.environ.get("SIM_CLUSTER_FIRST", "0"))
SEEDS = int(os.environ.get("SIM_CLUSTER_SEEDS", "120"))
SHARES = 2
CHUNK = 20
ACKNOWLEDGED_PER_SEED_MIN = 40
"""The floor of useful work: a simulation in which nothing happens finds nothing."""


def chunks(share: int) -> list[int]:
    """The first seed of each chunk of a share: every second chunk."""
    return list(range(FIRST, FIRST + SEEDS, CHUNK))[share::SHARES]


def run_chunk(first: int) -> Totals:
    """Run a chunk's seeds; the first that fails ends it, with the command that replays it."""
    totals, started_s = Totals(SETS), time.perf_counter()
    for outcome in run_seeds(range(first, min(first + CHUNK, FIRST + SEEDS)), SETS):
        assert not outcome.violations, failure_text(outcome, SETS)
        totals.add(outcome)
    print(totals.text(time.perf_counter() - started_s))
    assert totals.acknowledged >= ACKNOWLEDGED_PER_SEED_MIN * totals.seeds
    assert totals.happened["record applied"] > 50 * totals.seeds
    assert totals.faults > 3 * totals.seeds
    return totals
