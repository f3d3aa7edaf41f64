"""Who checks the checkers: every planted bug is caught, and without bugs the same plans pass."""

from __future__ import annotations

import pytest

from tests.sim.bugs import BUGS
from tests.sim.focus import focused
from tests.sim.runs import catch, failure_text, quiet
from tests.sim.world import simulate

SEEDS_MAX = 200
"""Within so many; most need one or two (``python -m tests.sim --bugs``)."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_planted_bug_is_caught(name: str) -> None:
    outcome = catch(name, SEEDS_MAX)
    assert outcome is not None, f"{name} ({BUGS[name].text}) is not caught within {SEEDS_MAX} seeds"
    with quiet():
        sound = simulate(focused(outcome.seed, BUGS[name].focus))
    assert not sound.violations, f"without the bug the same plan fails as well: {failure_text(sound)}"


ONLY_BY = {
    "P1": "deposed-means-not-applied",
    "P2": "log-is-read-one-off",
    "P3": "list-of-a-deposed-leader",
    "P4": "data-before-record",
    "P8": "root-is-not-computed-anew",
    "P11": "collection-without-guards",
    "P13": "collection-from-the-new-end",
    "P14": "session-kept-after-lost-acquire",
    "F46": "newest-record-is-not-watched",
}
"""For each checker that a single cluster has, a bug that would escape without it."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("checker", ONLY_BY)
def test_every_checker_is_needed(checker: str) -> None:
    """It catches a bug that no other checker sees in the same runs."""
    name = ONLY_BY[checker]
    outcome = catch(name, SEEDS_MAX)
    assert outcome is not None
    assert outcome.violations[0].checker == checker
    without = catch(name, outcome.seed + 1, muted=checker)
    assert without is None, f"{checker} is silent and yet: {failure_text(without)}"


def test_there_are_enough() -> None:
    assert len(BUGS) >= 40
    assert all(bug.text for bug in BUGS.values())
