"""Real elections and replicated stores on a simulated Consul in virtual time: no seed may break a promise."""

import pytest

from tests.sim.runs import failure_text, run_seed

SEEDS = range(30)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_promise_is_broken(seed: int) -> None:
    outcome = run_seed(seed)
    assert not outcome.violations, failure_text(outcome)


def test_a_seed_replays_exactly() -> None:
    assert run_seed(7).trace == run_seed(7).trace
