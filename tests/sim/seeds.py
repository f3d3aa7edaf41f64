"""The seeds of one cluster: ``SIM_SEEDS`` sets how many there are together, ``SIM_FIRST`` where they begin."""

from __future__ import annotations

import os

from tests.sim.runs import SINGLE, Totals
from tests.sim.shares import Seeds

ACKNOWLEDGED_PER_SEED_MIN = 30


def judge(totals: Totals, seeds: range) -> None:
    """The floor of useful work and of trouble in a chunk."""
    assert totals.acknowledged >= ACKNOWLEDGED_PER_SEED_MIN * len(seeds)
    assert totals.tenures > 1.5 * len(seeds), "hardly any node was ever deposed"
    assert totals.faults > 3 * len(seeds)


SEEDS = Seeds(
    SINGLE,
    first=int(os.environ.get("SIM_FIRST", "0")),
    count=int(os.environ.get("SIM_SEEDS", "2000")),
    shares=4,
    chunk=50,
    for_every_kind=150,
    more_first=10_000,
    judge=judge,
)
