"""What the seeds are: the same run everywhere, no two alike, and everything that can happen does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from consul_backend.testing_faults import FAULTS
from tests.sim.plan import EVENTS, make_plan
from tests.sim.runs import Totals, run_seed, run_seeds

ROOT = Path(__file__).resolve().parents[2]
COUNTED = 150

SEEN = (
    # what the store does, as the witness sees it in the transactions
    *("data record", "tenure record", "part record", "commit record", "roll record", "abort record", "chunk"),
    *("flush", "checkpoint", "collect", "collect chunks", "repair"),
    # what comes of the nemesis
    *("reindexed", "quarantined", "restored", "foreign read", "restore", "halt", "same name"),
)


@pytest.mark.timeout(300)
def test_every_kind_of_thing_happens() -> None:
    """Every act of the nemesis, every fault of a call, and every kind of work of the store, over few seeds."""
    totals = Totals()
    for outcome in run_seeds(range(10_000, 10_000 + COUNTED)):
        totals.add(outcome)
    missing = [kind for kind in (*EVENTS, *FAULTS, *SEEN) if not totals.happened[kind]]
    assert not missing, f"never happened in {COUNTED} seeds: {missing}; what did: {dict(totals.happened)}"


def test_a_seed_is_the_same_run_in_every_process() -> None:
    """Another process, with other hashes of strings and other addresses, makes the very same trace."""
    seeds = [3, 8, 19, 20, 21]
    code = f"from tests.sim.runs import run_seeds; print([found.trace for found in run_seeds({seeds})])"
    found = {str([run_seed(seed).trace for seed in seeds])}
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.add(ran.stdout.strip())
    assert len(found) == 1, f"the seeds ran differently: {found}"


def test_plans_differ() -> None:
    plans = [make_plan(seed) for seed in range(300)]
    assert {event.what for plan in plans for event in plan.events} == set(EVENTS)
    assert {fault for plan in plans for fault in plan.faults} == set(FAULTS)
    assert {plan.nodes for plan in plans} == {2, 3}
    assert any(plan.same_name for plan in plans)
    assert any(plan.snapshot_at_s is not None for plan in plans)
    assert any(plan.large_share for plan in plans)
    assert len({plan.describe().partition(":")[2] for plan in plans}) == len(plans)
