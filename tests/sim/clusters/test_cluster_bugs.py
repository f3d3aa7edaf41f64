"""Who checks the checkers of replication: every planted bug is caught, and without it the same plan passes."""

from __future__ import annotations

import pytest

from tests.sim.clusters.bugs import SET_BUGS
from tests.sim.clusters.focus import focused
from tests.sim.clusters.world import simulate_set
from tests.sim.runs import SETS, catch, failure_text, quiet

SEEDS_MAX = 200
"""Within so many; most need one or two (``python -m tests.sim --clusters --bugs``)."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(SET_BUGS))
def test_a_planted_bug_is_caught(name: str) -> None:
    outcome = catch(name, SEEDS_MAX, SETS)
    assert outcome is not None, f"{name} ({SET_BUGS[name].text}) is not caught within {SEEDS_MAX} seeds"
    with quiet():
        sound = simulate_set(focused(outcome.seed, SET_BUGS[name].focus))
    assert not sound.violations, f"without the bug the same plan fails as well: {failure_text(sound, SETS)}"


ONLY_BY = {
    "P1": "forwarded-again-when-unknown",
    "P5": "sync-ends-at-its-base",
    "P6": "readers-see-a-mix",
    "P7": "gone-means-deleted",
    "P9": "answer-is-not-held",
    "P10": "lost-writes-forget-the-tail",
    "P11": "demotion-does-not-settle",
    "P12": "revoked-stream-goes-on",
    "flow": "window-is-ignored",
}
"""For each checker of replication, a bug that would escape without it."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("checker", ONLY_BY)
def test_every_checker_is_needed(checker: str) -> None:
    """It catches a bug that no other checker sees in the same runs."""
    name = ONLY_BY[checker]
    outcome = catch(name, SEEDS_MAX, SETS)
    assert outcome is not None
    assert outcome.violations[0].checker == checker
    without = catch(name, outcome.seed + 1, SETS, muted=checker)
    assert without is None, f"{checker} is silent and yet: {failure_text(without, SETS)}"


def test_there_are_enough() -> None:
    assert len(SET_BUGS) >= 25
    assert all(bug.text for bug in SET_BUGS.values())
