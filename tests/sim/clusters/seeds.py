"""The seeds of several clusters: ``SIM_CLUSTER_SEEDS`` sets how many there are together, ``SIM_CLUSTER_FIRST`` where
they begin."""

from __future__ import annotations

import os

from tests.sim.clusters.plan import make_plan
from tests.sim.runs import SETS, Totals
from tests.sim.shares import Seeds

ACKNOWLEDGED_PER_SEED_MIN = 40


def judge(totals: Totals, seeds: range) -> None:
    """The floor of useful work and of trouble in a chunk."""
    assert totals.acknowledged >= ACKNOWLEDGED_PER_SEED_MIN * len(seeds)
    assert totals.happened["record applied"] > 50 * len(seeds)
    assert totals.faults > 3 * len(seeds)
    with_sessions = sum(make_plan(seed).sessions > 0 for seed in seeds)
    assert totals.happened["session read"] >= 20 * with_sessions
    assert totals.happened["session wrote"] >= 3 * with_sessions


SEEDS = Seeds(
    SETS,
    first=int(os.environ.get("SIM_CLUSTER_FIRST", "0")),
    count=int(os.environ.get("SIM_CLUSTER_SEEDS", "120")),
    shares=2,
    chunk=20,
    for_every_kind=60,
    more_first=20_000,
    judge=judge,
)
