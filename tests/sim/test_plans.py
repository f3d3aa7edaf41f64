"""What the seeds are: the same run everywhere, and no two alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from consul_backend.testing_faults import FAULTS
from tests.sim.plan import EVENTS, make_plan
from tests.sim.runs import run_seed

ROOT = Path(__file__).resolve().parents[2]


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
