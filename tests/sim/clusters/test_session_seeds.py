"""What sessions that carry ``X-Vault-Index`` through the simulated sets (P9) find where a rule is missing.

With every rule in place they run among the cluster seeds (``seeds.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sidecar.replication import session_index, sessions
from tests.sim.clusters.plan import make_plan
from tests.sim.runs import SETS, run_seed

SEEDS = [seed for seed in range(150) if make_plan(seed).sessions]


def never_lost(*_: Any) -> bool:
    return False


def by_number_alone(at: Any, history: Any) -> Any:
    return next((one for one in history if one.number == at.epoch), None)


def always_here(wanted: Any, *_: Any, **__: Any) -> session_index.Verdict:
    return session_index.Verdict.PRESENT


PLANTED: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "the fork point is forgotten": (session_index, "_is_lost", never_lost),
    "an epoch is known by its number": (sessions, "epoch_at", by_number_alone),
    "everything is taken to be here": (sessions, "judge_replicated", always_here),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_rule_that_is_left_out_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, wrong = PLANTED[name]
    monkeypatch.setattr(owner, attribute, wrong)
    for seed in reversed(SEEDS):  # what needs two promotions apart is rare among the first
        outcome = run_seed(seed, SETS)
        if outcome.violations:
            assert {one.checker for one in outcome.violations} == {"P9"}, outcome.violations
            return
    pytest.fail(f"{name}: not noticed within {len(SEEDS)} seeds")
