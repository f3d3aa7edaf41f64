"""Share 1 of the seeds (``seeds.py``), and what happened in it."""

import pytest

from consul_backend.testing_faults import FAULTS
from tests.sim.plan import EVENTS
from tests.sim.seeds import SEEDS

SEEN = (
    # what the store does, as the witness sees it in the transactions
    *("data record", "tenure record", "part record", "commit record", "roll record", "abort record", "chunk"),
    *("flush", "checkpoint", "collect", "collect chunks", "repair"),
    # what comes of the nemesis
    *("reindexed", "quarantined", "restored", "foreign read", "restore", "halt", "same name"),
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", SEEDS.chunks(0))
def test_seeds(first: int) -> None:
    SEEDS.run_chunk(first)


@pytest.mark.timeout(600)
def test_every_kind_of_thing_happens() -> None:
    """Every act of the nemesis, every fault of a call, and every kind of work of the store, in the seeds above."""
    never = SEEDS.share_totals(0).never((*EVENTS, *FAULTS, *SEEN))
    assert not never, never
