"""The two commands that a newcomer types first: ``make demo``, on both storages."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.cluster import ROOT

TIMEOUT_S = 900


@pytest.mark.parametrize("storage", ["embedded", "consul"])
@pytest.mark.timeout(TIMEOUT_S + 30)
def test_the_demo_shows_every_step(storage: str) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/demo.py", "--storage", storage],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "All 8 steps shown" in done.stdout
