"""Share 1 of the cluster seeds (``seeds.py``), and what happened in it."""

import pytest

from tests.sim.clusters.plan import EVENTS, TAMPERING
from tests.sim.clusters.seeds import SEEDS

SEEN = (
    *("record applied", "state taken over", "history adopted", "loss reported", "forecast"),
    *("forwarded", "forwarded late", "own write read", "read"),
    *("session read", "session wrote", "session refused", "session warned"),
    *("part record", "commit record", "collect"),
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", SEEDS.chunks(0))
def test_cluster_seeds(first: int) -> None:
    SEEDS.run_chunk(first)


@pytest.mark.timeout(600)
def test_every_kind_of_thing_happens() -> None:
    """Every act of nemesis and operator, every damage to a frame, and all that comes of it, in the seeds above."""
    never = SEEDS.share_totals(0).never((*EVENTS, *TAMPERING, *SEEN))
    assert not never, never
