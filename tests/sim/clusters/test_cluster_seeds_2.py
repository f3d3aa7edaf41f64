"""Share 2 of the cluster seeds (``seeds.py``)."""

import pytest

from tests.sim.clusters.seeds import chunks, run_chunk


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", chunks(1))
def test_cluster_seeds(first: int) -> None:
    run_chunk(first)
