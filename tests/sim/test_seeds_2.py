"""Share 2 of the seeds (``seeds.py``)."""

import pytest

from tests.sim.seeds import chunks, run_chunk


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", chunks(1))
def test_seeds(first: int) -> None:
    run_chunk(first)
