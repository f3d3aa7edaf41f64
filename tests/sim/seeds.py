"""The seeds of ``make test``, in four files of one share each, so that xdist spreads them over its workers.

``SIM_SEEDS`` sets how many there are together, ``SIM_FIRST`` where they begin.
"""

from __future__ import annotations

import functools
import os

from tests.sim.runs import Totals, failure_text, run_seeds

FIRST = int(os.environ.get("SIM_FIRST", "0"))
SEEDS = int(os.environ.get("SIM_SEEDS", "2000"))
SHARES = 4
CHUNK = 50
SEEDS_FOR_EVERY_KIND = 150
MORE_FIRST = 10_000
"""Where seeds are taken from if a share has fewer."""

ACKNOWLEDGED_PER_SEED_MIN = 30
"""The floor of useful work: a simulation in which nothing happens finds nothing."""


def chunks(share: int) -> list[int]:
    """The first seed of each chunk of a share (0 to 3): every fourth chunk."""
    return list(range(FIRST, FIRST + SEEDS, CHUNK))[share::SHARES]


@functools.cache
def run_chunk(first: int) -> Totals:
    """Run a chunk's seeds, once; the first that fails ends it, with the command that replays it."""
    totals = Totals()
    for outcome in run_seeds(range(first, min(first + CHUNK, FIRST + SEEDS))):
        assert not outcome.violations, failure_text(outcome)
        totals.add(outcome)
    assert totals.acknowledged >= ACKNOWLEDGED_PER_SEED_MIN * totals.seeds
    assert totals.tenures > 1.5 * totals.seeds, "hardly any node was ever deposed"
    assert totals.faults > 3 * totals.seeds
    return totals


def share_totals(share: int) -> Totals:
    """Of the chunks of a share, run or not; of enough seeds for every kind of thing to happen."""
    totals = Totals()
    for first in chunks(share):
        totals.merge(run_chunk(first))
    for outcome in run_seeds(range(MORE_FIRST, MORE_FIRST + SEEDS_FOR_EVERY_KIND - totals.seeds)):
        totals.add(outcome)
    return totals
