"""Share 2 of the cluster seeds (``seeds.py``)."""

import pytest

from tests.sim.clusters.seeds import SEEDS


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", SEEDS.chunks(1))
def test_cluster_seeds(first: int) -> None:
    SEEDS.run_chunk(first)
