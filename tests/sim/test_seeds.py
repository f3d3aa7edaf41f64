"""Seeds of the whole simulation. ``SIM_SEEDS`` sets how many, ``SIM_FIRST`` where to begin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.plan import make_plan
from tests.sim.runs import Totals, failure_text, run_seed

ROOT = Path(__file__).resolve().parents[2]
FIRST = int(os.environ.get("SIM_FIRST", "0"))
SEEDS = int(os.environ.get("SIM_SEEDS", "120"))
CHUNK = 20
ACKNOWLEDGED_PER_SEED_MIN = 50
"""The floor of useful work: a simulation in which nothing happens finds nothing."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, CHUNK))
def test_seeds(first: int) -> None:
    totals = Totals()
    for seed in range(first, min(first + CHUNK, FIRST + SEEDS)):
        outcome = run_seed(seed)
        assert not outcome.violations, failure_text(outcome)
        totals.add(outcome)
    assert totals.acknowledged >= ACKNOWLEDGED_PER_SEED_MIN * totals.seeds
    assert totals.tenures > totals.seeds, "hardly any node was ever deposed"
    assert totals.faults > totals.seeds


def test_a_seed_is_the_same_run_in_every_process() -> None:
    """Another process, with other hashes of strings and other addresses, makes the very same trace."""
    for seed in (3, 8, 19):
        found = {run_seed(seed).trace}
        for hash_seed in ("1", "2"):
            code = f"from tests.sim.runs import run_seed; print(run_seed({seed}).trace)"
            environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
            command = [sys.executable, "-c", code]
            ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            found.add(ran.stdout.strip())
        assert len(found) == 1, f"seed {seed} ran differently: {found}"


def test_seeds_differ() -> None:
    plans = [make_plan(seed) for seed in range(200)]
    kinds = {event.what for plan in plans for event in plan.events}
    assert len(kinds) > 10
    assert {fault for plan in plans for fault in plan.faults} >= {"request:late", "answer:reset", "request:duplicated"}
    assert {plan.nodes for plan in plans} == {2, 3}
