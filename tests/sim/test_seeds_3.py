"""Share 3 of the seeds (``seeds.py``)."""

import pytest

from tests.sim.seeds import SEEDS


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", SEEDS.chunks(2))
def test_seeds(first: int) -> None:
    SEEDS.run_chunk(first)
