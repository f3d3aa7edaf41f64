"""What the cluster seeds are: the same run everywhere, and no two alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.sim.clusters.plan import EVENTS, TAMPERING, TOPOLOGIES, make_plan
from tests.sim.runs import SETS, run_seed

ROOT = Path(__file__).resolve().parents[3]


def test_a_seed_is_the_same_run_in_every_process() -> None:
    """Another process, with other hashes of strings and other addresses, makes the very same trace."""
    seeds = [1, 2, 3, 5, 8, 13]
    code = f"from tests.sim.runs import SETS, run_seeds; print([found.trace for found in run_seeds({seeds}, SETS)])"
    found = {str([run_seed(seed, SETS).trace for seed in seeds])}
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.add(ran.stdout.strip())
    assert len(found) == 1, f"the seeds ran differently: {found}"


def test_plans_differ() -> None:
    plans = [make_plan(seed) for seed in range(300)]
    assert {event.what for plan in plans for event in plan.events} == set(EVENTS)
    assert {plan.topology for plan in plans} == set(TOPOLOGIES)
    assert {damage for plan in plans for damage in plan.link.tampering} == set(TAMPERING)
    assert {plan.nodes for plan in plans} == {1, 2}
    assert len({plan.describe().partition(":")[2] for plan in plans}) == len(plans)
